"""SD3 Speed under ComfyUI's samplers; SD3 Memory Plan: it says what happened."""

import json
import re
from contextlib import contextmanager

import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.ops
import comfy.samplers
import node_helpers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from sd3_pack.nodes._compat import weights_of
from sd3_pack.nodes.comfy_speed import FOREIGN, OWN_SCALES, last_run, without_callback
from sd3_pack.nodes.comfy_table import name_in
from sd3_pack.nodes.errors import NodeError
from sd3_pack.nodes.loaders import load_model
from sd3_pack.nodes.sampling import SD3Sample, SD3ShiftSchedule
from sd3_pack.nodes.speed import SD3MemoryPlan, SD3Speed, float8_bytes
from sd3_pack.sd3_core.checkpoints.load import component_of
from sd3_pack.sd3_core.speed import fp8
from sd3_pack.sd3_core.speed.gains import NOT_ASKED
from sd3_pack.sd3_core.speed.modulation import is_tabled
from sd3_pack.sd3_core.speed.step_cache import relative_rms

import nodes

STEPS = 10
OUTER = WrappersMP.OUTER_SAMPLE


def plan(model, *arguments):
    out = SD3MemoryPlan.execute(model, *(arguments or (4, 1024, 1024)))
    (report,) = out.ui["sd3_report"]
    json.dumps(report)
    return out.args[0], report


def test_the_plan_counts_what_a_run_did(our_model, conditioning):
    our_model.model.diffusion_model.tabled = None
    before, report = plan(our_model)
    assert (report["rows_held"], report["calls"], report["passes"]) == (0, 0, 0)
    assert 0.3 < report["modulation_mib"] / report["weights_mib"] < 0.9
    latent = {"samples": torch.zeros(1, 16, 16, 12)}
    arguments = ("euler", "normal", conditioning(1), conditioning(2), latent)
    nodes.common_ksampler(our_model, 5, 4, 3.0, *arguments)
    after, report = plan(our_model)
    assert (report["rows_held"], report["calls"], report["passes"]) == (8, 4, 1)
    assert "8 rows held. So far 4 calls of the network took 1 passes" in after
    table = our_model.model.diffusion_model.tabled.network.table
    assert report["table_mib"] == round(table.values.nbytes / 2**20)


def test_the_plan_says_where_no_table_acts(our_model, their_model):
    text, report = plan(their_model)
    assert "anew in every step: it was not loaded by SD3 Workbench" in text
    assert report["table_mib"] is None
    swapped = our_model.clone()
    swapped.add_object_patch("diffusion_model.joint_blocks.0", torch.nn.Identity())
    assert "anew in every step: a node exchanges its layers" in plan(swapped)[0]


def test_the_plan_tells_how_it_decodes_and_known_prompts(our_model, monkeypatch, tmp_path):
    manager = comfy.model_management
    monkeypatch.setattr(manager, "get_free_memory", lambda device: 20 * 2**30)
    text, _ = plan(our_model)
    assert "Decoding 1024 x 1024: whole." in text
    assert "Prompt cache: off." in text
    monkeypatch.setenv("SD3_WORKBENCH_PROMPT_CACHE", str(tmp_path))
    monkeypatch.setattr(manager, "get_free_memory", lambda device: 2 * 2**30)
    text, report = plan(our_model)
    assert 500 < report["decode_mib"] < 0.8 * 2048
    assert "Prompt cache: 0 prompts on disk; " in text


def test_another_kind_of_model_is_refused(our_model):
    class Other:
        model = torch.nn.Identity()

    with pytest.raises(NodeError, match="not Stable Diffusion 3"):
        plan(Other())


# SD3 Speed


def sped_up(model, step_cache=0.0, **options):
    return SD3Speed.execute(model, step_cache, **options).args[0]


def prompts_of(conditioning):
    return conditioning(1), conditioning(2)


def ksampler(model, positive, negative, sampler="euler", steps=STEPS, cfg=3.0):
    latent = {"samples": torch.zeros(1, 16, 16, 12)}
    arguments = (sampler, "normal", positive, negative, latent)
    return nodes.common_ksampler(model, 5, steps, cfg, *arguments)[0]["samples"]


def sd3_sample(model, positive, negative, sampler="euler", **options):
    latent = {"samples": torch.zeros(1, 16, 16, 12)}
    sigmas = SD3ShiftSchedule.execute(STEPS, 3.0, "normal", 1.0).args[0]
    out = SD3Sample.execute(model, positive, negative, latent, sigmas, 5, 3.0, sampler, **options)
    (report,) = out.ui["sd3_report"]
    json.dumps(report, allow_nan=False)
    return out.args[0]["samples"], report


@contextmanager
def counted(model):
    """The batch of every call of the last block."""
    batches = []
    block = model.model.diffusion_model.joint_blocks[-1]
    hook = block.register_forward_hook(lambda *_: batches.append(1))
    try:
        yield batches
    finally:
        hook.remove()


def gains(model):
    return {gain.name: gain for gain in last_run(model).gains}


def steady(model):
    """With a velocity that does not depend on time: that of random weights jumps at each step."""
    name = "diffusion_model.t_embedder.mlp.2.weight"
    clone = model.clone()
    clone.add_patches({name: ("set", (torch.zeros_like(model.model.state_dict()[name]),))}, 1.0)
    return clone


@pytest.fixture(params=["ours", "theirs"])
def either(request, our_model, their_model):
    return steady({"ours": our_model, "theirs": their_model}[request.param])


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral"])
def test_with_everything_off_the_bits_are_those_without_the_node(either, conditioning, sampler):
    prompts = prompts_of(conditioning)
    plain = ksampler(either, *prompts, sampler)
    assert torch.equal(ksampler(sped_up(either), *prompts, sampler), plain)
    assert torch.equal(ksampler(sped_up(either, measure=True), *prompts, sampler), plain)


def test_steps_that_are_left_out_call_no_block(either, conditioning):
    prompts = prompts_of(conditioning)
    with counted(either) as calls:
        plain = ksampler(either, *prompts)
        every = len(calls)
        calls.clear()
        fast = ksampler(sped_up(either, 1.0), *prompts)
    told = gains(either)["step cache"]
    assert told.active
    left_out, total = (int(number) for number in re.findall(r"\d+", told.note))
    assert total == STEPS
    assert left_out >= 2
    assert len(calls) == every * (STEPS - left_out) // STEPS
    assert relative_rms(fast, plain) > 0


def test_sd3_sample_and_ksampler_leave_out_the_same_steps(our_model, conditioning):
    model, prompts = sped_up(steady(our_model), 1.0), prompts_of(conditioning)
    latents, report = sd3_sample(model, *prompts)
    torch.testing.assert_close(latents, ksampler(model, *prompts), atol=1e-4, rtol=0)
    (told,) = [gain for gain in report["speed"] if gain["name"] == "step cache"]
    assert told["active"]
    assert report["distance"] is None


def test_the_distance_is_that_of_the_two_runs(either, conditioning):
    prompts = prompts_of(conditioning)
    plain = ksampler(either, *prompts)
    options = {"cfg_end_percent": 0.6}
    fast = ksampler(sped_up(either, 1.0, **options), *prompts)
    measured = ksampler(sped_up(either, 1.0, measure=True, **options), *prompts)
    assert torch.equal(measured, fast)
    assert last_run(either).distance == pytest.approx(relative_rms(fast, plain), rel=1e-4)
    _, report = sd3_sample(sped_up(either, 1.0, measure=True), *prompts)
    assert report["distance"] > 0


def test_cfg_in_a_part_of_the_run_is_sd3_samples_own(our_model, conditioning):
    prompts = prompts_of(conditioning)
    span = {"cfg_start_percent": 0.2, "cfg_end_percent": 0.6}
    there, _ = sd3_sample(our_model, *prompts, **span)
    torch.testing.assert_close(
        ksampler(sped_up(our_model, **span), *prompts), there, atol=1e-4, rtol=0
    )
    note = gains(our_model)["guidance interval"].note
    guided, total = (int(number) for number in re.findall(r"\d+", note))
    assert total == STEPS
    assert 0 < guided < STEPS
    assert (there - ksampler(our_model, *prompts)).abs().max() > 1e-2


def test_a_lora_and_a_controlnet_act_on_what_the_cache_keeps(our_model, conditioning):
    name = "diffusion_model.joint_blocks.0.x_block.attn.proj.weight"
    patched = steady(our_model)
    weight = patched.model.state_dict()[name]
    patched.add_patches({name: ("diff", (torch.full_like(weight, 0.02),))}, 1.0)

    class Control(comfy.controlnet.ControlBase):
        def get_control(self, x, timestep, cond, batched_number, transformer_options):
            tokens = x.shape[2] // 2 * (x.shape[3] // 2)
            return {"output": [x.new_full((x.shape[0], tokens, 128), 0.5)]}

    prompts = [
        node_helpers.conditioning_set_values(each, {"control": Control()})
        for each in prompts_of(conditioning)
    ]
    plain = ksampler(patched, *prompts)
    fast = ksampler(sped_up(patched, 1.0), *prompts)
    assert "left out" in gains(our_model)["step cache"].note
    assert relative_rms(fast, plain) > 0


def test_no_velocity_serves_across_a_timed_prompts_end(our_model, conditioning):
    (early,) = nodes.ConditioningSetTimestepRange().set_range(conditioning(1), 0.0, 0.5)
    (late,) = nodes.ConditioningSetTimestepRange().set_range(conditioning(3), 0.5, 1.0)
    (both,) = nodes.ConditioningCombine().combine(early, late)
    model, levels = sped_up(steady(our_model), 1.0), []
    model.set_model_unet_function_wrapper(
        lambda apply, given: (
            levels.append(float(given["timestep"][0]))
            or apply(given["input"], given["timestep"], **given["c"])
        )
    )
    ksampler(model, both, conditioning(2))
    sigmas = SD3ShiftSchedule.execute(STEPS, 3.0, "normal", 1.0).args[0]
    end = our_model.get_model_object("model_sampling").percent_to_sigma(0.5)
    first_late = next(float(sigma) for sigma in sigmas if sigma <= end)
    assert len(set(levels)) < STEPS
    assert any(abs(level - first_late) < 1e-5 for level in levels)


def test_it_steps_aside_for_hooks_and_says_so(our_model, conditioning):
    path = "diffusion_model.joint_blocks.0.x_block.attn.proj"
    lora = {
        f"{path}.lora_down.weight": torch.full((2, 128), 0.05),
        f"{path}.lora_up.weight": torch.full((128, 2), 0.05),
    }
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    positive, negative = prompts_of(conditioning)
    positive = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
    plain = ksampler(our_model, positive, negative)
    assert torch.equal(ksampler(sped_up(our_model, 0.5), positive, negative), plain)
    told = gains(our_model)["step cache"]
    assert not told.active
    assert "hooks may change" in told.note


def test_it_says_that_a_foreign_network_has_no_fused_kernels(their_model, conditioning):
    ksampler(sped_up(their_model), *prompts_of(conditioning))
    told = gains(their_model)["fused kernels"]
    assert (told.active, told.note) == (False, FOREIGN)


@pytest.mark.parametrize("nested", [False, True])
def test_a_guider_with_scales_of_its_own_keeps_them(our_model, conditioning, nested):
    def drawn(model):
        guider = Guider_DualCFG(model)
        guider.set_conds(conditioning(1), conditioning(3), conditioning(2))
        guider.set_cfg(3.0, 2.0, nested=nested)
        start = torch.randn(1, 16, 16, 12, generator=torch.Generator().manual_seed(5))
        sigmas = SD3ShiftSchedule.execute(4, 3.0, "normal", 1.0).args[0]
        empty = torch.zeros(1, 16, 16, 12)
        return guider.sample(start, empty, comfy.samplers.sampler_object("euler"), sigmas)

    plain = drawn(our_model)
    assert torch.equal(drawn(sped_up(our_model, cfg_end_percent=0.5)), plain)
    told = gains(our_model)["guidance interval"]
    assert (told.active, told.note) == (False, OWN_SCALES)
    drawn(sped_up(our_model))
    assert gains(our_model)["guidance interval"].note == NOT_ASKED


def test_the_report_is_of_the_patcher_that_ran(wide, conditioning, monkeypatch):
    """With dynamic VRAM hooks make ComfyUI's guider take a delegate of its patcher."""
    model, delegate = (load_model(component_of(wide, "mmdit"), "auto") for _ in range(2))

    def set_conds(guider, positive, negative):
        guider.model_patcher = watched
        guider.inner_set_conds({"positive": positive, "negative": negative})

    watched = delegate.clone()
    monkeypatch.setattr("sd3_pack.nodes.sampling.SD3Guider.set_conds", set_conds)
    _, report = sd3_sample(model, *prompts_of(conditioning))
    assert [gain["name"] for gain in report["speed"]] == list(gains(delegate))
    assert last_run(model) is None


@pytest.mark.parametrize("by_name", [False, True])
def test_the_run_that_is_measured_by_is_silent(our_model, conditioning, monkeypatch, by_name):
    """However a wrapper of another node hands the callback on."""
    shown = []

    def by_keyword(executor, noise, latent, sampler, sigmas, mask, callback, *rest, **more):
        names = ("disable_pbar", "seed")
        more = {**dict(zip(names, rest, strict=False)), **more}
        return executor(noise, latent, sampler, sigmas, mask, callback=callback, **more)

    model = our_model.clone()
    if by_name:
        model.wrappers = {**model.wrappers, OUTER: {"other": [by_keyword], **model.wrappers[OUTER]}}
    monkeypatch.setattr(
        "latent_preview.prepare_callback",
        lambda *_: lambda step, x0, x, steps: shown.append(step),
    )
    ksampler(sped_up(model, cfg_end_percent=0.5, measure=True), *prompts_of(conditioning))
    assert shown == list(range(STEPS))
    assert last_run(our_model).distance > 0


def test_what_a_wrapper_leaves_out_stays_out():
    assert without_callback((1, 2, 3, 4), {"seed": 5}) == ((1, 2, 3, 4), {"seed": 5})
    assert without_callback((1, 2, 3, 4, 5, 6, 7), {}) == ((1, 2, 3, 4, 5, None, 7), {})
    assert without_callback((1, 2), {"callback": 6}) == ((1, 2), {"callback": None})


def test_weights_that_comfyui_lends_are_copied_and_given_back(monkeypatch):
    layer, back = torch.nn.Linear(4, 3), []

    def lend(s, input=None, offloadable=False):
        assert offloadable
        return s.weight.data, s.bias.data, "stream"

    def take_back(s, weight, bias, stream):
        back.append(stream)
        weight.zero_()
        bias.zero_()

    weight, bias = (t.detach().clone() for t in (layer.weight, layer.bias))
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lend)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", take_back)
    got = weights_of(layer, weight)
    assert back == ["stream"]
    assert not layer.weight.any()
    assert torch.equal(got[0], weight)
    assert torch.equal(got[1], bias)


def test_weights_of_an_older_comfyui_are_copied(monkeypatch):
    layer = torch.nn.Linear(4, 3, bias=False)
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda s, input=None: (s.weight, s.bias))
    weight, bias = weights_of(layer, layer.weight)
    assert torch.equal(weight, layer.weight)
    assert weight.data_ptr() != layer.weight.data_ptr()
    assert bias is None


def test_one_line_of_the_log_tells_what_acted_and_why_the_rest_did_not(
    our_model, conditioning, caplog
):
    caplog.set_level("INFO")
    ksampler(sped_up(our_model, 1.0), *prompts_of(conditioning))
    (line,) = [r.getMessage() for r in caplog.records if "SD3 Workbench: Speed" in r.getMessage()]
    assert "modulation table (" in line
    assert "step cache (" in line.split("Not active")[0]
    assert "fp8 (not asked for)" in line.split("Not active")[1]
    text, report = plan(our_model)
    assert f"Last run. {line.removeprefix('SD3 Workbench: ')}" in text
    assert report["last_run"] in text


def test_settings_that_cannot_be_are_refused(our_model, their_model):
    refusals = [
        ({"step_cache": 2.0}, "step_cache is 2.0"),
        ({"cfg_start_percent": 0.8, "cfg_end_percent": 0.2}, "starts before it ends"),
    ]
    if our_model.load_device.type == "cpu":
        refusals.append(({"fp8": True}, "fp8 needs an NVIDIA GPU"))
    for options, message in refusals:
        with pytest.raises(NodeError, match=message) as refused:
            sped_up(our_model, **options)
        assert str(refused.value).startswith("SD3:bad_setting")
    with pytest.raises(NodeError, match="fp8: it was not loaded by SD3 Workbench"):
        sped_up(their_model, fp8=True)


def test_float8_acts_on_a_twin_and_the_plan_counts_it(our_model, conditioning, monkeypatch):
    """By its definition, in place of a GPU's kernel."""

    def by_definition(x, x_scale, weight, weight_scale, bias, dtype):
        product = ((x.float() * x_scale) @ (weight.float() * weight_scale).t()).to(dtype)
        return product if bias is None else product + bias.to(product)

    monkeypatch.setattr(fp8, "multiply", by_definition)
    monkeypatch.setattr(fp8, "obstacle", lambda device: "")
    prompts = prompts_of(conditioning)
    plain = ksampler(our_model, *prompts)
    model = sped_up(our_model, fp8=True, measure=True)
    fast = ksampler(model, *prompts)
    assert gains(our_model)["fp8"].active
    assert last_run(our_model).distance == pytest.approx(relative_rms(fast, plain), rel=1e-4)
    assert 1e-4 < relative_rms(fast, plain) < 0.2
    _, report = plan(our_model)
    tabled = our_model.model.diffusion_model.tabled
    assert report["float8_mib"] == round(float8_bytes(tabled) / 2**20)
    assert float8_bytes(tabled) > 0
    assert torch.equal(ksampler(our_model, *prompts), plain)
    ksampler(patched(model), *prompts)
    assert our_model.model.diffusion_model.tabled is not tabled


def patched(model):
    clone = model.clone()
    name = "diffusion_model.joint_blocks.0.x_block.attn.proj.weight"
    weight = clone.model.state_dict()[name]
    clone.add_patches({name: ("diff", (torch.full_like(weight, 0.02),))}, 1.0)
    return clone


def test_without_dynamic_vram_the_modulations_leave_first(wide):
    """When memory is short; ComfyUI itself keeps the largest layers, which are these."""
    model = load_model(component_of(wide, "mmdit"), "auto")
    cpu = torch.device("cpu")
    names = [name_in(entry) for entry in ordered(model._load_list(), reverse=True)]
    tabled = [is_tabled(name) for name in names]
    assert any(tabled)
    assert tabled == sorted(tabled)
    everything = model.model_size()
    third = sum(
        t.nbytes for n, t in model.model.diffusion_model.state_dict().items() if is_tabled(n)
    )
    model.load(cpu, lowvram_model_memory=everything - third // 2)
    layers = dict(model.model.diffusion_model.named_modules())
    cast = {name for name in names if layers[name].comfy_cast_weights}
    assert cast
    assert all(is_tabled(name) for name in cast)
    model.detach()


def ordered(entries, reverse):
    entries.sort(reverse=reverse)
    return entries
