"""Noise levels that are not read off the device: right where they are believed, else found out."""

import comfy.samplers
import pytest
import torch
import torch._dynamo as dynamo
from comfy_api.torch_helpers import set_torch_compile_wrapper
from sd3_pack.nodes import comfy_speed
from sd3_pack.nodes.comfy_levels import ONCE_A_STEP, Levels
from sd3_pack.nodes.sampling import SD3Sample, SD3ShiftSchedule
from sd3_pack.sd3_core.samplers import SAMPLERS, with_level

import nodes

STEPS = 4
LATENT = {"samples": torch.zeros(1, 16, 8, 8)}


@pytest.fixture
def runs(monkeypatch):
    """Every run that is begun, and in `read` how often a level was read."""

    class Runs(list):
        read = 0

    begun, of, every = comfy_speed.begun, Levels.of, Runs()

    def begin(*arguments):
        every.append(begun(*arguments))
        return every[-1]

    def watched(levels, sigma):
        every.read += levels.here is None
        return of(levels, sigma)

    monkeypatch.setattr(comfy_speed, "begun", begin)
    monkeypatch.setattr(Levels, "of", watched)
    return every


def ksampler(model, name, conditioning, scheduler="normal"):
    prompts = conditioning(1), conditioning(2)
    return nodes.common_ksampler(model, 5, STEPS, 3.0, name, scheduler, *prompts, LATENT)[0]


def along(model, function, conditioning):
    """The latents at the end of a way of one's own."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(1), conditioning(2))
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0])
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    sampler = comfy.samplers.KSAMPLER(function)
    return guider.sample(noise, LATENT["samples"], sampler, sigmas, disable_pbar=True, seed=1)


@pytest.mark.parametrize("name", sorted(ONCE_A_STEP))
def test_comfyuis_samplers_of_one_call_a_step_are_foretold(our_model, conditioning, runs, name):
    name = name.removeprefix("sample_")
    if name not in comfy.samplers.KSAMPLER_NAMES:
        pytest.skip("this ComfyUI does not have it")
    ksampler(our_model, name, conditioning)
    (run,) = runs
    assert runs.read == 0
    assert run.tabled == run.levels.calls == STEPS
    assert run.levels.trusting


@pytest.mark.parametrize("name", SAMPLERS)
def test_our_samplers_tell_their_levels(our_model, conditioning, runs, name):
    sigmas = SD3ShiftSchedule.execute(STEPS, 3.0, "normal", 1.0).args[0]
    prompts = conditioning(1), conditioning(2)
    skipping = {"slg_scale": 1.0, "slg_layers": "1", "slg_start_percent": 0.0}
    SD3Sample.execute(our_model, *prompts, LATENT, sigmas, 5, 3.0, name, **skipping)
    (run,) = runs
    assert runs.read == 0
    assert run.levels.calls == (2 * STEPS - 1 if name == "heun" else STEPS)
    assert len(run.levels.believed) > 2 * run.levels.calls  # skip-layer guidance calls once more


def test_a_sampler_of_several_calls_a_step_is_read_once_a_call(our_model, conditioning, runs):
    ksampler(our_model, "dpm_2", conditioning)
    (run,) = runs
    assert runs.read == run.levels.calls == run.tabled > STEPS


def astray(model, x, sigmas, extra_args, callback, disable):
    """At other levels than those of the steps."""
    for index in range(len(sigmas) - 1):
        level = sigmas[index] * 0.9
        x0 = model(x, level * x.new_ones(len(x)), **extra_args)
        x = x0 + (x - x0) * (sigmas[index + 1] / sigmas[index])
    return x


def test_a_run_that_was_misled_is_repeated(our_model, conditioning, runs, monkeypatch):
    honest = along(our_model, astray, conditioning)
    assert len(runs) == 1
    monkeypatch.setattr(astray, "__module__", "comfy.k_diffusion.sampling")
    monkeypatch.setattr(astray, "__name__", "sample_euler")
    assert torch.equal(along(our_model, astray, conditioning), honest)
    assert [run.levels.trusting for run in runs] == [True, True, False]


def test_a_level_that_changes_on_the_way_to_the_network_is_found_out(
    our_model, their_model, conditioning
):
    def lower(call, arguments):
        return call(arguments["input"], arguments["timestep"] * 0.9, **arguments["c"])

    latents = []
    for model in (our_model, their_model):
        changed = model.clone()
        changed.set_model_unet_function_wrapper(lower)
        latents.append(ksampler(changed, "euler", conditioning)["samples"])
    torch.testing.assert_close(*latents, atol=1e-4, rtol=0)


def test_what_is_believed_is_compared():
    levels = Levels([0.9, 0.5], in_order=True)
    levels.enter(torch.tensor([0.9, 0.9]))
    assert not levels.misled()
    levels.enter(with_level(torch.tensor([0.4]), 0.4))  # told, whatever was foretold
    assert levels.here == 0.4
    assert not levels.misled()
    levels.believe(torch.tensor([0.4, 0.3]))
    assert levels.misled()


def test_a_compiled_network_is_compiled_once_for_all_noise_levels(our_model, conditioning, runs):
    """TorchCompileModel's wrapper: the table is looked up before the graph."""
    stats = dynamo.utils.counters["stats"]
    dynamo.reset()
    plain = ksampler(our_model, "euler", conditioning)["samples"]
    model = our_model.clone()
    set_torch_compile_wrapper(model=model, backend="eager")
    out = ksampler(model, "euler", conditioning)["samples"]
    torch.testing.assert_close(out, plain, atol=1e-4, rtol=0)
    graphs = stats["unique_graphs"]
    ksampler(model, "euler", conditioning, "sgm_uniform")  # at other levels
    assert runs[-1].tabled == STEPS
    assert stats["unique_graphs"] == graphs > 0
