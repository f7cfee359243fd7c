"""Arms: small MMDiTs that differ in one choice of the paper's, trained on the same draws."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.layouts import PREFIXES
from ..checkpoints.load import load_mmdit
from ..checkpoints.save import save_tensors
from ..conditioning import Conditioning
from ..embedded.stages.flow import BASE, SIZES, explicit_attention
from ..models.cast import CastOps
from ..models.mmdit import MMDiT
from ..schedule import Schedule
from ..text.encoders import ENCODERS
from ..training.batches import generator
from ..training.config import LoopConfig
from ..training.densities import find_density
from ..training.loop import Losses
from ..training.networks import initialise
from ..training.objectives import Objective, Predict, RectifiedFlow, find_objective
from ..training.optimizers import Parameters
from ..training.validation import LEVELS
from .world import Shelves

CAPTION_DROPOUT = 0.1
HALF = "half"  # an arm's product after half of its steps


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What an arm is; two arms with equal fields and seed are one."""

    depth: int
    steps: int
    batch_size: int
    learning_rate: float
    scenes: int
    objective: str = "flow_matching"  # see training.objectives.find_objective
    density: str = "logit_normal(0, 1)"  # of the rectified flow
    shift: float = 1.0
    full_captions: float = 0.5  # how often the full caption stands instead of the short one
    encoder_dropout: float = 0.0  # how often each encoder is zeroed
    qk_norm: bool = True
    side: int = 64  # pixels
    start: "Arm | None" = None  # whose weights it begins with

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def make_objective(self) -> Objective:
        flow = RectifiedFlow(find_density(self.density), Schedule(self.shift))
        return find_objective(self.objective, flow)

    def loop(self, seed: int) -> LoopConfig:
        half = max(1, self.steps // 2)
        return LoopConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            betas=(0.9, 0.99),
            warmup=min(100, self.steps // 5),
            ema=0.99,
            seed=seed,
            checkpoint_every=half,
            keep=1,
            export_every=half,
            validate_every=0,
        )


def new_arm(arm: Arm, seed: int) -> MMDiT:
    sizes = replace(SIZES, depth=arm.depth, qk_norm=arm.qk_norm, dual_attention_layers=())
    model = MMDiT(sizes, CastOps(), explicit_attention)
    initialise(model, BASE, seed)
    return model


def load_arm(path: Path, device: torch.device) -> MMDiT:
    """A trained one: float32 weights that compute in the dtype of their input."""
    model = load_mmdit(path, ops=CastOps(), attention=explicit_attention)
    return model.float().to(device)


def save_arm(model: MMDiT, path: Path, step: int) -> Path:
    state = {PREFIXES["mmdit"] + name: value for name, value in model.state_dict().items()}
    return save_tensors(path, state, {"sd3_workbench.step": str(step)})


@dataclass(frozen=True)
class Network:
    """A network, where it computes and in what."""

    model: MMDiT
    device: torch.device
    dtype: torch.dtype

    def predict(self, conditioning: Conditioning) -> Predict:
        given = conditioning.to(self.device, self.dtype)

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            timestep = timestep.to(self.device)
            return self.model(x.to(self.dtype), timestep, given.context, given.pooled).float()

        return predict

    def guided(self, positive: Conditioning, negative: Conditioning, cfg: float) -> Predict:
        """Classifier-free guidance of whatever the network predicts; see objectives.Predict."""
        both = self.predict(Conditioning.cat([positive, negative]))

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            told, untold = both(x.repeat(2, 1, 1, 1), timestep.repeat(2)).chunk(2)
            return untold + cfg * (told - untold)

        return predict


class ArmTask:
    """Teach an arm.  Which pictures, noise and uniform numbers come depends on the seed alone."""

    product = "model"

    def __init__(self, arm: Arm, seed: int, network: Network, shelves: Shelves):
        self.arm, self.seed, self.network, self.shelves = arm, seed, network, shelves
        self.objective = arm.make_objective()
        network.model.to(network.device).requires_grad_(True)
        self.parameters: Parameters = dict(network.model.named_parameters())

    def loss(self, step: int, rows: range, size: int) -> Losses:
        draws, count = generator(self.seed, step, rows.start, "study"), len(rows)
        places = torch.randint(len(self.shelves), (count,), generator=draws)
        chances = torch.rand(2 + len(ENCODERS), count, generator=draws)
        u = torch.rand(count, generator=draws)
        x0 = self.shelves.short.latents(places)
        noise = torch.randn(x0.shape, generator=draws)
        dropped = {
            name: chance < self.arm.encoder_dropout
            for name, chance in zip(ENCODERS, chances[2:], strict=True)
        }
        conditioning = self.shelves.conditioning(
            places, chances[0] < CAPTION_DROPOUT, dropped, chances[1] < self.arm.full_captions
        )
        device = self.network.device
        predict = self.network.predict(conditioning)
        t = self.objective.draw(u)
        return Losses(self.objective.loss(predict, x0.to(device), noise.to(device), t))

    def validate(self) -> Mapping[str, float]:
        return {}

    def sample(self, folder: Path, step: int) -> None:
        """Nothing to see on the way."""

    def export(self, path: Path, step: int) -> Path:
        return save_arm(self.network.model, path, step)


@torch.no_grad()
def validation_loss(network: Network, objective: Objective, held: Shelves) -> float:
    """The mean over seven equidistant times, with fixed noise and the short captions.

    t = 1 is left out, as in the paper's section 5.3.  Losses of different objectives do not
    compare.
    """
    places = torch.arange(len(held))
    nowhere = torch.zeros(len(places), dtype=torch.bool)
    x0 = held.short.latents(places).to(network.device)
    noise = torch.randn(x0.shape, generator=generator(0, "validation")).to(network.device)
    predict = network.predict(held.conditioning(places, nowhere, {}, nowhere))
    means = [
        float(objective.loss(predict, x0, noise, torch.full((len(x0),), t)).mean())
        for t in LEVELS[:-1]
    ]
    return sum(means) / len(means)


@torch.no_grad()
def largest_logit(network: Network, held: Shelves) -> float:
    """The largest attention logit |q k| / sqrt(d) over blocks, heads and tokens, at three times."""
    model, usual, seen = network.model, network.model.attention, [0.0]

    def watching(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        logits = (q.float() * q.shape[3] ** -0.5) @ k.float().transpose(2, 3)
        seen.append(float(logits.abs().max()))
        return usual(q, k, v, mask)

    places = torch.arange(min(32, len(held)))
    nowhere = torch.zeros(len(places), dtype=torch.bool)
    x0 = held.short.latents(places).to(network.device)
    noise = torch.randn(x0.shape, generator=generator(0, "validation")).to(network.device)
    predict = network.predict(held.conditioning(places, nowhere, {}, nowhere))
    model.attention = watching
    try:
        for t in (0.25, 0.5, 0.75):
            timestep = Schedule.timestep(torch.full((len(x0),), t))
            predict((1 - t) * x0 + t * noise, timestep)
    finally:
        model.attention = usual
    return max(seen)
