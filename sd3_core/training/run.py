"""A run's folder, <output>/sd3/<run_name>/: all that outlives the process that trains.

    config.json   what the run is: its settings, and the identity of what it reads
    data.json     what it is taught from, item by item, so as to name what changed
    state/        what it takes to go on: the newest states and the best one
    log.jsonl     a line for each step and each measurement
    curve.png     the loss, drawn
    samples/      pictures on the way
    lora/         the products; model/ where a whole network is trained

A run is one and the same as long as its name and identity are.  One process at a time has it open.
"""

import json
import os
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..checkpoints.header import read_header
from ..checkpoints.save import save_bytes, save_tensors, writing
from ..checkpoints.tensors import read_tensors
from ..errors import CheckpointError, cut, quoted
from ..plain_text import as_json
from ..reading import LARGEST_TEXT, open_regular, read_regular
from .contents import Contents, changes, read_contents, write_contents
from .entries import checksum

FORMAT = 1
LOG = "log.jsonl"
LONGEST_NAME = 100
LONGEST_BYTES = 190  # a file's name has 255, and what is written in the folder adds to its own
_STATE = re.compile(r"step-(\d{8})\.safetensors")
_LEFT_BEHIND = re.compile(r"\..*\.part|.*\.tmp")  # of a process that was killed while writing
_RESERVED = re.compile(  # Windows' own names; to it com¹ is one, too
    r"(con|prn|aux|nul|(com|lpt)[\d\u00b9\u00b2\u00b3]) *(\..*)?", re.IGNORECASE
)


class RunRefused(ValueError):
    """A run of this name cannot go on: says what differs, or who has it open."""


@dataclass(frozen=True)
class State:
    """A moment of a run, from which it goes on exactly as if it had never stopped."""

    step: int  # steps done
    tensors: dict[str, Tensor]
    values: dict[str, Any] = field(default_factory=dict)  # as JSON holds them


def run_folder(output: Path, name: str) -> Path:
    """Where the run of this name lives.

    Raises ValueError for a name that is no plain folder name: a run never leaves its place; and for
    an output that is a file.
    """
    home = output / "sd3"
    nearest = next(path for path in (home, *home.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(
            f"output is {quoted(str(output))}, but {nearest} is a file; name a folder."
        )
    return named_folder(home, name, "run_name")


def named_folder(home: Path, name: str, what: str) -> Path:
    """The folder of this name in `home`, which it never leaves.

    what: the setting that the name comes from.  Raises ValueError.
    """
    plain = re.fullmatch(r"\w[\w .+-]*", name) and name == name.rstrip(" .")
    if not plain or len(name) > LONGEST_NAME or not is_usable_name(name):
        raise ValueError(
            f"{what} is {quoted(name)}; use letters, digits, spaces and _ - + . (up to "
            f"{LONGEST_NAME}, {LONGEST_BYTES} bytes, beginning with a letter or digit): it becomes "
            "a folder."
        )
    folder = home / name
    if folder.resolve().parent != home.resolve():
        raise ValueError(f"{folder}: is a link to another place; it has to be a folder of its own.")
    return folder


def is_usable_name(name: str) -> bool:
    """Whether files of this name, with endings, can be made on every system."""
    short = len(name.encode(errors="replace")) <= LONGEST_BYTES
    return short and not _RESERVED.fullmatch(name)


def plain_name(text: str) -> str:
    """The nearest name that named_folder takes."""
    name = _short(re.sub(r"[^\w .+-]", "_", text).lstrip(" .+-"))
    return _short(f"_{name}") if _RESERVED.fullmatch(name) else name or "run"


def _short(name: str) -> str:
    within = name[:LONGEST_NAME].encode()[:LONGEST_BYTES].decode(errors="ignore")
    return within.rstrip(" .")


class Run:
    """An open run; see open_run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lines: list[dict[str, Any]] = []  # of the log
        self.damaged: dict[Path, str] = {}  # states that `newest` could not read, and why
        self._log: IO[str] | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    # Identity

    def settle(
        self,
        identity: Mapping[str, Any],
        steps: int,
        settings: Mapping[str, Any],
        contents: Mapping[str, Contents] | None = None,
    ) -> None:
        """Make sure that this is the run that is asked for; write down what it is.

        identity: what must not change once a step is done, as JSON holds it.  steps: may rise, or
        fall to what is done.  contents: what stands behind entries of the identity.
        Raises RunRefused with the list of what differs.
        """
        known = self._config()
        identity, contents = json.loads(json.dumps(identity)), contents or {}
        if known is not None:  # what has become free since then cannot differ
            before = known["identity"].items()
            kept = {k: v for k, v in before if k in identity or k not in settings}
            known = {**known, "identity": kept}
        reached = max(self.states(), default=0)
        if known is not None and known["identity"] != identity and reached == 0:
            # Nothing was learnt yet, for example because the memory did not suffice.
            for path in (self.folder / "state").glob("*.safetensors"):
                path.unlink()
            known = None
        if known is not None:
            lines = self._differences(known["identity"], identity, contents)
            if steps < reached:
                lines.append(f"steps: {known['steps']} -> {steps} ({reached} are done already)")
            if lines:
                raise RunRefused(
                    f"there is a run named {quoted(self.name)} with other settings:\n  "
                    + "\n  ".join(lines)
                    + f"\nGive this one another run_name, take the old settings back, or delete "
                    f"{self.folder}."
                )
        data = self.folder / "data.json"
        if contents and (known is None or not data.exists()):
            write_contents(data, contents, identity)
        if known is not None and known["steps"] == steps:
            return
        config = {
            "format": FORMAT,
            "steps": steps,
            "identity": identity,
            "settings": dict(settings),
            "torch": str(torch.__version__),
        }
        text = as_json(config, indent=1)
        save_bytes(self.folder / "config.json", text.encode(), aside=False)

    def _differences(
        self,
        known: Mapping[str, Any],
        asked: Mapping[str, Any],
        contents: Mapping[str, Contents],
    ) -> list[str]:
        """A line for each entry that is not the same, or for each change behind it."""
        before = read_contents(self.folder / "data.json", known)
        lines = []
        for name in dict.fromkeys((*known, *asked)):
            old, new = known.get(name), asked.get(name)
            if old == new:
                continue
            if name in before and name in contents:
                lines += [f"{name}: {line}" for line in changes(before[name], contents[name])]
            else:
                lines.append(f"{name}: {_shown(old)} -> {_shown(new)}")
        return lines

    def _config(self) -> dict[str, Any] | None:
        path = self.folder / "config.json"
        if not path.exists():
            if self.states():
                raise RunRefused(f"{path}: is missing, so its states belong to unknown settings.")
            return None
        try:
            config = json.loads(read_regular(path, LARGEST_TEXT))
            if not (isinstance(config["steps"], int) and isinstance(config["identity"], dict)):
                raise TypeError("steps or identity is of the wrong kind")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunRefused(
                f"{path}: is damaged ({cut(error)}). Give another run_name, or delete "
                f"{self.folder}."
            ) from error
        if config.get("format") != FORMAT:
            raise RunRefused(f"{path}: was written by another version of this program.")
        return config

    # States

    def states(self) -> dict[int, Path]:
        """The saved states by their number of steps, oldest first."""
        folder = self.folder / "state"
        names = (_STATE.fullmatch(path.name) for path in folder.glob("*") if path.is_file())
        return {int(name[1]): folder / name[0] for name in sorted(filter(None, names), key=_number)}

    def save(self, state: State, keep: int, best: int | None) -> Path:
        """Write a state, then drop what is neither among the newest `keep` nor the best.

        Raises CheckpointError when it cannot be written; the older states are untouched then.
        """
        path = self.folder / "state" / f"step-{state.step:08}.safetensors"
        values = {"format": FORMAT, "step": state.step, **state.values}
        values = json.loads(json.dumps(values))  # as it will be read
        values["crc32"] = _checksum(values, state.tensors)
        text = json.dumps(values, sort_keys=True)
        save_tensors(path, state.tensors, {"sd3_workbench.state": text})
        states = self.states()
        for step in sorted(states)[:-keep]:
            if step != best:
                with suppress(OSError):  # Windows, while a program has it open
                    states[step].unlink(missing_ok=True)
        return path

    def newest(self) -> State | None:
        """The newest state that can be read; None at the beginning of a run.

        Those above it are in `damaged` then.  Raises CheckpointError when there are states and none
        can be read.
        """
        self.damaged = {}
        for path in reversed(self.states().values()):
            try:
                return read_state(path)
            except CheckpointError as error:  # a disk that lost power may leave a file short
                self.damaged[path] = str(error)
        if self.damaged:
            raise CheckpointError(
                f"{self.folder}: no saved state can be read ({next(iter(self.damaged.values()))}) "
                f"Put a copy of one into {self.folder / 'state'}, or delete {self.folder} to begin "
                "anew."
            )
        return None

    def put_aside(self) -> None:
        """Rename the damaged states, so that they do not count as saved and nothing is lost."""
        for path in self.damaged:
            with suppress(OSError):
                path.replace(path.with_name(f"{path.name}.damaged"))

    # Log

    def rewind(self, step: int, looked: bool) -> None:
        """Drop what the log says of later steps, which will come again.

        looked: whether this step's own measurements are done; else they come again too.
        """
        self.close_log()
        path = self.folder / LOG
        self.lines = [
            line
            for line in read_log(self.folder)
            if line["step"] < step or (line["step"] == step and (looked or "loss" in line))
        ]
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        save_bytes(path, text.encode(), aside=False)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line to the log."""
        path = self.folder / LOG
        with writing(path):
            if self._log is None:
                self._log = path.open("a", encoding="utf-8", buffering=1)
            self._log.write(json.dumps(line) + "\n")
        self.lines.append(dict(line))

    def close_log(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            with writing(self.folder / LOG):
                log.close()


def _number(name: re.Match[str]) -> int:
    return int(name[1])


def read_log(folder: Path) -> list[dict[str, Any]]:
    """A run's log: its steps and its measurements.  A line that a crash tore is left out."""
    path = folder / LOG
    if not path.exists():
        return []
    found = []
    with open_regular(path) as file:  # a long run's may be of any size
        texts = file.read().decode(errors="replace").splitlines()
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            found.append(line)
    return found


def read_state(path: Path) -> State:
    """A saved state, in memory.  Raises CheckpointError."""
    try:
        header = read_header(path)
        tensors = read_tensors(header)
    except CheckpointError as error:
        # It was written here: there is nothing to download.
        raise CheckpointError(re.sub(r" Download [^.]*\.$", "", str(error))) from error
    try:
        values = json.loads(header.metadata["sd3_workbench.state"])
        stored = values.pop("crc32", None)  # older states have none
        if stored is not None and stored != _checksum(values, tensors):
            raise ValueError("its checksum does not fit")
        step, version = values.pop("step"), values.pop("format")
        if type(step) is not int:
            raise ValueError(f"step is {quoted(step)}")
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged, or no state of a run ({error}).") from error
    if version != FORMAT:
        raise CheckpointError(f"{path}: was written by another version of this program.")
    return State(step, tensors, values)


def _checksum(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of a state; `values` as they are stored, without it."""
    text = json.dumps(values, sort_keys=True)
    return zlib.crc32(text.encode(), checksum({k: t.detach().cpu() for k, t in tensors.items()}))


def _shown(value: Any) -> str:
    text = as_json(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def open_run(output: Path, name: str) -> Iterator[Run]:
    """The run of this name, made or found, for this process alone.

    Raises ValueError for the name and RunRefused when another process has the run open.
    """
    folder = run_folder(output, name)
    try:
        (folder / "state").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made: {error.strerror or error}.") from error
    with _locked(folder / "lock"):
        for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            sweep(place.iterdir())
        run = Run(folder)
        try:
            yield run
        finally:
            run.close_log()


def sweep(paths: Iterable[Path]) -> None:
    """Delete what a killed process was writing."""
    for path in paths:
        if _LEFT_BEHIND.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system itself takes back when the process ends, however it ends."""
    with writing(path):
        file = path.open("a+", encoding="utf-8")
    with file:
        if not _lock(file):
            raise RunRefused(
                f"the run {quoted(path.parent.name)} is being trained by another process"
                f"{_holder(path)}. Wait for it, or stop it."
            )
        with writing(holder := path.with_name("lock.txt")):
            holder.write_text(
                f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M')}", encoding="utf-8"
            )
        try:
            yield
        finally:
            path.with_name("lock.txt").unlink(missing_ok=True)
            _unlock(file)


def _holder(path: Path) -> str:
    try:
        return f" ({path.with_name('lock.txt').read_text(encoding='utf-8')})"
    except OSError:
        return ""


if os.name == "nt":
    import msvcrt

    def _lock(file: IO[str]) -> bool:
        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(file: IO[str]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(file: IO[str]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(file: IO[str]) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
