"""The VAE's decoder a stripe of rows at a time: the picture of the whole, in a part of the memory.

At 1024 x 1024 the decoder's widest tensor takes 1 GB in float32, and a layer holds several.  Here
only one or two tensors of each level are kept whole and everything between is computed for some
rows at a time.  A convolution's stripe takes its neighbouring rows from the next one, and a group
norm first walks the stripes for its mean and variance; so, unlike with overlapping tiles, nothing
is averaged and there is no seam.

It costs time, so the memory that is free decides (`cut`), in three stages.  At 1024 x 1024 in 16
bits: the whole, in 1.9 GiB; stripes, with what both passes of a norm need kept, in 0.9 GiB and with
3 % more arithmetic; and stripes with that computed twice, in 0.5 GiB and with 84 % more.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..memory import is_out_of_memory, let_go
from ..models.vae import VAE, Decoder, Level, ResnetBlock, VAEConfig, silu

ROOM = 0.8  # of the free memory: the rest is for the layers' own work and for other programs
WHOLE = 3.8  # of the widest tensor: in, normed and out of a layer, and a copy in another layout
AT_ONCE = 6  # stripes in memory at the same time
STRIPE = 32_000_000  # bytes of one stripe of any tensor; smaller ones cost more than they save
THIN = STRIPE // 4  # when even that was too much
FEWEST_ROWS = 8  # more than a stripe takes of its neighbours
PLAIN_UP_TO = 400_000_000  # bytes of the widest tensor, where nobody tells what is free

Affine = Callable[[Any, Tensor], tuple[Tensor, Tensor]]  # (norm, of its dtype) -> weight, bias


@dataclass(frozen=True)
class Cut:
    """How a picture is cut."""

    stripe: int  # bytes of one stripe of any tensor
    twice: bool  # what both passes of a norm need is computed in each, not kept


LEAST = Cut(STRIPE, twice=True)
THINNEST = Cut(THIN, twice=True)


@dataclass(frozen=True)
class Image:
    """Features [B, C, H, W] that are read, or computed, some rows at a time."""

    height: int
    row_bytes: int  # of the widest tensor that it takes
    rows: Callable[[int, int], Tensor]  # (start, stop) -> [B, C, stop - start, W]
    cut: Cut
    tensor: Tensor | None = None  # all of it, where it is kept; ours to write to

    def stripes(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, rows) from top to bottom."""
        step = max(FEWEST_ROWS, self.cut.stripe // self.row_bytes)
        for start in range(0, self.height, step):
            stop = min(start + step, self.height)
            yield start, stop, self.rows(start, stop)


def affine(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    return norm.weight.to(like), norm.bias.to(like)


def decode(
    vae: VAE, latents: Tensor, free: float | None, affine: Affine = affine
) -> tuple[Tensor, Cut | None]:
    """As VAE.decode, and how the pictures were cut: at once, or one after the other.

    free: bytes that may be taken, see `memory.free_memory`.  Where that was said wrongly, the
    next thinner cut is tried, and torch's own error raised when the thinnest does not fit.
    """
    how = cut(vae.config, latents.shape, latents.dtype, free)
    if how is not None and len(latents) > 1:
        pictures, hows = zip(
            *(decode(vae, one[None], free, affine) for one in latents), strict=True
        )
        return torch.cat(pictures), hows[-1]
    thinner = [one for one in (LEAST, THINNEST) if how is None or one.stripe < how.stripe]
    for attempt in (how, *thinner):
        try:
            return _decode(vae, latents, attempt, affine), attempt
        except (MemoryError, RuntimeError) as error:
            if attempt == THINNEST or not is_out_of_memory(error):
                raise
            let_go(error)
    raise AssertionError("the thinnest cut returns or raises")


def _decode(vae: VAE, latents: Tensor, how: Cut | None, affine: Affine) -> Tensor:
    if how is None:
        return VAE.decode(vae, latents)
    each = [decode_in_stripes(vae.decoder, latent[None], how, affine) for latent in latents]
    return torch.cat(each)


def cut(
    config: VAEConfig, shape: Sequence[int], dtype: torch.dtype, free: float | None
) -> Cut | None:
    """How latents of this shape [B, C, H/8, W/8] are to be decoded in `free` bytes; None: whole."""
    if free is None:
        return LEAST if _widest(config, shape, dtype) > PLAIN_UP_TO else None
    room = ROOM * free
    if shape[0] * memory_needed(config, shape, dtype, None) <= room:
        return None
    for twice in (False, True):
        stripe = int(room - _kept(config, shape, dtype, twice)) // AT_ONCE
        if stripe >= STRIPE:
            return Cut(stripe, twice)
    return LEAST


def memory_needed(
    config: VAEConfig, shape: Sequence[int], dtype: torch.dtype, how: Cut | None
) -> int:
    """Bytes of work on one picture, weights apart."""
    if how is None:
        return int(WHOLE * _widest(config, shape, dtype))
    fewest = FEWEST_ROWS * _widest(config, shape, dtype) // (shape[2] * config.factor)
    return _kept(config, shape, dtype, how.twice) + AT_ONCE * max(how.stripe, fewest)


def _widest(config: VAEConfig, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of the widest tensor: what enters the last level."""
    return max(config.channels[:2]) * _pixels(config, shape) * dtype.itemsize


def _kept(config: VAEConfig, shape: Sequence[int], dtype: torch.dtype, twice: bool) -> int:
    """Bytes of what is kept whole in the last level."""
    last, before = config.channels[:2]
    return _pixels(config, shape) * dtype.itemsize * (last + (before // 4 if twice else before))


def _pixels(config: VAEConfig, shape: Sequence[int]) -> int:
    return shape[2] * shape[3] * config.factor**2


@torch.no_grad()
def decode_in_stripes(
    decoder: Decoder, latents: Tensor, how: Cut = LEAST, affine: Affine = affine
) -> Tensor:
    """latents: [B, C, H/8, W/8] in VAE space.  Returns [B, 3, H, W]."""
    x = latents.contiguous(memory_format=torch.channels_last)
    image = whole(decoder.mid(decoder.conv_in(x)), how)
    for level in reversed(decoder.up):
        assert isinstance(level, Level)
        for block in level.block:
            assert isinstance(block, ResnetBlock)
            image = residual(block, image, affine)
        if level.upsample is not None:
            image = upsampled(level.upsample, image)
            image = image if how.twice else stored(image)
    image = convolved(decoder.conv_out, activated(decoder.norm_out, image, affine))
    return written(image).contiguous()


# Layers on Images


def residual(block: ResnetBlock, x: Image, affine: Affine) -> Image:
    """The block's output takes the place of its input, or of what lies between where none does."""
    between = convolved(block.conv1, activated(block.norm1, x, affine))
    place = x.tensor if isinstance(block.nin_shortcut, nn.Identity) else None
    if place is None or not x.cut.twice:
        between = stored(between)
    change = convolved(block.conv2, activated(block.norm2, between, affine))

    def rows(start: int, stop: int) -> Tensor:
        return block.nin_shortcut(x.rows(start, stop)) + change.rows(start, stop)

    place = between.tensor if place is None else place
    return whole(written(replace(x, rows=rows), place), x.cut)


def whole(tensor: Tensor, how: Cut) -> Image:
    height = tensor.shape[2]
    row_bytes = tensor.nbytes // height
    return Image(height, row_bytes, lambda start, stop: tensor[:, :, start:stop], how, tensor)


def stored(image: Image) -> Image:
    return whole(written(image), image.cut)


def written(image: Image, place: Tensor | None = None) -> Tensor:
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

    return replace(image, rows=rows, tensor=None)


def upsampled(layer: nn.Module, image: Image) -> Image:
    """The upsampling layer: each row twice, then a 3 x 3 convolution."""

    def rows(start: int, stop: int) -> Tensor:
        above, below = max(start - 1, 0) // 2, min(stop // 2 + 1, image.height)
        return layer(image.rows(above, below))[:, :, start - 2 * above : stop - 2 * above]

    return Image(2 * image.height, 2 * image.row_bytes, rows, image.cut)


def activated(norm: Any, image: Image, affine: Affine) -> Image:
    """SiLU of the group norm, whose mean and variance are those of the whole image."""
    mean, variance = group_statistics(image, norm.num_groups)
    weight, bias = affine(norm, mean)
    scale = torch.rsqrt(variance + norm.eps) * weight
    shift = bias - mean * scale
    scale, shift = scale[:, :, None, None], shift[:, :, None, None]

    def rows(start: int, stop: int) -> Tensor:
        x = image.rows(start, stop)
        return silu(torch.addcmul(shift, x, scale).to(x.dtype))

    return replace(image, rows=rows, tensor=None)


def group_statistics(image: Image, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of channels, given for every channel: [B, C], float32.

    The parts' own means and variances are merged: a sum of squares would need float64, which not
    every device has.  Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
    """
    counts, parts = [], []
    for start, stop, rows in image.stripes():
        counts.append(stop - start)
        parts.append(torch.stack(torch.var_mean(rows.float(), dim=(2, 3), correction=0)))
    variances, means = torch.stack(parts, dim=1).unflatten(3, (groups, -1))  # [S, B, groups, C/g]
    share = torch.full_like(means[..., :1], counts[0] / image.height)
    share[-1].fill_(counts[-1] / image.height)  # the last stripe may be smaller than the others
    share = share / means.shape[3]
    mean = (share * means).sum((0, 3), keepdim=True)
    variance = (share * (variances + (means - mean).square())).sum((0, 3), keepdim=True)
    mean, variance = (each[0].expand(means.shape[1:]).flatten(1) for each in (mean, variance))
    return mean, variance
