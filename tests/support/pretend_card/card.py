"""The card itself: what it is called, how much memory it has, what was done on it."""

import weakref
from collections.abc import Collection

import torch
from torch import Tensor

from .backend import NAME
from .counts import Counts, place

_open: list["Card"] = []  # none or one


class Mixed(RuntimeError):
    """Tensors of two devices in one operation."""


class Card:
    """numbers: whether its tensors have values; without, they are shapes alone."""

    def __init__(
        self,
        device: torch.device,
        gigabytes: float,
        numbers: bool,
        capability: tuple[int, int],
        lacks: Collection[torch.dtype],
        kernels: bool,
    ):
        self.device = device
        self.capacity = int(gigabytes * 2**30)
        self.numbers = numbers
        self.capability = capability
        self.lacks = frozenset(lacks)
        self.kernels = kernels
        self.home = torch.device("cpu" if numbers else "meta")  # where the tensors really are
        self.current = 0  # index of the process's current device
        self.capturing = False  # inside a CUDA graph's recording
        self.draws_here = False  # whether the operation was given a generator of the card
        self.live = 0  # bytes held
        self.peak = 0  # the most since the card was opened
        self.high = 0  # the most since reset_high, which torch.cuda's own reset calls
        self.storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.pinned: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.counts = Counts()

    @property
    def kind(self) -> str:
        return self.device.type

    @property
    def free(self) -> int:
        return self.capacity - self.live

    def is_named(self, device: torch.device | str | int | None) -> bool:
        """Whether this names the card's kind of device, whatever its number."""
        return device is not None and torch.device(device).type in (self.kind, NAME)

    def check(self, device: torch.device) -> None:
        """Refuse a device of the card's kind that is another one, or none."""
        if device.type != self.kind:
            return
        index = self.current if device.index is None else device.index
        if index > self.device.index:
            raise RuntimeError(f"{self.kind.upper()} error: invalid device ordinal ({device})")
        if index != self.device.index:
            raise RuntimeError(
                f"pretended card: something is put on {self.kind}:{index}, but the run is meant "
                f"for {self.device} (at {place()})"
            )

    # memory

    def hold(self, inner: Tensor) -> None:
        """Account for a tensor's memory, once for all its views."""
        if inner.dtype in self.lacks:
            raise TypeError(
                f"Cannot convert a {self.kind.upper()} Tensor to "
                f"{str(inner.dtype).removeprefix('torch.')} dtype as the {self.kind.upper()} "
                f"framework doesn't support it (at {place()})"
            )
        storage = inner.untyped_storage()
        if storage in self.storages:
            return
        size = storage.nbytes()
        if size > self.free:
            raise self.out_of_memory(size)
        self.storages.add(storage)
        self.live += size
        self.high = max(self.high, self.live)
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self.live -= size

    def reset_high(self) -> None:
        self.high = self.live

    def out_of_memory(self, size: int) -> RuntimeError:
        wanted, total, free = (f"{n / 2**20:.2f} MiB" for n in (size, self.capacity, self.free))
        if self.kind == "mps":
            return RuntimeError(
                f"MPS backend out of memory (MPS allocated: {self.live / 2**20:.2f} MiB, max "
                f"allowed: {total}). Tried to allocate {wanted} on private pool."
            )
        return torch.OutOfMemoryError(
            f"{self.kind.upper()} out of memory. Tried to allocate {wanted}. GPU "
            f"{self.device.index} has a total capacity of {total} of which {free} is free."
        )


def opened() -> Card | None:
    return _open[0] if _open else None


def enter(card: Card) -> None:
    if _open:
        raise RuntimeError("one pretended card at a time")
    _open.append(card)


def leave() -> None:
    _open.clear()
