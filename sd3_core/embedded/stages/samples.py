"""Pictures of a training step, by counters: the same wherever a run is stopped and taken up."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...training.batches import generator
from ..render import draw
from ..scenes import KINDS, scene
from ..world import Scene

Size = tuple[int, int]  # width, height in pixels

TRAINING = 0  # the world's seed that training sees
HELD = 1  # and the one that validation does


def scenes_of(
    seed: int, numbers: Sequence[int], size: Size, kinds: Mapping[str, float] = KINDS
) -> list[Scene]:
    """The scenes with these numbers."""
    return [scene(seed, number, size, kinds=kinds) for number in numbers]


def crops(
    scenes: Sequence[Scene], side: int, *counters: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Squares of `side` pixels from the scenes' pictures, each around one of its things:
    [B, 3, side, side].

    Their corners are whole multiples of 8 pixels, so that a latent pixel means the same in each.
    """
    squares = []
    chances = torch.rand(len(scenes), 3, generator=generator(*counters, "crops")).tolist()
    for one, picture, (which, across, down) in zip(
        scenes, draw(scenes, device), chances, strict=True
    ):
        thing = one.things[int(which * len(one.things))]
        left = _corner(thing.x, across, side, one.width)
        top = _corner(thing.y, down, side, one.height)
        squares.append(picture[:, top : top + side, left : left + side])
    return torch.stack(squares)


def _corner(centre: float, chance: float, side: int, length: int) -> int:
    """Where a square that holds the centre begins."""
    start = min(max(centre - chance * side, 0), length - side)
    return round(start / 8) * 8
