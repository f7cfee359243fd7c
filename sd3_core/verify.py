"""Draw a picture again from the settings inside it, and say how far the two lie apart."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .generate import generate
from .pictures import open_picture, read_settings
from .samplers import OnStep
from .settings import Files, Settings, chosen_paths


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
    record = read_settings(path)
    files = recorded_files(record, path, given or Files())
    again = generate(files, recorded_settings(record, path), on_step)
    then = np.asarray(open_picture(path).convert("RGB"), dtype=np.int16)
    now = again.pixels[record.get("index", 0)].numpy().astype(np.int16)
    distance = np.abs(then - now)
    return Comparison(
        largest=int(distance.max()),
        mean=float(distance.mean()),
        differences=tuple(differences(record, again.record)),
    )


def recorded_settings(record: Mapping[str, Any], picture: Path) -> Settings:
    known = {field.name for field in fields(Settings)}
    try:
        stored = dict(record["settings"])
        if record["format"] != 1 or not set(stored) <= known:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{picture}: its settings are of another version of SD3 Workbench; update the pack."
        ) from error
    for name in ("init", "mask"):
        if stored.get(name) is not None:
            stored[name] = find_file(stored[name], picture, name)
    for name in ("use", "skip_layers"):
        if stored.get(name) is not None:
            stored[name] = tuple(stored[name])
    return Settings(**stored)


def recorded_files(record: Mapping[str, Any], picture: Path, given: Files) -> Files:
    chosen: dict[str, Any] = dict(chosen_paths(given))
    chosen["loras"] = given.loras or tuple(
        (find_file(stored, picture, "lora"), strength) for stored, strength in record["loras"]
    )
    for name, stored in dict(record.get("files", {})).items():
        if name not in chosen and name in {field.name for field in fields(Files)}:
            chosen[name] = find_file(stored, picture, name)
    return Files(**chosen)


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


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Sentences on what is not as it was."""
    found = []
    for group, label in (("fingerprints", "the {} file's content"), ("surroundings", "{}")):
        before, after = then.get(group, {}), now[group]
        for name in sorted(set(before) | set(after)):
            if before.get(name) != after.get(name):
                what = label.format(name)
                found.append(f"{what} ({before.get(name)} then, {after.get(name)} now)")
    return found
