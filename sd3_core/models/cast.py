"""Layers that keep their weights as stored and cast them to the input's dtype in each call.

For files whose precision is not that of the computation and that would grow too much if converted:
bf16 computed in float32 on a CPU, fp8, and fp8 with a scale.  A weight stays where it is, in memory
or in the mapped file; only one layer's cast copy exists at a time, in the backward pass too.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from .onednn import linear


def cast(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The stored weight in another dtype, times its scale.

    scale: float32, [] for the whole weight or [rows, 1, ...] for its rows; multiplied in float32,
    since rounding the scale itself to bf16 would shift the whole weight by up to 0.4 %.
    """
    if scale is None:
        return stored.to(dtype)
    return stored.to(torch.float32).mul(scale).to(dtype)


class _FrozenLinear(torch.autograd.Function):
    """F.linear on a weight without gradient that is cast anew in the backward pass.

    Autograd would otherwise keep the cast copy of every layer alive: the model again, enlarged.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.linear(x, cast(weight, scale, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
        _, weight, scale, _ = inputs
        ctx.save_for_backward(weight, scale)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        (grad,) = grad_outputs
        return grad @ cast(weight, scale, grad.dtype), None, None, None


class Scaled(nn.Module):
    """A layer whose weight may carry a scale: the weight is then what is stored times it."""

    def set_scale(self, scale: Tensor) -> None:
        """scale: see cast. Kept out of the state dict, whose names stay the checkpoint's."""
        self.register_buffer("weight_scale", scale, persistent=False)

    @property
    def scale(self) -> Tensor | None:
        return self._buffers.get("weight_scale")


class Linear(Scaled, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if input.requires_grad and torch.is_grad_enabled() and self._casts_frozen(input.dtype):
            return _FrozenLinear.apply(input, self.weight, self.scale, self.bias)
        weight = cast(self.weight, self.scale, input.dtype)
        return linear(input, weight, _to(self.bias, input.dtype))

    def _casts_frozen(self, dtype: torch.dtype) -> bool:
        trained = any(parameter.requires_grad for parameter in self.parameters(recurse=False))
        return not trained and (self.weight.dtype != dtype or self.scale is not None)


class Conv2d(Scaled, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = cast(self.weight, self.scale, input.dtype)
        return self._conv_forward(input, weight, _to(self.bias, input.dtype))


class Embedding(Scaled, nn.Embedding):
    """Gives rows in `dtype`, because token ids do not tell the dtype of the computation."""

    dtype: torch.dtype = torch.float32

    def forward(self, input: Tensor) -> Tensor:
        scale = self.scale
        if scale is not None and scale.numel() > 1:  # one for each row
            scale = scale[input]
        return cast(_rows(self.weight, input), scale, self.dtype)


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    if table.dtype.itemsize > 1:
        return F.embedding(ids, table)
    return F.embedding(ids, table.view(torch.uint8)).view(table.dtype)  # not every device picks fp8


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _to(self.weight, input.dtype), _to(self.bias, input.dtype)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class GroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _to(self.weight, input.dtype), _to(self.bias, input.dtype)
        return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, _to(self.weight, x.dtype), self.eps)


def _to(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)


@dataclass(frozen=True)
class CastOps:
    """The `ops` namespace of these layers; dtype: what its Embedding layers give."""

    dtype: torch.dtype = torch.float32

    Linear = Linear
    Conv2d = Conv2d
    LayerNorm = LayerNorm
    GroupNorm = GroupNorm
    RMSNorm = RMSNorm

    def Embedding(self, num_embeddings: int, embedding_dim: int) -> Embedding:  # noqa: N802
        layer = Embedding(num_embeddings, embedding_dim)
        layer.dtype = self.dtype
        return layer
