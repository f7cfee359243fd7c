"""Encoder dropout in training, captions, qk norm, and preferences."""

import math
from dataclasses import replace

from ...text.encoders import ENCODERS
from ..arms import Arm
from ..budgets import Budget
from ..cells import Table
from ..lab import Measurement
from ..measurements import ArmLogits, ArmScore, Preferred
from .claims import Chart, Claim, Row, arm, curve, differences, scored_once, usual_steps
from .sampled import SUBSETS, short

# Encoder dropout

RATE = 0.464  # 0.464 ** 3 is a tenth: as often as a caption is dropped
DROPOUTS = {"without dropout": 0.0, "with dropout": RATE}
ONE_OR_ALL = (ENCODERS, *SUBSETS[4:])


def dropout_cell(budget: Budget, label: str, subset: tuple[str, ...]) -> ArmScore:
    made = arm(budget, encoder_dropout=DROPOUTS[label])
    return scored_once(budget, f"{label}, {short(subset)}", made, subset)


def dropout_claims(budget: Budget, table: Table) -> list[Claim]:
    quantity = f"attributes@{usual_steps(budget)}"
    claims = []
    for subset in ONE_OR_ALL:
        names = [dropout_cell(budget, label, subset).label for label in DROPOUTS]
        values = differences(table, (names[1], quantity), (names[0], quantity))
        if subset == ENCODERS:
            text = "dropout in training gains with all three encoders"
            claims.append(Claim(text, "not claimed", "points", values, own=True))
        else:
            text = f"dropout in training gains when {short(subset)} is alone in drawing"
            claims.append(Claim(text, "makes any subset usable; no number", "points", values))
    return claims


ENCODER_DROPOUT = Row(
    "encoder-dropout",
    "46.4 % encoder dropout in training",
    "Two arms, one with each encoder zeroed in 46.4 % of the samples, drawn with all encoders and "
    "with each alone. A tenth of the captions is left out in both, so that the arm with dropout "
    "learns without any text in 19 % of the samples; the paper has no other dropout.",
    lambda budget: [dropout_cell(budget, label, one) for label in DROPOUTS for one in ONE_OR_ALL],
    dropout_claims,
    lambda budget, table: [
        Chart(
            "encoders when drawing",
            "attributes right, %",
            tuple(
                curve(
                    label,
                    table,
                    {
                        short(one): (
                            dropout_cell(budget, label, one).label,
                            f"attributes@{usual_steps(budget)}",
                        )
                        for one in ONE_OR_ALL
                    },
                )
                for label in DROPOUTS
            ),
        )
    ],
)


# Captions

MIXES = {"original": 0.0, "synthetic": 1.0, "50/50": 0.5}


def caption_cell(budget: Budget, label: str, full: bool) -> ArmScore:
    made = arm(budget, full_captions=MIXES[label])
    asked = "long" if full else "short"
    return scored_once(budget, f"{label}, {asked} prompts", made, ENCODERS, full=full)


def caption_claims(budget: Budget, table: Table) -> list[Claim]:
    quantity = f"attributes@{usual_steps(budget)}"

    def against(other: str, full: bool) -> tuple[float, ...]:
        names = [caption_cell(budget, label, full).label for label in ("50/50", other)]
        return differences(table, (names[0], quantity), (names[1], quantity))

    paper = "49.78 against 43.27 (GenEval, depth 15)"
    return [
        Claim(
            "50/50 beats original captions, short prompts",
            paper,
            "points",
            against("original", False),
        ),
        Claim(
            "50/50 beats original captions, long prompts",
            paper,
            "points",
            against("original", True),
        ),
        Claim(
            "50/50 beats synthetic alone, short prompts",
            "not tried; the mix keeps other words",
            "points",
            against("synthetic", False),
            own=True,
        ),
    ]


CAPTIONS = Row(
    "captions",
    "Original, synthetic and mixed captions",
    "Original: what a person would write, size and ground mostly left out. Synthetic: a sentence "
    "that says all. Drawn from prompts of either kind.",
    lambda budget: [caption_cell(budget, label, full) for label in MIXES for full in (False, True)],
    caption_claims,
    lambda budget, table: [
        Chart(
            "captions in training",
            "attributes right, %",
            tuple(
                curve(
                    f"{'long' if full else 'short'} prompts",
                    table,
                    {
                        label: (
                            caption_cell(budget, label, full).label,
                            f"attributes@{usual_steps(budget)}",
                        )
                        for label in MIXES
                    },
                )
                for full in (False, True)
            ),
        )
    ],
)


# qk norm

NORMS = {"with qk norm": True, "without": False}


def norm_arm(budget: Budget, label: str, side: int) -> Arm:
    small = arm(budget, qk_norm=NORMS[label])
    if side == 64:
        return small
    return replace(
        small,
        side=side,
        steps=budget.large_steps,
        scenes=budget.large_scenes,
        shift=2.0,  # twice the side
        start=small,
    )


def norm_cell(budget: Budget, label: str, side: int) -> ArmLogits:
    return ArmLogits(f"{label}, {side} px", norm_arm(budget, label, side))


def norm_claims(budget: Budget, table: Table) -> list[Claim]:
    def doublings(higher: ArmLogits, lower: ArmLogits) -> tuple[float, ...]:
        return tuple(
            math.log2(
                table.number(higher.label, seed, "logit") / table.number(lower.label, seed, "logit")
            )
            for seed in table.seeds(higher.label, lower.label)
        )

    with_norm, without = (
        {side: norm_cell(budget, label, side) for side in (64, 128)} for label in NORMS
    )
    return [
        Claim(
            "without qk norm the largest attention logit is larger at 128 px",
            "grows until bf16 training fails (figure 5); no number read",
            "doublings",
            doublings(without[128], with_norm[128]),
        ),
        Claim(
            "without qk norm it grows when the resolution does",
            "as above",
            "doublings",
            doublings(without[128], without[64]),
        ),
        Claim(
            "with qk norm the validation loss is lower at 128 px",
            "training stays stable; no number",
            "loss",
            differences(
                table, (with_norm[128].label, "loss"), (without[128].label, "loss"), falls=True
            ),
        ),
    ]


QK_NORM = Row(
    "qk-norm",
    "qk norm when the resolution grows",
    "Two arms learn at 64 px and go on at 128 px with shift 2. The largest attention logit is over "
    "all blocks, heads and tokens of 32 held-out pictures at three times.",
    lambda budget: [norm_cell(budget, label, side) for label in NORMS for side in (64, 128)],
    norm_claims,
    lambda budget, table: [
        Chart(
            "picture side, pixels",
            up,
            tuple(
                curve(
                    label,
                    table,
                    {side: (norm_cell(budget, label, side).label, quantity) for side in (64, 128)},
                )
                for label in NORMS
            ),
            logarithmic_up=quantity == "logit",
        )
        for quantity, up in (("logit", "largest attention logit"), ("loss", "validation loss"))
    ],
)


# Preferences


def dpo_cells(budget: Budget) -> list[Measurement]:
    return [
        Preferred(
            arm(budget),
            budget.dpo_pairs,
            budget.dpo_steps,
            usual_steps(budget),
            budget.pictures,
        )
    ]


def dpo_claims(budget: Budget, table: Table) -> list[Claim]:
    paper = "GenEval 0.68 to 0.71 at 512 px, depth 38"
    return [
        Claim(
            f"DPO lifts {what}",
            paper,
            "points",
            differences(table, ("dpo", f"after {name}"), ("dpo", f"before {name}")),
        )
        for name, what in (("right", "the pictures that are right"), ("attributes", "the score"))
    ]


DPO = Row(
    "dpo",
    "What DPO gains",
    "The base arm draws each prompt twice; where the checker finds fewer faults in one picture, a "
    "LoRA learns that preference. Measured on prompts that it does not see.",
    dpo_cells,
    dpo_claims,
    lambda budget, table: [
        Chart(
            "base arm",
            "%",
            tuple(
                curve(
                    what, table, {when: ("dpo", f"{when} {name}") for when in ("before", "after")}
                )
                for name, what in (("right", "pictures right"), ("attributes", "attributes right"))
            ),
        )
    ],
    workflow="train-dpo",
)
