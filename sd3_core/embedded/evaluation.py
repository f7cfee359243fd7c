"""The prompts of the mini GenEval: six categories, and unseen combinations apart.

After GenEval (Ghosh et al. 2023, arXiv:2310.11513), in this world's words.  The prompts are fixed
by a seed; none of the six categories holds a combination that was held out from training.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

from .captions import short_caption
from .dice import Dice
from .world import (
    COLOURS,
    GROUNDS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Group,
    Request,
    Scene,
    pair_is_held_out,
    relation_is_held_out,
)

PER_CATEGORY = 64
UNSEEN = "unseen combinations"
SEED = 20240305  # the date of the paper


@lru_cache(maxsize=1)
def prompts() -> dict[str, tuple[str, ...]]:
    """Category -> its prompts, all different."""
    return {name: _collected(name, make) for name, make in MAKERS.items()}


def _collected(name: str, make: Callable[[Dice, int], Request]) -> tuple[str, ...]:
    found: dict[Request, str] = {}
    for number, request in enumerate(_tries(name, make)):
        if request is not None and request not in found:
            found[request] = short_caption(Scene(64, 64, "white", (), request, request), number)
        if len(found) == PER_CATEGORY:
            break
    return tuple(found.values())


def _tries(name: str, make: Callable[[Dice, int], Request]) -> Iterator[Request | None]:
    """Requests until nobody asks for more; None for those of the other split."""
    wanted = name == UNSEEN
    kept = number = 0
    while True:
        request = make(Dice(SEED, name, number), kept)
        number += 1
        fits = _is_unseen(request) == wanted
        kept += fits
        yield request if fits else None


def _is_unseen(request: Request) -> bool:
    """Whether it asks for a held-out pair, or for a relation of held-out colours.

    Without a relation two kinds of things are seen: they may stand in an order that was.
    """
    pairs = [(group.colour, group.shape) for group in request.groups if group.colour]
    if any(pair_is_held_out(colour, shape) for colour, shape in pairs):
        return True
    if request.relation is None:
        return False
    (first, _), (second, _) = pairs
    return relation_is_held_out(first, request.relation, second)


# --- one request of a category; `number` deals out what must come equally often -------------------


def _group(dice: Dice, count: int = 1) -> Group:
    return Group(count, dice.among(SHAPES), dice.among(COLOURS))


def _single_object(dice: Dice, number: int) -> Request:
    size = dice.among((None, None, *SIZES))
    return Request((replace(_group(dice), shape=_dealt(SHAPES, number), size=size),))


def _colours(dice: Dice, number: int) -> Request:
    ground = dice.among((None, *GROUNDS))
    return Request((replace(_group(dice), colour=_dealt(COLOURS, number)),), ground=ground)


def _counting(dice: Dice, number: int) -> Request:
    return Request((_group(dice, 2 + number % 3),))


def _two_objects(dice: Dice, number: int) -> Request:
    """One colour on two shapes, or one shape in two colours: nothing to confuse."""
    one, other = _group(dice), _group(dice)
    if number % 2:
        other = replace(other, shape=one.shape, colour=_another(dice, COLOURS, one.colour))
    else:
        other = replace(other, colour=one.colour, shape=_another(dice, SHAPES, one.shape))
    return Request((one, other))


def _position(dice: Dice, number: int) -> Request:
    """A named place, or a relation."""
    if number % 2:
        return _related(dice, number // 2)
    return Request((replace(_group(dice), position=_dealt(POSITIONS, number // 2)),))


def _attribute_binding(dice: Dice, number: int) -> Request:
    """Two colours on two shapes."""
    return Request(_two_kinds(dice))


def _unseen(dice: Dice, number: int) -> Request:
    """A single thing, two things, or a relation, in turn."""
    if number % 3 == 0:
        size = dice.among((None, *SIZES))
        return Request((replace(_group(dice), size=size),))
    if number % 3 == 1:
        return Request(_two_kinds(dice))
    return _related(dice, number // 3)


def _related(dice: Dice, number: int) -> Request:
    return Request(_two_kinds(dice), _dealt(RELATIONS, number))


def _two_kinds(dice: Dice) -> tuple[Group, Group]:
    one = _group(dice)
    shape, colour = _another(dice, SHAPES, one.shape), _another(dice, COLOURS, one.colour)
    return one, Group(1, shape, colour)


def _another(dice: Dice, options: Iterable[str], known: str | None) -> str:
    return dice.among([option for option in options if option != known])


def _dealt(options: Iterable[str], number: int) -> str:
    listed = list(options)
    return listed[number % len(listed)]


MAKERS: dict[str, Callable[[Dice, int], Request]] = {
    "single object": _single_object,
    "two objects": _two_objects,
    "counting": _counting,
    "colours": _colours,
    "position": _position,
    "attribute binding": _attribute_binding,
    UNSEEN: _unseen,
}
