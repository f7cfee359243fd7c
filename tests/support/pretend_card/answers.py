"""What torch.cuda, torch.mps and torch.xpu say of the card while it is open."""

import contextlib
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from .card import Card
from .kernels import attention, one_rms_norm

SHARED = (  # of what torch.cuda answers, and torch.mps and torch.xpu have under the same name
    "is_available",
    "is_initialized",
    "_lazy_init",
    "device_count",
    "current_device",
    "set_device",
    "_exchange_device",
    "_maybe_exchange_device",
    "get_device_name",
    "get_device_properties",
    "get_device_capability",
    "mem_get_info",
    "memory_stats",
    "memory_allocated",
    "memory_reserved",
    "max_memory_allocated",
    "reset_peak_memory_stats",
    "synchronize",
    "empty_cache",
    "get_rng_state",
    "set_rng_state",
    "manual_seed",
    "manual_seed_all",
    "Event",
    "Stream",
    "stream",
    "current_stream",
)


def answers(card: Card, name: str) -> dict[Any, dict[str, Any]]:
    """Module -> what is put into it, by name."""
    patches: dict[Any, dict[str, Any]] = {
        torch.nn.functional: {"scaled_dot_product_attention": attention},
        torch._C._nn: {"scaled_dot_product_attention": attention},
    }
    of_cuda = cuda_answers(card, name)
    if card.kind == "cuda":
        patches[torch.cuda] = of_cuda
        patches[torch] = {"rms_norm": one_rms_norm}
        patches[torch.version] = {"cuda": torch.version.cuda or "13.0"}
        return patches
    module: ModuleType = getattr(torch, card.kind)
    patches[module] = {key: of_cuda[key] for key in SHARED if hasattr(module, key)}
    if card.kind == "mps":
        patches[torch.backends.mps] = {"is_available": lambda: True}
        patches[module] |= {
            "current_allocated_memory": lambda: card.live,
            "driver_allocated_memory": lambda: card.live,
            "recommended_max_memory": lambda: card.capacity,
        }
    return patches


def cuda_answers(card: Card, name: str) -> dict[str, Any]:
    def exchange(index: int) -> int:
        before = card.current
        if index >= 0:
            card.current = index
        return before

    def set_device(device: Any) -> None:
        index = device if isinstance(device, int) else torch.device(device).index
        card.current = card.current if index is None else index

    def stats(device: Any = None) -> dict[str, int]:
        kinds = ("active", "reserved", "allocated")
        now = {f"{kind}_bytes.all.current": card.live for kind in kinds}
        return now | {f"{kind}_bytes.all.peak": card.high for kind in kinds}

    properties = properties_of(card, name)
    streams = streams_of(card)
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: card.device.index + 1,
        "current_device": lambda: card.current,
        "set_device": set_device,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "get_device_name": lambda device=None: name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: card.capability,
        "is_bf16_supported": lambda including_emulation=True: card.capability >= (8, 0),
        "get_allocator_backend": lambda: "native",
        "mem_get_info": lambda device=None: (card.free, card.capacity),
        "memory_stats": stats,
        "memory_allocated": lambda device=None: card.live,
        "memory_reserved": lambda device=None: card.live,
        "max_memory_allocated": lambda device=None: card.high,
        "max_memory_reserved": lambda device=None: card.high,
        "reset_peak_memory_stats": lambda device=None: card.reset_high(),
        "set_per_process_memory_fraction": lambda *_: None,
        "synchronize": lambda device=None: card.counts.wait("synchronises"),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "is_current_stream_capturing": lambda: card.capturing,
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=lambda *_: 0,
            cudaHostUnregister=lambda *_: 0,
            cudaError=SimpleNamespace(success=0),
        ),
        **streams,
    }


def properties_of(card: Card, name: str) -> SimpleNamespace:
    """Of a card with Ada's sizes, but for memory and capability."""
    return SimpleNamespace(
        name=name,
        total_memory=card.capacity,
        major=card.capability[0],
        minor=card.capability[1],
        gcnArchName="",
        uuid="0",
        is_integrated=False,
        warp_size=32,
        multi_processor_count=84,
        max_threads_per_multi_processor=1536,
        regs_per_multiprocessor=65536,
        L2_cache_size=2**25,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=101376,
        shared_memory_per_multiprocessor=101376,
    )


def streams_of(card: Card) -> dict[str, Any]:
    """Streams, events and graphs: everything happens in order, at once."""

    class Event:
        def __init__(self, *_: Any, **__: Any):
            pass

        def record(self, *_: Any) -> None:
            pass

        wait = record

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            card.counts.wait("waits for an event")

        def elapsed_time(self, other: "Event") -> float:
            return 1.0

    class Stream:
        cuda_stream = 0
        device = card.device

        def __init__(self, *_: Any, **__: Any):
            pass

        def wait_stream(self, other: "Stream") -> None:
            pass

        wait_event = wait_stream

        def record_event(self, event: Event | None = None) -> Event:
            return event or Event()

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            card.counts.wait("waits for a stream")

        def __enter__(self) -> "Stream":
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Stream)

        def __hash__(self) -> int:
            return 0

    class Graph:
        """Records nothing: replaying leaves the numbers of the recording."""

        def replay(self) -> None:
            pass

    @contextlib.contextmanager
    def recording(graph: Graph, *_: Any, **__: Any):
        before, card.capturing = card.counts.copy(), True
        try:
            yield
        finally:
            card.capturing = False
        waits = card.counts.since(before).waits
        if waits:
            raise RuntimeError(f"operation not permitted when stream is capturing: {list(waits)}")

    return {
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "CUDAGraph": Graph,
        "graph": recording,
    }
