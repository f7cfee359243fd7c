"""Run cases: prepare every arm, compare what they give, and only then let the clocks run."""

import json
import math
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from ..models.fused import NO_TRITON
from .arms import APPROXIMATIONS
from .cases import (
    TOLERANCE,
    Case,
    as_json,
    make_inputs,
    tolerance,
    warm_up_case,
    write_weights,
)
from .floor import floor_seconds

PACK = Path(__file__).resolve().parent.parent.parent
OURS = "ours"
PLAIN = "ours-plain"  # without the modulation table
IN_COMFYUI = "ours-in-comfyui"  # our MODEL under ComfyUI's sampler
# With a part of the device's memory: those that can carry a network larger than it.
WITHIN = ("comfyui", IN_COMFYUI, "diffusers")
NO_ANSWER = 300.0  # seconds after which an arm is given up
# Stability's loader is a part of its command line; SDPA makes no difference to ComfyUI's.
NO_LOADERS = ("reference", "comfyui-sdpa", PLAIN, IN_COMFYUI)
# Trainers whose loss, first adapters and draws are their own: it need only be finite.
OWN_LOSS = ("comfyui", "comfyui-sdpa")


@dataclass(frozen=True)
class Options:
    reference: Path | None = None  # folder of Stability's sd3.5 code
    device: str = "cpu"
    threads: int | None = None  # None: as torch decides
    rounds: int = 5
    load_rounds: int = 5  # each starts every arm anew
    in_turn: bool = False  # one arm's network at a time on the device, instead of interleaved
    compiled: str = ""  # torch.compile's backend for arms of their own; empty: no such arms
    limit: float | None = None  # seconds for everything; what does not begin by then is left out
    ceilings: Mapping[str, float] = field(default_factory=dict)  # of the device, see ceilings.py


@dataclass
class Measured:
    """One arm in one case; seconds of each round, in the clock of the device."""

    difference: float | None = None  # largest, from our output
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    memory: dict[str, int | None] = field(default_factory=dict)
    trained: int | None = None  # parameters, where the case is a training
    traffic: dict[str, int | None] = field(default_factory=dict)  # see measure.traffic
    prepared: float = 0.0  # seconds of making ready: loading, recording, compiling, a first run


@dataclass
class Outcome:
    """One case; `wrong` names the arms that disagree, and then nobody was timed."""

    case: Case
    part: str = ""  # "call" or "touched" for loading
    scale: float = 0.0  # largest value of our output
    arms: dict[str, Measured] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # arm -> why it could not
    wrong: list[str] = field(default_factory=list)
    floor: float | None = None  # seconds, see floor.py

    @property
    def ours(self) -> str:
        """The arm that the others are compared with."""
        return IN_COMFYUI if self.case.memory_gb else OURS

    @property
    def failed(self) -> bool:
        return bool(self.wrong) or self.ours in self.left_out


class Process(Protocol):
    """What run_case needs of a worker."""

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer; what went wrong stands in it under "error"."""
        ...


class Deadline:
    """The end of the time for all cases; None: there is none."""

    def __init__(self, limit: float | None = None):
        self.end = None if limit is None else time.monotonic() + limit

    @property
    def left(self) -> float:
        """Seconds for one answer."""
        return NO_ANSWER if self.end is None else min(NO_ANSWER, self.end - time.monotonic())


class WorkerProcess:
    """One arm's worker.py, running."""

    def __init__(self, options: Mapping[str, Any], deadline: Deadline | None = None):
        self.deadline = deadline or Deadline()
        # Open as long as the process: closed in close().
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        # Threads that wait in a spin loop would be billed for the time of others.
        quiet = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
        threads = {"OMP_NUM_THREADS": str(options["threads"])} if options["threads"] else {}
        plain = {NO_TRITON: "1"} if options.get("memory_gb") else {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sd3_core.bench.worker", json.dumps(dict(options))],
            cwd=PACK,
            env={**os.environ, **quiet, **threads, **plain, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            encoding="utf-8",
        )
        self.greeting: dict[str, Any] | None = None
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()  # pipes have no timeout
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request, or what ended the process."""
        if self.greeting is None:
            self.greeting = self._answer()
        if "error" in self.greeting:
            return self.greeting
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            return {"error": self._last_words()}
        return self._answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join(timeout=5)  # it sees the end of the pipe that it reads
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what was still to be said to a process that is gone
                if pipe is not None:
                    pipe.close()
        self.log.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")  # the process ended

    def _answer(self) -> dict[str, Any]:
        wait = max(0.0, self.deadline.left)
        try:
            line = self.lines.get(timeout=wait)
        except queue.Empty:
            self.process.kill()
            self.greeting = {"error": f"gave no answer in {wait:.0f} s"}
            return self.greeting
        return json.loads(line) if line else {"error": self._last_words()}

    def _last_words(self) -> str:
        self.process.wait()
        self.log.seek(0)
        said = self.log.read().strip().splitlines()
        return f"ended with status {self.process.returncode}: {said[-1] if said else 'silently'}"


def arms_here(options: Options) -> dict[str, dict[str, Any]]:
    """Arm -> options of its worker, for what is installed here.

    Raises ValueError when a folder that was named is not what it should be.
    """
    gpu, comfyui = options.device.startswith("cuda"), find_comfyui()
    arms: dict[str, dict[str, Any]] = {}
    if comfyui:
        arms["comfyui"] = {"kind": "comfyui", "folder": str(comfyui)}
        if not gpu:  # there it takes this attention by itself
            arms["comfyui-sdpa"] = {"kind": "comfyui", "folder": str(comfyui), "sdpa": True}
    arms[OURS] = {"kind": "ours"}
    if gpu:
        arms[f"{OURS}-graph"] = {"kind": "ours", "way": "graph"}
    if find_spec("diffusers"):
        arms["diffusers"] = {"kind": "diffusers"}
    arms[PLAIN] = {"kind": "ours", "plain": True}
    if comfyui:
        arms[IN_COMFYUI] = {"kind": IN_COMFYUI, "folder": str(comfyui)}
    for name in APPROXIMATIONS:
        arms[f"{OURS}-{name}"] = {"kind": "ours", "approximation": name}
    if options.compiled:
        compiled = {"backend": options.compiled}
        arms[f"{OURS}-compile"] = {"kind": "ours", "way": "compile"} | compiled
        if "diffusers" in arms:
            arms["diffusers-compile"] = {"kind": "diffusers"} | compiled
    if options.reference:
        if not (options.reference / "mmditx.py").is_file():
            raise ValueError(
                f"{options.reference}: holds no mmditx.py. Give the folder of Stability's sd3.5 "
                "code, or leave --reference away."
            )
        arms["reference"] = {"kind": "reference", "folder": str(options.reference.resolve())}
    common = {"device": options.device, "threads": options.threads}
    return {name: arm | common for name, arm in arms.items()}


def find_comfyui() -> Path | None:
    """ComfyUI's checkout: COMFYUI_PATH, or the place where comfy-cli puts it."""
    named = os.environ.get("COMFYUI_PATH")
    place = Path(named).expanduser() if named else Path.home() / "comfy" / "ComfyUI"
    if (place / "comfy" / "sd.py").is_file():
        return place.resolve()
    if named:
        raise ValueError(f"COMFYUI_PATH is {named}, which holds no ComfyUI checkout.")
    return None


def run_cases(cases: Sequence[Case], options: Options) -> Iterator[Outcome]:
    """Every case, one after the other.  Weights and inputs live in a temporary folder."""
    arms, deadline = arms_here(options), Deadline(options.limit)
    ceilings = options.ceilings
    with tempfile.TemporaryDirectory(prefix="sd3-bench-") as folder, ExitStack() as stack:
        workers: dict[str, WorkerProcess] = {}
        for case in cases:
            if case.work == "load":
                yield from run_load(case, arms, Path(folder), options.load_rounds)
                continue
            measured = run_in_turn if options.in_turn else run_case
            if case.memory_gb:
                within = {name: arms[name] for name in WITHIN if name in arms}
                within = {n: arm | {"memory_gb": case.memory_gb} for n, arm in within.items()}
                with started(within, deadline) as small:
                    outcome = measured(case, small, Path(folder), options.rounds, options.device)
            else:
                if not workers:
                    workers |= stack.enter_context(started(arms, deadline))
                outcome = measured(case, workers, Path(folder), options.rounds, options.device)
            outcome.floor = floor_seconds(case, ceilings)
            yield outcome


@contextmanager
def started(
    arms: Mapping[str, Mapping[str, Any]], deadline: Deadline | None = None
) -> Iterator[dict[str, WorkerProcess]]:
    """A worker for every arm."""
    workers = {}
    try:
        for name, arm in arms.items():
            workers[name] = WorkerProcess(arm, deadline)
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def run_case(
    case: Case,
    workers: Mapping[str, Process],
    folder: Path,
    rounds: int,
    device: str = "cpu",
) -> Outcome:
    """Prepare, compare, and time in turns: every round begins with another arm."""
    outcome, workers, given = begun(case, workers, folder, device)
    for name, worker in workers.items():
        prepare(outcome, name, worker, given, folder)
    compare(outcome, folder)
    if outcome.failed:
        return outcome
    names = list(outcome.arms)
    for index in range(rounds):
        for name in turned(names, index):
            record(outcome, name, workers[name].ask({"do": "run"}))
    for name in names:
        outcome.arms[name].memory |= workers[name].ask({"do": "peak"}).get("memory", {})
    return outcome


def run_in_turn(
    case: Case, workers: Mapping[str, Process], folder: Path, rounds: int, device: str
) -> Outcome:
    """One arm after the other, each alone on the device; what is not equal loses its times."""
    outcome, workers, given = begun(case, workers, folder, device)
    for name, worker in workers.items():
        prepare(outcome, name, worker, given, folder)
        for _ in range(rounds):
            if name in outcome.arms:
                record(outcome, name, worker.ask({"do": "run"}))
        if name in outcome.arms:
            measured = outcome.arms[name]
            measured.memory |= worker.ask({"do": "peak"}).get("memory", {})
            measured.traffic = worker.ask({"do": "traffic"}).get("traffic", {})
        worker.ask({"do": "release"})
    compare(outcome, folder)
    if outcome.failed:
        for measured in outcome.arms.values():
            measured.seconds, measured.wall = [], []
    return outcome


def begun(
    case: Case, workers: Mapping[str, Process], folder: Path, device: str
) -> tuple[Outcome, dict[str, Process], dict[str, Any]]:
    """An empty outcome, the arms that take part, and what they are told."""
    taking = {name: worker for name, worker in workers.items() if takes_part(name, case)}
    return Outcome(case), taking, write_case(case, folder, device)


def write_case(case: Case, folder: Path, device: str) -> dict[str, Any]:
    """What every arm is told of a case, its files written."""
    file, inputs = write_weights(case, folder, device), folder / "inputs.safetensors"
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # the arms need it
    save_file(make_inputs(case), inputs)
    return {"case": as_json(case), "file": str(file), "inputs": str(inputs)}


def prepare(
    outcome: Outcome, name: str, worker: Process, given: Mapping[str, Any], folder: Path
) -> None:
    """Let an arm make ready and write its output; one that cannot is left out."""
    output, began = folder / f"{name}.safetensors", time.monotonic()
    answer = worker.ask({"do": "prepare", "with": {**given, "output": str(output)}})
    if "error" in answer:
        outcome.left_out[name] = answer["error"]
        return
    outcome.arms[name] = Measured(
        memory={"grown": answer["grown"]},  # during the first run, with what it keeps
        trained=answer["trained"],
        prepared=time.monotonic() - began,
    )


def takes_part(arm: str, case: Case) -> bool:
    """The variants of ours meet where they differ; nobody else has a table."""
    if case.arms:
        return arm in case.arms
    if arm == PLAIN:
        return case.work in ("sample", "modulate")
    if arm == IN_COMFYUI or arm.startswith(f"{OURS}-") or arm.endswith("-compile"):
        return case.work == "sample"
    return arm == OURS or case.work != "modulate"


def is_approximate(arm: str) -> bool:
    return arm.removeprefix(f"{OURS}-") in APPROXIMATIONS


def turned(names: Sequence[str], index: int) -> list[str]:
    """The arms in a new order for each round."""
    start = index % len(names)
    return [*names[start:], *names[:start]]


def compare(outcome: Outcome, folder: Path) -> None:
    """Every arm's output against ours.  How far an approximation lies from it is shown only."""
    if outcome.ours not in outcome.arms:
        outcome.left_out.setdefault(outcome.ours, "it is not among the arms")
        return
    outputs = {name: load_file(folder / f"{name}.safetensors")["output"] for name in outcome.arms}
    ours = outputs[outcome.ours]
    outcome.scale = float(ours.abs().max())
    allowed = tolerance(outcome.case) * outcome.scale
    for name, output in outputs.items():
        if output.shape != ours.shape:
            outcome.wrong.append(name)
            continue
        if outcome.case.work == "train" and name in OWN_LOSS:
            if not output.isfinite().all():
                outcome.wrong.append(name)
            continue
        difference = float((output - ours).abs().max())
        outcome.arms[name].difference = difference
        if not difference <= (math.inf if is_approximate(name) else allowed):  # NaN is wrong too
            outcome.wrong.append(name)


def record(outcome: Outcome, name: str, answer: Mapping[str, Any]) -> None:
    """Keep one run's times; an arm that fails on the way leaves the case."""
    if "error" in answer:
        outcome.left_out[name] = answer["error"]
        outcome.arms.pop(name, None)
    elif name in outcome.arms:
        keep_time(outcome.arms[name], answer["time"])


def keep_time(measured: Measured, time: Mapping[str, float | None]) -> None:
    """A GPU's own clock where there is one, else the CPU time of all threads."""
    seconds = time["cpu"] if time["gpu"] is None else time["gpu"]
    assert seconds is not None
    assert time["wall"] is not None
    measured.seconds.append(seconds)
    measured.wall.append(time["wall"])


def run_load(
    case: Case, arms: Mapping[str, Mapping[str, Any]], folder: Path, rounds: int
) -> list[Outcome]:
    """Load in a fresh process each time: the call alone, and the call and one look at each weight.

    Every arm's weights must have the same sums as ours before a time is kept.
    """
    file = write_weights(case, folder)  # so that it is in the page cache
    arms = {name: arm for name, arm in arms.items() if name not in NO_LOADERS and loads(name)}
    answers = [load_once(case, arms, folder, file, index) for index in range(rounds)]
    return [load_outcome(case, part, answers) for part in ("call", "touched")]


def loads(arm: str) -> bool:
    """Whether an arm's way of loading is its own."""
    return arm == OURS or not (arm.startswith(f"{OURS}-") or arm.endswith("-compile"))


def load_once(
    case: Case,
    arms: Mapping[str, Mapping[str, Any]],
    folder: Path,
    file: Path,
    index: int,
) -> dict[str, dict[str, Any]]:
    """Arm -> its answer.  A small file comes first: what is imported late is no part of loading."""
    small = warm_up_case(case)
    requests = [
        {"do": "load", "with": {"case": as_json(one), "file": str(path)}}
        for one, path in ((small, write_weights(small, folder)), (case, file))
    ]
    with started(arms) as workers:
        for worker in workers.values():
            worker.ask(requests[0])
        return {name: workers[name].ask(requests[1]) for name in turned(list(workers), index)}


def load_outcome(
    case: Case, part: str, rounds: Sequence[Mapping[str, Mapping[str, Any]]]
) -> Outcome:
    outcome = Outcome(case, part)
    for name in rounds[0]:
        errors = [answers[name]["error"] for answers in rounds if "error" in answers[name]]
        if errors:
            outcome.left_out[name] = errors[0]
        else:
            outcome.arms[name] = Measured(memory=rounds[-1][name]["memory"])
    for answers in rounds:
        compare_sums(outcome, answers)
    if not outcome.failed:
        for name, measured in outcome.arms.items():
            for answers in rounds:
                keep_time(measured, answers[name][part])
    return outcome


def compare_sums(outcome: Outcome, answers: Mapping[str, Mapping[str, Any]]) -> None:
    if OURS in outcome.left_out:
        return
    ours = answers[OURS]["sums"]
    outcome.scale = max(abs(value) for value in ours)
    for name, measured in outcome.arms.items():
        theirs = answers[name]["sums"]
        difference = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
        measured.difference = difference
        if not difference <= TOLERANCE["load"] * outcome.scale and name not in outcome.wrong:
            outcome.wrong.append(name)


def surroundings(options: Options) -> dict[str, Any]:
    """Where and with what it was measured."""
    versions = {}
    if find_spec("diffusers"):
        from importlib.metadata import version

        versions["diffusers"] = version("diffusers")
    comfyui = find_comfyui()
    if comfyui:
        text = (comfyui / "comfyui_version.py").read_text(encoding="utf-8")
        versions["comfyui"] = text.rpartition('"')[0].rpartition('"')[2]
    gpu = options.device.startswith("cuda")
    return {
        "torch": str(torch.__version__),
        **versions,
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(options.device) if gpu else "cpu",
        "threads": options.threads or torch.get_num_threads(),
        "rounds": options.rounds,
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
