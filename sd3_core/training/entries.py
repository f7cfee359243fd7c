"""One cached thing in one safetensors file that tells when it is damaged.

Written whole or not at all.  The file holds numbers only: no name, no word, no metadata of ours.
"""

import errno
import shutil
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.header import read_header
from ..checkpoints.save import save_tensors
from ..checkpoints.tensors import read_tensors
from ..errors import CheckpointError

CHECKSUM = "crc32"  # name of the tensor that holds it
NO_SPACE = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
READERS = 4  # threads


def write_entry(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Keep tensors in `dtype`, or in float32 where it would overflow.

    Raises OSError when the disk is full (see disk_full), CheckpointError when the folder cannot be
    written for another reason.
    """
    stored = {name: _stored(tensor, dtype) for name, tensor in tensors.items()}
    stored[CHECKSUM] = torch.tensor(checksum(stored))
    try:
        save_tensors(path, stored)
    except CheckpointError as error:
        if getattr(error.__cause__, "errno", None) not in NO_SPACE:
            raise
        size = sum(tensor.nbytes for tensor in stored.values())
        raise disk_full(path.parent, size) from error


def read_entry(path: Path) -> dict[str, Tensor]:
    """An entry's tensors, float32.  Raises CheckpointError when it is missing or damaged."""
    return {name: tensor.float() for name, tensor in _read_checked(path).items()}


@dataclass(frozen=True)
class Inventory:
    """What of the wanted entries is there."""

    missing: frozenset[Path]  # or damaged
    sound: int
    damaged: int


def take_inventory(paths: Iterable[Path]) -> Inventory:
    """Reads every entry whole: the checksum finds what a sound header hides."""
    paths = list(paths)
    with ThreadPoolExecutor(READERS) as threads:
        sound = list(threads.map(_is_sound, paths))
    missing = [path for path, fine in zip(paths, sound, strict=True) if not fine]
    damaged = sum(path.exists() for path in missing)
    return Inventory(frozenset(missing), len(paths) - len(missing), damaged)


def check_space(folder: Path, size: int) -> None:
    """Raises OSError when `size` bytes do not fit into the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    if size > shutil.disk_usage(folder).free:
        raise disk_full(folder, size)


def disk_full(folder: Path, size: int) -> OSError:
    """The error that names the folder, the bytes needed and the bytes free."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    error = OSError(
        f"{folder}: the disk is full: {size:,} bytes are needed, {free:,} are free. Make room, or "
        "let output name a folder on another disk, where the cache is then, too (in ComfyUI: "
        "--output-directory); what is cached already stays."
    )
    error.errno = errno.ENOSPC
    return error


def _read_checked(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise CheckpointError(f"{path}: is not in the cache; start again, and it is made.")
    try:
        tensors = read_tensors(read_header(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    stored = tensors.pop(CHECKSUM, None)
    if stored is None or stored.numel() != 1 or int(stored) != checksum(tensors):
        raise CheckpointError(f"{path}: is damaged; start again, and it is made anew.")
    return tensors


def _is_sound(path: Path) -> bool:
    try:
        _read_checked(path)
    except CheckpointError:
        return False
    return True


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of names, shapes and contents."""
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    exact = tensor.detach().float().cpu().contiguous()
    smaller = exact.to(dtype)
    return smaller if smaller.isfinite().all() else exact
