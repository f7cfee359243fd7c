"""The noise level of each call of a run, known on the host without waiting for the device.

ComfyUI's samplers hand a level on as a tensor where the network computes, and reading a number off
a GPU waits for all the work it was given.  But a run's levels are known before it: SD3 Sample tells
them with the tensor, and most of ComfyUI's samplers take them one after the other.  What is so
believed is compared with the tensors once, after the run; where it was wrong, the run is repeated
with every level read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# The samplers that call the model once a step, at the level where the step begins.
ONCE_A_STEP = {
    f"sample_{name}"
    for name in (
        *("euler", "euler_ancestral", "dpmpp_2m", "ddpm", "lcm", "lms", "ipndm", "ipndm_v", "deis"),
        *("res_multistep", "gradient_estimation"),
    )
}


@dataclass
class Levels:
    """Those of one run."""

    steps: Sequence[float]  # at which they begin
    in_order: bool = False  # whether each of these is a call, and there are no others
    trusting: bool = True  # False: nothing is believed
    here: float | None = None  # of the call under way; None: it has to be read
    calls: int = 0
    believed: list[tuple[Tensor, float]] = field(default_factory=list)

    def enter(self, sigma: Tensor) -> None:
        """A call at sigma [B] begins."""
        told: float | None = getattr(sigma, "level", None)  # see samplers.with_level
        if told is None and self.in_order and self.calls < len(self.steps):
            told = self.steps[self.calls]
        self.calls += 1
        self.here = told if self.trusting else None
        self.believe(sigma)

    def believe(self, sigma: Tensor) -> float | None:
        """The level here, if it is known, as that of sigma [B] too."""
        if self.here is not None:
            self.believed.append((sigma, self.here))
        return self.here

    def of(self, sigma: Tensor) -> float:
        """The level of a call at sigma [B], read where it is not known."""
        level = float(sigma[0]) if self.here is None else self.here
        if self.trusting:
            self.here = level
        return level

    def misled(self) -> bool:
        """Whether a level was another one than was believed.  Waits for the device."""
        if not self.believed:
            return False
        seen = torch.cat([sigma.flatten() for sigma, _ in self.believed]).float().cpu()
        told = [torch.full((sigma.numel(),), level) for sigma, level in self.believed]
        return not torch.equal(seen, torch.cat(told))


def calls_once_a_step(sampler: Any) -> bool:
    """Whether a SAMPLER is one of these, as it comes."""
    function: Any = getattr(sampler, "sampler_function", None)
    known = getattr(function, "__module__", "") == "comfy.k_diffusion.sampling"
    return known and function.__name__ in ONCE_A_STEP and not sampler.extra_options
