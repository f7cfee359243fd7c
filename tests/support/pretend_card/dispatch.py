"""One operation: may these tensors meet, what does it do, and what does it cost?"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.flop_counter import flop_registry

from . import card as cards
from .card import Card
from .meetings import check_devices, check_generator
from .special import INDEXED, SPECIAL, wait_for_indices
from .tensor import CardTensor

aten = torch.ops.aten

SIZED_BY_VALUES = {  # the host must know how many there are
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}
NO_KERNEL = {  # beside views, which their schema tells
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten.lift_fresh.default,
    aten._unsafe_view.default,
    aten.set_.source_Storage_storage_offset,
}
READS_WHAT_IT_WRITES = {  # of their first tensor
    aten.embedding.default,
    aten.gather.default,
    aten.index_select.default,
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
}
WRITES_ONLY = ("fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_")


def dispatch(func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
    if any(is_foreign(kind) for kind in types):
        return NotImplemented
    if is_composite(func):  # under inference mode they come whole
        return func.decompose(*args, **kwargs)
    return run(func, args, kwargs)


@functools.cache
def is_foreign(kind: type) -> bool:
    """Another wrapper of tensors, such as ComfyUI's quantised ones: it unwraps itself first."""
    if issubclass(kind, CardTensor) or kind in (Tensor, torch.nn.Parameter):
        return False
    return any("__torch_dispatch__" in vars(base) for base in kind.__mro__[:-2])


@functools.cache
def is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@functools.cache
def is_view(func: Any) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


@functools.cache
def name_of(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    card = cards.opened()
    flat, spec = tree_flatten((args, kwargs))
    tensors = [a for a in flat if isinstance(a, Tensor)]
    ours = [t for t in tensors if isinstance(t, CardTensor)]
    card = ours[0].card if ours else card
    asked = kwargs.get("device")
    if card is None:
        return func(*args, **kwargs)
    if func in SPECIAL:
        return SPECIAL[func](card, func, *args, **kwargs)
    to_card = bool(ours) if asked is None else card.is_named(asked)
    check_generator(card, kwargs, to_card)
    if not ours and not to_card:
        return on_cpu(card, func, args, kwargs)
    if asked is None or not any(part in name_of(func) for part in ("_like", "new_")):
        check_devices(func, args, kwargs, tensors)
    if func in SIZED_BY_VALUES:
        card.counts.wait("needs a size")
    if func in INDEXED:
        wait_for_indices(card, args)
    if not to_card:
        return func(*(a.inner if isinstance(a, CardTensor) else a for a in args), **kwargs)
    if func is aten.nonzero.default and not card.numbers:  # as if there were none
        return CardTensor(torch.empty(0, args[0].ndim, dtype=torch.long, device="meta"), card)
    result = compute(card, func, flat, spec, ours)
    if not is_view(func) and func not in NO_KERNEL:
        count(card, func, args, kwargs, result)
    return result


def on_cpu(card: Card, func: Any, args: tuple, kwargs: dict) -> Any:
    pinned = kwargs.get("pin_memory")
    made = func(*args, **({**kwargs, "pin_memory": None} if pinned else kwargs))
    if pinned:
        card.pinned.add(made.untyped_storage())
    return made


def compute(card: Card, func: Any, flat: list, spec: Any, ours: list[CardTensor]) -> Any:
    """The operation on the inner tensors, its results on the card."""

    def inner(value: Any) -> Any:
        if isinstance(value, CardTensor):
            return value.inner
        if isinstance(value, Tensor) and value.ndim and not card.numbers:
            return value.to("meta")
        if isinstance(value, torch.device):
            return card.home
        if isinstance(value, torch.Generator) and not card.numbers:
            return None
        return value

    known = {id(tensor.inner): tensor for tensor in ours}

    def outer(value: Tensor) -> Tensor:
        same = known.get(id(value))
        if same is None:
            return CardTensor(value, card)
        if same.shape != value.shape:
            raise NotImplementedError(f"pretended card: {func} changes a tensor's shape in place")
        return same

    args, kwargs = tree_unflatten([inner(value) for value in flat], spec)
    result = func(*args, **kwargs)
    as_view_of_normal = is_view(func) and not all(tensor.is_inference() for tensor in ours)
    with torch.inference_mode(torch.is_inference_mode_enabled() and not as_view_of_normal):
        return tree_map_only(Tensor, outer, result)


def count(card: Card, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
    name = name_of(func)
    written = [t for t in tree_leaves(result) if isinstance(t, CardTensor)]
    given = (args, {key: value for key, value in kwargs.items() if not key.startswith("out")})
    read = [t for t in tree_leaves(given) if isinstance(t, CardTensor)]
    if func in READS_WHAT_IT_WRITES:
        read[:1] = written
    elif name in WRITES_ONLY:
        read = read[1:]
    flops = flop_registry.get(func._overloadpacket)
    work = flops(*args, **{**kwargs, "out_val": result}) if flops else 0
    card.counts.kernel(name, read, written, work)
