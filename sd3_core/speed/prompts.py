"""Prompts that were encoded before, on disk: a known one never opens a text encoder.

An entry is the conditioning of one prompt, in float32 as it was computed.  Its name is a hash of
what it came from (see TextEncoders); no word of a prompt is stored.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path

from ..checkpoints.header import read_header
from ..checkpoints.save import save_tensors
from ..checkpoints.tensors import read_tensors
from ..conditioning import Conditioning
from ..errors import CheckpointError

PLACE = "SD3_WORKBENCH_PROMPT_CACHE"  # environment variable: a folder, or "off"
LIMIT = 2**30  # bytes: some 400 prompts of 154 tokens
ENDING = ".safetensors"
HASH = re.compile("[0-9a-f]{64}")
LOOKUPS: Counter[str] = Counter()  # "hit" and "missed", of this program so far


class PromptCache(MutableMapping[str, Conditioning]):
    """Hash -> conditioning, in files of one folder; past `limit` bytes the longest unused leave.

    Several programs may share the folder, on one machine or many: a file is written whole or not at
    all, and one that another program took away is a prompt to encode.  A folder that cannot be
    written costs the cache, never the run.
    """

    def __init__(self, folder: Path, limit: int = LIMIT):
        self.folder, self.limit = folder, limit

    def __getitem__(self, key: str) -> Conditioning:
        path = self._path(key)
        try:
            tensors = read_tensors(read_header(path))
        except (CheckpointError, OSError) as error:  # missing or damaged
            LOOKUPS["missed"] += 1
            raise KeyError(key) from error
        with suppress(OSError):  # in a folder that may only be read
            os.utime(path)  # the age that decides which entry leaves
        LOOKUPS["hit"] += 1
        return Conditioning(tensors["context"], tensors["pooled"])

    def __setitem__(self, key: str, conditioning: Conditioning) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            save_tensors(
                self._path(key), {"context": conditioning.context, "pooled": conditioning.pooled}
            )
            self._make_room()
        except (CheckpointError, OSError):
            return

    def __delitem__(self, key: str) -> None:
        try:
            self._path(key).unlink()
        except OSError as error:
            raise KeyError(key) from error

    def __iter__(self) -> Iterator[str]:
        names = (path.stem for path in self.folder.glob(f"*{ENDING}"))
        return (name for name in names if HASH.fullmatch(name))  # nothing else is ours to delete

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{ENDING}"

    def _make_room(self) -> None:
        entries = []
        for key in self:
            try:
                state = self._path(key).stat()
            except OSError:  # another program's work
                continue
            entries.append((state.st_mtime_ns, state.st_size, key))
        surplus = sum(size for _, size, _ in entries) - self.limit
        for _, size, key in sorted(entries):
            if surplus <= 0:
                break
            with suppress(KeyError):  # another program's work
                del self[key]
            surplus -= size


def users_cache() -> PromptCache | None:
    """The cache in the place that PLACE names, else in the user's own cache folder; None: off.

    Raises ValueError when PLACE names a file.
    """
    named = os.environ.get(PLACE, "")
    if named.lower() in ("off", "0"):
        return None
    folder = Path(named).expanduser() if named else usual_folder() / "sd3-workbench" / "prompts"
    if folder.is_file():
        raise ValueError(f"{PLACE} is {folder}, a file; name a folder, or say off.")
    return PromptCache(folder)


def usual_folder() -> Path:
    """Where programs of this system keep what they can make again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
