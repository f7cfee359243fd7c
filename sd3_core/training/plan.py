"""What a run will take, told before it starts, and whether it fits.

The estimate counts what must be there: weights, gradients, the optimiser's memory, and what the
backward pass keeps of the forward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.mmdit import MMDiT, MMDiTConfig
from .config import TrainConfig
from .optimizers import matrices_in
from .report import counted

GIB = 2**30

# Elements that a joint block keeps for the backward pass, per token and hidden channel: measured
# with torch.autograd.graph.saved_tensors_hooks, see tests/training/test_plan.py.
KEPT_LORA = 20.0  # a LoRA on attention and MLP
KEPT_FULL = 25.5  # everything trained
KEPT_DUAL = 5.5  # the second attention of a dual block, besides
KEPT_RECOMPUTED = 1.1  # the block's input alone
OPTIMIZER_BYTES = {
    "adamw": 8.0,
    "adafactor": 0.1,
    "muon": 4.0,  # outside the blocks twice that
    "adamw_8bit": 2.1,
    "prodigy": 16.0,
}


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device of one process."""

    weights: float  # of the network
    trained: float  # what is trained beside it, gradients, optimiser, averaged weights
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.trained + self.activations


@dataclass(frozen=True)
class TrainPlan:
    """The run in numbers."""

    trained: int  # parameters
    steps: int
    done: int
    global_batch: int
    pictures: int  # or pairs of them
    epochs: float
    filled: int  # samples that an epoch's last step lacks
    estimate: Estimate
    free: float | None  # bytes; None: unknown
    pairs: bool = False

    def lines(self) -> list[str]:
        """The plan as text."""
        size, found = self.estimate, "" if self.free is None else f" of {_gib(self.free)} free"
        thing = "pair" if self.pairs else "picture"
        fill = (
            f"; an epoch's last step is filled up with {counted(self.filled, 'draw')} more, picked "
            f"anew among all {thing}s each time"
        )
        return [
            f"trains {self.trained:,} parameters on {counted(self.pictures, thing)}",
            f"{self.steps - self.done} steps to go ({self.done} of {self.steps} done), "
            f"{self.global_batch} samples each: {self.epochs:.1f} epochs in all"
            f"{fill if self.filled else ''}",
            f"memory: about {_gib(size.total)}{found} (network {_gib(size.weights)}, training "
            f"state {_gib(size.trained)}, activations {_gib(size.activations)})",
        ]


def estimate_memory(
    model: MMDiT,
    parameters: Mapping[str, Tensor],
    config: TrainConfig,
    *,
    tokens: int,
    dtype: torch.dtype,
) -> Estimate:
    """What training will hold at its peak.

    tokens: of one sample, text and image.  dtype: of the computation.
    """
    own = {id(parameter) for parameter in model.parameters()}
    weights = sum(_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))
    count = sum(parameter.numel() for parameter in parameters.values())
    beside = sum(_bytes(p) for p in parameters.values() if id(p) not in own)
    state = count * (4 + OPTIMIZER_BYTES[config.optimizer] + (4 if config.ema else 0))
    if config.optimizer == "muon":
        state += 4 * sum(p.numel() for name, p in parameters.items() if not matrices_in(name, p))
    kept = kept_per_token(model.config, config)
    pictures = config.batch_size * (2 if config.method == "dpo" else 1)
    activations = pictures * tokens * kept * model.config.hidden_size * dtype.itemsize
    return Estimate(weights, beside + state, activations)


def kept_per_token(size: MMDiTConfig, config: TrainConfig) -> float:
    """Elements that all blocks keep for the backward pass, per token and hidden channel."""
    block = KEPT_LORA if config.trains_lora else KEPT_FULL
    if config.gradient_checkpointing:  # and one block whole, while it runs again
        return size.depth * KEPT_RECOMPUTED + block + KEPT_DUAL
    return size.depth * block + len(size.dual_attention_layers) * KEPT_DUAL


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def check_fits(estimate: Estimate, loaded: float, free: float | None, config: TrainConfig) -> None:
    """Refuse a run that cannot fit.

    loaded: bytes of the estimate that are on the device already.  Raises ValueError with advice.
    """
    needed = estimate.total - loaded
    if not config.check_memory or free is None or needed <= free:
        return
    raise ValueError(
        f"this run needs about {_gib(needed)} more memory and {_gib(free)} are free. Try "
        f"{', '.join(savings(config))}; or check_memory = false to try it as it is."
    )


def savings(config: TrainConfig) -> list[str]:
    """What makes a run smaller, by the settings' names."""
    return [
        *(["gradient_checkpointing = true"] if not config.gradient_checkpointing else []),
        *(["a smaller batch_size with more accumulation"] if config.batch_size > 1 else []),
        "a smaller resolution",
        *(['optimizer = "adafactor"'] if config.optimizer != "adafactor" else []),
        *(["a smaller rank", "an fp8 file of the model"] if config.trains_lora else []),
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.0f} MiB"
