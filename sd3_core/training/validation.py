"""Validation loss: the same pictures, the same noise, at eight noise levels.

Esser et al. 2024 (arXiv:2403.03206), sections 4 and 5.3: the loss at equidistant times follows
what people see in the pictures; its mean leaves out t = 1, where nothing is left to predict from.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..conditioning import Conditioning
from .batches import Entries, generator
from .dataset import Dataset, Item
from .distributed import World
from .objectives import Objective, Predict

LEVELS = tuple((level + 1) / 8 for level in range(8))

# Conditioning -> the network under it
Network = Callable[[Conditioning], Predict]


def chosen(dataset: Dataset, most: int) -> list[Item]:
    """At most so many of the items that are learnt from, evenly spread."""
    items = [item for item in dataset.items if not item.prior]
    count = min(most, len(items))
    return [items[index * len(items) // count] for index in range(count)]


@torch.no_grad()
def validation_loss(
    network: Network,
    objective: Objective,
    items: Sequence[Item],
    entries: Entries,
    *,
    seed: int,
    batch_size: int,
    world: World,
    device: torch.device,
) -> Mapping[str, float]:
    """The mean loss over the items, "loss", and at each level, "t0.125" ... "t1".

    Pictures are taken by their posterior's mean, with their first caption.  The processes share
    the work.
    """
    totals = torch.zeros(len(LEVELS), device=device)
    for number, item in enumerate(items):
        if number % world.size == world.rank:
            totals += losses_per_level(
                network, objective, item, entries, (seed, number), batch_size, device
            )
    world.add([totals])
    means = (totals / len(items)).tolist()
    named = {f"t{level:g}": mean for level, mean in zip(LEVELS, means, strict=True)}
    return {"loss": sum(means[:-1]) / (len(means) - 1), **named}


def losses_per_level(
    network: Network,
    objective: Objective,
    item: Item,
    entries: Entries,
    place: tuple[int, int],
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """One picture's loss at each level: [8]."""
    latents = entries.latents(item)
    prompt = entries.conditioning(item.captions[0][0]).conditioning
    x0 = latents.draw()[None]
    noise = torch.randn(x0.shape, generator=generator(*place, "validation"))
    mask = None if latents.mask is None else latents.mask[None].to(device)
    losses = []
    for times in torch.tensor(LEVELS).split(batch_size):
        count = len(times)
        predict = network(prompt.repeat(count))
        many = (x0.to(device).repeat(count, 1, 1, 1), noise.to(device).repeat(count, 1, 1, 1))
        losses.append(objective.loss(predict, *many, times, mask))
    return torch.cat(losses)
