"""Stored bytes as tensors: mapped from the file, or read into memory of their own."""

import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .header import Header, TensorInfo

WINDOW = 2**30  # bytes mapped at once, unless one tensor is larger


def map_tensors(header: Header, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors that live in the file: nothing is read until it is touched, writes stay private.

    A mapped file cannot be replaced on Windows while one of its tensors is alive.
    Raises CheckpointError when the file has changed since its header was read.
    """
    infos = _chosen(header, names)
    _check_unchanged(header)
    mapped = {n: torch.empty(i.shape, dtype=i.dtype) for n, i in infos.items() if not i.elements}
    try:
        with header.path.open("rb") as file:
            for window in _windows(infos.keys() - mapped.keys(), infos):
                mapped |= _map_window(file.fileno(), {name: infos[name] for name in window})
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{header.path.name}: cannot be mapped into memory ({error}). Close other programs or "
            f"enlarge the swap space (Windows: the paging file)."
        ) from error
    return {name: mapped[name] for name in infos}


def _windows(names: Iterable[str], infos: Mapping[str, TensorInfo]) -> Iterator[list[str]]:
    """Neighbours in the file that are mapped together.

    A private mapping counts as memory that might be written, and systems refuse one that is larger
    than all memory there is; so a 16 GB file is mapped in pieces, and only where it is wanted.
    """
    window: list[str] = []
    for name in sorted(names, key=lambda name: infos[name].start):
        if window and infos[name].end - infos[window[0]].start > WINDOW:
            yield window
            window = []
        window.append(name)
    if window:
        yield window


def _map_window(file: int, infos: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    start = min(info.start for info in infos.values())
    start -= start % mmap.ALLOCATIONGRANULARITY
    end = max(info.end for info in infos.values())
    view = mmap.mmap(file, end - start, access=mmap.ACCESS_COPY, offset=start)
    data = torch.frombuffer(view, dtype=torch.uint8)
    return {
        name: _typed(data[info.start - start : info.end - start], info)
        for name, info in infos.items()
    }


def _typed(stored: Tensor, info: TensorInfo) -> Tensor:
    if info.start % info.dtype.itemsize:  # torch cannot point between two elements
        stored = stored.clone()
    return stored.view(info.dtype).reshape(info.shape)


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
    """Another file of the same size would give other weights under this header's names.

    A file that shrank under its mapping would end the process at the first touch.
    """
    try:
        now = header.path.stat()
    except OSError as error:
        raise _changed(header.path) from error
    read = (header.size, header.inode, header.mtime_ns)
    if (now.st_size, now.st_ino, now.st_mtime_ns) != read:
        raise _changed(header.path)


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(f"{path.name}: has changed while it was being read. Load it again.")


def _from_bytes(data: bytes, info: TensorInfo) -> Tensor:
    if not data:
        return torch.empty(info.shape, dtype=info.dtype)
    return torch.frombuffer(bytearray(data), dtype=info.dtype).reshape(info.shape)
