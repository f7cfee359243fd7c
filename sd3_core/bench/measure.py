"""Clocks and memory of one process."""

import gc
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..memory import trim_heap

STATUS = Path("/proc/self/status")  # Linux; elsewhere memory is not measured
SAMPLING = 0.002  # seconds between two looks at the memory


@dataclass(frozen=True)
class Time:
    """Seconds of one run: of all threads together, on the wall, and on the GPU (else None)."""

    cpu: float
    wall: float
    gpu: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes; resident counts mapped files, private does not; None where it cannot be told."""

    resident: int | None
    private: int | None
    gpu: int | None = None


def timed(work: Callable[[], object], device: torch.device) -> Time:
    """One run; a GPU's clock is its own events, and what it still had to do is done before."""
    events = None
    if device.type == "cuda":
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    if events:
        events[0].record()
    work()
    if events:
        events[1].record()
        torch.cuda.synchronize(device)
    gpu = events[0].elapsed_time(events[1]) / 1000 if events else None
    return Time(time.process_time() - cpu, time.perf_counter() - wall, gpu)


def traffic(work: Callable[[], object], device: torch.device) -> dict[str, int | None]:
    """Of one run on a GPU: bytes that came from the host, and kernels that ran."""
    if device.type != "cuda":
        return {"moved": None, "kernels": None}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize(device)
    found: Any = profiler.profiler
    events = list(found.kineto_results.events())
    copies = [event for event in events if "HtoD" in event.name()]
    known = all(hasattr(event, "nbytes") for event in copies)
    return {
        "moved": sum(event.nbytes() for event in copies) if known else None,
        "kernels": sum(not event.name().startswith("Mem") for event in events),
    }


def memory() -> Memory:
    """What this process holds now."""
    if not sys.platform.startswith("linux") or not STATUS.exists():
        return Memory(None, None)
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    resident, private = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon"))
    return Memory(resident, private)


def give_back_memory() -> None:
    """What is free in the heap goes back to the system, so that what comes next is seen to grow."""
    gc.collect()
    trim_heap()


def peak(work: Callable[[], object], device: torch.device) -> Memory:
    """The most this process held during one run: all of it, not only what the run added."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seen = [memory()]
    done = threading.Event()

    def look() -> None:
        while not done.wait(SAMPLING):
            seen.append(memory())

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    if seen[0].resident is None:
        return Memory(None, None, gpu)
    return Memory(max(m.resident or 0 for m in seen), max(m.private or 0 for m in seen), gpu)
