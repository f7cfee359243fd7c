"""The least time that a case can take: its multiplications, at the speed of a plain product."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..models.vae import VAEConfig
from .cases import Case, empty_network

MATMUL = "matmul TFLOP/s"  # a ceiling, see ceilings.py


@torch.no_grad()
def flops(case: Case) -> int:
    """Floating-point operations of matrix products, convolutions and attention; 0: not counted.

    Counted by torch on a network without data.  Guidance doubles a sampler's batch.
    """
    if case.work not in ("forward", "sample", "decode"):
        return 0
    size, guided = case.network, 2 if case.work == "sample" else 1
    network: Any = empty_network(case)
    batch = case.batch * guided
    side = case.pixels // 8
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        if isinstance(size, VAEConfig):
            network.decode(torch.empty(batch, size.latent_channels, side, side))
        else:
            x, timestep = torch.empty(batch, size.in_channels, side, side), torch.empty(batch)
            context = torch.empty(batch, case.text, size.context_dim)
            pooled = torch.empty(batch, size.pooled_dim)
            tokens = network.embed(x, timestep, context, pooled)
            network.unembed(network.run_blocks(tokens, range(len(network.joint_blocks))))
    return counter.get_total_flops() * (case.steps if case.work == "sample" else 1)


def floor_seconds(case: Case, ceilings: Mapping[str, float]) -> float | None:
    """At the measured speed of a product; None where neither is known."""
    count = flops(case)
    return count / (ceilings[MATMUL] * 1e12) if count and ceilings.get(MATMUL) else None
