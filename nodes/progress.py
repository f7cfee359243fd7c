"""The core's on_step -> ComfyUI's bars, preview and interruption; time and memory spent."""

from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch

from ..sd3_core import measures
from ..sd3_core.precision import check_finite
from ..sd3_core.samplers import OnStep, Step

Callback = Callable[[dict[str, Any]], None]  # what comfy.samplers.KSAMPLER is told of a step


def step_reporter(callback: Callback | None, dtype: torch.dtype, bar: Any) -> OnStep:
    """Stop where the user interrupts or the network overflows, else report.

    dtype: of the network, for the message about an overflow.  bar: tqdm's, in the console.
    """

    def on_step(step: Step) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if step.index == 0:
            check_finite(step.x0, "the MMDiT's first step", dtype)
        if callback is not None:
            callback(as_comfyui(step))
        bar.update()

    return on_step


def as_comfyui(step: Step) -> dict[str, Any]:
    return {
        "i": step.index,
        "denoised": step.x0,
        "x": step.x,
        "sigma": step.sigma,
        "sigma_hat": step.sigma,
    }


class Meter(measures.Meter):
    """Seconds, and the most memory held, since it was made; see the core's."""

    def __init__(self, device: Any):
        super().__init__(torch.device(device))

    def reading(self) -> dict[str, float | None]:
        seconds, peak = self.spent()
        return {"seconds": round(seconds, 3), "peak_memory_mib": peak}
