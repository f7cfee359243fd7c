"""Names in LoRA files: every name ComfyUI accepts means the same parameter here."""

import pytest
from sd3_pack.sd3_core.checkpoints import lora_keys

COMFY_PREFIXES = {
    "mmdit": "diffusion_model.",
    "clip_l": "clip_l.transformer.",
    "clip_g": "clip_g.transformer.",
    "t5": "t5xxl.transformer.",
}
ENCODERS = {"L": "clip_l", "G": "clip_g", "T5": "t5"}
HIDDEN = 192


def target(place):
    """ComfyUI's name of a place."""
    path = f"{place.module}.{place.parameter}" if place.module else place.parameter
    return COMFY_PREFIXES[place.component] + path


def test_every_name_of_the_denoiser_means_what_comfyui_means(golden):
    _, recorded = golden("lora_keymap")
    last = recorded["model"]["depth"] - 1
    for name, meant in recorded["map"].items():
        meant = {"key": meant, "offset": None} if isinstance(meant, str) else meant
        place = lora_keys.place(name)
        assert place is not None, name
        offset = None if place.part is None else [0, place.part * HIDDEN, HIDDEN]
        in_last = f"joint_blocks.{last}." in place.module
        swapped = place.swapped == "always" or (place.swapped == "if two" and in_last)
        assert target(place) == meant["key"], name
        assert offset == meant["offset"], name
        assert swapped == (meant.get("function") is not None), name


@pytest.mark.parametrize("encoders", ["L_G_T5", "L_G", "L", "G", "T5"])
def test_every_name_of_the_text_encoders_means_what_comfyui_means(golden, encoders):
    _, recorded = golden("lora_keymap_text")
    loaded = [ENCODERS[name] for name in encoders.split("_")]
    for name, meant in recorded["maps"][encoders].items():
        place = lora_keys.place(name, loaded)
        assert place is not None, name
        assert target(place) == meant, name


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.joint_blocks.11.x_block.attn.qkv",  # ComfyUI takes none of these
        "joint_blocks.11.x_block.attn.qkv",
        "lycoris_joint_blocks_11_x_block_attn_qkv",
        "model.diffusion_model.joint_blocks.11.x_block.attn.qkv",
        "_orig_mod.joint_blocks.11.x_block.attn.qkv",
        "module.joint_blocks.11._orig_mod.x_block.attn.qkv",
        "diffusion_model.base_model.model.joint_blocks.11.x_block.attn.qkv",
        "lora_unet__orig_mod_joint_blocks_11_x_block_attn_qkv",
    ],
)
def test_names_of_the_release_are_taken_after_any_prefix(name):
    assert lora_keys.place(name) == lora_keys.Place("mmdit", "joint_blocks.11.x_block.attn.qkv")


@pytest.mark.parametrize("name", ["transformer_blocks.37.attn.to_v", "text_encoder_3.shared"])
def test_bare_names_of_diffusers_and_its_third_encoder_are_taken(name):
    assert lora_keys.place(name) is not None


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_down_blocks_1_attentions_0_proj_in",
        "transformer.single_transformer_blocks.0.attn.to_q",
        "lora_te1_encoder_layers_0",
        "lora_unet_",
        "",
    ],
)
def test_foreign_names_mean_nothing(name):
    assert lora_keys.place(name) is None


def test_a_key_is_taken_apart_into_name_and_role():
    roles = {
        "x.lora_up.weight": "up",
        "x.lora_A.default.weight": "down",
        "x_lora.down.weight": "down",
        "x.lora.up.weight": "up",
        "x.lora_B": "up",
        "x.lora_linear_layer.up.weight": "up",
        "x.lora_mid.weight": "mid",
        "x.alpha": "alpha",
        "x.hada_w1_a": "hada_w1_a",
        "x.hada_t2": "hada_t2",
        "x.lokr_w1": "lokr_w1",
        "x.lokr_w2_b": "lokr_w2_b",
        "x.dora_scale": "dora_scale",
        "x.lora_A.style.weight": "down",
        "x.lora_B.style": "up",
        "x.lora_B.bias": "up_bias",
        "x.lora_B.style.bias": "up_bias",
        "x.lora_magnitude_vector": "magnitude",
        "x.lora_magnitude_vector.style.weight": "magnitude",
        "x.hada_w1_a.style": "hada_w1_a",
        "x.lokr_w2.style": "lokr_w2",
        "x.diff_b": "diff_b",
        "x.w_norm": "diff",
    }
    for key, role in roles.items():
        assert lora_keys.sort_keys([key]).groups == {"x": {role: key}}


def test_a_lora_is_described_from_its_shapes():
    block = "lora_unet_joint_blocks_0_x_block"
    described = lora_keys.describe(
        {
            f"{block}_attn_qkv.lora_down.weight": (8, 128),
            f"{block}_attn_qkv.lora_up.weight": (384, 8),
            f"{block}_attn_qkv.alpha": (),
            f"{block}_mlp_fc1.lokr_w1": (4, 4),
            f"{block}_mlp_fc1.lokr_w2_a": (32, 2),
            f"{block}_mlp_fc1.lokr_w2_b": (2, 32),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 64),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (64, 4),
            "lora_unet_nonsense.lora_up.weight": (64, 4),
            "bundle_emb.word.clip_l": (1, 64),
        }
    )
    assert described is not None
    assert described.dialect == "kohya"
    assert described.kinds == {"LoRA": 3, "LoKr": 1}
    assert described.components == {"mmdit": 2, "clip_l": 1}
    assert described.ranks == (2, 4, 8)
    assert described.modules[0] == "joint_blocks.0.x_block.attn.qkv"
    assert set(described.unmatched) == {
        "lora_unet_nonsense.lora_up.weight",
        "bundle_emb.word.clip_l",
    }
    assert described.family is None


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "Flux"),
        ("lora_unet_input_blocks_4_1_proj_in", "XL"),
        ("unet.down_blocks.0.attentions.0.to_q", "XL"),
        ("diffusion_model.blocks.0.cross_attn.k", "Wan"),
        ("diffusion_model.layers.0.attention.qkv", "Lumina"),
        ("transformer.transformer_blocks.0.img_mod.1", "Qwen"),
    ],
)
def test_loras_of_other_families_are_named(name, family):
    described = lora_keys.describe({f"{name}.lora_up.weight": (8, 4)})
    assert described is not None
    assert described.components == {}
    assert family in (described.family or "")


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"joint_blocks.0.x_block.attn.qkv.weight": (384, 128)},
        {"decoder.block.0.alpha": (8,), "decoder.block.0.weight": (8, 8)},
    ],
)
def test_what_is_no_lora_is_not_described(shapes):
    assert lora_keys.describe(shapes) is None
