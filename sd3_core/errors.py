"""The two ways things end badly that a caller may want to tell apart."""

LONGEST_ECHO = 120  # characters of a given value that a message repeats


class CheckpointError(ValueError):
    """A file cannot be used as asked: names the file, what it looks like and what to do."""


class NumericalError(ArithmeticError):
    """A stage produced NaN or infinity: names the stage and what to do."""


def cut(value: object, most: int = LONGEST_ECHO) -> str:
    """What was given, as a message repeats it: on one line and of at most `most` characters."""
    text = " ".join(str(value)[: 4 * most].split())
    return text if len(text) <= most else text[: most - 3] + "..."


def quoted(value: object) -> str:
    """As cut, of Python's own spelling: text stands in quotes."""
    try:
        return cut(repr(value))
    except ValueError:  # Python does not spell numbers of more than 4,300 digits
        return "a number of thousands of digits"
