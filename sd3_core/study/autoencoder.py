"""VAEs with 4, 8 and 16 channels: trained ones, and the best linear ones.

At factor 8 a latent pixel stands for 192 numbers.  The best linear code of so many numbers is known
(principal components), so its row needs no training; the trained row is limited by its steps as
much as by its channels when they are few.
"""

import torch
from torch import Tensor

from ..embedded.render import draw
from ..embedded.stages.basis import Basis
from ..embedded.stages.samples import HELD, TRAINING, crops, scenes_of
from ..embedded.stages.vae import KINDS, VAEStage, VAETask, divergence, psnr, reconstruction
from ..training.batches import generator
from ..training.loop import Losses
from .features import features, frechet, ssim

SIDE = 32  # pixels of a training square
SIZE = (64, 64)


class SquaresTask(VAETask):
    """The paper's autoencoder (reconstruction + KL) on small squares, without given latents."""

    config: VAEStage

    def loss(self, step: int, rows: range, size: int) -> Losses:
        numbers = [step * size + row for row in rows]
        scenes = scenes_of(TRAINING, numbers, SIZE, KINDS)
        pictures = crops(scenes, SIDE, self.config.seed, step, rows.start, device=self.device)
        posterior = self.encode(pictures)
        drawing = generator(self.config.seed, step, rows.start, "posterior")
        noise = torch.randn(posterior.mean.shape, generator=drawing).to(self.device)
        error = reconstruction(self.decode(posterior.sample(noise)), pictures, self.config)
        return Losses(error + self.config.kl * divergence(posterior))

    def validate(self) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def there_and_back(self, pictures: Tensor) -> Tensor:
        coded = (self.encode(some).mean for some in pictures.to(self.device).split(16))
        return torch.cat([self.decode(some) for some in coded]).cpu().clamp(-1, 1)


def stage(channels: int, steps: int, batch_size: int, seed: int) -> VAEStage:
    return VAEStage(
        steps=steps,
        batch_size=batch_size,
        warmup=min(100, steps // 5),
        ema=0.99,
        seed=seed,
        checkpoint_every=max(1, steps // 2),
        keep=1,
        validate_every=0,
        sample_every=0,
        latent_channels=channels,
    )


def linear(basis: Basis, pictures: Tensor) -> Tensor:
    return basis.draw(basis(pictures)).clamp(-1, 1)


def held_pictures(count: int, seed: int) -> Tensor:
    """Others for each seed."""
    return draw(scenes_of(HELD, range(count * seed, count * (seed + 1)), SIZE, KINDS))


def fidelity(drawn: Tensor, pictures: Tensor) -> dict[str, float]:
    return {
        "psnr": psnr(drawn, pictures),
        "ssim": ssim(drawn, pictures),
        "fid": frechet(features(drawn), features(pictures)),
    }
