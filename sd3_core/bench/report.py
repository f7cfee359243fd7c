"""What came out: lines for the terminal, JSON, and a picture where matplotlib is installed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from .cases import as_json, tolerance
from .run import IN_COMFYUI, Measured, Outcome

NATIVE = "comfyui"
SLOWER = 1.05  # of ComfyUI's time: beyond it the bench fails


@dataclass(frozen=True)
class Ratio:
    """Our time over another arm's, round by round."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Growth:
    """How one arm's time grows along a study.

    exponent: the slope of log time over log size.  fixed, each: seconds of the straight line
    fixed + each * size, the law of steps.
    """

    study: str
    arm: str
    exponent: float
    fixed: float
    each: float


def ratio(outcome: Outcome, arm: str) -> Ratio:
    ours, theirs = outcome.arms[outcome.ours].seconds, outcome.arms[arm].seconds
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


def slower(outcome: Outcome) -> list[str]:
    """A sentence for each of ComfyUI's arms that takes clearly less time than ours."""
    if outcome.failed or outcome.case.work not in ("forward", "sample", "decode"):
        return []
    found = {
        (outcome.ours, arm): ratio(outcome, arm).median
        for arm in outcome.arms
        if arm.startswith("comfyui")
    }
    if {IN_COMFYUI, NATIVE} <= outcome.arms.keys():  # on the same attention
        ours, theirs = (outcome.arms[arm].seconds for arm in (IN_COMFYUI, NATIVE))
        found[IN_COMFYUI, NATIVE] = median(a / b for a, b in zip(ours, theirs, strict=True))
    return [
        f"{outcome.case.name}: {ours} takes {times:.2f} of {arm}'s time, more than {SLOWER:.2f}."
        for (ours, arm), times in found.items()
        if times > SLOWER
    ]


def lines(outcome: Outcome) -> Iterator[str]:
    """One case for the terminal.  No time where an arm is wrong."""
    what = {"call": ": the call alone", "touched": ": the call, and every weight read once"}
    yield f"{outcome.case.name}: {outcome.case.title}{what.get(outcome.part, '')}"
    for arm, reason in outcome.left_out.items():
        yield f"  {arm:<17}left out: {reason}"
    if outcome.failed:
        yield from wrong_lines(outcome)
        return
    if len(outcome.arms) == 1:
        yield "  (nothing here to compare with)"
    for arm, measured in outcome.arms.items():
        yield f"  {arm:<17}" + time_columns(outcome, arm, measured)


def wrong_lines(outcome: Outcome) -> Iterator[str]:
    allowed = tolerance(outcome.case) * outcome.scale
    for arm in outcome.wrong:
        difference = outcome.arms[arm].difference
        found = "another shape" if difference is None else f"max |diff| {difference:.2g}"
        yield f"  {arm:<17}WRONG: {found} from ours, {allowed:.2g} allowed; nothing was timed"


def time_columns(outcome: Outcome, arm: str, measured: Measured) -> str:
    columns = [f"{median(measured.seconds):8.3f} s", f"wall {min(measured.wall):8.3f} s"]
    training = outcome.case.work == "train"
    held = measured.memory.get("gpu") or measured.memory.get("grown" if training else "private")
    columns.append(f"{held / 1e6:7.0f} MB" if held else " " * 10)
    if training:
        columns.append(f"{outcome.case.steps / median(measured.seconds):6.2f} steps/s")
        columns.append(f"trains {measured.trained or 0:,}")
    if outcome.case.work == "sample":
        columns.append(f"{1000 * median(measured.seconds) / outcome.case.steps:8.1f} ms/step")
    if outcome.floor:
        columns.append(f"{100 * outcome.floor / median(measured.seconds):3.0f} % of floor")
    columns += traffic_columns(measured, outcome.case.steps)
    if arm != outcome.ours:
        compared = ratio(outcome, arm)
        columns.append(
            f"ours takes {compared.median:.2f} of it [{compared.lowest:.2f}-{compared.highest:.2f}]"
        )
        columns.append(
            "a loss of its own (x0): finite"
            if measured.difference is None
            else f"max |diff| {measured.difference:.1e}"
        )
    return "  ".join(columns)


def traffic_columns(measured: Measured, steps: int) -> list[str]:
    moved, kernels = (measured.traffic.get(name) for name in ("moved", "kernels"))
    columns = [] if moved is None else [f"{moved / steps / 1e6:6.0f} MB/step moved"]
    return columns if kernels is None else [*columns, f"{kernels / steps:5.0f} kernels/step"]


def legend(surroundings: Mapping[str, Any]) -> str:
    clock = "CPU time of all threads" if surroundings["device"] == "cpu" else "GPU time"
    held = (
        "private memory of the process (train: its growth)"
        if clock.startswith("CPU")
        else "allocated GPU memory"
    )
    return (
        f"Columns: {clock}, median of {surroundings['rounds']} interleaved rounds; shortest wall "
        f"time; most {held}; floor: the multiplications alone at the speed of a plain product; "
        "our time over theirs, median [range] of the rounds."
    )


def growths(outcomes: Sequence[Outcome]) -> list[Growth]:
    """The studies that have at least two points, arm by arm."""
    studies: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for outcome in outcomes:
        if outcome.case.study and not outcome.failed:
            for arm, measured in outcome.arms.items():
                point = (outcome.case.at, median(measured.seconds))
                studies.setdefault((outcome.case.study, arm), []).append(point)
    return [growth(*key, points) for key, points in studies.items() if len(points) > 1]


def growth(study: str, arm: str, points: Sequence[tuple[float, float]]) -> Growth:
    """Least squares through (size, seconds), on logarithms and as they are."""
    exponent, _ = line_through([(math.log(size), math.log(time)) for size, time in points])
    each, fixed = line_through(points)
    return Growth(study, arm, exponent, fixed, each)


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and intercept of least squares."""
    x0 = sum(x for x, _ in points) / len(points)
    y0 = sum(y for _, y in points) / len(points)
    spread = sum((x - x0) ** 2 for x, _ in points)
    slope = sum((x - x0) * (y - y0) for x, y in points) / spread
    return slope, y0 - slope * x0


def growth_lines(found: Sequence[Growth]) -> Iterator[str]:
    for one in found:
        law = f"time grows with {one.study}^{one.exponent:.2f}"
        if one.study == "steps":
            law = f"{one.fixed:.3f} s and {one.each:.3f} s for each step"
        yield f"  {one.arm:<17}{one.study}: {law}"


def as_json_report(
    surroundings: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    ceilings: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """All of it, as JSON values.  Seconds and bytes; no seconds where an arm was wrong."""
    return {
        "format": 1,
        "surroundings": dict(surroundings),
        "ceilings": dict(ceilings or {}),
        "cases": [case_json(outcome) for outcome in outcomes],
        "growth": [asdict(one) for one in growths(outcomes)],
    }


def case_json(outcome: Outcome) -> dict[str, Any]:
    arms: dict[str, Any] = {}
    for name, measured in outcome.arms.items():
        arms[name] = asdict(measured)
        if measured.seconds and name != outcome.ours:
            arms[name]["ours_over_this"] = asdict(ratio(outcome, name))
    return {
        "name": outcome.case.name,
        "part": outcome.part,
        "case": as_json(outcome.case),
        "equal": not outcome.wrong,
        "largest_value": outcome.scale,
        "floor": outcome.floor,
        "wrong": outcome.wrong,
        "left_out": outcome.left_out,
        "arms": arms,
    }


def check_plot() -> None:
    """Raises ValueError when matplotlib is not installed: before anything is measured."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            "--plot needs matplotlib, which is not installed: `pip install matplotlib`, or leave "
            "--plot away."
        )


def plot(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Left: our time over each other arm's.  Right: the studies of growth.

    The format is that of the path's ending, e.g. .png or .svg.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    plot_ratios(bars, [outcome for outcome in outcomes if not outcome.failed])
    plot_growth(curves, outcomes)
    figure.savefig(path)


def plot_ratios(axes: Any, outcomes: Sequence[Outcome]) -> None:
    arms = list(dict.fromkeys(a for o in outcomes for a in o.arms if a != o.ours))
    height = 0.8 / max(len(arms), 1)
    for index, arm in enumerate(arms):
        found = [(row, outcome) for row, outcome in enumerate(outcomes) if arm in outcome.arms]
        axes.barh(
            [row + index * height for row, _ in found],
            [ratio(outcome, arm).median for _, outcome in found],
            height,
            label=arm,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(outcomes)), [f"{o.case.name} {o.part}".strip() for o in outcomes])
    axes.invert_yaxis()
    axes.set_xlabel("our time over theirs (left of 1: ours is faster)")
    if arms:
        axes.legend()


def plot_growth(axes: Any, outcomes: Sequence[Outcome]) -> None:
    for one in growths(outcomes):
        points = sorted(
            (outcome.case.at, median(outcome.arms[one.arm].seconds))
            for outcome in outcomes
            if outcome.case.study == one.study and one.arm in outcome.arms and not outcome.failed
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{one.study}, {one.arm}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tokens, pictures or steps")
    axes.set_ylabel("seconds")
    if axes.lines:
        axes.legend(fontsize="x-small")
