"""Rectified-flow time: noise levels for sampling and training.

Esser et al. 2024 (arXiv:2403.03206): a noisy latent lies on the straight path from data to noise,
z = (1 - sigma) x0 + sigma noise.  Training draws sigma, sampling walks it from 1 down to 0; both
take it from the same `Schedule`.

Words: t in [0, 1] is time before the shift; sigma in [0, 1] the noise level; timestep = 1000 sigma
what the network is told; percent in [0, 1] how far a run has come, 0 at pure noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .errors import cut, quoted

TIMESTEPS = 1000  # the network's clock, and the number of levels in the discrete table
LIMITS = (1e-4, 1e4)  # of a shift: beyond, float32 divides by zero
MOST_STEPS = 1_000_000  # of a full schedule: far beyond use, small enough to build

Time = TypeVar("Time", float, Tensor)


@dataclass(frozen=True)
class Window:
    """A stretch of noise levels, both ends included: `sigma in window`."""

    high: float = math.inf  # not 1: in float32 some shifts put the first level a hair above
    low: float = 0.0

    def __contains__(self, sigma: float) -> bool:
        return self.low <= sigma <= self.high


ALWAYS = Window()


@dataclass(frozen=True)
class Schedule:
    """Where the noise levels lie: a larger shift spends more of the time at high noise.

    shift: 3.0 for the released models at one megapixel, see `auto_shift`; 1.0 changes nothing.
    Raises ValueError unless it is a positive number within LIMITS.
    """

    shift: float = 3.0

    def __post_init__(self):
        if not LIMITS[0] <= self.shift <= LIMITS[1]:
            raise ValueError(
                f"shift is {cut(self.shift)}; it must be a number above 0, from {LIMITS[0]:g} to "
                f"{LIMITS[1]:g}. The released SD3 models use 3.0, and 1.0 means no shift."
            )

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at time t in [0, 1], any shape; float32, for half precision is too coarse.

        Esser et al. 2024, equation 23: t_m = a t_n / (1 + (a - 1) t_n).
        """
        return shifted(t.float(), self.shift)

    @staticmethod
    def timestep(sigma: Tensor) -> Tensor:
        """What the network is told of a noise level: 1000 sigma, not rounded."""
        return TIMESTEPS * sigma

    def percent_to_sigma(self, percent: float) -> float:
        """Noise level when this part of the run, 0 to 1, lies behind; as in ComfyUI."""
        if percent <= 0:
            return 1.0
        return shifted(1.0 - min(percent, 1.0), self.shift)

    def window(self, start: float = 0.0, end: float = 1.0) -> Window:
        """The noise levels between two percents of the run; from 0 and to 1 it has no bound."""
        if not start <= end:
            raise ValueError(
                f"start is {start} and end is {end}; a window starts before it ends, "
                "0 being the first step and 1 the last. Swap them, or leave the window away."
            )
        high = self.percent_to_sigma(start) if start > 0 else math.inf
        return Window(high=high, low=self.percent_to_sigma(end))

    def sigmas(self, steps: int, scheduler: str = "normal", denoise: float = 1.0) -> Tensor:
        """The noise levels of a run: float32 [n + 1] on the CPU, falling, the last one 0.

        n is `steps`; `beta` merges levels that coincide and may come out shorter.
        denoise: part of the path that is walked, counted as ComfyUI does: the last `steps` steps of
        a run of int(steps / denoise).  At 0 nothing is left to do: the result is [0.0], no step.
        Raises ValueError for steps below 1, denoise outside [0, 1] and an unknown scheduler.
        """
        check_run(steps, scheduler, denoise)
        if denoise == 0:
            return torch.zeros(1)
        full = steps if denoise > 0.9999 else int(steps / denoise)  # the threshold is ComfyUI's
        if full > MOST_STEPS:
            raise ValueError(
                f"{steps} steps at denoise {denoise} are the end of a run of {full} steps, and "
                f"{MOST_STEPS} is the limit. Take fewer steps, or denoise 0 for no change at all."
            )
        levels = torch.cat([SCHEDULERS[scheduler](self, full), torch.zeros(1)])
        return levels[-(steps + 1) :]


def shifted(t: Time, shift: float) -> Time:
    """Time t moved towards high noise: the noise level at that time."""
    return shift * t / (1 + (shift - 1) * t)


def check_run(steps: int, scheduler: str, denoise: float) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}; a run takes at least 1. Try 28.")
    if scheduler not in SCHEDULERS:
        raise ValueError(
            f"scheduler is {quoted(scheduler)}; choose one of {', '.join(SCHEDULERS)}."
        )
    if not 0 <= denoise <= 1:
        raise ValueError(
            f"denoise is {denoise}; it must lie between 0 (keep the latents) and 1 (start from "
            "pure noise)."
        )


def sigma_table(schedule: Schedule) -> Tensor:
    """The noise levels of the timesteps 1 ... 1000: [1000], rising."""
    return schedule.sigma(torch.arange(1, TIMESTEPS + 1) / TIMESTEPS)


def normal(schedule: Schedule, steps: int) -> Tensor:
    """Even steps of t from sigma_max to sigma_min, both read as times: Stability's schedule.

    The reference takes 1000 sigma for the inverse of sigma(t), so the smallest level is shifted
    twice.  This stays, for it is how the released models are sampled.  (Below a shift of about 0.1
    ComfyUI's namesake drops the step to 0; this one, like the reference, keeps it.)
    """
    table = sigma_table(schedule)
    start, end = schedule.timestep(table[-1]), schedule.timestep(table[0])
    return schedule.sigma(torch.linspace(float(start), float(end), steps) / TIMESTEPS)


def sgm_uniform(schedule: Schedule, steps: int) -> Tensor:
    """As `normal`, but the last step to 0 is as long in t as the others."""
    return normal(schedule, steps + 1)[:-1]


def simple(schedule: Schedule, steps: int) -> Tensor:
    """Every (1000 / steps)-th level of the table, from the top."""
    stride = TIMESTEPS / steps
    from_the_top = [int(step * stride) for step in range(steps)]
    return sigma_table(schedule).flip(0)[from_the_top]


def beta(schedule: Schedule, steps: int) -> Tensor:
    """Levels of the table at quantiles of Beta(0.6, 0.6): dense at both ends of the run.

    Lee et al. 2024 (arXiv:2407.12173), with ComfyUI's parameters.
    """
    quantiles = 1 - torch.arange(steps, dtype=torch.float64) * (1 / steps)
    # Rounding a quantile to an index of the table asks between which half-way marks it lies, so the
    # distribution's inverse is not needed.  A tie (the median) goes up, to the even 500.
    half_ways = (torch.arange(TIMESTEPS - 1, dtype=torch.float64) + 0.5) / (TIMESTEPS - 1)
    indices = torch.searchsorted(beta_distribution(half_ways, 0.6), quantiles, right=True)
    return sigma_table(schedule)[torch.unique_consecutive(indices)]


def beta_distribution(x: Tensor, a: float, b: float | None = None) -> Tensor:
    """Cumulative distribution of Beta(a, b), or of Beta(a, a), at x in [0, 1], float64.

    The power series of the incomplete beta function (DLMF 8.17.7) up to one half, its mirror image
    above; 60 terms leave 2^-60.  Beyond 10 its terms cancel, so a and b stay below.
    """
    b = a if b is None else b
    half = torch.tensor(0.5, dtype=torch.float64)
    whole = incomplete_beta(half, a, b) + incomplete_beta(half, b, a)
    near = torch.minimum(x, 1 - x)
    below, above = incomplete_beta(near, a, b), whole - incomplete_beta(near, b, a)
    return torch.where(x <= 0.5, below, above) / whole


def incomplete_beta(x: Tensor, a: float, b: float) -> Tensor:
    total, coefficient = torch.zeros_like(x), 1.0  # coefficient: (1 - b)_n / n!
    for n in range(60):
        total = total + coefficient * x**n / (a + n)
        coefficient *= (n + 1 - b) / (n + 1)
    return x**a * total


SCHEDULERS: dict[str, Callable[[Schedule, int], Tensor]] = {
    "normal": normal,
    "simple": simple,
    "sgm_uniform": sgm_uniform,
    "beta": beta,
}


def auto_shift(base_shift: float, native_pixels: float, pixels: float) -> float:
    """The shift for another picture size: base_shift * sqrt(pixels / native_pixels).

    Twice the side needs twice the shift to destroy as much of the picture.
    Esser et al. 2024, section 5.3.2, "Resolution-dependent shifting of timestep schedules".
    """
    if not (base_shift > 0 and native_pixels > 0 and pixels > 0):
        raise ValueError(
            f"shift {base_shift} at {native_pixels} pixels for {pixels} pixels: all three must be "
            "above 0. The released models have shift 3.0 at 1048576 pixels (1024 x 1024)."
        )
    return base_shift * math.sqrt(pixels / native_pixels)


def log_snr(sigma: Tensor) -> Tensor:
    """Logarithm of the signal-to-noise ratio ((1 - sigma) / sigma)^2; +inf at 0, -inf at 1."""
    return -2 * torch.logit(sigma.float())


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Point at noise level sigma on the straight path from data to noise.

    x0, noise: [B, C, H, W]; sigma: [B], or one for all, in [0, 1].  Returns [B, C, H, W], float32.
    Esser et al. 2024, rectified flow: z_t = (1 - t) x_0 + t noise.
    """
    level = per_image(sigma, x0)
    return level * noise + (1 - level) * x0


def per_image(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma [B], or one for all, shaped to multiply x [B, C, H, W]; float32, on x's device."""
    return sigma.to(x.device, torch.float32).reshape(-1, *[1] * (x.ndim - 1))
