"""What happened on the card: kernels, bytes, arithmetic, and where the host waited for it."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

OURS = ("/sd3_core/", "/nodes/", "/diffusers/", "/comfy/", "/comfy_extras/")
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "convolution", "attention"}


def place() -> str:
    """file:line function of the innermost frame of the code under test."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename.replace("\\", "/")
        if "/site-packages/torch/" not in name and any(part in name for part in OURS):
            short = "/".join(name.split("/")[-3:])
            return f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def touched(tensor: Tensor) -> int:
    """Bytes that a pass over the tensor reads: what was expanded is there once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride or not length else 1
    return size


@dataclass
class Kernel:
    launches: int = 0
    moved: int = 0  # bytes read and written
    flops: int = 0


@dataclass
class Counts:
    kernels: dict[str, Kernel] = field(default_factory=dict)  # by the operation's name
    waits: Counter[str] = field(default_factory=Counter)  # "place: why" of the host's waits
    hazards: Counter[str] = field(default_factory=Counter)  # copies read before they arrive
    carried: int = 0  # bytes from the CPU to the card

    @property
    def launches(self) -> int:
        return sum(kernel.launches for kernel in self.kernels.values())

    @property
    def moved(self) -> int:
        return sum(kernel.moved for kernel in self.kernels.values())

    @property
    def flops(self) -> int:
        return sum(kernel.flops for kernel in self.kernels.values())

    @property
    def waited(self) -> int:
        return sum(self.waits.values())

    def kernel(
        self, name: str, read: Sequence[Tensor], written: Sequence[Tensor], flops: int = 0
    ) -> None:
        kernel = self.kernels.setdefault(name, Kernel())
        kernel.launches += 1
        kernel.moved += sum(touched(t) for t in read) + sum(touched(t) for t in written)
        kernel.flops += flops

    def wait(self, why: str) -> None:
        self.waits[f"{place()}: {why}"] += 1

    def hazard(self, what: str) -> None:
        self.hazards[f"{place()}: {what}"] += 1

    def copy(self) -> "Counts":
        kernels = {name: Kernel(k.launches, k.moved, k.flops) for name, k in self.kernels.items()}
        return Counts(kernels, Counter(self.waits), Counter(self.hazards), self.carried)

    def since(self, earlier: "Counts") -> "Counts":
        """What came after `earlier`, a copy of these counts."""
        none = Kernel()
        kernels = {}
        for name, k in self.kernels.items():
            before = earlier.kernels.get(name, none)
            if k.launches > before.launches:
                kernels[name] = Kernel(
                    k.launches - before.launches, k.moved - before.moved, k.flops - before.flops
                )
        return Counts(
            kernels,
            self.waits - earlier.waits,
            self.hazards - earlier.hazards,
            self.carried - earlier.carried,
        )

    def table(self, most: int = 30) -> str:
        """For a person: the kernels that move most, the waits, the hazards."""
        lines = [
            f"launches {self.launches}, moved {self.moved / 2**30:.2f} GiB, "
            f"{self.flops / 1e12:.2f} TFLOP, carried {self.carried / 2**20:.1f} MiB"
        ]
        for name, k in sorted(self.kernels.items(), key=lambda item: -item[1].moved)[:most]:
            lines.append(f"  {k.launches:6d} {k.moved / 2**30:9.3f} GiB  {name}")
        for title, counter in (("waits", self.waits), ("hazards", self.hazards)):
            lines += [f"{title}:"] if counter else []
            lines += [f"  {n:6d} {what}" for what, n in counter.most_common(most)]
        return "\n".join(lines)
