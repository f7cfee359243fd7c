"""The autoencoder of Stable Diffusion 3: 8 x 8 image pixels to one latent pixel of 16 channels.

Esser et al. 2024 (arXiv:2403.03206), section 5.2.1; the convolutional design is that of Rombach et
al. 2022 (arXiv:2112.10752).  Module names are those of the released checkpoints.

Two spaces: the VAE reads and writes *VAE space*; the MMDiT and all of `sd3_core` work in *model
space*, shifted and scaled to about zero mean and unit variance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import CheckpointError
from .attention import Attention, attention

LATENT_SCALE = 1.5305  # Stability's SD3 release: scale_factor and shift_factor of the VAE
LATENT_SHIFT = 0.0609


def to_model_space(latents: Tensor) -> Tensor:
    """Latents as the VAE gives them -> latents as the MMDiT takes them."""
    return (latents - LATENT_SHIFT) * LATENT_SCALE


def to_vae_space(latents: Tensor) -> Tensor:
    """Latents as the MMDiT gives them -> latents as the VAE takes them."""
    return latents / LATENT_SCALE + LATENT_SHIFT


@dataclass(frozen=True)
class VAEConfig:
    """channels: width of each resolution level, from full resolution down."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks_per_level: int = 2
    latent_channels: int = 16
    image_channels: int = 3

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return 2 ** (len(self.channels) - 1)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> "VAEConfig":
        """Read the sizes off a state dict's shapes (keys without prefix).

        Raises CheckpointError when a tensor that tells a size is missing.
        """
        levels = _count(shapes, "encoder.down.{}.block.0.conv1.weight")
        try:
            return cls(
                channels=tuple(
                    shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)
                ),
                blocks_per_level=_count(shapes, "encoder.down.0.block.{}.conv1.weight"),
                latent_channels=shapes["decoder.conv_in.weight"][1],
                image_channels=shapes["encoder.conv_in.weight"][1],
            )
        except (KeyError, IndexError) as error:
            raise CheckpointError(f"no VAE: its size cannot be read ({error})") from error


def _count(shapes: Mapping[str, Sequence[int]], pattern: str) -> int:
    count = 0
    while pattern.format(count) in shapes:
        count += 1
    return count


@dataclass(frozen=True)
class Posterior:
    """What the encoder says of an image, in VAE space; each [B, C, H/8, W/8]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + standard deviation * noise; noise like mean, standard normal."""
        return self.mean + torch.exp(0.5 * self.logvar.clamp(-30.0, 20.0)) * noise


def group_norm(channels: int, ops: Any) -> nn.Module:
    return ops.GroupNorm(32, channels, eps=1e-6, affine=True)


def silu(normed: Tensor) -> Tensor:
    """Without gradients in place: every norm's output is its own memory, and read only here."""
    return F.silu(normed, inplace=not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, ops: Any):
        super().__init__()
        self.norm1 = group_norm(in_channels, ops)
        self.conv1 = ops.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = group_norm(out_channels, ops)
        self.conv2 = ops.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = ops.Conv2d(in_channels, out_channels, kernel_size=1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention over all pixels with one head as wide as the channels."""

    def __init__(self, channels: int, ops: Any, attend: Attention):
        super().__init__()
        self.attend = attend
        self.norm = group_norm(channels, ops)
        self.q = ops.Conv2d(channels, channels, kernel_size=1)
        self.k = ops.Conv2d(channels, channels, kernel_size=1)
        self.v = ops.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = ops.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (
            rearrange(layer(normed), "B C H W -> B 1 (H W) C") for layer in (self.q, self.k, self.v)
        )
        attended = self.attend(q, k, v, None)  # [B, H * W, C]
        return x + self.proj_out(rearrange(attended, "B (H W) C -> B C H W", H=x.shape[2]))


class Middle(nn.Module):
    def __init__(self, channels: int, ops: Any, attend: Attention):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, ops)
        self.attn_1 = AttnBlock(channels, ops, attend)
        self.block_2 = ResnetBlock(channels, channels, ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, channels: int, ops: Any):
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros at the right and the bottom only


class Upsample(nn.Module):
    def __init__(self, channels: int, ops: Any):
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then perhaps the step to the next."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, ops: Any):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, ops)
            for i in range(blocks)
        )
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, 2 * latent channels, H/8, W/8]: mean and log-variance."""

    def __init__(self, config: VAEConfig, ops: Any, attend: Attention):
        super().__init__()
        widths = config.channels
        self.conv_in = ops.Conv2d(config.image_channels, widths[0], kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, config.blocks_per_level, ops)
            if i < len(widths) - 1:
                level.downsample = Downsample(width, ops)
            self.down.append(level)
        self.mid = Middle(widths[-1], ops, attend)
        self.norm_out = group_norm(widths[-1], ops)
        self.conv_out = ops.Conv2d(widths[-1], 2 * config.latent_channels, kernel_size=3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        return self.conv_out(silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """[B, latent channels, H/8, W/8] -> [B, 3, H, W]."""

    def __init__(self, config: VAEConfig, ops: Any, attend: Attention):
        super().__init__()
        widths = config.channels
        self.conv_in = ops.Conv2d(config.latent_channels, widths[-1], kernel_size=3, padding=1)
        self.mid = Middle(widths[-1], ops, attend)
        self.up = nn.ModuleList()  # up.0 is the full resolution, so it runs last
        for i, width in enumerate(widths):
            below = widths[min(i + 1, len(widths) - 1)]
            level = Level(below, width, config.blocks_per_level + 1, ops)
            if i > 0:
                level.upsample = Upsample(width, ops)
            self.up.append(level)
        self.norm_out = group_norm(widths[0], ops)
        self.conv_out = ops.Conv2d(widths[0], config.image_channels, kernel_size=3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(silu(self.norm_out(h)))


class VAE(nn.Module):
    """Images in -1..1 <-> latents in VAE space (see to_model_space)."""

    def __init__(self, config: VAEConfig, ops: Any = nn, attention: Attention = attention):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, ops, attention)
        self.decoder = Decoder(config, ops, attention)

    def encode(self, images: Tensor) -> Posterior:
        """images: [B, 3, H, W] in -1..1, H and W multiples of 8."""
        mean, logvar = self.encoder(_channels_last(images)).chunk(2, dim=1)
        return Posterior(mean.contiguous(), logvar.contiguous())

    def decode(self, latents: Tensor) -> Tensor:
        """latents: [B, C, H/8, W/8] in VAE space.  Returns [B, 3, H, W], about -1..1."""
        return self.decoder(_channels_last(latents)).contiguous()


def _channels_last(x: Tensor) -> Tensor:
    # Convolutions keep the layout of their input; this one is 15 % faster on CPUs (measured by
    # `python -m sd3_core bench`) and the tensor cores' own on GPUs.
    return x.contiguous(memory_format=torch.channels_last)
