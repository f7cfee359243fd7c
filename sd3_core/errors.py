"""The three ways things end badly that a caller may want to tell apart."""

from collections.abc import Callable

LONGEST_ECHO = 120  # characters of a given value that a message repeats


class CheckpointError(ValueError):
    """A file cannot be used as asked: names the file, what it looks like and what to do."""


class NumericalError(ArithmeticError):
    """A stage produced NaN or infinity: names the stage and what to do."""


class OutOfMemory(MemoryError):
    """A stage does not fit into the memory there is: names the stage and what to do."""


def cut(value: object, most: int = LONGEST_ECHO) -> str:
    """What was given, as a message repeats it: on one line and of at most `most` characters."""
    return _short(str, value, most)


def quoted(value: object) -> str:
    """As cut, of Python's own spelling: text stands in quotes."""
    return _short(repr, value, LONGEST_ECHO)


def _short(spell: Callable[[object], str], value: object, most: int) -> str:
    try:
        text = " ".join(spell(value)[: 4 * most].split())
    except ValueError:  # Python does not spell numbers of more than 4,300 digits
        return "a number of thousands of digits"
    except RecursionError:
        return "something nested without end"
    return text if len(text) <= most else text[: most - 3] + "..."
