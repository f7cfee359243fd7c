"""Scenes by counters: sample `index` of `seed` is the same scene on every machine, in any order.

Every choice is made on the CPU; only the pictures' pixels know a device.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from . import font
from .dice import Dice
from .shapes import FORMS
from .world import (
    CENTRAL,
    COLOURS,
    GROUNDS,
    LETTER_SIZES,
    LONGEST_WORD,
    MOST_THINGS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    WORD,
    Group,
    Point,
    Request,
    Scene,
    Thing,
    is_held_out,
    position_of,
    stands,
    unit,
)

Cell = tuple[float, float, float, float]  # left, top, right, bottom in parts of the frame

WHOLE: Cell = (0, 0, 1, 1)
SIDES: dict[str, tuple[Cell, Cell]] = {  # where the two groups of a relation lie
    "left of": ((0, 0, 0.5, 1), (0.5, 0, 1, 1)),
    "right of": ((0.5, 0, 1, 1), (0, 0, 0.5, 1)),
    "above": ((0, 0, 1, 0.5), (0, 0.5, 1, 1)),
    "below": ((0, 0.5, 1, 1), (0, 0, 1, 0.5)),
}
QUARTERS: tuple[Cell, ...] = (
    (0, 0, 0.5, 0.5),
    (0.5, 0, 1, 0.5),
    (0, 0.5, 0.5, 1),
    (0.5, 0.5, 1, 1),
)
KINDS = {  # of a scene, and how often training sees it
    "single": 0.26,
    "count": 0.17,
    "pair": 0.19,
    "relation": 0.24,
    "three": 0.08,
    "word": 0.06,
}
EDGE = 1.5  # units that stay free along the frame and around each cell
GAP = 3.0  # units between the reaches of two things
SPREAD = 0.17  # of a side: how far from the middle a thing in a corner lies at least
ATTEMPTS = 40  # to place things freely, before they get a cell each


def scene(
    seed: int,
    index: int,
    size: tuple[int, int] = (64, 64),
    *,
    kinds: Mapping[str, float] = KINDS,
    unseen: bool = False,
) -> Scene:
    """Sample `index` of `seed`.

    size: width, height in pixels.  kinds: shares of KINDS, any subset of it.  unseen: False gives
    what training may see, True only pictures with a held-out combination (never words, which have
    none).  Raises ValueError for kinds that are not there.
    """
    if not kinds or not set(kinds) <= set(KINDS) or (unseen and set(kinds) == {"word"}):
        raise ValueError(f"kinds are {list(kinds)}; choose of {', '.join(KINDS)}.")
    dice = Dice(seed, index)
    while True:
        made = MAKERS[dice.weighted(kinds)](dice, *size)
        if made is not None and is_held_out(made) == unseen:
            return made


def scenes(
    seed: int,
    indices: Iterable[int],
    size: tuple[int, int] = (64, 64),
    *,
    kinds: Mapping[str, float] = KINDS,
    unseen: bool = False,
) -> list[Scene]:
    """Samples of one size; see `scene`."""
    return [scene(seed, index, size, kinds=kinds, unseen=unseen) for index in indices]


# --- kinds of scene; each maker may fail to place its things, and is asked again ------------------


def _single(dice: Dice, width: int, height: int) -> Scene | None:
    """One thing, half of the time at a place that has a name."""
    position = dice.among(POSITIONS) if dice.happens(0.5) else None
    thing = _loose(dice, width, height)
    if position is None:
        at = _within(dice, thing, WHOLE, width, height)
    else:
        at = _at(dice, thing, position, width, height)
    said = replace(_told([thing]), position=position if dice.happens(0.85) else None)
    made = _scene(dice, width, height, [_moved(thing, at)], [said])
    full = replace(made.full.groups[0], position=position)
    return replace(made, full=replace(made.full, groups=(full,)))


def _count(dice: Dice, width: int, height: int) -> Scene | None:
    """Two to four things of one kind."""
    things = [_loose(dice, width, height)] * dice.among(range(2, MOST_THINGS + 1))
    placed = _scattered(dice, things, width, height)
    return _scene(dice, width, height, placed, [_told(things)])


def _pair(dice: Dice, width: int, height: int) -> Scene | None:
    """Two groups; only the full sentence says how they stand to each other."""
    made = _relation(dice, width, height)
    return made and replace(made, short=replace(made.short, relation=None))


def _relation(dice: Dice, width: int, height: int) -> Scene | None:
    """Two groups of one or two things, one beside or above the other."""
    relation = dice.among(RELATIONS)
    counts = dice.among([(1, 1), (1, 1), (1, 1), (2, 1), (1, 2), (2, 2)])
    kinds = [_loose(dice, width, height) for _ in counts]
    if _same_kind(*kinds):
        return None
    groups = []
    for kind, cell, number in zip(kinds, SIDES[relation], counts, strict=True):
        cells = _halves(cell, "above" if relation in ("left of", "right of") else "left of")
        own = [cell] if number == 1 else cells
        groups.append([_moved(kind, _within(dice, kind, one, width, height)) for one in own])
    first, second = ([(thing.x, thing.y) for thing in group] for group in groups)
    if not _clear(relation, first, second):
        return None
    told = [_told(group) for group in groups]
    return _scene(dice, width, height, [*groups[0], *groups[1]], told, relation)


def _three(dice: Dice, width: int, height: int) -> Scene | None:
    """Three different things; the full sentence says in which corners they lie, if they do."""
    things = [_loose(dice, width, height) for _ in range(3)]
    if any(_same_kind(one, other) for one, other in combinations(things, 2)):
        return None
    placed = _scattered(dice, things, width, height)
    made = _scene(dice, width, height, placed, [_told([thing]) for thing in placed])
    corners = [_plain_position(thing, width, height) for thing in placed]
    if None in corners or len(set(corners)) < len(corners):
        return made
    groups = zip(made.full.groups, corners, strict=True)
    named = tuple(replace(group, position=corner) for group, corner in groups)
    return replace(made, full=replace(made.full, groups=named))


def _word(dice: Dice, width: int, height: int) -> Scene | None:
    """One word near the middle."""
    text = "".join(dice.among(font.LETTERS) for _ in range(dice.among(range(1, LONGEST_WORD + 1))))
    size = dice.among(LETTER_SIZES)
    dot = int(LETTER_SIZES[size] * unit(width, height))
    free = EDGE * unit(width, height)
    columns, rows = dot * font.columns(text), dot * font.ROWS
    left = _near_middle(dice, columns, width, free)
    top = _near_middle(dice, rows, height, free)
    colour = dice.among(COLOURS)
    thing = Thing(WORD, colour, size, left + columns / 2, top + rows / 2, rows / 2, text)
    return _scene(dice, width, height, [thing], [_told([thing])])


def _near_middle(dice: Dice, length: int, side: int, free: float) -> int:
    """Where a word begins, in whole pixels: its middle lies in the middle half of the side."""
    low, high = max(free, side / 4 - length / 2), min(side - free, side * 3 / 4 + length / 2)
    return round(dice.between(low, high - length))


MAKERS: dict[str, Callable[[Dice, int, int], Scene | None]] = {
    "single": _single,
    "count": _count,
    "pair": _pair,
    "relation": _relation,
    "three": _three,
    "word": _word,
}


def _scene(
    dice: Dice,
    width: int,
    height: int,
    things: Sequence[Thing],
    told: Sequence[Group],
    relation: str | None = None,
) -> Scene:
    """The scene with what its captions say: the full one all sizes and the ground, too."""
    ground = dice.among(GROUNDS)
    full = Request(tuple(told), relation, ground)
    sized = dice.happens(0.3)
    kept = tuple(group if sized else replace(group, size=None) for group in told)
    shapes = [group.shape for group in told]
    if dice.happens(0.05) and WORD not in shapes and len(set(shapes)) == len(shapes):
        kept = tuple(replace(group, colour=None) for group in kept)
    short = Request(kept, relation, ground if dice.happens(0.1) else None)
    return Scene(width, height, ground, tuple(things), short, full)


def _told(things: Sequence[Thing]) -> Group:
    one = things[0]
    return Group(len(things), one.shape, one.colour, one.size, None, one.text)


# --- placing ------------------------------------------------------------------------------------


def _loose(dice: Dice, width: int, height: int) -> Thing:
    """A thing that has no place yet."""
    size = dice.among(SIZES)
    radius = dice.between(*SIZES[size]) * unit(width, height)
    return Thing(dice.among(SHAPES), dice.among(COLOURS), size, 0, 0, radius)


def _same_kind(one: Thing, other: Thing) -> bool:
    return (one.shape, one.colour) == (other.shape, other.colour)


def _moved(thing: Thing, point: Point) -> Thing:
    return replace(thing, x=point[0], y=point[1])


def _within(dice: Dice, thing: Thing, cell: Cell, width: int, height: int) -> Point:
    """A centre with which the thing lies inside the cell; the cell's middle if it hardly fits."""
    form, free = FORMS[thing.shape], EDGE * unit(width, height)
    low_x, high_x = cell[0] * width + free, cell[2] * width - free
    low_y, high_y = cell[1] * height + free, cell[3] * height - free
    return (
        _between(dice, low_x - form.left * thing.radius, high_x - form.right * thing.radius),
        _between(dice, low_y - form.top * thing.radius, high_y - form.bottom * thing.radius),
    )


def _between(dice: Dice, low: float, high: float) -> float:
    return dice.between(low, high) if low < high else (low + high) / 2


def _at(dice: Dice, thing: Thing, position: str, width: int, height: int) -> Point:
    """A centre well inside a named position."""
    free = thing.radius * FORMS[thing.shape].reach + EDGE * unit(width, height)

    def along(side: int | None, length: int) -> float:
        if not side:
            return length * dice.between(0.5 - CENTRAL / 2, 0.5 + CENTRAL / 2)
        place = _between(dice, free, max(length * (0.5 - SPREAD), free))
        return place if side < 0 else length - place

    across, down = POSITIONS[position]
    return along(across, width), along(down, height)


def _plain_position(thing: Thing, width: int, height: int) -> str | None:
    """The corner a thing lies in, unless it is close to the corner's border."""
    aside = min(abs(thing.x / width - 0.5), abs(thing.y / height - 0.5))
    return position_of(thing.x, thing.y, width, height) if aside > CENTRAL + 0.03 else None


def _scattered(dice: Dice, things: Sequence[Thing], width: int, height: int) -> list[Thing]:
    """Placed freely where there is room, else each in a cell of its own."""
    for _ in range(ATTEMPTS):
        placed = [_moved(thing, _within(dice, thing, WHOLE, width, height)) for thing in things]
        if all(_apart(one, other, width, height) for one, other in combinations(placed, 2)):
            return placed
    cells = QUARTERS if len(things) > 2 else dice.among(SIDES.values())
    return [
        _moved(thing, _within(dice, thing, cell, width, height))
        for thing, cell in zip(things, dice.shuffled(cells), strict=False)
    ]


def _apart(one: Thing, other: Thing, width: int, height: int) -> bool:
    reach = sum(thing.radius * FORMS[thing.shape].reach for thing in (one, other))
    far = max(abs(one.x - other.x), abs(one.y - other.y))
    return far > reach + GAP * unit(width, height)


def _clear(relation: str, first: Sequence[Point], second: Sequence[Point]) -> bool:
    """Whether a relation is there beyond doubt: the larger distance is so by a fifth at least."""

    def squeezed(points: Sequence[Point]) -> list[Point]:
        wide = 1 / 1.2 if relation in ("left of", "right of") else 1.2
        return [(x * wide, y) for x, y in points]

    return stands(relation, squeezed(first), squeezed(second))


def _halves(cell: Cell, split: str) -> list[Cell]:
    left, top, right, bottom = cell
    if split == "left of":
        middle = (left + right) / 2
        return [(left, top, middle, bottom), (middle, top, right, bottom)]
    middle = (top + bottom) / 2
    return [(left, top, right, middle), (left, middle, right, bottom)]
