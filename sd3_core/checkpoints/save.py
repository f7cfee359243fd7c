"""safetensors files written whole or not at all; models in the layout of the released files."""

import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.cast import Scaled
from ..plain_text import as_json, printable
from .header import DTYPE_NAMES
from .layouts import COMPONENTS, PREFIXES, Component
from .load import read_state_dict
from .products import Product, read_products

ALIGNMENT = 64  # bytes; where the tensors begin, so that mapped weights suit wide vector loads
# What is being written: .NAME.MACHINE-PROCESS.part; older versions left the machine out.
_UNFINISHED = re.compile(r"\..+\.(?:([0-9a-f]{8})-)?(\d+)\.part")
ABANDONED = 24 * 3600  # seconds; a process of another machine cannot be asked whether it lives
FP8_FORMATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file; returns where it lies.

    A reader sees the old file or the whole new one, also after a crash.  Where the old one cannot
    be replaced (Windows, while a program has it open) the new one gets a name beside it, and a
    warning says so.  Raises CheckpointError when nothing can be written.
    """
    return _replace(
        Path(path), lambda file: _write(file, tensors, {"format": "pt", **(metadata or {})})
    )


def save_bytes(path: str | Path, data: bytes, *, aside: bool = True) -> Path:
    """Write any other file in the same manner.

    aside: False where nobody would find it under another name; an old file that cannot be replaced
    is then a CheckpointError.
    """
    return _replace(Path(path), lambda file: file.write(data), aside)


def export_checkpoint(
    path: str | Path,
    parts: Mapping[str, Component | nn.Module],
    metadata: Mapping[str, str] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write networks as one file in the released layout; returns where it lies.

    parts: by kind ("mmdit", "vae", ...), a loaded network or a component of any layout, in the
    precision it has; scaled fp8 in ComfyUI's `comfy_quant` spelling.  extra: further tensors under
    their full names, such as tokenizers.  Raises CheckpointError.
    """
    tensors: dict[str, Tensor] = dict(extra or {})
    for kind, part in parts.items():
        if kind not in COMPONENTS:
            raise ValueError(f"unknown network {kind!r}; choose from {', '.join(COMPONENTS)}")
        stored = isinstance(part, Component)
        state = read_state_dict(part) if stored else _state_of(part)
        products = read_products(part) if stored else {}
        for name, tensor in (state | _quantisation(state, products)).items():
            tensors[PREFIXES[kind] + name] = tensor
    return save_tensors(path, tensors, metadata)


def _state_of(network: nn.Module) -> dict[str, Tensor]:
    """Its parameters, and beside a scaled weight its scale."""
    state: dict[str, Tensor] = dict(network.state_dict())
    for name, module in network.named_modules():
        if isinstance(module, Scaled) and module.scale is not None:
            state[f"{name}.weight_scale"] = module.scale
    return state


def _quantisation(
    state: Mapping[str, Tensor], products: Mapping[str, Product]
) -> dict[str, Tensor]:
    """For each scaled fp8 weight the note by which ComfyUI knows it, and its input's scale."""
    notes: dict[str, Tensor] = {}
    for name in state:
        module, _, end = name.rpartition(".")
        if end == "weight_scale":
            product = products.get(module, Product())
            note = json.dumps(product.note(FP8_FORMATS[state[f"{module}.weight"].dtype]))
            if product.input_scale is not None:
                notes[f"{module}.input_scale"] = product.input_scale
            notes[f"{module}.comfy_quant"] = torch.tensor(list(note.encode()), dtype=torch.uint8)
    return notes


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError becomes a CheckpointError that names the file, which a full disk's does not."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}.") from error


def check_room(path: Path, size: float) -> None:
    """Before long work: raises CheckpointError when its result could not be written to `path`.

    size: bytes of it, about.
    """
    with writing(path):
        place = next(one for one in (path, *path.absolute().parents) if one.is_dir())
        tempfile.TemporaryFile(dir=place).close()
        free = shutil.disk_usage(place).free
    if size > free:
        raise CheckpointError(
            f"{path}: about {size:,.0f} bytes will be written there and {free:,} are free. Make "
            "room, or name another place."
        )


def _replace(path: Path, write: Callable[[BinaryIO], object], aside: bool = True) -> Path:
    with writing(path), _temporary(path) as temporary:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        return _move(temporary, path, aside)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path` that is gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(path.parent.absolute())
    temporary = path.with_name(temporary_name(path.name))
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
    """What is being written under this name is called until it is whole; see sweep."""
    return f".{name}.{_machine()}-{os.getpid()}.part"


def sweep(folder: Path) -> None:
    """Delete what killed processes were writing in the folder."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            if (name := _UNFINISHED.fullmatch(entry.name)) and _is_abandoned(entry, name):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    with suppress(OSError):
                        os.unlink(entry.path)


_sweep_once = lru_cache(maxsize=4096)(sweep)  # of each folder that this process writes into


def _is_abandoned(entry: os.DirEntry[str], name: re.Match[str]) -> bool:
    if name[1] == _machine() and not _is_running(int(name[2])):
        return True
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED


def _is_running(process: int) -> bool:
    if os.name == "nt":  # where asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is somebody else's
        return True
    return True


@lru_cache(maxsize=1)
def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    # Of a file's name only what is text: other readers refuse the rest.
    told = {name: printable(value) for name, value in metadata.items()}
    entries: dict[str, object] = {"__metadata__": told}
    position = 0
    for name in names:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = as_json(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:  # one at a time: a mapped 16 GB model passes through little memory
        stored = tensors[name].detach().cpu().contiguous().reshape(-1)
        file.write(stored.view(torch.uint8).numpy().data)


def _move(temporary: Path, path: Path, aside: bool) -> Path:
    try:
        os.replace(temporary, path)
    except OSError:
        if not aside or not path.is_file():
            raise
        sibling = _free_name(path)
        os.replace(temporary, sibling)
        warnings.warn(
            f"{path.name} is in use by a program and could not be replaced; the new file is "
            f"{sibling}.",
            stacklevel=5,
        )
        return sibling
    return path


def _free_name(path: Path) -> Path:
    names = (path.with_stem(f"{path.stem}-{number}") for number in count(1))
    return next(name for name in names if not name.exists())
