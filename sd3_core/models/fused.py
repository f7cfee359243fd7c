"""Steps of a joint block that need not pass over the tokens one by one.

Each function has a plain way, which is its definition, and a faster one that is taken only where
nothing is to be differentiated and no hook wants to see what lies between.  Nothing that is given
is changed.
"""

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import onednn
from .onednn import Linear

NO_TRITON = "SD3_WORKBENCH_NO_TRITON"  # environment variable: any value keeps the plain ways
FEW = 4  # products that are written to their places one by one; more would be small ones
SAME = 1e-4  # how far a kernel may lie from the plain way in float32, values being about one

Pair = tuple[Tensor, Tensor]  # (shift, scale), each [B, 1, D]
Weights = tuple[Tensor, Tensor | None]  # a layer's weight and bias


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def norm_modulate(norm: Any, x: Tensor, *pairs: Pair) -> list[Tensor]:
    """modulate(norm(x), shift, scale) for each pair.  x: [B, L, D]."""
    if serves(norm, x):
        return [kernels().norm_modulate(x, shift, scale, norm.eps) for shift, scale in pairs]
    normed = norm(x)
    return [modulate(normed, shift, scale) for shift, scale in pairs]


def gate_norm_modulate(
    norm: Any, x: Tensor, gate: Tensor, delta: Tensor, pair: Pair
) -> tuple[Tensor, Tensor]:
    """x + gate * delta, and norm_modulate of that.  x, delta: [B, L, D]; gate: [B, 1, D]."""
    if serves(norm, x):
        return kernels().gate_norm_modulate(x, gate, delta, *pair, norm.eps)
    x = torch.addcmul(x, gate, delta)
    return x, modulate(norm(x), *pair)


def joint_heads(
    text: Any, context: Tensor, image: Any, x: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of both streams, text before image; each [B, N, L, size].

    text, image: SelfAttention.  context, x: their tokens, [B, L, D].
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        parts = zip(text.heads(context), image.heads(x), strict=True)
        q, k, v = (torch.cat(part, dim=1).transpose(1, 2) for part in parts)
        return q, k, v
    batch, texts, width = context.shape
    joint = x.new_empty(batch, texts + x.shape[1], 3 * width)
    write_linear(text.qkv, context, joint[:, :texts])
    write_linear(image.qkv, x, joint[:, texts:])
    heads = joint.unflatten(2, (3, -1, size))  # [B, L, 3, N, d]
    norms = (text.ln_q, text.ln_k, image.ln_q, image.ln_k)
    if not isinstance(image.ln_q, nn.Identity):
        if all(serves(norm, x) for norm in norms):
            weights = torch.cat([own_weight(norm, x) for norm in norms])
            kernels().norm_heads(heads, weights, texts, image.ln_q.eps)
        else:
            for norm, part, own in zip(norms, (0, 1, 0, 1), (0, 0, 1, 1), strict=True):
                place = heads[:, texts:, part] if own else heads[:, :texts, part]
                place.copy_(norm(place))
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def write_linear(layer: Any, x: Tensor, out: Tensor) -> None:
    """out[:] = layer(x); x: [B, L, in], out: [B, L, out features], a part of a buffer of ours."""
    if not (writes_itself(layer, x) and len(x) <= FEW):
        out.copy_(layer(x))
        return
    with lent(layer, x) as (weight, bias):
        assert bias is not None
        for tokens, place in zip(x, out, strict=True):  # a sample's rows lie side by side in `out`
            torch.addmm(bias, tokens, weight.t(), out=place)


def linear_of_part(layer: Any, x: Tensor) -> Tensor:
    """layer(x), where x [B, L, in] is a part of longer samples; its rows lie apart.

    For such tokens torch multiplies without the bias and adds it in another pass.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not writes_itself(layer, x):
        return layer(x)
    out = x.new_empty(*x.shape[:2], layer.out_features)
    write_linear(layer, x, out)
    return out


def linear_gelu(layer: Any, x: Tensor) -> Tensor:
    """gelu(layer(x)), GELU by its tanh formula.  x: [B, L, in]."""
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not writes_itself(layer, x)
        or not multiplies_with_gelu(x.device, x.dtype)
    ):
        return onednn.linear_gelu(layer, x)
    with lent(layer, x) as (weight, bias):
        assert bias is not None
        return product_gelu(bias, x.flatten(0, 1), weight.t()).unflatten(0, x.shape[:2])


def product_gelu(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """GELU of bias + x weight, in one pass; the operator has no public spelling."""
    return torch.ops.aten._addmm_activation(bias, x, weight, use_gelu=True)


@functools.cache
@torch.no_grad()
def multiplies_with_gelu(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `product_gelu` is there and gives what the two steps give.

    Tried once: torch does not promise which GELU it takes.
    """
    draw = torch.Generator().manual_seed(0)
    bias, x, weight = (torch.randn(n, generator=draw) for n in ((64,), (32, 64), (64, 64)))
    bias, x, weight = (tensor.to(device, dtype) for tensor in (bias, x, weight / 8))
    try:
        found = product_gelu(bias, x, weight.t())
    except (RuntimeError, NotImplementedError, AttributeError, TypeError):
        return False
    product = nn.functional.linear(x.float(), weight.float(), bias.float())
    wanted = nn.functional.gelu(product, approximate="tanh")
    allowed = SAME + torch.finfo(dtype).eps * wanted.abs()
    return bool(((found.float() - wanted).abs() < allowed).all())


def writes_itself(layer: Any, x: Tensor) -> bool:
    """Whether the layer is but a product whose output may be given a place."""
    linear = isinstance(layer, nn.Linear) and layer.bias is not None
    return x.device.type == "cuda" and linear and lends(layer, x)


def own_weight(norm: Any, x: Tensor) -> Tensor:
    """The weight of a norm that lends it; what is lent but for a time is copied."""
    with lent(norm, x) as (weight, _):
        return weight if weight is norm.weight else weight.clone()


def lends(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer is but its weights, and gives them out in the device and dtype of x.

    torch's own layers are where theirs lie right; another program's, which may keep them elsewhere
    or patch them, says so by a function `lend(layer, x)` that it has, a context as `lent` gives.
    """
    if hooked(layer):
        return False
    if "lend" in vars(layer):
        return True
    return type(layer) in (nn.Linear, Linear, nn.RMSNorm) and all(
        (own.device, own.dtype) == (x.device, x.dtype) for own in layer.parameters(recurse=False)
    )


def lent(layer: Any, x: Tensor) -> AbstractContextManager[Weights]:
    """Weight and bias of a layer that lends them, right for x until the context ends."""
    if "lend" in vars(layer):
        return layer.lend(layer, x)
    return nullcontext((layer.weight, getattr(layer, "bias", None)))


def hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


# The kernels


def serves(norm: Any, x: Tensor) -> bool:
    """Whether a kernel may stand in for this norm of these tokens."""
    return (
        x.device.type == "cuda"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not hooked(norm)
        and (is_bare(norm) or (isinstance(norm, nn.RMSNorm) and lends(norm, x)))
        and not why_not(x.device)
    )


def is_bare(norm: Any) -> bool:
    """A layer norm without weights, whoever's layer it is."""
    return isinstance(norm, nn.LayerNorm) and norm.weight is None


def kernels() -> ModuleType:
    from . import kernels

    return kernels


@functools.cache
def why_not(device: torch.device) -> str:
    """Why the kernels do not run on a device, in words; empty where they do.

    Tried once, on a few numbers: Triton may be installed without what it needs to compile, and a
    result that is not the plain way's is worth nothing.
    """
    if device.type != "cuda":
        return "they are for CUDA"
    if os.environ.get(NO_TRITON):
        return f"{NO_TRITON} is set"
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        distance = largest_difference(device)
    except Exception as error:  # whatever a compiler may say
        return f"Triton fails here ({type(error).__name__}: {error})"
    return "" if distance < SAME else f"they differ from the plain way by {distance:.1g} here"


@torch.no_grad()
def largest_difference(device: torch.device | str) -> float:
    """Between the kernels and the plain ways, over all of them, in float32."""
    draw = torch.Generator().manual_seed(0)
    x, delta, *rest = (torch.randn(2, n, 192, generator=draw) for n in (5, 5, 1, 1, 1))
    gate, shift, scale = (tensor.to(device) for tensor in rest)
    x, delta = x.to(device), delta.to(device)
    norm = nn.LayerNorm(192, eps=1e-6, elementwise_affine=False)
    plain_x = torch.addcmul(x, gate, delta)
    found = [
        (kernels().norm_modulate(x, shift, scale, 1e-6), modulate(norm(x), shift, scale)),
        *zip(
            kernels().gate_norm_modulate(x, gate, delta, shift, scale, 1e-6),
            (plain_x, modulate(norm(plain_x), shift, scale)),
            strict=True,
        ),
    ]
    joint = torch.randn(2, 5, 3, 3, 64, generator=draw).to(device)
    weights = torch.randn(2, 2, 64, generator=draw).to(device)
    wanted = joint.clone()
    for own, rows in enumerate((slice(0, 2), slice(2, 5))):
        for part in (0, 1):
            place = joint[:, rows, part]
            wanted[:, rows, part] = nn.functional.rms_norm(place, (64,), weights[own, part], 1e-6)
    kernels().norm_heads(joint, weights, texts=2, eps=1e-6)
    found.append((joint, wanted))
    return max(float((a - b).abs().max()) for a, b in found)
