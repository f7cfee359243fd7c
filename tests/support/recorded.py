"""Comparing with bits that were recorded on another processor."""

import torch
from torch import Tensor

VECTORS = ("AVX2", "AVX512")  # torch's kernels of the recordings


def assert_as_recorded(ours: Tensor, recorded: Tensor) -> None:
    """Bit for bit where torch computes as it did then; elsewhere to 4e-6.

    torch.randn and torch.linspace themselves end in other bits without those kernels.
    """
    if torch.backends.cpu.get_cpu_capability() in VECTORS:
        assert torch.equal(ours, recorded)
    else:
        torch.testing.assert_close(ours, recorded, rtol=0, atol=4e-6)
