"""MMDiT and MMDiT-X: the denoiser of Stable Diffusion 3 and 3.5.

Esser et al. 2024 (arXiv:2403.03206), section 4 and figure 2: two streams of tokens, text and image,
each with its own weights, meet in the attention of every block.  MMDiT-X (SD3.5 Medium) gives the
image stream of its first blocks a second attention of its own.

Letters: B batch, L tokens, D hidden size, N heads, C channels, H W latent rows and columns.
Module names are those of the released checkpoints.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import CheckpointError
from .attention import Attention, attention
from .fused import gate_norm_modulate, joint_heads, linear_gelu, linear_of_part, norm_modulate

HEAD_DIM = 64
TIMESTEP_FREQUENCIES = 256
MLP_RATIO = 4


@dataclass(frozen=True)
class MMDiTConfig:
    """Size of the network. `MMDiTConfig(depth=d)` is the paper's family, d = 15 ... 38."""

    depth: int
    patch_size: int = 2
    in_channels: int = 16
    context_dim: int = 4096
    pooled_dim: int = 2048
    pos_embed_max_size: int = 192
    qk_norm: bool = False
    dual_attention_layers: tuple[int, ...] = ()

    @property
    def hidden_size(self) -> int:
        return HEAD_DIM * self.depth

    @property
    def num_heads(self) -> int:
        return self.depth

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> "MMDiTConfig":
        """Read the sizes off a state dict's shapes (keys without prefix).

        Raises CheckpointError when a tensor that tells a size is missing.
        """
        try:
            hidden, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
            return cls(
                depth=hidden // HEAD_DIM,
                patch_size=patch_size,
                in_channels=in_channels,
                context_dim=shapes["context_embedder.weight"][1],
                pooled_dim=shapes["y_embedder.mlp.0.weight"][1],
                pos_embed_max_size=math.isqrt(shapes["pos_embed"][1]),
                qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in shapes,
                dual_attention_layers=tuple(
                    i
                    for i in range(hidden // HEAD_DIM)
                    if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes
                ),
            )
        except (KeyError, ValueError, IndexError) as error:
            raise CheckpointError(f"no MMDiT: its size cannot be read ({error})") from error


class Modulation(NamedTuple):
    """What adaLN does around one sub-layer; each [B, 1, D]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class HeadedQKV(NamedTuple):
    """Queries, keys and values; each [B, L, N, D/N]."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Tokens:
    """The state that travels through the joint blocks."""

    x: Tensor  # [B, Lx, D] image tokens
    context: Tensor  # [B, Lc, D] text tokens
    c: Tensor  # [B, D] timestep and pooled text, the input of every adaLN
    size: tuple[int, int]  # latent rows and columns, before padding to the patch

    def rows(self, start: int, stop: int) -> "Tokens":
        """The batch rows start:stop."""
        return Tokens(self.x[start:stop], self.context[start:stop], self.c[start:stop], self.size)

    @staticmethod
    def cat(parts: "Sequence[Tokens]") -> "Tokens":
        """One batch from several; their lengths agree."""
        return Tokens(
            torch.cat([part.x for part in parts]),
            torch.cat([part.context for part in parts]),
            torch.cat([part.c for part in parts]),
            parts[0].size,
        )


def sincos_grid(hidden: int, positions: Tensor) -> Tensor:
    """Sine-cosine embedding of a square grid.

    positions: [M] along one side.  Returns [M * M, hidden], row-major; the first half of the
    channels encodes the column, the second the row, each as [sin | cos].
    """
    frequencies = 10000.0 ** -(torch.arange(hidden // 4, dtype=torch.float64) / (hidden / 4))
    angles = positions.double()[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [M, hidden / 2]
    side = len(positions)
    columns = line[None, :, :].expand(side, side, -1)
    rows = line[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()


def position_table(hidden: int, size: int, base: int) -> Tensor:
    """The canonical `pos_embed` [1, size * size, hidden], float32.

    size: patches per side that the table holds.  base: patches per side at the native resolution;
    the central base x base patches cover the positions -0.5 ... 15.5 of 256-pixel pre-training
    (16 patches), whatever the resolution.  The released models: base 64, size 192 or 384.
    Esser et al. 2024, section 5.3.2, "Positional Encodings".
    """
    positions = (torch.arange(size) - (size - 1) / 2) * (16 / base) + 7.5
    return sincos_grid(hidden, positions)[None]


def timestep_embedding(timestep: Tensor, size: int = TIMESTEP_FREQUENCIES) -> Tensor:
    """Sinusoids of the timestep (1000 * sigma, not rounded).  [B] -> [B, size], [cos | sin]."""
    half = size // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * torch.exp(-math.log(10000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def pad_to_patch(x: Tensor, patch_size: int) -> Tensor:
    """Repeat the first rows and columns behind the last (as ComfyUI does) to fill the patches."""
    below, right = (-x.shape[-2]) % patch_size, (-x.shape[-1]) % patch_size
    return F.pad(x, (0, right, 0, below), mode="circular") if below or right else x


class VectorEmbedder(nn.Module):
    """Two linear layers: a vector (timestep sinusoids, pooled text) into the hidden width."""

    def __init__(self, in_features: int, hidden: int, ops: Any):
        super().__init__()
        self.mlp = nn.Sequential(
            ops.Linear(in_features, hidden), nn.SiLU(), ops.Linear(hidden, hidden)
        )

    def forward(self, vector: Tensor) -> Tensor:
        return self.mlp(vector)


class PatchEmbed(nn.Module):
    """[B, C, H, W] -> [B, L, D]: a linear map of each patch."""

    def __init__(self, in_channels: int, patch_size: int, hidden: int, ops: Any):
        super().__init__()
        self.proj = ops.Conv2d(in_channels, hidden, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # Element-wise operations keep the layout they are given: were it still the image's, every
        # norm of every block would copy its input.
        return rearrange(self.proj(x), "B D H W -> B (H W) D").contiguous()


class MLP(nn.Module):
    def __init__(self, hidden: int, ops: Any):
        super().__init__()
        self.fc1 = ops.Linear(hidden, MLP_RATIO * hidden)
        self.fc2 = ops.Linear(MLP_RATIO * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(linear_gelu(self.fc1, x))


class SelfAttention(nn.Module):
    """The weights of one stream's attention; the attention itself may join two streams."""

    def __init__(self, config: MMDiTConfig, ops: Any, project: bool = True):
        super().__init__()
        hidden = config.hidden_size
        self.qkv = ops.Linear(hidden, 3 * hidden)
        self.proj: Any = ops.Linear(hidden, hidden) if project else None
        self.ln_q = ops.RMSNorm(HEAD_DIM, eps=1e-6) if config.qk_norm else nn.Identity()
        self.ln_k = ops.RMSNorm(HEAD_DIM, eps=1e-6) if config.qk_norm else nn.Identity()

    def heads(self, x: Tensor) -> HeadedQKV:
        """x: [B, L, D]."""
        q, k, v = rearrange(self.qkv(x), "B L (three N d) -> three B L N d", three=3, d=HEAD_DIM)
        return HeadedQKV(self.ln_q(q), self.ln_k(k), v)


class StreamBlock(nn.Module):
    """What one stream, text or image, owns of a joint block."""

    def __init__(self, config: MMDiTConfig, ops: Any, *, pre_only: bool, dual_attention: bool):
        super().__init__()
        hidden = config.hidden_size
        self.norm1 = ops.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(config, ops, project=not pre_only)
        self.attn2 = SelfAttention(config, ops) if dual_attention else None
        if not pre_only:
            self.norm2 = ops.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
            self.mlp = MLP(hidden, ops)
        # (shift, scale, gate) of attn, mlp and, in that order, attn2; pre-only: (shift, scale)
        chunks = 2 if pre_only else 9 if dual_attention else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ops.Linear(hidden, chunks * hidden))
        self.chunks = chunks

    def modulation(self, c: Tensor) -> list[Tensor]:
        """c: [B, D].  Returns the chunks of adaLN, each [B, 1, D]."""
        return list(self.adaLN_modulation(c)[:, None].chunk(self.chunks, dim=-1))

    def feed_forward(self, x: Tensor, gate: Tensor, change: Tensor, mlp: Modulation) -> Tensor:
        """The MLP and its residual on x + gate * change."""
        x, entering = gate_norm_modulate(self.norm2, x, gate, change, (mlp.shift, mlp.scale))
        return torch.addcmul(x, mlp.gate, self.mlp(entering))


class JointBlock(nn.Module):
    """One block of figure 2b; the last one leaves the text stream after its attention."""

    def __init__(self, config: MMDiTConfig, index: int, ops: Any):
        super().__init__()
        last = index == config.depth - 1
        dual = index in config.dual_attention_layers
        self.context_block = StreamBlock(config, ops, pre_only=last, dual_attention=False)
        self.x_block = StreamBlock(config, ops, pre_only=False, dual_attention=dual)

    def forward(
        self, x: Tensor, context: Tensor, c: Tensor, attend: Attention
    ) -> tuple[Tensor, Tensor]:
        """x: [B, Lx, D]; context: [B, Lc, D]; c: [B, D].  Returns x and context."""
        image, text = self.x_block, self.context_block
        image_mod, text_mod = image.modulation(c), text.modulation(c)
        pairs = [(image_mod[0], image_mod[1])]
        if image.attn2 is not None:
            pairs.append((image_mod[6], image_mod[7]))
        entering_x, *entering_dual = norm_modulate(image.norm1, x, *pairs)
        (entering_context,) = norm_modulate(text.norm1, context, (text_mod[0], text_mod[1]))
        q, k, v = joint_heads(text.attn, entering_context, image.attn, entering_x, HEAD_DIM)
        lengths = [context.shape[1], x.shape[1]]
        attended_context, attended_x = attend(q, k, v, None).split(lengths, dim=1)
        gate, change = image_mod[2], linear_of_part(image.attn.proj, attended_x)
        if image.attn2 is not None:
            x = torch.addcmul(x, gate, change)
            q, k, v = image.attn2.heads(entering_dual[0])
            attended = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None)
            gate, change = image_mod[8], image.attn2.proj(attended)
        x = image.feed_forward(x, gate, change, Modulation(*image_mod[3:6]))
        if text.attn.proj is not None:
            change = linear_of_part(text.attn.proj, attended_context)
            context = text.feed_forward(context, text_mod[2], change, Modulation(*text_mod[3:6]))
        return x, context


class FinalLayer(nn.Module):
    def __init__(self, config: MMDiTConfig, ops: Any):
        super().__init__()
        hidden = config.hidden_size
        self.norm_final = ops.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.linear = ops.Linear(hidden, config.patch_size**2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ops.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        (entering,) = norm_modulate(self.norm_final, x, (shift, scale))
        return self.linear(entering)


class MMDiT(nn.Module):
    """The velocity of the rectified flow at a noisy latent, given the text.

    Every layer comes from `ops` (torch.nn, or ComfyUI's layers that offload and cast); `attention`
    replaces the default attention.  The input's dtype is the dtype of the computation.
    """

    def __init__(self, config: MMDiTConfig, ops: Any = nn, attention: Attention = attention):
        super().__init__()
        self.config = config
        self.attention = attention
        hidden = config.hidden_size
        self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, hidden, ops)
        self.t_embedder = VectorEmbedder(TIMESTEP_FREQUENCIES, hidden, ops)
        self.y_embedder = VectorEmbedder(config.pooled_dim, hidden, ops)
        self.context_embedder = ops.Linear(config.context_dim, hidden)
        self.register_buffer(
            "pos_embed", torch.empty(1, config.pos_embed_max_size**2, hidden), persistent=True
        )
        self.pos_embed: Tensor
        self.joint_blocks = nn.ModuleList(
            JointBlock(config, index, ops) for index in range(config.depth)
        )
        self.final_layer = FinalLayer(config, ops)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor,
        skip_layers: Iterable[int] = (),
    ) -> Tensor:
        """x: [B, C, H, W]; timestep: [B], 1000 * sigma; context: [B, L, Dc]; pooled: [B, Dp].

        skip_layers: joint blocks that are left out.  Returns the velocity, like x.
        """
        skipped = set(skip_layers)
        tokens = self.embed(x, timestep, context, pooled)
        tokens = self.run_blocks(tokens, (i for i in range(self.config.depth) if i not in skipped))
        return self.unembed(tokens)

    def embed(self, x: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor) -> Tokens:
        """Latents, time and text as tokens; arguments as in forward."""
        height, width = x.shape[-2:]
        patches = pad_to_patch(x, self.config.patch_size)
        tokens = self.x_embedder(patches)  # [B, Lx, D]
        tokens = tokens + self.crop_positions(*patches.shape[-2:]).to(tokens)
        c = self.time_and_text(timestep, pooled, x.dtype)
        return Tokens(tokens, self.context_embedder(context), c, (height, width))

    def time_and_text(self, timestep: Tensor, pooled: Tensor, dtype: torch.dtype) -> Tensor:
        """c [B, D], the input of every adaLN; as in forward, but the timestep on any device."""
        frequencies = timestep_embedding(timestep).to(pooled.device, dtype, non_blocking=True)
        return self.t_embedder(frequencies) + self.y_embedder(pooled)

    def run_blocks(self, tokens: Tokens, blocks: Iterable[int]) -> Tokens:
        """Pass the tokens through these joint blocks, in this order."""
        x, context = tokens.x, tokens.context
        for index in blocks:
            x, context = self.joint_blocks[index](x, context, tokens.c, self.attention)
        return Tokens(x, context, tokens.c, tokens.size)

    def unembed(self, tokens: Tokens) -> Tensor:
        """Image tokens back to [B, C, H, W]."""
        height, width = tokens.size
        patch = self.config.patch_size
        patches = self.final_layer(tokens.x, tokens.c)  # [B, Lx, p * q * C]
        x = rearrange(
            patches,
            "B (H W) (p q C) -> B C (H p) (W q)",
            H=math.ceil(height / patch),
            p=patch,
            q=patch,
        )
        return x[..., :height, :width]

    def crop_positions(self, height: int, width: int) -> Tensor:
        """The centre of the position table for a latent of this size: [1, Lx, D].

        Raises ValueError when the table is smaller than the latent.
        """
        side, patch = self.config.pos_embed_max_size, self.config.patch_size
        rows, columns = height // patch, width // patch
        if max(rows, columns) > side:
            raise ValueError(
                f"latent of {height} x {width}: the model's position table ends at {side * patch} "
                "latent pixels a side. Choose a smaller width and height."
            )
        top, left = (side - rows) // 2, (side - columns) // 2
        table = rearrange(self.pos_embed, "one (H W) D -> one H W D", H=side)
        return table[:, top : top + rows, left : left + columns].flatten(1, 2)
