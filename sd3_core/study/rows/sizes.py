"""What depth changes: how many steps are needed, how long the path is, the validation loss."""

from ..budgets import Budget
from ..cells import Table
from ..lab import Measurement
from ..measurements import ArmScore, Drawn
from ..statistics import correlation
from .claims import Chart, Claim, Row, arm, curve, differences, scored, usual_steps
from .trained import base

SHIPPED = "shipped model"


def name_of(budget: Budget, depth: int) -> str:
    return base(budget).label if depth == budget.base_depth else f"depth {depth}"


def depth_arms(budget: Budget) -> list[ArmScore]:
    return [
        scored(budget, name_of(budget, depth), arm(budget, depth=depth)) for depth in budget.depths
    ]


def shipped(budget: Budget, steps: int) -> Drawn:
    return Drawn(f"{SHIPPED}, {steps} steps", budget.prompts, steps=steps)


# Steps


def steps_measured(budget: Budget) -> list[Measurement]:
    return [*depth_arms(budget), *(shipped(budget, steps) for steps in budget.sampling_steps)]


def losses(table: Table, many: tuple[str, str], few: tuple[str, str]) -> dict[int, float]:
    """By seed: percent of the score at many steps that is lost at few; each a cell's quantity."""
    found = {}
    for seed in table.seeds(many[0], few[0]):
        full, part = (table.number(name, seed, quantity) for name, quantity in (many, few))
        found[seed] = 100 * (full - part) / max(full, 1e-9)
    return found


def steps_claims(budget: Budget, table: Table) -> list[Claim]:
    few, many = budget.sampling_steps[0], budget.sampling_steps[-1]
    shallow, deep = budget.depths[0], budget.depths[-1]
    lost = {
        depth: losses(
            table, *((name_of(budget, depth), f"attributes@{steps}") for steps in (many, few))
        )
        for depth in (shallow, deep)
    }
    both = sorted(set(lost[shallow]) & set(lost[deep]))
    drawn = ((shipped(budget, steps).label, "attributes") for steps in (many, few))
    return [
        Claim(
            f"{few} steps lose score against {many}, depth {shallow}",
            "4.30 % of the CLIP score, depth 15",
            "%",
            tuple(lost[shallow].values()),
        ),
        Claim(
            f"{few} steps lose score against {many}, depth {deep}",
            "2.71 %, depth 38",
            "%",
            tuple(lost[deep].values()),
        ),
        Claim(
            f"depth {deep} loses less than depth {shallow}",
            "1.59 points less, depth 38 against 15",
            "points",
            tuple(lost[shallow][seed] - lost[deep][seed] for seed in both),
        ),
        Claim(
            f"{few} steps lose score against {many}, {SHIPPED}",
            "2.71 to 4.30 %",
            "%",
            tuple(losses(table, *drawn).values()),
        ),
    ]


def steps_charts(budget: Budget, table: Table) -> list[Chart]:
    arms = [
        curve(
            f"depth {depth}",
            table,
            {n: (name_of(budget, depth), f"attributes@{n}") for n in budget.sampling_steps},
        )
        for depth in budget.depths
    ]
    points = {n: (shipped(budget, n).label, "attributes") for n in budget.sampling_steps}
    every = (*arms, curve(SHIPPED, table, points))
    return [Chart("sampling steps", "attributes right, %", every, logarithmic=True)]


STEPS = Row(
    "steps",
    "Larger models need fewer steps",
    "Arms of each depth, and the shipped model, sampled with few steps and many. The score is the "
    "share of what was asked for that the checker finds.",
    steps_measured,
    steps_claims,
    steps_charts,
    workflow="sweep",
)


# Path


def path_measured(budget: Budget) -> list[Measurement]:
    return [*depth_arms(budget), shipped(budget, budget.sampling_steps[-1])]


def path_claims(budget: Budget, table: Table) -> list[Claim]:
    steps = budget.sampling_steps[-1]
    shallow, deep = (name_of(budget, d) for d in (budget.depths[0], budget.depths[-1]))
    shorter = tuple(
        100
        * (
            1
            - table.number(deep, seed, f"path@{steps}")
            / table.number(shallow, seed, f"path@{steps}")
        )
        for seed in table.seeds(shallow, deep)
    )
    straighter = differences(
        table, (deep, f"straightness@{steps}"), (shallow, f"straightness@{steps}")
    )
    return [
        Claim(
            f"depth {budget.depths[-1]} walks a shorter path than depth {budget.depths[0]}",
            "2.7 % shorter (185.96 against 191.13), depth 38 against 15",
            "%",
            shorter,
        ),
        Claim(
            f"depth {budget.depths[-1]} walks a straighter path than depth {budget.depths[0]}",
            "said of the larger models; no number",
            "of 1",
            straighter,
        ),
    ]


def path_charts(budget: Budget, table: Table) -> list[Chart]:
    steps = budget.sampling_steps[-1]
    last = shipped(budget, steps).label
    charts = []
    for quantity, up in (("path", "path length"), ("straightness", "chord / path length")):
        points = {f"depth {d}": (name_of(budget, d), f"{quantity}@{steps}") for d in budget.depths}
        every = (
            curve("64 px arms", table, points),
            curve(SHIPPED, table, {SHIPPED: (last, quantity)}),
        )
        charts.append(Chart("model", up, every))
    return charts


PATH = Row(
    "path",
    "Larger models walk straighter",
    "Euclidean length of the way a latent goes in sampling, and the distance of its ends divided "
    "by it (1 is a straight line). Lengths grow with the latent: the shipped model's, of 128 px, "
    "does not compare with the arms'.",
    path_measured,
    path_claims,
    path_charts,
    workflow="sweep",
)


# Scaling


def halves(budget: Budget) -> dict[tuple[int, bool], ArmScore]:
    """Each depth after half of its steps and after all."""
    found: dict[tuple[int, bool], ArmScore] = {}
    for depth in budget.depths:
        made = arm(budget, depth=depth)
        half = ArmScore(
            f"depth {depth}, half", made, (usual_steps(budget),), budget.pictures, half=True
        )
        found[depth, True] = half
        found[depth, False] = scored(budget, name_of(budget, depth), made)
    return found


def scaling_claims(budget: Budget, table: Table) -> list[Claim]:
    points, steps = halves(budget), usual_steps(budget)
    claims = []
    for small, large in zip(budget.depths, budget.depths[1:], strict=False):
        names = points[large, False].label, points[small, False].label
        values = differences(table, (names[0], "loss"), (names[1], "loss"), falls=True)
        text = f"depth {large} has a lower validation loss than depth {small} at equal steps"
        claims.append(
            Claim(text, "smooth fall from depth 15 to 38; no number read", "loss", values)
        )
    for depth in budget.depths:
        names = points[depth, False].label, points[depth, True].label
        values = differences(table, (names[0], "loss"), (names[1], "loss"), falls=True)
        text = f"depth {depth}: twice the steps lower the validation loss"
        claims.append(Claim(text, "a check of the training", "loss", values, own=True))
    names = [one.label for one in points.values()]
    for quantity, what, sign, paper in (
        (f"attributes@{steps}", "the other way", -1, "strong, with GenEval, CompBench and votes"),
        (f"fid@{steps}", "the same way", 1, "FID is not said"),
    ):
        values = tuple(
            sign
            * correlation(
                [table.number(name, seed, "loss") for name in names],
                [table.number(name, seed, quantity) for name in names],
            )
            for seed in table.seeds(*names)
        )
        name = "score" if sign < 0 else "FID"
        text = f"the {name} goes {what} as the validation loss: correlation over depths and steps"
        claims.append(Claim(text, paper, "of 1", values, own=sign > 0, correlated=True))
    return claims


def scaling_charts(budget: Budget, table: Table) -> list[Chart]:
    points, steps = halves(budget), usual_steps(budget)
    charts = []
    for quantity, up in (
        ("loss", "validation loss"),
        (f"attributes@{steps}", "attributes right, %"),
    ):
        curves = []
        for depth in budget.depths:
            at = {
                gigaflops(budget, depth, half=half): (points[depth, half].label, quantity)
                for half in (True, False)
            }
            curves.append(curve(f"depth {depth}", table, at))
        charts.append(Chart("training compute, GFLOP", up, tuple(curves), logarithmic=True))
    return charts


def gigaflops(budget: Budget, depth: int, *, half: bool) -> float:
    """Of training: 6 per weight of the blocks and token, adaLN left out; three significant digits.

    Tokens: 16 of the picture, 48 of the text.
    """
    tokens, width = 64, 64 * depth
    per_sample = 6 * 12 * width**2 * depth * tokens
    steps = budget.steps // 2 if half else budget.steps
    return float(f"{per_sample * steps * budget.batch_size / 1e9:.3g}")


SCALING = Row(
    "scaling",
    "Validation loss by depth and compute, and what it tells",
    "Each depth after half of its training and after all of it. The correlation is taken over "
    "these points within a seed.",
    lambda budget: list(halves(budget).values()),
    scaling_claims,
    scaling_charts,
)
