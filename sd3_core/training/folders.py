"""A folder of pictures and what is said about each: captions, repeats, weight, bucket.

Captions lie beside the pictures or in metadata.jsonl, one object a line, in the same folder or one
above: {"file_name": "cats/1.png", "text": "...", "captions": ["...", ...], "synthetic": "..." or
[...], "weight": 1.0, "bucket": [width, height]}; only file_name is needed, other fields are left
alone.  Without captions there, NAME.txt (or NAME.caption, or NAME.png.txt) and NAME.synthetic.txt
are read: each line is an alternative.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..decode import EXTENSIONS
from ..errors import quoted
from ..reading import LARGEST_TEXT, read_regular, reason
from .report import Skipped

METADATA = "metadata.jsonl"
# Pictures too, but of kinds that Pillow alone does not decode.
FOREIGN = (".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".nef", ".arw")
REPEATED = re.compile(r"(\d{1,3})_(.+)")  # kohya's `10_name`; `2024_trip` is just a name
LONGEST_CAPTIONS = 2**20  # bytes of a caption file


@dataclass(frozen=True)
class Source:
    """A folder to train on, with all folders in it.

    repeats: how often an epoch shows each picture, on top of the repeats in kohya's folder names.
    weight: factor of its pictures' loss.
    prior: nothing is learnt from these pictures: on them a LoRA is held to what the network answers
        without it (prior preservation; see flow.FlowTask).
    """

    path: Path
    repeats: int = 1
    weight: float = 1.0
    prior: bool = False


@dataclass(frozen=True)
class Row:
    """A line of metadata.jsonl."""

    captions: tuple[str, ...] = ()
    synthetic: tuple[str, ...] = ()
    weight: float = 1.0
    bucket: tuple[int, int] | None = None
    line: str = ""  # file:number, for messages


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


@dataclass(frozen=True)
class Listing:
    found: tuple[Found, ...]
    skipped: tuple[Skipped, ...]
    repeated_folders: dict[str, int]


def list_pictures(source: Source, prefix: str = "") -> Listing:
    """The pictures of a source in the order of their names, opened by nobody yet.

    prefix: set before the names.
    Raises ValueError for a source that is no folder, for repeats and weights that make no sense,
    and for a metadata.jsonl that cannot be followed, naming its line.
    """
    check_source(source)
    skipped: list[Skipped] = []
    folders = list(_folders(source.path, skipped))
    rows: dict[Path, Row] = {}
    for folder, names in folders:
        if METADATA in names:
            rows.update(_read_metadata(folder))
    repeated: dict[str, int] = {}
    found: list[Found] = []
    for path in (folder / name for folder, names in folders for name in names):
        inside = path.relative_to(source.path)
        shown = prefix + inside.as_posix()
        match = REPEATED.fullmatch(inside.parts[0]) if len(inside.parts) > 1 else None
        repeats, fallback = (int(match[1]), match[2]) if match else (1, "")
        if match:
            repeated[prefix + match[0]] = repeats
        if path.suffix.lower() in FOREIGN:
            skipped.append(Skipped(shown, "this kind is not read; convert it to PNG or JPEG"))
        if path.suffix.lower() not in EXTENSIONS or not repeats:
            continue
        row = rows.pop(path, Row())
        try:
            captions = _captions(path, row) or (((fallback,),) if fallback else ())
        except ValueError as error:
            skipped.append(Skipped(shown, str(error)))
            continue
        times, weight = repeats * source.repeats, row.weight * source.weight
        found.append(Found(path, shown, captions, times, row, weight, source.prior))
    for path, row in rows.items():
        shown = prefix + path.relative_to(source.path).as_posix()
        skipped.append(Skipped(shown, f"{row.line} names it, but no such picture is used"))
    return Listing(tuple(found), tuple(skipped), repeated)


def check_source(source: Source) -> None:
    if not source.path.is_dir():
        what = "is a file" if source.path.exists() else "is not there"
        raise ValueError(f"{source.path}: {what}; name a folder of pictures.")
    if source.repeats < 1:
        raise ValueError(f"{source.path}: repeats is {source.repeats}; it must be at least 1.")
    if not (math.isfinite(source.weight) and source.weight > 0):
        raise ValueError(f"{source.path}: weight is {source.weight}; it must be above 0.")


def check_apart(folders: Sequence[Path]) -> None:
    """Raises ValueError where one folder, resolved, lies in another: its pictures would be both."""
    for inner in folders:
        if outer := next((folder for folder in folders if folder in inner.parents), None):
            raise ValueError(
                f"{inner}: lies in {outer}, which is given, too, and takes all folders in it. Put "
                "them side by side."
            )


def _folders(top: Path, skipped: list[Skipped]) -> Iterator[tuple[Path, list[str]]]:
    """Each folder and its files' names, sorted; links are followed, circles are not."""
    seen = set()

    def note(error: OSError) -> None:
        skipped.append(Skipped(str(error.filename), f"cannot be read ({error.strerror})"))

    for folder, inner, names in os.walk(top, onerror=note, followlinks=True):
        real = os.path.realpath(folder)
        inner[:] = [] if real in seen else sorted(name for name in inner if not _hidden(name))
        if real not in seen:
            seen.add(real)
            yield Path(folder), sorted(name for name in names if not _hidden(name))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _captions(path: Path, row: Row) -> tuple[tuple[str, ...], ...]:
    original = row.captions or _lines(path.with_suffix(".txt"))
    original = original or _lines(path.with_suffix(".caption"))
    original = original or _lines(path.with_name(f"{path.name}.txt"))
    synthetic = row.synthetic or _lines(path.with_suffix(".synthetic.txt"))
    return tuple(captions for captions in (original, synthetic) if captions)


def _lines(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty; none when there is no file."""
    try:
        data = read_regular(path, LONGEST_CAPTIONS)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ValueError(f"{path.name} is no caption ({reason(error)})") from error
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))  # an older Windows editor
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text: save it as such") from error
    return _texts(text.splitlines())


def _texts(lines: list[str]) -> tuple[str, ...]:
    return tuple(stripped for line in lines if (stripped := line.strip()))


def _read_metadata(folder: Path) -> dict[Path, Row]:
    file = folder / METADATA
    try:
        lines = read_regular(file, LARGEST_TEXT).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as UTF-8 text ({error}).") from error
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


def _row(text: str, folder: Path, line: str) -> tuple[Path, Row]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg} at character {error.colno})") from error
    if not isinstance(fields, dict):
        raise ValueError('expected an object such as {"file_name": "1.png", "text": "a cat"}')
    row = Row(
        captions=_strings(fields, "text") + _strings(fields, "captions"),
        synthetic=_strings(fields, "synthetic"),
        weight=given_weight(fields.get("weight", 1.0)),
        bucket=_bucket(fields.get("bucket")),
        line=line,
    )
    return folder / name_inside(fields.get("file_name")), row


def name_inside(name: object) -> str:
    """The name, if it leads nowhere but into its folder, whatever the system it is read on."""
    if not isinstance(name, str) or not name:
        raise ValueError("file_name is missing; expected the name of a picture")
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.anchor or ".." in path.parts:
            raise ValueError(
                f"file_name {quoted(name)} leads out of its folder; give a name inside it"
            )
    return name


def _strings(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    value = fields.get(name)
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is {quoted(value)}; expected a text or a list of texts")
    return _texts(texts)


def given_weight(value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value < 1e6):
        raise ValueError(f"weight is {quoted(value)}; expected a number above 0, below a million")
    return float(value)


def _bucket(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)):
        raise ValueError(f"bucket is {quoted(value)}; expected [width, height] in pixels")
    return value[0], value[1]
