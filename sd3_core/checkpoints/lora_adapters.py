"""The tensors that a LoRA file has for one layer -> the changes that they ask for."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..adapters.changes import Adapter, Change, Difference, LoHa, LoKr, LowRank
from ..errors import CheckpointError
from .diffusers import swap_halves
from .lora_keys import Place, kind_of
from .lora_refusals import GET_AGAIN, check_complete, shapes_by_role


def adapters_of(
    file: str, name: str, place: Place, given: Mapping[str, Tensor], scale: float | None
) -> list[Adapter]:
    """The changes at a place.

    given: the tensors of one name, by role.  scale: of PEFT's settings; None: the tensors' own
    alpha, or 1.  Raises CheckpointError when one is missing or does not fit the others.
    """
    made: list[Adapter] = []
    check_complete(file, name, given)
    try:
        change = _change(given, given["alpha"].item() if "alpha" in given else None)
        if change is not None:
            change = change if scale is None else _scaled(change, scale)
            magnitude = _magnitude(given, change.shape[0])
            made.append(_placed(place, place.parameter, change, *magnitude))
        if "up_bias" in given:  # PEFT's lora_bias, which its scale multiplies too
            bias = given["up_bias"].float() * (1.0 if scale is None else scale)
            made.append(_placed(place, "bias", Difference(bias), beside=change))
        for role, parameter in (("diff", place.parameter), ("diff_b", "bias")):
            if role in given:
                made.append(_placed(place, parameter, Difference(given[role])))
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: the adapter {name} is damaged ({error}); it has {shapes_by_role(given)}. "
            f"{GET_AGAIN}"
        ) from error
    return made


def _change(given: Mapping[str, Tensor], alpha: float | None) -> LowRank | LoHa | LoKr | None:
    """None: plain differences alone."""
    kind = kind_of(given)
    if kind == "LoRA":
        return LowRank(given["down"], given["up"], alpha, given.get("mid"))
    if kind == "LoHa":
        whole = {name: given[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
        return LoHa(alpha=alpha, t1=given.get("hada_t1"), t2=given.get("hada_t2"), **whole)
    if kind == "LoKr":
        factors = {role[len("lokr_") :]: t for role, t in given.items() if role.startswith("lokr_")}
        return LoKr(alpha=alpha, **factors)
    return None


def _scaled(change: LowRank | LoHa | LoKr, scale: float) -> LowRank | LoHa | LoKr:
    """The change at PEFT's scale; of a LoKr in whole factors, which has no rank, one takes it."""
    if change.rank is not None:
        return replace(change, alpha=scale * change.rank)
    if isinstance(change, LoKr) and change.w1 is not None:
        return replace(change, w1=change.w1.float() * scale)
    return change


def _placed(
    place: Place,
    parameter: str,
    change: Change,
    magnitude: Tensor | None = None,
    norms_changed: bool = False,
    beside: Change | None = None,
) -> Adapter:
    """The change on its parameter: its third of the rows, its halves in our order.

    beside: for a bias, the change of the weight, whose shape tells whether it has halves.
    """
    rows, columns = (beside or change).shape
    if place.swapped == "if two" and parameter == "bias" and beside is None:
        raise ValueError("a bias does not tell whether its block is the last")
    if place.swapped == "always" or (place.swapped == "if two" and rows == 2 * columns):
        change = _swapped(change)
        if magnitude is not None and magnitude.shape[0] == rows:
            magnitude = swap_halves(magnitude)
    if magnitude is not None and not _is_magnitude(magnitude, rows, columns):
        raise ValueError("its dora_scale is neither one per output nor one per input")
    taken = None if place.part is None else (place.part * rows, rows)
    return Adapter(place.module, change, parameter, taken, magnitude, norms_changed)


def _magnitude(given: Mapping[str, Tensor], rows: int) -> tuple[Tensor | None, bool]:
    """DoRA's magnitude, and whether it is PEFT's, which has one number per output."""
    if "magnitude" not in given:
        return given.get("dora_scale"), False
    if "dora_scale" in given or given["magnitude"].numel() != rows:
        raise ValueError("its lora_magnitude_vector is not one number per output")
    return given["magnitude"].reshape(rows, 1), True


def _is_magnitude(magnitude: Tensor, rows: int, columns: int) -> bool:
    if magnitude.shape[:1] == (rows,):
        return magnitude.numel() == rows
    return magnitude.shape[:1] == (1,) and columns % max(magnitude.numel(), 1) == 0


def _swapped(change: Change) -> Change:
    if isinstance(change, LowRank):
        return replace(change, up=swap_halves(change.up))
    return Difference(swap_halves(change.delta()))  # of two small layers; factors do not swap
