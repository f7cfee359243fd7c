"""What pictures are compared by: fixed features for FID, and SSIM.

The paper takes CLIP's features.  No such network comes with this project, so the features here are
those of two convolutions whose weights a seed draws and nobody trains.  Random ones are sensitive
to blur, noise and the number of edges (Naeem et al. 2020, arXiv:2002.09797, found them of use
where the pictures are unlike ImageNet's); the numbers compare with each other and with nothing
outside of this study.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..training.batches import generator

WIDTHS = (3, 12, 24)
FLOOR = 1e-3  # of the largest variance: what varies less is not blown up further
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels; Wang et al. 2004


@lru_cache(maxsize=1)
def weights() -> tuple[Tensor, ...]:
    """Two layers' [out, in, 4, 4], with orthogonal rows; the first is blind to what is flat."""
    made = []
    for number, (before, after) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False)):
        weight = torch.empty(after, before, 4, 4)
        draws = generator(0, number, "features")
        torch.nn.init.orthogonal_(weight, gain=2**0.5, generator=draws)
        made.append(weight)
    made[0] -= made[0].mean((2, 3), keepdim=True)
    return tuple(made)


@torch.no_grad()
def features(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] in -1..1 -> [B, 39], float64: mean colour, and mean of each layer's channels."""
    x = pictures.float().cpu()
    means = [x.mean((2, 3))]
    for weight in weights():
        x = F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight, stride=2))
        means.append(x.mean((2, 3)))
    return torch.cat(means, dim=1).double()


def frechet(first: Tensor, second: Tensor) -> float:
    """Fréchet distance of two clouds of features [n, F], as normal distributions.

    Heusel et al. 2017 (arXiv:1706.08500), but in coordinates in which the second cloud, the truth,
    varies alike in all directions: else the ground's brightness is all that counts.  In percent of
    that variance.  Small clouds look farther apart than they are: compare clouds of one size.
    """
    covariance = torch.cov(second.T)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors * values.clamp(min=FLOOR * float(values.max())).rsqrt()
    means, covariances = zip(
        *((x.mean(0), torch.cov(x.T)) for x in (first @ whiten, second @ whiten)), strict=True
    )
    root = _square_root(covariances[1])
    cross = _square_root(root @ covariances[0] @ root)
    traces = covariances[0].trace() + covariances[1].trace() - 2 * cross.trace()
    distance = (means[0] - means[1]).square().sum() + traces
    return 100 * float(distance / covariances[1].trace())


def _square_root(matrix: Tensor) -> Tensor:
    """Of a symmetric matrix without negative eigenvalues, but for rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def ssim(drawn: Tensor, pictures: Tensor) -> float:
    """Structural similarity of pictures [B, 3, H, W] in -1..1: 1 where they are equal.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity",
    with its Gaussian window, on each colour.
    """
    places = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    bell = torch.exp(-(places**2) / (2 * SSIM_SIGMA**2))
    bell = bell / bell.sum()
    window = torch.outer(bell, bell).expand(3, 1, -1, -1)

    def blurred(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)

    x, y = drawn.cpu().double(), pictures.cpu().double()  # Apple's GPUs have no float64
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the range of values is 2
    mean_x, mean_y = blurred(x), blurred(y)
    variance_x = blurred(x * x) - mean_x**2
    variance_y = blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    same = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    apart = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return float((same / apart).mean())
