"""Arms and checkpoints draw the world's prompts; what is read off their pictures and paths."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..conditioning import Conditioning
from ..embedded.drawing import Painter
from ..embedded.score import judge_pictures
from ..embedded.verdict import Verdict
from ..generate import decode, sample_with, step_cache
from ..measures import Trail, distance, path_length
from ..noise import noise as noise_of
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
    trail, straight = Trail(), isinstance(objective, RectifiedFlow)
    x0 = objective.sample(predict, noise, steps, trail.on_step if straight else None)
    if not straight:
        return Walk(x0, noise.new_zeros(len(noise)), distance(noise, x0))
    trail.end(x0)
    return Walk(x0, path_length(trail.points), distance(noise, x0))


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
    """A Painter that also tells how far the latents went."""

    @torch.inference_mode()
    def walk(self, prompts: Sequence[str], seed: int) -> tuple[Tensor, Walk]:
        """Pictures [B, 3, H, W] in -1..1, and the paths behind them."""
        settings = replace(self.settings, seed=seed, batch=len(prompts))
        plan = make_plan(self.files, settings)
        positive = Conditioning.cat([self._read(prompt) for prompt in prompts])
        trail, start = Trail(), torch.zeros(plan.latent_shape, device=plan.device)
        negative = self._read(settings.negative)
        watch, cache = trail.on_step, step_cache(plan)
        x0 = sample_with(self.model, plan, positive, negative, start, watch, cache=cache)
        trail.end(x0)
        way = Walk(x0, path_length(trail.points), distance(trail.points[0], x0))
        return decode(plan, x0).cpu(), way
