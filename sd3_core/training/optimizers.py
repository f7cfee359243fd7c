"""Optimisers by name, the learning rate of a step, averaged weights, and their state as tensors."""

import importlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, quoted
from .config import LoopConfig
from .muon import Muon

Parameters = Mapping[str, nn.Parameter]  # what is trained, by its name in the network


PACKAGES = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt"}
_IN_A_BLOCK = re.compile(r"(blocks?|layers)\.\d+\.")
_STACKED = re.compile(r"(qkv|adaLN_modulation\.1)\.weight$")


def optimizer_package(config: LoopConfig) -> Any:
    """The package that the optimiser comes from; None: PyTorch has it.

    Raises ValueError when it is not installed.
    """
    if (module := PACKAGES.get(config.optimizer)) is None:
        return None
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"optimizer is {quoted(config.optimizer)}, which needs the package {module} "
            f"(pip install {module}); adamw, adafactor and muon need none."
        ) from error


def make_optimizer(parameters: Parameters, config: LoopConfig) -> torch.optim.Optimizer:
    """The optimiser that the configuration names.  Raises ValueError as optimizer_package."""
    trained = list(parameters.values())
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "adafactor":
        # beta2 rises with the step and the update is scaled to the parameter: eps are its own
        return torch.optim.Adafactor(trained, lr=rate, weight_decay=decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            trained, lr=rate, betas=config.betas, eps=config.eps, weight_decay=decay
        )
    if config.optimizer == "muon":
        return Muon(
            trained,
            [matrices_in(name, parameter) for name, parameter in parameters.items()],
            lr=rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=decay,
        )
    package = optimizer_package(config)
    if config.optimizer == "adamw_8bit":
        return package.optim.AdamW8bit(
            trained, lr=rate, betas=config.betas, eps=config.eps, weight_decay=decay
        )
    return package.Prodigy(
        trained,
        lr=rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=decay,
        safeguard_warmup=True,
        use_bias_correction=True,
    )


def matrices_in(name: str, parameter: Tensor) -> int:
    """How many matrices of a block this stacks; 0: it is a vector, or outside the blocks, where
    rows are tokens, pixels or times and not directions to be balanced."""
    if parameter.ndim != 2 or not _IN_A_BLOCK.search(name):
        return 0
    rows, columns = parameter.shape
    return rows // columns if _STACKED.search(name) and rows % columns == 0 else 1


def learning_rate(config: LoopConfig, step: int) -> float:
    """The rate of step 0, 1, ...: a straight rise, then constant, or a half cosine down to 0."""
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.lr_schedule == "constant" or step < config.warmup:
        return config.learning_rate * rise
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (1 + math.cos(math.pi * min(done, 1.0))) / 2


class Average:
    """An exponential moving average of what is trained.

    Its memory grows with the steps, (1 + n) / (10 + n) up to `decay`, so that the first random
    weights are soon forgotten.
    """

    def __init__(self, parameters: Parameters, decay: float):
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Parameters, step: int) -> None:
        """step: how many steps are done."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in parameters.items():
            self.tensors[name].lerp_(parameter, 1 - decay)


@contextmanager
def swapped(parameters: Parameters, average: Average | None) -> Iterator[None]:
    """Inside the `with` block the network has its averaged weights, if there are any."""
    if average is None:
        yield
        return
    raw = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = average.tensors[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = raw[name]


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything an optimiser remembers: its tensors by name, and its numbers as JSON holds them.

    names: of the parameters, in the optimiser's order.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in _flat(entries):
            if isinstance(value, Tensor):
                tensors[f"{names[index]}:{key}"] = value
            elif value is not None:
                numbers[f"{names[index]}:{key}"] = value
    groups = [
        {key: value for key, value in group.items() if _is_number(value)}
        for group in state["param_groups"]
    ]
    return tensors, {"values": numbers, "groups": groups}


def _flat(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """bitsandbytes keeps its quantised state in a table of its own: "table>key"."""
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}>{inner}", one) for inner, one in value.items())
        else:
            yield key, value


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: list[str],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """The opposite of optimizer_state.  Raises CheckpointError when it is another optimiser's."""
    state = optimizer.state_dict()
    index = {name: number for number, name in enumerate(names)}
    entries: dict[int, dict[str, Any]] = {}
    try:
        for full, value in (*tensors.items(), *numbers["values"].items()):
            name, _, path = full.rpartition(":")
            table = entries.setdefault(index[name], {})
            *outer, key = path.split(">")
            for step in outer:
                table = table.setdefault(step, {})
            table[key] = value
        for group, stored in zip(state["param_groups"], numbers["groups"], strict=True):
            group.update(stored)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the saved optimiser belongs to another run ({error}).") from error
    optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
