"""Sample pictures of a run: drawn as `generate` draws, with the network as it is now."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.load import read_config
from ..conditioning import Conditioning
from ..generate import decode, sample_with, text_encoders
from ..models.mmdit import MMDiT
from ..noise import noise
from ..pictures import save_png, to_uint8
from ..samplers import Step
from ..schedule import Schedule
from ..settings import Plan, Settings, find_parts, make_plan
from .config import TrainConfig
from .densities import find_density
from .loop import OnNote, Poll, ignore, never
from .objectives import Objective, RectifiedFlow, find_objective


@dataclass(frozen=True)
class Sample:
    """A picture to draw, again and again."""

    plan: Plan
    positive: Conditioning
    negative: Conditioning


@dataclass(frozen=True)
class SamplePictures:
    """All sample pictures of a run, their prompts encoded."""

    samples: tuple[Sample, ...]
    objective: Objective
    poll: Poll = never  # asked after each sampling step

    def draw(self, model: MMDiT, folder: Path, step: int) -> None:
        """Write step-000100-1.png, ... into the folder."""
        for number, sample in enumerate(self.samples, 1):
            x0 = self._latents(model, sample)
            pixels = to_uint8(decode(sample.plan, x0))[0]
            settings = sample.plan.settings
            record = {
                "step": step,
                "prompt": settings.prompt,
                "seed": settings.seed,
                "steps": settings.steps,
                "cfg": sample.plan.cfg,
                "shift": sample.plan.schedule.shift,
            }
            save_png(pixels, folder / f"step-{step:06}-{number}.png", {"training sample": record})

    def _latents(self, model: MMDiT, sample: Sample) -> Tensor:
        plan = sample.plan
        start = torch.zeros(plan.latent_shape, device=plan.device)

        def on_step(_: Step) -> None:
            self.poll()

        if isinstance(self.objective, RectifiedFlow):
            return sample_with(model, plan, sample.positive, sample.negative, start, on_step)
        positive = sample.positive.to(plan.device, plan.dtype)
        negative = sample.negative.to(plan.device, plan.dtype)

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            given = (x.to(plan.dtype), timestep.to(x.device))
            with_words = model(*given, positive.context, positive.pooled).float()
            without = model(*given, negative.context, negative.pooled).float()
            return without + (with_words - without) * plan.cfg

        begin = noise(plan.latent_shape, plan.settings.seed).to(plan.device)
        steps = plan.settings.steps or len(plan.sigmas) - 1
        return self.objective.sample(predict, begin, steps, on_step)


def encode_samples(
    config: TrainConfig,
    schedule: Schedule,
    resolution: int,
    poll: Poll = never,
    say: OnNote = ignore,
) -> SamplePictures:
    """Plans of the sample pictures, their prompts encoded; the encoders leave again.

    resolution: they are squares of so many pixels, less what the VAE cannot take.
    say: is told when T5 does not fit on the device.
    Raises ValueError for settings that cannot be drawn.
    """
    parts = find_parts(config.files)
    vae: Any = read_config(parts["vae"])
    side = max(resolution // vae.factor, 1) * vae.factor
    wanted = Settings(
        prompt="",
        use=config.use,
        t5_length=config.t5_length,
        width=side,
        height=side,
        seed=config.sample_seed,
        steps=config.sample_steps,
        cfg=config.sample_cfg,
        shift=schedule.shift,
        dtype=config.dtype,
        device=config.device,
    )
    plans = [
        make_plan(config.files, replace(wanted, prompt=prompt)) for prompt in config.sample_prompts
    ]
    encoders = text_encoders(config.files, plans[0], say=say)
    samples = []
    for plan in plans:
        poll()
        given = {"use": config.use, "t5_length": config.t5_length}
        positive = encoders.encode(plan.settings.prompt, **given)
        negative = encoders.encode("", **given)
        samples.append(
            Sample(
                plan,
                positive.conditioning.to("cpu", torch.float32),
                negative.conditioning.to("cpu", torch.float32),
            )
        )
    objective = find_objective(
        config.objective, RectifiedFlow(find_density(config.density), schedule)
    )
    return SamplePictures(tuple(samples), objective, poll)
