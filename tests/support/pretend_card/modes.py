"""Names of devices, generators, and operations that make something from nothing.

Both modes belong to the thread that opened the card; other threads see its tensors, but cannot
make new ones from a device's name.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .backend import DEVICE, NAME
from .card import Card
from .dispatch import dispatch, is_composite


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self if is_composite(func) else contextlib.nullcontext():  # of its parts, too
            return dispatch(func, types, args, kwargs or {})


class Devices(TorchFunctionMode):
    """The name "cuda" means the backend's device: for CUDA's own, PyTorch would ask a driver."""

    def __init__(self, card: Card):
        super().__init__()
        self.card = card

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device:
            return self.said(func(*args, **kwargs))
        if func is Tensor.cuda:
            index = args[1] if len(args) > 1 else kwargs.get("device")
            device = torch.device(self.card.kind, index) if isinstance(index, int) else index
            args, kwargs = (args[0], device or self.card.kind), kwargs_of_to(kwargs)
            func = Tensor.to
        elif func is Tensor.pin_memory:
            return torch.ops.aten._pin_memory.default(args[0])
        if any(isinstance(a, (torch.device, str)) for a in args):
            args = tuple(self.meant(a) for a in args)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": self.meant(kwargs["device"])}
        generators = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Generator)]
        self.card.draws_here = any(isinstance(g, CardGenerator) for g in generators)
        return func(*args, **kwargs)

    def said(self, device: torch.device) -> torch.device:
        """torch.device(0) is the accelerator's, which PyTorch takes for the backend."""
        return torch.device(self.card.kind, device.index) if device.type == NAME else device

    def meant(self, value: Any) -> Any:
        """The backend's device, where a value names the card's; anything else as it is."""
        if isinstance(value, str):
            if value.split(":")[0] != self.card.kind:
                return value
            value = torch.device(value)
        if not isinstance(value, torch.device) or value.type != self.card.kind:
            return value
        self.card.check(value)
        return DEVICE


def kwargs_of_to(kwargs: dict) -> dict:
    return {key: value for key, value in kwargs.items() if key != "device"}


class CardGenerator(torch.Generator):
    """Draws on the CPU, and says that it is the card's."""

    def __new__(cls, card: Card):
        made = super().__new__(cls, device="cpu")
        made.card = card
        return made

    @property
    def device(self) -> torch.device:
        return self.card.device


def generator_door(card: Card) -> type:
    """In torch.Generator's place: one for each device."""
    real = torch.Generator

    class Door(type):
        def __instancecheck__(cls, thing: object) -> bool:
            return isinstance(thing, real)

        def __call__(cls, device: Any = "cpu") -> torch.Generator:
            return CardGenerator(card) if card.is_named(device) else real(device)

    return Door("Generator", (), {})
