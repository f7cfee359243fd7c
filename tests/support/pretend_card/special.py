"""Operations that are not the same on the CPU: copies between the two, and what makes a host wait.

Each is given the card, the operation, and its arguments; some come here without the card's tensors.
"""

from typing import Any

import torch
from torch import Tensor

from .card import Card
from .tensor import CardTensor

aten = torch.ops.aten

STAGED = 64 * 1024  # bytes that the driver takes at once; CUDA's "API synchronization behavior"

INDEXED = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


def wait_for_indices(card: Card, args: tuple) -> None:
    for index in args[1]:
        if (
            index is not None
            and not isinstance(index, CardTensor)
            and isinstance(args[0], CardTensor)
        ):
            card.counts.wait("carries an index from the CPU")
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            card.counts.wait("counts a mask")


def to_copy(
    card: Card,
    func: Any,
    source: Tensor,
    device: torch.device | None = None,
    non_blocking: bool = False,
    pin_memory: bool | None = None,
    **how: Any,
) -> Tensor:
    """Tensor.to: between dtypes, or the CPU and the card."""
    from_card = isinstance(source, CardTensor)
    to_card = card.is_named(device) if device is not None else from_card
    if not from_card and not to_card:
        return func(source, device=device, non_blocking=non_blocking, pin_memory=pin_memory, **how)
    if not to_card:
        return to_cpu(card, source, non_blocking, how)
    inner = source.inner if from_card else source
    made = CardTensor(func(inner, device=card.home, **how), card)
    if from_card:
        card.counts.kernel("_to_copy", [source], [made])
    else:
        carry(card, source, non_blocking)
        card.counts.kernel("copy from the CPU", [], [made])
    return made


def to_cpu(card: Card, source: CardTensor, non_blocking: bool, how: dict) -> Tensor:
    leave(card, source, non_blocking)  # into memory that PyTorch pins for the purpose
    if not card.numbers:
        return torch.zeros(source.shape, dtype=how.get("dtype", source.dtype))
    return aten._to_copy.default(source.inner, **how)


def leave(card: Card, source: CardTensor, at_once: bool) -> None:
    """To the CPU.  Into pageable memory the driver waits, whatever non_blocking says."""
    if at_once:
        card.counts.hazard(f"copy to the CPU that nobody waits for, {tuple(source.shape)}")
    else:
        card.counts.wait(f"copy to the CPU, {tuple(source.shape)}")


def carry(card: Card, source: Tensor, non_blocking: bool) -> None:
    """To the card.  From pageable memory the driver first waits for its stream, unless little is
    copied, whatever non_blocking says."""
    size = source.numel() * source.element_size()
    pinned = source.untyped_storage() in card.pinned
    card.counts.carried += size
    if not non_blocking or (not pinned and size > STAGED):
        how = "pinned" if pinned else "pageable"
        card.counts.wait(f"copy from the CPU, {how}, {tuple(source.shape)}")


def copy_(
    card: Card, func: Any, target: Tensor, source: Tensor, non_blocking: bool = False
) -> Tensor:
    to_card, from_card = (isinstance(t, CardTensor) for t in (target, source))
    inner_target = target.inner if to_card else target
    inner_source = source.inner if from_card else source
    if to_card and not from_card and source.ndim:
        carry(card, source, non_blocking)
    if from_card and not to_card:
        leave(card, source, non_blocking and is_pinned(card, func, target))
        if not card.numbers:
            return target
    if to_card and not card.numbers:
        inner_source = inner_source.to("meta")
    func(inner_target, inner_source)
    if to_card:
        card.counts.kernel("copy_", [source] if from_card else [], [target])
    return target


def read_number(card: Card, func: Any, tensor: Tensor) -> Any:
    if not isinstance(tensor, CardTensor):
        return func(tensor)
    card.counts.wait("reads a number")
    if card.numbers:
        return func(tensor.inner)
    return tensor.dtype == torch.bool or torch.zeros((), dtype=tensor.dtype).item()


def equal(card: Card, func: Any, a: Tensor, b: Tensor) -> bool:
    if not isinstance(a, CardTensor) and not isinstance(b, CardTensor):
        return func(a, b)
    if not (isinstance(a, CardTensor) and isinstance(b, CardTensor)):
        raise RuntimeError(
            f"Cannot compare two tensors on different devices: {a.device}, {b.device}"
        )
    card.counts.wait("compares")
    card.counts.kernel("equal", [a, b], [])
    return func(a.inner, b.inner) if card.numbers else a.shape == b.shape


def pin(card: Card, func: Any, tensor: Tensor, device: Any = None) -> Tensor:
    made = tensor.clone()
    card.pinned.add(made.untyped_storage())
    return made


def is_pinned(card: Card, func: Any, tensor: Tensor, device: Any = None) -> bool:
    return not isinstance(tensor, CardTensor) and tensor.untyped_storage() in card.pinned


def record_stream(card: Card, func: Any, tensor: Tensor, stream: Any) -> None:
    """Nothing is freed late here."""


def scaled_mm(
    card: Card,
    func: Any,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """The product of fp8 matrices, with what CUDA asks of them."""
    given = [t for t in (a, b, scale_a, scale_b, bias) if t is not None]
    if not all(isinstance(t, CardTensor) for t in given):
        return func(a, b, scale_a, scale_b, bias, scale_result, out_dtype, use_fast_accum)
    dtype = out_dtype or torch.bfloat16
    if card.capability < (8, 9):
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices >= 8.9")
    check_scaled_mm(a, b, scale_a, scale_b, dtype)
    a_, b_, scale_a_, scale_b_ = (t.inner for t in (a, b, scale_a, scale_b))
    if card.numbers:
        product = (a_.float() * scale_a_) @ (b_.float() * scale_b_)
        product = (product if bias is None else product + bias.inner.float()).to(dtype)
    else:
        product = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device="meta")
    made = CardTensor(product, card)
    card.counts.kernel("_scaled_mm", given, [made], 2 * a.numel() * b.shape[1])
    return made


def check_scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: Any) -> None:
    rows = scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
    wrong = {
        "dimensions that 16 divides": a.shape[1] % 16 or b.shape[1] % 16,
        "mat_a row-major and mat_b column-major": a.stride(1) != 1 or b.stride(0) != 1,
        "scales in float32": {scale_a.dtype, scale_b.dtype} != {torch.float32},
        "one scale, or one for each row and column": not rows
        and not scale_a.numel() == scale_b.numel() == 1,
        "contiguous scales": not (scale_a.is_contiguous() and scale_b.is_contiguous()),
        "bf16 results where rows have scales": rows and dtype != torch.bfloat16,
    }
    for wanted, fails in wrong.items():
        if fails:
            shapes = [tuple(t.shape) for t in (a, b, scale_a, scale_b)]
            raise RuntimeError(f"_scaled_mm wants {wanted}: {shapes}")


SPECIAL = {
    aten._to_copy.default: to_copy,
    aten.copy_.default: copy_,
    aten._local_scalar_dense.default: read_number,
    aten.equal.default: equal,
    aten._pin_memory.default: pin,
    aten.is_pinned.default: is_pinned,
    aten.record_stream.default: record_stream,
    aten._scaled_mm.default: scaled_mm,
}
