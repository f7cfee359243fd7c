"""A network of ComfyUI called where its manager put it, with tensors of the CPU, for the CPU."""

import comfy.model_management
import torch
from torch.utils._pytree import tree_map_only


def forward(model, *given, **more) -> torch.Tensor:
    """The velocity of a MODEL: x, timestep, context, pooled; and whatever its network takes."""
    comfy.model_management.load_models_gpu([model])
    given, more = tree_map_only(torch.Tensor, lambda t: t.to(model.load_device), (given, more))
    return model.model.diffusion_model(*given, **more).cpu()
