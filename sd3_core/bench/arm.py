"""What an implementation must be able to do, and what all of them use."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoints.header import read_header
from ..checkpoints.tensors import map_tensors
from ..conditioning import Conditioning
from .cases import Case

Inputs = Mapping[str, Tensor]
Work = Callable[[Inputs], Tensor]

MMDIT_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."


class Arm(Protocol):
    """One implementation on one device."""

    def load(self, case: Case, file: Path) -> Mapping[str, Tensor]:
        """The file's denoiser, its weights as stored; returns them under any names."""
        ...

    def prepare(self, case: Case, file: Path) -> Work:
        """The work of a case, ready to be run on its inputs."""
        ...

    def release(self) -> None:
        """Let go of what the last case left on the device."""
        ...


def conditions(given: Inputs) -> tuple[Conditioning, Conditioning]:
    """The positive and the negative prompt, of batch 1."""
    context, pooled = given["context"], given["pooled"]
    return Conditioning(context[:1], pooled[:1]), Conditioning(context[1:], pooled[1:])


def stored(file: Path, prefix: str, device: torch.device) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that beginning."""
    header = read_header(file)
    names = [name for name in header.tensors if name.startswith(prefix)]
    return {
        name.removeprefix(prefix): tensor.to(device)
        for name, tensor in map_tensors(header, names).items()
    }
