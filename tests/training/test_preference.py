"""Diffusion-DPO: where it starts, what moves it, and whose beta is whose."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sd3_pack.sd3_core.schedule import add_noise
from sd3_pack.sd3_core.training.objectives import RectifiedFlow
from sd3_pack.sd3_core.training.preference import PairErrors, beta_here, diffusion_dpo_loss
from torch.testing import assert_close

REFERENCE = PairErrors(torch.tensor([0.9, 1.1, 1.0]), torch.tensor([1.0, 0.8, 1.0]))
# learned both sides right, both wrong, nothing
TRAINED = PairErrors(torch.tensor([0.8, 1.2, 1.0]), torch.tensor([1.05, 0.7, 1.0]))


def test_equal_networks_have_loss_ln_2_and_accuracy_one_half():
    start = diffusion_dpo_loss(REFERENCE, REFERENCE)
    assert_close(start.loss, torch.full((3,), math.log(2)))
    assert start.accuracy.tolist() == [0.5, 0.5, 0.5]
    assert start.margin.tolist() == [0.0, 0.0, 0.0]


def test_the_parts_are_the_paper_s():
    result = diffusion_dpo_loss(TRAINED, REFERENCE, beta=20.0)
    winner_gap, loser_gap = torch.tensor([-0.1, 0.1, 0.0]), torch.tensor([0.05, -0.1, 0.0])
    assert_close(result.winner_gap, winner_gap, atol=1e-7, rtol=0)
    assert_close(result.loser_gap, loser_gap, atol=1e-7, rtol=0)
    assert_close(result.margin, loser_gap - winner_gap, atol=2e-7, rtol=0)
    assert result.accuracy.tolist() == [1.0, 0.0, 0.5]
    expected = -torch.log(torch.sigmoid(-10 * (winner_gap - loser_gap)))
    assert_close(result.loss, expected, atol=1e-5, rtol=0)


def test_a_large_beta_overflows_nothing():
    result = diffusion_dpo_loss(TRAINED, REFERENCE, beta=1e6)
    assert_close(result.loss, torch.tensor([0.0, 1e5, math.log(2)]), rtol=1e-3, atol=0)


def test_at_the_start_the_winner_s_error_has_gradient_minus_beta_over_four():
    trained = PairErrors(torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True))
    reference = PairErrors(torch.ones(1), torch.ones(1))
    diffusion_dpo_loss(trained, reference, beta=2000.0).loss.sum().backward()
    assert trained.winner.grad == 500  # descending lowers the winner's error
    assert trained.loser.grad == -500


def test_only_the_loss_carries_a_gradient():
    trained = PairErrors(torch.ones(1, requires_grad=True), torch.ones(1))
    result = diffusion_dpo_loss(trained, trained)
    assert result.loss.requires_grad
    reported = (result.accuracy, result.winner_gap, result.loser_gap, result.margin)
    assert not any(value.requires_grad for value in reported)


def test_the_anchor_adds_the_winner_s_error():
    plain = diffusion_dpo_loss(TRAINED, REFERENCE, beta=20.0)
    anchored = diffusion_dpo_loss(TRAINED, REFERENCE, beta=20.0, sft_weight=0.5)
    assert_close(anchored.loss, plain.loss + 0.5 * TRAINED.winner)
    assert torch.equal(anchored.accuracy, plain.accuracy)


def test_a_scaled_loser_pays_less_but_is_measured_alike():
    plain = diffusion_dpo_loss(TRAINED, REFERENCE, beta=20.0)
    scaled = diffusion_dpo_loss(TRAINED, REFERENCE, beta=20.0, loser_scale=0.5)
    logit = -10 * (plain.winner_gap - 0.5 * plain.loser_gap)
    assert_close(scaled.loss, -F.logsigmoid(logit))
    assert torch.equal(scaled.margin, plain.margin)
    assert torch.equal(scaled.accuracy, plain.accuracy)


def dpo_elsewhere(trained, reference, beta, half):
    """The loss on whatever errors another code hands in."""
    gap = (trained.winner - reference.winner) - (trained.loser - reference.loser)
    return -F.logsigmoid(-beta * (0.5 if half else 1.0) * gap)


@pytest.mark.parametrize(
    ("beta", "summed", "half"),
    [(5000.0, False, True), (2500.0, False, False), (0.05, True, True), (0.02, True, False)],
    ids=["authors", "diffusers", "simpletuner", "sum without half"],
)
def test_every_convention_of_beta_can_be_said_in_ours(beta, summed, half):
    values = 16 * 8 * 8
    scale = values if summed else 1
    trained = PairErrors(TRAINED.winner * scale, TRAINED.loser * scale)
    reference = PairErrors(REFERENCE.winner * scale, REFERENCE.loser * scale)
    elsewhere = dpo_elsewhere(trained, reference, beta, half)
    ours = beta_here(beta, values=values, summed=summed, half=half)
    assert_close(diffusion_dpo_loss(TRAINED, REFERENCE, ours).loss, elsewhere, rtol=1e-4, atol=1e-4)


def test_diffusers_beta_is_half_the_authors():
    assert beta_here(2500.0, values=1, half=False) == beta_here(5000.0, values=1) == 5000.0


def test_errors_of_predicted_noise_are_the_time_weighted_beta():
    flow, t = RectifiedFlow(), torch.tensor([0.2, 0.7])
    generator = torch.Generator().manual_seed(0)
    winner, loser, noise = (torch.randn(2, 4, 6, 6, generator=generator) for _ in range(3))

    def errors(objective, scale):
        def predict(x, timestep):
            return scale * x

        return PairErrors(
            objective.loss(predict, winner, noise, t), objective.loss(predict, loser, noise, t)
        )

    in_eps = replace(flow, loss_space="eps")
    strict = diffusion_dpo_loss(errors(in_eps, 0.9), errors(in_eps, 1.0), 3.0).loss
    for index, beta in enumerate((3.0 * (1 - t) ** 2).tolist()):
        weighted = diffusion_dpo_loss(errors(flow, 0.9), errors(flow, 1.0), beta).loss
        assert_close(strict[index], weighted[index])
    assert not torch.equal(add_noise(winner, noise, t), add_noise(loser, noise, t))


def test_half_precision_errors_are_compared_in_float32():
    trained = PairErrors(torch.ones(1).bfloat16(), torch.ones(1).bfloat16())
    assert diffusion_dpo_loss(trained, trained).loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("beta", "sft_weight", "loser_scale"),
    [(0.0, 0, 1), (-1.0, 0, 1), (math.nan, 0, 1), (1.0, -1, 1), (1.0, 0, 1.5), (1.0, 0, -0.1)],
)
def test_impossible_settings_are_refused(beta, sft_weight, loser_scale):
    with pytest.raises(ValueError, match="beta must be above 0"):
        diffusion_dpo_loss(TRAINED, REFERENCE, beta, sft_weight=sft_weight, loser_scale=loser_scale)
