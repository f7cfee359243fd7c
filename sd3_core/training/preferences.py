"""Preferences as data: for a prompt one picture, and another one that it was preferred to.

Three forms, alone or together in one folder:
    chosen/NAME.png, rejected/NAME.png, and NAME.txt (the prompt) beside either
    preferences.jsonl, a line each:  {"prompt": "...", "chosen": "a.png", "rejected": "b.png"}
    the same file in Pick-a-Pic's columns (Kirstain et al. 2023, arXiv:2305.01569):
        {"caption": "...", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 1}
In the file, names are relative to its folder and "weight" may scale a pair's loss; "prompt",
"caption" and "text" mean the same, in this order, and null is as good as nothing.  Lines with "tie"
or "skip", or a label_0 of 0.5, teach nothing and are counted; {"undo": ID} takes back the lines
above whose "id" is ID.
"""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import quoted
from ..plain_text import Decoded, check_whole, decode_text
from ..reading import LARGEST_TEXT, read_regular
from .dataset import Dataset, Item
from .fields import Fields, first_of, flag_of, id_of, read_fields
from .folders import (
    Found,
    Source,
    check_source,
    given_weight,
    list_pictures,
    name_inside,
    told_lines,
)
from .framing import Framing
from .report import (
    Report,
    Skipped,
    by_value,
    counted,
    first_lines,
    joined,
    left_out_told,
    some_names,
    with_wildcards,
)
from .scan import Facts, look_at_all

PREFERENCES = "preferences.jsonl"
PROMPT = ("prompt", "caption", "text")  # columns that may hold the prompt; the first one counts
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
    lines: str = ""  # see folders.Found


@dataclass(frozen=True)
class PairListing:
    pairs: tuple[Listed, ...]
    skipped: tuple[Skipped, ...] = ()
    ties: int = 0
    passed: int = 0  # neither chosen nor rejected: skipped by the person who was asked
    notes: tuple[str, ...] = ()  # of files of text
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # see Report

    def __add__(self, other: "PairListing") -> "PairListing":
        return PairListing(
            self.pairs + other.pairs,
            self.skipped + other.skipped,
            self.ties + other.ties,
            self.passed + other.passed,
            self.notes + other.notes,
            joined([self.left_out, other.left_out]),
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
        lines += left_out_told(self.left_out)
        if self.without_caption:
            lines.append(f"without a prompt: {some_names(self.without_caption)}")
        lines += self.caption_lines()
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
        left_out=listing.left_out,
        without_caption=tuple(one.pair.name for one in used if not one.pair.captions),
        several_lines=by_value({one.pair.name: one.pair.lines for one in used}),
        wildcards=with_wildcards({item.name: item.captions for item in items}),
        notes=(*listing.notes, *(note for one in used for note in one.notes())),
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
        listing = _from_folders(source)
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


def _from_folders(source: Source) -> PairListing:
    """chosen/NAME.png beside rejected/NAME.png, whatever their kinds."""
    folder = source.path
    if not ((folder / CHOSEN).is_dir() and (folder / REJECTED).is_dir()):
        return PairListing(())
    sides = {
        name: list_pictures(Source(folder / name, lines=source.lines))
        for name in (CHOSEN, REJECTED)
    }
    skipped = [
        Skipped(f"{side}/{one.name}", one.reason)
        for side, listing in sides.items()
        for one in listing.skipped
    ]
    whole = {side: {one.name: one for one in sides[side].found} for side in sides}
    stems = {side: _by_stem(found) for side, found in whole.items()}
    pairs = []
    for stem, names in stems[CHOSEN].items():
        others = stems[REJECTED].get(stem, [])
        if len(names) == len(others) == 1:
            pairs.append((stem, names[0], others[0]))
        else:  # a.png beside a.jpg: only the whole name tells which belong together
            pairs += [(name, name, name) for name in names if name in others]
    paired = {CHOSEN: {pair[1] for pair in pairs}, REJECTED: {pair[2] for pair in pairs}}
    for side, other in ((CHOSEN, REJECTED), (REJECTED, CHOSEN)):
        for stem, names in stems[side].items():
            for name in names:
                if name not in paired[side]:
                    skipped.append(_unpaired(side, other, names, name, stems[other].get(stem, [])))
    listed = [_joined(n, whole[CHOSEN][one], whole[REJECTED][two]) for n, one, two in pairs]
    notes = [f"{side}/{note}" for side, listing in sides.items() for note in listing.notes]
    left_out = [
        {reason: tuple(f"{side}/{name}" for name in names)}
        for side, listing in sides.items()
        for reason, names in listing.left_out.items()
    ]
    skipped.sort(key=lambda one: one.name)
    return PairListing(tuple(listed), tuple(skipped), notes=tuple(notes), left_out=joined(left_out))


def _by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault(Path(name).with_suffix("").as_posix(), []).append(name)
    return stems


def _unpaired(side: str, other: str, alike: list[str], name: str, others: list[str]) -> Skipped:
    """Why a picture has no partner."""
    if not others:
        stem = Path(name).with_suffix("").as_posix()
        return Skipped(f"{side}/{stem}", f"there is no picture of this name in {other}/")
    several = [f"{side}/{one}" for one in alike] if len(alike) > 1 else []
    several += [f"{other}/{one}" for one in others]
    return Skipped(
        f"{side}/{name}", f"several pictures have this name ({', '.join(several)}): name them apart"
    )


def _joined(name: str, chosen: Found, rejected: Found) -> Listed:
    told = chosen if chosen.captions else rejected
    captions = (told.captions or ((),))[0]
    sides = (chosen.path, rejected.path)
    return Listed(name, *sides, captions, chosen.weight, chosen.repeats, told.lines)


@dataclass
class _Lines:
    """The lines of a file so far: later ones may take back earlier ones."""

    folder: Path
    said: list[tuple[str | None, Listed | str]] = field(default_factory=list)  # by their ids
    skipped: list[Skipped] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)  # how many lines it is to be told of

    def read(self, fields: Fields, number: int) -> None:
        """Raises ValueError."""
        key, undone = id_of(fields, "id"), id_of(fields, "undo")
        if undone is not None:
            kept = [one for one in self.said if one[0] != undone]
            if len(kept) == len(self.said):
                reason = f"it takes back {quoted(undone)}, which is the id of no line above"
                self.skipped.append(Skipped(f"{PREFERENCES}:{number}", reason))
            self.said = kept
        elif _named(fields, "skip") or flag_of(fields, "has_label") is False:
            self.said.append((key, "skip"))
        elif _named(fields, "tie") or fields.get("label_0") == 0.5:
            self.said.append((key, "tie"))
        else:
            self.said.append((key, self._pair(fields, f"{PREFERENCES}:{number}")))

    def listing(self) -> PairListing:
        said = [one for _, one in self.said]
        pairs = tuple(one for one in said if isinstance(one, Listed))
        ties, passed = said.count("tie"), said.count("skip")
        notes = told_lines(PREFERENCES, self.told)
        return PairListing(pairs, tuple(self.skipped), ties, passed, notes)

    def _pair(self, fields: Fields, name: str) -> Listed:
        column, told = first_of(fields, PROMPT)
        prompt = fields.get(column, "")
        if not isinstance(prompt, str):
            raise ValueError(f"{column} is {quoted(prompt)}; expected text")
        check_whole(prompt, "the prompt")
        self.told.update([told] if told else [])
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


def _named(fields: Fields, verdict: str) -> bool:
    """Whether a line is a tie or was skipped: it lists the pictures, or says true."""
    value = fields.get(verdict)
    return bool(value) if isinstance(value, list) else flag_of(fields, verdict) is True


def _name(fields: Fields, field_name: str) -> str:
    try:
        return name_inside(fields.get(field_name))
    except ValueError as error:
        raise ValueError(str(error).replace("file_name", field_name)) from error


def read_pairs(file: Path) -> PairListing:
    """The pairs that a .jsonl file lists.  Raises ValueError, naming the line.

    A line that is no JSON at all is skipped: a crash may have torn it, and the others still count.
    """
    try:
        data = read_regular(file, LARGEST_TEXT)
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # an editor's
            data = decode_text(data).text.encode()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error}).") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}.") from error
    texts = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    lines, notes = _Lines(file.parent), []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            read = _decoded(text)
            lines.read(read_fields(read.text, '{"prompt", "chosen", "rejected"}'), number)
        except json.JSONDecodeError as error:
            reason = f"the line is no JSON in UTF-8, as if torn ({error})"
            lines.skipped.append(Skipped(f"{PREFERENCES}:{number}", reason))
            continue
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}:{number}: {error}.") from error
        if read.note:
            notes.append(f"{PREFERENCES}:{number} {read.note}")
    listing = lines.listing()
    return replace(listing, notes=(*listing.notes, *notes))


def _decoded(line: bytes) -> Decoded:
    """Raises JSONDecodeError for bytes that are no text."""
    try:
        return decode_text(line)
    except ValueError as error:
        raise json.JSONDecodeError(f"it {error}", "", 0) from error
