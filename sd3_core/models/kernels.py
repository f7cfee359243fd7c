"""Triton kernels of the MMDiT's blocks: what lies between two matrix products, in one pass.

Imported by fused.py alone and only where Triton is installed.  With TRITON_INTERPRET=1 they run on
a CPU, slowly, which is how the tests compare them.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton's decorator does not tell that a kernel is launched with plain numbers, and with options.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu import current

MANY = 2048  # elements of a program; more of them are shared by 8 warps instead of 4


@triton.jit
def _norm_modulate(
    x,
    gate,
    delta,
    shift,
    scale,
    gated,
    out,
    tokens,
    width,
    x_batch,
    x_token,
    gate_batch,
    shift_batch,
    scale_batch,
    eps,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for each token; delta, gated and out are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + batch * x_batch + token * x_token + columns, mask=inside, other=0.0)
    if GATED:
        change = tl.load(delta + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(gate + batch * gate_batch + columns, mask=inside, other=0.0)
        kept = value.to(tl.float32) + weight.to(tl.float32) * change
        value = kept.to(value.dtype)  # what is normed is what is kept
        tl.store(gated + row * width + columns, value, mask=inside)
    value = value.to(tl.float32)
    mean = tl.sum(value, axis=0) / width
    centred = tl.where(inside, value - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    normed = centred * (1.0 / tl.sqrt(variance + eps))
    factor = 1.0 + tl.load(scale + batch * scale_batch + columns, mask=inside).to(tl.float32)
    addend = tl.load(shift + batch * shift_batch + columns, mask=inside).to(tl.float32)
    result = addend + normed * factor
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_heads(joint, weights, tokens, texts, heads, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A program for each token and one of q, k; joint [B, L, 3, N, SIZE] is changed."""
    row = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    is_image = (row % tokens >= texts).to(tl.int32)
    lanes = tl.arange(0, SIZE)
    head = tl.arange(0, BLOCK)
    place = joint + (row * 3 + which) * heads * SIZE + head[:, None] * SIZE + lanes[None, :]
    inside = head[:, None] < heads
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / SIZE + eps)
    weight = tl.load(weights + (is_image * 2 + which) * SIZE + lanes).to(tl.float32)
    result = value * factor[:, None] * weight[None, :]
    tl.store(place, result.to(joint.dtype.element_ty), mask=inside)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm of x [B, L, D], times 1 + scale, plus shift; both [B or 1, 1, D]."""
    return _launch(x, x, x, shift, scale, eps, gated=False)[1]


def gate_norm_modulate(
    x: Tensor, gate: Tensor, delta: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + gate * delta, and norm_modulate of that.  x, delta: [B, L, D], the others [B, 1, D]."""
    return _launch(x, gate, delta.contiguous(), shift, scale, eps, gated=True)


def norm_heads(joint: Tensor, weights: Tensor, texts: int, eps: float) -> None:
    """RMS norm of queries and keys in place.

    joint: [B, L, 3, N, d], contiguous.  weights: [2, 2, d], (text, image) x (q, k).  texts: so many
    of the L tokens, the first, are text.
    """
    batch, tokens, _, heads, size = joint.shape
    block = triton.next_power_of_2(heads)
    with current(joint.device):
        _norm_heads[(batch * tokens, 2)](
            joint,
            weights,
            tokens,
            texts,
            heads,
            eps,
            SIZE=size,
            BLOCK=block,
            num_warps=8 if block * size > MANY else 4,
        )


def _launch(
    x: Tensor,
    gate: Tensor,
    delta: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    *,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty(batch, tokens, width, dtype=x.dtype, device=x.device)
    kept = torch.empty_like(out) if gated else out
    with current(x.device):
        _norm_modulate[(batch * tokens,)](
            x,
            gate,
            delta,
            shift,
            scale,
            kept,
            out,
            tokens,
            width,
            x.stride(0),
            x.stride(1),
            _batch_stride(gate),
            _batch_stride(shift),
            _batch_stride(scale),
            eps,
            GATED=gated,
            BLOCK=triton.next_power_of_2(width),
            num_warps=8 if width > 1024 else 4,
        )
    return kept, out


def _batch_stride(modulation: Tensor) -> int:
    return modulation.stride(0) if modulation.shape[0] > 1 else 0
