"""What `inspect` says of a file, without reading a weight."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import save_file
from sd3_pack.sd3_core.checkpoints.inspect import inspect
from sd3_pack.sd3_core.checkpoints.load import load_mmdit
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from tiny import (
    PARTS,
    quantised,
    shapes_of,
    tiny_shapes,
    tiny_state_dicts,
    write_hollow,
    write_tiny_checkpoint,
)
from tiny_tokenizers import write_tiny_tokenizers

MEDIUM = MMDiTConfig(24)
MEDIUM_35 = MMDiTConfig(
    24, pos_embed_max_size=384, qk_norm=True, dual_attention_layers=tuple(range(13))
)
LARGE = MMDiTConfig(38, qk_norm=True)


def released(config: MMDiTConfig) -> dict[str, tuple[int, ...]]:
    shapes = shapes_of(MMDiT, config)
    return {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "config", "family", "title", "parameters"),
    [
        ("a", MEDIUM, "sd3_medium", "SD3 Medium", 2_028_328_000),
        ("a", MEDIUM_35, "sd3.5_medium", "SD3.5 Medium", 2_243_171_520),
        ("a", LARGE, "sd3.5_large", "SD3.5 Large", 8_056_627_520),
        ("large_turbo", LARGE, "sd3.5_large_turbo", "SD3.5 Large Turbo", 8_056_627_520),
        ("a", MMDiTConfig(18), "other", "Stable Diffusion 3, of its own size", None),
    ],
)
def test_the_family_is_told_by_shapes(tmp_path, name, config, family, title, parameters):
    report = inspect(write_hollow(tmp_path / f"{name}.safetensors", released(config)))
    (part,) = report.components
    assert report.family == family
    assert report.what == f"{title}: MMDiT"
    assert parameters in (None, part.parameters)
    assert part.tables == config.pos_embed_max_size**2 * config.hidden_size
    assert part.precision == "bf16"
    turbo_note = "Shapes cannot tell Large from Large Turbo; the name is only a hint."
    assert (part.note == turbo_note) == (config is LARGE)
    assert ("a depth of the SD3 paper" in part.variant) == (config.depth == 18)


def resident_bytes() -> int:
    """Of this process, mapped pages of files among them."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident")
def test_sixteen_gigabytes_are_described_and_mapped_unread(tmp_path):
    path = write_hollow(tmp_path / "sd3.5_large.safetensors", released(LARGE))
    assert path.stat().st_size > 16 * 10**9
    before = resident_bytes()
    assert "16.29 GB" in " ".join(inspect(path).lines())
    network = load_mmdit(path)
    assert network.config == LARGE
    assert resident_bytes() - before < 0.5e9  # a page of the mapped file that is read counts here


def test_the_metadata_can_hint_at_turbo(tmp_path):
    path = tmp_path / "a.safetensors"
    title = {"modelspec.title": "Stable Diffusion 3.5 Large Turbo"}
    assert inspect(write_hollow(path, released(LARGE), metadata=title)).family.endswith("turbo")


def test_a_whole_model_lacks_nothing_and_lists_its_tokenizers(tmp_path):
    write_tiny_tokenizers(tmp_path / "t")
    path = tmp_path / "x.safetensors"
    metadata = {"sd3_workbench.shift": "1.5"}
    write_tiny_checkpoint(path, tokenizers=tmp_path / "t", metadata=metadata)
    report = inspect(path)
    assert [part.kind for part in report.components] == list(PARTS)
    assert report.lacks == {}
    assert "t5xxl tokenizer.json" in report.tokenizers
    assert "clip_l vocab.json" in report.tokenizers
    assert report.metadata["sd3_workbench.shift"] == "1.5"
    assert report.bytes == path.stat().st_size
    for part in report.components:
        shapes = tiny_shapes((part.kind,))[part.kind]
        assert part.tensors == len(shapes)
        assert part.parameters + part.tables == sum(torch.Size(s).numel() for s in shapes.values())


def test_what_a_model_lacks_is_named_with_its_supplier(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tiny_checkpoint(path, parts=("mmdit", "vae", "clip_l"))
    report = inspect(path)
    assert report.what.endswith(": MMDiT + VAE + CLIP-L")
    assert report.lacks == {
        "clip_g": "clip_g.safetensors",
        "t5": "t5xxl_fp16.safetensors or t5xxl_fp8_e4m3fn.safetensors",
    }
    assert "lacks:" in report.lines()


def test_an_encoder_alone_lacks_nothing(tmp_path):
    written = write_tiny_checkpoint(tmp_path, parts=("t5",), layout="bare")
    report = inspect(written["t5"])
    assert report.what == "T5 for Stable Diffusion 3"
    assert report.family is None
    assert report.lacks == {}


def test_the_vae_s_note_says_what_shapes_cannot_tell(tmp_path):
    written = write_tiny_checkpoint(tmp_path, parts=("vae",), layout="bare")
    assert "Flux" in inspect(written["vae"]).components[0].note


@pytest.mark.parametrize("spelling", ["scale_weight", "comfy_quant"])
def test_mixed_precision_is_told_by_share(tmp_path, spelling):
    stored, _ = quantised(tiny_state_dicts(("t5",), torch.float16)["t5"], spelling)
    save_file(stored, tmp_path / "t5xxl.safetensors")
    (part,) = inspect(tmp_path / "t5xxl.safetensors").components
    first, second = part.precision.split(", ")
    assert first.startswith("scaled fp8 e4m3fn 99.")
    assert second.startswith("fp16 0.")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "fp32"),
        (torch.float16, "fp16"),
        (torch.bfloat16, "bf16"),
        (torch.float8_e4m3fn, "fp8 e4m3fn"),
        (torch.float8_e5m2, "fp8 e5m2"),
    ],
)
def test_one_precision_is_named(tmp_path, dtype, name):
    write_tiny_checkpoint(tmp_path / "x.safetensors", dtype=dtype)
    assert {part.precision for part in inspect(tmp_path / "x.safetensors").components} == {name}


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("single", "under model.diffusion_model"),
        ("bare", "names without prefix"),
        ("diffusers", "names of diffusers"),
    ],
)
def test_the_layout_is_told(tmp_path, layout, words):
    written = write_tiny_checkpoint(tmp_path / "x", parts=("mmdit",), layout=layout)
    assert inspect(written["mmdit"]).components[0].layout == words


def test_a_diffusers_folder_is_described_whole(tmp_path):
    write_tiny_tokenizers(tmp_path / "t")
    write_tiny_checkpoint(tmp_path / "sd3", layout="diffusers", tokenizers=tmp_path / "t")
    report = inspect(tmp_path / "sd3")
    assert len(report.components) == 5
    assert report.tokenizers == ("tokenizer", "tokenizer_2", "tokenizer_3")


def test_json_holds_what_the_lines_say(tmp_path):
    write_tiny_checkpoint(tmp_path / "x.safetensors")
    content = json.loads(inspect(tmp_path / "x.safetensors").to_json())
    assert content["components"][0]["kind"] == "mmdit"
    assert content["family"] == "other"
    assert content["lora"] is None


def test_a_lora_is_described_as_one(tmp_path):
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    tensors = {
        f"{name}.lora_down.weight": torch.zeros(4, 128),
        f"{name}.lora_up.weight": torch.zeros(384, 4),
        f"{name}.alpha": torch.tensor(4.0),
    }
    save_file(tensors, tmp_path / "lora.safetensors", {"ss_network_dim": "4"})
    report = inspect(tmp_path / "lora.safetensors")
    assert report.what == "a LoRA for MMDiT"
    assert report.lora is not None
    assert report.lora.ranks == (4,)
    assert report.lora.modules == ("joint_blocks.0.x_block.attn.qkv",)
    assert report.metadata == {"ss_network_dim": "4"}
    assert any("ranks 4" in line for line in report.lines())
    assert json.loads(report.to_json())["lora"]["dialect"] == report.lora.dialect


def test_a_folder_of_peft_is_described_as_its_lora(tmp_path):
    name = "base_model.model.transformer_blocks.0.attn.to_q"
    tensors = {
        f"{name}.lora_A.weight": torch.zeros(4, 128),
        f"{name}.lora_B.weight": torch.zeros(128, 4),
        f"{name}.lora_magnitude_vector": torch.zeros(128),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    lora = inspect(tmp_path).lora
    assert lora is not None
    assert (lora.dialect, lora.kinds) == ("PEFT", {"LoRA": 1, "DoRA": 1})


def test_a_lora_has_a_precision_and_a_parameter_count(tmp_path):
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    tensors = {
        f"{name}.lora_down.weight": torch.zeros(4, 128, dtype=torch.bfloat16),
        f"{name}.lora_up.weight": torch.zeros(384, 4, dtype=torch.float16),
        f"{name}.alpha": torch.tensor(4.0),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    report = inspect(tmp_path / "lora.safetensors")
    assert report.lora is not None
    assert report.lora.parameters == 2048
    assert report.lora.precision == "fp16 75.0%, bf16 25.0%"
    assert "2,048 parameters, fp16 75.0%, bf16 25.0%" in report.lines()


def test_a_lora_of_another_model_says_whose(tmp_path):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{name}.lora_down.weight": torch.zeros(4, 8),
        f"{name}.lora_up.weight": torch.zeros(8, 4),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    assert inspect(tmp_path / "lora.safetensors").what.startswith("a LoRA for Flux")


@pytest.mark.parametrize(
    ("shared", "foreign", "family"),
    [
        (
            "lora_te1_text_model_encoder_layers_0_mlp_fc1",
            "lora_unet_input_blocks_4_1_proj_in",
            "Stable Diffusion 1, 2 or XL",
        ),
        (
            "transformer.transformer_blocks.0.attn.to_q",
            "transformer.single_transformer_blocks.0.attn.to_q",
            "Flux",
        ),
    ],
)
def test_names_that_other_families_share_do_not_make_a_lora_one_for_sd3(
    tmp_path, shared, foreign, family
):
    keys = [f"{name}.lora_{side}.weight" for name in (shared, foreign) for side in ("A", "B")]
    save_file({key: torch.zeros(4, 4) for key in keys}, tmp_path / "lora.safetensors")
    report = inspect(tmp_path / "lora.safetensors")
    assert report.what.startswith(f"a LoRA for {family}")
    assert report.lora is not None
    assert report.lora.components == {}
    assert report.lora.unmatched == 4


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_joint_blocks_0_x_block_attn_qkv",
        "diffusion_model.joint_blocks.0.x_block.attn.qkv",
        "joint_blocks.0.x_block.attn.qkv",
    ],
)
def test_an_oft_with_the_names_of_sd3_is_called_unsupported_and_not_foreign(tmp_path, name):
    save_file({f"{name}.oft_blocks": torch.zeros(4, 4, 4)}, tmp_path / "oft.safetensors")
    report = inspect(tmp_path / "oft.safetensors")
    assert report.what == "a LoRA for MMDiT, by OFT, which is not supported here"
    assert report.lora is not None
    assert report.lora.kinds == {"OFT": 1}
    assert report.lora.unmatched == 0


def test_what_is_no_sd3_file_is_an_error_that_says_what_it_is(tmp_path):
    save_file({"cond_stage_model.x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x.safetensors: it is a Stable Diffusion 1.x"):
        inspect(tmp_path / "x.safetensors")


def test_a_damaged_model_is_an_error_not_a_description(tmp_path):
    state = tiny_state_dicts(("mmdit",))["mmdit"]
    del state["final_layer.linear.bias"]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of 59 tensors missing \(final_layer"):
        inspect(tmp_path / "x.safetensors")
