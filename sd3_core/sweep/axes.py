"""What varies: axes, their values from text, and the cells of the grid they span."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import quoted
from ..guidance import check_layers
from ..samplers import SAMPLERS
from ..schedule import SCHEDULERS
from ..text.encoders import ENCODERS, TITLES

MOST_CELLS = 100  # their pictures are held together: at 1024 x 1024 in float32 1.3 GB
ALL, NOTHING = "all", "none"  # of the encoders, or of a network's blocks


@dataclass(frozen=True)
class Kind:
    """How the values of an axis are written."""

    read: Callable[[str], Any]  # raises ValueError for what is none
    expected: str
    example: str


@dataclass(frozen=True)
class Axis:
    """A setting and the values it takes.  name: a key of AXES."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Cell:
    """number: from 1, as the grid is read.  choice: axis -> value."""

    number: int
    choice: Mapping[str, Any]

    @property
    def label(self) -> str:
        return ", ".join(f"{name} {written(value)}" for name, value in self.choice.items())


@dataclass(frozen=True)
class Layout:
    """x runs from left to right, y, where there is one, from top to bottom."""

    x: Axis
    y: Axis | None
    reference: int  # number of the cell that the others are compared with

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (self.x,) if self.y is None else (self.x, self.y)

    @property
    def cells(self) -> tuple[Cell, ...]:
        rows = [{}] if self.y is None else [{self.y.name: value} for value in self.y.values]
        choices = [{self.x.name: value, **row} for row in rows for value in self.x.values]
        return tuple(Cell(number, choice) for number, choice in enumerate(choices, start=1))

    def values_of(self, name: str) -> tuple[Any, ...]:
        """Nothing for a setting that does not vary."""
        return next((axis.values for axis in self.axes if axis.name == name), ())


def lay_out(x: Axis, y: Axis | None = None, reference: int = 1) -> Layout:
    """reference: a cell's number, or 0 for the last.

    Raises ValueError for one axis twice, too many cells, and a reference that is none of them.
    """
    if y is not None and x.name == y.name:
        raise ValueError(f"both axes are {x.name}; choose another for one, or leave y out.")
    number = len(x.values) * (1 if y is None else len(y.values))
    if number > MOST_CELLS:
        raise ValueError(f"{number} cells; {MOST_CELLS} is the most. Give fewer values.")
    if not 0 <= reference <= number:
        raise ValueError(
            f"the reference is cell {reference}; there are the cells 1 to {number}, counted as the "
            "grid is read. 0 is the last."
        )
    return Layout(x, y, reference or number)


def read_axis(name: str, text: str) -> Axis:
    """text: values with commas between; a set is joined by +, as in "clip_l+t5".

    Raises ValueError for an unknown axis, no value, one that is none of the axis, and one twice.
    """
    if name not in AXES:
        raise ValueError(f"the axis is {quoted(name)}; choose one of {', '.join(AXES)}.")
    kind = AXES[name]
    values = []
    for part in text.replace("\n", ",").split(","):
        if not part.strip():
            continue
        try:
            value = kind.read(part.strip())
        except ValueError:
            raise ValueError(
                f"{name}: {quoted(part.strip())} is no value of it; expected {kind.expected}, such "
                f"as {kind.example}."
            ) from None
        if value in values:
            raise ValueError(f"{name}: {written(value)} is there twice; name each value once.")
        values.append(value)
    if not values:
        raise ValueError(f"{name} has no values; write {kind.expected}, such as {kind.example}.")
    return Axis(name, tuple(values))


def written(value: Any) -> str:
    """A value as text that read_axis takes."""
    if isinstance(value, float):
        return f"{value:g}"
    if not isinstance(value, tuple):
        return str(value)
    return ALL if value == ENCODERS else "+".join(map(str, value)) or NOTHING


def check_axes(
    layout: Layout,
    *,
    depth: int,
    encoders: Collection[str],
    loras: bool,
    skip_scale: float,
    skip_layers: Sequence[int],
) -> None:
    """What this model cannot vary, or what would change nothing.

    depth: blocks of the MMDiT.  encoders: those that are there.  loras: whether there is one.
    skip_scale, skip_layers: where they do not vary.
    Raises ValueError.
    """
    scales = layout.values_of("skip_scale") or (skip_scale,)
    blocks = layout.values_of("skip_layers") or (tuple(skip_layers),)
    if any(scales):
        check_layers([layer for some in blocks for layer in some], depth)
    if layout.values_of("skip_layers") and not any(scales):
        raise ValueError("skip_layers changes nothing where skip-layer guidance is off: scale it.")
    if layout.values_of("skip_scale") and not any(blocks):
        raise ValueError("skip_scale changes nothing where no layer is skipped: name some.")
    if layout.values_of("lora_strength") and not loras:
        raise ValueError("lora_strength changes nothing without a LoRA: load one.")
    for use in layout.values_of("encoders"):
        missing = [name for name in use if name not in encoders]
        if missing:
            raise ValueError(
                f"encoders {written(use)}: {', '.join(TITLES[name] for name in missing)} is not "
                f"loaded. Load it, or use what there is: {'+'.join(encoders) or 'none'}."
            )


def by_strength(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells of one state of the weights together."""
    groups: dict[object, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.choice.get("lora_strength"), []).append(cell)
    return list(groups.values())


# Values


def whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return read


def number(low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError
        return value

    return read


def one_of(names: Collection[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError
        return text

    return read


def encoder_set(text: str) -> tuple[str, ...]:
    if text.lower() in (ALL, NOTHING):
        return ENCODERS if text.lower() == ALL else ()
    names = [name.strip().lower() for name in text.split("+")]
    if not set(names) <= set(ENCODERS):
        raise ValueError
    return tuple(name for name in ENCODERS if name in names)


def block_set(text: str) -> tuple[int, ...]:
    if text.lower() == NOTHING:
        return ()
    return tuple(sorted({whole(0, 999)(block) for block in text.split("+")}))


def names_kind(names: Collection[str]) -> Kind:
    return Kind(one_of(names), f"names out of {', '.join(names)}", ", ".join(list(names)[:2]))


AXES: dict[str, Kind] = {
    "steps": Kind(whole(1, 10_000), "whole numbers from 1", "10, 20, 40"),
    "cfg": Kind(number(0, 100), "numbers from 0 to 100", "1, 3, 4.5"),
    "shift": Kind(number(0.01, 100), "numbers from 0.01 to 100", "1, 3, 6"),
    "sampler": names_kind(SAMPLERS),
    "scheduler": names_kind(SCHEDULERS),
    "seed": Kind(whole(0, 2**64 - 1), "whole numbers from 0", "1, 2, 3"),
    "encoders": Kind(
        encoder_set,
        f"sets of {', '.join(ENCODERS)} joined by +, {ALL} or {NOTHING}",
        "all, clip_l+clip_g, t5",
    ),
    "skip_scale": Kind(number(-100, 100), "numbers, 0 for off", "0, 1, 2.5"),
    "skip_layers": Kind(block_set, "sets of blocks joined by +, counted from 0", "7+8+9, 7"),
    "lora_strength": Kind(number(-100, 100), "numbers, 0 for the model alone", "0, 0.5, 1"),
}
