"""The baselines' paths: variance preserving, and the tables that diffusers has."""

import math

import pytest
import torch
from sd3_pack.sd3_core.training.paths import CosinePath, LinearPath, karras_levels
from torch.testing import assert_close

PATHS = [LinearPath(), CosinePath()]
TIMES = torch.linspace(0, 1, 101)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_variance_is_preserved(path):
    a, b = path.coefficients(TIMES)
    assert_close(a**2 + b**2, torch.ones(101), atol=3e-7, rtol=0)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_data_turns_into_noise(path):
    a, b = path.coefficients(TIMES)
    assert bool((a.diff() < 0).all())
    assert bool((b.diff() > 0).all())


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 7, 25, 1000])
def test_a_run_falls_from_the_last_of_a_thousand_levels(path, steps):
    times = path.times(steps)
    assert times.shape == (steps,)
    assert float(path.timestep(times)[0]) == pytest.approx(999)
    assert bool((times.diff() < 0).all())
    assert float(times[-1]) > 0


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
def test_ldm_linear_is_diffusers_scaled_linear(scheduler):
    diffusers = pytest.importorskip("diffusers", reason="diffusers, the live oracle, is missing")
    oracle = getattr(diffusers, scheduler)(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    a, b = LinearPath().coefficients((torch.arange(1000) + 0.5) / 1000)
    # the oracle multiplies a thousand factors in float32, we in float64
    assert_close(a**2, oracle.alphas_cumprod, atol=0, rtol=2e-5)
    assert_close(
        a / b, (oracle.alphas_cumprod / (1 - oracle.alphas_cumprod)).sqrt(), rtol=2e-5, atol=0
    )


def test_ldm_linear_never_forgets_all_of_the_data():
    a, b = LinearPath().coefficients(torch.tensor([0.0, 1.0]))
    assert_close(a[1].item(), 0.0683, atol=5e-5, rtol=0)
    assert_close(b[0].item(), math.sqrt(0.00085), atol=1e-6, rtol=0)


def test_ldm_linear_tells_the_network_whole_levels():
    levels = torch.arange(1000)
    assert torch.equal(LinearPath().timestep((levels + 0.5) / 1000), levels.float())
    assert LinearPath().timestep(torch.tensor([1.0])).item() == 999


def test_cosine_ends_in_noise_alone():
    a, b = CosinePath().coefficients(torch.tensor([0.0, 0.5, 1.0]))
    assert_close(a, torch.tensor([1.0, math.sqrt(0.5), 0.0]), atol=1e-7, rtol=0)
    assert_close(b, torch.tensor([0.0, math.sqrt(0.5), 1.0]), atol=1e-7, rtol=0)


def test_cosine_tells_the_network_the_time_unrounded():
    assert_close(CosinePath().timestep(torch.tensor([0.12345])), torch.tensor([123.45]))


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 10, 20, 25, 50, 100, 250])
def test_ldm_linear_steps_where_diffusers_does(steps):
    diffusers = pytest.importorskip("diffusers", reason="diffusers, the live oracle, is missing")
    oracle = diffusers.DDIMScheduler(timestep_spacing="trailing")
    oracle.set_timesteps(steps)
    levels = LinearPath().timestep(LinearPath().times(steps))
    assert torch.equal(levels.long(), oracle.timesteps)


def test_karras_levels_are_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers, the live oracle, is missing")
    oracle = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    oracle.set_timesteps(18)
    assert_close(karras_levels(18, 0.002, 80.0), oracle.sigmas, atol=0, rtol=2e-6)


def test_karras_levels_fall_from_the_highest_to_zero():
    assert karras_levels(1, 0.002, 80.0).tolist() == pytest.approx([80.0, 0.0])
    levels = karras_levels(18, 0.002, 80.0)
    assert levels[[0, -2, -1]].tolist() == pytest.approx([80.0, 0.002, 0.0])
    assert bool((levels.diff() < 0).all())


@pytest.mark.parametrize("steps", [0, -3])
def test_a_run_without_steps_is_refused(steps):
    for times in (LinearPath().times, CosinePath().times, lambda n: karras_levels(n, 0.002, 80.0)):
        with pytest.raises(ValueError, match="at least 1"):
            times(steps)


def test_more_steps_than_levels_are_refused():
    with pytest.raises(ValueError, match="1000 levels"):
        LinearPath().times(1001)
