"""T5 on a card that does not hold it: most of its blocks stay in memory and come over in turn.

T5-XXL takes 8.9 GiB in 16 bits, streamed 1.2 GiB; the numbers are the same.  What it costs is the
way of the weights to the card in each pass, so prompts that are there together share a pass.
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..checkpoints.layouts import Component
from ..checkpoints.load import load_t5
from ..memory import free_memory
from ..models.cast import CastOps
from ..models.t5 import T5Encoder

AT_ONCE = 32  # prompts in one pass: 80 MB of states for T5-XXL and 154 tokens
WORK = 2**29  # bytes of a pass beside the weights
GIB = 2**30


class Streamed(nn.Module):
    """A block whose weights lie elsewhere than its input, and are there while it runs."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """As T5Block; the samples of x one by one, for a batch may round otherwise."""
        weights = chain(self.block.named_parameters(), self.block.named_buffers())
        here = {name: tensor.to(x.device) for name, tensor in weights}
        return torch.cat([functional_call(self.block, here, (one, bias)) for one in x.split(1)])


def load_t5_to_fit(
    part: Component,
    dtype: torch.dtype,
    device: torch.device,
    say: Callable[[str], object],
    change: Callable[[T5Encoder], T5Encoder] = lambda network: network,
) -> T5Encoder:
    """T5 on the device, or streamed to it where it does not fit, which `say` is told.

    change: what is to be done to its weights first.  Raises CheckpointError.
    """
    if fits(part, dtype, device):
        return change(load_t5(part, dtype=dtype, device=device))
    say(
        f"T5, {size_of(part, dtype) / GIB:.1f} GiB, does not fit into the free memory of "
        f"{device}: its weights stay in main memory and go there block by block, which takes longer"
    )
    return streamed(
        change(load_t5(part, dtype=dtype, device=device, ops=CastOps(dtype), left=left))
    )


def fits(part: Component, dtype: torch.dtype, device: torch.device) -> bool:
    free = free_memory(device)
    return device.type == "cpu" or free is None or size_of(part, dtype) + WORK <= free


def size_of(part: Component, dtype: torch.dtype) -> int:
    """Bytes on a device: weights are converted unless that enlarges them."""
    stored = sum(source.bytes for source in part.sources.values())
    return min(stored, sum(source.elements for source in part.sources.values()) * dtype.itemsize)


def left(name: str) -> bool:
    """Of all blocks but the first, whose table of positions serves every block."""
    return name.startswith("encoder.block.") and not name.startswith("encoder.block.0.")


def streamed(network: T5Encoder) -> T5Encoder:
    """The network itself, its blocks but the first streamed."""
    blocks = network.encoder.block
    network.encoder.block = nn.ModuleList([blocks[0], *map(Streamed, blocks[1:])])
    return network


def prompts_at_once(network: nn.Module) -> int:
    """How many prompts a network should be given in one pass."""
    return AT_ONCE if any(isinstance(module, Streamed) for module in network.modules()) else 1
