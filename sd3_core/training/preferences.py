"""Preferences as data: for a prompt one picture, and another one that it was preferred to.

Three forms, alone or together in one folder:
    chosen/NAME.png, rejected/NAME.png, and NAME.txt (the prompt) beside either
    preferences.jsonl, a line each:  {"prompt": "...", "chosen": "a.png", "rejected": "b.png"}
    the same file in Pick-a-Pic's columns (Kirstain et al. 2023, arXiv:2305.01569):
        {"caption": "...", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 1}
In the file, names are relative to its folder and "weight" may scale a pair's loss.  Lines with
"tie" or "skip", or a label_0 of 0.5, teach nothing and are counted; {"undo": ID} takes back the
line whose "id" is ID.
"""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import quoted
from ..reading import LARGEST_TEXT, read_regular
from .dataset import Dataset, Item
from .folders import Found, Source, check_source, given_weight, list_pictures, name_inside
from .framing import Framing
from .report import Report, Skipped, counted, first_lines, some_names
from .scan import Facts, look_at_all

PREFERENCES = "preferences.jsonl"
CHOSEN, REJECTED = "chosen", "rejected"
SAME_ASPECT = 0.02  # relative difference of two aspects that counts as none
MOSTLY = 0.5  # part of the pairs from which their two sides look like two sources


@dataclass(frozen=True)
class Listed:
    """A pair whose files have not been opened yet."""

    name: str  # for people
    chosen: Path
    rejected: Path
    captions: tuple[str, ...]  # alternatives; none: the empty prompt
    weight: float = 1.0
    repeats: int = 1


@dataclass(frozen=True)
class PairListing:
    pairs: tuple[Listed, ...]
    skipped: tuple[Skipped, ...] = ()
    ties: int = 0
    passed: int = 0  # neither chosen nor rejected: skipped by the person who was asked

    def __add__(self, other: "PairListing") -> "PairListing":
        return PairListing(
            self.pairs + other.pairs,
            self.skipped + other.skipped,
            self.ties + other.ties,
            self.passed + other.passed,
        )


@dataclass(frozen=True)
class PairReport(Report):
    """What reading preferences found; `pictures` and `draws` count pairs."""

    ties: int = 0
    passed: int = 0
    mixed: tuple[str, ...] = ()  # the two pictures have different aspects
    foreign: tuple[str, ...] = ()  # they differ in size or kind of file

    def lines(self) -> list[str]:
        sizes = ", ".join(f"{width}x{height}: {n}" for (width, height), n in self.buckets.items())
        lines = [f"{counted(self.pictures, 'pair')}, {self.draws} draws an epoch; {sizes}"]
        if self.ties:
            lines.append(f"{counted(self.ties, 'tie')} left out: they say nothing")
        lines += first_lines([f"skipped {one.name}: {one.reason}" for one in self.skipped])
        if self.without_caption:
            lines.append(f"without a prompt: {some_names(self.without_caption)}")
        if self.mixed:
            lines.append(
                f"{counted(len(self.mixed), 'pair')} of different aspects, both cut to the chosen "
                f"one's: {some_names(self.mixed)}"
            )
        if len(self.foreign) > MOSTLY * self.pictures:
            lines.append(
                f"in {len(self.foreign)} of {self.pictures} pairs the two pictures differ in size "
                "or kind of file, as if one side came from elsewhere: DPO then learns to tell the "
                "sources apart. Draw both sides with the model that is trained"
            )
        return lines + first_lines(list(self.notes))


def read_preferences(
    sources: Sequence[Source],
    *,
    framing: Framing,
    memory: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """A dataset whose items are the chosen pictures, each with its rejected one as `loser`.

    Both pictures of a pair are cut alike and trained in the bucket that suits the chosen one.
    memory, on_progress: see look_at_all.  Pairs that cannot be used are skipped and listed in the
    report.  Raises ValueError for a file that cannot be followed, and when no pair is left.
    """
    listing = PairListing(())
    for source in sources:
        listing += list_pairs(source, f"{source.path.as_posix()}/" if len(sources) > 1 else "")
    paths = list(
        dict.fromkeys(path for one in listing.pairs for path in (one.chosen, one.rejected))
    )
    looks = dict(zip(paths, look_at_all(paths, memory, on_progress), strict=True))
    skipped, used = list(listing.skipped), []
    for pair in listing.pairs:
        sides = looks[pair.chosen], looks[pair.rejected]
        if fault := _fault(pair, *sides):
            skipped.append(Skipped(pair.name, fault))
        else:
            used.append(_Used(pair, *sides, framing))
    if not used:
        raise ValueError(_nothing_left(sources, skipped, listing.ties))
    items = tuple(one.item() for one in used)
    report = PairReport(
        pictures=len(items),
        draws=sum(item.repeats for item in items),
        buckets=dict(sorted(Counter(item.bucket for item in items).items())),
        skipped=tuple(skipped),
        without_caption=tuple(one.pair.name for one in used if not one.pair.captions),
        notes=tuple(note for one in used for note in one.notes()),
        ties=listing.ties,
        passed=listing.passed,
        mixed=tuple(one.pair.name for one in used if one.mixed),
        foreign=tuple(one.pair.name for one in used if one.foreign),
    )
    return Dataset(items, report)


@dataclass(frozen=True)
class _Used:
    """A pair on its way to an item."""

    pair: Listed
    chosen: Facts
    rejected: Facts
    framing: Framing

    def item(self) -> Item:
        pair, owner = self.pair, self.chosen.digest
        picture = self.framing.frame(pair.chosen, self.chosen, None, owner)
        other = self.framing.frame(pair.rejected, self.rejected, picture.bucket, owner)
        captions = (pair.captions or ("",),)
        winner = Item(pair.name, picture, picture.bucket, captions, pair.repeats, pair.weight)
        return replace(winner, loser=replace(winner, picture=other))

    @property
    def mixed(self) -> bool:
        one = self.chosen.width * self.rejected.height
        other = self.rejected.width * self.chosen.height
        return abs(one - other) > SAME_ASPECT * max(one, other)

    @property
    def foreign(self) -> bool:
        sizes = [(facts.width, facts.height) for facts in (self.chosen, self.rejected)]
        kinds = [path.suffix.lower() for path in (self.pair.chosen, self.pair.rejected)]
        return sizes[0] != sizes[1] or kinds[0] != kinds[1]

    def notes(self) -> Iterator[str]:
        for path, facts in ((self.pair.chosen, self.chosen), (self.pair.rejected, self.rejected)):
            if facts.note:
                yield f"{path.name}: {facts.note}"


def _fault(pair: Listed, chosen: Facts, rejected: Facts) -> str:
    """Why a pair cannot be used; empty when it can."""
    for path, facts in ((pair.chosen, chosen), (pair.rejected, rejected)):
        if facts.fault:
            return f"{path.name}: {facts.fault}"
    return "both sides are the same picture" if chosen.digest == rejected.digest else ""


def _nothing_left(sources: Sequence[Source], skipped: Sequence[Skipped], ties: int) -> str:
    places = ", ".join(str(source.path) for source in sources) or "no folder given"
    if skipped:
        first = f"; {skipped[0].name}: {skipped[0].reason}"
        return f"{places}: none of {len(skipped)} pairs can be used{first}."
    if ties:
        return f"{places}: holds {counted(ties, 'tie')} and no preference; pick some winners."
    return (
        f"{places}: holds no pairs. Expected {CHOSEN}/NAME.png and {REJECTED}/NAME.png, or "
        f"{PREFERENCES} with prompt, chosen and rejected on each line."
    )


# Where pairs are listed


def list_pairs(source: Source, prefix: str = "") -> PairListing:
    """The pairs of a folder, or of one .jsonl file; their pictures are not opened yet.

    prefix: set before the names.  Raises ValueError for a source that is neither, and for a line
    that cannot be followed, naming it.
    """
    if source.path.suffix.lower() == ".jsonl" and source.path.is_file():
        listing = read_pairs(source.path)
    else:
        check_source(source)
        listing = _from_folders(source.path)
        if (source.path / PREFERENCES).exists():
            listing += read_pairs(source.path / PREFERENCES)
    pairs = [
        replace(
            pair,
            name=prefix + pair.name,
            weight=pair.weight * source.weight,
            repeats=pair.repeats * source.repeats,
        )
        for pair in listing.pairs
    ]
    return replace(listing, pairs=tuple(pairs))


def _from_folders(folder: Path) -> PairListing:
    """chosen/NAME.png beside rejected/NAME.png, whatever their kinds."""
    if not ((folder / CHOSEN).is_dir() and (folder / REJECTED).is_dir()):
        return PairListing(())
    sides = {name: list_pictures(Source(folder / name)) for name in (CHOSEN, REJECTED)}
    by_name = {
        side: {Path(found.name).with_suffix("").as_posix(): found for found in listing.found}
        for side, listing in sides.items()
    }
    skipped = [
        Skipped(f"{side}/{one.name}", one.reason)
        for side, listing in sides.items()
        for one in listing.skipped
    ]
    for side, other in ((CHOSEN, REJECTED), (REJECTED, CHOSEN)):
        for name in by_name[side].keys() - by_name[other].keys():
            reason = f"there is no picture of this name in {other}/"
            skipped.append(Skipped(f"{side}/{name}", reason))
    pairs = [
        _joined(name, chosen, by_name[REJECTED][name])
        for name, chosen in by_name[CHOSEN].items()
        if name in by_name[REJECTED]
    ]
    return PairListing(tuple(pairs), tuple(sorted(skipped, key=lambda one: one.name)))


def _joined(name: str, chosen: Found, rejected: Found) -> Listed:
    captions = (chosen.captions or rejected.captions or ((),))[0]
    return Listed(name, chosen.path, rejected.path, captions, chosen.weight, chosen.repeats)


@dataclass
class _Lines:
    """The lines of a file so far: later ones may take back earlier ones."""

    folder: Path
    pairs: dict[str, Listed] = field(default_factory=dict)  # by id, or by line
    ties: set[str] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)

    def read(self, fields: Any, number: int) -> None:
        """Raises ValueError."""
        if not isinstance(fields, dict):
            raise ValueError('expected an object such as {"prompt", "chosen", "rejected"}')
        key = str(fields.get("id", f"line {number}"))
        if "undo" in fields:
            self.forget(str(fields["undo"]))
        elif "skip" in fields or fields.get("has_label") is False:
            self.passed.add(key)
        elif "tie" in fields or fields.get("label_0") == 0.5:
            self.ties.add(key)
        else:
            self.pairs[key] = self._pair(fields, f"{PREFERENCES}:{number}")

    def forget(self, key: str) -> None:
        self.pairs.pop(key, None)
        self.ties.discard(key)
        self.passed.discard(key)

    def _pair(self, fields: dict[str, Any], name: str) -> Listed:
        prompt = fields.get("prompt", fields.get("caption", ""))
        if not isinstance(prompt, str):
            raise ValueError(f"prompt is {quoted(prompt)}; expected text")
        if "label_0" in fields:
            first, second = _name(fields, "jpg_0"), _name(fields, "jpg_1")
            if fields["label_0"] not in (0, 1):
                raise ValueError(f"label_0 is {quoted(fields['label_0'])}; expected 0, 1 or 0.5")
            chosen, rejected = (first, second) if fields["label_0"] == 1 else (second, first)
        else:
            chosen, rejected = _name(fields, CHOSEN), _name(fields, REJECTED)
        captions = (prompt.strip(),) if prompt.strip() else ()
        weight = given_weight(fields.get("weight", 1.0))
        return Listed(name, self.folder / chosen, self.folder / rejected, captions, weight)


def _name(fields: dict[str, Any], field_name: str) -> str:
    try:
        return name_inside(fields.get(field_name))
    except ValueError as error:
        raise ValueError(str(error).replace("file_name", field_name)) from error


def read_pairs(file: Path) -> PairListing:
    """The pairs that a .jsonl file lists.  Raises ValueError, naming the line.

    A line that is no JSON at all is skipped: a crash may have torn it, and the others still count.
    """
    try:
        texts = read_regular(file, LARGEST_TEXT).removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error}).") from error
    lines, skipped = _Lines(file.parent), []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            fields = json.loads(text.decode())
        except ValueError as error:
            reason = f"the line is no JSON in UTF-8, as if torn ({error})"
            skipped.append(Skipped(f"{PREFERENCES}:{number}", reason))
            continue
        except RecursionError as error:
            raise ValueError(f"{file}:{number}: {error}.") from error
        try:
            lines.read(fields, number)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}.") from error
    pairs = tuple(lines.pairs.values())
    return PairListing(pairs, tuple(skipped), len(lines.ties), len(lines.passed))
