"""Which model a denoiser is, and what suits it: by its shapes, its file, and the folder around it.

Shapes do not tell a Turbo model from the one it was distilled from; names do.  In a folder of
diffusers every file is called alike, so there the folder, its index and its configurations speak,
and its scheduler knows the shift.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, quoted
from ..models.mmdit import MMDiTConfig
from ..presets import PRESETS, Preset, family
from ..reading import read_regular
from .layouts import Component

NAMELESS = ("diffusion_pytorch_model", "model.", "model-")  # what diffusers calls every file
LARGEST_JSON = 2**20  # bytes of a configuration


@dataclass(frozen=True)
class Surroundings:
    """What a folder of diffusers tells of the denoiser in it."""

    names: tuple[str, ...] = ()
    shift: float | None = None


def model_family(mmdit: Component, config: MMDiTConfig) -> str:
    """The key of PRESETS that it most likely belongs to.  Raises CheckpointError."""
    around = surroundings(mmdit.file)
    return family(config, [mmdit.file.name, *mmdit.metadata.values(), *around.names])


def model_preset(mmdit: Component, config: MMDiTConfig) -> Preset:
    """The family's preset, with the shift of a diffusers scheduler, and over both the two numbers
    that a small model carries in its metadata.

    Raises CheckpointError when one of them is no number.
    """
    own: dict[str, Any] = {}
    if (shift := surroundings(mmdit.file).shift) is not None:
        own["shift"] = shift
    try:
        if text := mmdit.metadata.get("sd3_workbench.shift"):
            own["shift"] = float(text)
        if text := mmdit.metadata.get("sd3_workbench.native_pixels"):
            own["native_pixels"] = int(text)
    except ValueError as error:
        raise CheckpointError(f"{mmdit.file.name}: its metadata is damaged: {error}.") from error
    return replace(PRESETS[model_family(mmdit, config)], **own)


def told_to_a_single_file(mmdit: Component, config: MMDiTConfig, name: str) -> dict[str, str]:
    """The denoiser's metadata for one file of this name, with what its old place told of it."""
    preset = model_preset(mmdit, config)
    metadata = dict(mmdit.metadata)
    key = family(config, [name, *metadata.values()])
    if PRESETS[key].title != preset.title:
        metadata["sd3_workbench.family"] = key = model_family(mmdit, config)
    if preset.shift != PRESETS[key].shift:
        metadata["sd3_workbench.shift"] = str(preset.shift)
    return metadata


def surroundings(file: Path) -> Surroundings:
    """Of a denoiser's file, or of its index of shards; nothing where the file has a name of its
    own.  Raises CheckpointError when the scheduler's configuration cannot be used."""
    if not file.name.startswith(NAMELESS):
        return Surroundings()
    home = file.absolute().parent
    if not (home / "config.json").is_file() and home.name != "transformer":
        return Surroundings()
    whole = home.name == "transformer" or (home.parent / "model_index.json").is_file()
    folder = home.parent if whole else home
    names = {home.name, folder.name, *configured_names(home / "config.json")}
    names |= {*configured_names(folder / "model_index.json")}
    if folder.parent.name == "snapshots":  # in Hugging Face's cache the name is two folders up
        names.add(folder.parent.parent.name)
    return Surroundings(tuple(sorted(names)), scheduler_shift(folder))


def configured_names(path: Path) -> Iterator[str]:
    """What a configuration says that its model was made from."""
    try:
        name = read_configuration(path).get("_name_or_path")
    except (OSError, ValueError):
        return  # hints, not needed
    if isinstance(name, str):
        yield name


def scheduler_shift(folder: Path) -> float | None:
    """The shift of a diffusers scheduler, where it is one number for every size."""
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        settings = read_configuration(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). Download it again; without it the shift would be "
            "guessed."
        ) from error
    shift = settings.get("shift")
    if shift is None or settings.get("use_dynamic_shifting"):
        return None
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise CheckpointError(
            f"{path}: shift is {quoted(shift)}, where a number above 0 is expected (3.0 for the "
            "released models). Download it again."
        )
    return float(shift)


def read_configuration(path: Path) -> dict[str, Any]:
    """Raises OSError and ValueError."""
    try:
        settings = json.loads(read_regular(path, LARGEST_JSON))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(settings, dict):
        raise ValueError("it is no JSON object")
    return settings
