"""Fields of a line of JSON, as people, programs and tables write them.

A table that has been through pandas has a value in every column of every line: null, or Python's
NaN, where there was none, true or 1.0 where some lines had none.  So null is as good as absent
everywhere, and a whole number may be written with a point.
"""

import json
from collections.abc import Sequence
from typing import Any

from ..errors import quoted

Fields = dict[str, Any]


def read_fields(line: str, example: str) -> Fields:
    """The fields of a JSON object that are there.

    example: how such a line looks, for the message.  Raises JSONDecodeError (a ValueError) for what
    is no JSON, ValueError for JSON of another kind, and RecursionError.
    """
    value = json.loads(line, parse_constant=_constant)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object such as {example}")
    return {name: one for name, one in value.items() if one is not None}


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def first_of(fields: Fields, names: Sequence[str]) -> tuple[str, str]:
    """Which of these fields is read, the first one that says something; and what is to be told of
    the others, if they say something else."""
    said = {name: fields[name] for name in names if _plain(fields.get(name, "")) not in ("", [])}
    first = next(iter(said), names[0])
    others = [name for name in said if _plain(said[name]) != _plain(said[first])]
    return (
        first,
        f"with something else in {' and '.join(others)}: {first} is read" if others else "",
    )


def _plain(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def flag_of(fields: Fields, name: str) -> bool | None:
    """None where it is absent or "".  Raises ValueError."""
    value = fields.get(name, "")
    if value != "" and value not in (True, False):  # 1.0 is true
        raise ValueError(f"{name} is {quoted(value)}; expected true or false")
    return None if value == "" else bool(value)


def id_of(fields: Fields, name: str) -> str | None:
    """A text or a whole number, as text; None where it is absent or "".  Raises ValueError."""
    value = fields.get(name, "")
    number = whole(value)
    if number is None and not isinstance(value, str):
        raise ValueError(f"{name} is {quoted(value)}; expected a text or a whole number")
    return (value or None) if number is None else str(number)


def whole(value: Any) -> int | None:
    """A whole number, with a point or without; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if value == value // 1 else None
