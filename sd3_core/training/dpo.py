"""Teaching an MMDiT preferences: a LoRA on it, by Diffusion-DPO.

Winner and loser of a pair meet one noise, one time and one prompt, in the trained network and in
the reference, which is the same network with the LoRA switched off.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import lora
from ..conditioning import Conditioning
from .batches import Batch, Batches, stacked_masks
from .config import TrainConfig
from .dataset import Item
from .flow import FlowTask
from .loop import Losses
from .preference import PairErrors, Preference, diffusion_dpo_loss
from .validation import LEVELS, losses_per_level

NUMBERS = ("accuracy", "winner_gap", "loser_gap", "margin")  # beside the loss
GAP = "validation_winner_gap"  # in the log
ON_TRAINED_PAIRS = (
    "validation is on pairs that are trained on, so its numbers are better than those of new pairs"
)


class DPOTask(FlowTask):
    """Lower the winner's error, and raise the loser's, against the reference.

    The dataset's items are winners, each with its loser; `adapters` are always there.
    """

    @cached_property
    def references(self) -> dict[int, PairErrors]:
        """The reference's errors of the held pairs measured so far, by their number."""
        return {}

    def part(self, step: int, rows: range, size: int) -> Losses:
        winner, loser = pairs(self.batches, step, rows, size)
        with torch.no_grad(), lora.disabled(self.model):
            reference = self.errors(winner, loser)
        preference = self.preference(self.errors(winner, loser), reference)
        weights = winner.weights.to(preference.loss.device)
        logs = {name: getattr(preference, name) for name in NUMBERS}
        return Losses(preference.loss * weights, logs)

    def errors(self, winner: Batch, loser: Batch) -> PairErrors:
        """Of the network as it is now, both sides in one pass."""
        device = self.place.device
        masks = (winner.mask, loser.mask)
        mask = None
        if any(one is not None for one in masks):
            mask = torch.cat([torch.ones_like(winner.x0[:, :1]) if m is None else m for m in masks])
        each = self.objective.loss(
            self.network(Conditioning.cat([winner.conditioning, loser.conditioning])),
            torch.cat([winner.x0, loser.x0]).to(device),
            torch.cat([winner.noise, loser.noise]).to(device),
            self.objective.draw(torch.cat([winner.u, loser.u])),
            mask,
        )
        return PairErrors(*each.chunk(2))

    def preference(self, trained: PairErrors, reference: PairErrors) -> Preference:
        config = self.config
        return diffusion_dpo_loss(
            trained,
            reference,
            config.dpo_beta,
            sft_weight=config.dpo_sft_weight,
            loser_scale=config.dpo_loser_scale,
        )

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Means over the held pairs and the noise levels below 1: what `loss` logs."""
        self.model.eval()
        names = ("loss", *NUMBERS)
        totals = torch.zeros(len(names), device=self.place.device)
        world = self.place.world
        for number, item in enumerate(self.held):
            if number % world.size != world.rank:
                continue
            if number not in self.references:  # the same at every measurement
                with lora.disabled(self.model):
                    self.references[number] = self.held_errors(number, item)
            seen = self.preference(self.held_errors(number, item), self.references[number])
            totals += torch.stack([getattr(seen, name).mean() for name in names])
        world.add([totals])
        return dict(zip(names, (totals / len(self.held)).tolist(), strict=True))

    def held_errors(self, number: int, item: Item) -> PairErrors:
        """A pair's errors at each level, with a noise that belongs to the pair."""

        def side(one: Item) -> Tensor:
            levels = losses_per_level(
                self.network,
                self.objective,
                one,
                self.batches.entries,
                (self.config.seed, number),
                self.config.batch_size,
                self.place.device,
            )
            return levels[: len(LEVELS) - 1]

        return PairErrors(side(item), side(loser_of(item)))

    def verdict(self, lines: Sequence[Mapping[str, Any]]) -> str:
        return spoilt(lines, self.config)

    def acceptable(self, measured: Mapping[str, float]) -> bool:
        """The loss alone would choose the most spoiled state: it falls as long as the loser gets
        worse faster than the winner."""
        return winners_kept(measured["winner_gap"])


def spoilt(lines: Sequence[Mapping[str, Any]], config: TrainConfig) -> str:
    """Why a run ends whose winners get worse, measurement after measurement; empty: they do not.

    Both errors rising while the margin grows is how DPO fails: the preference is followed by
    spoiling the loser more than the winner.
    """
    patience = config.dpo_patience
    measured = [line for line in lines if GAP in line]
    gaps = [line[GAP] for line in measured[-patience:]]
    if not patience or len(gaps) < patience or min(gaps) <= 0 or gaps[-1] < max(gaps):
        return ""
    kept = [line for line in measured if winners_kept(line[GAP])]
    best = min(kept, key=lambda line: line["validation_loss"])["step"] if kept else 0
    advice = (
        f"The LoRA given out is that of step {best}, the best one before that"
        if best
        else "No measured state is better than the untrained network; the LoRA given out is "
        "the last one, for inspection only"
    )
    anchor = 0.1 * config.dpo_beta / 4
    return (
        f"stopped at step {measured[-1]['step']}: in the last {patience} measurements the "
        f"chosen pictures' error lay above the untrained network's and rose to {gaps[-1]:+.3g},"
        f" so the preference is being followed by making both pictures worse. {advice}. For "
        "the next run (another run_name) lower learning_rate, raise dpo_beta, or set "
        f"dpo_sft_weight = {anchor:g}."
    )


def spoken(numbers: Mapping[str, float]) -> str:
    """NUMBERS in words."""
    return (
        f"the preference is followed in {numbers['accuracy']:.0%} of the pairs; against the "
        f"untrained network the chosen pictures' error is {numbers['winner_gap']:+.2g} (should "
        f"not rise), the rejected ones' {numbers['loser_gap']:+.2g}, "
        f"the margin {numbers['margin']:+.2g}"
    )


def newest_numbers(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of a log: NUMBERS and their step, as last validated, else of the last step; empty: of no DPO
    run."""
    for prefix in ("validation_", ""):
        for line in reversed(lines):
            if prefix + "accuracy" in line:
                return {"step": line["step"], **{name: line[prefix + name] for name in NUMBERS}}
    return {}


def winners_kept(gap: float) -> bool:
    """Whether the chosen pictures' error is no higher than the untrained network's."""
    return gap <= 0


def pairs(batches: Batches, step: int, rows: range, size: int) -> tuple[Batch, Batch]:
    """Winners and losers of a step's samples, alike but for the pictures."""
    winner = batches.samples(step, rows, size)
    draws = batches.dataset.batch(step, size, batches.config.seed, rows.start, len(rows))
    items = [loser_of(batches.dataset.items[draw.item]) for draw in draws]
    latents = [batches.entries.latents(item) for item in items]
    places = [(batches.config.seed, step, index) for index in rows]
    x0 = [batches.x0(one, place) for one, place in zip(latents, places, strict=True)]
    return winner, replace(winner, x0=torch.stack(x0), mask=stacked_masks(latents))


def loser_of(item: Item) -> Item:
    if item.loser is None:
        raise ValueError(f"{item.name}: is no pair; DPO needs preferences.")
    return item.loser
