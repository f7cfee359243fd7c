"""Our MODEL in ComfyUI's own nodes, beside the same file loaded by ComfyUI."""

from collections import Counter

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import torch
import torch.nn.functional as F
from comfy_call import call
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from comfy_extras.nodes_model_merging import ModelMergeSimple, save_checkpoint
from comfy_extras.nodes_sd3 import SkipLayerGuidanceSD3
from comfy_forward import forward
from recipe import recipe_state_dict
from released_widths import RELEASED_WIDTHS
from safetensors.torch import load_file, save_file
from sd3_pack.nodes._compat import inference_dtype, quantised_layers
from sd3_pack.nodes.comfy_model import AUTO, make_model
from sd3_pack.nodes.comfy_table import weights_in_force
from sd3_pack.sd3_core.checkpoints.layouts import find_components
from sd3_pack.sd3_core.checkpoints.load import component_of, load_mmdit, read_config
from sd3_pack.sd3_core.embedded.model import FILE
from sd3_pack.sd3_core.models import fused
from sd3_pack.sd3_core.speed.modulation import is_tabled
from tiny import quantised, shapes_of, tiny_state_dicts, write_tiny_checkpoint

import nodes

TOLERANCE = {"atol": 1e-4, "rtol": 0}  # golden README: sampling, final latent


def ksampler(model, conditioning, sampler="euler", cfg=3.0, shape=(1, 16, 16, 12), **options):
    latent = {"samples": torch.zeros(shape), **options}
    return nodes.common_ksampler(
        model, 5, 3, cfg, sampler, "normal", conditioning(1), conditioning(2), latent
    )[0]["samples"]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("shape", [(2, 16, 16, 12), (1, 16, 13, 15)])
def test_ksampler_draws_the_same_with_ours_and_theirs(
    our_model, their_model, conditioning, sampler, shape
):
    ours = ksampler(our_model, conditioning, sampler, shape=shape)
    theirs = ksampler(their_model, conditioning, sampler, shape=shape)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_prompts_of_different_length_and_cfg_one_run(our_model, their_model, conditioning):
    def run(model):
        latent = {"samples": torch.zeros(1, 16, 16, 16)}
        long, short = conditioning(1, 31), conditioning(2, 20)
        return nodes.common_ksampler(model, 5, 2, 1.0, "euler", "normal", long, short, latent)[0][
            "samples"
        ]

    torch.testing.assert_close(run(our_model), run(their_model), **TOLERANCE)


def test_a_run_computes_its_modulations_once_and_a_repeated_one_never(our_model, conditioning):
    network, calls = our_model.model.diffusion_model, Counter()
    hooks = [
        layer.register_forward_hook(lambda *_, path=path: calls.update([path]))
        for path, layer in network.named_modules()
        if path in ("t_embedder", "y_embedder") or path.endswith("adaLN_modulation")
    ]
    network.tabled = None
    names = set(network.state_dict())
    try:
        for sampler in ("euler", "heun", "dpmpp_2m", "res_multistep"):
            ksampler(our_model, conditioning, sampler)
        assert set(calls.values()) == {1}
        assert len(calls) == len(hooks)
        ksampler(our_model.clone(), conditioning)
        assert set(calls.values()) == {1}
        ksampler(shifted(our_model), conditioning)  # other noise levels
        assert set(calls.values()) == {2}
    finally:
        for hook in hooks:
            hook.remove()
    assert set(network.state_dict()) == names


def test_noise_levels_between_those_foretold_are_computed(our_model, their_model, conditioning):
    ours, theirs = (ksampler(m, conditioning, "dpm_2") for m in (our_model, their_model))
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_dynamic_vram_keeps_what_a_table_stands_in_for_after_all_else(our_model, monkeypatch):
    """Its address space is given out in the order in which layers stay; on a device of shapes."""
    dynamic = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
    if dynamic is None or "get_dynamic_vram__units" not in dynamic.load.__code__.co_consts:
        pytest.skip("this ComfyUI asks no model which layers matter least")
    monkeypatch.setattr("comfy_aimdo.host_buffer.HostBuffer", FakeHostBuffer)
    monkeypatch.setattr("comfy_aimdo.model_vbar.ModelVBAR", FakeVBAR)
    factory, arguments = our_model.cached_patcher_init
    model = factory(*arguments, disable_dynamic=True).model
    patcher = dynamic(model, torch.device("meta"), torch.device("cpu"))
    patcher.load(patcher.load_device)
    places = {n: m._v[0] for n, m in model.diffusion_model.named_modules() if hasattr(m, "_v")}
    tabled = {name for name in places if is_tabled(f"{name}.")}
    assert len(tabled) > 2
    assert len(places) > 2 * len(tabled)
    assert min(places[name] for name in tabled) > max(
        place for name, place in places.items() if name not in tabled
    )


class FakeHostBuffer:
    size = 0

    def __init__(self, *sizes):
        pass

    def truncate(self, *arguments, **named):
        pass


class FakeVBAR:
    def __init__(self, size, device):
        self.given_out = 0

    def alloc(self, size):
        self.given_out += 1
        return self.given_out, 0, size

    def prioritize(self):
        pass

    def free_memory(self, size):
        return 0


def test_a_patched_modulation_has_a_table_of_its_own(our_model, their_model, conditioning):
    def patched(model):
        name = "diffusion_model.joint_blocks.0.x_block.adaLN_modulation.1.weight"
        weight = model.model.state_dict()[name]
        clone = model.clone()
        clone.add_patches({name: ("diff", (torch.full_like(weight, 0.02),))}, 1.0)
        return clone

    before = ksampler(our_model, conditioning)
    ours, theirs = (ksampler(patched(m), conditioning) for m in (our_model, their_model))
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert (ours - before).abs().max() > 1e-3
    assert torch.equal(ksampler(our_model, conditioning), before)


def test_no_table_where_hooks_may_change_weights(our_model):
    patcher = our_model.clone()
    assert weights_in_force(patcher) == patcher.patches_uuid
    patcher.current_hooks = object()
    assert weights_in_force(patcher) is None
    assert weights_in_force(None) is None
    swapped = our_model.clone()
    swapped.add_object_patch("diffusion_model.joint_blocks.0", torch.nn.Identity())
    assert weights_in_force(swapped) is None


def test_the_table_leaves_with_the_model(our_model, conditioning):
    ksampler(our_model, conditioning)
    assert our_model.model.diffusion_model.tabled is not None
    our_model.detach()
    assert our_model.model.diffusion_model.tabled is None


def skip_layers(model):
    return call(SkipLayerGuidanceSD3, model, "1", 2.0, 0.0, 1.0)[0]


def shifted(model):
    return ModelSamplingSD3().patch(model, 1.5)[0]


def merged(model):
    return ModelMergeSimple().merge(model, shifted(model), 0.3)[0]


@pytest.mark.parametrize("change", [skip_layers, shifted, merged])
def test_a_native_node_changes_ours_as_it_changes_theirs(
    our_model, their_model, conditioning, change
):
    before = ksampler(our_model, conditioning)
    changed = ksampler(change(our_model), conditioning)
    torch.testing.assert_close(changed, ksampler(change(their_model), conditioning), **TOLERANCE)
    if change is not merged:
        assert (changed - before).abs().max() > 1e-2
    assert torch.equal(ksampler(our_model, conditioning), before)  # the base is as it was


def test_a_controlnets_output_is_added_after_its_block(our_model, their_model):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 16, 8, 8, generator=generator)
    context = torch.randn(1, 9, 4096, generator=generator)
    pooled = torch.randn(1, 2048, generator=generator)
    added = torch.randn(1, 16, 128, generator=generator)

    def velocity(model, control):
        timestep = torch.tensor([700.0])
        return forward(model, x, timestep, context=context, y=pooled, control=control)

    control = {"output": [None, added]}
    ours = velocity(our_model, control)
    torch.testing.assert_close(ours, velocity(their_model, control), atol=2e-5, rtol=0)
    assert (ours - velocity(our_model, None)).abs().max() > 1e-2


def test_transformer_options_reach_every_attention(our_model):
    seen = []

    def override(func, q, k, v, heads, **options):
        seen.append(options["transformer_options"]["mark"])
        return func(q, k, v, heads, **options)

    x, context = torch.zeros(1, 16, 4, 4), torch.zeros(1, 3, 4096)
    options = {"optimized_attention_override": override, "mark": "here"}
    pooled = torch.zeros(1, 2048)
    forward(our_model, x, torch.ones(1), context, pooled, transformer_options=options)
    assert seen == ["here"] * 3  # two blocks, and the dual attention of the first


def test_what_other_models_are_told_is_ignored(our_model):
    x, context = torch.zeros(1, 16, 4, 4), torch.zeros(1, 3, 4096)
    pooled = torch.zeros(1, 2048)
    out = forward(our_model, x, torch.ones(1), context, pooled, guidance=torch.ones(1))
    assert out.shape == x.shape


def test_lora_keys_are_those_of_the_native_model(our_model, their_model):
    import comfy.lora

    ours = comfy.lora.model_lora_keys_unet(our_model.model, {})
    assert ours == comfy.lora.model_lora_keys_unet(their_model.model, {})


def test_a_saved_checkpoint_loads_natively_and_in_ours(our_model, conditioning, tmp_path):
    save_checkpoint(our_model, filename_prefix="saved", output_dir=str(tmp_path))
    (file,) = tmp_path.glob("*.safetensors")
    expected = ksampler(our_model, conditioning)
    natively = comfy.sd.load_diffusion_model(str(file))
    torch.testing.assert_close(ksampler(natively, conditioning), expected, **TOLERANCE)
    again = make_model(component_of(file, "mmdit"))
    assert torch.equal(ksampler(again, conditioning), expected)


def test_the_embedded_model_loads_natively():
    """Its MMDiT out of the whole shipped file: ComfyUI's own reading gives our velocity."""
    mmdit = component_of(FILE, "mmdit")
    natively = comfy.sd.load_diffusion_model(str(FILE), {"dtype": torch.float32})
    ours = load_mmdit(FILE, dtype=torch.float32)
    config = read_config(mmdit)
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(2, config.in_channels, 16, 12, generator=draw)
    timestep = torch.tensor([20.0, 900.0])
    context = torch.randn(2, 11, config.context_dim, generator=draw)
    pooled = torch.randn(2, config.pooled_dim, generator=draw)
    theirs = forward(natively, x, timestep, context=context, y=pooled)
    # Float32 rounds relative to the values (17 here), and each kernel sums in its own order.
    apart = (ours(x, timestep, context, pooled) - theirs).abs().max() / theirs.abs().max()
    assert apart < 1e-5


def test_a_small_model_saved_by_comfyui_keeps_its_tokenizers(tiny_three, tiny, tmp_path):
    model, clip, vae = tiny_three
    save_checkpoint(model, clip, vae, filename_prefix="saved", output_dir=str(tmp_path))
    (file,) = tmp_path.glob("*.safetensors")
    before, after = load_file(tiny), load_file(file)
    assert set(before) <= set(after)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert set(find_components(file)) == {"mmdit", "vae", "clip_l", "clip_g", "t5"}


def test_the_shift_of_a_small_model_is_its_own(tiny_three):
    assert tiny_three[0].get_model_object("model_sampling").shift == 2.0


def test_reloading_from_disk_gives_the_same_weights(our_model):
    if not hasattr(our_model, "cached_patcher_init"):
        pytest.skip("this ComfyUI does not reload models")
    factory, arguments = our_model.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    for name, tensor in our_model.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name].cpu(), tensor.cpu())


def test_weights_are_mapped_not_copied_and_may_be_trained_on(wide):
    weight = make_model(component_of(wide, "mmdit")).model.diffusion_model.context_embedder.weight
    assert not weight.is_inference()
    assert weight.untyped_storage().nbytes() > weight.nbytes  # a piece of the mapped file


@pytest.mark.parametrize("weight_dtype", ["bf16", "fp16", "fp8_e4m3fn"])
def test_weights_of_another_precision_compute_in_a_safe_one(wide, conditioning, weight_dtype):
    model = make_model(component_of(wide, "mmdit"), weight_dtype)
    exact = ksampler(make_model(component_of(wide, "mmdit")), conditioning)
    out = ksampler(model, conditioning)
    assert model.model.diffusion_model.context_embedder.weight.dtype.itemsize < 4
    assert torch.corrcoef(torch.stack([out.flatten(), exact.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("spelling", ["scale_weight", "comfy_quant", "rows"])
def test_scaled_fp8_means_what_its_scales_say(tmp_path, spelling):
    stored, meant = quantised(tiny_state_dicts(["mmdit"])["mmdit"], spelling)
    save_file(stored, tmp_path / "scaled.safetensors")
    save_file(meant, tmp_path / "meant.safetensors")
    velocities = []
    for name in ("scaled", "meant"):
        model = make_model(component_of(tmp_path / f"{name}.safetensors", "mmdit"), AUTO)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(1, 16, 8, 8, generator=generator)
        context = torch.randn(1, 5, 224, generator=generator)
        pooled = torch.randn(1, 160, generator=generator)
        velocities.append(forward(model, x, torch.tensor([500.0]), context, pooled))
    torch.testing.assert_close(*velocities, atol=1e-4, rtol=0)


@pytest.mark.parametrize("weight_dtype", [AUTO, "bf16", "fp8_e4m3fn"])
def test_what_a_layer_lends_is_what_it_computes_with(wide, weight_dtype):
    """The blocks' fast ways read weights, wherever ComfyUI keeps them and whatever patches them."""
    model = make_model(component_of(wide, "mmdit"), weight_dtype)
    attention = model.model.diffusion_model.joint_blocks[0].x_block.attn
    x = torch.randn(2, 5, attention.qkv.in_features)
    heads = torch.randn(2, 5, 3, 64)
    for patched in (False, True):
        if patched:
            attention.qkv.weight_function = [lambda weight: weight * 2]
            attention.ln_q.weight_function = [lambda weight: weight * 2]
        assert fused.lends(attention.qkv, x)
        with fused.lent(attention.qkv, x) as (weight, bias):
            assert torch.equal(F.linear(x, weight, bias), attention.qkv(x))
        weight = fused.own_weight(attention.ln_q, heads)
        assert torch.equal(F.rms_norm(heads, (64,), weight, 1e-6), attention.ln_q(heads))


def test_layers_that_compute_in_fp8_lend_nothing(tmp_path):
    stored, _ = quantised(tiny_state_dicts(["mmdit"])["mmdit"], "comfy_quant")
    save_file(stored, tmp_path / "scaled.safetensors")
    network = make_model(component_of(tmp_path / "scaled.safetensors", "mmdit")).model
    assert not fused.lends(network.diffusion_model.joint_blocks[0].x_block.attn.qkv, torch.ones(1))


@pytest.mark.parametrize("spelling", ["scale_weight", "comfy_quant"])
def test_products_in_fp8_are_those_of_comfyuis_own_loader(tmp_path, spelling):
    """On a CPU none is computed in fp8, so what the layers were told is compared."""
    if not quantised_layers():
        pytest.skip("this ComfyUI computes nothing in fp8")
    shapes = shapes_of(*RELEASED_WIDTHS["mmdit"])
    stored, _ = quantised(recipe_state_dict(shapes, 0), spelling)  # its marker has two elements
    layer = "joint_blocks.0.x_block.mlp.fc1"
    if spelling == "comfy_quant":
        note = b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'
        stored[f"{layer}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    scale = "scale_input" if spelling == "scale_weight" else "input_scale"
    stored[f"{layer}.{scale}"] = torch.tensor(0.25)
    file = tmp_path / "scaled.safetensors"
    save_file(stored, file)
    told = []
    for model in (
        make_model(component_of(file, "mmdit")),
        comfy.sd.load_diffusion_model(str(file)),
    ):
        layers = model.model.diffusion_model.named_modules()
        told.append({n: (m._full_precision_mm_config, scale_of(m)) for n, m in layers if is_fp8(m)})
    assert told[0] == told[1]
    assert told[0][layer] == (True, 0.25)


def is_fp8(layer):
    return getattr(layer, "quant_format", None) is not None


def scale_of(layer):
    """Of its input; none is 1."""
    scale = getattr(layer, "input_scale", None)
    return 1.0 if scale is None else float(scale)


def test_a_bf16_file_on_the_cpu_is_computed_in_float32(tmp_path):
    write_tiny_checkpoint(tmp_path / "half.safetensors", ["mmdit"], torch.bfloat16)
    model = make_model(component_of(tmp_path / "half.safetensors", "mmdit"))
    assert inference_dtype(model.model) == torch.float32
