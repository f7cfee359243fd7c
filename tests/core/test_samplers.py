"""Samplers: the recorded runs of both references, and what holds for any velocity."""

import pytest
import torch
from build import recipe_tensor, with_recipe_weights
from sd3_pack.sd3_core.conditioning import Conditioning
from sd3_pack.sd3_core.guidance import SkipLayers, classifier_free, inpaint, latent_mask, plain
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig, position_table
from sd3_pack.sd3_core.noise import FreshNoise, noise
from sd3_pack.sd3_core.samplers import SAMPLERS, Step, dpmpp_2m, euler, euler_ancestral, heun
from sd3_pack.sd3_core.schedule import Schedule, add_noise
from torch.testing import assert_close

REFERENCE_RUNS = [
    "euler_s8_cfg1.0",
    "euler_s8_cfg4.5",
    "euler_s20_cfg4.5",
    "euler_s20_cfg4.5_img2img",
    "euler_s20_slg",
    "dpmpp_2m_s8_cfg1.0",
    "dpmpp_2m_s8_cfg4.5",
    "dpmpp_2m_s20_cfg4.5",
    "dpmpp_2m_s20_cfg4.5_img2img",
    "dpmpp_2m_s20_slg",
]
COMFY_RUNS = [
    "comfy_euler_normal_s8_cfg1.0",
    "comfy_euler_normal_s8_cfg4.5",
    "comfy_euler_normal_s20_cfg4.5",
    "comfy_euler_normal_s20_img2img",
    "comfy_euler_normal_s20_slg",
    "comfy_euler_simple_s20_cfg4.5",
    "comfy_euler_sgm_uniform_s20_cfg4.5",
    "comfy_euler_beta_s20_cfg4.5",
    "comfy_dpmpp_2m_normal_s20_cfg4.5",
]
SLG = {"scale": 2.5, "start": 0.01, "end": 0.5, "layers": [1]}  # the same in every recorded run


@pytest.fixture(scope="module")
def recorded_model():
    """The MMDiT-X of depth 3 that made the recordings."""
    config = MMDiTConfig(depth=3, pos_embed_max_size=48, qk_norm=True, dual_attention_layers=(0,))
    model = with_recipe_weights(MMDiT, config, 401)
    model.pos_embed = position_table(config.hidden_size, config.pos_embed_max_size, 64)
    return model


def recorded_input(golden, name):
    _, description = golden("sampling")
    return recipe_tensor(
        f"input.{name}", description["shapes"][name], description["recipe_inputs"]["seed"]
    )


class Recorder:
    """A velocity that remembers the latents it was asked about."""

    def __init__(self, velocity):
        self.velocity, self.latents = velocity, []

    def __call__(self, x, sigma):
        self.latents.append(x)
        return self.velocity(x, sigma)


def guided(golden, model, cfg, skip_layer_config):
    schedule = Schedule(3.0)
    skip = None
    if skip_layer_config is not None:
        window = schedule.window(skip_layer_config["start"], skip_layer_config["end"])
        skip = SkipLayers(tuple(skip_layer_config["layers"]), skip_layer_config["scale"], window)
    positive, negative = (
        Conditioning(recorded_input(golden, name), recorded_input(golden, f"{name}_y"))
        for name in ("cond", "uncond")
    )
    return Recorder(classifier_free(model, positive, negative, cfg, skip=skip))


@pytest.mark.parametrize("name", REFERENCE_RUNS)
def test_runs_of_the_reference_are_reproduced(golden, recorded_model, name):
    tensors, description = golden("sampling")
    run = description["runs"][name]
    sigmas = Schedule(run["shift"]).sigmas(run["steps"])[int(run["steps"] * (1 - run["denoise"])) :]
    x, latents = recorded_input(golden, "noise"), recorded_input(golden, "init_latent_vae_space")
    if run["denoise"] < 1:
        x = add_noise((latents - 0.0609) * 1.5305, x, sigmas[0])
    velocity = guided(golden, recorded_model, run["cfg"], run["skip_layer_config"])
    estimates = []
    final = SAMPLERS[run["sampler"]](velocity, x, sigmas, lambda step: estimates.append(step.x0))
    assert_close(final, tensors[f"{name}.final"], atol=1e-4, rtol=0)
    if f"{name}.x_steps" in tensors:
        on_the_way = torch.stack([*velocity.latents, final])
        assert_close(on_the_way, tensors[f"{name}.x_steps"], atol=1e-4, rtol=0)
    if f"{name}.denoised_steps" in tensors:
        assert_close(torch.stack(estimates), tensors[f"{name}.denoised_steps"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", COMFY_RUNS)
def test_runs_of_comfyui_are_reproduced(golden, recorded_model, name):
    tensors, description = golden("sampling")
    run = description["comfy_runs"][name]
    sigmas = Schedule(3.0).sigmas(run["steps"], run["scheduler"], run["denoise"])
    x = recorded_input(golden, "noise")
    if run["latent"] != "zeros":
        latents = (recorded_input(golden, "init_latent_vae_space") - 0.0609) * 1.5305
        x = add_noise(latents, x, sigmas[0])
    skip = SLG if name.endswith("_slg") else None
    velocity = guided(golden, recorded_model, run["cfg"], skip)
    final = SAMPLERS[run["sampler"]](velocity, x, sigmas)
    assert_close(final / 1.5305 + 0.0609, tensors[f"{name}.final_process_out"], atol=1e-4, rtol=0)
    if f"{name}.x_steps" in tensors:
        on_the_way = torch.stack(velocity.latents)
        assert_close(on_the_way, tensors[f"{name}.x_steps"], atol=1e-4, rtol=0)


def test_every_recorded_run_is_tested(golden):
    _, description = golden("sampling")
    assert set(description["runs"]) == set(REFERENCE_RUNS)
    assert set(description["comfy_runs"]) == set(COMFY_RUNS)
    for run in description["runs"].values():
        assert run["skip_layer_config"] in (None, SLG)


def toy_velocity(x, sigma):
    """The velocity of the recordings in `comfy_samplers`."""
    return torch.sin(2 * x) * sigma.reshape(-1, 1, 1, 1) + 0.5 * x.flip(-1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("denoise", ["", "_denoise"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_and_inpainting_equal_comfyui(golden, sampler, denoise, masked):
    tensors, description = golden("comfy_samplers")
    name = f"{sampler}{denoise}{'_inpaint' if masked else ''}"
    run = description["runs"][name]
    latents = tensors["latents"]
    start = noise(latents.shape, description["noise_seed"])
    sigmas = Schedule(description["shift"]).sigmas(run["steps"], run["scheduler"], run["denoise"])
    mask = latent_mask(tensors["pixel_mask"], latents)
    velocity = inpaint(toy_velocity, latents, start, mask) if masked else toy_velocity
    fresh = FreshNoise([description["noise_seed"]])
    noisy = add_noise(latents, start, sigmas[0])
    final = SAMPLERS[run["sampler"]](velocity, noisy, sigmas, fresh=fresh)
    assert_close(final, tensors[name], atol=1e-5, rtol=0)


def test_euler_equals_diffusers_live():
    diffusers = pytest.importorskip("diffusers", reason="diffusers, the live oracle, is missing")
    oracle = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    oracle.set_timesteps(11)
    start = x = noise((2, 16, 4, 6), 3)
    for timestep in oracle.timesteps:
        v = toy_velocity(x, (timestep / 1000).expand(2))
        x = oracle.step(v, timestep, x).prev_sample
    ours = euler(toy_velocity, start, Schedule(3.0).sigmas(11))
    assert_close(ours, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", ["normal", "beta"])
@pytest.mark.parametrize("steps", [1, 2, 3, 17])
@pytest.mark.parametrize("sampler", [euler, heun, dpmpp_2m])
def test_a_constant_velocity_is_followed_exactly(sampler, steps, scheduler):
    x0, start = noise((2, 2, 4, 3, 5), 1)
    sigmas = Schedule(3.0).sigmas(steps, scheduler)
    final = sampler(lambda x, sigma: start - x0, start, sigmas)
    assert_close(final, x0, atol=2e-6, rtol=0)  # roundings of 17 float32 steps


def error_at(sampler, steps):
    """Distance from the exact solution of dx/dsigma = 2 sigma x, started at sigma 0.9."""
    start = torch.ones(1, 1, 1, 1)
    sigmas = torch.linspace(0.9, 0.1, steps + 1)
    final = sampler(lambda x, sigma: 2 * sigma.reshape(-1, 1, 1, 1) * x, start, sigmas)
    return abs(float(final) - float(torch.tensor(0.01 - 0.81).exp()))


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2), (dpmpp_2m, 2)])
def test_halving_the_step_shrinks_the_error_by_the_order(sampler, order):
    ratio = error_at(sampler, 20) / error_at(sampler, 40)
    assert 2 ** (order - 0.35) < ratio < 2 ** (order + 0.6)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_a_batch_of_two_equals_two_batches_of_one(sampler):
    start = noise((2, 4, 3, 5), 1)
    sigmas = Schedule(3.0).sigmas(6)
    alone = [
        sampler(toy_velocity, start[i : i + 1], sigmas, fresh=FreshNoise([i])) for i in range(2)
    ]
    together = sampler(toy_velocity, start, sigmas, fresh=FreshNoise([0, 1]))
    assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)


def test_fresh_noise_keeps_the_latent_at_its_noise_level():
    """By the velocity that knows x0, what is not x0 is noise of the level's size, ever another."""
    x0, start = noise((2, 64, 16, 16), 1), noise((2, 64, 16, 16), 2)
    steps: list[Step] = []
    sigmas = Schedule(3.0).sigmas(8)
    final = euler_ancestral(
        lambda x, sigma: (x - x0) / sigma.reshape(-1, 1, 1, 1), start, sigmas, steps.append
    )
    assert_close(final, x0, atol=2e-6, rtol=0)
    rest = [(step.x - (1 - step.sigma) * x0) / step.sigma for step in steps]
    for one in rest:
        assert_close(one.std(), torch.tensor(1.0), atol=0.02, rtol=0)
    assert (rest[-1] * start).mean().abs() < 0.1  # little is left of the noise it began with


def test_fresh_noise_is_another_each_time_and_the_same_each_run():
    x = torch.zeros(2, 4, 3, 5)
    one, again = FreshNoise([7]), FreshNoise([7])
    first, second = one(x), one(x)
    assert torch.equal(first, again(x))
    assert not torch.equal(first, second)
    assert torch.equal(first, noise(x.shape, 8))  # as ComfyUI: not the noise of the start
    FreshNoise([2**64 - 1])(x)  # the largest seed has a next one, too
    with pytest.raises(ValueError, match="2 seeds for a batch of 3"):
        FreshNoise([1, 2])(torch.zeros(3, 1, 1, 1))


EVALUATIONS = [(euler, 6), (heun, 11), (dpmpp_2m, 6), (euler_ancestral, 6)]


@pytest.mark.parametrize(("sampler", "evaluations"), EVALUATIONS)
def test_the_network_is_asked_once_a_step_by_heun_twice(sampler, evaluations):
    velocity = Recorder(toy_velocity)
    sampler(velocity, noise((1, 4, 3, 5), 1), Schedule(3.0).sigmas(6))
    assert len(velocity.latents) == evaluations


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_on_step_hears_of_every_step(sampler):
    steps: list[Step] = []
    sigmas = Schedule(3.0).sigmas(5)
    final = sampler(toy_velocity, noise((1, 4, 3, 5), 1), sigmas, steps.append)
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert {step.total for step in steps} == {5}
    assert [step.sigma for step in steps] == sigmas[:-1].tolist()
    assert torch.equal(steps[-1].x0, final)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_raising_in_on_step_stops_the_run(sampler):
    velocity = Recorder(toy_velocity)

    def cancel(step: Step):
        if step.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler(velocity, noise((1, 4, 3, 5), 1), Schedule(3.0).sigmas(20), cancel)
    assert len(velocity.latents) <= 4  # two steps, of two evaluations with heun


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_a_run_of_no_steps_returns_the_latents(sampler):
    latents = noise((1, 4, 3, 5), 1)
    sigmas = Schedule(3.0).sigmas(20, denoise=0)
    start = add_noise(latents, noise((1, 4, 3, 5), 2), sigmas[0])
    assert torch.equal(sampler(toy_velocity, start, sigmas), latents)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_the_state_is_float32_and_the_input_is_left_alone(sampler):
    start = noise((1, 4, 3, 5), 1).bfloat16()
    kept = start.clone()
    velocity = Recorder(toy_velocity)
    final = sampler(velocity, start, Schedule(3.0).sigmas(4))
    assert final.dtype == torch.float32
    assert {x.dtype for x in velocity.latents} == {torch.float32}
    assert torch.equal(start, kept)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_a_run_in_two_parts_stops_in_between(sampler):
    """Sigmas need not end at 0: the latent at the last level comes back."""
    start, sigmas = noise((1, 4, 3, 5), 1), Schedule(3.0).sigmas(6)
    halfway = sampler(toy_velocity, start, sigmas[:4])
    velocity = Recorder(toy_velocity)
    sampler(velocity, start, sigmas)
    assert torch.equal(halfway, velocity.latents[6 if sampler is heun else 3])


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_sigmas_stay_on_the_cpu_wherever_the_latents_are(sampler):
    """The meta device stands for a GPU: it refuses a CPU tensor beside its own."""
    x, sigmas = torch.empty(2, 4, 3, 5, device="meta"), Schedule(3.0).sigmas(4)
    start = add_noise(x, x, sigmas[0])
    velocity = inpaint(toy_velocity, x, x, latent_mask(torch.ones(1, 24, 40), x))
    assert sampler(velocity, start, sigmas).device.type == "meta"


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_repeated_levels_do_no_harm(sampler):
    """As in `simple` at more than 1000 steps."""
    sigmas = torch.tensor([1.0, 1.0, 0.6, 0.6, 0.6, 0.3, 0.0])
    final = sampler(toy_velocity, noise((1, 4, 3, 5), 1), sigmas)
    assert final.isfinite().all()


def test_a_trained_network_in_bfloat16_samples_in_float32(recorded_model, golden):
    """The network computes in the conditioning's dtype, the sampler does not."""
    conditioning = Conditioning(recorded_input(golden, "cond"), recorded_input(golden, "cond_y"))
    start, sigmas = noise((1, 16, 4, 6), 1), Schedule(3.0).sigmas(3)
    exact = euler(plain(recorded_model, conditioning), start, sigmas)
    half = with_recipe_weights(MMDiT, recorded_model.config, 401).bfloat16()
    half.pos_embed = recorded_model.pos_embed.bfloat16()
    rough = euler(plain(half, conditioning.to("cpu", torch.bfloat16)), start, sigmas)
    assert rough.dtype == torch.float32
    assert_close(rough, exact, atol=0.1, rtol=0)  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_run_in_two_parts_is_the_run_in_one(sampler):
    """To the bit, where the second knows the step before it and goes on with the same noise."""
    sigmas = Schedule(3.0).sigmas(7)
    x = recipe_tensor("x", (1, 4, 4, 4), 1)

    def velocity(x, sigma):
        return torch.sin(3 * x) - sigma.reshape(-1, 1, 1, 1)

    steps: list[Step] = []
    fresh = FreshNoise([1])
    half = sampler(velocity, x, sigmas[:4], steps.append, fresh)
    parts = sampler(velocity, half, sigmas[3:], None, fresh, steps[-1])
    assert torch.equal(parts, sampler(velocity, x, sigmas, None, FreshNoise([1])))
