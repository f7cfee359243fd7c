"""What a device can do at most: the limits that measured times are compared with."""

from collections.abc import Callable, Iterator, Mapping
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..models.onednn import linear
from .floor import MATMUL
from .measure import timed

ROUNDS, WARM = 10, 3
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def measure(
    device: torch.device,
    side: int = 8192,
    tokens: int = 4429,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, float]:
    """Name -> TFLOP/s of products, TB/s of a copy, TFLOP/s of attention by back end.

    side: of the square matrices.  tokens: of attention with SD3 Medium's 24 heads, batch 2.
    A back end that does not run here is left out.
    """
    matrix = torch.randn(side, side, device=device).to(dtype)
    found = {
        MATMUL: 2 * side**3 / seconds(lambda: linear(matrix, matrix, None), device) / 1e12,
        "copy TB/s": 2 * matrix.nbytes / seconds(matrix.clone, device) / 1e12,
    }
    q, k, v = (torch.randn(2, 24, tokens, 64, device=device).to(dtype) for _ in range(3))
    for name, backend in BACKENDS.items():
        try:
            took = seconds(lambda backend=backend: attend(backend, q, k, v), device)
        except RuntimeError:
            continue
        found[f"attention ({name}) TFLOP/s"] = 4 * 2 * 24 * tokens**2 * 64 / took / 1e12
    return found


def attend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def of_cpu(side: int = 1024) -> dict[str, float]:
    """Of all threads together: what a second of CPU time multiplies at most, in float32."""
    cpu = torch.device("cpu")
    matrix = torch.randn(side, side)
    return {MATMUL: 2 * side**3 / seconds(lambda: linear(matrix, matrix, None), cpu) / 1e12}


@torch.no_grad()
def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of one run; the device's own clock where it has one."""
    times = [timed(work, device) for _ in range(WARM + ROUNDS)][WARM:]
    return median(time.gpu if time.gpu is not None else time.cpu for time in times)


def lines(found: Mapping[str, float]) -> Iterator[str]:
    yield "limits of this device:"
    for name, value in found.items():
        yield f"  {name:<32}{value:10.3g}"
