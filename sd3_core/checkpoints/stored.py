"""Stored tensors by name, wherever they lie: in one file, in shards, in a diffusers folder."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..reading import read_regular
from .header import MAX_HEADER, Header, TensorInfo, read_header, shown

_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")


@dataclass(frozen=True, eq=False)
class Part:
    """One stored tensor of one file."""

    header: Header
    key: str

    @property
    def info(self) -> TensorInfo:
        return self.header.tensors[self.key]


@dataclass(frozen=True, eq=False)
class Stored:
    """All tensors of one file, or of the shards of one index."""

    file: Path
    parts: dict[str, Part]
    metadata: dict[str, str]


def read_stored(path: str | Path) -> Stored:
    """The tensors of a safetensors file, or of all shards of a *.safetensors.index*.json."""
    path = Path(path)
    if path.suffix == ".json" and ".index" in path.name:
        return _read_shards(path)
    header = read_header(path)
    return Stored(path, {key: Part(header, key) for key in header.tensors}, header.metadata)


def _read_shards(index: Path) -> Stored:
    try:
        weight_map = json.loads(read_regular(index, MAX_HEADER))["weight_map"]
        wanted = {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index.name}: is no index of safetensors shards.") from error
    parts: dict[str, Part] = {}
    beside = _names_in(index.parent)
    for name in sorted(set(wanted.values())):
        if Path(name).name != name:  # a shard lies beside its index, nowhere else
            raise CheckpointError(f"{index.name}: names a shard outside its folder.")
        if name not in beside:
            missing = sum(shard == name for shard in wanted.values())
            raise CheckpointError(
                f"{index.name}: the shard {name} with {missing} tensors is missing. Download it "
                f"into {index.parent}."
            )
        header = read_header(index.parent / name)
        mine = [key for key in header.tensors if wanted.get(key, name) == name]
        parts.update({key: Part(header, key) for key in mine})
    if lost := sorted(set(wanted) - set(parts)):
        raise CheckpointError(
            f"{index.name}: its shards lack {len(lost)} tensors ({name_list(lost)}). Download the "
            f"folder again."
        )
    return Stored(index, parts, {})


def weights_in(folder: Path) -> Path | None:
    """The index or weight file of a component's folder; without variant (fp16) if there is one.

    Raises CheckpointError when the folder may not be read.
    """
    names = _names_in(folder)
    indices = [name for name in names if re.search(r"\.safetensors\.index(\..+)?\.json$", name)]
    files = [n for n in names if n.endswith(".safetensors") and not _SHARD.search(n)]
    expected = ("diffusion_pytorch_model", "model")
    chosen = [name for name in files + indices if name.startswith(expected)]
    plain = re.compile(r"[a-z_]+\.safetensors(\.index\.json)?")
    chosen.sort(key=lambda name: (not plain.fullmatch(name), len(name)))
    return folder / chosen[0] if chosen else None


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}.") from error


def is_shard(file: Path) -> bool:
    return _SHARD.search(file.name) is not None


def what_to_do(file: Path) -> str:
    """The end of a message about a network that is not whole in this file."""
    if is_shard(file):
        return (
            "It is one shard of several: name the folder they lie in, or their index "
            "(*.safetensors.index.json) instead; for ComfyUI, python -m sd3_core export makes one "
            "file of them."
        )
    return "Download the file again."


def describe_folder(folder: Path) -> str:
    names = _names_in(folder)
    files = [name for name in names if name.endswith(".safetensors")]
    if files:
        return f"Name one of its files: {name_list(files)}."
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        return f"It holds pickles ({name_list(pickles)}); get the .safetensors version."
    return "It needs subfolders like transformer and vae with .safetensors files in them."


def name_list(names: Iterable[str], most: int = 3) -> str:
    """The first names of a list, for an error message."""
    names = list(names)
    more = ", ..." if len(names) > most else ""
    return ", ".join(shown(name).strip("'\"") for name in names[:most]) + more
