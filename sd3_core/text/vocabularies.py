"""Where the tokenizers' files are: a folder, the checkpoint itself, ComfyUI.  Never a download.

CLIP's and T5's are searched on their own, so they may come from different places.
"""

import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..reading import read_regular
from .tokenizers import Tokenizer, TokenizerFiles, clip_tokenizer, t5_tokenizer

LARGEST_FILE = 2**26  # bytes; T5's tokenizer.json has 2.4 million

# Folders inside a given one, in the order they are tried: ours, diffusers', ComfyUI's, itself.
COMFY_CLIP = "comfy/sd1_tokenizer"
COMFY_T5 = "comfy/text_encoders/t5_tokenizer"
FOLDERS = {
    "clip_l": ("clip_l", "tokenizer", COMFY_CLIP, "."),
    "clip_g": ("clip_g", "tokenizer_2", "clip_l", "tokenizer", COMFY_CLIP, "."),
    "t5": ("t5", "tokenizer_3", COMFY_T5, "."),
}

# Names of the uint8 tensors inside a checkpoint, without the file's name.
CHECKPOINT_PREFIXES = {
    "clip_l": "text_encoders.clip_l.tokenizer.",
    "clip_g": "text_encoders.clip_g.tokenizer.",
    "t5": "text_encoders.t5xxl.tokenizer.",
}

DOWNLOADS = {
    "CLIP": "hf download openai/clip-vit-large-patch14 vocab.json merges.txt"
    " --local-dir tokenizers/clip_l",
    "T5": "hf download google/t5-v1_1-xxl spiece.model --local-dir tokenizers/t5",
}


@dataclass(frozen=True)
class Tokenizers:
    """One tokenizer per encoder, None where none was asked for; places say where each was found."""

    clip_l: Tokenizer | None = None
    clip_g: Tokenizer | None = None
    t5: Tokenizer | None = None
    places: Mapping[str, str] = field(default_factory=dict)


def find_tokenizers(
    needed: Collection[str],
    *,
    directory: Path | None = None,
    checkpoint: Mapping[str, Callable[[], bytes]] | None = None,
    diffusers: Path | None = None,
) -> Tokenizers:
    """The tokenizers of these encoders ("clip_l", "clip_g", "t5"), each from the first place.

    In order: `directory` (folders named as in FOLDERS, or one tokenizer's files), `checkpoint`
    (tensor names -> their bytes; see CHECKPOINT_PREFIXES), a `diffusers` model's folder, ComfyUI:
    the running one, the one COMFYUI_PATH names, comfy-cli's.
    Raises CheckpointError when `directory` holds no tokenizer at all, and one for all that is
    missing, with the places searched and the download.
    """
    if directory is not None and not any(_in_folder(directory, name) for name in FOLDERS):
        raise CheckpointError(f"{directory}: no tokenizer in it. {_what_a_folder_holds()}")
    folders = [folder for folder in (diffusers, *_comfyui_folders()) if folder is not None]
    found: dict[str, TokenizerFiles] = {}
    for name in needed:
        candidates = [
            _in_folder(directory, name) if directory is not None else None,
            _in_checkpoint(checkpoint or {}, name),
            *(_in_folder(folder, name) for folder in folders),
        ]
        if files := next(filter(None, candidates), None):
            found[name] = files
    if missing := [name for name in needed if name not in found]:
        first = [str(directory)] if directory is not None else []
        inside = ["inside the checkpoint"] if checkpoint is not None else []
        raise CheckpointError(_not_found(missing, [*first, *inside, *map(str, folders)]))
    return _load(found)


def pack_tokenizers(folder: Path) -> dict[str, Tensor]:
    """The tokenizers of a folder as uint8 tensors, to be saved inside a checkpoint.

    CLIP-G's are left out where they equal CLIP-L's.  Raises CheckpointError when there are none.
    """
    found = {name: files for name in FOLDERS if (files := _in_folder(folder, name))}
    if not found:
        raise CheckpointError(f"{folder}: no tokenizer in it. {_what_a_folder_holds()}")
    contents = {
        name: {file: read() for file, read in files.read.items()} for name, files in found.items()
    }
    if contents.get("clip_g") == contents.get("clip_l"):
        contents.pop("clip_g", None)
    return {
        CHECKPOINT_PREFIXES[name] + file: torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for name, files in contents.items()
        for file, data in files.items()
    }


def _load(found: Mapping[str, TokenizerFiles]) -> Tokenizers:
    """CLIP-G shares CLIP-L's vocabulary in memory where both come from the same files."""
    loaded: dict[str, Tokenizer] = {}
    for name, files in found.items():
        other = {"clip_l": "clip_g", "clip_g": "clip_l"}.get(name, "")
        if name == "t5":
            loaded[name] = t5_tokenizer(files)
        elif other in loaded and found[other].place == files.place:
            same = loaded[other]
            loaded[name] = replace(same, pad=same.end if name == "clip_l" else 0)
        else:
            loaded[name] = clip_tokenizer(files, name)
    places = {name: files.place for name, files in found.items()}
    return Tokenizers(loaded.get("clip_l"), loaded.get("clip_g"), loaded.get("t5"), places=places)


def _in_folder(folder: Path, name: str) -> TokenizerFiles | None:
    for inner in FOLDERS[name]:
        place = folder / inner
        if files := _usable_files(place, name):
            return TokenizerFiles(
                str(place),
                {file: partial(read_regular, place / file, LARGEST_FILE) for file in files},
            )
    return None


def _usable_files(place: Path, name: str) -> tuple[str, ...]:
    """Which files of one folder make the tokenizer; none when it holds another one or nothing."""
    if name != "t5" and all((place / file).is_file() for file in ("vocab.json", "merges.txt")):
        return ("vocab.json", "merges.txt")
    if _json_model(place / "tokenizer.json") == ("Unigram" if name == "t5" else "BPE"):
        return ("tokenizer.json",)
    if name == "t5" and (place / "spiece.model").is_file():
        return ("spiece.model",)
    return ()


def _json_model(path: Path) -> str | None:
    """The kind of model in a tokenizer.json: "BPE" is CLIP's, "Unigram" T5's."""
    try:
        return json.loads(read_regular(path, LARGEST_FILE))["model"]["type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _in_checkpoint(tensors: Mapping[str, Callable[[], bytes]], name: str) -> TokenizerFiles | None:
    prefix = CHECKPOINT_PREFIXES[name]
    files = {
        key.removeprefix(prefix): read for key, read in tensors.items() if key.startswith(prefix)
    }
    if files:
        return TokenizerFiles("inside the checkpoint: " + prefix.rstrip("."), files)
    return _in_checkpoint(tensors, "clip_l") if name == "clip_g" else None


def _comfyui_folders() -> Iterator[Path]:
    """ComfyUI's folders, the running one first; it is found without importing anything."""
    running = sys.modules.get("comfy")
    yield from (Path(path).parent for path in getattr(running, "__path__", ()))
    if named := os.environ.get("COMFYUI_PATH"):
        yield Path(named)
    # Where `comfy install` puts it: Linux, then Windows and macOS.
    yield Path.home() / "comfy" / "ComfyUI"
    yield Path.home() / "Documents" / "comfy" / "ComfyUI"


def _what_a_folder_holds() -> str:
    return (
        "Expected clip_l/ with vocab.json and merges.txt, and t5/ with tokenizer.json or"
        " spiece.model; or a diffusers model's folder; or ComfyUI's."
    )


def _not_found(missing: list[str], searched: list[str]) -> str:
    families = sorted({"T5" if name == "t5" else "CLIP" for name in missing})
    commands = "\n".join(f"  {DOWNLOADS[family]}" for family in families)
    return (
        f"no tokenizer for {' and '.join(families)}. Searched: {', '.join(searched)}.\n"
        f"Point COMFYUI_PATH at a ComfyUI folder, or download the files:\n{commands}\n"
        "and give the folder `tokenizers` as tokenizer directory (--tokenizers tokenizers)."
    )
