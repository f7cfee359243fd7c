"""What came out: a table for people, CSV for programs, figures where matplotlib is installed."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..checkpoints.save import save_bytes
from ..embedded.model import NAME as SHIPPED
from .budgets import Budget
from .cells import Table
from .measurements import CFG
from .rows.claims import Chart, Claim, Row
from .statistics import RULE, Interval, interval

NAME = "paper"  # of the files
COLUMNS = (
    "row",
    "claim",
    "whose",
    "paper",
    "unit",
    "mean",
    "low",
    "high",
    "seeds",
    "verdict",
    "values",
)


@dataclass(frozen=True)
class Outcome:
    """A row and what of it is measured."""

    row: Row
    table: Table
    wanted: int  # cells of it, measured or not
    budget: Budget

    @property
    def claims(self) -> Sequence[Claim]:
        return self.row.claims(self.budget, self.table)

    @property
    def charts(self) -> list[Chart]:
        """Those with something in them that is not 0."""
        return [chart for chart in self._measured if any(map(any, all_values(chart)))]

    @property
    def zeros(self) -> list[Chart]:
        """Those with nothing but 0 in them."""
        return [chart for chart in self._measured if not any(map(any, all_values(chart)))]

    @property
    def _measured(self) -> list[Chart]:
        every = self.row.charts(self.budget, self.table)
        return [chart for chart in every if any(curve.points for curve in chart.curves)]

    @property
    def seconds(self) -> float:
        return sum(cell.seconds for cell in self.table.cells.values())

    @property
    def complete(self) -> bool:
        return len(self.table.cells) == self.wanted


def all_values(chart: Chart) -> Iterable[Sequence[float]]:
    return (values for curve in chart.curves for values in curve.points.values())


def write_report(
    folder: Path, outcomes: Sequence[Outcome], name: str, budget: Budget
) -> tuple[list[Path], list[str]]:
    """Write all files, each whole or not at all; returns them, and sentences for the user.

    name: of the budget.
    """
    notes, figures = [], {}
    if find_spec("matplotlib") is None:
        notes.append("no figures: matplotlib is not installed (pip install matplotlib).")
    else:
        for outcome in outcomes:
            if outcome.charts:
                path = folder / f"{NAME}-{outcome.row.name}.png"
                figures[outcome.row.name] = save_bytes(path, figure(outcome.charts))
    text = markdown(outcomes, name, budget, {row: path.name for row, path in figures.items()})
    written = [
        save_bytes(folder / f"{NAME}.md", text.encode()),
        save_bytes(folder / f"{NAME}.csv", as_csv(outcomes).encode()),
        *figures.values(),
    ]
    return written, notes


def as_csv(outcomes: Iterable[Outcome]) -> str:
    """A line for each claim; numbers in full, what is infinite or not measured left empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for outcome in outcomes:
        for claim in outcome.claims:
            found = claim.interval
            numbers = (found.mean, found.low, found.high) if found else (math.nan,) * 3
            writer.writerow(
                [
                    outcome.row.name,
                    claim.text,
                    "own" if claim.own else "paper",
                    claim.paper,
                    claim.unit,
                    *(f"{number:.6g}" if math.isfinite(number) else "" for number in numbers),
                    len(claim.values),
                    claim.verdict,
                    " ".join(f"{value:.6g}" for value in claim.values),
                ]
            )
    return file.getvalue()


def markdown(
    outcomes: Sequence[Outcome], name: str, budget: Budget, figures: dict[str, str]
) -> str:
    """The report.  figures: file by row."""
    every = [claim for outcome in outcomes for claim in outcome.claims]
    papers = [claim for claim in every if not claim.own]
    ours = [claim for claim in every if claim.own]
    lines = [
        "# The paper in miniature",
        "",
        "What the choices of Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206) do in a "
        "world of coloured shapes, with networks of 0.2 to 4 million weights instead of 0.5 to 8 "
        "billion. That a claim is not shown here says that it does not show at this size and with "
        "this much training; it says nothing against the paper.",
        "",
        f"Of {len(papers)} claims of the paper: {counted(papers)}. Of {len(ours)} questions of our "
        f"own and checks, *own* in the tables: {counted(ours)}.",
        "",
        f"**The rule.** {RULE}",
        "",
        f"**The budget.** `{name}` ({budget.what}): {budget.seeds} seeds; arms of depth "
        f"{', '.join(map(str, budget.depths))} learn {budget.steps} steps of {budget.batch_size} "
        f"pictures of 64 px with one thing each, and draw {budget.pictures} prompts; the shipped "
        f"model, {SHIPPED}, draws {budget.prompts} prompts of each of six categories with every "
        f"seed. Arms are drawn with cfg {CFG:g}, the shipped model with its own settings but for "
        "what a row varies.",
        "",
        f"**The machine.** {machines(outcomes)}",
        "",
        "*Attributes right*: of what the prompts ask for (number, shape, colour, size, place, "
        "ground), the share that the checker finds; any one thing has some of them right, so "
        "near 30 % a difference can hardly show. *Pictures right*: those in which nothing is "
        "wrong. *FID*: Fréchet distance of fixed features, in percent of the true pictures' "
        "variance, from few pictures; it compares within this report and with nothing else.",
        "",
        "```",
        f"python -m sd3_core study --budget {name}",
        "```",
        "",
        "makes it again, going on where it was stopped; a row's name behind `study` makes that "
        f"row. All numbers are in [`{NAME}.csv`]({NAME}.csv).",
    ]
    for outcome in outcomes:
        lines += ["", *section(outcome, figures.get(outcome.row.name))]
    return "\n".join(lines) + "\n"


VERDICTS = ("shown", "not shown", "reversed", "not measured")


def counted(claims: Sequence[Claim]) -> str:
    counts = {verdict: sum(claim.verdict == verdict for claim in claims) for verdict in VERDICTS}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) or "none"


def machines(outcomes: Iterable[Outcome]) -> str:
    spent: dict[str, float] = {}
    for outcome in outcomes:
        for cell in outcome.table.cells.values():
            spent[cell.where] = spent.get(cell.where, 0.0) + cell.seconds
    if not spent:
        return "Nothing is measured yet."
    return "; ".join(sorted(spent)) + "."


def section(outcome: Outcome, figure_name: str | None) -> list[str]:
    """A row: its claims, then the numbers behind them."""
    row = outcome.row
    lines = [f"## {row.title}", "", row.setup, ""]
    if not outcome.complete:
        done = len(outcome.table.cells)
        lines += [f"Unfinished: {done} of {outcome.wanted} measurements are there.", ""]
    lines += [
        "| claim | paper | ours | 95 % interval | seeds | verdict |",
        "|---|---|---:|---|---:|---|",
    ]
    for claim in outcome.claims:
        ours, between = shown_interval(claim.interval, claim.unit)
        paper = f"*own*: {claim.paper}" if claim.own else claim.paper
        lines.append(
            f"| {claim.text} | {paper} | {ours} | {between} | {len(claim.values)} "
            f"| {claim.verdict} |"
        )
    for chart in outcome.charts:
        lines += ["", *numbers_table(chart)]
    for chart in outcome.zeros:
        lines += ["", f"{chart.up}: 0 everywhere; nothing can be told from it."]
    if figure_name:
        lines += ["", f"![{row.title}]({figure_name})"]
    command = f"python -m sd3_core study {row.name}"
    again = f"Again: `{command}`"
    if row.workflow:
        again += f", or the workflow `{row.workflow}`"
    if outcome.seconds:
        again += f"; {outcome.seconds:.0f} s of measuring (what rows share counts in each)"
    return [*lines, "", f"{again}."]


def numbers_table(chart: Chart) -> list[str]:
    """Means with half of their 95 % interval: a line for each x, a column for each curve."""
    across = list(dict.fromkeys(x for curve in chart.curves for x in curve.points))
    if all(not isinstance(x, str) for x in across):
        across.sort(key=float)
    curves = [curve for curve in chart.curves if curve.points]
    heads = [curve.label if len(curves) > 1 else chart.up for curve in curves]
    lines = [
        f"| {chart.across} | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for x in across:
        cells = [spread(curve.points.get(x, ())) for curve in curves]
        lines.append(f"| {x if isinstance(x, str) else f'{x:g}'} | " + " | ".join(cells) + " |")
    return [f"{chart.up}:", "", *lines] if len(curves) > 1 else lines


def spread(values: Sequence[float]) -> str:
    """Mean ± half of the interval; a dash for nothing."""
    if not values:
        return "–"
    found = interval(values)
    half = (found.high - found.low) / 2
    return f"{number(found.mean)} ± {number(half)}" if math.isfinite(half) else number(found.mean)


def shown_interval(found: Interval | None, unit: str) -> tuple[str, str]:
    if found is None:
        return "–", "–"
    ours = f"{number(found.mean, signed=True)} {unit}"
    if not math.isfinite(found.low):
        return ours, "one seed has none"
    return ours, f"{number(found.low, signed=True)} to {number(found.high, signed=True)}"


def number(value: float, *, signed: bool = False) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    if digits > 6:
        return f"{value:+.2e}" if signed else f"{value:.2e}"
    return f"{value:{'+' if signed else ''}.{digits}f}"


def text_table(outcomes: Iterable[Outcome]) -> str:
    """For the terminal: a line for each claim."""
    lines = []
    for outcome in outcomes:
        lines.append(f"{outcome.row.name}: {outcome.row.title}")
        for claim in outcome.claims:
            ours, between = shown_interval(claim.interval, claim.unit)
            lines.append(f"  {claim.verdict:<13} {claim.text}: {ours} ({between})")
    return "\n".join(lines)


def figure(charts: Sequence[Chart]) -> bytes:
    """PNG: a panel for each chart, means with their intervals."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5 * len(charts), 4), layout="constrained")
    for axes, chart in zip(drawn.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        panel(axes, chart)
    file = io.BytesIO()
    drawn.savefig(file, format="png", dpi=100)
    return file.getvalue()


def panel(axes: Any, chart: Chart) -> None:
    for curve in chart.curves:
        if not curve.points:
            continue
        across = list(curve.points)
        named = isinstance(across[0], str)
        if not named:
            across.sort(key=float)
        found = [interval(curve.points[x]) for x in across]
        halves = [(one.high - one.low) / 2 for one in found]
        axes.errorbar(
            across,
            [one.mean for one in found],
            yerr=[half if math.isfinite(half) else 0.0 for half in halves],
            marker="o",
            linestyle="none" if named else "-",
            capsize=3,
            label=curve.label,
        )
    if chart.logarithmic:
        axes.set_xscale("log")
        measured = sorted({float(x) for curve in chart.curves for x in curve.points})
        axes.set_xticks(measured, [f"{x:g}" for x in measured])
        axes.minorticks_off()
    if chart.logarithmic_up:
        axes.set_yscale("log")
    axes.set_xlabel(chart.across)
    axes.set_ylabel(chart.up)
    axes.tick_params(axis="x", labelrotation=20)
    if len(chart.curves) > 1:
        axes.legend(fontsize="small")
