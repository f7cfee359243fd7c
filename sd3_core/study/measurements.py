"""What is measured: see cells.Measurement."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoints.load import load_vae
from ..checkpoints.lora_files import read_lora
from ..conditioning import Conditioning
from ..embedded.captions import full_caption, short_caption
from ..embedded.evaluation import UNSEEN, prompts
from ..embedded.render import draw
from ..embedded.score import judge_pictures
from ..embedded.stages.samples import TRAINING, scenes_of
from ..embedded.stages.vae import new_vae
from ..lora import merge
from ..settings import Settings
from ..text.encoders import ENCODERS
from ..training.config import LoopConfig
from ..training.objectives import RectifiedFlow
from . import autoencoder
from .arms import Arm, Network, largest_logit, validation_loss
from .cells import Numbers
from .drawing import PathPainter, Walk, draw_with, scores
from .features import features, frechet
from .lab import Lab, as_json
from .preference import PairsTask
from .world import CHANNELS, KINDS

CFG = 2.0  # of arms
PAIRS_FROM = 1_000_000  # the first scene whose caption makes a pair
BATCH = 64  # pictures drawn at once


@dataclass(frozen=True)
class ArmScore:
    """Validation loss of an arm, and what its pictures are like at each number of steps."""

    label: str
    arm: Arm
    steps: tuple[int, ...]
    pictures: int
    half: bool = False  # after half of its training
    use: tuple[str, ...] = ENCODERS
    full: bool = False  # full captions as prompts

    @property
    def name(self) -> str:
        return self.label

    def settings(self, lab: Lab) -> dict[str, Any]:
        return {**as_json(self), **lab.of_an_arm(self.arm), "cfg": CFG, "truth": "clamped"}

    def measure(self, lab: Lab, seed: int) -> Numbers:
        network = lab.network(self.arm, seed, half=self.half)
        objective, side = self.arm.make_objective(), self.arm.side
        numbers: dict[str, float] = {}
        if isinstance(objective, RectifiedFlow):
            # the density decides on training alone: at given times the loss is one and the same
            numbers["loss"] = validation_loss(network, objective, lab.world.held(side))
        scenes = lab.world.prompted(self.pictures, side)
        write = full_caption if self.full else short_caption
        texts = [write(scene, number) for number, scene in enumerate(scenes)]
        positive = lab.world.read(texts, self.use)
        negative = lab.world.read([""], self.use)
        basis = lab.world.basis(CHANNELS)
        truth = lab.world.truth(side)
        for steps in self.steps:
            walked = draw_with(
                network,
                objective,
                positive,
                negative,
                cfg=CFG,
                steps=steps,
                size=(CHANNELS, side // 8, side // 8),
                seed=seed,
            )
            pictures = basis.draw(walked.x0.cpu()).clamp(-1, 1)
            for name, value in scores(pictures, texts).items():
                numbers[f"{name}@{steps}"] = value
            numbers[f"fid@{steps}"] = frechet(features(pictures), truth)
            numbers |= {f"{name}@{steps}": value for name, value in path_numbers(walked).items()}
        return numbers


def path_numbers(walked: Walk) -> dict[str, float]:
    return {
        "path": float(walked.length.mean()),
        "straightness": float((walked.chord / walked.length.clamp(min=1e-9)).mean()),
    }


@dataclass(frozen=True)
class Ceiling:
    """The scores of the true pictures behind the linear latents: what no arm can pass."""

    pictures: int
    name: str = "ceiling"

    def settings(self, lab: Lab) -> dict[str, Any]:
        return {**as_json(self), "world": lab.world.identity}

    def measure(self, lab: Lab, seed: int) -> Numbers:
        scenes, basis = lab.world.prompted(self.pictures), lab.world.basis(CHANNELS)
        texts = [short_caption(scene, number) for number, scene in enumerate(scenes)]
        return scores(basis.draw(basis(draw(scenes))), texts)


@dataclass(frozen=True)
class ArmLogits:
    """The largest attention logit of an arm at its picture size, and its loss there."""

    label: str
    arm: Arm

    @property
    def name(self) -> str:
        return self.label

    def settings(self, lab: Lab) -> dict[str, Any]:
        return {**as_json(self), **lab.of_an_arm(self.arm)}

    def measure(self, lab: Lab, seed: int) -> Numbers:
        network, held = lab.network(self.arm, seed), lab.world.held(self.arm.side)
        loss = validation_loss(network, self.arm.make_objective(), held)
        return {"logit": largest_logit(network, held), "loss": loss}


@dataclass(frozen=True)
class Drawn:
    """Scores of the shipped model, or of another checkpoint; None: the model's own setting."""

    label: str
    prompts: int  # of each category
    side: int | None = None  # pixels
    steps: int | None = None
    cfg: float | None = None
    shift: float | None = None
    use: tuple[str, ...] = ENCODERS

    @property
    def name(self) -> str:
        return self.label

    def settings(self, lab: Lab) -> dict[str, Any]:
        return {**as_json(self), "model": lab.drawn_by, "dtype": str(lab.dtype)}

    def measure(self, lab: Lab, seed: int) -> Numbers:
        asked = Settings(
            prompt="",
            width=self.side,
            height=self.side,
            steps=self.steps,
            cfg=self.cfg,
            shift=self.shift,
            sampler="euler",
            use=self.use,
            dtype=DTYPE_NAMES[lab.dtype],
            device=str(lab.device),
        )
        painter = PathPainter(lab.files, asked)
        categories = {name: texts for name, texts in prompts().items() if name != UNSEEN}
        texts = [text for some in categories.values() for text in some[: self.prompts]]
        pictures, walks = [], []
        for start in range(0, len(texts), BATCH):
            # a seed for each batch: else pictures of two batches would begin with one noise
            lab.check_time()
            drawn, walked = painter.walk(texts[start : start + BATCH], 1000 * seed + start // BATCH)
            pictures.append(drawn)
            walks.append(walked)
        every = Walk(*(torch.cat(parts) for parts in zip(*map(_parts, walks), strict=True)))
        return {**scores(torch.cat(pictures), texts), **path_numbers(every)}


DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _parts(walked: Walk) -> tuple[torch.Tensor, ...]:
    return walked.x0, walked.length, walked.chord


@dataclass(frozen=True)
class LinearVAE:
    """The best linear code of so many channels; each seed measures on other pictures."""

    channels: int
    pictures: int

    @property
    def name(self) -> str:
        return f"linear code, {self.channels} channels"

    def settings(self, lab: Lab) -> dict[str, Any]:
        return as_json(self)

    def measure(self, lab: Lab, seed: int) -> Numbers:
        pictures = autoencoder.held_pictures(self.pictures, seed)
        drawn = autoencoder.linear(lab.world.basis(self.channels), pictures)
        return autoencoder.fidelity(drawn, pictures)


@dataclass(frozen=True)
class TrainedVAE:
    """A convolutional autoencoder of so many channels."""

    channels: int
    steps: int
    batch_size: int
    pictures: int

    @property
    def name(self) -> str:
        return f"VAE, {self.channels} channels"

    def settings(self, lab: Lab) -> dict[str, Any]:
        return {**as_json(self), "dtype": str(lab.dtype)}

    def measure(self, lab: Lab, seed: int) -> Numbers:
        config = autoencoder.stage(self.channels, self.steps, self.batch_size, seed)

        def task(_: LoopConfig) -> autoencoder.SquaresTask:
            return autoencoder.SquaresTask(new_vae(config), config, lab.device, lab.dtype)

        what = f"{self.name}, seed {seed}"
        trained_as = {key: value for key, value in self.settings(lab).items() if key != "pictures"}
        path = lab.fitted(trained_as, config, task, "model", what)
        trained = task(config)
        trained.vae.load_state_dict(load_vae(path, dtype=torch.float32).state_dict())
        pictures = autoencoder.held_pictures(self.pictures, seed)
        return autoencoder.fidelity(trained.there_and_back(pictures), pictures)


@dataclass(frozen=True)
class Preferred:
    """An arm before and after DPO on the checker's choice between pairs of its own pictures."""

    arm: Arm
    pairs: int  # prompts, of two pictures each; of those, pairs that differ are learnt
    dpo_steps: int
    steps: int  # of sampling
    pictures: int
    name: str = "dpo"

    def settings(self, lab: Lab) -> dict[str, Any]:
        return {**as_json(self), **lab.of_an_arm(self.arm), "cfg": CFG}

    def measure(self, lab: Lab, seed: int) -> Numbers:
        network = lab.network(self.arm, seed)
        scenes = lab.world.prompted(self.pictures)
        texts = [short_caption(scene, number) for number, scene in enumerate(scenes)]
        before = self._scores(lab, network, texts, seed)
        numbers = range(PAIRS_FROM, PAIRS_FROM + self.pairs)
        asked = [
            short_caption(scene, number)
            for number, scene in zip(
                numbers, scenes_of(TRAINING, numbers, (64, 64), KINDS), strict=True
            )
        ]
        winners, losers, told = self._pairs(lab, network, asked, seed)
        if not len(winners):  # nothing to choose between: nothing is learnt
            return {**_named("before", before), **_named("after", before), "pairs": 0.0}
        config = LoopConfig(
            steps=self.dpo_steps,
            batch_size=16,
            learning_rate=3e-4,
            warmup=min(10, self.dpo_steps),
            weight_decay=0.0,
            seed=seed,
            checkpoint_every=self.dpo_steps,
            keep=1,
            validate_every=0,
        )

        def task(config: LoopConfig) -> PairsTask:
            return PairsTask(lab.network(self.arm, seed), winners, losers, told, config)

        path = lab.fitted(self.settings(lab), config, task, "lora", f"dpo, seed {seed}")
        merge(network.model, read_lora(path, ("mmdit",)).parts["mmdit"], 1.0)
        after = self._scores(lab, network, texts, seed)
        return {**_named("before", before), **_named("after", after), "pairs": float(len(winners))}

    def _scores(self, lab: Lab, network: Network, texts: list[str], seed: int) -> Numbers:
        latents = self._draw(lab, network, texts, seed)
        return scores(lab.world.basis(CHANNELS).draw(latents), texts)

    def _pairs(
        self, lab: Lab, network: Network, texts: list[str], seed: int
    ) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
        """Latents of the better and the worse picture, where the checker finds one better."""
        basis = lab.world.basis(CHANNELS)
        both = [self._draw(lab, network, texts, 10_000 * (seed + 1) + side) for side in (0, 1)]
        wrong = [
            torch.tensor(
                [
                    len(one.wrong())
                    for one in judge_pictures(basis.draw(latents).clamp(-1, 1), texts)
                ]
            )
            for latents in both
        ]
        lead = wrong[1] - wrong[0]
        told = lab.world.read(texts)
        chosen = lead != 0
        first = (lead > 0)[:, None, None, None]
        return (
            torch.where(first, both[0], both[1])[chosen],
            torch.where(first, both[1], both[0])[chosen],
            Conditioning(told.context[chosen], told.pooled[chosen]),
        )

    def _draw(self, lab: Lab, network: Network, texts: list[str], seed: int) -> torch.Tensor:
        parts = []
        for start in range(0, len(texts), BATCH):
            lab.check_time()
            some = texts[start : start + BATCH]
            walked = draw_with(
                network,
                self.arm.make_objective(),
                lab.world.read(some),
                lab.world.read([""]),
                cfg=CFG,
                steps=self.steps,
                size=(CHANNELS, 8, 8),
                seed=seed + 100 * (start // BATCH),
            )
            parts.append(walked.x0.cpu())
        return torch.cat(parts)


def _named(prefix: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix} {name}": value for name, value in numbers.items()}
