"""The autoencoder of the embedded model.

Its latents are given, not found: the linear ones of basis.py.  The decoder learns to draw from
them, the encoder to find them and to say how sure it is.  So both are taught directly, from the
first step, and twenty minutes of a processor suffice; and the latents stay local and smooth, which
the MMDiT finds easy.

Without a basis it is the autoencoder of the paper's table: reconstruction + KL (Rombach et al.
2022, arXiv:2112.10752, appendix G), without a discriminator, which flat shapes do not need.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.layouts import PREFIXES
from ...checkpoints.save import save_tensors
from ...models.cast import CastOps
from ...models.vae import VAE, Posterior, VAEConfig, to_vae_space
from ...pictures import save_png, to_uint8
from ...training.batches import generator
from ...training.config import LoopConfig
from ...training.loop import Losses
from ...training.optimizers import Parameters
from ..checker import agreement
from ..render import draw
from .basis import Basis
from .samples import HELD, TRAINING, crops, scenes_of

KINDS = {"single": 0.15, "count": 0.25, "pair": 0.1, "relation": 0.2, "three": 0.2, "word": 0.1}
SIZES = ((64, 64), (128, 128))
# Pictures, and the side of the squares cut from them, that steps take in turn: small squares cost
# little and hold little ground, whole pictures show how far a network must look.
LESSONS = (((64, 64), 64), ((128, 128), 64), ((128, 128), 32), ((128, 128), 128))
SPREAD = 0.04  # of the latents that the decoder learns from, in VAE space
NARROW = -6.0  # log-variance of the first latents


@dataclass(frozen=True, kw_only=True)
class VAEStage(LoopConfig):
    """Settings of the stage."""

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
    kl: float = 1e-4  # without a basis: weight of the KL divergence, a mean over latent elements
    square: float = 2.0  # weight of the squared error, beside 1 of the absolute one
    miss: float = 5.0  # weight of the squared distance of the encoder's mean to the basis
    sureness: float = 0.02  # and of its log-likelihood, for the variance alone
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


def surprise(miss: Tensor, logvar: Tensor) -> Tensor:
    """Negative log-likelihood of a normal distribution, up to a constant; miss: squared."""
    logvar = logvar.clamp(-12, 4)
    return 0.5 * (logvar + miss / logvar.exp())


def divergence(posterior: Posterior) -> Tensor:
    """KL of the posterior to a standard normal, mean over latent elements: [B]."""
    mean, logvar = posterior.mean, posterior.logvar.clamp(-30, 20)
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).mean(1)


class VAETask:
    """Pictures through the bottleneck and back; see the module's docstring."""

    product = "model"

    def __init__(
        self,
        vae: VAE,
        config: VAEStage,
        device: torch.device,
        dtype: torch.dtype,
        basis: Basis | None = None,
    ):
        self.vae, self.config, self.basis = vae.to(device), config, basis
        self.device, self.dtype = device, dtype
        self.parameters: Parameters = dict(vae.named_parameters())

    def loss(self, step: int, rows: range, size: int) -> Losses:
        numbers = [step * size + row for row in rows]
        picture_size, side = LESSONS[step % len(LESSONS)]
        scenes = scenes_of(TRAINING, numbers, picture_size, KINDS)
        pictures = crops(scenes, side, self.config.seed, step, rows.start, device=self.device)
        drawing = generator(self.config.seed, step, rows.start, "posterior")
        posterior = self.encode(pictures)
        noise = torch.randn(posterior.mean.shape, generator=drawing).to(self.device)
        if self.basis is None:
            error = reconstruction(self.decode(posterior.sample(noise)), pictures, self.config)
            kl = divergence(posterior)
            return Losses(error + self.config.kl * kl, {"error": error, "kl": kl})
        wanted = to_vae_space(self.basis(pictures))
        error = reconstruction(self.decode(wanted + SPREAD * noise), pictures, self.config)
        miss = (posterior.mean - wanted).square()
        doubt = surprise(miss.detach(), posterior.logvar).flatten(1).mean(1)
        miss = miss.flatten(1).mean(1)
        total = error + self.config.miss * miss + self.config.sureness * doubt
        return Losses(total, {"error": error, "miss": miss})

    # Not VAE.encode and VAE.decode: in their channels-last layout the gradient of a group norm
    # takes fifty times as long on a CPU (torch 2.11, bf16: 270 ms instead of 5).

    def encode(self, pictures: Tensor) -> Posterior:
        mean, logvar = self.vae.encoder(pictures.to(self.dtype)).float().chunk(2, dim=1)
        return Posterior(mean, logvar)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decoder(latents.to(self.dtype)).float()

    def validate(self) -> Mapping[str, float]:
        """PSNR, and the share of pictures that are read right, of held-out scenes there and back;
        and likewise behind the basis alone, which is how the MMDiT's pictures are drawn."""
        measured = {}
        for size in SIZES:
            scenes = scenes_of(HELD, range(64), size, KINDS)
            pictures = draw(scenes, self.device)
            for name, drawn in self._drawn(pictures).items():
                measured[f"{name}psnr{size[0]}"] = psnr(drawn, pictures)
                measured[f"{name}read{size[0]}"] = agreement(drawn, scenes)
        return {"loss": -sum(measured[f"psnr{size[0]}"] for size in SIZES), **measured}

    def _drawn(self, pictures: Tensor) -> dict[str, Tensor]:
        ways = {"": lambda some: self.encode(some).mean}
        if (basis := self.basis) is not None:
            ways["basis_"] = lambda some: to_vae_space(basis(some))
        return {
            name: torch.cat([self.decode(way(some)) for some in pictures.split(16)]).clamp(-1, 1)
            for name, way in ways.items()
        }

    @torch.no_grad()
    def sample(self, folder: Path, step: int) -> None:
        """Pictures above what becomes of them."""
        pictures = draw(scenes_of(HELD, range(8), (128, 128), KINDS), self.device)
        rows = (pictures, self._drawn(pictures)[""])
        both = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
        save_png(to_uint8(both[None])[0], folder / f"step-{step:06}.png", {"step": step})

    def export(self, path: Path, step: int) -> Path:
        state = {PREFIXES["vae"] + name: tensor for name, tensor in self.vae.state_dict().items()}
        return save_tensors(path, state, {"sd3_workbench.step": str(step)})


def psnr(drawn: Tensor, pictures: Tensor) -> float:
    """Decibels between pictures in -1..1, from the mean squared error of all of them."""
    return 10 * math.log10(4 / float((drawn - pictures).square().mean()))
