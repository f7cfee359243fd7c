"""The GPU that what is started goes to."""

from contextlib import AbstractContextManager, nullcontext

import torch


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one inside the `with` block; nothing for other devices.

    Torch's own operations go where their tensors are.  Triton's kernels, graphs, streams and events
    go to the current GPU, which with several need not be the one of the tensors.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
