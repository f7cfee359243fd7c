"""The VAE's decoder a stripe of rows at a time: the picture of the whole, in a part of the memory.

At 1024 x 1024 the decoder's widest tensor takes 1 GB in float32, and a layer holds several.  Here
only one tensor of each level is kept whole and everything between is computed for some rows at a
time.  A convolution's stripe takes its neighbouring rows from the next one, and a group norm first
walks the stripes for its mean and variance; so, unlike with overlapping tiles, nothing is averaged
and there is no seam.  What two passes need is computed twice: a third more work.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.vae import VAE, Decoder, Level, ResnetBlock, VAEConfig, silu

PLAIN_UP_TO = 400_000_000  # bytes of the widest tensor: 600 x 600 pixels in float32
STRIPE = 32_000_000  # bytes of one stripe of any tensor
FEWEST_ROWS = 8  # more than a stripe takes of its neighbours

Affine = Callable[[Any, Tensor], tuple[Tensor, Tensor]]  # (norm, its input) -> weight, bias


@dataclass(frozen=True)
class Image:
    """Features [B, C, H, W] that are read, or computed, some rows at a time."""

    height: int
    row_bytes: int  # of the widest tensor that it takes
    rows: Callable[[int, int], Tensor]  # (start, stop) -> [B, C, stop - start, W]
    tensor: Tensor | None = None  # all of it, where it is kept; ours to write to

    def stripes(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, rows) from top to bottom."""
        step = max(FEWEST_ROWS, STRIPE // self.row_bytes)
        for start in range(0, self.height, step):
            stop = min(start + step, self.height)
            yield start, stop, self.rows(start, stop)


def affine(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return norm.weight.to(x), norm.bias.to(x)


def decode(vae: VAE, latents: Tensor) -> Tensor:
    """As VAE.decode; large pictures one after the other, in stripes."""
    if not is_large(vae.config, latents.shape, latents.dtype):
        return vae.decode(latents)
    return torch.cat([decode_in_stripes(vae.decoder, latent[None]) for latent in latents])


def is_large(config: VAEConfig, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether latents of this shape [B, C, H/8, W/8] are to be decoded in stripes."""
    widest = max(config.channels[:2])  # what enters the last level
    return widest * pixels(config, shape) * dtype.itemsize > PLAIN_UP_TO


def memory_needed(config: VAEConfig, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of work on one picture in stripes: two tensors that are kept, and a dozen stripes."""
    last, before = config.channels[:2]
    return pixels(config, shape) * dtype.itemsize * (last + before // 4) + 12 * STRIPE


def pixels(config: VAEConfig, shape: Sequence[int]) -> int:
    return shape[2] * shape[3] * config.factor**2


@torch.no_grad()
def decode_in_stripes(decoder: Decoder, latents: Tensor, affine: Affine = affine) -> Tensor:
    """latents: [B, C, H/8, W/8] in VAE space.  Returns [B, 3, H, W]."""
    x = latents.contiguous(memory_format=torch.channels_last)
    image = whole(decoder.mid(decoder.conv_in(x)))
    for level in reversed(decoder.up):
        assert isinstance(level, Level)
        for block in level.block:
            assert isinstance(block, ResnetBlock)
            image = residual(block, image, affine)
        if level.upsample is not None:
            image = upsampled(level.upsample, image)
    image = convolved(decoder.conv_out, activated(decoder.norm_out, image, affine))
    return stored(image).contiguous()


# Layers on Images


def residual(block: ResnetBlock, x: Image, affine: Affine) -> Image:
    """The block's output takes the place of its input, or of what lies between where none does."""
    between = convolved(block.conv1, activated(block.norm1, x, affine))
    if x.tensor is None or x.tensor.shape[1] != between.rows(0, 1).shape[1]:
        between = whole(stored(between))
        place = between.tensor
    else:
        place = x.tensor
    change = convolved(block.conv2, activated(block.norm2, between, affine))

    def rows(start: int, stop: int) -> Tensor:
        return block.nin_shortcut(x.rows(start, stop)) + change.rows(start, stop)

    return whole(stored(Image(x.height, x.row_bytes, rows), place))


def whole(tensor: Tensor) -> Image:
    height = tensor.shape[2]
    row_bytes = tensor.nbytes // height
    return Image(height, row_bytes, lambda start, stop: tensor[:, :, start:stop], tensor)


def stored(image: Image, place: Tensor | None = None) -> Tensor:
    """The whole, written to `place`, which the image itself may read.

    A stripe is written once the next one is computed: that one reads a few rows above its own.
    """
    waiting: tuple[int, int, Tensor] | None = None
    for start, stop, rows in image.stripes():
        if place is None:
            batch, channels, _, width = rows.shape
            place = torch.empty(
                (batch, channels, image.height, width),
                dtype=rows.dtype,
                device=rows.device,
                memory_format=torch.channels_last,
            )
        if waiting is not None:
            place[:, :, waiting[0] : waiting[1]] = waiting[2]
        waiting = start, stop, rows
    assert place is not None
    assert waiting is not None
    place[:, :, waiting[0] : waiting[1]] = waiting[2]
    return place


def convolved(conv: nn.Module, image: Image) -> Image:
    """A 3 x 3 convolution.  Rows at a cut are computed with their neighbours, which then leave."""

    def rows(start: int, stop: int) -> Tensor:
        above, below = max(start - 1, 0), min(stop + 1, image.height)
        return conv(image.rows(above, below))[:, :, start - above : stop - above]

    return Image(image.height, image.row_bytes, rows)


def upsampled(layer: nn.Module, image: Image) -> Image:
    """The upsampling layer: each row twice, then a 3 x 3 convolution."""

    def rows(start: int, stop: int) -> Tensor:
        above, below = max(start - 1, 0) // 2, min(stop // 2 + 1, image.height)
        return layer(image.rows(above, below))[:, :, start - 2 * above : stop - 2 * above]

    return Image(2 * image.height, 2 * image.row_bytes, rows)


def activated(norm: Any, image: Image, affine: Affine) -> Image:
    """SiLU of the group norm, whose mean and variance are those of the whole image."""
    mean, variance = group_statistics(image, norm.num_groups)
    weight, bias = affine(norm, image.rows(0, 1))
    scale = torch.rsqrt(variance + norm.eps).float() * weight
    shift = bias - mean.float() * scale
    scale, shift = scale[:, :, None, None], shift[:, :, None, None]

    def rows(start: int, stop: int) -> Tensor:
        x = image.rows(start, stop)
        return silu(torch.addcmul(shift, x, scale).to(x.dtype))

    return Image(image.height, image.row_bytes, rows)


def group_statistics(image: Image, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of channels, given for every channel: [B, C], float64."""
    pixels, total, squares = 0, torch.zeros(()), torch.zeros(())
    for _, _, rows in image.stripes():
        variance, mean = torch.var_mean(rows.float(), dim=(2, 3), correction=0)
        mean, variance = mean.double(), variance.double()
        count = rows.shape[2] * rows.shape[3]
        pixels += count
        total = total.to(mean) + count * mean
        squares = squares.to(mean) + count * (variance + mean**2)
    batch, channels = total.shape
    sums = torch.stack([total, squares]).reshape(2, batch, groups, -1).mean(dim=3) / pixels
    mean, square = sums.repeat_interleave(channels // groups, dim=2)
    return mean, square - mean**2
