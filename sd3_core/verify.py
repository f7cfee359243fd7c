"""Draw a picture again from the settings inside it, and say how far the two lie apart."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .errors import cut, quoted
from .generate import FORMAT, generate
from .pictures import read_png
from .samplers import OnStep
from .settings import Files, Settings, chosen_paths
from .text.encoders import ENCODERS

PACK = Path(__file__).parent  # where the embedded model is
# Settings that older records do not have, at what then held.
LATER_SETTINGS: dict[str, Any] = {"step_cache": 0.0, "fp8": False}


@dataclass(frozen=True)
class Comparison:
    largest: int  # of the differences between two channel values, 0..255
    mean: float
    differences: tuple[str, ...]  # what is not as it was then: files, torch, device, ...

    @property
    def equal(self) -> bool:
        return self.largest == 0

    def sentence(self) -> str:
        if self.equal:
            return "bit-equal: every pixel is the same."
        why = "; ".join(self.differences) or "nothing that is recorded differs"
        return (
            f"not equal: the pixels differ by up to {self.largest} of 255, {self.mean:.4f} on "
            f"average. What differs: {why}."
        )


def verify(
    path: Path,
    given: Files | None = None,
    on_step: OnStep | None = None,
    allowed: Sequence[Path] = (),
    on_files: Callable[[list[Path]], None] | None = None,
) -> Comparison:
    """Render the picture at `path` again and compare.

    given: files that lie elsewhere now; they win over those recorded.  allowed: folders in which
    recorded files may be opened, besides the picture's own, those of `given` and the pack's: a
    picture may come from anybody, and its settings name what they like.  on_files: called with all
    that will be opened before any of it is.
    Raises ValueError when the picture carries no settings or a file is gone or elsewhere, and all
    that `generate` raises.
    """
    given = given or Files()
    then, stored = read_png(path)
    record = read_record(stored, path)
    own = (*chosen_paths(given).values(), *(lora for lora, _ in given.loras))
    places = [
        path.parent,
        PACK,
        *allowed,
        *(file if file.is_dir() else file.parent for file in own),
    ]
    files = recorded_files(record, path, given, places)
    settings = recorded_settings(record, path, places)
    check_size(path, then.shape, (settings.height, settings.width))
    if on_files is not None:
        inputs = [file for file in (settings.init, settings.mask) if file is not None]
        on_files([*chosen_paths(files).values(), *(lora for lora, _ in files.loras), *inputs])
    again = generate(files, settings, on_step)
    now = again.pixels[record.index].numpy()
    check_size(path, then.shape, now.shape)
    distance = np.abs(then.astype(np.int16) - now.astype(np.int16))
    return Comparison(
        largest=int(distance.max()),
        mean=float(distance.mean()),
        differences=tuple(differences(record, again.record)),
    )


def check_size(path: Path, then: Sequence[int], drawn: Sequence[Any]) -> None:
    """Raises ValueError unless the picture has the height and width that its settings draw."""
    if tuple(then[:2]) != tuple(drawn[:2]):
        raise ValueError(
            f"{path}: is {then[1]} x {then[0]} pixels, its settings draw "
            f"{cut(drawn[1])} x {cut(drawn[0])}: it was scaled or cut after it was made."
        )


@dataclass(frozen=True)
class Record:
    """What `generate.make_record` wrote, checked."""

    settings: dict[str, Any]
    files: dict[str, str]
    loras: tuple[tuple[str, float], ...]
    fingerprints: dict[str, str]
    surroundings: dict[str, Any]
    index: int  # of the picture in its batch


def read_record(stored: Any, picture: Path) -> Record:
    """Raises ValueError when the settings are of another version, or damaged."""
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise ValueError(
            f"{picture}: its settings are of another version of SD3 Workbench, or damaged; this "
            f"one reads format {FORMAT}."
        )
    try:
        record = Record(
            settings=LATER_SETTINGS | dict(stored["settings"]),
            files={str(name): str(path) for name, path in stored["files"].items()},
            loras=tuple((str(path), float(strength)) for path, strength in stored["loras"]),
            fingerprints=dict(stored["fingerprints"]),
            surroundings=dict(stored["surroundings"]),
            index=int(stored["index"]),
        )
        unknown = set(record.settings) - {field.name for field in fields(Settings)}
        if unknown or not 0 <= record.index < record.settings["batch"]:
            raise ValueError(f"unknown {sorted(unknown)} or a wrong index")
        for field in fields(Settings):
            check_type(field.name, str(field.type), record.settings[field.name])
        if not set(record.settings["use"]) <= set(ENCODERS):
            raise ValueError(f"use is {record.settings['use']}")
        if not all(type(layer) is int for layer in record.settings["skip_layers"] or ()):
            raise ValueError(f"skip_layers is {record.settings['skip_layers']}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{picture}: its settings are damaged ({quoted(error)}).") from error
    return record


def check_type(name: str, annotation: str, value: Any) -> None:
    """Raises TypeError unless a value from JSON suits the field's annotation."""
    words = set(re.split(r"\W+", annotation))
    suits = {
        bool: {"bool"},
        int: {"int", "float"},
        float: {"float"},
        str: {"str", "Path"},
        list: {"tuple"},
        type(None): {"None"},
    }
    if not suits.get(type(value), set()) & words:
        raise TypeError(f"{name} is {quoted(value)}")
    if isinstance(value, int | float):
        float(value)  # OverflowError for what no setting can be


def recorded_settings(record: Record, picture: Path, places: Sequence[Path]) -> Settings:
    stored = dict(record.settings)
    for name in ("init", "mask"):
        if stored[name] is not None:
            stored[name] = find_file(stored[name], picture, name, places)
    for name in ("use", "skip_layers"):
        if stored[name] is not None:
            stored[name] = tuple(stored[name])
    return Settings(**stored)


def recorded_files(record: Record, picture: Path, given: Files, places: Sequence[Path]) -> Files:
    """The files of the record, and over them those given."""
    chosen: dict[str, Any] = {
        name: find_file(stored, picture, name, places)
        for name, stored in record.files.items()
        if getattr(given, name, None) is None and name in {field.name for field in fields(Files)}
    }
    loras = given.loras or tuple(
        (find_file(path, picture, "lora", places), strength) for path, strength in record.loras
    )
    return Files(**chosen, **chosen_paths(given), loras=loras)


def find_file(stored: str, picture: Path, name: str, places: Sequence[Path]) -> Path:
    """Where it was, if that is in one of the places; else beside the picture."""
    beside = picture.parent / re.split(r"[/\\]", stored)[-1]
    try:
        # As text first: a look at //host/share would already ask that host.
        inside = is_inside(stored, places)
        for place in (Path(stored), beside) if inside else (beside,):
            if place.exists() and place != picture.parent:
                return place
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ValueError(f"{picture}: names the {name} file {quoted(stored)}.") from error
    flag = f"--{name.replace('_', '-')} FILE"
    if inside:
        raise ValueError(
            f"{picture}: was made with the {name} file {cut(stored)}, which is neither there nor "
            f"beside the picture. Name its place: {flag}."
        )
    raise ValueError(
        f"{picture}: names the {name} file {cut(stored)}, which is not opened, as it lies outside "
        f"of the picture's folder. Name the file yourself ({flag}), or a folder in which recorded "
        "files may be opened (--allow FOLDER)."
    )


def is_inside(stored: str, places: Sequence[Path]) -> bool:
    """Whether a recorded path leads into one of the places, told without looking at the disk."""
    foreign = stored.startswith(("//", "\\\\"))  # a host, or Windows' device names
    path = Path(os.path.normpath(Path(stored) if foreign else Path(stored).absolute()))
    for place in places:
        own = str(place).startswith(("//", "\\\\"))
        whole = Path(os.path.normpath(place.absolute()))
        if own == foreign and (whole == path or whole in path.parents):
            return True
    return False


def differences(then: Record, now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, in words."""
    found = []
    groups = (
        ("the {} file's content", then.fingerprints, now["fingerprints"]),
        ("{}", then.surroundings, now["surroundings"]),
    )
    for label, before, after in groups:
        for name in sorted({*before, *after}):
            if before.get(name) != after.get(name):
                what = label.format(name)
                found.append(f"{what} ({before.get(name)} then, {after.get(name)} now)")
    return found
