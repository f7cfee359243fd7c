"""How a run went: the length of its path, its time and memory, how far its pictures lie apart."""

import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from .samplers import Step

PROCESS = Path("/proc/self")  # Linux
MIB = 2**20


class Trail:
    """The latents that a sampler passes: `on_step` of a run, then `end` with what it returned.

    points: each [B, C, H, W], from noise to picture.
    """

    def __init__(self) -> None:
        self.points: list[Tensor] = []

    def on_step(self, step: Step) -> None:
        self.points.append(step.x)

    def end(self, x: Tensor) -> None:
        self.points.append(x)


def path_length(points: Sequence[Tensor]) -> Tensor:
    """How long the way through these latents is: the integral of |v| over the noise level.

    points: each [B, C, H, W] in model space, from noise to picture, see Trail.  Returns [B].
    |v| is the Euclidean norm over all of a latent's numbers.  Between two levels a sampler goes
    straight, so the sum of its steps is that integral for the velocity that it applied.
    Esser et al. 2024 (arXiv:2403.03206) compare it between models of several depths: larger ones
    go straighter and need fewer steps.
    Raises ValueError without a point.
    """
    check_points(points)
    steps = [distance(one, other) for one, other in pairwise(points)]
    return torch.stack(steps).sum(0) if steps else distance(points[0], points[0])


def path_ratio(points: Sequence[Tensor]) -> Tensor:
    """The path's length over the straight distance from its first to its last point: [B].

    1 is straight, as rectified flow aims at; so is a run that goes nowhere.
    """
    length, straight = path_length(points), distance(points[0], points[-1])
    return torch.where(length > 0, length / straight, 1.0)


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Euclidean, of each latent: [B, C, H, W] twice -> [B], float32."""
    return torch.linalg.vector_norm((one.float() - other.float()).flatten(1), dim=1)


def check_points(points: Sequence[Tensor]) -> None:
    if not points:
        raise ValueError("a path without a point has no length; record at least where it starts.")


def pixel_distance(one: Tensor, other: Tensor) -> Tensor:
    """Root mean square over the pixels' numbers: uint8 [B, H, W, 3] twice -> [B], 0 to 255."""
    return (one.float() - other.float()).square().flatten(1).mean(dim=1).sqrt()


class Meter:
    """Seconds, and the most memory held, since it was made.

    On CUDA the memory is what torch has allocated there, on a CPU under Linux what the process
    holds in all; None elsewhere.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self.counts = device.type == "cpu" and reset_peak_resident()
        self.start = time.perf_counter()

    def spent(self) -> tuple[float, int | None]:
        """Seconds; MiB."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds, peak = time.perf_counter() - self.start, None
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        elif self.counts:
            peak = peak_resident()
        return seconds, None if peak is None else round(peak / MIB)


def reset_peak_resident() -> bool:
    """Begin anew with what peak_resident tells, if this system can."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_resident() -> int | None:
    """Bytes of memory that this process held at most."""
    for line in (PROCESS / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024
    return None
