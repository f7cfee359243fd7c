"""Paths of the baselines: how much data and how much noise a noisy latent holds at time t.

A variance-preserving path is z_t = a_t x0 + b_t noise with a_t^2 + b_t^2 = 1, t = 0 data, t = 1
noise.  It names its coefficients, the clock that the network reads, and the times of a run.
(The rectified flow's straight path is the `Schedule`'s.)

Esser et al. 2024 (arXiv:2403.03206), section 3, "Cosine" and "(LDM-)Linear".
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from ..schedule import TIMESTEPS

FIRST_BETA, LAST_BETA = 0.00085, 0.012  # Rombach et al. 2022 (arXiv:2112.10752), and SD 1 to XL


class Path(Protocol):
    """A variance-preserving path."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and b_t at t [B] in [0, 1]: float32 [B] each, on any device."""
        ...

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is told of t [B]: float32 in 0 ... 1000, as for the rectified flow."""
        ...

    def times(self, steps: int) -> Tensor:
        """The times at which a run of this many steps evaluates the network: [steps], falling.

        The last step goes to the data itself, a = 1 and b = 0.
        """
        ...


@dataclass(frozen=True)
class LinearPath:
    """LDM-linear: a thousand levels whose sqrt(beta) is evenly spaced.

    Level i is met for t in [i / 1000, (i + 1) / 1000), and the network is told i.  The last level
    still holds 6.8 % of the data; a run starts there from pure noise nevertheless, as LDM does.
    """

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        kept = signal_kept()[self.timestep(t).long().cpu()]  # float64: not on every device
        return kept.sqrt().float(), (1 - kept).sqrt().float()

    def timestep(self, t: Tensor) -> Tensor:
        return (TIMESTEPS * t.float()).floor().clamp(max=TIMESTEPS - 1)

    def times(self, steps: int) -> Tensor:
        """From the last level down in even strides, so that the last one is as long as the others.

        Lin et al. 2023 (arXiv:2305.08891), table 2, "trailing".
        """
        check_steps(steps)
        if steps > TIMESTEPS:
            raise ValueError(
                f"{steps} steps: LDM-linear has {TIMESTEPS} levels, take at most these."
            )
        stride = TIMESTEPS / steps
        levels = TIMESTEPS - stride * torch.arange(steps, dtype=torch.float64)
        return ((levels.round() - 0.5) / TIMESTEPS).float()  # mid-level: rounding cannot leave it


@cache
def signal_kept() -> Tensor:
    """a^2 (alpha-bar) of the thousand levels of LDM-linear: [1000], float64."""
    root_betas = torch.linspace(
        math.sqrt(FIRST_BETA), math.sqrt(LAST_BETA), TIMESTEPS, dtype=torch.float64
    )
    return torch.cumprod(1 - root_betas**2, dim=0)


@dataclass(frozen=True)
class CosinePath:
    """a = cos(pi t / 2), b = sin(pi t / 2): for evenly drawn t, log-SNR is bell-shaped.

    Nichol and Dhariwal 2021 (arXiv:2102.09672), without their offset of 0.008, as in the paper.
    """

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        quarter = math.pi / 2
        # the sine of the complement is the cosine, and exactly 0 at t = 1
        return torch.sin(quarter * (1 - t.float())), torch.sin(quarter * t.float())

    def timestep(self, t: Tensor) -> Tensor:
        return TIMESTEPS * t.float()

    def times(self, steps: int) -> Tensor:
        """Even strides from 0.999, the last of a thousand levels.

        At t = 1 itself there is no data left in z, and a predicted noise says nothing about x0.
        """
        check_steps(steps)
        return (1 - 1 / TIMESTEPS) * (1 - torch.arange(steps) / steps)


def karras_levels(steps: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """EDM's noise levels of a run: [steps + 1], from high down to low, then 0.

    Even steps of b^(1 / rho).  Karras et al. 2022 (arXiv:2206.00364), equation 5.
    """
    check_steps(steps)
    ramp = torch.linspace(high ** (1 / rho), low ** (1 / rho), steps, dtype=torch.float64)
    return torch.cat([ramp**rho, torch.zeros(1)]).float()


def check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}; a run takes at least 1. Try 25.")
