"""Learning from preferences: Diffusion-DPO on errors of the velocity.

Wallace et al. 2023 (arXiv:2311.12908), equation 14; Esser et al. 2024 (arXiv:2403.03206),
appendix C.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Preference:
    """What a batch of pairs says: [B] each, float32, to be averaged by the caller."""

    loss: Tensor
    accuracy: Tensor  # 1 where the winner gained more than the loser, 0.5 where both gained alike
    winner_gap: Tensor  # trained error - reference error; below 0: learned
    loser_gap: Tensor
    margin: Tensor  # loser_gap - winner_gap; above 0 where the preference is followed


@dataclass(frozen=True)
class PairErrors:
    """The errors of one network on a batch of pairs, as `Objective.loss` gives them: [B] each.

    Mean squared errors over channels and pixels.  A pair shares its time, its noise and its
    caption; the reference network sees the same.
    """

    winner: Tensor
    loser: Tensor


def diffusion_dpo_loss(
    trained: PairErrors,
    reference: PairErrors,
    beta: float = 2000.0,
    *,
    sft_weight: float = 0.0,
    loser_scale: float = 1.0,
) -> Preference:
    """-log sigmoid(-beta / 2 (winner_gap - loser_scale * loser_gap)) + sft_weight * winner error.

    beta counts with *mean* errors and *with* the half, as the authors' code does; see `beta_here`
    for other conventions.  It is the same at all times: the strict derivation from predicted noise
    weighs it with (1 - t)^2, which hands over errors of loss_space "eps" instead; constant is
    better (Liu et al. 2025, arXiv:2501.13918).
    sft_weight: holds the winner's error down.  Beside a DPO gradient of beta / 4 at the start, 0.05
        to 0.2 times that is felt.
    loser_scale: below 1, raising the loser's error pays less.  It changes what is trained, not what
        accuracy and margin measure.

    At the start, both networks alike, the loss is ln 2 and the accuracy 0.5.  Both gaps rising
    while the margin grows is the usual failure.
    """
    if not (0 < beta < math.inf and sft_weight >= 0 and 0 <= loser_scale <= 1):
        raise ValueError(
            f"beta {beta}, sft_weight {sft_weight}, loser_scale {loser_scale}: beta must be above "
            "0 (try 2000), sft_weight not below 0, loser_scale between 0 and 1 (1: plain DPO)."
        )
    winner_gap = trained.winner.float() - reference.winner.float()
    loser_gap = trained.loser.float() - reference.loser.float()
    logit = -beta / 2 * (winner_gap - loser_scale * loser_gap)
    margin = (loser_gap - winner_gap).detach()
    return Preference(
        loss=-F.logsigmoid(logit) + sft_weight * trained.winner.float(),
        accuracy=(torch.sign(margin) + 1) / 2,
        winner_gap=winner_gap.detach(),
        loser_gap=loser_gap.detach(),
        margin=margin,
    )


def beta_here(beta: float, *, values: int, summed: bool = False, half: bool = True) -> float:
    """A beta from elsewhere, in the convention of `diffusion_dpo_loss`.

    values: numbers in one latent, C * H * W.  summed: errors are sums, not means (SimpleTuner).
    half: the logit has the factor 1/2 (the authors' code; diffusers' research project has not).
    """
    return beta * (values if summed else 1) * (1 if half else 2)
