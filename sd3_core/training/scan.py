"""What a picture's file holds, found by decoding it once; remembered while the file stays as it is.

Decoding everything is the only way to find what is broken before training starts.  For a large
dataset it takes minutes, hence the memory.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.save import save_bytes
from ..decode import RULES, decode
from ..errors import CheckpointError
from ..reading import LARGEST_PICTURE, LARGEST_TEXT, read_regular, reason
from .duplicates import perceptual_hash

WORKERS = 8  # threads at most; decoders let go of Python's lock, and each holds a whole picture
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

    def facts(path: Path, mark: str | None) -> Facts:
        return known.get(mark or "") or look_at(path)

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
