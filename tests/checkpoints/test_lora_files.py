"""LoRA files: the recorded four, round trips in each dialect, what is refused; live oracles."""

import contextlib
import json
import os
import random as chances
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from build import recipe_tensor, with_recipe_weights
from lora_recipe import fingerprint, lora_file
from safetensors.torch import load_file, save_file
from sd3_pack.sd3_core import lora
from sd3_pack.sd3_core.adapters.changes import Adapter, Difference, LoHa, LoKr, LowRank
from sd3_pack.sd3_core.checkpoints.diffusers import to_diffusers
from sd3_pack.sd3_core.checkpoints.lora_files import read_lora, save_lora
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig, position_table
from tiny import tiny_state_dicts, with_prefixes

DIALECTS = ("kohya", "kohya_split_qkv", "diffusers_peft", "comfy_generic")
QKV = "joint_blocks.0.x_block.attn.qkv"
FC1 = "joint_blocks.1.x_block.mlp.fc1"
SMALL = MMDiTConfig(
    depth=2,
    context_dim=24,
    pooled_dim=16,
    pos_embed_max_size=8,
    qk_norm=True,
    dual_attention_layers=(0,),
)


def random(*shape, seed=1, scale=0.1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.fixture
def write(tmp_path):
    """write(tensors, metadata) -> path of a safetensors file."""

    def writer(tensors, metadata=None):
        path = tmp_path / "file.safetensors"
        save_file(tensors, path, metadata=metadata)
        return path

    return writer


# The recorded files


class Recorded:
    """The model and the inputs of the recording."""

    def __init__(self, description):
        size = MMDiTConfig(depth=3, pos_embed_max_size=32, qk_norm=True, dual_attention_layers=(0,))
        self.model = with_recipe_weights(MMDiT, size, seed=description["model"]["SEED"])
        self.model.pos_embed = position_table(size.hidden_size, size=32, base=64)
        self.inputs = (
            recipe_tensor("input.x", (1, 16, 12, 16), description["seed"]),
            torch.tensor([description["timestep"]]),
            recipe_tensor("input.context", (1, 10, 4096), description["seed"]),
            recipe_tensor("input.y", (1, 2048), description["seed"]),
        )


@pytest.fixture
def recorded(golden):
    return Recorded(golden("lora_expected")[1])


@pytest.fixture
def recorded_file(golden, recorded, write):
    """recorded_file(dialect) -> path of one of the recorded files, rebuilt byte for byte."""
    _, description = golden("lora_expected")

    def build(dialect):
        tensors = lora_file(dialect, description, shapes_of(recorded.model))
        assert fingerprint(tensors) == description["files"][dialect]["crc32"]
        return write(tensors)

    return build


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.filterwarnings("ignore:.*trained with split q, k, v")
def test_recorded_files_patch_the_weights_and_give_the_output_of_comfyui(
    golden, recorded, recorded_file, dialect
):
    expected, description = golden("lora_expected")
    file = read_lora(recorded_file(dialect))
    model, strength = recorded.model, description["strength"]
    assert len(file.report.unmatched) == 0
    with lora.attached(model, [(file.parts["mmdit"], strength)]):
        attached = model(*recorded.inputs)
    base = model(*recorded.inputs)
    lora.merge(model, file.parts["mmdit"], strength)
    merged = model(*recorded.inputs)
    torch.testing.assert_close(base, expected["out.base"], rtol=0, atol=2e-5)
    torch.testing.assert_close(merged, expected[f"{dialect}.out"], rtol=0, atol=5e-5)
    torch.testing.assert_close(attached, expected[f"{dialect}.out"], rtol=0, atol=5e-5)
    weights = model.state_dict()
    whole = "kohya_split_qkv" if dialect == "kohya_split_qkv" else "kohya"
    for key, value in expected.items():
        found = re.fullmatch(r"(\w+)\.patched(_rows8)?\.(.+)", key)
        if found and found[1] in (whole, dialect):
            patched = weights[found[3]][:: 8 if found[2] else 1]
            torch.testing.assert_close(patched, value, rtol=0, atol=1e-6)


def test_split_qkv_of_sd_scripts_acts_at_a_third_with_a_warning(golden, recorded, recorded_file):
    with pytest.warns(UserWarning, match="third of the trained strength") as caught:
        split = read_lora(recorded_file("kohya_split_qkv"))
    assert "7 attention layers" in str(caught[0].message)
    assert split.report.warnings == (str(caught[0].message),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = read_lora(recorded_file("kohya"))

    def delta(file):
        return next(a for a in file.parts["mmdit"] if a.module == QKV).change.delta()

    torch.testing.assert_close(3 * delta(split), delta(fused))


@pytest.mark.parametrize(
    ("dialect", "called", "matched"),
    [
        ("kohya", "kohya", 105),
        ("diffusers_peft", "diffusers", 98),
        ("comfy_generic", "ComfyUI", 107),
    ],
)
def test_the_report_names_the_dialect_and_counts_keys(recorded_file, dialect, called, matched):
    report = read_lora(recorded_file(dialect)).report
    assert (report.dialect, report.matched, report.warnings) == (called, matched, ())


def test_the_file_can_be_replaced_while_the_lora_is_in_use(recorded_file):
    path = recorded_file("kohya")
    (first, *_) = read_lora(path).parts["mmdit"]
    before = first.change.up.clone()
    size = path.stat().st_size
    path.write_bytes(b"\0" * size)  # a mapped tensor would follow
    assert torch.equal(first.change.up, before)


# Round trips

TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
PARTS = {
    "mmdit": (
        Adapter(QKV, LowRank(random(4, 128), random(384, 4, seed=2), 6.0)),
        Adapter(FC1, LowRank(random(8, 128), random(512, 8, seed=3), None)),
        Adapter("x_embedder.proj", LowRank(random(2, 16, 2, 2), random(128, 2, 1, 1), 1.0)),
        Adapter("final_layer.adaLN_modulation.1", LowRank(random(2, 128), random(256, 2), 2.0)),
        *(
            Adapter(
                f"joint_blocks.{block}.context_block.adaLN_modulation.1",
                LowRank(random(2, 128), random(rows, 2, seed=9), 4.0),
            )
            for block, rows in ((0, 768), (1, 256))
        ),
        *(
            Adapter(
                "joint_blocks.0.x_block.attn2.qkv",
                LowRank(random(3, 128, seed=part), random(128, 3, seed=part + 4), 1.0 + part),
                rows=(128 * part, 128),
            )
            for part in (0, 2)
        ),
    ),
    "clip_l": (Adapter(TEXT, LowRank(random(4, 64), random(64, 4), 8.0)),),
    "clip_g": (Adapter(TEXT, LowRank(random(4, 64), random(64, 4, seed=8), 2.0)),),
    "t5": (
        Adapter(
            "encoder.block.1.layer.0.SelfAttention.q",
            LowRank(random(4, 32), random(48, 4), 4.0),
        ),
    ),
}
EXOTIC = (
    Adapter(QKV, LoKr(random(4, 8), w2_a=random(96, 3), w2_b=random(3, 16), alpha=2.0)),
    Adapter(
        FC1,
        LoHa(
            random(512, 3),
            random(3, 128),
            random(512, 3, seed=4),
            random(3, 128, seed=5),
            alpha=2.0,
        ),
    ),
    Adapter(
        "joint_blocks.0.x_block.attn.proj",
        LowRank(random(4, 128), random(128, 4), 2.0),
        magnitude=1 + random(128, 1),
    ),
    Adapter(QKV, Difference(random(384)), "bias"),
    Adapter("joint_blocks.0.x_block.attn.ln_q", Difference(random(64))),
    Adapter("", Difference(random(1, 64, 128)), "pos_embed"),
    Adapter(
        "x_embedder.proj",
        LowRank(random(3, 16, 1, 1), random(128, 3, 1, 1), 2.0, random(3, 3, 2, 2)),
    ),
)


def total(adapters, name, shape):
    """What adapters add to one parameter."""
    change = torch.zeros(shape)
    for adapter in adapters:
        if adapter.name == name:
            change = adapter.apply(change, 1.0)
    return change


def same_effect(one, other, model):
    for name, shape in shapes_of(model).items():
        torch.testing.assert_close(
            total(one, name, shape), total(other, name, shape), rtol=0, atol=1e-6
        )


@pytest.fixture
def model():
    return with_recipe_weights(MMDiT, SMALL, seed=3)


@pytest.mark.parametrize("dialect", ["comfy", "kohya", "diffusers"])
def test_what_is_saved_reads_back_with_the_same_effect(tmp_path, model, dialect):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = save_lora(tmp_path / "l.safetensors", PARTS, dialect, {"note": "hello"})
        file = read_lora(path)
    assert file.metadata["note"] == "hello"
    assert file.parts.keys() == PARTS.keys()
    assert file.report.unmatched == ()
    same_effect(PARTS["mmdit"], file.parts["mmdit"], model)
    for component in ("clip_l", "clip_g", "t5"):
        (saved,), (read,) = PARTS[component], file.parts[component]
        assert saved.module == read.module
        torch.testing.assert_close(saved.change.delta(), read.change.delta())


@pytest.mark.parametrize("dialect", ["comfy", "kohya"])
def test_every_kind_of_change_reads_back_in_the_dialects_of_comfyui(tmp_path, model, dialect):
    path = save_lora(tmp_path / "l.safetensors", {"mmdit": EXOTIC}, dialect)
    read = read_lora(path).parts["mmdit"]
    plain = [adapter for adapter in EXOTIC if adapter.magnitude is None]
    same_effect(plain, [adapter for adapter in read if adapter.magnitude is None], model)
    twin = with_recipe_weights(MMDiT, SMALL, seed=3)
    lora.merge(model, EXOTIC, 1.0)
    lora.merge(twin, read, 1.0)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[key], rtol=0, atol=1e-6)


def test_alpha_is_always_written_and_stays_exact(tmp_path):
    path = save_lora(tmp_path / "l.safetensors", PARTS, "comfy", dtype=torch.bfloat16)
    tensors = load_file(path)
    named = {key.removesuffix(".lora_up.weight") for key in tensors if "lora_up" in key}
    assert all(f"{name}.alpha" in tensors for name in named)
    assert tensors[f"diffusion_model.{QKV}.alpha"].dtype == torch.float32
    assert tensors[f"diffusion_model.{QKV}.lora_up.weight"].dtype == torch.bfloat16
    assert tensors[f"diffusion_model.{FC1}.alpha"] == 8  # scale 1, said outright


@pytest.mark.parametrize("adapter", EXOTIC, ids=lambda adapter: type(adapter.change).__name__)
def test_diffusers_names_refuse_what_they_cannot_express(tmp_path, adapter):
    with pytest.raises(CheckpointError, match="no plain LoRA"):
        save_lora(tmp_path / "l.safetensors", {"mmdit": (adapter,)}, "diffusers")
    assert list(tmp_path.iterdir()) == []


def test_two_changes_of_one_weight_are_not_written_over_each_other(tmp_path):
    adapter = PARTS["mmdit"][0]
    with pytest.raises(CheckpointError, match="two changes"):
        save_lora(tmp_path / "l.safetensors", {"mmdit": (adapter, adapter)})


def test_unknown_dialects_and_networks_are_named(tmp_path):
    with pytest.raises(ValueError, match="a1111.*comfy, kohya, diffusers"):
        save_lora(tmp_path / "l.safetensors", PARTS, "a1111")
    with pytest.raises(ValueError, match="unet"):
        save_lora(tmp_path / "l.safetensors", {"unet": ()})


def test_training_to_file_to_use(tmp_path, model):
    trained = lora.add(model, rank=3, alpha=1.5)
    for parameter in trained.parameters():
        parameter.data = random(*parameter.shape)
    inputs = (random(1, 16, 6, 8), torch.tensor([500.0]), random(1, 5, 24), random(1, 16))
    expected = model(*inputs)
    path = save_lora(tmp_path / "l.safetensors", {"mmdit": trained.lora()})
    trained.remove()
    with lora.attached(model, [(read_lora(path).parts["mmdit"], 1.0)]):
        torch.testing.assert_close(model(*inputs), expected, rtol=0, atol=1e-6)


# Dialects by hand


KOHYA, PEFT = ("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")


def pair(name, outputs=128, inputs=128, rank=2, roles=KOHYA):
    up, down = roles
    return {
        f"{name}.{up}": random(outputs, rank, seed=2),
        f"{name}.{down}": random(rank, inputs, seed=3),
    }


@pytest.mark.parametrize(
    ("name", "roles", "dialect"),
    [
        ("lora_transformer_transformer_blocks_0_attn_to_k", KOHYA, "OneTrainer"),
        ("lycoris_transformer_blocks_0_attn_to_k", KOHYA, "LyCORIS"),
        ("base_model.model.transformer_blocks.0.attn.to_k", PEFT, "PEFT"),
        (
            "base_model.model.transformer_blocks.0.attn.to_k",
            ("lora_B.default.weight", "lora_A.default.weight"),
            "PEFT",
        ),
        ("transformer_blocks.0.attn.to_k", PEFT, "bare"),
        (
            "transformer.transformer_blocks.0.attn.to_k",
            ("lora.up.weight", "lora.down.weight"),
            "diffusers",
        ),
    ],
)
def test_k_of_diffusers_is_the_second_third_of_qkv(write, name, roles, dialect):
    tensors = pair(name, roles=roles)
    file = read_lora(write(tensors))
    (adapter,) = file.parts["mmdit"]
    assert file.report.dialect == dialect
    assert (adapter.module, adapter.rows) == (QKV, (128, 128))
    up, down = (tensors[f"{name}.{role}"] for role in roles)
    torch.testing.assert_close(adapter.change.delta(), up @ down)  # no alpha: scale 1


def test_alpha_over_rank_of_the_file_is_the_scale(write):
    name = "lora_unet_joint_blocks_0_x_block_attn_proj"
    (adapter,) = read_lora(write(pair(name) | {f"{name}.alpha": torch.tensor([6.0])})).parts[
        "mmdit"
    ]
    assert adapter.change.scale == 3.0


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "difference"])
@pytest.mark.parametrize(
    ("name", "rows", "swapped"),
    [
        ("transformer.norm_out.linear", 256, True),
        ("transformer.transformer_blocks.3.norm1_context.linear", 256, True),
        ("transformer.transformer_blocks.3.norm1_context.linear", 768, False),
        ("transformer.transformer_blocks.3.norm1.linear", 768, False),
    ],
)
def test_halves_are_swapped_where_diffusers_keeps_scale_before_shift(
    write, kind, name, rows, swapped
):
    tensors = {
        "LoRA": pair(name, rows),
        "LoHa": {
            f"{name}.hada_w{i}_{side}": random(*size, seed=i)
            for i in (1, 2)
            for side, size in (("a", (rows, 2)), ("b", (2, 128)))
        },
        "LoKr": {f"{name}.lokr_w1": random(rows // 8, 4), f"{name}.lokr_w2": random(8, 32)},
        "difference": {f"{name}.diff": random(rows, 128)},
    }[kind]
    (adapter,) = read_lora(write(tensors)).parts["mmdit"]
    plain = {
        key.replace(name, "diffusion_model.final_layer.adaLN_modulation.1"): value
        for key, value in tensors.items()
    }
    (straight,) = read_lora(write(plain)).parts["mmdit"]
    expected = straight.change.delta()
    if swapped:
        expected = torch.cat([expected[rows // 2 :], expected[: rows // 2]])
    torch.testing.assert_close(adapter.change.delta(), expected)


def test_text_encoder_files_name_their_encoders(write):
    text = "text_model_encoder_layers_0_mlp_fc1"
    tensors = pair(f"lora_te1_{text}") | pair(f"lora_te2_{text}")
    tensors |= pair("lora_te3_encoder_block_5_layer_1_DenseReluDense_wi_0")
    parts = read_lora(write(tensors)).parts
    assert {kind: part[0].module for kind, part in parts.items()} == {
        "clip_l": "text_model.encoder.layers.0.mlp.fc1",
        "clip_g": "text_model.encoder.layers.0.mlp.fc1",
        "t5": "encoder.block.5.layer.1.DenseReluDense.wi_0",
    }
    only_g = pair(f"lora_te_{text}")
    assert list(read_lora(write(only_g)).parts) == ["clip_l"]
    assert list(read_lora(write(only_g), loaded=["clip_g"]).parts) == ["clip_g"]


def test_the_projection_that_sd3_does_not_use_is_left_out_in_silence(write):
    file = read_lora(
        write(
            pair("lora_te1_text_projection") | pair("lora_te1_text_model_encoder_layers_0_mlp_fc1")
        )
    )
    assert len(file.parts["clip_l"]) == 1
    assert file.report.unmatched == ()


# Warnings and refusals


def test_a_partial_match_warns_with_counts(write):
    tensors = pair("diffusion_model." + QKV, 384) | pair("diffusion_model.nonsense")
    with pytest.warns(UserWarning, match="2 keys match, 2 do not .*nonsense"):
        report = read_lora(write(tensors)).report
    assert (report.matched, len(report.unmatched), len(report.warnings)) == (2, 2, 1)


def test_bundled_embeddings_are_named_and_left_out(write):
    tensors = pair("lora_transformer_proj_out") | {"bundle_emb.word.clip_l": random(1, 64)}
    with pytest.warns(UserWarning, match="1 tensors of textual-inversion"):
        file = read_lora(write(tensors))
    assert len(file.parts["mmdit"]) == 1


def test_alpha_in_the_metadata_of_peft_acts_or_is_said_not_to(write):
    config = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_dora": False}
    tensors = pair("transformer.transformer_blocks.0.attn.to_k", rank=4)
    path = write(tensors, {"lora_adapter_metadata": json.dumps(config)})
    file = read_lora(path)
    assert file.parts["mmdit"][0].change.scale == 2
    assert file.report.warnings == ()
    for text in ("[]", "not json", '{"r": "x"}', '{"transformer.lora_alpha": 8}'):
        path = write(tensors, {"lora_adapter_metadata": text})
        with pytest.warns(UserWarning, match="header's lora_adapter_metadata cannot be used"):
            assert read_lora(path).parts["mmdit"][0].change.scale == 1


@pytest.mark.parametrize(
    ("keys", "method"),
    [
        (["oft_blocks"], "OFT"),
        (["a1.weight", "a2.weight", "b1.weight", "b2.weight"], "GLoRA"),
        (["lora_E"], "AdaLoRA"),
        (["set_weight"], "set_weight"),
        (["on_input"], "IA3"),
    ],
)
def test_other_methods_are_refused_by_name(write, keys, method):
    tensors = {f"diffusion_model.{QKV}.{key}": random(4, 4) for key in keys}
    with pytest.raises(CheckpointError, match=f"file.safetensors: uses .*{method}"):
        read_lora(write(tensors | pair("diffusion_model." + FC1)))


FOR_SD3 = "Use a LoRA that was trained on Stable Diffusion 3"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            pair("lora_unet_double_blocks_0_img_attn_qkv"),
            f"none of its 2 keys.*kohya names.*Flux.*{FOR_SD3}",
        ),
        (
            pair("lora_unet_input_blocks_4_1_proj_in"),
            f"lora_unet_input_blocks_4_1_proj_in.*XL.*{FOR_SD3}",
        ),
        (pair("diffusion_model.strange"), f"none of its 2 keys .*another model.*{FOR_SD3}"),
        ({"emb_params": random(1, 64)}, "textual-inversion .*models/embeddings"),
        ({"cond_stage_model.x": random(8, 8)}, f"is no LoRA; .*Diffusion 1.x.*{FOR_SD3}"),
        ({}, "is no LoRA"),
    ],
)
def test_what_is_no_lora_for_sd3_is_an_error_that_says_what_to_do(write, tensors, message):
    with pytest.raises(CheckpointError, match=f"file.safetensors: .*{message}"):
        read_lora(write(tensors))


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("mmdit",), r"a model: the denoiser \(MMDiT\)\. Give it as --mmdit "),
        (("clip_l",), r"a model: the text encoder CLIP-L\. Give it as --clip-l "),
        (("mmdit", "vae"), r"the denoiser \(MMDiT\), the VAE\. Give it as --checkpoint "),
    ],
)
def test_a_checkpoint_in_place_of_a_lora_is_called_what_it_is(write, kinds, message):
    networks = tiny_state_dicts()
    tensors = with_prefixes({kind: networks[kind] for kind in kinds})
    with pytest.raises(CheckpointError, match=message):
        read_lora(write(tensors))


@pytest.mark.parametrize("key", ["x.alpha", "lora_unet_x.dora_scale", "lora_unet_x.strange"])
def test_a_file_with_nothing_but_the_edges_of_adapters_says_what_it_lacks(write, key):
    with pytest.raises(CheckpointError, match=f"lacks the matrices.*only {key}. Download it again"):
        read_lora(write({key: torch.tensor(1.0)}))


TEXT_PARTS = pair("lora_te1_text_model_encoder_layers_0_mlp_fc1") | pair(
    "lora_te2_text_model_encoder_layers_0_mlp_fc1"
)


@pytest.mark.parametrize(
    ("tensors", "family"),
    [
        (TEXT_PARTS | pair("lora_unet_input_blocks_4_1_proj_in"), "Stable Diffusion 1, 2 or XL"),
        (TEXT_PARTS | pair("lora_unet_down_blocks_1_attentions_0_proj_in"), "Diffusion 1, 2 or XL"),
        (TEXT_PARTS | pair("lora_unet_single_blocks_3_linear1"), "Flux"),
        (
            pair("transformer.transformer_blocks.0.attn.to_q", roles=PEFT)
            | pair("transformer.single_transformer_blocks.0.attn.to_q", roles=PEFT),
            "Flux",
        ),
        (
            pair("transformer.transformer_blocks.0.attn.to_q", roles=PEFT)
            | pair("transformer.transformer_blocks.0.img_mod.1", roles=PEFT),
            "Qwen-Image",
        ),
    ],
)
def test_a_lora_of_a_family_that_shares_names_with_sd3_is_refused(write, tensors, family):
    with pytest.raises(CheckpointError, match=f"is a LoRA for .*{family}.* 1 of its .*{FOR_SD3}"):
        read_lora(write(tensors))


def test_text_parts_alone_are_a_lora_whatever_else_is_unknown(write):
    with pytest.warns(UserWarning, match="4 keys match, 2 do not"):
        file = read_lora(write(TEXT_PARTS | pair("lora_te1_down_blocks_1")))
    assert file.parts.keys() == {"clip_l", "clip_g"}


@pytest.mark.parametrize(
    "changed",
    [
        {"lora_up.weight": torch.ones(128, 2, dtype=torch.int8)},
        {"lora_up.weight": torch.ones(128, 2, dtype=torch.uint8)},
        {"lora_down.weight": torch.ones(2, 128).to(torch.float8_e8m0fnu)},
        {"lora_up.weight_scale": torch.tensor(2.0)},
        {"lora_down.scale_weight": torch.tensor(2.0)},
    ],
)
def test_quantised_loras_are_refused_instead_of_taken_as_plain_numbers(write, changed):
    tensors = pair(FC1) | {f"{FC1}.{role}": tensor for role, tensor in changed.items()}
    (role,) = changed
    with pytest.raises(CheckpointError, match=f"{role}.*quantisation.*in bf16, fp16 or fp32"):
        read_lora(write(tensors))


def test_an_integer_alpha_is_a_number_like_any_other(write):
    tensors = pair(FC1) | {f"{FC1}.alpha": torch.tensor(6)}
    (adapter,) = read_lora(write(tensors)).parts["mmdit"]
    assert adapter.change.scale == 3.0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["alpha", "lora_up.weight", "lora_down.weight", "dora_scale"])
def test_nan_and_infinity_are_refused_when_the_file_is_read(write, role, number):
    tensors = pair(FC1) | {f"{FC1}.alpha": torch.tensor(2.0), f"{FC1}.dora_scale": random(128, 1)}
    tensors[f"{FC1}.{role}"].view(-1)[-1] = number
    with pytest.raises(CheckpointError, match=f"{role}.*NaN or infinity.*earlier save"):
        read_lora(write(tensors))


@pytest.mark.parametrize(
    ("roles", "lacking"),
    [
        ({"lora_up.weight": (128, 4)}, r"LoRA it lacks lora_down \(lora_A\); it has up \[128, 4\]"),
        ({"lora_down.weight": (4, 128)}, r"LoRA it lacks lora_up \(lora_B\); "),
        ({"lora_mid.weight": (4, 4, 1, 1)}, "lacks lora_down .* and lora_up "),
        ({"lora_magnitude_vector": (512,)}, "lacks lora_down .* and lora_up "),
        ({"hada_w1_a": (128, 4), "hada_w1_b": (4, 128)}, "LoHa it lacks hada_w2_a and hada_w2_b;"),
        ({"hada_w2_a": (128, 4), "hada_w2_b": (4, 128)}, "LoHa it lacks hada_w1_a and hada_w1_b;"),
        ({"lokr_w1": (4, 4)}, "LoKr it lacks lokr_w2;"),
        ({"lokr_w1": (4, 4), "lokr_w2_a": (32, 4)}, "LoKr it lacks lokr_w2_b;"),
    ],
)
def test_an_incomplete_adapter_says_what_is_missing(write, roles, lacking):
    tensors = {f"diffusion_model.{FC1}.{role}": random(*size) for role, size in roles.items()}
    message = f"{FC1} is incomplete: of a .*{lacking}.* Download it again"
    with pytest.raises(CheckpointError, match=message):
        read_lora(write(tensors))


@pytest.mark.parametrize(
    "roles",
    [
        {"lora_up.weight": (128, 4), "lora_down.weight": (5, 128)},
        {"lora_up.weight": (128, 0), "lora_down.weight": (0, 128), "alpha": ()},
        {"lora_up.weight": (), "lora_down.weight": (5, 128)},
        {"diff": ()},
        {"lora_up.weight": (128, 4), "lora_down.weight": (4, 128), "dora_scale": (7, 1)},
    ],
)
def test_a_damaged_adapter_is_refused_by_name(write, roles):
    tensors = {f"diffusion_model.{FC1}.{role}": random(*size) for role, size in roles.items()}
    with pytest.raises(CheckpointError, match=f"{FC1} is damaged .* Download it again"):
        read_lora(write(tensors))


def test_damaged_files_end_in_an_error_that_names_them_or_in_a_lora(write, model):
    """Tensors left out, swapped, reshaped or renamed, in any combination."""
    chance, shapes = chances.Random(7), shapes_of(model)
    whole = keys_of(COMFY_JOBS) | pair("transformer.norm_out.linear", 256, rank=3)
    for _ in range(300):
        tensors = dict(whole)
        for _ in range(chance.randint(1, 4)):
            key, other = chance.sample(sorted(tensors), 2)
            value = tensors.pop(key)
            match chance.randrange(5):
                case 0:
                    tensors[key] = tensors[other].clone()
                case 1:
                    tensors[key] = value.reshape(-1)[: chance.randint(0, 3)].clone()
                case 2:
                    tensors[key] = value.reshape(1, *value.shape, 1)
                case 3:
                    tensors[other] = value
        with warnings.catch_warnings(), contextlib.suppress(CheckpointError):
            warnings.simplefilter("ignore")
            for adapter in read_lora(write(tensors)).parts["mmdit"]:
                if adapter.fits(shapes[adapter.name]):
                    adapter.apply(torch.ones(shapes[adapter.name]), 1.0)


def test_a_kronecker_change_with_a_core_is_the_product_written_out(write):
    """ComfyUI 0.33 fails on it: its core is not contiguous."""
    w1, core = random(8, 4), random(3, 3, 2, 2)
    left, right = random(3, 16), random(3, 4, seed=2)
    name = "diffusion_model.x_embedder.proj"
    roles = {"w1": w1, "w2_a": left, "w2_b": right, "t2": core}
    tensors = {f"{name}.lokr_{role}": tensor for role, tensor in roles.items()}
    (adapter,) = read_lora(write(tensors | {f"{name}.alpha": torch.tensor(6.0)})).parts["mmdit"]
    expected = torch.zeros(128, 16, 2, 2)
    for h in range(2):
        for w in range(2):
            expected[:, :, h, w] = 2 * torch.kron(w1, left.T @ core[:, :, h, w] @ right)
    torch.testing.assert_close(adapter.change.delta(), expected)


# Live oracles


def test_diffusers_loads_our_export_and_gives_our_output(tmp_path, model):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle of this test")
    pytest.importorskip("peft", reason="diffusers needs peft to load a LoRA")
    inputs = (random(1, 16, 6, 8), torch.tensor([500.0]), random(1, 5, 24), random(1, 16))
    base = model(*inputs)
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=128,
        pooled_projection_dim=16,
        out_channels=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    theirs.load_state_dict(to_diffusers("mmdit", model.state_dict()), strict=True)

    def their_output():
        with torch.no_grad():
            x, timestep, context, pooled = inputs
            return theirs(x, context, pooled, timestep, return_dict=False)[0]

    torch.testing.assert_close(their_output(), base, rtol=0, atol=2e-5)
    path = save_lora(tmp_path / "l.safetensors", PARTS, "diffusers")
    theirs.load_lora_adapter(str(path), prefix="transformer")
    with lora.attached(model, [(PARTS["mmdit"], 1.0)]):
        ours = model(*inputs)
    assert (ours - base).abs().max() > 1e-3
    torch.testing.assert_close(their_output(), ours, rtol=0, atol=2e-5)


def comfyui():
    """ComfyUI's checkout, or a loud skip."""
    place = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
    if not (place / "comfy" / "lora.py").is_file():
        pytest.skip("NO COMFYUI: set COMFYUI_PATH to its folder to hold LoRA arithmetic against it")
    return place


DORA_OUT, DORA_IN = 1 + random(128, 1), 1 + random(1, 128)
COMFY_JOBS = {
    "joint_blocks.0.x_block.attn.qkv": {
        **{f"hada_w{i}_{side}": random(*size, seed=i + len(side))
           for i in (1, 2) for side, size in (("a", (384, 3)), ("b", (3, 128)))},
        "alpha": torch.tensor(2.0),
        "diff_b": random(384),
    },
    "joint_blocks.0.context_block.attn.qkv": {
        "lokr_w1": random(6, 8), "lokr_w2_a": random(64, 3), "lokr_w2_b": random(3, 16),
        "alpha": torch.tensor(2.0),
    },
    "joint_blocks.0.x_block.mlp.fc1": {
        "lokr_w1_a": random(8, 2), "lokr_w1_b": random(2, 4), "lokr_w2": random(64, 32),
        "alpha": torch.tensor(5.0), "dora_scale": DORA_IN,
    },
    "joint_blocks.0.x_block.mlp.fc2": {
        "lokr_w1": random(8, 4), "lokr_w2": random(16, 128), "alpha": torch.tensor(5.0),
    },
    "joint_blocks.1.x_block.attn.proj": {
        "lora_up.weight": random(128, 4), "lora_down.weight": random(4, 128),
        "alpha": torch.tensor(2.0), "dora_scale": DORA_OUT,
    },
    "joint_blocks.0.x_block.attn2.proj": {
        "lora_B.weight": random(128, 4), "lora_A.weight": random(4, 128), "dora_scale": DORA_IN,
    },
    "joint_blocks.0.x_block.attn.proj": {"diff": random(128, 128)},
    "joint_blocks.0.x_block.attn.ln_q": {"w_norm": random(64)},
    "x_embedder.proj": {
        "lora_up.weight": random(128, 3, 1, 1), "lora_down.weight": random(3, 16, 1, 1),
        "lora_mid.weight": random(3, 3, 2, 2), "alpha": torch.tensor(2.0),
        "dora_scale": 1 + random(1, 16, 1, 1),
    },
    "context_embedder": {
        **{f"hada_w{i}_{side}": random(*size, seed=i + len(side))
           for i in (1, 2) for side, size in (("a", (128, 2)), ("b", (2, 24)))},
        "dora_scale": DORA_OUT,
    },
}  # fmt: skip
CONV_JOBS = {
    "LoHa with cores": {
        **{f"hada_w{i}_{side}": random(*size, seed=i + len(side))
           for i in (1, 2) for side, size in (("a", (3, 128)), ("b", (3, 16)))},
        "hada_t1": random(3, 3, 2, 2, scale=1), "hada_t2": random(3, 3, 2, 2, seed=7, scale=1),
        "alpha": torch.tensor(2.0),
    },
    "LoKr": {"lokr_w1": random(8, 4), "lokr_w2": random(16, 4, 2, 2)},
    "LoRA": {"lora_up.weight": random(128, 3, 1, 1), "lora_down.weight": random(3, 16, 2, 2)},
}  # fmt: skip


def in_comfyui(checkout, folder, jobs, base):
    """What ComfyUI makes of each job, (LoRA tensors, strength), in one process."""
    for name, (tensors, strength) in jobs.items():
        job = {f"base.{key}": value for key, value in base.items()}
        job |= {f"lora.{key}": value.clone() for key, value in tensors.items()}
        save_file(job, folder / f"{name}.job", metadata={"strength": str(strength)})
    script = Path(__file__).parent.parent / "support" / "comfy_lora.py"
    command = [sys.executable, str(script), str(checkout), str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "ERROR" not in ran.stderr, ran.stderr[-2000:]
    return {name: load_file(folder / f"{name}.out") for name in jobs}


def keys_of(changes):
    return {
        f"diffusion_model.{module}.{role}": tensor.clone()
        for module, roles in changes.items()
        for role, tensor in roles.items()
    }


def test_merged_weights_equal_those_of_comfyui(tmp_path, write, model):
    jobs = {
        "all kinds at 0.7": (keys_of(COMFY_JOBS), 0.7),
        "all kinds at 1": (keys_of(COMFY_JOBS), 1.0),
    }
    for name, changes in CONV_JOBS.items():
        jobs[name] = keys_of({"x_embedder.proj": changes}), -1.3
    base = {name: value.clone() for name, value in model.named_parameters()}
    theirs = in_comfyui(comfyui(), tmp_path, jobs, base)
    for job, (tensors, strength) in jobs.items():
        twin = with_recipe_weights(MMDiT, SMALL, seed=3)
        lora.merge(twin, read_lora(write(tensors)).parts["mmdit"], strength)
        changed = twin.state_dict()
        assert theirs[job]
        for name, value in theirs[job].items():
            assert (value - base[name]).abs().max() > 1e-4, (job, name)
            off = (changed[name] - value).abs().max()
            assert off <= 1e-6, (job, name, off)
