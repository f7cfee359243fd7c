"""Names in widgets -> files: ComfyUI's model folders, forgiving in spelling, helpful when wrong."""

import difflib
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths

from ..sd3_core.checkpoints.header import fingerprint
from ..sd3_core.checkpoints.layouts import Component, find_components
from ..sd3_core.checkpoints.load import component_of
from ..sd3_core.embedded.model import FILE
from ..sd3_core.errors import CheckpointError
from ..sd3_core.text.encoders import TITLES
from .errors import NodeError, coded

EMBEDDED = "SD3 Tiny (built-in: draws coloured shapes)"
AUTO, NONE = "auto", "none"
# What "auto" takes first where several files would do; behind these, by name.
PREFERRED = {
    "clip_l": ("clip_l.safetensors",),
    "clip_g": ("clip_g.safetensors",),
    "t5": (
        "t5xxl_fp16.safetensors",
        "t5xxl_fp8_e4m3fn_scaled.safetensors",
        "t5xxl_fp8_e4m3fn.safetensors",
    ),
    "vae": ("sd3_vae.safetensors", "sd35_vae.safetensors", "sd3.5_vae.safetensors"),
}
FOLDER_OF = {"clip_l": "text_encoders", "clip_g": "text_encoders", "t5": "text_encoders"}


def embedded_file() -> Path | None:
    """The small model that comes with the pack; None where someone has taken it out."""
    return FILE if FILE.exists() else None


def file_names(folder: str) -> list[str]:
    """What a widget offers of one of ComfyUI's model folders: the built-in model first."""
    built_in = [EMBEDDED] if embedded_file() is not None and folder != "loras" else []
    return built_in + safetensors_in(folder)


def safetensors_in(folder: str) -> list[str]:
    names = folder_paths.get_filename_list(folder)
    return [name for name in names if name.lower().endswith(".safetensors")]


def find_file(folder: str, name: Any) -> Path:
    """The file a widget names: with / or \\, or by its base name alone where only one has it.

    name: text, or whatever else a program may send.  Raises NodeError with near matches.
    """
    name = str(name)
    if name == EMBEDDED and (file := embedded_file()) is not None:
        return file
    names = file_names(folder)
    wanted = name.replace("\\", "/")
    same = [other for other in names if other.replace("\\", "/") == wanted]
    same = same or [other for other in names if base(other) == base(wanted)]
    if len(same) != 1:
        raise NodeError("missing_file", _not_found(folder, name, same, names))
    return Path(folder_paths.get_full_path_or_raise(folder, same[0]))


def base(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def _not_found(folder: str, name: str, same: list[str], names: list[str]) -> str:
    if same:
        return f"{name} is there {len(same)} times in {folder}: {', '.join(same)}. Name one."
    bases = {base(other): other for other in names}
    near = [bases[match] for match in difflib.get_close_matches(base(name), bases, n=3, cutoff=0.5)]
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Usable files there: {len(names)}."
    return (
        f"{name} is not in ComfyUI's folder {folder} as a .safetensors file. {hint} Put the file "
        f"there (models/{folder}) and press R to reload the lists."
    )


def name_fault(folder: str, name: Any, *besides: str) -> str | None:
    """What is wrong with a name, for validate_inputs; None when nothing is.

    name: None where a link brings it, which is looked at when the node runs.  besides: what the
    widget offers that is no file.
    """
    if name is None or name in besides:
        return None
    try:
        find_file(folder, name)
    except NodeError as error:
        return str(error)
    return None


def components(path: Path) -> dict[str, Component]:
    """The networks in a file, remembered while it stays the same.  Raises CheckpointError."""
    state = path.stat()
    return _components(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _components(path: Path, changed: int, size: int) -> dict[str, Component]:
    return find_components(path)


def find_component(folder: str, name: str, kind: str) -> Component:
    """The network of this kind in the file that a widget names.  Raises NodeError."""
    with coded("bad_file"):
        return component_of(find_file(folder, name), kind)


def find_auto(kind: str, fits: Callable[[Component], bool]) -> Component | None:
    """The network of this kind in ComfyUI's folder for it that fits best; see PREFERRED."""
    preferred = PREFERRED[kind]
    folder = FOLDER_OF.get(kind, kind)

    def rank(name: str) -> tuple[int, str]:
        known = base(name).lower()
        return (preferred.index(known) if known in preferred else len(preferred), name)

    for name in sorted(safetensors_in(folder), key=rank):
        path = folder_paths.get_full_path(folder, name)
        try:
            found = components(Path(path)).get(kind) if path else None
        except CheckpointError:  # of another model, or no model at all
            continue
        if found is not None and fits(found):
            return found
    return None


def choose(
    kind: str,
    choice: str,
    inside: Mapping[str, Component],
    fits: Callable[[Component], bool] = lambda component: True,
) -> Component | None:
    """The network a widget asks for: auto (in the checkpoint, else the folder), none, a file."""
    if choice == NONE:
        return None
    if choice != AUTO:
        return find_component(FOLDER_OF.get(kind, kind), choice, kind)
    return inside.get(kind) or find_auto(kind, fits)


def missing_note(kind: str) -> str:
    folder = FOLDER_OF.get(kind, kind)
    return f"No {TITLES[kind]} that fits is in models/{folder}: zeros stand in its place."


def files_fingerprint(*chosen: tuple[str, str | None]) -> str:
    """One value for the files behind (folder, name) pairs; changes when one of them does.

    "auto" stands for every file of its folder, since a new one may be chosen; None for a name that
    a link brings.
    """
    parts = []
    for folder, name in chosen:
        if name == AUTO:
            paths = [folder_paths.get_full_path(folder, other) for other in safetensors_in(folder)]
            parts += [f"{path}:{Path(path).stat().st_mtime_ns}" for path in paths if path]
        elif name not in (NONE, None):
            parts.append(fingerprint(find_file(folder, name)))
    return "|".join(parts)
