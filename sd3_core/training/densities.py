"""Timestep densities: how often training visits each time t.

t = 0 is data and t = 1 is noise.  Papers on robot policies, and other flow papers, count the other
way round: their density at tau is ours at 1 - tau.  t is time before the schedule's shift.

Each density is its quantile function, so a uniform number decides: the caller owns the randomness,
and evenly spread u give evenly spread t (`stratified`).  All of them rise with u.

Esser et al. 2024 (arXiv:2403.03206), section 3.1, "Tailored SNR samplers for RF models", unless
another source is named.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import quoted
from ..schedule import beta_distribution

EDGE = 2**-24  # float32's last step below 1, and the grid of torch.rand
STEEPEST_MODE = 2 / (math.pi - 2)  # 1.7519; beyond it `mode` folds back
BETA_RANGE = (0.5, 10.0)  # below, `beta_table` is too coarse; above, `beta_distribution` ends
RAREST_WINDOW = 1e-6  # part of all draws; below it the quantiles of a window are rounding errors

Made = TypeVar("Made")


class Density(ABC):
    """A law of t on [0, 1]."""

    def sample(self, u: Tensor) -> Tensor:
        """The time that uniform numbers decide on: u [n] in [0, 1], on the CPU -> t [n], float32.

        t lies strictly between 0 and 1, even for u = 0 (which torch.rand does draw) and u = 1
        (which rounding makes): logits and noise-to-signal ratios stay finite.
        """
        inside = u.double().clamp(EDGE, 1 - EDGE)
        return self.quantile(inside).float().clamp(EDGE, 1 - EDGE)

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """The time with a part u of the draws below it; float64, u in (0, 1)."""

    @abstractmethod
    def cdf(self, t: Tensor) -> Tensor:
        """The part of the draws below t in [0, 1]; float64, the inverse of `quantile`."""

    @abstractmethod
    def pdf(self, t: Tensor) -> Tensor:
        """Probability density at t in [0, 1]; float64, infinite where the law says so."""


@dataclass(frozen=True)
class Uniform(Density):
    """Every time alike."""

    def quantile(self, u: Tensor) -> Tensor:
        return u.double()

    def cdf(self, t: Tensor) -> Tensor:
        return t.double()

    def pdf(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)


@dataclass(frozen=True)
class LogitNormal(Density):
    """logit t is normally distributed: the middle often, the ends never.  The paper's best.

    mean: below 0 favours data, above 0 noise; std above 0.
    Shifting it by alpha adds ln alpha to the mean, for a shift adds ln alpha to logit t.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(
                f"logit_normal({self.mean}, {self.std}): the mean must be a number and the "
                "standard deviation a number above 0. The paper's best is logit_normal(0, 1)."
            )

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u.double()))

    def cdf(self, t: Tensor) -> Tensor:
        return torch.special.ndtr(self.score(t))

    def pdf(self, t: Tensor) -> Tensor:
        t = t.double()
        slope = self.std * math.sqrt(2 * math.pi) * t * (1 - t)
        bell = torch.exp(-(self.score(t) ** 2) / 2)
        return torch.where(slope > 0, bell / slope, 0.0)  # the bell vanishes faster than the slope

    def score(self, t: Tensor) -> Tensor:
        return (torch.logit(t.double()) - self.mean) / self.std


@dataclass(frozen=True)
class Mode(Density):
    """Mode sampling with heavy tails: the middle (scale > 0) or the ends (scale < 0) more often.

    scale: -1 ... 2 / (pi - 2) = 1.7519; 0 is uniform.  At the first bound the density is infinite
    at the ends, at the second in the middle.
    """

    scale: float = 1.29

    def __post_init__(self):
        if not -1 <= self.scale <= STEEPEST_MODE:
            raise ValueError(
                f"mode({self.scale}): the scale must lie between -1 and {STEEPEST_MODE:.4f}, "
                "where every time is drawn by one u. The paper's best is mode(1.29)."
            )

    def quantile(self, u: Tensor) -> Tensor:
        """The paper's f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u), read at 1 - u so that it rises.

        f(1 - u) = 1 - f(u), so the law is the same.
        """
        u = u.double()
        return u - self.scale * (torch.sin(math.pi / 2 * u) ** 2 - u)

    def cdf(self, t: Tensor) -> Tensor:
        return inverse(self.quantile, t)

    def pdf(self, t: Tensor) -> Tensor:
        slope = 1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * self.cdf(t)))
        return 1 / slope.clamp(min=0)  # rounding must not turn an infinite density negative


@dataclass(frozen=True)
class CosMap(Density):
    """Times whose log-SNR is distributed as under the cosine schedule with uniform time."""

    def quantile(self, u: Tensor) -> Tensor:
        angle = math.pi / 2 * u.double()
        return torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))  # 1 - 1 / (tan + 1)

    def cdf(self, t: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan2(t.double(), 1 - t.double())

    def pdf(self, t: Tensor) -> Tensor:
        t = t.double()
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


@dataclass(frozen=True)
class Beta(Density):
    """Beta(a, b), density t^(a-1) (1-t)^(b-1) up to a factor: a > b visits noise more often.

    a, b: 0.5 ... 10.  Beta(1.5, 1) is how robot policies are trained, for which the first
    steps out of the noise matter most: pi0 (Black et al. 2024, arXiv:2410.24164, appendix B), where
    tau = 1 - t and the draws are squeezed into [0.001, 1].
    """

    a: float = 1.5
    b: float = 1.0

    def __post_init__(self):
        low, high = BETA_RANGE
        if not (low <= self.a <= high and low <= self.b <= high):
            raise ValueError(
                f"beta({self.a}, {self.b}): both numbers must lie between {low:g} and {high:g}. "
                "beta(1.5, 1) favours noise, beta(1, 1.5) data."
            )

    def quantile(self, u: Tensor) -> Tensor:
        angles, parts = beta_table(self.a, self.b)
        angle = np.interp(u.double().numpy(), parts, angles)
        return torch.from_numpy(np.sin(angle) ** 2)

    def cdf(self, t: Tensor) -> Tensor:
        return beta_distribution(t.double(), self.a, self.b)

    def pdf(self, t: Tensor) -> Tensor:
        t = t.double()
        log_area = math.lgamma(self.a) + math.lgamma(self.b) - math.lgamma(self.a + self.b)
        return t ** (self.a - 1) * (1 - t) ** (self.b - 1) * math.exp(-log_area)


@cache
def beta_table(a: float, b: float) -> tuple[np.ndarray, np.ndarray]:
    """Angles with t = sin^2 angle, and the part of Beta(a, b) below each: the inverse cdf's table.

    The long sum behind the cdf is too slow to be solved at every draw.  Even angles are dense at
    both ends, where the cdf is steep; between them it is straight to 6e-8, float32's grain of u.
    """
    angles = torch.linspace(0, math.pi / 2, 2**14 + 1, dtype=torch.float64)
    return angles.numpy(), beta_distribution(torch.sin(angles) ** 2, a, b).numpy()


@dataclass(frozen=True)
class Truncated(Density):
    """Another density, held to low <= t <= high: as if all draws outside were drawn again.

    Raises ValueError for an empty range and for one that the density hardly ever visits.
    """

    density: Density
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"times from {self.low} to {self.high}: the range must rise and lie between "
                "0 (data) and 1 (noise)."
            )
        below, above = self.bounds()
        if above - below < RAREST_WINDOW:
            raise ValueError(
                f"{self.density} hardly ever draws a time from {self.low} to {self.high}. "
                "Widen the range, or choose a density that visits it, such as uniform."
            )

    def quantile(self, u: Tensor) -> Tensor:
        below, above = self.bounds()
        t = self.density.quantile(below + u.double() * (above - below))
        return t.clamp(self.low, self.high)

    def cdf(self, t: Tensor) -> Tensor:
        below, above = self.bounds()
        return ((self.density.cdf(t) - below) / (above - below)).clamp(0, 1)

    def pdf(self, t: Tensor) -> Tensor:
        below, above = self.bounds()
        inside = (t >= self.low) & (t <= self.high)
        return torch.where(inside, self.density.pdf(t) / (above - below), 0.0)

    def bounds(self) -> tuple[float, float]:
        """The parts of the other density's draws that lie below low, and below high."""
        below, above = self.density.cdf(torch.tensor([self.low, self.high], dtype=torch.float64))
        return float(below), float(above)


DENSITIES: dict[str, type[Density]] = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "mode": Mode,
    "cosmap": CosMap,
    "beta": Beta,
}


def find_density(text: str) -> Density:
    """The density that a configuration names: "logit_normal", "logit_normal(0.5, 0.6)".

    Raises ValueError for an unknown name, surplus parameters and those outside their range.
    """
    return read_call(text, DENSITIES, "timestep density")


def stratified(u: Tensor, index: Tensor, count: int) -> Tensor:
    """Uniform numbers u moved into their own one of `count` equal strata: lower variance.

    u: [n] in [0, 1); index: [n], which draw of the `count` of a batch this is, 0 ... count - 1.
    """
    return (index + u) / count


def inverse(rising: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Where in [0, 1] a rising function takes a value: float64, by halving to 2^-60."""
    low = torch.zeros_like(value, dtype=torch.float64)
    width = 1.0
    for _ in range(60):
        width /= 2
        low = torch.where(rising(low + width) <= value, low + width, low)
    return low


def read_call(text: str, makers: Mapping[str, Callable[..., Made]], what: str) -> Made:
    """What "name" or "name(1, 0.5)" makes: the maker of that name, called with these numbers.

    A maker takes numbers only; those left away keep their defaults.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", text)
    name = match[1] if match else text
    if match is None or name not in makers:
        raise ValueError(f"{what} is {quoted(text)}; choose one of {spellings(makers)}.")
    maker = makers[name]
    written = (match[2] or "").strip()
    try:
        numbers = [float(number) for number in written.split(",")] if written else []
        if len(numbers) > len(signature(maker).parameters):
            raise ValueError("surplus numbers")
    except ValueError:
        raise ValueError(
            f"{what} is {quoted(text)}; it is written {spelling(name, maker)}."
        ) from None
    return maker(*numbers)


def spellings(makers: Mapping[str, Callable[..., Made]]) -> str:
    return ", ".join(spelling(name, maker) for name, maker in makers.items())


def spelling(name: str, maker: Callable[..., Made]) -> str:
    """How one is written: "logit_normal(mean, std)"."""
    names = signature(maker).parameters
    return f"{name}({', '.join(names)})" if names else name
