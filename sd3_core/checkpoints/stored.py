"""Stored tensors by name, wherever they lie: in one file, in shards, in a diffusers folder."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .header import Header, TensorInfo, read_header, shown


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
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted = {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index.name}: is no index of safetensors shards.") from error
    parts: dict[str, Part] = {}
    for name in sorted(set(wanted.values())):
        if Path(name).name != name:  # a shard lies beside its index, nowhere else
            raise CheckpointError(f"{index.name}: names a shard outside its folder.")
        if not (index.parent / name).exists():
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
    """The index or weight file of a component's folder; without variant (fp16) if there is one."""
    names = sorted(entry.name for entry in folder.iterdir())
    shard = re.compile(r"-\d+-of-\d+\.safetensors$")
    indices = [name for name in names if re.search(r"\.safetensors\.index(\..+)?\.json$", name)]
    files = [n for n in names if n.endswith(".safetensors") and not shard.search(n)]
    expected = ("diffusion_pytorch_model", "model")
    chosen = [name for name in files + indices if name.startswith(expected)]
    return folder / min(chosen, key=len) if chosen else None


def describe_folder(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
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
