"""The header of a safetensors file, read strictly and without touching a weight.

Format (github.com/huggingface/safetensors): eight bytes with the little-endian length N, N bytes
of JSON `{"name": {"dtype": "F16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}` with an
optional `"__metadata__": {str: str}`, then the tensors' bytes without gap or overlap.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .foreign import describe_bytes

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_DIMENSION = 2**63 - 1  # torch counts elements in int64
MAX_RANK = 32
MAX_TENSORS = 100_000  # a released file holds fewer than 2,000

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
}
DTYPES: dict[str, torch.dtype] = {  # an older torch lacks some of them
    name: getattr(torch, attribute)
    for name, attribute in _TORCH_NAMES.items()
    if hasattr(torch, attribute)
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Fingerprint: whole file up to the first number, else this many blocks of that size.
_WHOLE_FILE = 16 * 2**20
_BLOCKS, _BLOCK = 64, 64 * 2**10


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its bytes are [start, end) counted from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds.

    size: of the whole file, in bytes.  inode, mtime_ns: which file it was, last changed when.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int
    inode: int
    mtime_ns: int


def read_header(path: str | Path) -> Header:
    """The checked header of a safetensors file.

    Raises CheckpointError for everything that is not exactly one whole safetensors file: missing,
    cut off, grown, of another kind (pickle, GGUF, web page, ...), or with a header that lies.
    """
    path = Path(path)
    state = _regular_file(path)
    size = state.st_size
    try:
        with path.open("rb") as file:
            beginning = file.read(4096)
            length = _header_length(path, beginning, size)
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    try:
        entries = _parse_json(text)
        metadata = _metadata(entries.pop("__metadata__", None))
        if len(entries) > MAX_TENSORS:
            raise ValueError(f"it names {len(entries):,} tensors, more than any model has")
        tensors = {name: _tensor_info(name, entry, 8 + length) for name, entry in entries.items()}
        end = _check_contiguous(tensors, 8 + length)
    except ValueError as error:
        raise CheckpointError(
            f"{path.name}: damaged safetensors header: {error}. Download the file again."
        ) from error
    _check_size(path, size, end)
    return Header(path, tensors, metadata, size, state.st_ino, state.st_mtime_ns)


def fingerprint(path: str | Path) -> str:
    """Identity of a file's content: 16 hex digits, the same wherever the file lies.

    SHA-256 over the size, the header and evenly spread samples (the whole file up to 16 MiB), so
    that a 16 GB file costs milliseconds; remembered while path, size and time of change stay. A
    folder, or an index of shards in it, is identified by its safetensors files.
    Raises CheckpointError.
    """
    path = Path(path)
    path = path.parent if path.suffix == ".json" else path
    if is_folder(path):
        parts = [
            f"{file.relative_to(path).as_posix()}={fingerprint(file)}"
            for file in sorted(path.rglob("*.safetensors"))
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    state = _regular_file(path)
    return _fingerprint(path.resolve(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=256)
def _fingerprint(path: Path, size: int, _changed: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE_FILE:
            digest.update(file.read())
        else:
            length = min(int.from_bytes(file.read(8), "little"), MAX_HEADER)
            digest.update(file.read(length))
            for block in range(_BLOCKS):
                file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def is_folder(path: Path) -> bool:
    """As Path.is_dir; CheckpointError where the folder above may not be searched."""
    try:
        return path.is_dir()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror or error}.") from error


def _regular_file(path: Path) -> os.stat_result:
    """State of a file with bytes; a pipe or device would never end, so those are refused."""
    try:
        state = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be opened: {reason}.") from error
    if stat.S_ISDIR(state.st_mode):
        raise CheckpointError(f"{path}: is a folder; name a .safetensors file in it.")
    if not stat.S_ISREG(state.st_mode):
        raise CheckpointError(f"{path}: is not a regular file.")
    if state.st_size == 0:
        raise CheckpointError(f"{path.name}: is empty (0 bytes). Download it again.")
    return state


def _header_length(path: Path, beginning: bytes, size: int) -> int:
    length = int.from_bytes(beginning[:8], "little")
    plausible = len(beginning) > 8 and 2 <= length <= MAX_HEADER and beginning[8:9] == b"{"
    if not plausible:  # only now: a good file may well begin with the bytes of another kind
        raise CheckpointError(f"{path.name}: is no safetensors file: {describe_bytes(beginning)}")
    if 8 + length > size:
        raise CheckpointError(
            f"{path.name}: is cut off inside its header: at least {8 + length - size:,} bytes are "
            f"missing. Download it again."
        )
    return length


def _check_size(path: Path, size: int, end: int) -> None:
    if size < end:
        raise CheckpointError(
            f"{path.name}: is cut off: {end - size:,} of {end:,} bytes are missing. "
            f"Download it again."
        )
    if size > end:
        raise CheckpointError(
            f"{path.name}: has {size - end:,} bytes after its last tensor, so it is not the file "
            f"its header describes. Download it again."
        )


def _parse_json(text: bytes) -> dict[str, Any]:
    """The header's JSON object; ValueError for anything but one object with distinct names."""
    try:
        entries = json.loads(
            text.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at byte {error.pos})") from error
    except RecursionError as error:
        raise ValueError("its JSON is nested without end") from error
    if not isinstance(entries, dict):
        raise ValueError("it is not a JSON object")
    return entries


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {shown(twice)} appears twice")
    return entries


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("__metadata__ is not a table of strings")
    return value


def _tensor_info(name: str, entry: object, data_start: int) -> TensorInfo:
    label = shown(name)
    if not name.isprintable():  # also lone surrogates, which no message could print
        raise ValueError(f"the name {label} has characters that cannot be printed")
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {label} is not dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise ValueError(f"{label} is stored as {shown(str(dtype_name))}, a type unknown here")
    if not _counts(shape, MAX_RANK) or math.prod(max(n, 1) for n in shape) > MAX_DIMENSION:
        raise ValueError(f"{label} has an impossible shape")
    if not _counts(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{label} has impossible data_offsets")
    begin, end = offsets
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise ValueError(
            f"{label} should take {expected:,} bytes, its offsets span {end - begin:,}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + begin, data_start + end)


def _counts(value: object, most: int) -> bool:
    """Whether value is a list of at most so many whole numbers from 0 up (bool is not a number)."""
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(number) is int and 0 <= number <= MAX_DIMENSION for number in value)
    )


def _check_contiguous(tensors: dict[str, TensorInfo], data_start: int) -> int:
    """The position after the last tensor; ValueError where two overlap or leave a gap."""
    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            fault = "overlaps its neighbour" if info.start < position else "leaves a gap before it"
            raise ValueError(f"{shown(name)} {fault}")
        position = info.end
    return position


def shown(name: str) -> str:
    """A name as an error message may print it: quoted, escaped, at most 80 characters."""
    text = ascii(name)
    return text if len(text) <= 80 else text[:76] + "...'"
