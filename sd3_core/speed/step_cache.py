"""The step cache: while the velocity hardly changes, the last one serves again.

The rule is EasyCache's (Zhou et al. 2025, arXiv:2507.02860): between two evaluations of the network
the velocity changes in proportion to the latent, the factor is measured each time, and the changes
so foretold are added up until they pass a threshold.  What is kept is not EasyCache's difference of
output and input but the velocity itself, which a rectified flow holds nearly constant along its
path: on the embedded model, 20 steps of Euler with guidance, half of the evaluations are left out
at a distance of 0.05, with the difference at 0.06 and with the blocks' residual (TeaCache, Liu et
al. 2024, arXiv:2411.19108) at 0.07.

It sees what leaves guidance, so whatever acts inside (LoRAs, ControlNets, areas) acts on the kept
velocity too.  A batch decides together: its pictures depend on each other, a little.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..samplers import Velocity, on_host
from ..schedule import Window


class StepCache:
    """The last velocity of one run, and how far it has probably gone out of date.

    threshold: summed relative change, 0 to 1, below which it is used again; 0 never does.
    windows: where something acts that does not elsewhere; no velocity is used across their ends.
    Raises ValueError for a threshold outside 0..1.
    """

    def __init__(self, threshold: float, windows: Sequence[Window] = ()):
        check_threshold(threshold)
        self.threshold, self.windows = threshold, windows
        self.velocity: Tensor | None = None
        self.x: Tensor | None = None  # of the last call
        self.computed_at: Tensor | None = None  # x of the last evaluation
        self.acting: list[bool] = []  # which windows held there
        self.rate: Tensor | None = None  # relative change of the velocity for one of x
        self.change: Tensor | float = 0.0  # of the velocity since then, as foretold
        self.evaluations = self.reused = 0

    def look_up(self, x: Tensor, sigma: float) -> Tensor | None:
        """The velocity for x [B, C, H, W] at this noise level; None: evaluate, then `keep`."""
        if self.rate is None or self.x is None or not self._fits(x, sigma):
            return None
        self.change = self.change + self.rate * relative_change(x, self.x)
        self.x = x
        if not float(self.change) < self.threshold:  # nor where it is not a number
            return None
        self.reused += 1
        return self.velocity

    def keep(self, x: Tensor, sigma: float, velocity: Tensor) -> None:
        """An evaluation's result."""
        self.evaluations += 1
        if self.threshold == 0:
            return
        self.rate = None
        if self.velocity is not None and self.computed_at is not None and self._fits(x, sigma):
            change = relative_change(velocity, self.velocity)
            self.rate = change / relative_change(x, self.computed_at)
        self.velocity, self.x, self.computed_at = velocity, x, x
        self.acting, self.change = self._acting(sigma), 0.0

    def _fits(self, x: Tensor, sigma: float) -> bool:
        """Whether what is kept is of a run like this, under what acts here."""
        same = self.velocity is not None and self.velocity.shape == x.shape
        return same and self.acting == self._acting(sigma)

    def sentence(self) -> str:
        total = self.evaluations + self.reused
        return f"{self.reused} of {total} evaluations left out"

    def _acting(self, sigma: float) -> list[bool]:
        return [sigma in window for window in self.windows]


def relative_change(now: Tensor, before: Tensor) -> Tensor:
    """|now - before| / |before|, means over everything; a tensor, so that nothing waits for it."""
    return (now - before).abs().mean() / before.abs().mean()


def cached(velocity: Velocity, cache: StepCache) -> Velocity:
    """The same velocities, some of them used again."""

    def remembered(x: Tensor, sigma: Tensor) -> Tensor:
        level = float(on_host(sigma)[0])
        v = cache.look_up(x, level)
        if v is None:
            v = velocity(x, sigma)
            cache.keep(x, level, v)
        return v

    return remembered


def check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1 or math.isnan(threshold):
        raise ValueError(
            f"step_cache is {threshold}; it is the relative change of the velocity, 0 to 1, up to "
            "which a step uses the last one again. Try 0.05, or 0 for none."
        )


def relative_rms(latents: Tensor, plain: Tensor) -> float:
    """How far apart two runs end: the root mean square of their difference over the plain one's."""
    ours, theirs = latents.cpu().double(), plain.cpu().double()  # Apple's GPUs have no float64
    distance = torch.linalg.vector_norm(ours - theirs)
    return float(distance / torch.linalg.vector_norm(theirs)) if distance else 0.0
