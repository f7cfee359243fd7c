"""Scenes -> pictures, a batch at once, on any device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import font
from .shapes import FORMS
from .world import COLOURS, GROUNDS, SHAPES, WORD, Scene, Thing

SHAPE_LABELS = (*SHAPES, WORD)  # what a label's first number counts, from 1
CELL = 8  # pixels a side of what a label is of: one latent pixel
REACH = 32  # pixels: the unit of middles


def draw(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> Tensor:
    """Pictures of scenes of one size: [B, 3, H, W], float32 in -1..1.

    Edges are as soft as a pixel is wide: coverage is one half minus the distance to the edge.
    Raises ValueError when the sizes differ.
    """
    sizes = {(scene.width, scene.height) for scene in scenes}
    if len(sizes) != 1:
        raise ValueError(f"the scenes are of {len(sizes)} sizes; draw one size at a time.")
    width, height = sizes.pop()
    grounds = torch.tensor([GROUNDS[scene.ground] for scene in scenes], device=device)
    pictures = grounds[:, :, None, None].expand(-1, -1, height, width).contiguous()
    things = [(index, thing) for index, scene in enumerate(scenes) for thing in scene.things]
    for shape in (*FORMS, WORD):
        some = [(index, thing) for index, thing in things if thing.shape == shape]
        if some:
            cover = _covers(shape, [thing for _, thing in some], width, height, device)
            rows = torch.tensor([index for index, _ in some], device=device)
            colours = torch.tensor([COLOURS[thing.colour] for _, thing in some], device=device)
            change = (colours - grounds[rows])[:, :, None, None] * cover[:, None]
            pictures.index_add_(0, rows, change)  # things never overlap
    return pictures * 2 - 1


def truth(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """What lies in each cell of 8 x 8 pixels, and where the middle of that thing is.

    The thing is the one that covers most of the cell, if it covers an eighth of it.
    Returns labels [B, 2, H/8, W/8], uint8: the shape (0: ground, then SHAPE_LABELS), the colour (0,
    then COLOURS); and middles [B, 3, H/8, W/8], float32: from the cell's middle to the thing's
    centroid, right and down, and its radius, in REACH; 0 where there is ground.
    """
    width, height = scenes[0].width, scenes[0].height
    rows, columns = height // CELL, width // CELL
    labels = torch.zeros(len(scenes), 2, rows, columns, dtype=torch.uint8)
    middles = torch.zeros(len(scenes), 3, rows, columns)
    most = torch.full((len(scenes), rows, columns), 0.125)
    x = (torch.arange(columns) + 0.5) * CELL
    y = ((torch.arange(rows) + 0.5) * CELL)[:, None]
    colours = list(COLOURS)
    for number, shape in enumerate(SHAPE_LABELS, 1):
        some = [(i, thing) for i, one in enumerate(scenes) for thing in one.things]
        some = [(i, thing) for i, thing in some if thing.shape == shape]
        if not some:
            continue
        covers = _covers(shape, [thing for _, thing in some], width, height, "cpu")
        shares = F.avg_pool2d(covers[:, None], CELL)[:, 0]
        for (i, thing), share in zip(some, shares, strict=True):
            here = share > most[i]
            most[i][here] = share[here]
            labels[i, 0][here], labels[i, 1][here] = number, 1 + colours.index(thing.colour)
            way = torch.broadcast_tensors(thing.x - x, thing.y - y, torch.tensor(thing.radius))
            middles[i][:, here] = torch.stack(way)[:, here] / REACH
    return labels, middles


def _covers(
    shape: str, things: Sequence[Thing], width: int, height: int, device: torch.device | str
) -> Tensor:
    """How much of each pixel each thing covers: [M, H, W] in 0..1."""
    if shape == WORD:
        return torch.stack([_word_cover(thing, width, height) for thing in things]).to(device)
    numbers = torch.tensor([(one.x, one.y, one.radius) for one in things], device=device)
    x0, y0, radius = numbers.T[..., None, None]
    x = (torch.arange(width, device=device) + 0.5 - x0) / radius
    y = (torch.arange(height, device=device)[:, None] + 0.5 - y0) / radius
    distance = FORMS[shape].distance(*torch.broadcast_tensors(x, y)) * radius
    return (0.5 - distance).clamp(0, 1)


def _word_cover(thing: Thing, width: int, height: int) -> Tensor:
    """Letters lie on whole pixels, so their dots need no soft edge."""
    dot = round(2 * thing.radius / font.ROWS)
    dots = font.word(thing.text).repeat_interleave(dot, 0).repeat_interleave(dot, 1)
    rows, columns = dots.shape
    left, top = round(thing.x - columns / 2), round(thing.y - rows / 2)
    cover = torch.zeros(height, width)
    cover[top : top + rows, left : left + columns] = dots
    return cover
