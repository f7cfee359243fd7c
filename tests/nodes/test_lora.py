"""SD3LoadLoRA beside ComfyUI's loader."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from sd3_pack.nodes.errors import NodeError
from sd3_pack.nodes.lora import SD3LoadLoRA
from sd3_pack.nodes.wires import origin_of
from sd3_pack.sd3_core.checkpoints.lora_files import read_lora
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.settings import Files, Settings, make_plan

import nodes

QKV = "joint_blocks.0.x_block.attn.qkv"
PROJ = "joint_blocks.0.x_block.attn.proj"


def pair(name, rows, columns, up="lora_up", down="lora_down", rank=2):
    generator = torch.Generator().manual_seed(len(name))
    return {
        f"{name}.{up}.weight": torch.randn(rows, rank, generator=generator),
        f"{name}.{down}.weight": torch.randn(rank, columns, generator=generator),
    }


def kohya():
    name = "lora_unet_" + QKV.replace(".", "_")
    clip = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    return pair(name, 384, 128) | {f"{name}.alpha": torch.tensor(1.0)} | pair(clip, 96, 64)


def peft():
    name = "transformer.transformer_blocks.0.attn."
    return {
        key: value
        for part in ("to_q", "to_k", "to_v")
        for key, value in pair(name + part, 128, 128, "lora_B", "lora_A").items()
    }


def native():
    return pair(f"diffusion_model.{QKV}", 384, 128)


@pytest.fixture
def lora(models):
    """lora(tensors) -> the name of a LoRA file with them."""
    import folder_paths

    def write(tensors):
        save_file(tensors, models / "loras" / "mine.safetensors")
        folder_paths.filename_list_cache.clear()
        return "mine.safetensors"

    return write


@pytest.mark.parametrize("dialect", [kohya, peft, native])
def test_a_lora_patches_what_the_native_loader_patches(tiny_three, lora, dialect):
    model, clip, _ = tiny_three
    name = lora(dialect())
    ours = SD3LoadLoRA.execute(model, name, 0.7, clip)
    theirs = nodes.LoraLoader().load_lora(model, clip, name, 0.7, 0.7)
    assert set(ours.args[0].patches) == set(theirs[0].patches)
    assert set(ours.args[1].patcher.patches) == set(theirs[1].patcher.patches)
    patched = [m.patch_weight_to_device for m in (ours.args[0], theirs[0])]
    key = f"diffusion_model.{QKV}.weight"
    weights = []
    for patch, owner in zip(patched, (ours.args[0], theirs[0]), strict=True):
        patch(key)
        weights.append(owner.model.state_dict()[key].cpu().clone())
        owner.unpatch_model()
    assert torch.equal(*weights)
    assert not model.patches  # the base is as it was
    (told,) = ours.ui["sd3_report"]
    assert told["unmatched"] == 0
    assert told["matched"] > 0


def test_layers_without_a_place_are_counted_and_named(tiny_three, lora):
    tensors = native() | pair("diffusion_model.nonsense", 8, 8) | {"strange": torch.ones(2)}
    with pytest.warns(UserWarning, match="2 keys match, 3 do not"):
        (told,) = SD3LoadLoRA.execute(tiny_three[0], lora(tensors), 1.0).ui["sd3_report"]
    assert (told["matched"], told["unmatched"]) == (1, 2)
    assert told["unmatched_names"] == ["diffusion_model.nonsense", "strange"]
    assert "2 keys match, 3 do not" in told["notes"][0]


def test_a_layer_that_this_model_lacks_is_not_matched(tiny_three, lora):
    far = "diffusion_model.joint_blocks.30.x_block.attn.qkv"
    name = lora(native() | pair(far, 384, 128))
    out = SD3LoadLoRA.execute(tiny_three[0], name, 1.0)
    (told,) = out.ui["sd3_report"]
    assert (told["matched"], told["unmatched_names"]) == (1, [far])
    assert told["model_patches"] == len(out.args[0].patches) == 1


def test_what_needs_a_clip_is_said_without_one(tiny_three, lora):
    (told,) = SD3LoadLoRA.execute(tiny_three[0], lora(kohya()), 1.0).ui["sd3_report"]
    assert told["unmatched_names"] == ["lora_te1_text_model_encoder_layers_0_mlp_fc1"]
    assert any("CLIP-L too, which is not connected" in note for note in told["notes"])


def test_a_model_that_is_no_sd3_is_refused(lora):
    another = SimpleNamespace(model=torch.nn.Linear(1, 1))
    with pytest.raises(NodeError, match="^SD3:wrong_model: this MODEL is a Linear"):
        SD3LoadLoRA.execute(another, lora(native()), 1.0)


# What the command line refuses, the node refuses with the same sentence


def roles(name=f"diffusion_model.{PROJ}", **shapes):
    generator = torch.Generator().manual_seed(3)
    made = {
        f"{name}.{role.replace('__', '.')}": 0.3 * torch.randn(shape, generator=generator)
        for role, shape in shapes.items()
    }
    return made | {key: torch.tensor(3.0) for key in made if key.endswith(".alpha")}


def peft_dora(rows=128):
    name = "base_model.model.transformer_blocks.0.attn.to_q"
    both = roles(name, lora_A__weight=(4, 128), lora_B__weight=(128, 4))
    return both | {f"{name}.lora_magnitude_vector": 1 + 0.1 * torch.arange(float(rows))}


SDXL = pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 96, 64) | pair(
    "lora_unet_input_blocks_4_1_proj_in", 8, 8
)
FACTORS = {"w1_a": (128, 2), "w1_b": (2, 128), "w2_a": (128, 2), "w2_b": (2, 128)}
HADA = {f"hada_{name}": shape for name, shape in FACTORS.items()}
MATRICES = {"lora_up__weight": (128, 2), "lora_down__weight": (2, 128)}
REFUSED = {
    "another model": pair("lora_unet_double_blocks_0_img_attn_qkv", 8, 8),
    "SDXL": SDXL,
    "another size": pair(f"diffusion_model.{QKV}", 4608, 1536),
    "LoKr of another size": roles(lokr_w1=(16, 16), lokr_w2=(12, 12)),
    "LoKr of as many numbers": roles(lokr_w1=(8, 16), lokr_w2=(8, 16)),
    "LoHa of another size": roles(**{**HADA, "hada_w1_b": (2, 64), "hada_w2_b": (2, 64)}),
    "LoHa that lacks a factor": roles(hada_w1_a=(128, 2), hada_w1_b=(2, 128)),
    "diff of another size": roles(diff=(64, 128)),
    "diff of as many numbers": roles(diff=(64, 256)),
    "diff_b of another size": roles(diff_b=(64,)),
    "dora_scale of another size": roles(**MATRICES, dora_scale=(64, 1)),
    "PEFT's magnitude of another size": peft_dora(64),
    "A without B": roles(lora_A__weight=(2, 128)),
    "down without up": roles(lora_down__weight=(2, 128)),
    "NaN": roles(diff=(128, 128)) | roles(f"diffusion_model.{QKV}", diff_b=(384,)),
    "OFT": roles(oft_blocks=(4, 4, 4)) | native(),
    "GLoRA": roles(a1__weight=(4, 4), a2__weight=(4, 4)) | native(),
    "set_weight": roles(set_weight=(128, 128)) | native(),
    "embeddings": {"emb_params": torch.ones(1, 64)},
    "a model": {f"{PROJ}.weight": torch.ones(128, 128)},
    "nothing": {},
}
REFUSED["NaN"][f"diffusion_model.{PROJ}.diff"][0, 0] = torch.nan


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_command_line_refuses_the_node_refuses_in_the_same_words(
    tiny_three, tiny, lora, models, kind, clip
):
    name = lora(REFUSED[kind])
    files = Files(checkpoint=tiny, loras=((models / "loras" / name, 1.0),))
    with pytest.raises(CheckpointError) as ours:
        make_plan(files, Settings("", device="cpu"))
    with pytest.raises(NodeError) as nodes:
        SD3LoadLoRA.execute(tiny_three[0], name, 1.0, tiny_three[1] if clip else None)
    assert str(nodes.value) == f"SD3:wrong_lora: {ours.value}"


def test_a_damaged_file_is_a_bad_file(tiny_three, lora, models):
    name = lora(native())
    (models / "loras" / name).write_bytes(b"nonsense, and no safetensors")
    with pytest.raises(NodeError, match="^SD3:bad_file: mine.safetensors: is no safetensors"):
        SD3LoadLoRA.execute(tiny_three[0], name, 1.0)


# What it reads, the node reads


def renamed(prefix, lora_a="lora_A", lora_b="lora_B"):
    return {
        key.replace("transformer.", prefix, 1)
        .replace("lora_A", lora_a)
        .replace("lora_B", lora_b): value
        for key, value in peft().items()
    }


READ = {
    "kohya": kohya(),
    "native": native(),
    "diffusers": peft(),
    "bare": renamed(""),
    "diffusers' names under ComfyUI's": renamed("diffusion_model."),
    "compiled": renamed("_orig_mod."),
    "in parallel": renamed("module."),
    "PEFT under diffusers": renamed("transformer.base_model.model."),
    "a named adapter": renamed("base_model.model.", "lora_A.style", "lora_B.style"),
    "LoHa": roles(**HADA),
    "LoKr": roles(lokr_w1=(8, 8), lokr_w2_a=(16, 2), lokr_w2_b=(2, 16), alpha=()),
    "LoKr in whole factors": roles(lokr_w1=(8, 8), lokr_w2=(16, 16)),
    "LoKr with a core": roles(
        "diffusion_model.x_embedder.proj",
        lokr_w1=(8, 4),
        lokr_w2_a=(3, 16),
        lokr_w2_b=(3, 4),
        lokr_t2=(3, 3, 2, 2),
        alpha=(),
    ),
    "differences": roles(diff=(128, 128), diff_b=(128,)),
    "a matrix and a difference": roles(**MATRICES, diff=(128, 128)),
    "DoRA": roles(lora_up__weight=(128, 2), lora_down__weight=(2, 128), dora_scale=(128, 1)),
    "DoRA per input": roles(
        lora_up__weight=(128, 2), lora_down__weight=(2, 128), dora_scale=(1, 128)
    ),
    "PEFT's DoRA": peft_dora(),
    "halves the other way round": pair("transformer.norm_out.linear", 256, 128, "lora_B", "lora_A"),
}


def patched_weights(patcher):
    """Every weight with a patch on it, as ComfyUI computes it."""
    import comfy.lora

    state = patcher.model.state_dict()
    return {
        key: comfy.lora.calculate_weight(patches, state[key].float().clone(), key)
        for key, patches in patcher.patches.items()
    }


def merged_weights(patcher, prefix, adapters, strength):
    state, made = patcher.model.state_dict(), {}
    for adapter in adapters:
        key = prefix + adapter.name
        made[key] = adapter.apply(made.get(key, state[key].float()), strength)
    return made


@pytest.mark.filterwarnings("ignore:.*was saved by PEFT")
@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("owner", ["ours", "ComfyUI's"])
def test_what_the_core_reads_the_node_puts_on_with_the_same_result(
    tiny_three, their_model, lora, models, kind, owner
):
    model = tiny_three[0] if owner == "ours" else their_model
    name = lora(READ[kind])
    out = SD3LoadLoRA.execute(model, name, 0.7, tiny_three[1])
    (told,) = out.ui["sd3_report"]
    assert told["unmatched_names"] == []
    parts = read_lora(models / "loras" / name).parts
    expected = merged_weights(model, "diffusion_model.", parts.get("mmdit", ()), 0.7)
    found = patched_weights(out.args[0])
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert (value - model.model.state_dict()[key]).abs().max() > 1e-3
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=2e-6)
    clip = tiny_three[1].patcher
    expected = merged_weights(clip, "clip_l.transformer.", parts.get("clip_l", ()), 0.7)
    found = patched_weights(out.args[1].patcher)
    assert set(found) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=2e-6)


def test_the_position_table_takes_a_difference(tiny_three, lora):
    key = "diffusion_model.pos_embed"
    before = tiny_three[0].model.state_dict()[key]
    name = lora({f"{key}.diff": torch.ones(before.shape)})
    found = patched_weights(SD3LoadLoRA.execute(tiny_three[0], name, 0.5).args[0])
    assert list(found) == [key]
    torch.testing.assert_close(found[key], before + 0.5)


def test_a_change_of_ours_survives_what_comfyui_does_with_its_tensors(tiny_three, lora):
    """Offloaded, they are gathered into one buffer and put together anew."""
    import comfy.lora

    if not hasattr(comfy.lora, "prefetch_prepared_value"):
        pytest.skip("this ComfyUI gathers no tensors")
    with pytest.warns(UserWarning, match="was saved by PEFT"):
        out = SD3LoadLoRA.execute(tiny_three[0], lora(peft_dora()), 0.7)
    ((key, ((strength, adapter, *rest),)),) = out.args[0].patches.items()
    again = comfy.lora.prefetch_prepared_value(adapter, [0], None, None, False)
    weight = out.args[0].model.state_dict()[key]
    one, other = (
        comfy.lora.calculate_weight([(strength, patch, *rest)], weight.clone(), key)
        for patch in (adapter, again)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, weight)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
def test_pefts_dora_acts_on_weights_of_few_bits(tiny_three, lora, storage):
    """ComfyUI may hand a weight over in the type it computes in."""
    import comfy.lora

    with pytest.warns(UserWarning, match="was saved by PEFT"):
        out = SD3LoadLoRA.execute(tiny_three[0], lora(peft_dora()), 0.7)
    ((key, patches),) = out.args[0].patches.items()
    weight = out.args[0].model.state_dict()[key].to(storage)
    exact = comfy.lora.calculate_weight(patches, weight.float(), key)
    short = comfy.lora.calculate_weight(patches, weight.to(torch.bfloat16), key)
    assert short.dtype == torch.bfloat16
    torch.testing.assert_close(short, exact.to(torch.bfloat16))


def test_settings_beside_a_file_of_peft_set_its_strength(tiny_three, models):
    import folder_paths

    folder = models / "loras" / "nft"
    folder.mkdir(exist_ok=True)
    save_file(renamed("base_model.model."), folder / "adapter_model.safetensors")
    settings = folder / "adapter_config.json"
    folder_paths.filename_list_cache.clear()
    name, found, prints = "nft/adapter_model.safetensors", {}, set()
    for alpha in (2, 4):
        settings.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha}))
        os.utime(settings, (alpha, alpha))
        out = SD3LoadLoRA.execute(tiny_three[0], name, 1.0)
        (found[alpha],) = patched_weights(out.args[0]).values()
        prints.add(SD3LoadLoRA.fingerprint_inputs(name, 1.0))
    base = tiny_three[0].model.state_dict()[f"diffusion_model.{QKV}.weight"]
    torch.testing.assert_close(found[4] - base, 2 * (found[2] - base), rtol=0, atol=1e-5)
    assert len(prints) == 2  # a change of the settings runs the node again


def test_strength_zero_hands_the_model_on(tiny_three, lora):
    out = SD3LoadLoRA.execute(tiny_three[0], lora(native()), 0.0, tiny_three[1])
    assert out.args[0] is tiny_three[0]
    assert out.args[1] is tiny_three[1]


def test_a_model_remembers_its_loras(tiny_three, lora):
    out = SD3LoadLoRA.execute(tiny_three[0], lora(native()), 0.5)
    (remembered,) = origin_of(out.args[0]).loras
    assert remembered["file"] == "mine.safetensors"
    assert remembered["strength"] == 0.5
    assert out.args[1] is None
