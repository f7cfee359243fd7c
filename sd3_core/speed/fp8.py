"""Matrix products in float8, twice as fast as in bfloat16 on GPUs that have them; not the default.

The image stream's four large layers (qkv, proj, fc1, fc2) run so; text, embedders, modulation and
the last layer keep their precision.  A weight has one scale for each output, computed once, an
input one for each token, computed in the call ("row-wise"): the largest value becomes float8's.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..models.cast import cast
from .modulation import with_parts

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448
SMALLEST_SCALE = 1e-12  # of a row of zeros
PARTS = ("attn", "attn2", "mlp")  # of a stream
LAYERS = ("qkv", "proj", "fc1", "fc2")

Weights = Callable[[nn.Module], tuple[Tensor, Tensor | None]]  # layer -> its weight, bias


def obstacle(device: torch.device | str) -> str:
    """Why this device multiplies no float8 rows, in a sentence; empty where it does."""
    device = torch.device(device)
    if device.type != "cuda":
        return (
            f"fp8 needs an NVIDIA GPU of compute capability 8.9 or more (or AMD's MI300); "
            f"this run computes on {device.type}. Leave fp8 off."
        )
    ones = torch.ones(16, 16, device=device)
    try:
        multiply(*quantise(ones), *quantise(ones), None, torch.bfloat16)
    except (RuntimeError, AttributeError, TypeError) as error:
        name = torch.cuda.get_device_name(device)
        return f"fp8: {name} does not multiply float8 rows ({error_line(error)}). Leave fp8 off."
    return ""


def check(device: torch.device | str) -> None:
    """Raises ValueError where `obstacle` finds one."""
    if why := obstacle(device):
        raise ValueError(why)


def error_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [M, K].  Returns it in float8 and the scales [M, 1], float32, that give x back."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_min(SMALLEST_SCALE) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


def multiply(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x W^T + b of quantised x [M, K] and W [N, K]; [M, N] in dtype, summed in float32."""
    product = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]  it has no other name
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=weight_scale.t(),
        out_dtype=torch.bfloat16,  # the only one that row-wise scales allow everywhere
        use_fast_accum=True,
    ).to(dtype)
    return product if bias is None else product + bias.to(product)


class Float8Linear(nn.Module):
    """A linear layer with its own copy of the weight in float8; the layer itself stays as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        quantised, scale = quantise(weight)
        self.quantised: Tensor
        self.scale: Tensor
        self.register_buffer("quantised", quantised)
        self.register_buffer("scale", scale)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K]."""
        rows, scale = quantise(x.reshape(-1, x.shape[-1]))
        product = multiply(rows, scale, self.quantised, self.scale, self.bias, x.dtype)
        return product.reshape(*x.shape[:-1], -1)


def stored(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer of the core, in float32."""
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    weight = cast(weight, layer._buffers.get("weight_scale"), torch.float32)
    return weight, None if bias is None else bias.float()


@torch.no_grad()
def in_float8(blocks: nn.ModuleList, weights: Weights = stored) -> nn.ModuleList:
    """The same joint blocks with the image stream's large layers in float8.

    weights: how a layer's are read.  A layer with hooks, such as a LoRA that is attached and not
    merged, runs as it stands.
    """
    return nn.ModuleList(with_replaced(block, "x_block", weights) for block in blocks)


def with_replaced(block: nn.Module, name: str, weights: Weights) -> nn.Module:
    stream = block.get_submodule(name)
    parts = {
        part: with_parts(module, dict(replacements(module, weights)))
        for part in PARTS
        if (module := stream._modules.get(part)) is not None
    }
    return with_parts(block, {name: with_parts(stream, parts)})


def replacements(module: nn.Module, weights: Weights) -> Iterator[tuple[str, nn.Module]]:
    for name in LAYERS:
        layer = module._modules.get(name)
        if layer is not None and not (layer._forward_hooks or layer._forward_pre_hooks):
            yield name, Float8Linear(*weights(layer))
