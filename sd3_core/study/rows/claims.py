"""What a row is made of: measurements, claims about them, and the numbers to show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..arms import Arm
from ..budgets import Budget
from ..cells import Table
from ..lab import Measurement
from ..measurements import ArmScore
from ..statistics import Interval, Verdict, interval, interval_of_correlations


@dataclass(frozen=True)
class Claim:
    """A difference that is above 0 where the text holds.

    values: ours, one for each seed; none: not measured (yet).
    """

    text: str
    paper: str  # its number, with what it counts
    unit: str
    values: tuple[float, ...]
    own: bool = False  # a question of ours or a check: the paper does not claim it
    correlated: bool = False  # the values are correlations

    @property
    def interval(self) -> Interval | None:
        if not self.values:
            return None
        return (interval_of_correlations if self.correlated else interval)(self.values)

    @property
    def verdict(self) -> Verdict:
        return self.interval.verdict if self.interval else "not measured"


@dataclass(frozen=True)
class Curve:
    """Numbers to show: at each x the values of the seeds."""

    label: str
    points: Mapping[str | float, Sequence[float]]


@dataclass(frozen=True)
class Chart:
    """Curves over one axis."""

    across: str
    up: str
    curves: tuple[Curve, ...]
    logarithmic: bool = False  # the axis across
    logarithmic_up: bool = False


@dataclass(frozen=True)
class Row:
    """measurements: by budget; claims and charts: what follows from those that are there."""

    name: str
    title: str
    setup: str  # what is compared, in a sentence or two
    measurements: Callable[[Budget], Sequence[Measurement]]
    claims: Callable[[Budget, Table], Sequence[Claim]]
    charts: Callable[[Budget, Table], Sequence[Chart]]
    workflow: str = ""  # that shows it: a file in workflows/, without its ending


def arm(
    budget: Budget,
    *,
    depth: int | None = None,
    objective: str = "flow_matching",
    density: str = "logit_normal(0, 1)",
    full_captions: float = 0.5,
    encoder_dropout: float = 0.0,
    qk_norm: bool = True,
) -> Arm:
    """The base arm, but for what is said."""
    return Arm(
        depth=depth or budget.base_depth,
        steps=budget.steps,
        batch_size=budget.batch_size,
        learning_rate=budget.learning_rate,
        scenes=budget.scenes,
        objective=objective,
        density=density,
        full_captions=full_captions,
        encoder_dropout=encoder_dropout,
        qk_norm=qk_norm,
    )


def scored(budget: Budget, label: str, made: Arm) -> ArmScore:
    """An arm's loss, and its scores at all numbers of sampling steps."""
    return ArmScore(label, made, budget.sampling_steps, budget.pictures)


def usual_steps(budget: Budget) -> int:
    """Of the numbers of sampling steps the last but one: 25."""
    return budget.sampling_steps[-2]


def scored_once(
    budget: Budget, label: str, made: Arm, use: tuple[str, ...], *, full: bool = False
) -> ArmScore:
    """An arm's scores at the usual number of steps, with these encoders."""
    return ArmScore(label, made, (usual_steps(budget),), budget.pictures, use=use, full=full)


def differences(
    table: Table, better: tuple[str, str], worse: tuple[str, str], *, falls: bool = False
) -> tuple[float, ...]:
    """Seed by seed, (name, quantity) minus (name, quantity).

    falls: the quantity is better when it is small (a loss), and the difference the other way round.
    """
    sign = -1 if falls else 1
    return tuple(
        sign * (table.number(*_at(better, seed)) - table.number(*_at(worse, seed)))
        for seed in table.seeds(better[0], worse[0])
    )


def _at(which: tuple[str, str], seed: int) -> tuple[str, int, str]:
    name, quantity = which
    return name, seed, quantity


def curve(label: str, table: Table, points: Mapping[Any, tuple[str, str]]) -> Curve:
    """points: x -> (name, quantity); those that are not measured are left out."""
    values = {x: table.values(name, quantity) for x, (name, quantity) in points.items()}
    return Curve(label, {x: some for x, some in values.items() if some})
