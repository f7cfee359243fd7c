"""What reading a dataset found, for people (lines, the longest lists cut) and programs (JSON)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 5  # names that a line gives before it counts the rest
LINES = 20  # of one kind, before they are counted; the JSON has all
SEVERAL_LINES = {  # by folders.Source.lines
    "alternatives": 'each an alternative caption (lines = "whole" makes one of them, "first" takes '
    "the first)",
    "first": "of which the first is read",
    "whole": "read as one caption",
}
WILDCARD = re.compile(r"\{[^{}]*\|[^{}]*\}")


@dataclass(frozen=True)
class Skipped:
    """A picture that is not used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Names are those of the pictures, relative to their folder."""

    pictures: int
    draws: int  # pictures times their repeats: an epoch, before its last step is filled up
    buckets: dict[tuple[int, int], int]  # (width, height) -> pictures
    prior: int = 0  # pictures that only keep what the network knows
    prior_draws: int = 0  # their share of the draws
    skipped: tuple[Skipped, ...] = ()
    # by the reason, pictures that lie in the folder and belong to something else; see companions
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    without_caption: tuple[str, ...] = ()  # they are trained with the empty prompt
    several_lines: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by Source.lines
    wildcards: tuple[str, ...] = ()  # {a|b} in a caption, which other trainers draw from
    small: tuple[str, ...] = ()  # enlarged to fill their bucket
    cropped: tuple[str, ...] = ()  # more than a third of the picture lies outside its bucket
    notes: tuple[str, ...] = ()  # of single pictures, such as a colour profile that is damaged
    repeated_folders: dict[str, int] = field(default_factory=dict)  # kohya's 10_name
    exact_duplicates: tuple[tuple[str, ...], ...] = ()  # the same bytes
    near_duplicates: tuple[tuple[str, ...], ...] = ()  # look alike; reported, never removed

    def lines(self) -> list[str]:
        """The report as text."""
        sizes = ", ".join(f"{width}x{height}: {n}" for (width, height), n in self.buckets.items())
        lines = [f"{counted(self.pictures, 'picture')}, {self.draws} draws an epoch; {sizes}"]
        if self.prior:
            share = self.prior_draws / self.draws
            lines.append(
                f"{counted(self.prior, 'picture')} of these keep what the model knows: {share:.0%} "
                "of the draws"
            )
        for folder, repeats in self.repeated_folders.items():
            lines.append(f"{folder}: {repeats} repeats, from the folder's name")
        lines += first_lines([f"skipped {one.name}: {one.reason}" for one in self.skipped])
        lines += left_out_told(self.left_out)
        for names, what in (
            (self.without_caption, "without a caption (trained with the empty prompt)"),
            (self.small, "smaller than the bucket (enlarged)"),
            (self.cropped, "losing more than a third to the crop"),
        ):
            if names:
                lines.append(f"{counted(len(names), 'picture')} {what}: {some_names(names)}")
        lines += self.caption_lines()
        lines += first_lines(list(self.notes))
        lines += first_lines(
            [f"the same file: {some_names(group)}" for group in self.exact_duplicates]
        )
        return lines + first_lines(
            [f"look alike: {some_names(group)}" for group in self.near_duplicates]
        )

    def caption_lines(self) -> list[str]:
        """What is told of captions."""
        lines = lines_told(self.several_lines)
        if self.wildcards:
            lines.append(f"{{a|b}} in captions is learnt as written: {some_names(self.wildcards)}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """The report as plain values; a bucket is spelled "1024x768"."""
        values = asdict(self)
        values["buckets"] = {f"{w}x{h}": count for (w, h), count in self.buckets.items()}
        return values


def lines_told(names: Mapping[str, Sequence[str]]) -> list[str]:
    """What is made of captions of several lines.  names: of their pictures, by Source.lines."""
    return [
        f"{counted(len(some), 'caption')} of several lines, {SEVERAL_LINES[rule]}: "
        f"{some_names(some)}"
        for rule, some in names.items()
    ]


def by_value(values: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The names with each value, but for those with an empty one."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        if value:
            names.setdefault(value, []).append(name)
    return {value: tuple(some) for value, some in names.items()}


def joined(several: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, tuple[str, ...]]:
    """All names of each key."""
    keys = dict.fromkeys(key for one in several for key in one)
    return {key: tuple(name for one in several for name in one.get(key, ())) for key in keys}


def left_out_told(names: Mapping[str, Sequence[str]]) -> list[str]:
    """Which pictures are left out.  names: theirs, by the reason."""
    return [
        f"{counted(len(some), 'picture')} left out, {reason}: {some_names(some)}"
        for reason, some in names.items()
    ]


def with_wildcards(captions: Mapping[str, Sequence[Sequence[str]]]) -> tuple[str, ...]:
    """Names whose captions hold {a|b}.  captions: for each name its sources of alternatives."""
    return tuple(
        name
        for name, sources in captions.items()
        if any(WILDCARD.search(text) for texts in sources for text in texts)
    )


def counted(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def first_lines(lines: list[str]) -> list[str]:
    more = len(lines) - LINES
    return lines if more <= 0 else [*lines[:LINES], f"... and {more} more such lines"]


def some_names(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
