"""A training task of two small tensors, for tests of the loop itself."""

from pathlib import Path

import torch
from sd3_pack.sd3_core.checkpoints.save import save_tensors
from sd3_pack.sd3_core.training.batches import generator
from sd3_pack.sd3_core.training.config import LoopConfig
from sd3_pack.sd3_core.training.loop import Losses, fit
from sd3_pack.sd3_core.training.run import open_run
from torch import nn


class ToyTask:
    """Find the matrix and the offset behind noisy samples."""

    product = "model"

    def __init__(self):
        weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))
        self.parameters = {"weight": weight, "offset": nn.Parameter(torch.zeros(4))}
        self.seen: list[tuple[int, int]] = []  # (step, row), in the order of the calls
        self.validated: list[int] = []
        self.sampled: list[int] = []

    def loss(self, step: int, rows: range, size: int) -> Losses:
        self.seen += [(step, row) for row in rows]
        x = torch.stack([torch.randn(3, generator=generator(step, row)) for row in rows])
        error = x @ self.parameters["weight"].T + self.parameters["offset"] - x.sum(1)[:, None]
        return Losses((error**2).mean(1), {"largest": error.detach().abs().amax(1)})

    def validate(self) -> dict[str, float]:
        return {"loss": float((self.parameters["weight"] - 1).pow(2).mean())}

    def sample(self, folder: Path, step: int) -> None:
        self.sampled.append(step)

    def export(self, path: Path, step: int) -> Path:
        tensors = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return save_tensors(path, tensors, {"step": str(step)})


TOY = LoopConfig(
    steps=10,
    batch_size=2,
    learning_rate=0.05,
    warmup=3,
    ema=0.9,
    checkpoint_every=3,
    validate_every=4,
)


def train_toy(folder: Path, config: LoopConfig = TOY, task: ToyTask | None = None, **listeners):
    """A whole run, or the rest of it; returns the task and the outcome."""
    task = task or ToyTask()
    with open_run(folder, "toy") as run:
        return task, fit(task, run, config, **listeners)
