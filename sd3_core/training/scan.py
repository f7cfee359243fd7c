"""What a picture's file holds, found by decoding it once; remembered while the file stays as it is.

Decoding everything is the only way to find what is broken before training starts.  For a large
dataset it takes minutes, hence the memory.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.save import save_bytes
from ..decode import BYTES, RULES, decode, pixels_in
from ..errors import CheckpointError
from ..memory import free_memory, trim_heap
from ..reading import LARGEST_PICTURE, LARGEST_TEXT, open_regular, read_regular, reason
from .duplicates import perceptual_hash

WORKERS = 8  # threads at most; decoders let go of Python's lock, and each holds a whole picture
SHARE = 0.5  # of the free memory, for pictures being looked at
VAST = 2**30  # bytes that a picture takes; what they leave in the heap would add up
UNKNOWN_MEMORY = 2.0 * 2**30  # bytes, where nobody tells
SETTLED = 2e9  # ns; a younger file may change again without a new time of change


@dataclass(frozen=True)
class Facts:
    """What decoding a file told.  fault: why it cannot be used; then the rest means nothing."""

    digest: str = ""  # SHA-256 of the file's bytes
    width: int = 0  # upright, pixels
    height: int = 0
    transparent: bool = False
    hash: int | None = None  # see duplicates.perceptual_hash
    note: str | None = None
    fault: str | None = None


def look_at(path: Path) -> Facts:
    """Decode a file; nothing that is wrong with it raises."""
    try:
        data = read_regular(path, LARGEST_PICTURE)
        picture = decode(data)
    except OSError as error:
        return Facts(fault=f"it cannot be read ({reason(error)})")
    except ValueError as error:
        return Facts(fault=str(error))
    return Facts(
        digest=hashlib.sha256(data).hexdigest(),
        width=picture.colour.width,
        height=picture.colour.height,
        transparent=picture.alpha is not None,
        hash=perceptual_hash(picture.on("white")),
        note=picture.note,
    )


def look_at_all(
    paths: Sequence[Path],
    memory: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Facts]:
    """The facts of each file, in order.

    memory: a JSON file to remember them in; a damaged one is begun anew.  It holds hashes of the
    files' names, no names.  on_progress: called with (done, total) after each.
    """
    known = _recall(memory)
    marks = [_mark(path) for path in paths]
    budget = Budget((free_memory(torch.device("cpu")) or UNKNOWN_MEMORY) * SHARE)

    def facts(path: Path, mark: str | None) -> Facts:
        if (one := known.get(mark or "")) is not None:
            return one
        size = _memory_for(path)
        with budget.holding(size):
            one = look_at(path)
            if size > VAST:
                trim_heap()
            return one

    result: list[Facts] = []
    try:
        with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as threads:
            try:
                for one in threads.map(facts, paths, marks):
                    result.append(one)
                    if on_progress is not None:
                        on_progress(len(result), len(paths))
            finally:  # an interrupt does not wait for thousands of pictures
                threads.shutdown(wait=False, cancel_futures=True)
    finally:  # nor does it lose what it has
        new = {mark: one for mark, one in zip(marks, result, strict=False) if mark}
        if memory is not None and not new.items() <= known.items():
            _remember(memory, {**known, **new})
    return result


class Budget:
    """So many bytes that threads may take in all; one alone may take more."""

    def __init__(self, most: float):
        self.most, self.taken, self.changed = most, 0.0, threading.Condition()

    @contextmanager
    def holding(self, size: float) -> Iterator[None]:
        """Wait until they are there, and give them back afterwards."""
        size = min(size, self.most)
        with self.changed:
            self.changed.wait_for(lambda: self.taken + size <= self.most)
            self.taken += size
        try:
            yield
        finally:
            with self.changed:
                self.taken -= size
                self.changed.notify_all()


def _memory_for(path: Path) -> float:
    """Bytes that it takes to look at a file, about."""
    try:
        with open_regular(path) as file:
            return os.fstat(file.fileno()).st_size + BYTES * pixels_in(file)
    except OSError:
        return 0.0


def _mark(path: Path) -> str | None:
    """Names a file's present state; None while it may change unnoticed, or is not there."""
    try:
        state = path.stat()
    except OSError:
        return None
    if time.time_ns() - state.st_mtime_ns < SETTLED:
        return None
    # On Unix the ctime moves with every write, also where a copying tool sets the mtime back.
    times = (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
    return hashlib.sha256(repr((RULES, str(path.resolve()), times)).encode()).hexdigest()


def _recall(memory: Path | None) -> dict[str, Facts]:
    if memory is None:
        return {}
    try:
        stored: Any = json.loads(read_regular(memory, LARGEST_TEXT))
        return {mark: Facts(**fields) for mark, fields in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _remember(memory: Path, known: dict[str, Facts]) -> None:
    """Written whole or not at all; a full disk only costs the time of looking again."""
    text = json.dumps({mark: asdict(facts) for mark, facts in known.items()})
    with suppress(CheckpointError):
        save_bytes(memory, text.encode(), aside=False)
