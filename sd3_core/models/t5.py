"""The encoder of T5 v1.1 (XXL in SD3).

Raffel et al. 2020 (arXiv:1910.10683); v1.1 gates its feed-forward with GELU (Shazeer 2020,
arXiv:2002.05202).  SD3 masks nothing: padding takes part in the attention, here as in training.
Module names are those of the released files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import CheckpointError
from .attention import Attention, attention

MAX_DISTANCE = 128  # relative positions beyond it share the last bucket (T5's configuration)


@dataclass(frozen=True)
class T5Config:
    d_model: int
    d_ff: int
    d_kv: int  # width of one head; heads * d_kv need not be d_model
    num_heads: int
    num_layers: int
    vocab_size: int
    num_buckets: int

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> "T5Config":
        """Read the sizes off a state dict's shapes.

        Raises CheckpointError when a tensor that tells a size is missing.
        """
        layers = 0
        while f"encoder.block.{layers}.layer.0.SelfAttention.q.weight" in shapes:
            layers += 1
        first = "encoder.block.0.layer"
        try:
            vocab_size, d_model = shapes["shared.weight"]
            buckets, heads = shapes[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
            return cls(
                d_model=d_model,
                d_ff=shapes[f"{first}.1.DenseReluDense.wi_0.weight"][0],
                d_kv=shapes[f"{first}.0.SelfAttention.q.weight"][0] // heads,
                num_heads=heads,
                num_layers=layers,
                vocab_size=vocab_size,
                num_buckets=buckets,
            )
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"no T5 v1.1: its size cannot be read ({error})") from error


def relative_position_bucket(relative: Tensor, num_buckets: int) -> Tensor:
    """Bucket of key position - query position; half of the buckets for each sign.

    Small distances have a bucket each, larger ones share logarithmic buckets up to MAX_DISTANCE.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = relative.abs()
    growth = torch.log(distance.float().clamp(min=1) / exact) / math.log(MAX_DISTANCE / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (relative > 0)


class T5Attention(nn.Module):
    def __init__(self, config: T5Config, ops: Any, attend: Attention, has_bias: bool):
        super().__init__()
        self.attend = attend
        self.d_kv = config.d_kv
        self.num_buckets = config.num_buckets
        inner = config.num_heads * config.d_kv
        self.q = ops.Linear(config.d_model, inner, bias=False)
        self.k = ops.Linear(config.d_model, inner, bias=False)
        self.v = ops.Linear(config.d_model, inner, bias=False)
        self.o = ops.Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = ops.Embedding(config.num_buckets, config.num_heads)

    def position_bias(self, length: int, like: Tensor) -> Tensor:
        """[1, N, L, L], added to the attention logits of every block."""
        positions = torch.arange(length, device=like.device)
        buckets = relative_position_bucket(positions[None] - positions[:, None], self.num_buckets)
        return rearrange(self.relative_attention_bias(buckets), "q k N -> 1 N q k").to(like)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            rearrange(layer(x), "B L (N d) -> B N L d", d=self.d_kv)
            for layer in (self.q, self.k, self.v)
        )
        # T5 does not divide its logits by sqrt(d), the attention function does.
        return self.o(self.attend(q * math.sqrt(self.d_kv), k, v, bias))


class T5FeedForward(nn.Module):
    def __init__(self, config: T5Config, ops: Any):
        super().__init__()
        self.wi_0 = ops.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = ops.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = ops.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class T5AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, ops: Any, attend: Attention, has_bias: bool):
        super().__init__()
        self.SelfAttention = T5Attention(config, ops, attend, has_bias)
        self.layer_norm = ops.RMSNorm(config.d_model, eps=1e-6)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class T5FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config, ops: Any):
        super().__init__()
        self.DenseReluDense = T5FeedForward(config, ops)
        self.layer_norm = ops.RMSNorm(config.d_model, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nn.Module):
    def __init__(self, config: T5Config, ops: Any, attend: Attention, has_bias: bool):
        super().__init__()
        self.layer = nn.ModuleList(
            [
                T5AttentionLayer(config, ops, attend, has_bias),
                T5FeedForwardLayer(config, ops),
            ]
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, bias))


class T5Stack(nn.Module):
    def __init__(self, config: T5Config, ops: Any, attend: Attention):
        super().__init__()
        self.block = nn.ModuleList(
            T5Block(config, ops, attend, has_bias=i == 0) for i in range(config.num_layers)
        )
        self.final_layer_norm = ops.RMSNorm(config.d_model, eps=1e-6)


class T5Encoder(nn.Module):
    """Token ids [B, L] -> states [B, L, d_model], normed."""

    def __init__(self, config: T5Config, ops: Any = nn, attention: Attention = attention):
        super().__init__()
        self.config = config
        self.shared = ops.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config, ops, attention)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.shared(ids)
        # The first block's table of relative positions serves every block.
        first: Any = self.encoder.block[0]
        bias = first.layer[0].SelfAttention.position_bias(ids.shape[1], like=x)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)
