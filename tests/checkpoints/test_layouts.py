"""What a file is, told from names and shapes, in every layout people have."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sd3_pack.sd3_core.checkpoints.header import fingerprint, is_folder
from sd3_pack.sd3_core.checkpoints.inspect import inspect
from sd3_pack.sd3_core.checkpoints.layouts import COMPONENTS, TITLES, find_components
from sd3_pack.sd3_core.checkpoints.load import (
    component_of,
    load_clip,
    load_mmdit,
    load_t5,
    load_vae,
    read_state_dict,
)
from sd3_pack.sd3_core.errors import CheckpointError
from tiny import (
    PARTS,
    SINGLE_FILE_PREFIXES,
    tiny_state_dicts,
    with_prefixes,
    write_hollow,
    write_tiny_checkpoint,
)

# What people put before the released names, beside the released files' own prefixes.
PREFIXES = {
    "mmdit": (
        "",
        "model.diffusion_model.",
        "diffusion_model.",
        "model.",
        "transformer.",
        "module.",
    ),
    "vae": ("", "first_stage_model.", "vae.", "model.vae."),
    "clip_l": ("", "text_encoders.clip_l.transformer.", "text_encoders.clip_l.", "clip_l."),
    "clip_g": ("", "text_encoders.clip_g.transformer.", "clip_g.transformer."),
    "t5": ("", "text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "text_encoder_3."),
}


@pytest.fixture(scope="module")
def states():
    return tiny_state_dicts()


def same(found, wanted) -> bool:
    return found.keys() == wanted.keys() and all(found[k].equal(wanted[k]) for k in wanted)


def complaint(path, kind: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_components(path) if kind is None else component_of(path, kind)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["single", "split", "bare", "diffusers"])
def test_every_layout_gives_every_weight_as_written(tmp_path, states, layout):
    written = write_tiny_checkpoint(tmp_path / "model.safetensors", layout=layout)
    assert set(COMPONENTS) == set(PARTS) == set(written)
    for part, path in written.items():
        assert same(read_state_dict(component_of(path, part)), states[part]), part


def test_a_single_file_holds_all_five(tmp_path):
    write_tiny_checkpoint(tmp_path / "model.safetensors")
    found = find_components(tmp_path / "model.safetensors")
    assert tuple(found) == COMPONENTS
    assert {kind: part.prefix for kind, part in found.items()} == SINGLE_FILE_PREFIXES


@pytest.mark.parametrize(("part", "prefix"), [(p, x) for p in PREFIXES for x in PREFIXES[p]])
def test_a_network_is_found_behind_any_prefix(tmp_path, states, part, prefix):
    path = tmp_path / f"{part}.safetensors"
    save_file({prefix + name: tensor for name, tensor in states[part].items()}, path)
    assert same(read_state_dict(component_of(path, part)), states[part])


def test_a_network_beside_others_without_prefix_of_its_own(tmp_path, states):
    both = {"vae." + k: v for k, v in states["vae"].items()} | states["mmdit"]
    save_file(both, tmp_path / "x.safetensors")
    found = find_components(tmp_path / "x.safetensors")
    assert same(read_state_dict(found["mmdit"]), states["mmdit"])
    assert same(read_state_dict(found["vae"]), states["vae"])


def test_an_averaged_copy_beside_the_model_is_not_the_model(tmp_path, states):
    model = {"model.diffusion_model." + k: v for k, v in states["mmdit"].items()}
    copy = {"model_ema." + k: v + 1 for k, v in states["mmdit"].items()}
    save_file(model | copy, tmp_path / "x.safetensors")
    assert same(read_state_dict(component_of(tmp_path / "x.safetensors", "mmdit")), states["mmdit"])


def test_extras_that_files_carry_are_left_out_and_listed(tmp_path, states):
    extras = {
        "text_model.embeddings.position_ids": torch.arange(16)[None],
        "logit_scale": torch.tensor(4.6),
        "vision_model.pre_layrnorm.weight": torch.ones(4),
        "visual_projection.weight": torch.ones(4, 4),
        "text_projection.weight": torch.ones(64, 64),
    }
    save_file(states["clip_l"] | extras, tmp_path / "clip_l.safetensors")
    component = component_of(tmp_path / "clip_l.safetensors", "clip_l")
    assert same(read_state_dict(component), states["clip_l"])
    report = inspect(tmp_path / "clip_l.safetensors")
    assert set(report.unused) == set(extras)
    assert any(line.startswith("5 tensors are not used: ") for line in report.lines())


@pytest.mark.parametrize("part", PARTS)
def test_the_remains_of_a_network_under_a_released_prefix_are_refused(tmp_path, states, part):
    other = "vae" if part == "mmdit" else "mmdit"
    rest = next(name for name in states[part] if not re.search(r"\.\d+\.", name))
    tensors = with_prefixes({other: states[other], part: {rest: states[part][rest]}})
    save_file(tensors, tmp_path / "x.safetensors")
    message = complaint(tmp_path / "x.safetensors")
    assert f"holds 1 tensors of {TITLES[part]} ({SINGLE_FILE_PREFIXES[part]}" in message
    assert message.endswith("the rest of it is missing. Download the file again.")


def test_what_lies_outside_the_released_prefixes_is_listed_only(tmp_path, states):
    strays = {
        "model_ema.decay": torch.ones(()),
        "text_encoders.t5xxl.transformer.scaled_fp8": torch.ones(2),
        "text_encoders.clip_g.transformer.logit_scale": torch.ones(()),
        "text_encoders.clip_l.tokenizer.vocab.json": torch.ones(3, dtype=torch.uint8),
    }
    save_file(with_prefixes({"mmdit": states["mmdit"]}) | strays, tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert set(report.unused) == {
        "model_ema.decay",
        "text_encoders.clip_g.transformer.logit_scale",
    }


def test_a_header_of_many_small_clips_is_looked_through_at_once(tmp_path):
    name = "{}.text_model.encoder.layers.0.layer_norm1.weight"
    shapes = {name.format(i): (1,) for i in range(20_000)}
    path = write_hollow(tmp_path / "x.safetensors", shapes)
    began = time.process_time()
    find_components(path)
    assert time.process_time() - began < 5


def test_t5_with_its_decoder_or_its_embedding_under_either_name(tmp_path, states):
    state = dict(states["t5"])
    table = state.pop("shared.weight")
    path = tmp_path / "t5xxl.safetensors"
    for names in (["shared.weight"], ["encoder.embed_tokens.weight"], ["shared.weight", "x"]):
        tables = {name.replace("x", "encoder.embed_tokens.weight"): table + 0 for name in names}
        rest = {"decoder.block.0.layer.0.layer_norm.weight": torch.ones(4), "lm_head.weight": table}
        save_file(state | tables | {k: v.clone() for k, v in rest.items()}, path)
        assert same(read_state_dict(component_of(path, "t5")), states["t5"])


@pytest.mark.parametrize("part", ["clip_l", "clip_g"])
def test_names_without_text_model_as_transformers_5_writes_them(tmp_path, states, part):
    path = tmp_path / f"{part}.safetensors"
    save_file({k.removeprefix("text_model."): v for k, v in states[part].items()}, path)
    assert same(read_state_dict(component_of(path, part)), states[part])


def clip_shapes(width: int, layers: int) -> dict[str, torch.Tensor]:
    """Enough of a CLIP to be recognised; one row stands for each table."""
    names = {"text_model.final_layer_norm.weight": torch.zeros(width)}
    for i in range(layers):
        names[f"text_model.encoder.layers.{i}.layer_norm1.weight"] = torch.zeros(width)
    return names


def test_the_released_clips_are_told_by_width_and_layers_whatever_the_name(tmp_path):
    path = tmp_path / "clip_g.safetensors"
    save_file(clip_shapes(768, 12), path)
    assert list(find_components(path)) == ["clip_l"]
    save_file(clip_shapes(1280, 32), tmp_path / "clip_l.safetensors")
    assert list(find_components(tmp_path / "clip_l.safetensors")) == ["clip_g"]
    assert "holds the text encoder CLIP-L, not the text encoder CLIP-G" in complaint(path, "clip_g")


@pytest.mark.parametrize("name", ["clip_g", "CLIP-G", "openclip_bigG", "text_encoder_2"])
def test_another_size_of_clip_g_is_told_by_its_file_s_name(tmp_path, name):
    save_file(clip_shapes(128, 2), tmp_path / f"{name}.safetensors")
    assert list(find_components(tmp_path / f"{name}.safetensors")) == ["clip_g"]


def test_a_clip_that_nothing_tells_is_what_its_caller_says(tmp_path, states):
    save_file(states["clip_l"], tmp_path / "a.safetensors")
    save_file(states["clip_g"], tmp_path / "b.safetensors")
    assert list(find_components(tmp_path / "a.safetensors")) == ["clip_l"]
    assert list(find_components(tmp_path / "b.safetensors")) == ["clip_g"]
    assert component_of(tmp_path / "b.safetensors", "clip_l").kind == "clip_l"


def test_a_vae_s_attention_is_read_as_linear_or_convolution(tmp_path, states):
    flat = {
        k: v.flatten(1) if ".mid.attn_1." in k and v.ndim == 4 else v
        for k, v in states["vae"].items()
    }
    assert any(v.ndim == 2 for v in flat.values())
    save_file(flat, tmp_path / "vae.safetensors")
    assert same(read_state_dict(component_of(tmp_path / "vae.safetensors", "vae")), states["vae"])


# Folders and shards


def shard(folder, names_per_shard: int = 9, variant: str = "") -> None:
    """Split the weights of a diffusers subfolder into shards with an index."""
    (whole,) = folder.glob("*.safetensors")
    tensors = load_file(whole)
    whole.unlink()
    names = list(tensors)
    chunks = [names[i : i + names_per_shard] for i in range(0, len(names), names_per_shard)]
    weight_map = {}
    for i, chunk in enumerate(chunks):
        file = f"{whole.stem}{variant}-{i + 1:05}-of-{len(chunks):05}.safetensors"
        save_file({name: tensors[name] for name in chunk}, folder / file)
        weight_map |= dict.fromkeys(chunk, file)
    index = folder / f"{whole.name}.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path):
    write_tiny_checkpoint(tmp_path / "sd3", layout="diffusers")
    return tmp_path / "sd3"


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_are_read_through_their_index(folder, states, variant):
    shard(folder / "transformer", variant=variant)
    shard(folder / "text_encoder_3", variant=variant)
    assert same(read_state_dict(component_of(folder, "mmdit")), states["mmdit"])
    assert same(read_state_dict(component_of(folder, "t5")), states["t5"])
    (index,) = (folder / "transformer").glob("*.index*.json")
    assert list(find_components(index)) == ["mmdit"]


def test_a_subfolder_alone_is_enough(folder, states):
    assert list(find_components(folder / "vae")) == ["vae"]
    assert same(
        read_state_dict(component_of(folder / "text_encoder_2", "clip_g")), states["clip_g"]
    )


def test_the_plain_file_is_preferred_to_its_variant(folder):
    plain = folder / "vae" / "diffusion_pytorch_model.safetensors"
    half = folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    save_file({k: v.half() for k, v in load_file(plain).items()}, half)
    assert find_components(folder)["vae"].file == plain
    plain.unlink()
    assert find_components(folder)["vae"].file == half


def test_plain_shards_are_preferred_to_a_whole_variant(folder):
    plain = folder / "text_encoder_3" / "model.safetensors"
    half = {k: v.half() for k, v in load_file(plain).items()}
    shard(folder / "text_encoder_3")
    save_file(half, folder / "text_encoder_3" / "model.fp16.safetensors")
    assert find_components(folder)["t5"].file.name == "model.safetensors.index.json"


@pytest.mark.parametrize("part", ["transformer", "text_encoder_3"])
def test_one_shard_alone_says_what_to_name_instead(folder, part):
    shard(folder / part, names_per_shard=4)
    for file in (folder / part).glob("*-of-*"):
        with pytest.raises(CheckpointError) as caught:
            inspect(file)
        assert "is one shard of several: name the folder they lie in" in str(caught.value), file


def test_a_folder_that_may_not_be_searched_is_one_sentence(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    for read in (find_components, inspect, is_folder, fingerprint):
        with pytest.raises(CheckpointError, match=r"m: cannot be opened: Permission denied\.$"):
            read(tmp_path / "m")


def test_a_folder_that_may_not_be_listed_is_one_sentence(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert complaint(folder).endswith("transformer: cannot be read: Permission denied.")


def test_a_folder_without_transformer_gives_the_rest(folder):
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert "mmdit" not in find_components(folder)
    assert "for example sd3.5_medium.safetensors" in complaint(folder, "mmdit")


def test_a_missing_shard_is_named(folder):
    shard(folder / "transformer")
    next((folder / "transformer").glob("*-00002-of-*")).unlink()
    message = complaint(folder)
    assert "00002-of" in message
    assert "9 tensors is missing" in message


def test_shards_that_lack_what_the_index_promises_are_refused(folder):
    shard(folder / "transformer")
    index = next((folder / "transformer").glob("*.index.json"))
    content = json.loads(index.read_text())
    content["weight_map"]["lost"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    assert "lack 1 tensors (lost)" in complaint(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [1]}', "[" * 10**5]
)
def test_an_index_that_is_none_is_refused(folder, content):
    index = folder / "vae" / "model.safetensors.index.json"
    index.write_text(content)
    assert complaint(index) == f"{index.name}: is no index of safetensors shards."


def test_an_index_may_not_point_out_of_its_folder(folder):
    index = folder / "vae" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../transformer/x.safetensors"}}))
    assert "names a shard outside its folder" in complaint(index)


def test_folders_that_are_no_model_say_what_they_hold(tmp_path):
    assert "needs subfolders like transformer" in complaint(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "holds pickles (model.bin)" in complaint(tmp_path)
    (tmp_path / "some.safetensors").write_bytes(b"x")
    assert "Name one of its files: some.safetensors" in complaint(tmp_path)
    (tmp_path / "unet").mkdir()
    assert "Stable Diffusion 1.x, 2.x or XL" in complaint(tmp_path)


# Other things


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"], "a LoRA"),
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA"),
        (["diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_up.weight"], "a LoRA"),
        (["lora_unet_x.hada_w1_a"], "a LoRA"),
        (["lora_unet_x.lokr_w1"], "a LoRA"),
        (["conditioner.embedders.0.transformer.text_model.a"], "Stable Diffusion XL"),
        (["cond_stage_model.transformer.text_model.a"], "Stable Diffusion 1.x or 2.x"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a U-Net"),
        (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], "a U-Net"),
        (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (
            ["transformer_blocks.0.attn.add_q_proj.weight", "single_transformer_blocks.0.a"],
            "Flux",
        ),
        (["model.double_layers.0.attn.w1q.weight"], "AuraFlow"),
        (["adaln_single.linear.weight"], "PixArt"),
        (["transformer_blocks.0.img_mod.1.weight"], "Qwen-Image"),
        (["noise_refiner.0.attention.qkv.weight"], "Lumina"),
        (["blocks.0.cross_attn.k.weight"], "Wan"),
        (
            ["controlnet_blocks.0.weight", "transformer_blocks.0.attn.add_q_proj.weight"],
            "ControlNet",
        ),
        (["control_model.joint_blocks.0.x_block.attn.qkv.weight"], "ControlNet"),
        (["ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"], "IP-Adapter"),
        (["encoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight"], "a VAE of"),
        (["clip_l", "clip_g"], "textual-inversion"),
        (["vision_model.encoder.layers.0.mlp.fc1.weight"], "CLIP vision"),
        (["transformer.resblocks.0.attn.in_proj_weight"], "OpenCLIP"),
        (["encoder.block.0.layer.1.DenseReluDense.wi.weight"], "T5 of version 1.0"),
        (["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"], "UMT5"),
        (["model.layers.0.self_attn.q_proj.weight"], "a language model"),
        (["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"], "an upscaling model"),
        (["taesd_decoder.1.weight"], "TAESD"),
        (["joint_blocks.0.x_block.attn.qkv.weight.absmax"], "bitsandbytes"),
        (["joint_blocks.0.x_block.attn.qkv.weight_scale_2"], "4 bits"),
        ([], "no tensors"),
        (["something.else"], "no part of Stable Diffusion 3 (1 tensors: something.else)"),
    ],
)
def test_a_file_that_is_something_else_is_called_by_its_name(tmp_path, names, words):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    message = complaint(path)
    assert words in message
    assert message.startswith("model.safetensors: ")
    for load in (load_mmdit, load_vae, load_t5, lambda p: load_clip(p, "clip_l")):
        with pytest.raises(CheckpointError):
            load(path)


def test_a_vae_given_as_denoiser_says_both(tmp_path):
    written = write_tiny_checkpoint(tmp_path / "files", parts=("vae",), layout="bare")
    message = complaint(written["vae"], "mmdit")
    assert message.startswith("vae.safetensors: holds the VAE, not the denoiser (MMDiT).")
    assert "give this file where the VAE belongs" in message
