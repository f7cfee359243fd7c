"""The samples of a step as tensors: latents, noise, times, conditioning.

Each random number belongs to (seed, step, place in the batch, purpose) alone, so it does not
matter how processes and accumulated passes share a batch, nor where a run was stopped.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..conditioning import Conditioning
from ..text.encoders import ENCODERS
from .cache import CachedLatents, CachedPrompt
from .config import TrainConfig
from .dataset import Dataset, Draw, Item
from .densities import stratified
from .layout import without
from .order import chance

MEMORY = 2**28  # bytes of cached entries that are kept in memory


class Entries(Protocol):
    """Where latents and prompts come from: cache.Cache, or anything like it."""

    def latents(self, item: Item) -> CachedLatents: ...

    def conditioning(self, caption: str) -> CachedPrompt: ...


@dataclass(frozen=True)
class Batch:
    """Samples on the CPU, float32."""

    x0: Tensor  # [B, C, H, W] in model space
    noise: Tensor  # like x0
    u: Tensor  # [B] uniform in [0, 1): decides the times
    conditioning: Conditioning
    mask: Tensor | None  # [B, 1, H, W]
    weights: Tensor  # [B], factors of the loss
    prior: Tensor  # [B] bool: held to the network's own answer; see folders.Source


def generator(*counters: int | str) -> torch.Generator:
    """A generator that belongs to these counters alone."""
    return torch.Generator().manual_seed(int(chance(*counters) * 2**53))


class Batches:
    """The samples of any step of a run; a pure function of the step, but for what it remembers."""

    def __init__(self, dataset: Dataset, entries: Entries, config: TrainConfig):
        self.dataset, self.config = dataset, config
        self.entries = Remembered(entries)

    def parts(self, step: int, rows: range, size: int) -> list[range]:
        """These rows of a step's batch, parted where another size of pictures begins."""
        draws = self.dataset.batch(step, size, self.config.seed, rows.start, len(rows))
        buckets = [self.dataset.items[draw.item].bucket for draw in draws]
        starts = [n for n, one in enumerate(buckets) if not n or one != buckets[n - 1]]
        return [rows[start:end] for start, end in pairwise([*starts, len(rows)])]

    def samples(self, step: int, rows: range, size: int) -> Batch:
        """The samples `rows` of the batch of `size` of this step, counted from 0; see `parts`."""
        draws = self.dataset.batch(step, size, self.config.seed, rows.start, len(rows))
        places = [(self.config.seed, step, index) for index in rows]
        latents = [self.entries.latents(self.dataset.items[draw.item]) for draw in draws]
        x0 = [self.x0(one, place) for one, place in zip(latents, places, strict=True)]
        noise = [
            torch.randn(one.shape, generator=generator(*place, "noise"))
            for one, place in zip(x0, places, strict=True)
        ]
        u = torch.tensor([chance(*place, "time") for place in places], dtype=torch.float64)
        if self.config.stratified:
            u = stratified(u, torch.tensor(list(rows)), size)
        prompts = [self._prompt(draw, place) for draw, place in zip(draws, places, strict=True)]
        return Batch(
            x0=torch.stack(x0),
            noise=torch.stack(noise),
            u=u,
            conditioning=Conditioning.cat(prompts),
            mask=stacked_masks(latents),
            weights=torch.tensor([draw.weight for draw in draws]),
            prior=torch.tensor([self.dataset.items[draw.item].prior for draw in draws]),
        )

    def x0(self, latents: CachedLatents, place: tuple[int, int, int]) -> Tensor:
        """What is trained on of a picture at this place: (seed, step, index in the batch)."""
        if not self.config.posterior:
            return latents.draw()
        return latents.draw(
            torch.randn(latents.mean.shape, generator=generator(*place, "posterior"))
        )

    def _prompt(self, draw: Draw, place: tuple[int, int, int]) -> Conditioning:
        """The caption's conditioning, or the empty one's, perhaps with encoders left out."""
        config = self.config
        empty = chance(*place, "caption dropout") < config.caption_dropout
        prompt = self.entries.conditioning("" if empty else draw.caption)
        dropped = {
            name for name in ENCODERS if chance(*place, "drop", name) < config.encoder_dropout
        }
        return without(prompt.conditioning, prompt.layout, dropped)


def stacked_masks(latents: list[CachedLatents]) -> Tensor | None:
    """[B, 1, H, W]; None when no picture has a mask."""
    if all(one.mask is None for one in latents):
        return None
    return torch.stack(
        [torch.ones_like(one.mean[:1]) if one.mask is None else one.mask for one in latents]
    )


class Remembered:
    """Entries that stay in memory until MEMORY is full: small datasets are read once."""

    def __init__(self, entries: Entries):
        self.entries = entries
        self.pictures: dict[int, CachedLatents] = {}
        self.prompts: dict[str, CachedPrompt] = {}
        self.left = MEMORY

    def latents(self, item: Item) -> CachedLatents:
        if id(item) not in self.pictures:
            found = self.entries.latents(item)
            if not self._fits(3 * found.mean.nbytes):
                return found
            self.pictures[id(item)] = found
        return self.pictures[id(item)]

    def conditioning(self, caption: str) -> CachedPrompt:
        if caption not in self.prompts:
            found = self.entries.conditioning(caption)
            if not self._fits(found.conditioning.context.nbytes):
                return found
            self.prompts[caption] = found
        return self.prompts[caption]

    def _fits(self, size: int) -> bool:
        if size > self.left:
            return False
        self.left -= size
        return True
