"""Teaching an MMDiT pictures with captions: a LoRA on it, or the network itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import lora
from ..checkpoints.layouts import PREFIXES
from ..checkpoints.lora_files import save_lora
from ..checkpoints.save import save_tensors
from ..conditioning import Conditioning
from ..lora import TrainableLoRA
from ..models.mmdit import MMDiT
from ..precision import check_finite
from .batches import Batch, Batches, generator
from .config import TrainConfig
from .dataset import Item
from .distributed import World
from .loop import Losses, Poll, never
from .objectives import Objective, Predict, Question
from .optimizers import Parameters
from .validation import validation_loss

STORED = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

DrawSamples = Callable[[MMDiT, Path, int], None]  # (model, folder, step)


def no_samples(model: MMDiT, folder: Path, step: int) -> None:
    """For a run without sample pictures."""


@dataclass(frozen=True)
class Place:
    """Where a network computes."""

    device: torch.device
    dtype: torch.dtype
    world: World


class FlowTask:
    """Predict what the objective asks for, at a random time of a picture, given its caption.

    Of prior pictures that is what the network answers without the LoRA: the loss is how far it has
    been moved, begins at 0, and has none of the noise of the data's target.  So what the network
    knows is kept by its own account, whether or not it draws as those pictures are.  (Prior
    preservation after Ruiz et al. 2023, arXiv:2208.12242, section 3.2, whose target are pictures
    that the network has drawn.)

    adapters: a LoRA on the model, which is then all that is trained.  metadata: for the product, by
    its step.  held: what is validated on.  poll: asked before each pass of the network.
    """

    def __init__(
        self,
        model: MMDiT,
        adapters: TrainableLoRA | None,
        objective: Objective,
        batches: Batches,
        held: Sequence[Item],
        config: TrainConfig,
        place: Place,
        metadata: Callable[[int], Mapping[str, str]],
        draw_samples: DrawSamples = no_samples,
        poll: Poll = never,
    ):
        self.model, self.adapters = model, adapters
        self.objective, self.batches, self.held = objective, batches, held
        self.config, self.place = config, place
        self.metadata, self.draw_samples, self.poll = metadata, draw_samples, poll
        self.product = "lora" if adapters is not None else "model"
        trained = model if adapters is None else adapters
        self.parameters: Parameters = dict(trained.named_parameters())
        self.has_prior = any(source.prior for source in config.data)

    def network(self, conditioning: Conditioning) -> Predict:
        """The network under these prompts; float32 outside, the run's dtype inside."""
        given = conditioning.to(self.place.device, self.place.dtype)

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            self.poll()
            timestep = timestep.to(x.device)
            return self.model(x.to(self.place.dtype), timestep, given.context, given.pooled).float()

        return predict

    def loss(self, step: int, rows: range, size: int) -> Losses:
        parts = [self.part(step, some, size) for some in self.batches.parts(step, rows, size)]
        names = parts[0].logs
        return Losses(
            torch.cat([one.each for one in parts]),
            {name: torch.cat([one.logs[name] for one in parts]) for name in names},
        )

    def part(self, step: int, rows: range, size: int) -> Losses:
        """The loss of rows whose pictures are of one size: one pass of the network."""
        batch = self.batches.samples(step, rows, size)
        device = self.place.device
        x0, noise, t = batch.x0.to(device), batch.noise.to(device), self.objective.draw(batch.u)
        question = self.objective.ask(x0, noise, t)
        if batch.prior.any():
            question = self.as_before(question, batch)
        with self._dropout(step, rows.start):
            each = question.loss(self.network(batch.conditioning), batch.mask)
        losses = each * batch.weights.to(each.device)
        if not self.has_prior:
            return Losses(losses)
        return Losses(losses, {"prior_loss": losses * batch.prior.to(each.device)})

    @torch.no_grad()
    def as_before(self, question: Question, batch: Batch) -> Question:
        """The question, of prior samples answered by the network without the LoRA."""
        rows = batch.prior.nonzero().flatten().to(question.x.device)
        base = self.network(batch.conditioning.rows(batch.prior))
        with lora.disabled(self.model):
            answers = base(question.x[rows], question.timestep[rows])
        return replace(question, target=question.target.index_copy(0, rows, answers))

    @contextmanager
    def _dropout(self, step: int, row: int) -> Iterator[None]:
        """Dropout draws from torch's own generators, which begin anew for each pass.

        The network stays in training mode: recomputed blocks run again in the backward pass.
        """
        if not self.config.lora_dropout:
            yield
            return
        device = self.place.device
        cuda = [device] if device.type == "cuda" else []
        self.model.train()
        with torch.random.fork_rng(cuda):
            draws = generator(self.config.seed, step, row, "dropout")
            torch.manual_seed(draws.initial_seed())
            yield

    def verdict(self, lines: Sequence[Mapping[str, Any]]) -> str:
        return ""

    def acceptable(self, measured: Mapping[str, float]) -> bool:
        return True

    def validate(self) -> Mapping[str, float]:
        self.model.eval()
        return validation_loss(
            self.network,
            self.objective,
            self.held,
            self.batches.entries,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            world=self.place.world,
            device=self.place.device,
        )

    def sample(self, folder: Path, step: int) -> None:
        self.model.eval()
        with torch.no_grad():
            self.draw_samples(self.model, folder, step)

    def export(self, path: Path, step: int) -> Path:
        """A LoRA in the configuration's dialect, or the network in the released layout."""
        dtype, metadata = STORED[self.config.save_dtype], self.metadata(step)
        if self.adapters is not None:
            parts = {"mmdit": self.adapters.lora()}
            return save_lora(path, parts, self.config.dialect, metadata, dtype)
        tensors = {
            PREFIXES["mmdit"] + name: check_finite(
                tensor.detach().to("cpu", dtype),
                f"{name}, stored in {self.config.save_dtype},",
                dtype,
            )
            for name, tensor in self.model.state_dict().items()
        }
        return save_tensors(path, tensors, metadata)
