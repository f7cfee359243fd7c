"""The rows of the study, by the name that the command line knows."""

from .autoencoders import VAE
from .claims import Row
from .conditions import CAPTIONS, DPO, ENCODER_DROPOUT, QK_NORM
from .sampled import CFG_SCALE, ENCODERS_DROPPED, SHIFT
from .sizes import PATH, SCALING, STEPS
from .trained import DENSITIES, OBJECTIVES

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        DENSITIES,
        OBJECTIVES,
        STEPS,
        PATH,
        SCALING,
        SHIFT,
        ENCODERS_DROPPED,
        ENCODER_DROPOUT,
        CAPTIONS,
        QK_NORM,
        VAE,
        CFG_SCALE,
        DPO,
    )
}


def find_rows(names: list[str]) -> list[Row]:
    """These rows; all for no name.  Raises ValueError for a name that is none of ROWS."""
    strange = [name for name in names if name not in ROWS]
    if strange:
        raise ValueError(f"row is {strange[0]!r}; choose of {', '.join(ROWS)}, or name none.")
    return [ROWS[name] for name in names] or list(ROWS.values())
