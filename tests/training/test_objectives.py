"""Objectives: what their losses measure, and where their samplers lead a perfect network."""

import math
from dataclasses import replace

import pytest
import torch
from sd3_pack.sd3_core.models.mmdit import MMDiT
from sd3_pack.sd3_core.schedule import Schedule, Window, add_noise
from sd3_pack.sd3_core.training.densities import LogitNormal, Uniform
from sd3_pack.sd3_core.training.objectives import (
    BASELINES,
    EDM,
    RectifiedFlow,
    VariancePreserving,
    find_objective,
    masked_mean,
)
from sd3_pack.sd3_core.training.paths import CosinePath, LinearPath
from tiny import MMDIT
from torch.testing import assert_close

FLOW = RectifiedFlow()
OBJECTIVES = {
    "flow": FLOW,
    "flow_unshifted": RectifiedFlow(schedule=Schedule(1.0)),
    **{name: make() for name, make in BASELINES.items()},
    "edm_unit": EDM(0.0, 0.6, data_std=1.0),
}
VP = {name: value for name, value in OBJECTIVES.items() if isinstance(value, VariancePreserving)}
SHAPE = (5, 4, 6, 8)
TIMES = torch.tensor([0.02, 0.3, 0.5, 0.77, 0.999])

every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def random(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def column(value):
    return value.reshape(-1, 1, 1, 1)


def answers(x0, noise):
    """A network that ignores its input and knows both ends; flow's answer."""
    return lambda x, timestep: noise - x0


def zero(x, timestep):
    return torch.zeros_like(x)


def coefficients(objective, timestep):
    """a and b of z = a x0 + b noise at what the network was told."""
    if isinstance(objective, VariancePreserving):
        half = 0.5 if isinstance(objective.path, LinearPath) else 0.0  # it is told whole levels
        a, b = objective.path.coefficients((timestep + half) / 1000)
        return column(a), column(b)
    t = column(timestep / 1000)
    return (1 - t, t) if isinstance(objective, RectifiedFlow) else (torch.ones_like(t), t / (1 - t))


def answer(objective, x0, noise, a, b):
    """What the objective asks of a network that sees these ends from a x0 + b noise."""
    if isinstance(objective, RectifiedFlow):
        return noise - x0
    if isinstance(objective, EDM):
        c_skip = objective.data_std**2 / (b**2 + objective.data_std**2)
        c_out = b * objective.data_std / (b**2 + objective.data_std**2).sqrt()
        return (x0 - c_skip * (x0 + b * noise)) / c_out  # EDM's equation 8
    return noise if objective.predicts == "eps" else a * noise - b * x0


def optimal(objective, mean, std=0.0):
    """The best possible network for data that is normally distributed around `mean`."""

    def predict(x, timestep):
        a, b = coefficients(objective, timestep)
        z = x
        if isinstance(objective, EDM):
            z = x * (b**2 + objective.data_std**2).sqrt()  # undoes c_in
        gain = a * std**2 / (a**2 * std**2 + b**2)
        x0 = mean + gain * (z - a * mean)
        return answer(objective, x0, (z - a * x0) / b, a, b)

    return predict


# The loss


@every_objective
def test_a_network_that_knows_the_only_picture_has_no_loss(objective):
    x0, noise = random(1, (1, *SHAPE[1:])).expand(SHAPE), random(2)
    loss = objective.loss(optimal(objective, x0), x0, noise, TIMES)
    # (z - a x0) / b at t = 0.02 loses two digits, squared; EDM divides by b twice
    assert_close(loss, torch.zeros(5), atol=1e-7, rtol=0)


def test_the_true_velocity_has_exactly_no_loss():
    x0, noise = random(1), random(2)
    assert torch.equal(FLOW.loss(answers(x0, noise), x0, noise, TIMES), torch.zeros(5))


def test_a_zero_network_s_loss_is_the_distance_of_noise_and_data():
    x0, noise = random(1), random(2)
    expected = (noise - x0).pow(2).mean(dim=(1, 2, 3))
    assert_close(FLOW.loss(zero, x0, noise, TIMES), expected)


def test_the_network_sees_the_noisy_latent_and_a_thousand_times_t():
    x0, noise, seen = random(1), random(2), []

    def predict(x, timestep):
        seen.append((x, timestep))
        return x

    FLOW.loss(predict, x0, noise, TIMES)
    assert torch.equal(seen[0][0], add_noise(x0, noise, TIMES))
    assert torch.equal(seen[0][1], 1000 * TIMES)


@pytest.mark.parametrize(
    ("space", "power"), [("x0", lambda t: t**2), ("eps", lambda t: (1 - t) ** 2)]
)
def test_loss_spaces_weigh_the_same_error(space, power):
    x0, noise, guess = random(1), random(2), random(3)

    def predict(x, timestep):
        return guess

    loss = replace(FLOW, loss_space=space).loss(predict, x0, noise, TIMES)
    assert_close(loss, power(TIMES) * FLOW.loss(predict, x0, noise, TIMES))
    z, t = add_noise(x0, noise, TIMES), column(TIMES)
    told = z - t * guess - x0 if space == "x0" else z + (1 - t) * guess - noise
    assert_close(loss, told.pow(2).mean(dim=(1, 2, 3)), atol=1e-6, rtol=1e-5)


def effective_weight(objective, t):
    """How much an error in the predicted noise counts at t, measured."""
    x0, noise = random(1, (len(t), *SHAPE[1:])).double(), random(2, (len(t), *SHAPE[1:])).double()

    def wrong(x, timestep):
        a, b = (value.double() for value in coefficients(objective, timestep.double()))
        off = noise + 0.1  # z is known, so x0 is off too
        return answer(objective, x0 - 0.1 * b / a, off, a, b)

    return objective.loss(wrong, x0, noise, t) / 0.01


def test_effective_weights_are_the_paper_s():
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    log_snr_slope = 2 / (t * (1 - t))  # -lambda' of the rectified flow
    assert_close(effective_weight(FLOW, t), log_snr_slope / 2 * t / (1 - t), rtol=1e-3, atol=0)
    cosine_slope, log_snr = (
        2 * math.pi / torch.sin(math.pi * t),
        -2 * torch.log(torch.tan(math.pi * t / 2)),
    )
    eps, v = (effective_weight(OBJECTIVES[f"{name}_cosine"], t) for name in ("eps", "v"))
    assert_close(eps, torch.ones(5), rtol=1e-3, atol=0)
    # w_t = sech(lambda / 2) for eps and exp(-lambda / 2) for v, both up to a common 2 pi / 2
    assert_close(eps * math.pi, cosine_slope / 2 / torch.cosh(log_snr / 2), rtol=1e-3, atol=0)
    assert_close(
        v / v[2], cosine_slope * torch.exp(-log_snr / 2) / (2 * math.pi), rtol=1e-3, atol=0
    )
    # EDM: exp(-lambda) + 0.5^2, with lambda = -2 ln b = 2 ln((1 - t) / t)
    edm = ((t / (1 - t)) ** 2 + 0.25) / 0.25
    assert_close(effective_weight(EDM(), t), edm, rtol=1e-3, atol=0)


def test_edm_on_unit_data_is_v_prediction_on_the_cosine_path():
    x0, noise, guess = random(1), random(2), random(3)
    angle = torch.atan(TIMES / (1 - TIMES)) / (math.pi / 2)
    edm = EDM(data_std=1.0).loss(lambda x, timestep: -guess, x0, noise, TIMES)
    v = OBJECTIVES["v_cosine"].loss(lambda x, timestep: guess, x0, noise, angle)
    assert_close(edm, v, atol=1e-6, rtol=1e-5)


@every_objective
def test_loss_is_finite_at_both_ends_of_time(objective):
    ends = torch.tensor([0.0, 1.0])
    loss = objective.loss(zero, random(1, (2, 4, 6, 8)), random(2, (2, 4, 6, 8)), ends)
    assert bool(torch.isfinite(loss).all())


@every_objective
def test_each_sample_has_its_own_loss(objective):
    x0, noise = random(1), random(2)

    def predict(x, timestep):
        return x * column(torch.cos(timestep))

    together = objective.loss(predict, x0, noise, TIMES)
    alone = [
        objective.loss(predict, x0[i : i + 1], noise[i : i + 1], TIMES[i : i + 1]) for i in range(5)
    ]
    assert_close(together, torch.cat(alone))


@every_objective
def test_half_precision_latents_have_a_float32_loss(objective):
    x0, noise = random(1).bfloat16(), random(2)
    seen = []

    def predict(x, timestep):
        seen.extend([x.dtype, timestep.dtype])
        return x.bfloat16()

    assert objective.loss(predict, x0, noise, TIMES.double()).dtype == torch.float32
    assert set(seen) == {torch.float32}


@every_objective
def test_times_may_lie_on_another_device_than_latents(objective):
    x0, noise = random(1).to("meta"), random(2).to("meta")
    assert objective.loss(lambda x, timestep: x * column(timestep), x0, noise, TIMES).is_meta
    assert objective.sample(lambda x, timestep: x * column(timestep), noise, 3).is_meta


@every_objective
def test_gradients_reach_every_parameter_of_a_network(objective):
    model = MMDiT(MMDIT)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    context, pooled = random(3, (5, 7, MMDIT.context_dim)), random(4, (5, MMDIT.pooled_dim))
    latents = (5, MMDIT.in_channels, 4, 6)

    def predict(x, timestep):
        return model(x, timestep, context, pooled)

    objective.loss(predict, random(1, latents), random(2, latents), TIMES).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    without = [name for name, grad in gradients.items() if grad is None or not grad.any()]
    # the last block asks nothing on behalf of the text, yet released files hold this weight
    assert without == ["joint_blocks.1.context_block.attn.ln_q.weight"]
    assert all(bool(grad.isfinite().all()) for grad in gradients.values() if grad is not None)


# Masks


def test_a_full_mask_equals_no_mask():
    x0, noise = random(1), random(2)
    for mask in (torch.ones(5, 1, 6, 8), torch.full((1, 1, 6, 8), 0.3)):
        masked = FLOW.loss(zero, x0, noise, TIMES, mask)
        assert_close(masked, FLOW.loss(zero, x0, noise, TIMES))


@every_objective
def test_an_empty_mask_has_neither_loss_nor_nan(objective):
    scale = torch.ones((), requires_grad=True)
    loss = objective.loss(
        lambda x, timestep: x * scale, random(1), random(2), TIMES, torch.zeros(5, 1, 6, 8)
    )
    loss.mean().backward()
    assert torch.equal(loss, torch.zeros(5))
    assert scale.grad == 0


def test_a_mask_chooses_pixels():
    error, mask = random(1) ** 2, torch.zeros(5, 1, 6, 8)
    mask[:, :, 2:4, 1:5] = 1
    assert_close(masked_mean(error, mask), error[:, :, 2:4, 1:5].mean(dim=(1, 2, 3)))


def test_a_mask_s_values_weigh_pixels():
    error, mask = random(1) ** 2, torch.rand(5, 1, 6, 8, generator=torch.Generator().manual_seed(3))
    expected = (error.mean(dim=1, keepdim=True) * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
    assert_close(masked_mean(error, mask), expected)


def test_masks_may_differ_within_a_batch():
    error, mask = torch.ones(2, 4, 6, 8), torch.zeros(2, 1, 6, 8)
    mask[0] = 1
    assert masked_mean(error, mask).tolist() == [1.0, 0.0]


# Times


def test_flow_draws_its_density_through_the_schedule():
    u = torch.rand(1000, generator=torch.Generator().manual_seed(5))
    flow = RectifiedFlow(LogitNormal(0.5, 0.6), Schedule(3.0))
    moved = RectifiedFlow(LogitNormal(0.5 + math.log(3), 0.6), Schedule(1.0))
    assert torch.equal(flow.draw(u), Schedule(3.0).sigma(LogitNormal(0.5, 0.6).sample(u)))
    assert_close(flow.draw(u), moved.draw(u), atol=0, rtol=5e-7)


def test_times_are_continuous():
    u = torch.rand(1000, generator=torch.Generator().manual_seed(5))
    assert len(FLOW.draw(u).unique()) > 995  # a thousand whole timesteps would leave about 630


def test_a_window_holds_the_noise_levels_after_the_shift():
    u = torch.linspace(0, 1, 500)
    for window in (Window(0.9, 0.6), Window(low=0.6), Window(high=0.9)):
        sigma = RectifiedFlow(Uniform(), Schedule(3.0), window=window).draw(u)
        assert float(sigma.min()) == pytest.approx(max(window.low, 0.0), abs=1e-6)
        assert float(sigma.max()) == pytest.approx(min(window.high, 1.0), abs=1e-6)


def test_an_impossible_window_is_refused_at_once():
    for window in (Window(0.2, 0.8), Window(low=1.0), Window(high=0.0)):
        with pytest.raises(ValueError, match=f"noise levels from {window.low}"):
            RectifiedFlow(window=window)


@every_objective
def test_draws_lie_in_time(objective):
    t = objective.draw(torch.tensor([0.0, 0.1, 0.5, 1.0]))
    assert t.dtype == torch.float32
    assert bool(((t > 0) & (t <= 1)).all())


def test_edm_draws_log_normal_noise_levels():
    u = (torch.arange(20000) + 0.5) / 20000
    t = EDM(-1.2, 1.2).draw(u).double()
    log_b = torch.log(t / (1 - t))
    assert float(log_b.mean()) == pytest.approx(-1.2, abs=1e-4)
    assert float(log_b.std()) == pytest.approx(1.2, abs=1e-3)


# Sampling


@every_objective
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 333])
def test_a_perfect_network_leads_to_the_only_picture(objective, steps):
    picture, noise = random(1, (1, 4, 6, 8)), random(2)
    x0 = objective.sample(optimal(objective, picture), noise, steps)
    # the worst is eps on the cosine path, one step from t = 0.999: x0 = (z - b eps) / a, a = 0.0016
    assert_close(x0, picture.expand(SHAPE), atol=3e-4, rtol=0)


def endpoint(objective, noise, mean, std):
    """Where the exact ODE takes this noise, for normally distributed data.

    (z - a mean) / sqrt(a^2 std^2 + b^2) is the same all along the path.
    """
    a, b, start = 0.0, 1.0, noise
    if isinstance(objective, VariancePreserving):
        a, b = (float(level) for level in objective.path.coefficients(torch.tensor([0.9991])))
    if isinstance(objective, EDM):
        a, b, start = 1.0, 80.0, 80.0 * noise
    return mean + std * (start - a * mean) / math.sqrt(a**2 * std**2 + b**2)


@every_objective
def test_a_perfect_network_carries_noise_onto_a_normal_distribution(objective):
    mean, std, noise = 0.7, 0.4, random(2, (1, 4, 64, 64))
    predict, exact = optimal(objective, mean, std), endpoint(objective, noise, 0.7, 0.4)
    coarse, fine = (
        (objective.sample(predict, noise, steps) - exact).abs().max() for steps in (50, 200)
    )
    assert fine < 0.05  # of values between -1 and 2.3
    assert fine < coarse / 2.5  # first order: four times the steps, about a quarter of the error
    x0 = objective.sample(predict, noise, 200)
    # the mean of 16384 draws has a standard error of 0.003; LDM-linear starts 0.068 * 0.7 off
    assert float(x0.mean()) == pytest.approx(mean, abs=0.03)
    assert float(x0.std()) == pytest.approx(std, abs=0.02)


@pytest.mark.parametrize(("predicts", "oracle_s"), [("eps", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("steps", [1, 4, 10, 25])  # divisors of 1000: see the comment below
def test_ldm_linear_steps_as_diffusers_ddim(predicts, oracle_s, steps):
    diffusers = pytest.importorskip("diffusers", reason="diffusers, the live oracle, is missing")
    oracle = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=oracle_s,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )
    oracle.set_timesteps(steps)

    def predict(x, timestep):
        return torch.tanh(x + column(timestep) / 1000)

    noise = x = random(2)
    # for other counts the oracle steps to t - 1000 // steps, which is not its own next timestep
    for timestep in oracle.timesteps:
        told = timestep.float().expand(len(x))
        x = oracle.step(predict(x, told), timestep, x).prev_sample
    x0 = VariancePreserving(LinearPath(), predicts).sample(predict, noise, steps)
    # the oracle's table is off by 1e-5 (test_paths.py), and eps divides by a = 0.07
    assert_close(x0, x, atol=2e-4, rtol=1e-4)


@every_objective
def test_guidance_is_a_mixture_of_answers(objective):
    # two networks that know one picture each; away from the second, the guided one knows a third
    wanted, unwanted = random(1, (1, 4, 6, 8)), random(3, (1, 4, 6, 8))
    positive, negative = optimal(objective, wanted), optimal(objective, unwanted)

    def guided(x, timestep):
        return negative(x, timestep) + 4 * (positive(x, timestep) - negative(x, timestep))

    x0 = objective.sample(guided, random(2), 12)
    assert_close(x0, (unwanted + 4 * (wanted - unwanted)).expand(SHAPE), atol=2e-3, rtol=0)


@every_objective
def test_every_step_is_reported(objective):
    done = []
    x0 = objective.sample(optimal(objective, random(1)), random(2), 6, done.append)
    assert [(step.index, step.total) for step in done] == [(index, 6) for index in range(6)]
    levels = [step.sigma for step in done]
    assert levels == sorted(levels, reverse=True)
    assert_close(done[-1].x0, x0)


@every_objective
def test_sampling_leaves_its_noise_alone_and_can_be_repeated(objective):
    noise = random(2)
    first = objective.sample(optimal(objective, 0.5, 0.7), noise, 5)
    assert torch.equal(objective.sample(optimal(objective, 0.5, 0.7), noise, 5), first)
    assert torch.equal(noise, random(2))


@every_objective
def test_what_is_learned_by_the_loss_is_what_the_sampler_needs(objective):
    """Of networks that see a normal distribution wrongly, the right one has the least loss."""
    mean, std, count = 0.7, 0.4, 64
    x0 = mean + std * random(1, (count, 4, 8, 8))
    noise, t = random(2, (count, 4, 8, 8)), objective.draw((torch.arange(count) + 0.5) / count)

    def loss(mean, std):
        return float(objective.loss(optimal(objective, mean, std), x0, noise, t).mean())

    others = [(mean + 0.1, std), (mean - 0.1, std), (mean, std * 1.3), (mean, std / 1.3)]
    assert loss(mean, std) < min(loss(*other) for other in others)


# Names


def test_objectives_are_found_by_name():
    assert find_objective("flow_matching", FLOW) is FLOW
    assert find_objective("v_cosine", FLOW) == VariancePreserving(CosinePath(), "v")
    assert find_objective("eps_linear", FLOW) == VariancePreserving(LinearPath(), "eps")
    assert find_objective("edm(0, 0.6)", FLOW) == EDM(0.0, 0.6)


def test_an_unknown_objective_is_answered_with_the_choice():
    with pytest.raises(ValueError, match=r"flow_matching, eps_linear.*edm\(mean, std, data_std\)"):
        find_objective("ddpm", FLOW)


@pytest.mark.parametrize("text", ["edm(0, 0)", "edm(0, 1, 0)", "edm(0, 1, nan)", "v_cosine(1)"])
def test_wrong_parameters_of_an_objective_are_refused(text):
    with pytest.raises(ValueError, match="must be|is written"):
        find_objective(text, FLOW)


def test_an_unknown_loss_space_is_refused():
    with pytest.raises(ValueError, match="velocity"):
        RectifiedFlow(loss_space="v")


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("window", [Window(), Window(high=0.9, low=0.2)])
def test_the_density_of_noise_levels_is_that_of_the_draws(shift, window):
    flow = RectifiedFlow(LogitNormal(0.3, 0.8), Schedule(shift), window=window)
    drawn = flow.draw((torch.arange(200_000) + 0.5) / 200_000).double()
    edges = torch.linspace(0, 1, 21, dtype=torch.float64)
    counted = torch.histogram(drawn, edges).hist / len(drawn) * 20
    fine = torch.linspace(0, 1, 20 * 200 + 1, dtype=torch.float64)
    middles = (fine[1:] + fine[:-1]) / 2
    expected = flow.pdf(middles).reshape(20, 200).mean(1)
    torch.testing.assert_close(counted, expected, atol=0.02, rtol=0)
