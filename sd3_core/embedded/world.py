"""The embedded model's world: coloured shapes on plain grounds.

A `Scene` is the truth about a picture; a `Request` is what a caption says of one.  Geometry is in
pixels, x to the right and y down; `unit` is a 64th of the shorter side, so that a scene looks the
same at every resolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

Point = tuple[float, float]

# Two colours lie more than 0.3 apart in RGB (0..1), and so do a colour and a ground: closer ones
# cannot be told apart behind a VAE of 30 dB.
COLOURS = {
    "red": (0.87, 0.13, 0.16),
    "orange": (0.98, 0.53, 0.09),
    "yellow": (0.98, 0.88, 0.16),
    "green": (0.15, 0.65, 0.27),
    "cyan": (0.16, 0.78, 0.86),
    "blue": (0.13, 0.31, 0.87),
    "purple": (0.52, 0.14, 0.72),
    "pink": (0.98, 0.45, 0.73),
}
GROUNDS = {"white": (0.95, 0.95, 0.95), "grey": (0.55, 0.55, 0.55), "black": (0.10, 0.10, 0.10)}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
WORD = "word"  # the shape of a thing that is one to three letters
SIZES = {"small": (7.0, 8.0), "large": (11.0, 12.0)}  # radius in units
LETTER_SIZES = {"small": 2, "large": 3}  # pixels of a 64 px picture to a dot of a letter
LONGEST_WORD = 3
MOST_THINGS = 4
CORNERS = {
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
POSITIONS = {"centre": (0, 0), **CORNERS}  # the places that captions name
EDGES = {"left": (-1, None), "right": (1, None), "top": (None, -1), "bottom": (None, 1)}
PLACES = {**POSITIONS, **EDGES}  # edges are understood in prompts, but no caption says them
CENTRAL = 0.12  # of a side: how far from its middle the centre ends and an edge begins
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PICTURE_SIZES = (  # width, height
    *((64, 64), (96, 64), (64, 96)),
    *((128, 128), (128, 96), (96, 128), (128, 64), (64, 128)),
)


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    shape: str  # of SHAPES, or WORD
    colour: str
    size: str
    x: float  # its centroid (a word's: the middle of its box)
    y: float
    radius: float  # pixels; half of the height of a word
    text: str = ""  # capital letters of a word


@dataclass(frozen=True)
class Group:
    """Things of one kind, as a caption tells of them; None is left open."""

    count: int
    shape: str
    colour: str | None = None
    size: str | None = None
    position: str | None = None  # of PLACES
    text: str = ""


@dataclass(frozen=True)
class Request:
    """What a caption says, or a prompt asks for."""

    groups: tuple[Group, ...]
    relation: str | None = None  # of the first group to the second
    ground: str | None = None


@dataclass(frozen=True)
class Scene:
    """A picture's truth, and what its two captions say of it."""

    width: int
    height: int
    ground: str
    things: tuple[Thing, ...]  # in the order of the request's groups
    short: Request
    full: Request


def unit(width: int, height: int) -> float:
    return min(width, height) / 64


def is_at(place: str, x: float, y: float, width: int, height: int) -> bool:
    """Whether a point lies at one of PLACES.

    The centre reaches as far as CENTRAL from the middle in both directions; the other places begin
    there, so a point is at the centre, in one corner, or at an edge's middle, which has no name.
    """
    aside = (x / width - 0.5, y / height - 0.5)
    return all(
        abs(offset) < CENTRAL if side == 0 else side * offset >= CENTRAL
        for offset, side in zip(aside, PLACES[place], strict=True)
        if side is not None
    )


def position_of(x: float, y: float, width: int, height: int) -> str | None:
    """Which of POSITIONS a point is at, if any."""
    return next((name for name in POSITIONS if is_at(name, x, y, width, height)), None)


def relation_between(first: Sequence[Point], second: Sequence[Point]) -> str:
    """How the first things stand to the second ones: along the larger distance of their centres."""
    across, down = _apart(first, second)
    if abs(across) > abs(down):
        return "left of" if across > 0 else "right of"
    return "above" if down > 0 else "below"


def stands(relation: str, first: Sequence[Point], second: Sequence[Point]) -> bool:
    """Whether this relation holds, for the centres of two groups and for each thing of them."""
    if relation_between(first, second) != relation:
        return False
    axis = 0 if relation in ("left of", "right of") else 1
    low, high = (first, second) if relation in ("left of", "above") else (second, first)
    return max(point[axis] for point in low) < min(point[axis] for point in high)


def _apart(first: Sequence[Point], second: Sequence[Point]) -> Point:
    def centre(axis: int, points: Sequence[Point]) -> float:
        return sum(point[axis] for point in points) / len(points)

    return centre(0, second) - centre(0, first), centre(1, second) - centre(1, first)


# --- combinations that are held out from training ----------------------------------------------


def pair_is_held_out(colour: str, shape: str) -> bool:
    """Six of the 48 pairs of colour and shape; each shape lacks one colour, and no colour two.

    The rule: colour number = 3 * shape number + 1 (mod 8), both counted from 0 in the tables above.
    """
    if shape == WORD:
        return False
    return list(COLOURS).index(colour) == (3 * SHAPES.index(shape) + 1) % len(COLOURS)


def relation_is_held_out(first: str, relation: str, second: str) -> bool:
    """14 of the 112 orders in which two colours may stand beside or above one another.

    The rule: for a left of b, a + 2b = 1 (mod 8); for a above b, a + 2b = 5 (mod 8); a, b are the
    colours' numbers, counted from 0.  "a right of b" is "b left of a", and likewise for below.
    """
    if first == second:
        return False
    if relation in ("right of", "below"):
        first, relation, second = second, INVERSE[relation], first
    numbers = list(COLOURS)
    place = numbers.index(first) + 2 * numbers.index(second)
    return place % len(COLOURS) == (1 if relation == "left of" else 5)


def is_held_out(scene: Scene) -> bool:
    """Whether anything in the picture, told or not, is a held-out combination."""
    things = scene.things
    if any(pair_is_held_out(thing.colour, thing.shape) for thing in things):
        return True
    for first, second in combinations(grouped(scene), 2):
        relation = relation_between(_points(first), _points(second))
        if relation_is_held_out(first[0].colour, relation, second[0].colour):
            return True
    return False


def grouped(scene: Scene) -> list[tuple[Thing, ...]]:
    """The scene's things, a tuple for each group of its request."""
    groups, start = [], 0
    for group in scene.short.groups:
        groups.append(scene.things[start : start + group.count])
        start += group.count
    return groups


def _points(things: Sequence[Thing]) -> list[Point]:
    return [(thing.x, thing.y) for thing in things]
