"""Which tensors may meet in one operation: those of one device, with CUDA's exceptions."""

from typing import Any

import torch
from torch import Tensor

from .card import Card, Mixed
from .counts import place
from .special import INDEXED
from .tensor import CardTensor

aten = torch.ops.aten

NO_SCALAR = {  # elsewhere a tensor of the CPU with no dimensions counts as a number
    aten.cat.default,
    aten.stack.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.native_layer_norm.default,
    aten.native_group_norm.default,
    aten.embedding.default,
    aten.gather.default,
    aten.index_select.default,
    aten.scatter.src,
    aten.index_copy.default,
    aten.index_copy_.default,
    aten.index_add_.default,
}


def check_devices(func: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> None:
    """Raise Mixed as CUDA would."""
    ours = [t for t in tensors if isinstance(t, CardTensor)]
    others = [t for t in tensors if not isinstance(t, CardTensor)]
    if not ours or not others:
        return
    if func in INDEXED:  # an index may come from the CPU, but it may not leave the card
        if isinstance(args[0], CardTensor):
            values = args[2:3]
            if not any(is_on_cpu(v) and v.ndim for v in values):
                return
        raise Mixed(f"indices should be on the same device as the indexed tensor, at {place()}")
    written = [kwargs["out"]] if kwargs.get("out") is not None else []
    if func._schema.is_mutable and not written:
        written = [args[0]]
    number = func not in NO_SCALAR and not any(is_on_cpu(t) for t in written)
    for other in others:
        if not (number and other.ndim == 0):
            raise Mixed(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{ours[0].device} and {other.device}! ({func}, {tuple(other.shape)} on "
                f"{other.device}, at {place()})"
            )


def is_on_cpu(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, CardTensor)


def check_generator(card: Card, kwargs: dict, on_card: bool) -> None:
    if kwargs.get("generator") is None or card.draws_here == on_card:
        return
    wanted, found = (card.kind, "cpu") if on_card else ("cpu", card.kind)
    raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}'")
