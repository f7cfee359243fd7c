"""SD3LoadLoRA beside ComfyUI's loader."""

import pytest
import torch
from safetensors.torch import save_file
from sd3_pack.nodes.errors import NodeError
from sd3_pack.nodes.lora import SD3LoadLoRA, layer_names
from sd3_pack.nodes.wires import origin_of

import nodes

QKV = "joint_blocks.0.x_block.attn.qkv"


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
    tensors = native() | pair("lora_unet_double_blocks_0_img_attn_qkv", 8, 8)
    (told,) = SD3LoadLoRA.execute(tiny_three[0], lora(tensors), 1.0).ui["sd3_report"]
    assert (told["matched"], told["unmatched"]) == (1, 1)
    assert told["unmatched_names"] == ["lora_unet_double_blocks_0_img_attn_qkv"]


def test_a_lora_for_another_model_is_refused(tiny_three, lora):
    name = lora(pair("lora_unet_double_blocks_0_img_attn_qkv", 8, 8))
    with pytest.raises(NodeError, match=r"^SD3:wrong_lora: mine.safetensors: none of its 1"):
        SD3LoadLoRA.execute(tiny_three[0], name, 1.0)


def test_a_lora_for_another_size_of_sd3_is_refused(tiny_three, lora):
    name = lora(pair(f"diffusion_model.{QKV}", 4608, 1536))
    with pytest.raises(NodeError, match=r"^SD3:wrong_lora: .* is 4608 x 1536, .* 384 x 128"):
        SD3LoadLoRA.execute(tiny_three[0], name, 1.0)


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


def test_a_layers_name_is_what_stands_before_its_role():
    keys = ["a.b.lora_A.weight", "a.b.lora_B.weight", "a.b.alpha", "c.hada_w1_a", "d.diff_b"]
    assert layer_names(keys) == ["a.b", "c", "d"]
