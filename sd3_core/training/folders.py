"""A folder of pictures and what is said about each: captions, repeats, weight, bucket.

Captions lie beside the pictures or in metadata.jsonl, one object a line, in the same folder or one
above: {"file_name": "cats/1.png", "text": "...", "captions": ["...", ...], "synthetic": "..." or
[...], "weight": 1.0, "bucket": [width, height]}; only file_name is needed, null is as good as
nothing, other fields are left alone.  "caption" or "prompt" may stand for "text"; the first of the
three that says something is read, and it is told where another one says something else.  Without
captions there, NAME.txt (or NAME.caption, or NAME.png.txt) and NAME.synthetic.txt are read: each
line is an alternative, unless the source says otherwise.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..decode import EXTENSIONS
from ..errors import quoted
from ..plain_text import check_whole, decode_text
from ..reading import LARGEST_TEXT, read_regular, reason
from .companions import Companions, visible_folders
from .fields import Fields, first_of, read_fields, whole
from .report import Skipped, by_value, counted

METADATA = "metadata.jsonl"
CAPTION = ("text", "caption", "prompt")  # columns that may hold the caption; the first one counts
# Pictures too, but of kinds that Pillow alone does not decode.
FOREIGN = (".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".nef", ".arw")
LINES = ("alternatives", "first", "whole")  # see Source
REPEATED = re.compile(r"(\d{1,3})_(.+)")  # kohya's `10_name`; `2024_trip` is just a name
LONGEST_CAPTIONS = 2**20  # bytes of a caption file

Notes = list[tuple[Path, str]]  # what is to be told of files of text


@dataclass(frozen=True)
class Source:
    """A folder to train on, with all folders in it where `subfolders` says so.

    repeats: how often an epoch shows each picture, on top of the repeats in kohya's folder names.
    weight: factor of its pictures' loss.
    prior: nothing is learnt from these pictures: on them a LoRA is held to what the network answers
        without it (prior preservation; see flow.FlowTask).
    caption: of a picture that has none.
    caption_extension: NAME + this holds the captions, such as ".txt"; else .txt, then .caption.
    lines: what several lines of a caption's file are: each an alternative, or the first one alone
        is read, or all of them are one caption.
    """

    path: Path
    repeats: int = 1
    weight: float = 1.0
    prior: bool = False
    subfolders: bool = True
    caption: str = ""
    caption_extension: str = ""
    lines: str = "alternatives"  # of LINES


@dataclass(frozen=True)
class Row:
    """A line of metadata.jsonl."""

    captions: tuple[str, ...] = ()
    synthetic: tuple[str, ...] = ()
    weight: float = 1.0
    bucket: tuple[int, int] | None = None
    line: str = ""  # file:number, for messages
    told: str = ""  # what is worth a note, the same words for every line of its kind


@dataclass(frozen=True)
class Found:
    """A picture's file that has not been opened yet."""

    path: Path
    name: str  # for messages: relative to its source
    captions: tuple[tuple[str, ...], ...]  # for each source of captions its alternatives; or none
    repeats: int
    row: Row
    weight: float
    prior: bool = False  # see Source
    lines: str = ""  # Source.lines, where a file of captions has several


@dataclass(frozen=True)
class Listing:
    found: tuple[Found, ...]
    skipped: tuple[Skipped, ...]
    repeated_folders: dict[str, int]
    notes: tuple[str, ...] = ()  # of files of text
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # see Report


def list_pictures(source: Source, prefix: str = "") -> Listing:
    """The pictures of a source in the order of their names, opened by nobody yet.

    prefix: set before the names.
    Raises ValueError for a source that is no folder, for repeats and weights that make no sense,
    and for a metadata.jsonl that cannot be followed, naming its line.
    """
    check_source(source)
    skipped: list[Skipped] = []
    notes_of_text: Notes = []
    left: dict[Path, str] = {}  # why they are left out
    folders = list(visible_folders(source.path, skipped, left))
    folders = folders if source.subfolders else folders[:1]
    companions = Companions(source.path, folders)
    rows: dict[Path, Row] = {}
    notes: list[str] = []
    for folder, names in folders:
        if METADATA in names:
            own = _read_metadata(folder, notes_of_text)
            file = prefix + (folder / METADATA).relative_to(source.path).as_posix()
            notes += told_lines(file, Counter(row.told for row in own.values() if row.told))
            rows.update(own)
    repeated: dict[str, int] = {}
    found: list[Found] = []
    for path in (folder / name for folder, names in folders for name in names):
        inside = path.relative_to(source.path)
        shown = prefix + inside.as_posix()
        match = REPEATED.fullmatch(inside.parts[0]) if len(inside.parts) > 1 else None
        repeats, fallback = (int(match[1]), match[2]) if match else (1, source.caption)
        if match:
            repeated[prefix + match[0]] = repeats
        if path.suffix.lower() in FOREIGN:
            skipped.append(Skipped(shown, "this kind is not read; convert it to PNG or JPEG"))
        if path.suffix.lower() not in EXTENSIONS or not repeats:
            continue
        row = rows.pop(path, Row())
        try:
            captions, several = _captions(path, row, source, notes_of_text)
        except ValueError as error:
            skipped.append(Skipped(shown, str(error)))
            continue
        if not row.line and (reason := companions.reason(path, bool(captions))):
            left[path] = reason
            continue
        captions = captions or (((fallback,),) if fallback else ())
        times, weight = repeats * source.repeats, row.weight * source.weight
        lines = source.lines if several else ""
        found.append(Found(path, shown, captions, times, row, weight, source.prior, lines))
    for path, row in rows.items():
        shown = prefix + path.relative_to(source.path).as_posix()
        skipped.append(Skipped(shown, f"{row.line} names it, but no such picture is used"))
    notes += [
        f"{prefix}{path.relative_to(source.path).as_posix()} {note}" for path, note in notes_of_text
    ]
    reasons = {prefix + path.relative_to(source.path).as_posix(): left[path] for path in left}
    return Listing(tuple(found), tuple(skipped), repeated, tuple(notes), by_value(reasons))


def check_source(source: Source) -> None:
    if not source.path.is_dir():
        what = "is a file" if source.path.exists() else "is not there"
        raise ValueError(f"{source.path}: {what}; name a folder of pictures.")
    if source.repeats < 1:
        raise ValueError(f"{source.path}: repeats is {source.repeats}; it must be at least 1.")
    extension = source.caption_extension
    if extension != os.path.basename(extension) or "\\" in extension or "\0" in extension:
        raise ValueError(
            f"{source.path}: caption_extension is {quoted(extension)}; expected the end of a name, "
            "such as .txt."
        )
    if not (math.isfinite(source.weight) and source.weight > 0):
        raise ValueError(f"{source.path}: weight is {source.weight}; it must be above 0.")
    if source.lines not in LINES:
        known = ", ".join(LINES)
        raise ValueError(
            f"{source.path}: lines is {quoted(source.lines)}; expected one of {known}."
        )


def check_apart(sources: Sequence[Source]) -> None:
    """Raises ValueError where one folder, resolved, lies in another: its pictures would be both."""
    deep = [source.path.resolve() for source in sources if source.subfolders]
    for inner in (source.path.resolve() for source in sources):
        if outer := next((folder for folder in deep if folder in inner.parents), None):
            raise ValueError(
                f"{inner}: lies in {outer}, which is given, too, and takes all folders in it. Put "
                "them side by side, or give that one subfolders = false."
            )


def check_held(learnt: Sequence[Source], held: Sequence[Source]) -> None:
    """Raises ValueError where it would be measured on what is learnt from, as if it were not."""
    known = {source.path.resolve() for source in learnt if not source.prior}
    if both := next((one.path for one in held if one.path.resolve() in known), None):
        raise ValueError(
            f"{both}: is learnt from, and given as validation, which is measured on other pictures."
            " Name others; without any it is measured on those that are learnt from, and says so."
        )


def _captions(
    path: Path, row: Row, source: Source, notes: Notes
) -> tuple[tuple[tuple[str, ...], ...], bool]:
    """For each source of captions its alternatives; and whether a file had several lines."""
    names = [f"{path.stem}.txt", f"{path.stem}.caption", f"{path.name}.txt"]
    if source.caption_extension:
        names = [f"{path.stem}{source.caption_extension}"]
    original: tuple[str, ...] = ()
    for name in names if not row.captions else ():
        original = original or _lines(path.with_name(name), notes)
    synthetic = _lines(path.with_suffix(".synthetic.txt"), notes) if not row.synthetic else ()
    taken = (_taken(original, source.lines), _taken(synthetic, source.lines))
    captions = (row.captions or taken[0], row.synthetic or taken[1])
    several = len(original) > 1 or len(synthetic) > 1
    return tuple(some for some in captions if some), several


def _taken(lines: tuple[str, ...], rule: str) -> tuple[str, ...]:
    if rule == "whole":
        return ("\n".join(lines),) if lines else ()
    return lines[:1] if rule == "first" else lines


def _lines(path: Path, notes: Notes) -> tuple[str, ...]:
    """The lines of a text file that are not empty; none when there is no file."""
    try:
        data = read_regular(path, LONGEST_CAPTIONS)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ValueError(f"{path.name} is no caption ({reason(error)})") from error
    try:
        read = decode_text(data)
    except ValueError as error:
        raise ValueError(f"{path.name} {error}") from error
    if read.note:
        notes.append((path, read.note))
    return _texts(lines_of(read.text))


def lines_of(text: str) -> list[str]:
    """Parted where an editor begins a new line; str.splitlines() parts at U+2028 and others, too,
    which captions may hold."""
    return text.replace("\r\n", "\n").split("\n")


def _texts(lines: list[str]) -> tuple[str, ...]:
    return tuple(stripped for line in lines if (stripped := line.strip()))


def _read_metadata(folder: Path, notes: Notes) -> dict[Path, Row]:
    file = folder / METADATA
    try:
        read = decode_text(read_regular(file, LARGEST_TEXT))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({reason(error)}).") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}.") from error
    lines = lines_of(read.text)
    if read.note:
        notes.append((file, read.note))
    rows: dict[Path, Row] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            path, row = _row(line, folder, f"{METADATA}:{number}")
            if path in rows:
                raise ValueError(f"{rows[path].line} has this file_name already: merge the lines")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}:{number}: {error}.") from error
        rows[path] = row
    return rows


def told_lines(file: str, told: Mapping[str, int]) -> tuple[str, ...]:
    """Notes on a file of lines: what is to be told, and of how many of them."""
    return tuple(f"{file}: {counted(times, 'line')} {what}" for what, times in told.items())


def _row(text: str, folder: Path, line: str) -> tuple[Path, Row]:
    try:
        fields = read_fields(text, '{"file_name": "1.png", "text": "a cat"}')
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg} at character {error.colno})") from error
    column, told = first_of(fields, CAPTION)
    row = Row(
        captions=_strings(fields, column) + _strings(fields, "captions"),
        synthetic=_strings(fields, "synthetic"),
        weight=given_weight(fields.get("weight", 1.0)),
        bucket=_bucket(fields.get("bucket")),
        line=line,
        told=told,
    )
    return folder / name_inside(fields.get("file_name")), row


def name_inside(name: object) -> str:
    """The name, if it leads nowhere but into its folder, whatever the system it is read on."""
    if not isinstance(name, str) or not name:
        raise ValueError("file_name is missing; expected the name of a picture")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # halves that stand for no byte
        check_whole(name, "file_name")
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.anchor or ".." in path.parts:
            raise ValueError(
                f"file_name {quoted(name)} leads out of its folder; give a name inside it"
            )
    return name


def _strings(fields: Fields, name: str) -> tuple[str, ...]:
    value = fields.get(name, [])
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list):
        texts = [text for text in texts if text is not None]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is {quoted(value)}; expected a text or a list of texts")
    for text in texts:
        check_whole(text, name)
    return _texts(texts)


def given_weight(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value < 1e6):
        raise ValueError(f"weight is {quoted(value)}; expected a number above 0, below a million")
    return float(value)


def _bucket(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    sides = [whole(side) for side in value] if isinstance(value, list) else []
    if len(sides) != 2 or sides[0] is None or sides[1] is None:
        raise ValueError(f"bucket is {quoted(value)}; expected [width, height] in pixels")
    return sides[0], sides[1]
