"""Starting noise: the same seed gives the same picture, here and in ComfyUI, on every device.

Noise that is added on the way is the same on every device here, in ComfyUI on its CPU only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def noise(shape: Sequence[int], seed: int, batch_index: Sequence[int] | None = None) -> Tensor:
    """Standard normal noise [B, C, H, W], float32 on the CPU, bit-equal to ComfyUI's.

    The whole batch is one draw, so the second picture of a batch has no seed of its own.
    batch_index: draws picture after picture instead and returns those of these numbers, B of them;
    this is how ComfyUI repeats single pictures of a batch.
    Raises ValueError for a seed beyond 64 bits and a batch_index that does not fit the shape.
    """
    generator = seeded(seed)
    if batch_index is None:
        return torch.randn(tuple(shape), generator=generator)
    if len(batch_index) != shape[0] or min(batch_index) < 0:
        raise ValueError(
            f"batch_index is {list(batch_index)} for a batch of {shape[0]}; "
            "give one number per picture, counted from 0."
        )
    draws = [torch.randn(1, *shape[1:], generator=generator) for _ in range(max(batch_index) + 1)]
    return torch.cat([draws[index] for index in batch_index])


def noise_per_image(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Noise [B, C, H, W] in which every picture has its own seed, as if made alone.

    Raises ValueError unless there is one seed per picture.
    """
    if len(seeds) != shape[0]:
        raise ValueError(f"{len(seeds)} seeds for a batch of {shape[0]}; give one per picture.")
    return torch.cat([noise((1, *shape[1:]), seed) for seed in seeds])


class FreshNoise:
    """The noise that a sampler adds on the way: another at each call, the same in each run.

    seeds: one for the whole batch, or one for each picture.  As in ComfyUI on a CPU, it is drawn
    from the seed after the one that the run starts with, here on the CPU for every device.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [seeded((seed + 1) % 2**64) for seed in seeds]

    def __call__(self, x: Tensor) -> Tensor:
        """Like x [B, C, H, W], float32.  Raises ValueError where B seeds do not fit the batch."""
        if len(self.generators) not in (1, len(x)):
            raise ValueError(f"{len(self.generators)} seeds for a batch of {len(x)}.")
        share = (len(x) // len(self.generators), *x.shape[1:])
        draws = [torch.randn(share, generator=generator) for generator in self.generators]
        return without_waiting(torch.cat(draws), x.device)


def without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device; what CUDA copies from pinned memory it copies in its own time."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def seeded(seed: int) -> torch.Generator:
    """A generator of its own: the global random state stays untouched."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must lie between 0 and {2**64 - 1}.")
    return torch.Generator().manual_seed(seed)
