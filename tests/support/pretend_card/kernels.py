"""What is one kernel on the card and many operations, or none, on the CPU.

Attention and the RMS norm, and Triton's kernels, which run in its interpreter.
"""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .card import Card, Mixed
from .counts import place
from .tensor import CardTensor

sdpa = torch.nn.functional.scaled_dot_product_attention
rms_norm = torch.rms_norm


class Attend(torch.autograd.Function):
    """As the flash kernels: one launch, and the output is kept for the way back."""

    @staticmethod
    def forward(ctx, q, k, v, mask, causal, scale):
        ctx.given = causal, scale
        card = q.card
        made = attention_of(card, q, k, v, mask, causal, scale)
        parts = [t for t in (q, k, v, mask) if t is not None]
        card.counts.kernel("attention", parts, [made], 4 * q.numel() * k.shape[-2])
        ctx.save_for_backward(q, k, v, mask, made)
        return made

    @staticmethod
    def backward(ctx, grad):
        q, k, v, mask, made = ctx.saved_tensors
        causal, scale = ctx.given
        card = q.card
        if card.numbers:
            with _disable_current_modes(), torch.enable_grad():
                inner = [t.inner.detach().requires_grad_() for t in (q, k, v)]
                out = sdpa(*inner, inner_of(mask), is_causal=causal, scale=scale)
                grads = torch.autograd.grad(out, inner, grad.inner)
        else:
            grads = [torch.empty_like(t.inner) for t in (q, k, v)]
        grads = [CardTensor(g, card) for g in grads]
        work = 10 * q.numel() * k.shape[-2]
        card.counts.kernel("attention backward", [q, k, v, made, grad], grads, work)
        return *grads, None, None, None


def inner_of(tensor: CardTensor | None) -> Tensor | None:
    return None if tensor is None else tensor.inner


def attention_of(card: Card, q, k, v, mask, causal, scale) -> CardTensor:
    """[B, N, L, d], laid out as [B, L, N, d] like the kernels' own."""
    batch, heads, tokens, _ = q.shape
    if card.numbers:
        with _disable_current_modes():
            inner = [t.inner.detach() for t in (q, k, v)]
            out = sdpa(*inner, inner_of(mask), is_causal=causal, scale=scale)
            out = out.transpose(1, 2).contiguous()
    else:
        out = torch.empty(batch, tokens, heads, v.shape[-1], dtype=q.dtype, device="meta")
    return CardTensor(out.transpose(1, 2), card)


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    given = [t for t in (query, key, value, attn_mask) if t is not None]
    if not any(isinstance(t, CardTensor) for t in given):
        return sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if not all(isinstance(t, CardTensor) for t in given):
        raise Mixed(f"attention of tensors on {[str(t.device) for t in given]}, at {place()}")
    if len({t.dtype for t in (query, key, value)}) > 1:
        raise RuntimeError(f"attention of {query.dtype}, {key.dtype} and {value.dtype}")
    if dropout_p or enable_gqa:
        raise NotImplementedError("pretended card: attention with dropout or grouped heads")
    return Attend.apply(query, key, value, attn_mask, is_causal, scale)


def one_rms_norm(input, normalized_shape, weight=None, eps=None):
    """CUDA has a kernel for what the other devices do in six, where the types agree."""
    given = [t for t in (input, weight) if t is not None]
    alike = all(isinstance(t, CardTensor) and t.dtype == input.dtype for t in given)
    if not alike or torch.is_grad_enabled():
        return rms_norm(input, normalized_shape, weight, eps)
    with _disable_current_modes():
        inner = rms_norm(input.inner, normalized_shape, inner_of(weight), eps)
    made = CardTensor(inner, input.card)
    input.card.counts.kernel("rms_norm", given, [made])
    return made


# Triton


@contextlib.contextmanager
def triton_on(card: Card) -> Iterator[None]:
    """Triton's kernels, given tensors of the card: counted, and run in the interpreter."""
    if not card.kernels or find_spec("triton") is None:
        yield
        return
    from triton.runtime.jit import JITFunction

    compiled = JITFunction.run

    def start(self, *args, grid, warmup, **options):
        given = {id(a): a for a in (*args, *options.values()) if isinstance(a, CardTensor)}
        if not given:
            return compiled(self, *args, grid=grid, warmup=warmup, **options)
        check_current(card)
        card.counts.kernel(self.fn.__name__, list(given.values()), [])
        if card.numbers:
            with _disable_current_modes(), interpreting() as interpreted:
                interpreted(self.fn)[grid](*(inner(a) for a in args), **options)
        return None

    def inner(value: Any) -> Any:
        return value.inner if isinstance(value, CardTensor) else value

    JITFunction.run = start
    try:
        yield
    finally:
        JITFunction.run = compiled


def check_current(card: Card) -> None:
    """Triton starts on the current device, wherever the tensors are."""
    if card.current != card.device.index:
        raise RuntimeError(
            f"an illegal memory access was encountered: a Triton kernel started on "
            f"{card.kind}:{card.current}, the current device, with tensors on {card.device}, "
            f"at {place()}"
        )


@contextlib.contextmanager
def interpreting() -> Iterator[Any]:
    """Triton's interpreter, though Triton was imported to compile: its own functions, too."""
    import triton
    from triton.language import standard
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    before: list[tuple[ModuleType, str, Any]] = [
        (module, name, value)
        for module in (triton.language, standard)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    ]
    asked = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = True
    for module, name, value in before:
        setattr(module, name, InterpretedFunction(value.fn))
    try:
        yield InterpretedFunction
    finally:
        triton.knobs.runtime.interpret = asked
        for module, name, value in before:
            setattr(module, name, value)
