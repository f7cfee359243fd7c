"""Timestep densities, and the rectified flow against the diffusion objectives."""

from ..budgets import Budget
from ..cells import Table
from ..measurements import ArmScore, Ceiling
from .claims import Chart, Claim, Row, arm, curve, differences, scored, usual_steps

BASE = "rf, lognorm(0, 1)"

# Label -> density, and the paper's mean rank over all settings (table 1; rf/lognorm(0, 1): 1.54).
DENSITY_RANKS = {
    "rf, uniform": ("uniform", 5.67),
    "rf, mode(1.29)": ("mode(1.29)", 2.75),
    "rf, cosmap": ("cosmap", 4.13),
}
# Label -> objective, the paper's mean rank at 5 steps and at 50 (rf/lognorm(0, 1): 1.25 and 1.50).
# EDM divides by the data's standard deviation, which is 1 for these latents.
OBJECTIVE_RANKS = {
    "eps, linear": ("eps_linear", 4.25, 2.75),
    "v, cosine": ("v_cosine", 12.25, 8.75),
    "EDM(-1.2, 1.2)": ("edm(-1.2, 1.2, 1)", 20.25, 15.00),
}


def base(budget: Budget) -> ArmScore:
    return scored(budget, BASE, arm(budget))


def density_arms(budget: Budget) -> list[ArmScore]:
    others = [
        scored(budget, label, arm(budget, density=density))
        for label, (density, _) in DENSITY_RANKS.items()
    ]
    return [base(budget), *others]


def density_claims(budget: Budget, table: Table) -> list[Claim]:
    steps, claims = usual_steps(budget), []
    for label in (BASE, "rf, mode(1.29)", "rf, cosmap"):
        rank = 1.54 if label == BASE else DENSITY_RANKS[label][1]
        paper = f"mean rank {rank:.2f} against 5.67"
        for quantity, what, unit, falls in (
            ("loss", "validation loss, less", "loss", True),
            (f"attributes@{steps}", f"score at {steps} steps, more", "points", False),
            (f"fid@{steps}", f"FID at {steps} steps, less", "FID", True),
        ):
            values = differences(table, (label, quantity), ("rf, uniform", quantity), falls=falls)
            text = f"{label} beats uniform times: {what}"
            own = quantity == "loss"  # the paper ranks by CLIP score and FID
            said = "not ranked by it" if own else paper
            claims.append(Claim(text, said, unit, values, own))
    return claims


def density_charts(budget: Budget, table: Table) -> list[Chart]:
    labels = [one.label for one in density_arms(budget)]
    steps = usual_steps(budget)
    return [
        Chart(
            "density of training times",
            up,
            (curve(up, table, {label: (label, quantity) for label in labels}),),
        )
        for quantity, up in (
            ("loss", "validation loss"),
            (f"attributes@{steps}", "attributes right, %"),
            (f"right@{steps}", "pictures right, %"),
            (f"fid@{steps}", "FID, own features"),
        )
    ]


DENSITIES = Row(
    "densities",
    "Where the training times lie",
    "Equal budgets, equal pictures and noise; only the law of the time differs. The validation "
    "loss is the mean over seven equidistant times, so uniform times train on just what is "
    "measured. The paper's mean rank is of CLIP score and FID together, among 61 formulations and "
    "over all settings of drawing: less is better.",
    density_arms,
    density_claims,
    density_charts,
)


def objective_arms(budget: Budget) -> list[ArmScore | Ceiling]:
    uniform = scored(budget, "rf, uniform", arm(budget, density="uniform"))
    others = [
        scored(budget, label, arm(budget, objective=objective))
        for label, (objective, *_) in OBJECTIVE_RANKS.items()
    ]
    return [Ceiling(budget.pictures), base(budget), uniform, *others]


def objective_claims(budget: Budget, table: Table) -> list[Claim]:
    few, many = budget.sampling_steps[0], budget.sampling_steps[-1]
    claims = []
    for label, (_, rank_few, rank_many) in OBJECTIVE_RANKS.items():
        for steps, ours, theirs in ((few, 1.25, rank_few), (many, 1.5, rank_many)):
            paper = f"mean rank {ours:.2f} against {theirs:.2f}"
            for quantity, what, unit, falls in (
                (f"attributes@{steps}", "score, more", "points", False),
                (f"fid@{steps}", "FID, less", "FID", True),
            ):
                values = differences(table, (BASE, quantity), (label, quantity), falls=falls)
                text = f"{BASE} beats {label} at {steps} steps: {what}"
                claims.append(Claim(text, paper, unit, values))
    return claims


def objective_charts(budget: Budget, table: Table) -> list[Chart]:
    labels = [BASE, "rf, uniform", *OBJECTIVE_RANKS]
    return [
        Chart(
            "sampling steps",
            up,
            tuple(
                curve(label, table, {n: (label, f"{quantity}@{n}") for n in budget.sampling_steps})
                for label in labels
            ),
            logarithmic=True,
            logarithmic_up=quantity == "fid",
        )
        for quantity, up in (
            ("attributes", "attributes right, %"),
            ("right", "pictures right, %"),
            ("fid", "FID, own features"),
        )
    ]


OBJECTIVES = Row(
    "objectives",
    "Rectified flow against diffusion",
    "One network, one trainer, one sampler of first order each: Euler for the flow and EDM, DDIM "
    "for the others. Their losses do not compare, so pictures do. FID compares clouds of pictures "
    "and can be low where the checker finds nothing that was asked for: read it beside the score.",
    objective_arms,
    objective_claims,
    objective_charts,
)
