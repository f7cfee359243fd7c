"""Rows that only sample, with the shipped model or another checkpoint: shift, encoders, CFG."""

from ...text.encoders import ENCODERS
from ..budgets import Budget
from ..cells import Table
from ..measurements import Drawn
from .claims import Chart, Claim, Row, curve, differences

SIDES = (64, 128)  # pixels
SHIFTS = (1.0, 2.0, 3.0)
SCALES = (1.0, 2.0, 3.0, 5.0, 7.0)
SUBSETS = (
    ENCODERS,
    ("clip_l", "clip_g"),
    ("clip_l", "t5"),
    ("clip_g", "t5"),
    ("clip_l",),
    ("clip_g",),
    ("t5",),
)


# Shift


def shift_cell(budget: Budget, side: int, shift: float) -> Drawn:
    return Drawn(f"{side} px, shift {shift:g}", budget.prompts, side=side, shift=shift)


def shift_claims(budget: Budget, table: Table) -> list[Claim]:
    def gain(side: int, shift: float) -> dict[int, float]:
        names = [shift_cell(budget, side, one).label for one in (shift, 1.0)]
        values = differences(table, (names[0], "attributes"), (names[1], "attributes"))
        return dict(zip(table.seeds(*names), values, strict=True))

    claims = [
        Claim(
            f"{SIDES[1]} px: shift {shift:g} scores more than 1",
            "people prefer shifts above 1.5 at 1024 px; no number read",
            "points",
            tuple(gain(SIDES[1], shift).values()),
        )
        for shift in SHIFTS[1:]
    ]
    small, large = (gain(side, 2.0) for side in SIDES)
    claims.append(
        Claim(
            f"shift 2 gains more at {SIDES[1]} px than at {SIDES[0]}",
            "twice the side takes twice the shift (equation 23)",
            "points",
            tuple(large[seed] - small[seed] for seed in sorted(set(small) & set(large))),
        )
    )
    return claims


SHIFT = Row(
    "shift",
    "Larger pictures take a larger shift",
    "The shipped model draws at both sizes with each shift. (sd3-tiny models are trained at 64 px "
    "with shift 1, then at 128 px with 1.5, from sd3-tiny-4 on with 3.)",
    lambda budget: [shift_cell(budget, side, shift) for side in SIDES for shift in SHIFTS],
    shift_claims,
    lambda budget, table: [
        Chart(
            "shift",
            "attributes right, %",
            tuple(
                curve(
                    f"{side} px",
                    table,
                    {x: (shift_cell(budget, side, x).label, "attributes") for x in SHIFTS},
                )
                for side in SIDES
            ),
        )
    ],
    workflow="shift",
)


# Encoders


def short(subset: tuple[str, ...]) -> str:
    titles = {"clip_l": "L", "clip_g": "G", "t5": "T5"}
    return " + ".join(titles[name] for name in subset)


def subset_cell(budget: Budget, subset: tuple[str, ...]) -> Drawn:
    return Drawn(f"encoders {short(subset)}", budget.prompts, use=subset)


def subset_claims(budget: Budget, table: Table) -> list[Claim]:
    whole = subset_cell(budget, ENCODERS).label
    claims = []
    for subset in SUBSETS[1:]:
        text = f"all three score more than {short(subset)}"
        paper = "no number"
        if subset == ("clip_l", "clip_g"):
            paper = "without T5 46 % of votes for adherence, 38 % for typography"
        name = subset_cell(budget, subset).label
        values = differences(table, (whole, "attributes"), (name, "attributes"))
        claims.append(Claim(text, paper, "points", values, own=paper == "no number"))
    return claims


ENCODERS_DROPPED = Row(
    "encoders",
    "Encoders left out when drawing",
    "Each of the seven subsets of CLIP-L, CLIP-G and T5; what is left out gives zeros, also to the "
    "empty prompt.",
    lambda budget: [subset_cell(budget, subset) for subset in SUBSETS],
    subset_claims,
    lambda budget, table: [
        Chart(
            "encoders",
            up,
            (
                curve(
                    up,
                    table,
                    {short(one): (subset_cell(budget, one).label, quantity) for one in SUBSETS},
                ),
            ),
        )
        for quantity, up in (("attributes", "attributes right, %"), ("right", "pictures right, %"))
    ],
    workflow="encoder-dropout",
)


# CFG


def scale_cell(budget: Budget, scale: float) -> Drawn:
    return Drawn(f"cfg {scale:g}", budget.prompts, cfg=scale)


def scale_claims(budget: Budget, table: Table) -> list[Claim]:
    def against(better: float, worse: float) -> tuple[float, ...]:
        names = [scale_cell(budget, scale).label for scale in (better, worse)]
        return differences(table, (names[0], "attributes"), (names[1], "attributes"))

    return [
        Claim(
            "cfg 3 scores more than none",
            "samples guided throughout; no number",
            "points",
            against(3, 1),
        ),
        Claim("cfg 5 scores more than none", "as above", "points", against(5, 1)),
        Claim("cfg 3 scores more than 7", "no number", "points", against(3, 7), own=True),
    ]


CFG_SCALE = Row(
    "cfg",
    "Guidance scale",
    "The shipped model with each scale of classifier-free guidance; 1 is without.",
    lambda budget: [scale_cell(budget, scale) for scale in SCALES],
    scale_claims,
    lambda budget, table: [
        Chart(
            "cfg",
            up,
            (curve(up, table, {x: (scale_cell(budget, x).label, quantity) for x in SCALES}),),
        )
        for quantity, up in (
            ("attributes", "attributes right, %"),
            ("right", "pictures right, %"),
            ("path", "path length"),
        )
    ],
    workflow="sweep",
)
