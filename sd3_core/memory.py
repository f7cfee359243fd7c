"""How much memory a device has left, and what to say when it is full."""

import ctypes
import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .errors import OutOfMemory

CGROUP = Path("/sys/fs/cgroup")  # Linux: what a container may take, version 2
# Each of torch's devices has its own words for it, and an error class of its own or none.
FULL = ("out of memory", "can't allocate memory", "not enough memory")


def free_memory(device: torch.device) -> float | None:
    """Bytes that this process may still take on the device; None where nobody tells."""
    if device.type in ("cuda", "xpu"):
        module = getattr(torch, device.type)
        if not hasattr(module, "mem_get_info"):  # Intel's before torch 2.6
            return None
        free, _ = module.mem_get_info(device)
        return free + module.memory_reserved(device) - module.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return min(_available_memory(), _left_to_container())
    return None


def _available_memory() -> float:
    """Linux counts what its file cache would give back; elsewhere only what is free."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = next(line for line in file if line.startswith("MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_to_container() -> float:
    """Infinite where this process is in none, or in one without a limit."""
    try:
        limit = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        lines = (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, StopIteration, ValueError):  # "max" is no number
        return float("inf")
    return limit - used + cached


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in FULL)
    )


def let_go(error: BaseException) -> None:
    """Give back what the functions that an error has left still hold, and torch's own stock."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    for module in (torch.cuda, torch.xpu, torch.mps):
        if module.is_available():
            module.empty_cache()


@contextmanager
def explained(stage: str, *advice: str) -> Iterator[None]:
    """Say in one sentence that a stage does not fit, and what to do; nothing of it stays allocated.

    stage: "sampling".  advice: what a user may change.  Raises OutOfMemory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        let_go(error)
        raise OutOfMemory(f"the memory is full while {stage}. Try {', '.join(advice)}.") from None


def trim_heap() -> None:
    """What is free in the heap goes back to the system; glibc keeps it in each thread's part."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
