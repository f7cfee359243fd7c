"""Stored bytes as tensors: mapped from the file, or read into memory of their own."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .header import Header, TensorInfo


def map_tensors(header: Header, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors that live in the file: nothing is read until it is touched, writes stay private.

    A mapped file cannot be replaced on Windows while one of its tensors is alive.
    Raises CheckpointError when the file has changed since its header was read.
    """
    infos = _chosen(header, names)
    _check_unchanged(header)
    try:
        data = torch.from_file(str(header.path), shared=False, size=header.size, dtype=torch.uint8)
    except RuntimeError as error:  # the system promises memory for the pages we might write to
        raise CheckpointError(
            f"{header.path.name}: its {header.size:,} bytes cannot be mapped ({error}). Close "
            f"other programs or enlarge the swap space (Windows: the paging file)."
        ) from error
    return {name: _view(data, info) for name, info in infos.items()}


def read_tensors(header: Header, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors in memory of their own; the file is closed again and may be replaced."""
    infos = _chosen(header, names)
    return {name: _from_bytes(read_bytes(header, name), info) for name, info in infos.items()}


def read_bytes(header: Header, name: str) -> bytes:
    """The bytes of one stored tensor, e.g. of a tokenizer file kept as uint8.

    Raises CheckpointError when the name is unknown or the file has changed since.
    """
    info = _chosen(header, [name])[name]
    _check_unchanged(header)
    with header.path.open("rb") as file:
        file.seek(info.start)
        data = file.read(info.end - info.start)
    if len(data) != info.end - info.start:
        raise _changed(header.path)
    return data


def _chosen(header: Header, names: Iterable[str] | None) -> Mapping[str, TensorInfo]:
    if names is None:
        return header.tensors
    try:
        return {name: header.tensors[name] for name in names}
    except KeyError as error:
        raise CheckpointError(f"{header.path.name}: holds no tensor {error}.") from error


def _check_unchanged(header: Header) -> None:
    """A file that shrank under its mapping would end the process at the first touch."""
    try:
        size = header.path.stat().st_size
    except OSError as error:
        raise _changed(header.path) from error
    if size != header.size:
        raise _changed(header.path)


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(f"{path.name}: has changed while it was being read. Load it again.")


def _view(data: Tensor, info: TensorInfo) -> Tensor:
    stored = data[info.start : info.end]
    if info.start % info.dtype.itemsize:  # torch cannot point between two elements
        stored = stored.clone()
    return stored.view(info.dtype).reshape(info.shape)


def _from_bytes(data: bytes, info: TensorInfo) -> Tensor:
    if not data:
        return torch.empty(info.shape, dtype=info.dtype)
    return torch.frombuffer(bytearray(data), dtype=info.dtype).reshape(info.shape)
