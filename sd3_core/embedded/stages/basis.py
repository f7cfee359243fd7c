"""The latents of the embedded model: principal components of 8 x 8 pixels.

Each component is divided by the square root of its standard deviation: halfway between leaving it
as it is, where the ground's brightness is all there is and shapes drown in the first noise, and
making all alike, where the finest detail is as loud as the layout.  Over all components the
variance is 1, as SD3's latents have it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoints.header import read_header
from ...checkpoints.save import save_tensors
from ...checkpoints.tensors import read_tensors
from ...models.vae import VAE, to_model_space
from ..render import draw
from .samples import TRAINING, scenes_of

SIDE = 8  # pixels
SIZES = ((64, 64), (128, 128))
PICTURES = 3000  # that the components are measured on


@dataclass(frozen=True)
class Basis:
    """Pictures [B, 3, H, W] in -1..1 -> latents [B, C, H/8, W/8] in model space."""

    weight: Tensor  # [C, 3, 8, 8]
    bias: Tensor  # [C]

    def __call__(self, pictures: Tensor) -> Tensor:
        weight, bias = self.weight.to(pictures.device), self.bias.to(pictures.device)
        return F.conv2d(pictures.float(), weight, bias, stride=SIDE)

    def draw(self, latents: Tensor) -> Tensor:
        """The nearest pictures: the opposite, as far as there is one."""
        back = torch.linalg.pinv(self.weight.flatten(1)).to(latents.device)  # [192, C]
        centred = (latents.float() - self.bias.to(latents.device)[:, None, None]).flatten(2)
        size = (SIDE * latents.shape[2], SIDE * latents.shape[3])
        return F.fold(back @ centred, size, SIDE, stride=SIDE)

    def save(self, path: Path) -> Path:
        return save_tensors(path, {"weight": self.weight, "bias": self.bias})

    @classmethod
    def load(cls, path: Path) -> "Basis":
        tensors = read_tensors(read_header(path))
        return cls(tensors["weight"], tensors["bias"])


def fit_basis(channels: int, pictures: int = PICTURES) -> Basis:
    """The components of the world's pictures, half of each size."""
    half = pictures // 2
    patches = []
    for number, size in enumerate(SIZES):
        for start in range(number * half, (number + 1) * half, 50):
            drawn = draw(scenes_of(TRAINING, range(start, start + 50), size))
            patches.append(F.unfold(drawn, SIDE, stride=SIDE).transpose(1, 2).flatten(0, 1))
    every = torch.cat(patches).double()
    mean = every.mean(0)
    variances, vectors = torch.linalg.eigh(torch.cov((every - mean).T))
    variances, vectors = variances.flip(0)[:channels], vectors.flip(1)[:, :channels]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()  # which way a component points is chance: the same each time
    spread = variances.sqrt()
    scale = spread.rsqrt() / spread.mean().sqrt()  # then the mean of (spread * scale)² is 1
    weight = (vectors * scale).T
    bias = -(weight @ mean)
    return Basis(weight.reshape(channels, 3, SIDE, SIDE).float(), bias.float())


@torch.no_grad()
def basis_of(vae: VAE, pictures: int = 600) -> Basis:
    """The basis that a VAE was taught, read off its encoder by least squares.

    Which way a component points, and which two of almost equal variance come first, is chance: a
    model that goes on from shipped weights needs the components that those were made with.
    """
    half = pictures // 2
    patches, latents = [], []
    for size in SIZES:
        for start in range(0, half, 50):
            drawn = draw(scenes_of(TRAINING, range(start, start + 50), size))
            means = to_model_space(vae.encode(drawn).mean)
            patches.append(F.unfold(drawn, SIDE, stride=SIDE).transpose(1, 2).flatten(0, 1))
            latents.append(means.flatten(2).transpose(1, 2).flatten(0, 1))
    seen, found = torch.cat(patches).double(), torch.cat(latents).double()
    middle = seen.mean(0)
    seen, bias = seen - middle, found.mean(0)
    # flat grounds leave most directions of a patch unseen: a little ridge keeps these at 0
    ridge = 1e-6 * len(seen) * torch.eye(seen.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(seen.T @ seen + ridge, seen.T @ (found - bias)).T
    shape = (len(weight), 3, SIDE, SIDE)
    return Basis(weight.reshape(shape).float(), (bias - weight @ middle).float())
