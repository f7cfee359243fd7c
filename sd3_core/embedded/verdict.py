"""What is seen in a picture against what was asked for, attribute by attribute."""

from collections import Counter
from dataclasses import dataclass, fields
from itertools import permutations

from .checker import Reading, Seen
from .world import MOST_THINGS, Group, Request, is_at, stands


@dataclass(frozen=True)
class Verdict:
    """None: not asked for.  A picture is right when nothing that was asked for is wrong."""

    count: bool  # as many things as asked for, not one more
    shape: bool  # those shapes, whatever their colours
    colour: bool | None  # those colours, on whatever shapes
    binding: bool | None  # each colour on its own shape; asked for as soon as two kinds are
    size: bool | None
    position: bool | None
    relation: bool | None
    ground: bool | None
    text: bool | None

    @property
    def right(self) -> bool:
        return all(getattr(self, field.name) is not False for field in fields(self))

    def wrong(self) -> tuple[str, ...]:
        """The attributes that are not as asked for."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is False)


def judge(reading: Reading, request: Request) -> Verdict:
    """Compares them under the assignment of things to groups that agrees best.

    Things are told apart by colour and shape before anything else: when the wrong one stands left,
    the relation is wrong and not the colours.
    """
    asked = [group for group in request.groups for _ in range(group.count)]
    seen = sorted(reading.things, key=lambda one: -one.radius)[: MOST_THINGS + 1]
    count = len(reading.things) == len(asked)
    verdicts = [
        _judge_assigned(reading, request, asked, list(order), count)
        for order in permutations([*seen, *[None] * (len(asked) - len(seen))], len(asked))
    ]
    return max(verdicts, key=lambda verdict: (verdict.binding is not False, -len(verdict.wrong())))


def sentence(reading: Reading, request: Request) -> str:
    """What is seen and whether it was asked for, as "seen: 2 red circle on white; as asked."."""
    wrong = judge(reading, request).wrong()
    rest = "as asked" if not wrong else f"not as asked: {', '.join(wrong)}"
    return f"seen: {described(reading)}; {rest}."


def described(reading: Reading) -> str:
    """A picture's things in words, equal ones counted."""
    kinds = Counter(
        f'word "{one.text}" in {one.colour or "mixed colours"}'
        if one.text
        else f"{one.colour or 'mixed'} {one.shape or 'shape of no kind'}"
        for one in reading.things
    )
    things = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing"
    return f"{things} on {reading.ground}"


def satisfies(reading: Reading, request: Request) -> bool:
    """Whether the picture shows exactly what was asked for."""
    return judge(reading, request).right


def _judge_assigned(
    reading: Reading,
    request: Request,
    asked: list[Group],
    things: list[Seen | None],
    count: bool,
) -> Verdict:
    pairs = list(zip(asked, things, strict=True))
    kinds = {(group.shape, group.colour) for group in asked}

    def agree(name: str) -> bool | None:
        some = [(getattr(group, name), one) for group, one in pairs if getattr(group, name)]
        return all(one and getattr(one, name) == value for value, one in some) if some else None

    bound = all(
        one and one.shape == group.shape and group.colour in (None, one.colour)
        for group, one in pairs
    )
    places = [(group.position, one) for group, one in pairs if group.position]
    return Verdict(
        count=count,
        shape=_same_many([group.shape for group in asked], [one and one.shape for one in things]),
        colour=_same_many(
            [group.colour for group in asked if group.colour],
            [one and one.colour for group, one in pairs if group.colour],
        )
        if any(group.colour for group in asked)
        else None,
        binding=bound if len(kinds) > 1 else None,
        size=agree("size"),
        position=all(
            one and is_at(place, one.x, one.y, reading.width, reading.height)
            for place, one in places
        )
        if places
        else None,
        relation=_related(request, things) if request.relation else None,
        ground=reading.ground == request.ground if request.ground else None,
        text=agree("text"),
    )


def _same_many(asked: list[str], seen: list[str | None]) -> bool:
    return sorted(asked) == sorted(one or "" for one in seen)


def _related(request: Request, things: list[Seen | None]) -> bool:
    found = [one for one in things if one]
    if len(found) < len(things) or not request.relation:
        return False
    points = [(one.x, one.y) for one in found]
    first = request.groups[0].count
    return stands(request.relation, points[:first], points[first:])
