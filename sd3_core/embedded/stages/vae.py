"""The autoencoder of the embedded model, in two stages.

`vae` trains encoder and decoder: reconstruction + KL (Rombach et al. 2022, arXiv:2112.10752,
appendix G), without a discriminator, which flat shapes do not need.  `decoder` then folds the
latents' measured mean and standard deviation into the encoder's last layer, so that SD3's own shift
and scale give about zero mean and unit variance, freezes the encoder, and goes on with the decoder.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.layouts import PREFIXES
from ...checkpoints.load import component_of, load_vae
from ...checkpoints.save import save_tensors
from ...models.cast import CastOps
from ...models.vae import LATENT_SCALE, LATENT_SHIFT, VAE, Posterior, VAEConfig
from ...pictures import save_png, to_uint8
from ...training.batches import generator
from ...training.config import LoopConfig
from ...training.loop import Losses
from ...training.optimizers import Parameters
from ..checker import agreement
from ..render import draw
from .samples import HELD, TRAINING, crops, scenes_of

KINDS = {"single": 0.15, "count": 0.25, "pair": 0.1, "relation": 0.2, "three": 0.2, "word": 0.1}
SIZES = ((64, 64), (128, 128))
# Pictures, and the side of the squares cut from them, that steps take in turn: small squares cost
# little and hold little ground, whole pictures show how far a network must look.
LESSONS = (((64, 64), 64), ((128, 128), 32), ((64, 64), 32))
DECODER_LESSONS = (((64, 64), 64), ((128, 128), 64), ((128, 128), 32), ((128, 128), 128))
NARROW = -6.0  # log-variance of the first latents


@dataclass(frozen=True, kw_only=True)
class VAEStage(LoopConfig):
    """Settings of both stages."""

    steps: int = 20_000
    batch_size: int = 32
    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    lr_schedule: str = "cosine"
    warmup: int = 200
    ema: float = 0.999
    checkpoint_every: int = 500
    validate_every: int = 500
    sample_every: int = 2000
    latent_channels: int = 16
    channels: tuple[int, ...] = (32, 32, 64, 64)
    blocks_per_level: int = 1
    kl: float = 1e-4  # weight of the KL divergence, a mean over latent elements
    square: float = 2.0  # weight of the squared error, beside 1 of the absolute one
    gradient: float = 0.5  # weight of the error of neighbours' differences: edges
    coarse: float = 0.5  # weight of the error at a half and a quarter of the resolution


def new_vae(config: VAEStage) -> VAE:
    """An autoencoder that has learnt nothing.

    Every residual branch begins at zero, and the posterior narrow: from the usual unit variance the
    first latents drown in their own noise (17.2 dB instead of 20.7 after 400 steps).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, "vae").initial_seed())
        sizes = VAEConfig(config.channels, config.blocks_per_level, config.latent_channels)
        vae = VAE(sizes, CastOps())
    for name, parameter in vae.named_parameters():
        if name.endswith(("conv2.weight", "conv2.bias", "proj_out.weight", "proj_out.bias")):
            nn.init.zeros_(parameter)
    last, count = vae.encoder.conv_out, config.latent_channels
    with torch.no_grad():
        last.weight[count:] *= 0.1
        last.bias[count:] = NARROW
    return vae


def reconstruction(drawn: Tensor, pictures: Tensor, config: VAEStage) -> Tensor:
    """Error of pixels, of edges, and from farther away: [B].

    The square weighs what is far off: by the absolute error alone small things stay grey for long.
    """
    error = drawn - pictures
    total = error.abs().flatten(1).mean(1) + config.square * error.square().flatten(1).mean(1)
    for axis in (2, 3):
        total = total + config.gradient / 2 * error.diff(dim=axis).abs().flatten(1).mean(1)
    for window in (2, 4):
        total = total + config.coarse / 2 * F.avg_pool2d(error, window).abs().flatten(1).mean(1)
    return total


def divergence(posterior: Posterior) -> Tensor:
    """KL of the posterior to a standard normal, mean over latent elements: [B]."""
    mean, logvar = posterior.mean, posterior.logvar.clamp(-30, 20)
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).mean(1)


class VAETask:
    """Pictures through the bottleneck and back.

    decoder_only: the encoder is frozen; reconstruction alone is learnt.
    """

    product = "model"

    def __init__(
        self,
        vae: VAE,
        config: VAEStage,
        device: torch.device,
        dtype: torch.dtype,
        *,
        decoder_only: bool = False,
    ):
        self.vae, self.config = vae.to(device), config
        self.device, self.dtype, self.decoder_only = device, dtype, decoder_only
        trained = vae.decoder if decoder_only else vae
        prefix = "decoder." if decoder_only else ""
        self.parameters: Parameters = {
            prefix + name: parameter for name, parameter in trained.named_parameters()
        }
        vae.encoder.requires_grad_(not decoder_only)

    def loss(self, step: int, rows: range, size: int) -> Losses:
        numbers = [step * size + row for row in rows]
        lessons = DECODER_LESSONS if self.decoder_only else LESSONS
        picture_size, side = lessons[step % len(lessons)]
        scenes = scenes_of(TRAINING, numbers, picture_size, KINDS)
        pictures = crops(scenes, side, self.config.seed, step, rows.start, device=self.device)
        with torch.set_grad_enabled(not self.decoder_only):
            posterior = self.encode(pictures)
        drawing = generator(self.config.seed, step, rows.start, "posterior")
        noise = torch.randn(posterior.mean.shape, generator=drawing).to(self.device)
        error = reconstruction(self.decode(posterior.sample(noise)), pictures, self.config)
        kl = divergence(posterior)
        return Losses(error + (0 if self.decoder_only else self.config.kl) * kl, {"kl": kl})

    # Not VAE.encode and VAE.decode: in their channels-last layout the gradient of a group norm
    # takes fifty times as long on a CPU (torch 2.11, bf16: 270 ms instead of 5).

    def encode(self, pictures: Tensor) -> Posterior:
        mean, logvar = self.vae.encoder(pictures.to(self.dtype)).float().chunk(2, dim=1)
        return Posterior(mean, logvar)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decoder(latents.to(self.dtype)).float()

    def validate(self) -> Mapping[str, float]:
        """Loss, PSNR and the share of pictures that are still read right, on held-out scenes."""
        measured = {}
        for size in SIZES:
            drawn, pictures, scenes = self._reconstructed(size, 64)
            name = str(size[0])
            measured[f"psnr{name}"] = psnr(drawn, pictures)
            measured[f"read{name}"] = agreement(drawn, scenes)
        return {"loss": -sum(measured[f"psnr{size[0]}"] for size in SIZES), **measured}

    def _reconstructed(self, size: tuple[int, int], count: int):
        scenes = scenes_of(HELD, range(count), size, KINDS)
        pictures = draw(scenes, self.device)
        drawn = [self.decode(self.encode(some).mean) for some in pictures.split(16)]
        return torch.cat(drawn).clamp(-1, 1), pictures, scenes

    @torch.no_grad()
    def sample(self, folder: Path, step: int) -> None:
        """Pictures above what becomes of them."""
        drawn, pictures, _ = self._reconstructed((128, 128), 8)
        both = torch.cat([torch.cat(list(row), dim=2) for row in (pictures, drawn)], dim=1)
        save_png(to_uint8(both[None])[0], folder / f"step-{step:06}.png", {"step": step})

    def export(self, path: Path, step: int) -> Path:
        state = {PREFIXES["vae"] + name: tensor for name, tensor in self.vae.state_dict().items()}
        return save_tensors(path, state, {"sd3_workbench.step": str(step)})


def psnr(drawn: Tensor, pictures: Tensor) -> float:
    """Decibels between pictures in -1..1, from the mean squared error of all of them."""
    return 10 * math.log10(4 / float((drawn - pictures).square().mean()))


def load_vae_to_train(path: Path) -> VAE:
    """A stored autoencoder in float32, whose layers compute in the dtype of their input."""
    vae = load_vae(component_of(path, "vae"), ops=CastOps())
    return vae.float().requires_grad_(True)


@torch.no_grad()
def fold_statistics(vae: VAE, task: VAETask, count: int = 1024) -> tuple[Tensor, Tensor]:
    """Move and scale each latent channel to SD3's mean and standard deviation.

    They go into the encoder's last layer, and the opposite into the decoder's first; that one
    surrounds its input with zeros, so it is right but for the border.  Returns what was measured.
    """
    latents = []
    for start in range(0, count, 32):
        numbers = range(start, start + 32)
        scenes = scenes_of(TRAINING, numbers, SIZES[start // 32 % len(SIZES)])
        latents.append(task.encode(draw(scenes, task.device)).mean.transpose(0, 1).flatten(1))
    every = torch.cat(latents, dim=1)
    mean, std = every.mean(1), every.std(1)
    scale = 1 / (std * LATENT_SCALE)
    shift = LATENT_SHIFT - mean * scale  # new = old * scale + shift
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    count = len(mean)
    last.weight[:count] *= scale[:, None, None, None]
    last.bias[:count] = last.bias[:count] * scale + shift
    last.bias[count:] += 2 * scale.log()
    first.weight /= scale[:, None, None]
    first.bias -= first.weight.sum((2, 3)) @ shift
    return mean, std
