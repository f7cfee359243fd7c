"""SD3Sample against KSampler: whatever acts there acts here."""

from dataclasses import replace

import comfy.controlnet
import comfy.model_management
import comfy.samplers
import node_helpers
import pytest
import torch
from comfy_call import call
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from comfy_extras.nodes_sd3 import SkipLayerGuidanceSD3
from sd3_pack.nodes.errors import NodeError
from sd3_pack.nodes.sampling import SD3Sample, SD3ShiftSchedule, parse_layers
from sd3_pack.nodes.wires import origin_of, set_origin
from sd3_pack.sd3_core.presets import PRESETS
from sd3_pack.sd3_core.schedule import Schedule

import nodes

TOLERANCE = {"atol": 1e-4, "rtol": 0}  # golden README: sampling, final latent
STEPS = 4


def schedule(shift=3.0, denoise=1.0, scheduler="normal"):
    return SD3ShiftSchedule.execute(STEPS, shift, scheduler, denoise).args[0]


def sample(model, positive, negative, latent=None, sigmas=None, cfg=3.0, sampler="euler", **more):
    latent = latent or {"samples": torch.zeros(1, 16, 16, 12)}
    sigmas = schedule() if sigmas is None else sigmas
    out = SD3Sample.execute(model, positive, negative, latent, sigmas, 5, cfg, sampler, **more)
    return out.args[0]["samples"]


def ksampler(model, positive, negative, latent=None, cfg=3.0, sampler="euler", denoise=1.0):
    latent = latent or {"samples": torch.zeros(1, 16, 16, 12)}
    return nodes.common_ksampler(
        model, 5, STEPS, cfg, sampler, "normal", positive, negative, latent, denoise
    )[0]["samples"]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral"])
def test_sample_ksampler_and_the_native_model_agree(our_model, their_model, conditioning, sampler):
    prompts = conditioning(1), conditioning(2)
    ours = sample(our_model, *prompts, sampler=sampler)
    torch.testing.assert_close(ours, ksampler(our_model, *prompts, sampler=sampler), **TOLERANCE)
    natively = ksampler(their_model, *prompts, sampler=sampler)
    torch.testing.assert_close(ours, natively, **TOLERANCE)
    torch.testing.assert_close(sample(their_model, *prompts, sampler=sampler), ours, **TOLERANCE)


@pytest.mark.parametrize(
    ("suits", "sampler"), [("sd3_tiny", "euler_ancestral"), ("sd3.5_large_turbo", "euler")]
)
def test_auto_is_the_sampler_that_suits_the_model(our_model, conditioning, suits, sampler):
    model = our_model.clone()
    set_origin(model, replace(origin_of(model), preset=PRESETS[suits]))
    prompts = conditioning(1), conditioning(2)
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    out = SD3Sample.execute(model, *prompts, latent, schedule(), 5, 3.0, "auto")
    assert out.ui["sd3_report"][0]["sampler"] == sampler
    named = sample(model, *prompts, latent, sampler=sampler)
    assert torch.equal(out.args[0]["samples"], named)


def test_auto_is_dpmpp_2m_for_a_model_of_another_loader(their_model, conditioning):
    prompts = conditioning(1), conditioning(2)
    auto, named = (sample(their_model, *prompts, sampler=name) for name in ("auto", "dpmpp_2m"))
    assert torch.equal(auto, named)


def test_a_cfg_of_0_is_ksamplers_and_is_told(our_model, conditioning):
    prompts = conditioning(1), conditioning(2)
    latent = {"samples": torch.zeros(1, 16, 16, 12)}

    def notes(cfg):
        out = SD3Sample.execute(our_model, *prompts, latent, schedule(), 5, cfg, "euler")
        return out.ui["sd3_report"][0]["notes"]

    drawn = sample(our_model, *prompts, cfg=0.0)
    torch.testing.assert_close(drawn, ksampler(our_model, *prompts, cfg=0.0), **TOLERANCE)
    only_negative = sample(our_model, prompts[1], prompts[0], cfg=1.0)
    torch.testing.assert_close(drawn, only_negative, **TOLERANCE)
    (note,) = notes(0.0)
    assert "the prompt does not count" in note
    assert notes(1.0) == []


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_the_largest_seed_is_one(our_model, conditioning, sampler):
    latent = {"samples": torch.zeros(1, 16, 16, 12)}
    arguments = (our_model, conditioning(1), conditioning(2), latent, schedule(), 2**64 - 1, 3.0)
    assert SD3Sample.execute(*arguments, sampler).args[0]["samples"].isfinite().all()


@pytest.mark.parametrize("scheduler", ["normal", "simple", "sgm_uniform", "beta"])
def test_the_schedule_is_ksamplers(our_model, scheduler):
    theirs = comfy.samplers.calculate_sigmas(
        our_model.get_model_object("model_sampling"), scheduler, STEPS
    )
    torch.testing.assert_close(schedule(scheduler=scheduler), theirs, atol=1e-6, rtol=0)


def two_prompts(conditioning):
    return [*conditioning(1), *conditioning(3, 31)]


def area(conditioning):
    (spot,) = nodes.ConditioningSetArea().append(conditioning(3), 64, 64, 32, 16, 1.0)
    return nodes.ConditioningCombine().combine(conditioning(1), spot)[0]


def masked(conditioning):
    mask = torch.zeros(1, 16, 12)
    mask[:, :8] = 1
    (spot,) = nodes.ConditioningSetMask().append(conditioning(3), mask, "default", 0.7)
    return nodes.ConditioningCombine().combine(conditioning(1), spot)[0]


def timed(conditioning):
    (early,) = nodes.ConditioningSetTimestepRange().set_range(conditioning(1), 0.0, 0.5)
    (late,) = nodes.ConditioningSetTimestepRange().set_range(conditioning(3), 0.5, 1.0)
    return nodes.ConditioningCombine().combine(early, late)[0]


def zeroed(conditioning):
    return nodes.ConditioningZeroOut().zero_out(conditioning(1))[0]


class Control(comfy.controlnet.ControlBase):
    """A ControlNet without a network: adds one half everywhere after the first block."""

    def get_control(self, x, timestep, cond, batched_number, transformer_options):
        tokens = x.shape[2] // 2 * (x.shape[3] // 2)
        return {"output": [x.new_full((x.shape[0], tokens, 128), 0.5)]}


CONTROL = Control()


def controlled(conditioning):
    return node_helpers.conditioning_set_values(conditioning(1), {"control": CONTROL})


@pytest.mark.parametrize("prompt", [two_prompts, area, masked, timed, zeroed, controlled])
def test_conditioning_acts_as_in_ksampler(our_model, conditioning, prompt):
    positive, negative = prompt(conditioning), conditioning(2)
    if prompt is controlled:
        negative = controlled(conditioning)
    ours = sample(our_model, positive, negative)
    torch.testing.assert_close(ours, ksampler(our_model, positive, negative), **TOLERANCE)
    plain = sample(our_model, conditioning(1), conditioning(2))
    assert (ours - plain).abs().max() > 1e-2


def with_wrapper(model):
    changed = model.clone()

    def wrapper(apply_model, arguments):
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"]) * 0.9

    changed.set_model_unet_function_wrapper(wrapper)
    return changed


def with_cfg_function(model):
    changed = model.clone()
    changed.set_model_sampler_cfg_function(lambda run: run["cond"] * 0.8 + run["uncond"] * 0.2)
    return changed


def with_skipping(model):
    return call(SkipLayerGuidanceSD3, model, "1", 2.0, 0.0, 1.0)[0]


def with_patched_weights(model):
    changed = model.clone()
    name = "diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"
    weight = model.model.state_dict()[name]
    changed.add_patches({name: ("diff", (torch.ones_like(weight),))}, 0.02)
    return changed


@pytest.mark.parametrize(
    "patch", [with_wrapper, with_cfg_function, with_skipping, with_patched_weights]
)
def test_patches_act_as_in_ksampler(our_model, conditioning, patch):
    prompts = conditioning(1), conditioning(2)
    ours = sample(patch(our_model), *prompts)
    torch.testing.assert_close(ours, ksampler(patch(our_model), *prompts), **TOLERANCE)
    assert (ours - sample(our_model, *prompts)).abs().max() > 1e-2


def test_skip_layer_guidance_is_the_native_nodes(our_model, conditioning):
    prompts = conditioning(1), conditioning(2)
    native = call(SkipLayerGuidanceSD3, our_model, "0, 1", 2.0, 0.1, 0.8)[0]
    ours = sample(
        our_model,
        *prompts,
        slg_scale=2.0,
        slg_layers="0, 1",
        slg_start_percent=0.1,
        slg_end_percent=0.8,
    )
    torch.testing.assert_close(ours, ksampler(native, *prompts), **TOLERANCE)


def test_image_to_image_and_inpainting_act_as_in_ksampler(our_model, conditioning):
    prompts = conditioning(1), conditioning(2)
    start = torch.randn(1, 16, 16, 12, generator=torch.Generator().manual_seed(8))
    mask = torch.zeros(1, 1, 128, 96)
    mask[..., :50, :] = 1
    latent = {"samples": start, "noise_mask": mask}
    ours = sample(our_model, *prompts, latent, schedule(denoise=0.6))
    theirs = ksampler(our_model, *prompts, latent, denoise=0.6)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    torch.testing.assert_close(ours[..., 8:, :], start[..., 8:, :], atol=1e-5, rtol=0)


def test_batches_and_their_numbers_act_as_in_ksampler(our_model, conditioning):
    prompts = conditioning(1), conditioning(2)
    latent = {"samples": torch.zeros(2, 16, 8, 8), "batch_index": [3, 1]}
    ours = sample(our_model, *prompts, latent)
    torch.testing.assert_close(ours, ksampler(our_model, *prompts, latent), **TOLERANCE)


def test_denoise_zero_changes_nothing(our_model, conditioning):
    start = torch.randn(1, 16, 8, 8)
    latent = {"samples": start}
    out = sample(our_model, conditioning(1), conditioning(2), latent, schedule(denoise=0.0))
    torch.testing.assert_close(out, start, atol=1e-6, rtol=0)


def test_our_sigmas_and_model_serve_the_custom_sampler(our_model, conditioning):
    guider = comfy.samplers.CFGGuider(our_model)
    guider.set_conds(conditioning(1), conditioning(2))
    guider.set_cfg(3.0)
    out, _ = call(
        SamplerCustomAdvanced,
        Noise_RandomNoise(5),
        guider,
        comfy.samplers.sampler_object("euler"),
        schedule(),
        {"samples": torch.zeros(1, 16, 16, 12)},
    )
    ours = sample(our_model, conditioning(1), conditioning(2))
    torch.testing.assert_close(ours, out["samples"], **TOLERANCE)


def test_cfg_outside_its_window_leaves_the_prompt_alone(our_model, conditioning):
    prompts = conditioning(1), conditioning(2)
    never = sample(our_model, *prompts, cfg_start_percent=1.0)
    torch.testing.assert_close(never, sample(our_model, *prompts, cfg=1.0), **TOLERANCE)
    calls = []

    def wrapper(apply_model, arguments):
        calls.append(len(arguments["cond_or_uncond"]))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    counted = our_model.clone()
    counted.set_model_unet_function_wrapper(wrapper)
    sample(counted, *prompts, cfg_end_percent=0.5)
    assert calls == [2, 2, 1, 1]


def test_where_shifts_disagree_the_sigmas_decide(our_model, conditioning):
    positive, negative = timed(conditioning), conditioning(2)
    patched = ModelSamplingSD3().patch(our_model, 7.0)[0]
    out = SD3Sample.execute(
        patched,
        positive,
        negative,
        {"samples": torch.zeros(1, 16, 16, 12)},
        schedule(),
        5,
        3.0,
        "euler",
    )
    assert torch.equal(out.args[0]["samples"], sample(our_model, positive, negative))
    (told,) = out.ui["sd3_report"]
    assert told["shift"] == 3.0
    assert "shift 3" in told["notes"][0]
    assert "7" in told["notes"][0]
    assert patched.get_model_object("model_sampling").shift == 7.0


def test_an_interruption_ends_the_run_at_the_next_step(our_model, conditioning):
    steps = []

    def wrapper(apply_model, arguments):
        steps.append(1)
        comfy.model_management.interrupt_current_processing(True)
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    stopping = our_model.clone()
    stopping.set_model_unet_function_wrapper(wrapper)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(stopping, conditioning(1), conditioning(2))
    assert len(steps) == 1


def test_each_step_reaches_comfyuis_progress_bar(our_model, conditioning, monkeypatch):
    import comfy.utils

    seen = []
    monkeypatch.setattr(
        comfy.utils,
        "PROGRESS_BAR_HOOK",
        lambda value, total, preview, node_id=None: seen.append((value, total)),
    )
    sample(our_model, conditioning(1), conditioning(2))
    assert seen[-1] == (STEPS, STEPS)


def test_the_console_shows_the_steps_as_ksampler_does(our_model, conditioning, capfd):
    sample(our_model, conditioning(1), conditioning(2))
    assert f"| {STEPS}/{STEPS} [" in capfd.readouterr().err


def test_an_overflow_is_named_at_the_first_step(our_model, conditioning):
    broken = our_model.clone()
    broken.set_model_unet_function_wrapper(lambda apply, arguments: arguments["input"] * torch.inf)
    with pytest.raises(NodeError, match=r"^SD3:not_finite: the MMDiT's first step"):
        sample(broken, conditioning(1), conditioning(2))


def test_a_prompt_of_another_models_encoders_is_refused(tiny_three, conditioning):
    with pytest.raises(NodeError, match=r"^SD3:wrong_encoders: positive is 4096 wide .* 224"):
        sample(tiny_three[0], conditioning(1), conditioning(2))


@pytest.mark.parametrize(
    ("samples", "words"),
    [(torch.ones(1, 4, 8, 8), "4, 8, 8"), (torch.zeros(1, 16, 8, 60), "480 pixels")],
)
def test_a_latent_that_does_not_fit_is_refused(our_model, conditioning, samples, words):
    with pytest.raises(NodeError, match=rf"^SD3:wrong_latent: .*{words}"):
        sample(our_model, conditioning(1), conditioning(2), {"samples": samples})


def test_blocks_that_are_not_there_are_refused(our_model, conditioning):
    with pytest.raises(NodeError, match=r"^SD3:bad_setting: skip layers \[7, 8, 9\]"):
        sample(our_model, conditioning(1), conditioning(2), slg_scale=1.0)


def test_another_kind_of_model_is_refused(conditioning):
    class Other:
        model = torch.nn.Linear(1, 1)

    with pytest.raises(NodeError, match=r"^SD3:wrong_model: this MODEL is a Linear"):
        sample(Other(), conditioning(1), conditioning(2))


def test_the_latents_other_entries_are_kept(our_model, conditioning):
    latent = {"samples": torch.zeros(1, 16, 8, 8), "mine": 1, "downscale_ratio_spacial": 8}
    out = SD3Sample.execute(
        our_model, conditioning(1), conditioning(2), latent, schedule(), 5, 1.0, "euler"
    )
    assert set(out.args[0]) == {"samples", "mine"}
    assert "downscale_ratio_spacial" in latent


def test_the_report_is_json(our_model, conditioning):
    import json

    out = SD3Sample.execute(
        our_model,
        conditioning(1),
        conditioning(2),
        {"samples": torch.zeros(1, 16, 8, 8)},
        schedule(),
        5,
        1.0,
        "euler",
    )
    (told,) = json.loads(json.dumps(out.ui["sd3_report"]))
    assert told["seed"] == 5
    assert told["files"]["mmdit"]["file"] == "wide.safetensors"
    assert told["seconds"] > 0
    assert len(told["sigmas"]) == STEPS + 1


def test_the_schedules_report_draws_its_curves():
    (told,) = SD3ShiftSchedule.execute(STEPS, 3.0, "normal", 1.0).ui["sd3_report"]
    assert told["sigmas"] == pytest.approx(Schedule(3.0).sigmas(STEPS).tolist(), abs=1e-6)
    assert told["log_snr"][0] == -20.0
    assert told["log_snr"][-1] == 20.0


def test_auto_shift_follows_the_latents_size():
    latent = {"samples": torch.zeros(1, 16, 64, 64)}
    (told,) = SD3ShiftSchedule.execute(4, 3.0, "normal", 1.0, True, latent).ui["sd3_report"]
    assert told["shift"] == 1.5  # a quarter of the pixels, half the shift
    with pytest.raises(NodeError, match=r"^SD3:bad_setting: auto_shift needs"):
        SD3ShiftSchedule.execute(4, 3.0, "normal", 1.0, True)


def test_layers_are_read_from_any_writing():
    assert parse_layers("7, 8;9") == (7, 8, 9)
