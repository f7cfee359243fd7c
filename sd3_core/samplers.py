"""Samplers: functions that walk a latent from noise to picture along the velocity.

Every sampler is `sampler(velocity, x, sigmas, on_step, fresh, before) -> x0`:
    velocity  everything a sampler knows of a model, see guidance.py
    x         [B, C, H, W], the latent at noise level sigmas[0]
    sigmas    [n + 1], falling, see Schedule.sigmas
    on_step   called after each step with a `Step`; what it raises stops the run
    fresh     gives the noise that is added on the way: euler_ancestral alone asks for it, all take
              it, so that a caller need not know which one it has
    before    the step that ended where this run begins, for a run that goes on: dpmpp_2m alone
              looks back
and returns the latent at sigmas[-1], which is x0 when the schedule ends at 0.  The state is float32
whatever the network computes in, for small steps on a large latent vanish in half precision.
No global random state, no gradient switches: both are the caller's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from .noise import FreshNoise

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x [B, C, H, W], sigma [B]) -> velocity, float32


@dataclass(frozen=True)
class Step:
    """A step that is done."""

    index: int  # 0 ... total - 1
    total: int
    sigma: float  # noise level at which it began
    x: Tensor  # [B, C, H, W], the latent there
    x0: Tensor  # [B, C, H, W], the clean latent as estimated from there


OnStep = Callable[[Step], None]
Fresh = Callable[[Tensor], Tensor]  # x -> standard normal noise like it, another at each call


class Sampler(Protocol):
    def __call__(
        self,
        velocity: Velocity,
        x: Tensor,
        sigmas: Tensor,
        on_step: OnStep | None = None,
        fresh: Fresh | None = None,
        before: Step | None = None,
    ) -> Tensor: ...


def euler(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None = None,
    fresh: Fresh | None = None,
    before: Step | None = None,
) -> Tensor:
    """Straight on along the velocity, from level to level.  One evaluation a step."""
    x = x.float()
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        v = at_level(velocity, x, sigma)
        x0 = x - sigma * v
        report(on_step, index, sigmas, sigma, x, x0)
        x = x + (sigma_next - sigma) * v
    return x


def euler_ancestral(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None = None,
    fresh: Fresh | None = None,
    before: Step | None = None,
) -> Tensor:
    """Euler's step to below the next level, and fresh noise up to it.  One evaluation a step.

    What goes wrong early can still be corrected, where a network that is small or little trained
    draws the parts of a thing so that they do not fit.  The level below is sigma_next^2 / sigma, as
    ComfyUI's euler_ancestral goes for rectified flow (eta 1): the signal 1 - sigma is restored
    before noise is added.  fresh: None is the noise of seed 0.
    """
    x = x.float()
    fresh = fresh or FreshNoise([0])
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x0 = x - sigma * at_level(velocity, x, sigma)
        report(on_step, index, sigmas, sigma, x, x0)
        below = sigma_next**2 / sigma
        x = x0 + (x - x0) * (below / sigma)
        if 0 < sigma_next < 1:
            signal = (1 - sigma_next) / (1 - below)
            added = math.sqrt(max(0.0, sigma_next**2 - (signal * below) ** 2))
            x = signal * x + added * fresh(x)
    return x


def heun(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None = None,
    fresh: Fresh | None = None,
    before: Step | None = None,
) -> Tensor:
    """Along the mean of the velocities at both ends of the step.  Two evaluations a step.

    The last step, to 0, is Euler's.  Karras et al. 2022 (arXiv:2206.00364), algorithm 1.
    """
    x = x.float()
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        v = at_level(velocity, x, sigma)
        x0 = x - sigma * v
        if sigma_next > 0:
            v = (v + at_level(velocity, x + (sigma_next - sigma) * v, sigma_next)) / 2
        report(on_step, index, sigmas, sigma, x, x0)
        x = x + (sigma_next - sigma) * v
    return x


def dpmpp_2m(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None = None,
    fresh: Fresh | None = None,
    before: Step | None = None,
) -> Tensor:
    """DPM-Solver++(2M): extrapolates x0 from its last two estimates.  One evaluation a step.

    Lu et al. 2022 (arXiv:2211.01095), algorithm 2.  Steps are measured in -log sigma, as in
    Stability's reference and ComfyUI, not in the paper's half log-SNR log((1 - sigma) / sigma):
    the first-order step is the same, and -log sigma is finite at sigma 1.
    The first step and the one to 0 are first order; the first one is not where a step went before.
    """
    x = x.float()
    levels = sigmas.tolist()
    previous_x0, previous_length = None, 0.0
    if before is not None and 0 < levels[0] < before.sigma:
        previous_x0, previous_length = before.x0.to(x), math.log(before.sigma / levels[0])
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x0 = x - sigma * at_level(velocity, x, sigma)
        length = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        target = x0
        # a length of 0: a schedule of more than 1000 steps repeats levels of its table
        if previous_x0 is not None and previous_length > 0 and sigma_next > 0:
            target = x0 + (x0 - previous_x0) * (length / (2 * previous_length))
        report(on_step, index, sigmas, sigma, x, x0)
        x = target + (x - target) * (sigma_next / sigma)
        previous_x0, previous_length = x0, length
    return x


SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "euler_ancestral": euler_ancestral,
}


def at_level(velocity: Velocity, x: Tensor, sigma: float) -> Tensor:
    """The velocity of a batch that is at one noise level."""
    return velocity(x, with_level(x.new_full((x.shape[0],), sigma), sigma))


def with_level(sigma: Tensor, level: float) -> Tensor:
    """sigma, which also carries its value: reading it off a GPU would wait for all work there."""
    sigma.level = level  # pyright: ignore[reportAttributeAccessIssue]
    return sigma


def on_host(sigma: Tensor) -> Tensor:
    """sigma [B] on the CPU where that takes no waiting, else as it is."""
    level = getattr(sigma, "level", None)
    return sigma if level is None else torch.full(sigma.shape, level)


def report(
    on_step: OnStep | None, index: int, sigmas: Tensor, sigma: float, x: Tensor, x0: Tensor
) -> None:
    if on_step is not None:
        on_step(Step(index, len(sigmas) - 1, sigma, x, x0))
