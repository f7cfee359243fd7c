"""How a run went: the length of its path, and whether that was straight."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .samplers import Step


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
