"""Thousands of damaged files: each ends in one CheckpointError or in a right load, and at once."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recipe import recipe_state_dict
from safetensors.torch import load_file, save
from sd3_pack.sd3_core.checkpoints.diffusers import to_diffusers
from sd3_pack.sd3_core.checkpoints.inspect import inspect
from sd3_pack.sd3_core.checkpoints.layouts import Component, find_components
from sd3_pack.sd3_core.checkpoints.load import load_clip, load_mmdit, load_t5, load_vae
from sd3_pack.sd3_core.checkpoints.sources import Source
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.models.cast import Scaled
from sd3_pack.sd3_core.models.clip import CLIPConfig, CLIPTextModel
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from sd3_pack.sd3_core.models.t5 import T5Config, T5Encoder
from sd3_pack.sd3_core.models.vae import VAE, VAEConfig
from tiny import SINGLE_FILE_PREFIXES, quantised, shapes_of

TRIALS = 100  # of each kind of damage; `long` runs twenty-five times as many
SECONDS = 10  # of this process: one file takes milliseconds; this would be a hang

SMALLEST = {
    "mmdit": (MMDiT, MMDiTConfig(1, context_dim=6, pooled_dim=5, pos_embed_max_size=2)),
    "vae": (VAE, VAEConfig(channels=(32, 32), blocks_per_level=1, latent_channels=2)),
    "clip_l": (CLIPTextModel, CLIPConfig(64, 1, 1, 8, 9, 4, "quick_gelu", None)),
    "clip_g": (CLIPTextModel, CLIPConfig(64, 1, 1, 8, 9, 4, "gelu", 7)),
    "t5": (T5Encoder, T5Config(8, 6, 4, 2, 1, 9, 32)),
}
LOADERS: dict[str, Callable] = {
    "mmdit": load_mmdit,
    "vae": load_vae,
    "clip_l": lambda where: load_clip(where, "clip_l"),
    "clip_g": lambda where: load_clip(where, "clip_g"),
    "t5": load_t5,
}
Tensors = dict[str, torch.Tensor]


def small_files() -> list[Tensors]:
    """A single file of the small parts, each part without prefix, two under diffusers' names."""
    states = {
        kind: {k: v.half() for k, v in recipe_state_dict(shapes_of(*size), seed=0).items()}
        for kind, size in SMALLEST.items()
    }
    single = {
        SINGLE_FILE_PREFIXES[kind] + name: tensor
        for kind, state in states.items()
        for name, tensor in state.items()
        if kind != "vae"  # it is the largest, and comes by itself
    }
    theirs = [to_diffusers(kind, states[kind]) for kind in ("mmdit", "vae")]
    scaled = [quantised(theirs[0], "rows")[0], quantised(states["t5"], "scale_weight")[0]]
    return [single, *states.values(), *theirs, *scaled]


FILES = small_files()
WHOLE = [save({k: v.contiguous().clone() for k, v in tensors.items()}) for tensors in FILES]


# Damage to the bytes


def flip_header_bytes(draw: random.Random) -> bytes:
    data = bytearray(draw.choice(WHOLE))
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(draw.choice((1, 1, 2, 8))):
        data[draw.randrange(end)] = draw.randrange(256)
    return bytes(data)


def cut(draw: random.Random) -> bytes:
    data = draw.choice(WHOLE)
    end = 8 + int.from_bytes(data[:8], "little")
    return data[: draw.randrange(draw.choice((9, end, len(data))))]


def grow_or_overwrite(draw: random.Random) -> bytes:
    data = draw.choice(WHOLE)
    junk = draw.randbytes(draw.choice((1, 8, 4096)))
    at = draw.choice((0, 8, len(data), draw.randrange(len(data))))
    return data[:at] + junk + data[at + draw.choice((0, len(junk))) :]


def change_length(draw: random.Random) -> bytes:
    data = draw.choice(WHOLE)
    length = int.from_bytes(data[:8], "little") + draw.choice((-64, -8, -1, 1, 8, 64, 2**20, 2**40))
    return (length % 2**64).to_bytes(8, "little") + data[8:]


def noise(draw: random.Random) -> bytes:
    start = draw.choice((b"", b"PK\x03\x04", b"\x80\x02", b"GGUF", b"<html>", b"\x10" + bytes(7)))
    return start + draw.randbytes(draw.choice((0, 1, 7, 9, 1000)))


# Damage to the header's meaning

JUNK = (
    None,
    True,
    -1,
    0,
    1.5,
    2**31,
    2**63,
    10**30,
    "",
    "F32",
    [],
    [[]],
    {},
    [0],
    [-1],
    [2**62, 4],
)


def lie_in_header(draw: random.Random) -> bytes:
    data = draw.choice(WHOLE)
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])
    for _ in range(draw.choice((1, 1, 2, 5))):
        _lie(draw, entries)
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def _lie(draw: random.Random, entries: dict) -> None:
    names = [name for name in entries if name != "__metadata__"]
    if len(names) < 2:
        return
    one, other = draw.sample(names, 2)
    field = draw.choice(("dtype", "shape", "data_offsets"))
    match draw.randrange(10):
        case 0:
            entries[one][field] = draw.choice(JUNK)
        case 1:
            entries[one][field], entries[other][field] = entries[other][field], entries[one][field]
        case 2:
            entries[one], entries[other] = entries[other], entries[one]
        case 3:
            del entries[one]
        case 4:
            entries[draw.choice(("x", one + "x", one[1:], "a\nb", "__metadata__"))] = entries[one]
        case 5:
            entries[draw.choice(("x", one.upper(), "model." + one))] = entries.pop(one)
        case 6 if isinstance(entries[one].get("shape"), list):
            draw.shuffle(entries[one]["shape"])
        case 7 if isinstance(shape := entries[one].get("shape"), list) and shape:
            shape[0] = draw.choice(JUNK)
        case 8:
            entries[one] = draw.choice(JUNK)
        case _:
            entries["__metadata__"] = draw.choice((*JUNK, {"a": "b"}, {"a": 1}, {"a": {}}))
    entries.setdefault(one, {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]})
    if not isinstance(entries[one], dict) or not isinstance(entries.get(other), dict):
        entries.pop(one), entries.pop(other, None)


# A good file with the wrong things in it

STRANGE_NAMES = (
    "extra",
    "joint_blocks.0.x_block.attn.qkv.lora_up.weight",
    "lora_unet_x.lora_down.weight",
    "lora_unet_x.alpha",
    "joint_blocks.7.x_block.attn.ln_q.weight",
    "encoder.block.5.layer.0.layer_norm.weight",
    "text_model.encoder.layers.x.mlp.fc1.weight",
    "encoder.down.1.attn.0.q.weight",
    "quant_conv.weight",
    "transformer_blocks.0.attn.add_q_proj.weight",
    "scaled_fp8",
    "logit_scale",
    "embeddings.token_embedding.weight",
    "shared.weight_scale",
    "context_embedder.scale_weight",
    "context_embedder.comfy_quant",
)


def swap_tensors(draw: random.Random) -> bytes:
    tensors = dict(draw.choice(FILES))
    for _ in range(draw.choice((1, 1, 2, 4))):
        _change(draw, tensors)
    return save_copies(tensors)


def _change(draw: random.Random, tensors: Tensors) -> None:
    names = list(tensors)
    one, other = draw.choice(names), draw.choice(names)
    match draw.randrange(9):
        case 0 | 1:
            tensors[one], tensors[other] = tensors[other], tensors[one]
        case 2:
            del tensors[one]
        case 3:
            shape = draw.choice(
                ((), (0,), (1,), (3, 0, 2), (2, 2), (64,), (1, 4, 64), (2, 2, 2, 2, 2))
            )
            tensors[one] = torch.zeros(shape)
        case 4:
            kind = draw.choice((torch.int8, torch.uint8, torch.bool, torch.float64, torch.bfloat16))
            tensors[one] = tensors[one].float().to(kind)
        case 5:
            tensors[one] = tensors[one].float().clamp(-400, 400).to(torch.float8_e4m3fn)
        case 6:
            tensors[one] = tensors[one].T if tensors[one].ndim == 2 else tensors[one].flatten()
        case 7:
            strange = draw.choice(("", *SINGLE_FILE_PREFIXES.values())) + draw.choice(STRANGE_NAMES)
            tensors[strange] = torch.ones(draw.choice(((), (1,), (64,), (4, 4))))
        case _:
            tensors[draw.choice(("a.", "model.", "first_stage_model.")) + one] = tensors.pop(one)


def mix_files(draw: random.Random) -> bytes:
    first, second = draw.choice(FILES), draw.choice(FILES)
    share = draw.random()
    mixed = {name: tensor for name, tensor in first.items() if draw.random() < share}
    prefix = draw.choice(("", "vae.", "x."))
    more = {prefix + k: t for k, t in second.items() if draw.random() < max(share, 0.9)}
    return save_copies(mixed | more)


def save_copies(tensors: Tensors) -> bytes:
    return save({name: tensor.contiguous().clone() for name, tensor in tensors.items()})


DAMAGE = (
    flip_header_bytes,
    cut,
    grow_or_overwrite,
    change_length,
    noise,
    lie_in_header,
    swap_tensors,
    mix_files,
)


def check_right(component: Component, stored: Tensors) -> None:
    """The network's weights are those that the format's own library reads."""
    network = LOADERS[component.kind](component)
    for name, parameter in network.state_dict().items():
        source = component.sources[name]
        wanted = meant(source, stored).reshape(parameter.shape)
        found = parameter.float()
        module = network.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Scaled) and module.scale is not None and name.endswith(".weight"):
            found = found * module.scale
        assert parameter.dtype == source.dtype
        assert found.nan_to_num().equal(wanted.nan_to_num()), name


def meant(source: Source, stored: Tensors) -> torch.Tensor:
    """The float32 weight that these stored parts stand for, row by row."""
    scales = source.scales or (None,) * len(source.parts)
    parts = []
    for part, scale in zip(source.parts, scales, strict=True):
        weight = stored[part.key].float()
        if scale is not None:
            factor = stored[scale.key].float().flatten()
            weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        parts.append(weight)
    rows = torch.cat(parts) if len(parts) > 1 else parts[0]
    half = len(rows) // 2 if source.swapped else 0
    return torch.cat([rows[half:], rows[:half]]) if half else rows


def attempt(path: Path) -> str:
    """Try all there is to do with the file; returns how it ended."""
    errors = []
    try:
        components = find_components(path)
    except CheckpointError as error:
        components = {}
        errors.append(str(error))
    stored = load_file(path) if components else {}
    for component in components.values():
        try:
            check_right(component, stored)
        except CheckpointError as error:
            errors.append(str(error))
    try:
        assert inspect(path).lines()
    except CheckpointError as error:
        errors.append(str(error))
    for message in errors:
        assert path.name in message
        assert "\n" not in message
        assert message.isprintable()
        assert len(message) < 1200
    return "refused" if errors else "loaded"


def run(path: Path, damage: Callable[[random.Random], bytes], seeds: range) -> set[str]:
    ends = set()
    for seed in seeds:
        path.write_bytes(damage(random.Random(seed)))
        began = time.process_time()
        try:
            ends.add(attempt(path))
        except Exception as error:
            raise AssertionError(f"{damage.__name__} with seed {seed}") from error
        assert time.process_time() - began < SECONDS, f"{damage.__name__} with seed {seed} hangs"
    return ends


def test_the_undamaged_files_load(tmp_path):
    for index, data in enumerate(WHOLE):
        (tmp_path / f"{index}.safetensors").write_bytes(data)
        assert attempt(tmp_path / f"{index}.safetensors") == "loaded"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_end_in_one_error_or_a_right_load(tmp_path, damage):
    assert "refused" in run(tmp_path / "damaged.safetensors", damage, range(TRIALS))


@pytest.mark.long
@pytest.mark.parametrize("damage", DAMAGE)
def test_twenty_five_times_as_many(tmp_path, damage):
    run(tmp_path / "damaged.safetensors", damage, range(TRIALS, 26 * TRIALS))
