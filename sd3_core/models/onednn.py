"""The linear layer through oneDNN, where a CPU computes in float32 and trains no weight of it.

torch multiplies float32 matrices with MKL, which keeps its best kernels for Intel's processors.
oneDNN, which torch brings for convolutions, plays no favourites: on an AMD EPYC (Zen 5) a linear
layer takes half the time and an SD3 forward 0.6 of it, and GELU costs next to nothing inside the
multiplication (measured with `python -m sd3_core bench`).  The two differ in the order of their
sums, by some 1e-6 of the result's size.  Gradients pass through to the input, as a LoRA's training
needs them (a step takes 0.8 of the time); a layer that is itself trained is torch's.
"""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The operator is the one torch's own compiler emits; it has no public spelling.
AVAILABLE = (
    torch.backends.mkldnn.is_available()
    and platform.machine().lower() in ("x86_64", "amd64")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def serves(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN may take this product: the operator knows no gradient of its weights."""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    return (
        AVAILABLE
        and not (trained and torch.is_grad_enabled())
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, as F.linear; x: [..., in], weight: [out, in], bias: [out]."""
    if not serves(x, weight, bias):
        return F.linear(x, weight, bias)
    if differentiated(x):
        return FrozenLinear.apply(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def differentiated(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


class FrozenLinear(torch.autograd.Function):
    """x W^T + b, of which only x has a gradient; that is a linear layer too, with W transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return linear(gradients[0], weight.t(), None), None, None


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """gelu(layer(x)), GELU by its tanh formula; one pass where the layer is the one above.

    A hook, such as a LoRA's, belongs between the two, so a hooked layer runs as it stands.
    """
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    if (
        type(layer) is Linear
        and not (hooked or differentiated(x))
        and serves(x, layer.weight, layer.bias)
    ):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "tanh")
    return F.gelu(layer(x), approximate="tanh")


class Ops:
    """The `ops` namespace of torch.nn with the linear layer of this file."""

    Linear = Linear
    Conv2d = nn.Conv2d
    Embedding = nn.Embedding
    LayerNorm = nn.LayerNorm
    GroupNorm = nn.GroupNorm
    RMSNorm = nn.RMSNorm
