"""Picture -> what is to be seen in it, exactly: colours, shapes, sizes, places, words.

Each pixel is a mixture of the ground and one of the eight colours: the colour whose line from the
ground passes nearest, and how far along that line it lies.  Where that is beyond one half there is
a thing; its connected piece is compared with a template of each shape and letter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, one_hot

from . import font
from .components import Pieces, find_pieces, widened
from .shapes import FORMS
from .world import COLOURS, GROUNDS, LETTER_SIZES, SIZES, WORD, Scene, unit

SPECK = 12.0  # square units: smaller pieces are noise
LIKE = 0.7  # least overlap (intersection over union) with a template to be that shape
LIKE_LETTER = 0.55  # likewise; small letters have strokes of two pixels
PURE = 0.7  # least share of a thing's pixels in its colour to have that colour
SOLID = 0.45  # least cover of a thing's pixel; thin strokes lose some in a VAE
GRID = 40  # template side
REACH = 2.6  # half of it in spreads: no shape and no letter goes further
SMALLEST_LARGE = (SIZES["small"][1] + SIZES["large"][0]) / 2  # radius in units
SMALLEST_LARGE_LETTER = font.ROWS * (LETTER_SIZES["small"] + 1 / 3) / 2  # likewise; 4 px at 96
SAME_PLACE = 3.0  # units between where a thing is and where it is seen


@dataclass(frozen=True)
class Seen:
    """A thing in a picture; what cannot be told is None."""

    shape: str | None
    colour: str | None
    size: str
    x: float
    y: float
    radius: float
    text: str = ""
    overlap: float = 1.0  # with the template
    purity: float = 1.0  # share of its pixels in its colour


@dataclass(frozen=True)
class Reading:
    """All that is to be seen in a picture."""

    width: int
    height: int
    ground: str
    things: tuple[Seen, ...]


@dataclass(frozen=True)
class Matte:
    """Each pixel as a mixture of ground and colour."""

    ground: Tensor  # [B], number of the ground
    colour: Tensor  # [B, H, W], number of the colour
    cover: Tensor  # [B, H, W], 0 (ground) to 1 (colour)


@torch.no_grad()
def read(pictures: Tensor) -> list[Reading]:
    """What is in each picture.  pictures: [B, 3, H, W] in -1..1, on any device."""
    height, width = pictures.shape[-2:]
    scale = unit(width, height)
    matte = _unmix((pictures.float().clamp(-1, 1) + 1) / 2)
    pieces = find_pieces(matte.cover > SOLID, round(SPECK * scale**2))
    colours, purity = _colours(matte, pieces)
    frames = _frames(matte, pieces)
    kinds, overlap = _compare(matte, pieces, frames)
    seen: list[list[Seen]] = [[] for _ in pictures]
    centres, boxes, spreads = frames.centre.tolist(), pieces.box.tolist(), frames.spread.tolist()
    for row, picture in enumerate(pieces.picture.tolist()):
        colour = list(COLOURS)[colours[row]] if purity[row] >= PURE else None
        where = (centres[row], boxes[row], spreads[row], scale)
        seen[picture].append(_seen(kinds[row], colour, *where, overlap[row], purity[row]))
    grounds = [list(GROUNDS)[number] for number in matte.ground.tolist()]
    return [
        Reading(width, height, ground, _spelled(things, scale))
        for ground, things in zip(grounds, seen, strict=True)
    ]


def reads_back(reading: Reading, scene: Scene) -> bool:
    """Whether exactly the scene's things and ground are seen, each near its place."""
    left = list(reading.things)
    near = SAME_PLACE * unit(scene.width, scene.height)
    for thing in scene.things:
        kind = (thing.shape, thing.colour, thing.size, thing.text)
        for one in left:
            aside = max(abs(one.x - thing.x), abs(one.y - thing.y))
            if (one.shape, one.colour, one.size, one.text) == kind and aside <= near:
                left.remove(one)
                break
        else:
            return False
    return not left and reading.ground == scene.ground


def agreement(pictures: Tensor, scenes: Sequence[Scene]) -> float:
    """Share of pictures that read back as their scenes; the gate of the VAE."""
    readings = read(pictures)
    return sum(map(reads_back, readings, scenes)) / len(readings)


# --- colours ------------------------------------------------------------------------------------


def _unmix(pictures: Tensor) -> Matte:
    """pictures: [B, 3, H, W] in 0..1."""
    grounds = pictures.new_tensor(list(GROUNDS.values()))
    rim = torch.cat(
        (pictures[:, :, :2].flatten(2), pictures[..., :2].flatten(2))
        + (pictures[:, :, -2:].flatten(2), pictures[..., -2:].flatten(2)),
        2,
    )
    base = rim.median(2).values  # [B, 3], what this picture's ground really looks like
    ground = torch.cdist(base, grounds).argmin(1)
    change = pictures - base[:, :, None, None]
    length = change.square().sum(1)
    best = torch.full_like(length, torch.inf)
    colour, cover = torch.zeros_like(length, dtype=torch.long), torch.zeros_like(length)
    for number, value in enumerate(COLOURS.values()):
        line = pictures.new_tensor(value) - base  # [B, 3]
        square = line.square().sum(1)[:, None, None]
        along = torch.einsum("bchw,bc->bhw", change, line)
        share = (along / square).clamp(0, 1)
        distance = length - 2 * share * along + share.square() * square
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        cover = torch.where(nearer, share, cover)
        colour.masked_fill_(nearer, number)
    return Matte(ground, colour, cover)


def _colours(matte: Matte, pieces: Pieces) -> tuple[list[int], list[float]]:
    """Each piece's colour number, by the votes of its pixels, and the share that voted for it."""
    inside = pieces.labels >= 0
    votes = torch.zeros(len(pieces.area), len(COLOURS), device=matte.cover.device)
    # A pixel counts by how far it is from the ground: near it, all colours look alike.
    weights = one_hot(matte.colour[inside], len(COLOURS)) * matte.cover[inside][:, None]
    votes.index_add_(0, pieces.labels[inside], weights)
    share, number = (votes / votes.sum(1, keepdim=True)).max(1)
    return number.tolist(), share.tolist()


# --- shapes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frames:
    """Where each piece lies: its soft edge counts, so blur and noise hardly move it."""

    owner: Tensor  # [B, H, W], the piece that a pixel belongs to, with a rim of a pixel; or -1
    centre: Tensor  # [M, 2] pixels
    spread: Tensor  # [M] pixels, root mean square distance from the centre


def _frames(matte: Matte, pieces: Pieces) -> Frames:
    owner = widened(pieces.labels)
    rows, y, x = (owner >= 0).nonzero(as_tuple=True)
    piece, weight = owner[rows, y, x], matte.cover[rows, y, x]
    place = torch.stack((x, y), 1) + 0.5
    total = weight.new_zeros(len(pieces.area)).index_add_(0, piece, weight)

    def mean(values: Tensor) -> Tensor:
        sums = values.new_zeros(len(total), values.shape[1])
        return sums.index_add_(0, piece, values * weight[:, None]) / total[:, None]

    centre = mean(place)
    square = mean((place - centre[piece]).square()).sum(1) + 1 / 6  # a pixel's own
    return Frames(owner, centre, square.sqrt())


@lru_cache(maxsize=1)
def _templates() -> tuple[Tensor, Tensor]:
    """Shapes, then letters, centred and scaled to spread 1: [T, GRID * GRID] of 0 and 1.

    Also the spread of each in its own measure: radii, or half letter heights.
    """
    fine = torch.linspace(-1.25, 1.25, 501)
    x, y = torch.meshgrid(fine, fine, indexing="xy")
    inside: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, y, form=form: form.distance(x, y) < 0 for form in FORMS.values()
    ]
    inside += [lambda x, y, name=name: _dotted(font.letter(name), x, y) for name in font.LETTERS]
    masks, spreads = [], []
    for test in inside:
        own = test(x, y)
        middle_x, middle_y = x[own].mean(), y[own].mean()
        spread = ((x[own] - middle_x).square() + (y[own] - middle_y).square()).mean().sqrt()
        steps = (torch.arange(GRID) + 0.5) / GRID * 2 * REACH - REACH
        across, down = torch.meshgrid(steps * spread, steps * spread, indexing="xy")
        masks.append(test(across + middle_x, down + middle_y).float())
        spreads.append(spread)
    return torch.stack(masks).flatten(1), torch.stack(spreads)


def _dotted(dots: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Whether points lie in a letter whose height is -1..1."""
    column = ((x * font.ROWS + font.COLUMNS) / 2).floor().long()
    row = ((y + 1) * font.ROWS / 2).floor().long()
    within = (column >= 0) & (column < font.COLUMNS) & (row >= 0) & (row < font.ROWS)
    spots = dots[row.clamp(0, font.ROWS - 1), column.clamp(0, font.COLUMNS - 1)] > 0
    return spots & within


def _compare(matte: Matte, pieces: Pieces, frames: Frames) -> tuple[list[int], list[float]]:
    """The template each piece is most like, and their overlap."""
    masks = _templates()[0].to(matte.cover.device)
    found = _stretched(matte, pieces.picture, frames)
    common = found @ masks.T
    overlap = common / (found.sum(1, keepdim=True) + masks.sum(1) - common).clamp(min=1)
    best, number = overlap.max(1)
    return number.tolist(), best.tolist()


def _stretched(matte: Matte, pictures: Tensor, frames: Frames) -> Tensor:
    """Each piece, centred and scaled to spread 1: [M, GRID * GRID] of 0 and 1."""
    height, width = matte.cover.shape[-2:]
    steps = (torch.arange(GRID, device=matte.cover.device) + 0.5) / GRID * 2 * REACH - REACH
    places = frames.centre[:, None] + frames.spread[:, None, None] * steps[:, None]  # [M, G, 2]
    x, y = places[..., 0] / width * 2 - 1, places[..., 1] / height * 2 - 1
    grid = torch.stack(
        (x[:, None].expand(-1, GRID, -1), y[:, :, None].expand(-1, -1, GRID)), -1
    )  # [M, G, G, 2]
    parts = [torch.zeros(0, GRID * GRID, device=grid.device)]
    for rows in torch.arange(len(grid), device=grid.device).split(512):
        own = frames.owner[pictures[rows]] == rows[:, None, None]
        cover = grid_sample(
            (matte.cover[pictures[rows]] * own)[:, None], grid[rows], align_corners=False
        )
        parts.append((cover > 0.5).float().flatten(1))
    return torch.cat(parts)


def _seen(
    kind: int,
    colour: str | None,
    centre: Sequence[float],
    box: Sequence[float],
    spread: float,
    scale: float,
    overlap: float,
    purity: float,
) -> Seen:
    name = _NAMES[kind]
    if overlap < (LIKE if name in FORMS else LIKE_LETTER):
        name = None
    radius = spread / float(_templates()[1][kind])
    if name is not None and name not in FORMS:  # a letter
        left, top, right, bottom = box
        size = "large" if radius >= SMALLEST_LARGE_LETTER * scale else "small"
        x, y = (left + right) / 2, (top + bottom) / 2
        return Seen(WORD, colour, size, x, y, radius, name, overlap, purity)
    size = "large" if radius >= SMALLEST_LARGE * scale else "small"
    return Seen(name, colour, size, centre[0], centre[1], radius, "", overlap, purity)


_NAMES = (*FORMS, *font.LETTERS)


# --- words --------------------------------------------------------------------------------------


def _spelled(things: list[Seen], scale: float) -> tuple[Seen, ...]:
    """Letters of one colour and size in a row become a word; the rest stays as it is."""
    words: list[list[Seen]] = []
    for letter in sorted((one for one in things if one.shape == WORD), key=lambda one: one.x):
        for word in words:
            if _follows(word[-1], letter):
                word.append(letter)
                break
        else:
            words.append([letter])
    return (*(one for one in things if one.shape != WORD), *map(_joined, words))


def _follows(last: Seen, letter: Seen) -> bool:
    dot = 2 * last.radius / font.ROWS
    return (
        (letter.colour, letter.size) == (last.colour, last.size)
        and abs(letter.y - last.y) < 1.5 * dot
        and letter.x - last.x < (font.ADVANCE + 1) * dot
    )


def _joined(word: list[Seen]) -> Seen:
    first, last = word[0], word[-1]
    return Seen(
        WORD,
        first.colour,
        first.size,
        (first.x + last.x) / 2,
        sum(letter.y for letter in word) / len(word),
        sum(letter.radius for letter in word) / len(word),
        "".join(letter.text for letter in word),
        min(letter.overlap for letter in word),
        min(letter.purity for letter in word),
    )
