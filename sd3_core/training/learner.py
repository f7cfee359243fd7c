"""What is trained together with all that its next step depends on: the whole of a saved state."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError, NumericalError
from .config import LoopConfig
from .optimizers import (
    Average,
    Parameters,
    learning_rate,
    make_optimizer,
    optimizer_state,
    restore_optimizer,
)
from .run import State


@dataclass(frozen=True)
class Best:
    """The measurement with the lowest validation loss among those that are acceptable."""

    step: int
    loss: float


class Learner:
    """What is trained, and all that its next step depends on."""

    def __init__(self, parameters: Parameters, config: LoopConfig):
        self.parameters = dict(parameters)
        self.config = config
        self.optimizer = make_optimizer(self.parameters, config)
        self.average = Average(self.parameters, config.ema) if config.ema else None
        self.step = 0  # steps done
        self.best: Best | None = None
        self.looked = False  # whether what is due at this step is done: measured, drawn, exported
        self.whole = True  # False while an update is under way: then nothing may be saved

    def state(self) -> State:
        """This moment."""
        tensors = {f"trained/{name}": p.detach() for name, p in self.parameters.items()}
        if self.average is not None:
            tensors |= {f"average/{name}": t for name, t in self.average.tensors.items()}
        memory, numbers = optimizer_state(self.optimizer, list(self.parameters))
        tensors |= {f"optimizer/{name}": tensor for name, tensor in memory.items()}
        best = None if self.best is None else [self.best.step, self.best.loss]
        return State(
            self.step, tensors, {"optimizer": numbers, "best": best, "looked": self.looked}
        )

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Back to a moment.  Raises CheckpointError when the state is of something else."""
        self.whole = False
        groups: dict[str, dict[str, Tensor]] = {"trained": {}, "average": {}, "optimizer": {}}
        for full, tensor in state.tensors.items():
            group, _, name = full.partition("/")
            groups[group][name] = tensor
        self._fill(self.parameters, groups["trained"])
        if self.average is not None:
            self._fill(self.average.tensors, groups["average"])
        restore_optimizer(
            self.optimizer, list(self.parameters), groups["optimizer"], state.values["optimizer"]
        )
        self.step = state.step
        self.best = Best(*state.values["best"]) if state.values["best"] else None
        self.looked = state.values["looked"]
        self.whole = True

    @staticmethod
    def _fill(ours: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
        shapes = {name: tensor.shape for name, tensor in ours.items()}
        if shapes != {name: tensor.shape for name, tensor in stored.items()}:
            raise CheckpointError("the saved state belongs to another network or another LoRA.")
        for name, tensor in ours.items():
            tensor.copy_(stored[name])

    def update(self) -> float:
        """One step along the gradients; returns their norm.  NumericalError unless it is finite."""
        trained = list(self.parameters.values())
        limit = self.config.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(trained, limit))
        if not math.isfinite(norm):
            raise diverged(self.step, "gradient")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.whole = False
        self.optimizer.step()
        self.step += 1
        self.looked = False
        if self.average is not None:
            self.average.update(self.parameters, self.step)
        self.whole = True
        return norm


def diverged(step: int, what: str) -> NumericalError:
    """The error of a step (from 0) whose loss or gradient is no number."""
    return NumericalError(
        f"the {what} of step {step + 1} is NaN or infinite, and the same settings would lead there "
        "again. Begin a run of another name with a lower learning_rate or clip, computed in bf16 "
        "or fp32, or look for odd pictures; the earlier states are kept."
    )
