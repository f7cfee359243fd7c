"""Noise levels: bit for bit the recorded ones, and the laws of rectified-flow time."""

import math

import pytest
import torch
from recorded import assert_as_recorded
from sd3_pack.sd3_core.noise import noise as seeded_noise
from sd3_pack.sd3_core.schedule import (
    ALWAYS,
    SCHEDULERS,
    Schedule,
    Window,
    add_noise,
    auto_shift,
    beta_distribution,
    log_snr,
    sigma_table,
)
from torch.testing import assert_close

SHIFTS = [0.5, 1.0, 1.5, 3.0, 6.0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_sigmas_equal_comfyui_bit_for_bit(golden, scheduler):
    for recorded in golden("schedules")[1]["schedules"]:
        sigmas = Schedule(recorded["shift"]).sigmas(recorded["steps"], scheduler)
        assert_as_recorded(sigmas, torch.tensor(recorded["comfy"][scheduler]))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_partial_denoise_equals_comfyui_bit_for_bit(golden, scheduler):
    for recorded in golden("schedules")[1]["schedules"]:
        for denoise, expected in recorded["comfy_partial"].items():
            sigmas = Schedule(recorded["shift"]).sigmas(
                recorded["steps"], scheduler, float(denoise)
            )
            assert_as_recorded(sigmas, torch.tensor(expected[scheduler]))


def test_normal_equals_the_reference_bit_for_bit(golden):
    for recorded in golden("schedules")[1]["schedules"]:
        sigmas = Schedule(recorded["shift"]).sigmas(recorded["steps"])
        assert_as_recorded(sigmas, torch.tensor(recorded["sd35.get_sigmas"]))


def test_the_reference_slices_its_full_schedule_for_a_partial_denoise(golden):
    for recorded in golden("schedules")[1]["schedules"]:
        steps = recorded["steps"]
        for denoise, expected in recorded["sd35.partial"].items():
            sliced = Schedule(recorded["shift"]).sigmas(steps)[int(steps * (1 - float(denoise))) :]
            assert_as_recorded(sliced, torch.tensor(expected))


def test_normal_agrees_with_recorded_diffusers(golden):
    for recorded in golden("schedules")[1]["schedules"]:
        sigmas = Schedule(recorded["shift"]).sigmas(recorded["steps"])
        # 1.2e-7 measured: one float32 rounding
        assert_close(sigmas, torch.tensor(recorded["diffusers.sigmas"]), atol=2e-7, rtol=0)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [1, 7, 33, 150])
def test_normal_agrees_with_diffusers_live(shift, steps):
    diffusers = pytest.importorskip("diffusers", reason="diffusers, the live oracle, is missing")
    oracle = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    oracle.set_timesteps(steps)
    assert_close(Schedule(shift).sigmas(steps), oracle.sigmas, atol=3e-7, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 29, 98, 250, 999, 1000, 1500])
def test_beta_picks_the_levels_that_scipy_picks(steps):
    stats = pytest.importorskip("scipy.stats", reason="scipy, the live oracle, is missing")
    quantiles = 1 - torch.arange(steps, dtype=torch.float64) / steps
    inverse = torch.from_numpy(stats.beta.ppf(quantiles.numpy(), 0.6, 0.6)).reshape(-1)
    levels = sigma_table(Schedule(3.0))[torch.unique_consecutive((inverse * 999).round().long())]
    assert torch.equal(SCHEDULERS["beta"](Schedule(3.0), steps), levels)


def test_beta_distribution_equals_scipys():
    stats = pytest.importorskip("scipy.stats", reason="scipy, the live oracle, is missing")
    x = torch.linspace(0, 1, 501, dtype=torch.float64)
    assert_close(
        beta_distribution(x, 0.6),
        torch.from_numpy(stats.beta.cdf(x.numpy(), 0.6, 0.6)),
        atol=1e-14,
        rtol=0,
    )


def test_beta_distribution_of_one_is_uniform():
    x = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert_close(beta_distribution(x, 1.0), x, atol=1e-14, rtol=0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(("steps", "denoise"), [(1, 1.0), (2, 0.3), (28, 1.0), (28, 0.77)])
def test_sigmas_fall_to_zero_in_as_many_steps_as_asked(scheduler, shift, steps, denoise):
    sigmas = Schedule(shift).sigmas(steps, scheduler, denoise)
    assert sigmas.dtype == torch.float32
    assert sigmas.device.type == "cpu"
    assert len(sigmas) == steps + 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_full_run_starts_at_pure_noise(scheduler):
    assert Schedule(3.0).sigmas(20, scheduler)[0] == 1


def test_beta_merges_levels_that_coincide():
    sigmas = Schedule(3.0).sigmas(1000, "beta")
    assert len(sigmas) < 1001
    assert (sigmas.diff() < 0).all()


def test_denoise_zero_is_a_run_of_no_steps():
    assert Schedule(3.0).sigmas(20, denoise=0).tolist() == [0.0]


def test_denoise_just_below_one_is_the_whole_run():
    steps = 30_000  # so many that 0.99995 of them would be fewer
    assert torch.equal(Schedule(3.0).sigmas(steps, denoise=0.99995), Schedule(3.0).sigmas(steps))


def test_shift_one_leaves_time_as_it_is():
    t = torch.linspace(0, 1, 64)
    assert torch.equal(Schedule(1.0).sigma(t), t)


@pytest.mark.parametrize("shift", SHIFTS)
def test_shifting_divides_the_signal_to_noise_ratio_by_the_shift_squared(shift):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float32)
    moved = log_snr(t) - log_snr(Schedule(shift).sigma(t))
    assert_close(moved, torch.full_like(t, 2 * math.log(shift)), atol=1e-5, rtol=0)


def test_sigma_is_computed_in_float32_for_any_shape_and_dtype():
    t = torch.linspace(0, 1, 15, dtype=torch.bfloat16).reshape(3, 5)
    sigma = Schedule(3.0).sigma(t)
    assert sigma.dtype == torch.float32
    assert torch.equal(sigma, Schedule(3.0).sigma(t.float()))


def test_the_table_of_levels_equals_the_recording(golden):
    expected = golden("units")[0]["flow.sigmas_table_shift3"]
    assert torch.equal(sigma_table(Schedule(3.0)), expected)


def test_timestep_is_a_thousand_sigma_unrounded():
    assert_close(
        Schedule.timestep(torch.tensor([0.0, 0.12345, 1.0])), torch.tensor([0.0, 123.45, 1000.0])
    )


def test_percent_runs_from_pure_noise_to_none():
    schedule = Schedule(3.0)
    assert schedule.percent_to_sigma(-1) == schedule.percent_to_sigma(0) == 1.0
    assert schedule.percent_to_sigma(1) == schedule.percent_to_sigma(2) == 0.0
    assert schedule.percent_to_sigma(0.5) == 0.75  # 3 * 0.5 / (1 + 2 * 0.5)
    assert Schedule(1.0).percent_to_sigma(0.25) == 0.75


def test_a_window_holds_both_its_ends_and_nothing_beyond():
    window = Schedule(3.0).window(0.25, 0.5)
    assert window == Window(high=0.9, low=0.75)
    assert [sigma in window for sigma in (0.91, 0.9, 0.8, 0.75, 0.74)] == [
        False,
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("shift", [0.3, 0.97, 2.9, 3.0, 11.3])
def test_a_window_over_the_whole_run_holds_every_level(shift):
    schedule = Schedule(shift)
    assert schedule.window(0, 1) == ALWAYS
    assert all(sigma in ALWAYS for sigma in schedule.sigmas(50).tolist())


def test_auto_shift_follows_the_side_of_the_picture():
    assert auto_shift(3.0, 1024 * 1024, 1024 * 1024) == 3.0
    assert auto_shift(3.0, 1024 * 1024, 512 * 512) == 1.5
    assert auto_shift(2.0, 64 * 64, 128 * 128) == 4.0


def test_log_snr_has_its_known_values():
    sigma = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    expected = torch.tensor([math.inf, 2 * math.log(3), 0.0, -2 * math.log(3), -math.inf])
    assert_close(log_snr(sigma), expected)


def test_add_noise_equals_the_recording(golden):
    units, _ = golden("units")
    noisy = add_noise(units["flow.latent"], units["noise.batch2_16x4x6"], units["flow.sigma"])
    assert_close(noisy, units["flow.noised"], atol=1e-6, rtol=0)


def test_add_noise_is_exact_at_both_ends():
    x0, noise = seeded_noise((2, 2, 4, 3, 3), 1)
    assert torch.equal(add_noise(x0, noise, torch.tensor(0.0)), x0)
    assert torch.equal(add_noise(x0, noise, torch.tensor(1.0)), noise)


def test_add_noise_takes_a_level_for_each_image_in_float32():
    x0, noise = seeded_noise((2, 2, 4, 3, 3), 1).bfloat16()
    sigma = torch.tensor([0.2, 0.7])
    noisy = add_noise(x0, noise, sigma)
    assert noisy.dtype == torch.float32
    for i in range(2):
        assert torch.equal(noisy[i], add_noise(x0[i : i + 1], noise[i : i + 1], sigma[i])[0])


@pytest.mark.parametrize("steps", [0, -3])
def test_too_few_steps_are_an_error(steps):
    with pytest.raises(ValueError, match=rf"steps is {steps}; a run takes at least 1"):
        Schedule().sigmas(steps)


@pytest.mark.parametrize("denoise", [-0.1, 1.5, math.nan])
def test_denoise_beyond_its_range_is_an_error(denoise):
    with pytest.raises(ValueError, match=rf"denoise is {denoise}; it must lie between 0 .* and 1"):
        Schedule().sigmas(20, denoise=denoise)


def test_a_denoise_that_asks_for_a_huge_schedule_is_an_error():
    with pytest.raises(ValueError, match="20 steps at denoise 1e-09 .* 1000000 is the limit"):
        Schedule().sigmas(20, denoise=1e-9)


def test_an_unknown_scheduler_is_told_the_known_ones():
    with pytest.raises(
        ValueError, match="'karras'; choose one of normal, simple, sgm_uniform, beta"
    ):
        Schedule().sigmas(20, "karras")


@pytest.mark.parametrize("shift", [0, -3.0, math.inf, math.nan])
def test_a_shift_that_is_no_positive_number_is_an_error(shift):
    with pytest.raises(ValueError, match=r"shift is .*; it must be a number above 0"):
        Schedule(shift)


def test_a_window_that_ends_before_it_starts_is_an_error():
    with pytest.raises(ValueError, match=r"start is 0.5 and end is 0.2; .* Swap them"):
        Schedule().window(0.5, 0.2)


@pytest.mark.parametrize("numbers", [(0, 1, 1), (3.0, 0, 1), (3.0, 1, -1)])
def test_auto_shift_needs_positive_numbers(numbers):
    with pytest.raises(ValueError, match="all three must be above 0"):
        auto_shift(*numbers)
