"""Networks with the recipe's weights."""

import torch
from recipe import normal, recipe_state_dict, weight


def with_recipe_weights(network_class, config, seed: int, ops=torch.nn):
    """The network at this size, float32 on the CPU, every parameter from the recipe."""
    with torch.device("meta"):
        network = network_class(config, ops)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    network.load_state_dict(recipe_state_dict(shapes, seed), strict=True, assign=True)
    return network.eval().requires_grad_(False)


def recipe_tensor(name: str, shape, seed: int) -> torch.Tensor:
    return torch.from_numpy(normal(name, shape, seed))


__all__ = ["recipe_tensor", "weight", "with_recipe_weights"]
