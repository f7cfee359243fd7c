"""Teaching an MMDiT pictures with captions: a LoRA on it, or the network itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.layouts import PREFIXES
from ..checkpoints.lora_files import save_lora
from ..checkpoints.save import save_tensors
from ..conditioning import Conditioning
from ..lora import TrainableLoRA
from ..models.mmdit import MMDiT
from ..precision import check_finite
from .batches import Batches, generator
from .config import TrainConfig
from .dataset import Item
from .distributed import World
from .loop import Losses, Poll, never
from .objectives import Objective, Predict
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

    def network(self, conditioning: Conditioning) -> Predict:
        """The network under these prompts; float32 outside, the run's dtype inside."""
        given = conditioning.to(self.place.device, self.place.dtype)

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            self.poll()
            timestep = timestep.to(x.device)
            return self.model(x.to(self.place.dtype), timestep, given.context, given.pooled).float()

        return predict

    def loss(self, step: int, rows: range, size: int) -> Losses:
        batch = self.batches.samples(step, rows, size)
        device = self.place.device
        with self._dropout(step, rows.start):
            each = self.objective.loss(
                self.network(batch.conditioning),
                batch.x0.to(device),
                batch.noise.to(device),
                self.objective.draw(batch.u),
                batch.mask,
            )
        return Losses(each * batch.weights.to(each.device))

    @contextmanager
    def _dropout(self, step: int, row: int) -> Iterator[None]:
        """Dropout draws from torch's own generators, which begin anew for each pass.

        The network stays in training mode: recomputed blocks run again in the backward pass.
        """
        if not self.config.lora_dropout:
            yield
            return
        device = self.place.device
        cuda = [device.index or 0] if device.type == "cuda" else []
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
