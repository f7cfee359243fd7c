"""Connected pieces of masks, for a whole batch at once."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """M connected pieces of a batch of masks, in no particular order."""

    labels: Tensor  # int64 [B, H, W]: number of the piece in 0 .. M - 1, or -1
    picture: Tensor  # [M], which of the batch
    area: Tensor  # [M] pixels
    centre: Tensor  # [M, 2] float: x, y of the mean
    box: Tensor  # [M, 4] float: left, top, right, bottom edges


def find_pieces(mask: Tensor, smallest: int) -> Pieces:
    """Pieces of at least `smallest` pixels; pixels that touch at a corner are connected.

    mask: bool [B, H, W].
    """
    roots = _roots(mask)
    batch, height, width = mask.shape
    offsets = torch.arange(batch, device=mask.device)[:, None, None] * (height * width + 1)
    names, inverse, areas = torch.unique(
        (roots + offsets)[mask], return_inverse=True, return_counts=True
    )
    large = areas >= smallest
    numbers = torch.where(large, large.cumsum(0) - 1, -1)[inverse]
    labels = torch.full(mask.shape, -1, device=mask.device)
    labels[mask] = numbers
    rows, y, x = (labels >= 0).nonzero(as_tuple=True)
    owner = labels[rows, y, x]
    place = torch.stack((x, y), 1).float()
    found = int(large.sum())
    index = owner[:, None].expand(-1, 2)
    empty = torch.zeros(found, 2, device=mask.device)
    area = areas[large]
    return Pieces(
        labels,
        names[large] // (height * width + 1),
        area,
        empty.index_add(0, owner, place + 0.5) / area[:, None],
        torch.cat(
            (
                empty.scatter_reduce(0, index, place, "amin", include_self=False),
                empty.scatter_reduce(0, index, place + 1, "amax", include_self=False),
            ),
            1,
        ),
    )


def _roots(mask: Tensor) -> Tensor:
    """The largest pixel number (from 1) of the piece that each pixel lies in, 0 outside.

    Each pixel takes the largest number around it, then the number which that pixel has taken: the
    second step doubles the distance that a number travels, so a few rounds are enough.
    """
    batch, height, width = mask.shape
    numbers = torch.arange(1, height * width + 1, device=mask.device).view(1, height, width)
    roots = (numbers * mask).int()
    while True:
        grown = widened(roots) * mask
        flat = torch.cat((grown.new_zeros(batch, 1), grown.flatten(1)), 1)
        for _ in range(2):
            flat = flat.gather(1, flat.long())
        grown = flat[:, 1:].view_as(roots)
        if torch.equal(grown, roots):
            return roots.long()
        roots = grown


def widened(values: Tensor) -> Tensor:
    """The largest value among each pixel and its eight neighbours; [B, H, W], any dtype."""
    tall = values.clone()
    torch.maximum(tall[:, 1:], values[:, :-1], out=tall[:, 1:])
    torch.maximum(tall[:, :-1], values[:, 1:], out=tall[:, :-1])
    wide = tall.clone()
    torch.maximum(wide[..., 1:], tall[..., :-1], out=wide[..., 1:])
    torch.maximum(wide[..., :-1], tall[..., 1:], out=wide[..., :-1])
    return wide
