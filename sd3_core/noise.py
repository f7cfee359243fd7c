"""Starting noise: the same seed gives the same picture, here and in ComfyUI, on every device."""

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


def seeded(seed: int) -> torch.Generator:
    """A generator of its own: the global random state stays untouched."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must lie between 0 and {2**64 - 1}.")
    return torch.Generator().manual_seed(seed)
