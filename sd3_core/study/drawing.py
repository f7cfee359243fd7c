"""Arms and checkpoints draw the world's prompts; what is read off their pictures and paths."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..conditioning import Conditioning
from ..embedded.drawing import Painter
from ..embedded.score import judge_pictures
from ..embedded.verdict import Verdict
from ..generate import decode, sample_with, starting_noise
from ..noise import noise as noise_of
from ..samplers import Step
from ..settings import make_plan
from ..training.objectives import Objective, Predict, RectifiedFlow
from .arms import Network


@dataclass(frozen=True)
class Walk:
    """The ends of sampling paths, and their lengths."""

    x0: Tensor  # [B, C, h, w]
    length: Tensor  # [B], of the way walked, Euclidean
    chord: Tensor  # [B], from where it began to where it ended: the shortest it could be


def scores(pictures: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """In percent: pictures that are wholly right, and of what was asked for how much is."""
    verdicts = judge_pictures(pictures.clamp(-1, 1), prompts)
    right = sum(verdict.right for verdict in verdicts) / len(verdicts)
    attributes = sum(map(share_right, verdicts)) / len(verdicts)
    return {"right": 100 * right, "attributes": 100 * attributes}


def share_right(verdict: Verdict) -> float:
    """Of the attributes asked for; the ground counts where it was named, as everywhere."""
    asked = [
        value for field in fields(verdict) if (value := getattr(verdict, field.name)) is not None
    ]
    return sum(asked) / len(asked)


@torch.no_grad()
def walk(objective: Objective, predict: Predict, noise: Tensor, steps: int) -> Walk:
    """Sample; lengths are those of the rectified flow's path, and 0 for another objective."""
    if not isinstance(objective, RectifiedFlow):
        x0 = objective.sample(predict, noise, steps)
        return Walk(x0, noise.new_zeros(len(noise)), _norm(noise - x0))
    length = noise.new_zeros(len(noise))
    strides = iter(
        [high - low for high, low in pairwise(objective.schedule.sigmas(steps).tolist())]
    )

    def watched(x: Tensor, timestep: Tensor) -> Tensor:
        nonlocal length
        velocity = predict(x, timestep)
        length = length + next(strides) * _norm(velocity)
        return velocity

    x0 = objective.sample(watched, noise, steps)
    return Walk(x0, length, _norm(noise - x0))


def draw_with(
    network: Network,
    objective: Objective,
    positive: Conditioning,
    negative: Conditioning,
    *,
    cfg: float,
    steps: int,
    size: tuple[int, int, int],  # channels, rows, columns of a latent
    seed: int,
) -> Walk:
    """One latent for each prompt; the noise is the same for every network and objective."""
    count = len(positive.context)
    noise = noise_of((count, *size), seed).to(network.device)
    predict = network.guided(positive, negative.repeat(count), cfg)
    return walk(objective, predict, noise, steps)


class PathPainter(Painter):
    """A Painter that also tells how far the latents went; for Euler's sampler."""

    @torch.inference_mode()
    def walk(self, prompts: Sequence[str], seed: int) -> tuple[Tensor, Walk]:
        """Pictures [B, 3, H, W] in -1..1, and the paths behind them."""
        settings = replace(self.settings, seed=seed, batch=len(prompts))
        plan = make_plan(self.files, settings)
        positive = Conditioning.cat([self._read(prompt) for prompt in prompts])
        begin = float(plan.sigmas[0]) * starting_noise(plan).to(plan.device)
        x, length = begin, begin.new_zeros(len(prompts))
        strides = {float(high): float(low) for high, low in pairwise(plan.sigmas)}

        def on_step(step: Step) -> None:
            nonlocal x, length
            moved = (x - step.x0) * (1 - strides[step.sigma] / step.sigma)
            length = length + _norm(moved)
            x = x - moved

        start = torch.zeros(plan.latent_shape, device=plan.device)
        x0 = sample_with(self.model, plan, positive, self._read(settings.negative), start, on_step)
        return decode(plan, x0).cpu(), Walk(x0, length, _norm(begin - x0))


def _norm(x: Tensor) -> Tensor:
    return x.float().flatten(1).norm(dim=1)
