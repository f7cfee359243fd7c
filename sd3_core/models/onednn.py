"""The linear layer through oneDNN, where a CPU computes in float32 and nothing is differentiated.

torch multiplies float32 matrices with MKL, which keeps its best kernels for Intel's processors.
oneDNN, which torch brings for convolutions, plays no favourites: on an AMD EPYC (Zen 5) a linear
layer takes half the time and an SD3 forward 0.6 of it, and GELU costs next to nothing inside the
multiplication (measured with `python -m sd3_core bench`).  The two differ in the order of their
sums, by some 1e-6 of the result's size.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The operator is the one torch's own compiler emits; it has no public spelling.
AVAILABLE = (
    torch.backends.mkldnn.is_available()
    and platform.machine().lower() in ("x86_64", "amd64")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may take this product: the operator knows no gradient."""
    return (
        AVAILABLE
        and not torch.is_grad_enabled()
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, as F.linear; x: [..., in], weight: [out, in], bias: [out]."""
    if serves(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """gelu(layer(x)), GELU by its tanh formula; one pass where the layer is the one above.

    A hook, such as a LoRA's, belongs between the two, so a hooked layer runs as it stands.
    """
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    if type(layer) is Linear and not hooked and serves(x, layer.weight):
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
