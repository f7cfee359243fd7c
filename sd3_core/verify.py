"""Draw a picture again from the settings inside it, and say how far the two lie apart."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .generate import FORMAT, generate
from .pictures import read_png
from .samplers import OnStep
from .settings import Files, Settings, chosen_paths

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


def verify(path: Path, given: Files | None = None, on_step: OnStep | None = None) -> Comparison:
    """Render the picture at `path` again and compare.

    given: files that lie elsewhere now; they win over those recorded.
    Raises ValueError when the picture carries no settings or a file is gone, and all that
    `generate` raises.
    """
    then, stored = read_png(path)
    record = read_record(stored, path)
    files = recorded_files(record, path, given or Files())
    again = generate(files, recorded_settings(record, path), on_step)
    now = again.pixels[record.index].numpy()
    if then.shape != now.shape:
        raise ValueError(
            f"{path}: is {then.shape[1]} x {then.shape[0]} pixels, its settings draw "
            f"{now.shape[1]} x {now.shape[0]}: it was scaled or cut after it was made."
        )
    distance = np.abs(then.astype(np.int16) - now.astype(np.int16))
    return Comparison(
        largest=int(distance.max()),
        mean=float(distance.mean()),
        differences=tuple(differences(record, again.record)),
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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{picture}: its settings are damaged ({error!r}).") from error
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
        raise TypeError(f"{name} is {value!r}")


def recorded_settings(record: Record, picture: Path) -> Settings:
    stored = dict(record.settings)
    for name in ("init", "mask"):
        if stored[name] is not None:
            stored[name] = find_file(stored[name], picture, name)
    for name in ("use", "skip_layers"):
        if stored[name] is not None:
            stored[name] = tuple(stored[name])
    return Settings(**stored)


def recorded_files(record: Record, picture: Path, given: Files) -> Files:
    """The files of the record, and over them those given."""
    chosen: dict[str, Any] = {
        name: find_file(stored, picture, name)
        for name, stored in record.files.items()
        if getattr(given, name, None) is None and name in {field.name for field in fields(Files)}
    }
    loras = tuple((find_file(path, picture, "lora"), strength) for path, strength in record.loras)
    return Files(**chosen, **chosen_paths(given), loras=given.loras or loras)


def find_file(stored: str, picture: Path, name: str) -> Path:
    """Where it was, else beside the picture."""
    places = [Path(stored), picture.parent / Path(stored).name]
    for place in places:
        if place.exists():
            return place
    raise ValueError(
        f"{picture}: was made with the {name} file {stored}, which is neither there nor beside the "
        f"picture. Name its place: --{name.replace('_', '-')} FILE."
    )


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
