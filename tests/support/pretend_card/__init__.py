"""A graphics card that is not there: its tensors say `cuda:0` and compute on the CPU, if at all.

    with pretend_card(gigabytes=8) as card:                   # numbers, as the CPU gives them
    with pretend_card(gigabytes=24, numbers=False) as card:   # shapes alone: SD3.5 Large

What shows without a GPU:
  * tensors or generators of two devices in one operation raise, with CUDA's own exceptions
  * beyond `gigabytes` there is torch.OutOfMemoryError; card.live and card.peak are bytes
  * card.counts: launches, bytes moved, arithmetic, and each place where the host waits
  * what asks whether there is a card, and which, is told so: torch.cuda (or mps, xpu) answers

What does not show: time, the numbers of the card's own arithmetic, its allocator's rounding, what a
kernel takes for itself, and the order of streams.

How: backend.py registers PrivateUse1; tensor.py wraps a tensor of the CPU (or of meta); modes.py
turns names of devices into that backend; dispatch.py runs one operation, with special.py for copies
and waits, meetings.py for devices that may not meet and kernels.py for what is one launch;
answers.py is what torch.cuda says; card.py keeps memory, counts.py what happened.
"""

import contextlib
from collections.abc import Collection, Iterator

import torch

from . import card as cards
from .answers import answers
from .backend import register, why_not
from .card import Card, Mixed
from .counts import Counts
from .kernels import triton_on
from .modes import Devices, Operations, generator_door
from .tensor import CardTensor, on_card

__all__ = ["Card", "CardTensor", "Counts", "Mixed", "on_card", "pretend_card", "why_not"]


@contextlib.contextmanager
def pretend_card(
    gigabytes: float = 24.0,
    *,
    device: str = "cuda:0",
    numbers: bool = True,
    capability: tuple[int, int] = (8, 9),
    name: str = "Pretended Card",
    lacks: Collection[torch.dtype] = (),
    kernels: bool = False,
) -> Iterator[Card]:
    """Open a card; one at a time.

    device: cuda, mps or xpu, and its number: with cuda:1 there is a cuda:0, too, which is the
    current device, and on which nothing may be put.  capability: CUDA's.  lacks: dtypes that it
    does not know.  kernels: let Triton's run; they are slow where there are numbers.
    """
    reason = why_not()
    if reason:
        raise RuntimeError(reason)
    register()
    named = torch.device(device)
    card = Card(
        torch.device(named.type, named.index or 0), gigabytes, numbers, capability, lacks, kernels
    )
    patches = answers(card, name)
    patches.setdefault(torch, {})["Generator"] = generator_door(card)
    with contextlib.ExitStack() as stack:
        cards.enter(card)
        stack.callback(cards.leave)
        stack.enter_context(patched(patches))
        stack.enter_context(optimizers_know())
        stack.enter_context(lifting_from_the_cpu())
        stack.enter_context(triton_on(card))
        stack.enter_context(Operations())
        stack.enter_context(Devices(card))
        yield card


@contextlib.contextmanager
def patched(patches: dict) -> Iterator[None]:
    missing = object()
    before = [
        (owner, key, vars(owner).get(key, missing))
        for owner, values in patches.items()
        for key in values
    ]
    for owner, values in patches.items():
        for key, value in values.items():
            setattr(owner, key, value)
    try:
        yield
    finally:
        for owner, key, value in before:
            if value is missing:
                delattr(owner, key)
            else:
                setattr(owner, key, value)


@contextlib.contextmanager
def optimizers_know() -> Iterator[None]:
    """As on CUDA, an optimizer takes all parameters in one launch."""
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    lists = {
        id(m._foreach_supported_types): m._foreach_supported_types
        for m in (optimizer, _foreach_utils)
    }
    for types in lists.values():
        types.append(CardTensor)
    try:
        yield
    finally:
        for types in lists.values():
            types.remove(CardTensor)


@contextlib.contextmanager
def lifting_from_the_cpu() -> Iterator[None]:
    """torch.tensor(numbers, device=...) makes them on the CPU and then carries them."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
