"""Several processes that train one model: which process this is, and how they agree.

`torchrun` and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK and where the processes meet;
torch.distributed does the rest.  Each process holds the whole model and computes its own samples;
the gradients of what is trained are summed over all of them once a step, in one piece, after the
last accumulated pass.  That is what DistributedDataParallel computes, without its overlap of
computation and communication, which a LoRA is too small to need.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """All processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # which of its machine's processes this is

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size == 1:
            return
        for _, group in groupby(tensors, key=lambda tensor: (tensor.dtype, tensor.device)):
            parts = list(group)
            flat = torch.cat([part.reshape(-1) for part in parts])
            dist.all_reduce(flat)
            lengths = [part.numel() for part in parts]
            for part, total in zip(parts, flat.split(lengths), strict=True):
                part.copy_(total.reshape(part.shape))

    def share(self, number: int) -> int:
        """The first process's number, in all of them."""
        if self.size == 1:
            return number
        box = torch.tensor([number], dtype=torch.int64, device=_meeting_place())
        dist.broadcast(box, src=0)
        return int(box.item())

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


ALONE = World()
LONGEST_WAIT = timedelta(hours=12)  # for the first process, while it encodes a large dataset


def _meeting_place() -> torch.device:
    """Where tensors must lie to be sent."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def find_world(environment: Mapping[str, str] = os.environ) -> World:
    """What the launcher has set; a process that was started by itself is alone.

    Raises ValueError when only a part of it is set.
    """
    size = int(environment.get("WORLD_SIZE", "1"))
    if size <= 1:
        return ALONE
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set: start with torchrun or "
            "accelerate launch, or unset WORLD_SIZE."
        )
    rank = int(environment["RANK"])
    return World(rank, size, int(environment.get("LOCAL_RANK", rank)))


@contextmanager
def joined(world: World, device: torch.device) -> Iterator[None]:
    """Inside the `with` block the processes can reach each other."""
    if world.size == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()
