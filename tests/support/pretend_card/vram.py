"""comfy-aimdo, ComfyUI's dynamic VRAM, without a GPU: after what its README says.

A model's weights have addresses in a range of their own, in pages of 32 MiB; lower ones go first.
A weight that is asked for is put on the card whole; where there is no room, pages at higher
addresses leave, and no page above the lowest that left comes back in this run: such weights are
carried over for each call alone.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from .tensor import on_card

PAGE = 32 * 2**20
ALIGNED = 512


class Range:
    """A ModelVBAR: the addresses of one model's weights."""

    budget = 0  # bytes of weights that the card has room for
    newest: "Range | None" = None

    def __init__(self, size: int, device: Any):
        self.max_size, self.device, self.offset, self.base_addr = size, device, 0, 0
        self.resident: dict[int, int] = {}  # page -> its version: how often it came
        self.versions: dict[int, int] = {}
        self.pinned: dict[int, int] = {}
        self.watermark: int | None = None  # the lowest page that left
        Range.newest = self

    def alloc(self, size: int) -> tuple["Range", int, int]:
        place = -(-self.offset // ALIGNED) * ALIGNED
        self.offset = place + int(size)
        return self, place, int(size)

    def prioritize(self, *_: Any) -> None:
        self.watermark = None

    def deprioritize(self) -> None:
        pass

    @staticmethod
    def pages(place: int, size: int) -> range:
        return range(place // PAGE, (place + size - 1) // PAGE + 1)

    def fault(self, place: int, size: int) -> tuple[int, ...] | None:
        """Put the pages on the card; None where there is no room for them."""
        wanted = self.pages(place, size)
        missing = [page for page in wanted if page not in self.resident]
        if missing and self.watermark is not None and wanted[-1] >= self.watermark:
            return None
        while (len(self.resident) + len(missing)) * PAGE > self.budget:
            free = [p for p in self.resident if p > wanted[-1] and not self.pinned.get(p)]
            leaving = max(free, default=wanted[0])
            self.watermark = min(leaving, self.watermark or leaving)
            if not free:
                return None
            del self.resident[leaving]
        for page in missing:
            self.resident[page] = self.versions[page] = self.versions.get(page, 0) + 1
        for page in wanted:
            self.pinned[page] = self.pinned.get(page, 0) + 1
        return tuple(self.resident[page] for page in wanted)

    def unpin(self, place: int, size: int) -> None:
        for page in self.pages(place, size):
            self.pinned[page] = max(self.pinned.get(page, 0) - 1, 0)

    def loaded_size(self) -> int:
        return len(self.resident) * PAGE

    def free_memory(self, size: int) -> int:
        freed = 0
        while freed < size and self.resident:
            del self.resident[max(self.resident)]
            freed += PAGE
        return freed

    def holds(self, place: int, size: int) -> bool:
        return all(page in self.resident for page in self.pages(place, size))


class HostBuffer:
    size = 0

    def __init__(self, *_: Any, **__: Any):
        pass

    def truncate(self, *_: Any, **__: Any) -> None:
        pass


class CastBuffer:
    """Where a weight lies that is carried over for one call."""

    def __init__(self, *_: Any):
        self.used = 0

    def size(self) -> int:
        return self.used

    def get(self, size: int, offset: int = 0) -> tuple["CastBuffer", int, int]:
        self.used = max(self.used, offset + size)
        return self, offset, size


@contextlib.contextmanager
def dynamic_vram(gigabytes: float) -> Iterator[type[Range]]:
    """Let the ComfyUI of this process use it, on an open card of shapes alone.

    gigabytes: of weights that have room.
    """
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy.pinned_memory
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    import comfy_aimdo.vram_buffer

    from . import patched

    Range.budget = int(gigabytes * 2**30)
    with patched(
        {
            comfy_aimdo.model_vbar: {
                "ModelVBAR": Range,
                "vbar_signature_compare": lambda a, b: a is not None and a == b,
                "vbars_analyze": lambda device=None: 0,
                "vbars_reset_watermark_limits": lambda: None,
            },
            comfy_aimdo.host_buffer: {"HostBuffer": HostBuffer},
            comfy_aimdo.vram_buffer: {"VRAMBuffer": CastBuffer},
            comfy_aimdo.torch: {
                "aimdo_to_tensor": lambda place, device: on_card((place[2],), torch.uint8)
            },
            comfy.pinned_memory: {
                "get_pin": lambda *_, **__: None,
                "pin_memory": lambda *_, **__: None,
            },
            comfy.memory_management: {"aimdo_enabled": True},
            comfy.model_management: {
                "mark_mmap_dirty": lambda *_: None,
                "get_aimdo_cast_buffer": lambda stream, device: CastBuffer(),
            },
            comfy.model_patcher: {
                "CoreModelPatcher": comfy.model_patcher.ModelPatcherDynamic,
            },
        }
    ):
        yield Range
