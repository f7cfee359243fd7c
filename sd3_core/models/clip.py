"""The text towers of CLIP-L and OpenCLIP bigG, as SD3 uses them.

Radford et al. 2021 (arXiv:2103.00020).  SD3 takes two things of a tower: the tokens' states before
the last layer, without the final norm, as context; and the state at the end token after the last
layer as pooled vector (in bigG projected, in L not).  Module names are those of the released files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import CheckpointError
from .attention import Attention, attention

HEAD_DIM = 64  # of every CLIP that SD3 uses; a file does not tell its number of heads


@dataclass(frozen=True)
class CLIPConfig:
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    window: int  # tokens per pass: the rows of the position table
    activation: str  # "quick_gelu" (L) or "gelu" (bigG)
    projection_dim: int | None  # width of the projected pooled state (bigG), None: not projected

    @property
    def pooled_dim(self) -> int:
        return self.projection_dim or self.hidden_size

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], which: str) -> "CLIPConfig":
        """Read the sizes off a state dict's shapes; which: "clip_l" or "clip_g".

        Raises CheckpointError when a tensor that tells a size is missing.
        """
        layers = 0
        while f"text_model.encoder.layers.{layers}.mlp.fc1.weight" in shapes:
            layers += 1
        try:
            window, hidden = shapes["text_model.embeddings.position_embedding.weight"]
            return cls(
                hidden_size=hidden,
                num_layers=layers,
                num_heads=hidden // HEAD_DIM,
                intermediate_size=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
                vocab_size=shapes["text_model.embeddings.token_embedding.weight"][0],
                window=window,
                activation="quick_gelu" if which == "clip_l" else "gelu",
                projection_dim=None if which == "clip_l" else shapes["text_projection.weight"][0],
            )
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"no {which}: its size cannot be read ({error})") from error


class CLIPOutput(NamedTuple):
    hidden: Tensor  # [B, L, D] before the last layer, no final norm
    pooled: Tensor  # [B, D] at the end token


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class CLIPAttention(nn.Module):
    def __init__(self, config: CLIPConfig, ops: Any, attend: Attention):
        super().__init__()
        self.attend = attend
        self.num_heads = config.num_heads
        hidden = config.hidden_size
        self.q_proj = ops.Linear(hidden, hidden)
        self.k_proj = ops.Linear(hidden, hidden)
        self.v_proj = ops.Linear(hidden, hidden)
        self.out_proj = ops.Linear(hidden, hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            rearrange(layer(x), "B L (N d) -> B N L d", N=self.num_heads)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(self.attend(q, k, v, mask))


class CLIPMLP(nn.Module):
    def __init__(self, config: CLIPConfig, ops: Any):
        super().__init__()
        self.activation = quick_gelu if config.activation == "quick_gelu" else F.gelu
        self.fc1 = ops.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = ops.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPLayer(nn.Module):
    def __init__(self, config: CLIPConfig, ops: Any, attend: Attention):
        super().__init__()
        self.layer_norm1 = ops.LayerNorm(config.hidden_size, eps=1e-5)
        self.self_attn = CLIPAttention(config, ops, attend)
        self.layer_norm2 = ops.LayerNorm(config.hidden_size, eps=1e-5)
        self.mlp = CLIPMLP(config, ops)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nn.Module):
    def __init__(self, config: CLIPConfig, ops: Any):
        super().__init__()
        self.token_embedding = ops.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = ops.Embedding(config.window, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.token_embedding(ids) + self.position_embedding(positions)


class CLIPLayers(nn.Module):
    def __init__(self, config: CLIPConfig, ops: Any, attend: Attention):
        super().__init__()
        self.layers = nn.ModuleList(
            CLIPLayer(config, ops, attend) for _ in range(config.num_layers)
        )


class CLIPTextTransformer(nn.Module):
    def __init__(self, config: CLIPConfig, ops: Any, attend: Attention):
        super().__init__()
        self.embeddings = CLIPEmbeddings(config, ops)
        self.encoder = CLIPLayers(config, ops, attend)
        self.final_layer_norm = ops.LayerNorm(config.hidden_size, eps=1e-5)


class CLIPTextModel(nn.Module):
    """Token ids -> context states and pooled vector; see the module's docstring."""

    def __init__(self, config: CLIPConfig, ops: Any = nn, attention: Attention = attention):
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config, ops, attention)
        self.text_projection = (
            ops.Linear(config.hidden_size, config.projection_dim, bias=False)
            if config.projection_dim
            else nn.Identity()
        )

    def forward(self, ids: Tensor, eos_id: int) -> CLIPOutput:
        """ids: [B, L] int64, L <= window; eos_id: the end token, whose first place is pooled."""
        length = ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        x = self.text_model.embeddings(ids)
        layers = self.text_model.encoder.layers
        for layer in layers[:-1]:
            x = layer(x, mask)
        last = self.text_model.final_layer_norm(layers[-1](x, mask))
        end = (ids == eos_id).int().argmax(dim=1)
        pooled = last[torch.arange(len(ids), device=ids.device), end]
        return CLIPOutput(hidden=x, pooled=self.text_projection(pooled))
