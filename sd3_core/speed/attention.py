"""Attention by the quickest of torch's back ends, found by measuring each shape once.

Torch tries its back ends in an order of its own.  Which is quickest for heads of 64 depends on the
card, the length and torch's version, so it is measured, not assumed.
"""

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..models.attention import attention
from ..models.gpu import current

CANDIDATES = {
    "cuda": (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    )
}
WARM, ROUNDS = 2, 5
SAME = 0.02  # of the largest number: how far a back end may lie from torch's own choice
WORTH_IT = 0.97  # of the time of torch's own choice

Clock = Callable[[Callable[[], object]], float]  # seconds of one run


def gpu_seconds(work: Callable[[], object]) -> float:
    """Median of a few runs, in a GPU's own time."""
    for _ in range(WARM):
        work()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return median(times)


def switched_off() -> bool:
    """Whether the user left torch less than all of its back ends."""
    state = torch.backends.cuda
    return not (
        state.flash_sdp_enabled()
        and state.mem_efficient_sdp_enabled()
        and state.math_sdp_enabled()
        and state.cudnn_sdp_enabled()
    )


class MeasuredAttention:
    """models.attention, by the quickest back end for each shape; as it stands where none competes,
    where the user switched one off, with a mask, with gradients, and under torch.compile.
    """

    def __init__(self, clock: Clock = gpu_seconds):
        self.clock = clock
        self.chosen: dict[tuple[object, ...], SDPBackend | None] = {}  # None: torch's own choice

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return attention(q, k, v, mask)
        if q.device.type not in CANDIDATES:
            return attention(q, k, v)
        shape = (q.device, q.dtype, tuple(q.shape), k.shape[2])
        if shape not in self.chosen:
            with current(q.device):
                if switched_off() or is_recording(q):
                    return attention(q, k, v)
                self.chosen[shape] = self.quickest(q, k, v)
        return by(self.chosen[shape], q, k, v)

    def quickest(self, q: Tensor, k: Tensor, v: Tensor) -> SDPBackend | None:
        best, shortest = None, WORTH_IT * self.clock(lambda: by(None, q, k, v))
        for backend in CANDIDATES[q.device.type]:
            try:
                took = self.clock(lambda backend=backend: by(backend, q, k, v))
            except RuntimeError:  # it does not take these, or is not there
                continue
            if took < shortest and is_close(by(backend, q, k, v), by(None, q, k, v)):
                best, shortest = backend, took
        return best


def is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two back ends agree but for rounding in 16 bits; NaN does not."""
    distance = (one.float() - other.float()).abs().max()
    return bool(distance <= SAME * other.float().abs().max())


def by(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if backend is None:
        return attention(q, k, v)
    with sdpa_kernel(backend):
        return attention(q, k, v)


def is_recording(x: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, in which nothing can be measured."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


measured_attention = MeasuredAttention()
