"""The step cache: exact at 0, near by above, and it really leaves evaluations out."""

from dataclasses import replace

import pytest
import torch
from sd3_pack.sd3_core import generate as generation
from sd3_pack.sd3_core.checkpoints.load import load_mmdit
from sd3_pack.sd3_core.embedded.model import FILE
from sd3_pack.sd3_core.generate import generate, sample_with, start_latents, step_cache
from sd3_pack.sd3_core.noise import noise
from sd3_pack.sd3_core.samplers import SAMPLERS
from sd3_pack.sd3_core.schedule import Schedule, Window
from sd3_pack.sd3_core.settings import Files, Settings, make_plan
from sd3_pack.sd3_core.speed.step_cache import StepCache, cached, relative_rms

SIGMAS = Schedule(3.0).sigmas(20)
START = noise((1, 16, 8, 8), 3)
EMBEDDED = Files(checkpoint=FILE)


class Counted:
    """A velocity that bends gently, and counts."""

    def __init__(self):
        self.levels = []

    def __call__(self, x, sigma):
        self.levels.append(float(sigma[0]))
        return START - 0.3 * torch.tanh(x) * sigma[:, None, None, None]


def run(threshold, sampler="euler", windows=()):
    velocity, cache = Counted(), StepCache(threshold, windows)
    x0 = SAMPLERS[sampler](cached(velocity, cache), START, SIGMAS)
    return x0, velocity.levels, cache


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_threshold_of_0_is_exact(sampler):
    plain = Counted()
    expected = SAMPLERS[sampler](plain, START, SIGMAS)
    x0, levels, cache = run(0.0, sampler)
    assert torch.equal(x0, expected)
    assert levels == plain.levels
    assert (cache.evaluations, cache.reused) == (len(levels), 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_higher_threshold_evaluates_less_and_ends_farther_off(sampler):
    exact, levels, _ = run(0.0, sampler)
    before, distances = len(levels), [0.0]
    for threshold in (0.02, 0.1, 0.5):
        x0, levels, cache = run(threshold, sampler)
        assert len(levels) == cache.evaluations < before
        assert cache.evaluations + cache.reused == (39 if sampler == "heun" else 20)
        before = len(levels)
        distances.append(relative_rms(x0, exact))
    assert distances == sorted(distances)
    assert 0 < distances[1] < 0.05


def test_no_velocity_is_used_across_the_end_of_a_window():
    """Else one with guidance would serve where guidance has ended."""
    _, anyway, _ = run(0.5)
    window = Window(high=0.9, low=0.5)
    _, levels, _ = run(0.5, windows=[window])
    first_inside = next(float(s) for s in SIGMAS if s in window)
    first_behind = next(float(s) for s in SIGMAS if s < window.low)
    assert {first_inside, first_behind} <= set(levels)
    assert not {first_inside, first_behind} <= set(anyway)


def test_another_shape_and_numbers_that_are_none_are_evaluated():
    cache = StepCache(0.5)
    for index, x in enumerate((START, START * 0.9, START.repeat(2, 1, 1, 1))):
        assert cache.look_up(x, 0.5) is None
        cache.keep(x, 0.5, x + index)
    cache.keep(x * 0.9, 0.5, x * torch.nan)
    assert cache.look_up(x * 0.8, 0.5) is None
    assert cache.reused == 0


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_outside_0_to_1_is_refused(threshold):
    with pytest.raises(ValueError, match="step_cache is .* Try 0.05"):
        StepCache(threshold)


# On the embedded model


def settings(**changes):
    walk = {"sampler": "euler", "steps": 20} | changes
    return Settings("two blue squares left of a green star", seed=1, device="cpu", **walk)


@pytest.fixture(scope="module")
def embedded():
    """(model, prompts) of the embedded model."""
    with torch.inference_mode():
        plan = make_plan(EMBEDDED, settings())
        model = load_mmdit(plan.parts["mmdit"], dtype=plan.dtype, device="cpu")
        prompts = [read.conditioning for read in generation.encode_prompts(EMBEDDED, plan)]
    return model, prompts


@torch.inference_mode()
def drawn(embedded, **changes):
    """(latents, calls of each block, cache)."""
    model, prompts = embedded
    plan = make_plan(EMBEDDED, settings(**changes))
    cache, calls = step_cache(plan), [0] * model.config.depth
    hooks = [
        block.x_block.mlp.fc2.register_forward_hook(
            lambda *_, i=index: calls.__setitem__(i, calls[i] + 1)
        )
        for index, block in enumerate(model.joint_blocks)
    ]
    try:
        latents = sample_with(model, plan, *prompts, start_latents(plan), cache=cache)
    finally:
        for hook in hooks:
            hook.remove()
    return latents, calls, cache


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_a_step_that_is_left_out_calls_no_block(embedded, sampler):
    options = {"sampler": sampler, "steps": 20}
    plain, plain_calls, none = drawn(embedded, **options)
    latents, calls, cache = drawn(embedded, step_cache=0.1, **options)
    assert none is None
    assert set(plain_calls) == {20}
    assert set(calls) == {cache.evaluations} == {20 - cache.reused}
    assert cache.reused >= 4
    assert 0 < relative_rms(latents, plain) < 0.12


@pytest.mark.parametrize(
    "changes",
    [
        {"cfg_start": 0.2, "cfg_end": 0.6},
        {"skip_scale": 1.0, "skip_layers": (1,), "skip_end": 0.4},
        {"cfg": 1.0},
        {"batch": 3},
    ],
)
def test_the_distance_stays_small_with_all_kinds_of_guidance(embedded, changes):
    plain, _, _ = drawn(embedded, **changes)
    latents, _, cache = drawn(embedded, step_cache=0.07, **changes)
    assert cache.reused >= 1
    assert 0 < relative_rms(latents, plain) < 0.15


def test_the_run_tells_what_acted_and_how_far_it_went():
    plain = generate(EMBEDDED, settings())
    result = generate(EMBEDDED, settings(step_cache=0.05, cfg_end=0.7), measure=True)
    assert plain.distance is None
    assert 0 < result.distance < 0.2
    told = {gain.name: gain for gain in result.gains}
    assert told["step cache"].active
    assert "of 20 evaluations left out" in told["step cache"].note
    assert not told["step cache"].note.startswith("0 ")
    assert told["guidance interval"].note.startswith("cfg in ")
    assert not told["fp8"].active
    assert result.record["settings"]["step_cache"] == 0.05
    inactive = {gain.name for gain in plain.gains if not gain.active}
    assert {"step cache", "guidance interval", "fp8"} <= inactive


def test_noise_that_is_added_on_the_way_keeps_the_model_asked():
    """It changes the velocity at each step: an old one would be another picture's."""
    result = generate(EMBEDDED, settings(step_cache=0.05, sampler="euler_ancestral"))
    told = {gain.name: gain for gain in result.gains}
    assert told["step cache"].note == "0 of 20 evaluations left out"


def test_off_is_the_run_without_a_cache(embedded):
    plan = make_plan(EMBEDDED, settings())
    assert step_cache(plan) is None
    model, prompts = embedded
    with torch.inference_mode():
        plain = sample_with(model, plan, *prompts, start_latents(plan))
        zero = sample_with(model, plan, *prompts, start_latents(plan), cache=StepCache(0.0))
    assert torch.equal(plain, zero)


def test_a_distance_of_a_plain_run_is_0():
    assert generate(EMBEDDED, replace(settings(), steps=4), measure=True).distance == 0
