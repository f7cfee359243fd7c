"""A whole Stable Diffusion 3 a thousand times smaller, written to disk in every layout.

No size is one of the released ones, and CLIP-L and CLIP-G together are narrower than the context,
so that a width taken for granted shows.  Weights follow the golden recipe.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from recipe import recipe_state_dict
from safetensors.torch import save_file
from sd3_pack.sd3_core.adapters.changes import Adapter, LowRank
from sd3_pack.sd3_core.checkpoints.diffusers import to_diffusers
from sd3_pack.sd3_core.checkpoints.lora_files import save_lora
from sd3_pack.sd3_core.models.clip import CLIPConfig, CLIPTextModel
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from sd3_pack.sd3_core.models.t5 import T5Config, T5Encoder
from sd3_pack.sd3_core.models.vae import VAE, VAEConfig
from tiny_tokenizers import clip_vocabulary, t5_vocabulary, write_tiny_tokenizers
from torch import Tensor

PARTS = ("mmdit", "vae", "clip_l", "clip_g", "t5")
SINGLE_FILE_PREFIXES = {
    "mmdit": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
DIFFUSERS_FILES = {
    "mmdit": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "clip_l": "text_encoder/model.safetensors",
    "clip_g": "text_encoder_2/model.safetensors",
    "t5": "text_encoder_3/model.safetensors",
}
DIFFUSERS_CLASSES = {
    "mmdit": "SD3Transformer2DModel",
    "vae": "AutoencoderKL",
    "clip_l": "CLIPTextModelWithProjection",
    "clip_g": "CLIPTextModelWithProjection",
    "t5": "T5EncoderModel",
}

MMDIT = MMDiTConfig(
    depth=2, context_dim=224, pooled_dim=64 + 96, pos_embed_max_size=24, qk_norm=True
)
MMDIT_X = MMDiTConfig(
    depth=3,
    context_dim=224,
    pooled_dim=64 + 96,
    pos_embed_max_size=17,
    qk_norm=True,
    dual_attention_layers=(0, 1),
)
VAE_SIZE = VAEConfig(channels=(32, 32, 64, 64), blocks_per_level=1)
CLIP_L = CLIPConfig(
    hidden_size=64,
    num_layers=3,
    num_heads=1,
    intermediate_size=96,
    vocab_size=len(clip_vocabulary()),
    window=16,
    activation="quick_gelu",
    projection_dim=None,
)
CLIP_G = CLIPConfig(
    hidden_size=128,
    num_layers=2,
    num_heads=2,
    intermediate_size=160,
    vocab_size=len(clip_vocabulary()),
    window=16,
    activation="gelu",
    projection_dim=96,
)
T5 = T5Config(
    d_model=224,
    d_ff=112,
    d_kv=24,
    num_heads=4,
    num_layers=2,
    vocab_size=len(t5_vocabulary()) + 5,  # as in the released one, rows that no token uses
    num_buckets=32,
)
NETWORKS = {
    "mmdit": (MMDiT, MMDIT),
    "vae": (VAE, VAE_SIZE),
    "clip_l": (CLIPTextModel, CLIP_L),
    "clip_g": (CLIPTextModel, CLIP_G),
    "t5": (T5Encoder, T5),
}


METADATA = {"sd3_workbench.shift": "2.0", "sd3_workbench.native_pixels": str(64 * 64)}


def tiny_shapes(parts: Sequence[str] = PARTS) -> dict[str, dict[str, tuple[int, ...]]]:
    """Part -> released name without prefix -> shape."""
    return {part: shapes_of(*NETWORKS[part]) for part in parts}


def shapes_of(network_class, config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = network_class(config)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def tiny_state_dicts(
    parts: Sequence[str] = PARTS, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, dict[str, Tensor]]:
    """Part -> released name without prefix -> weight of the recipe."""
    return {
        part: {k: v.to(dtype) for k, v in recipe_state_dict(shapes, seed).items()}
        for part, shapes in tiny_shapes(parts).items()
    }


def write_tiny_model(folder: Path) -> Path:
    """`folder`/tiny.safetensors, its tokenizers inside and beside it: 64 px, shift 2."""
    write_tiny_tokenizers(folder / "tokenizers")
    path = folder / "tiny.safetensors"
    write_tiny_checkpoint(path, tokenizers=folder / "tokenizers", metadata=METADATA)
    return path


def write_tiny_checkpoint(
    path: Path,
    parts: Sequence[str] = PARTS,
    dtype: torch.dtype = torch.float32,
    layout: str = "single",
    seed: int = 0,
    tokenizers: Path | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Write a tiny model; returns for each part the path to give to its loader.

    layout: "single" (one file `path`), "split" (folder: denoiser and VAE in one file with prefixes,
    the encoders in a file each), "bare" (folder: a file without prefixes for each) or "diffusers"
    (folder with subfolders).  tokenizers: folder of write_tiny_tokenizers, put inside "single"
    as uint8 tensors and into "diffusers" as its tokenizer folders.
    """
    states = tiny_state_dicts(parts, dtype, seed)
    metadata = dict(metadata or {})
    if layout == "single":
        tensors = with_prefixes(states)
        if tokenizers is not None:
            tensors |= tokenizer_tensors(tokenizers)
        save_file(tensors, path, metadata)
        return dict.fromkeys(states, path)
    path.mkdir(parents=True, exist_ok=True)
    if layout == "diffusers":
        return _write_diffusers(path, states, tokenizers)
    files = {"mmdit": "mmdit", "vae": "vae", "clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}
    written: dict[str, Path] = {}
    if layout == "split":
        both = {part: states.pop(part) for part in ("mmdit", "vae") if part in states}
        if both:
            save_file(with_prefixes(both), path / "sd3_tiny.safetensors", metadata)
            written |= dict.fromkeys(both, path / "sd3_tiny.safetensors")
    elif layout != "bare":
        raise ValueError(f"no layout {layout!r}")
    for part, state in states.items():
        written[part] = path / f"{files[part]}.safetensors"
        save_file(state, written[part], metadata)
    return written


def with_prefixes(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all parts under the names of a released single file."""
    return {
        SINGLE_FILE_PREFIXES[part] + name: tensor
        for part, state in states.items()
        for name, tensor in state.items()
    }


def quantised(
    state: Mapping[str, Tensor], spelling: str, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state with scaled fp8 in its linear layers, and the weights that this stands for.

    spelling: "scale_weight" (older), "comfy_quant", or "rows" (the latter, a scale for each row).
    """
    stored, meant = {}, {}
    for i, (key, tensor) in enumerate(state.items()):
        if not key.endswith(".weight") or tensor.ndim != 2:
            stored[key] = meant[key] = tensor
            continue
        module = key.removesuffix(".weight")
        scale = tensor.abs().max() / (200 + i % 200)
        if spelling == "rows":
            scale = tensor.abs().amax(dim=1) / (200 + i % 200)
        factor = scale if scale.ndim == 0 else scale[:, None]
        stored[key] = (tensor / factor).to(dtype)
        meant[key] = stored[key].float() * factor
        if spelling == "scale_weight":
            stored[f"{module}.scale_weight"] = scale
            stored[f"{module}.scale_input"] = torch.tensor(1.0)
        else:
            note = f'{{"format": "{str(dtype).removeprefix("torch.")}"}}'.encode()
            stored[f"{module}.weight_scale"] = scale
            stored[f"{module}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    if spelling == "scale_weight":
        stored["scaled_fp8"] = torch.zeros(2).to(dtype)
    return stored, meant


def write_hollow(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str = "BF16",
    itemsize: int = 2,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A file of the right size that takes no room on the disk: its weights are a hole."""
    if os.name == "nt":
        import pytest  # here, because dev.py's demo writes its model without pytest

        pytest.skip("Windows would reserve the whole size on the disk")
    entries: dict[str, object] = {"__metadata__": dict(metadata or {})}
    position = 0
    for name, shape in shapes.items():
        end = position + torch.Size(shape).numel() * itemsize
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # as every writer does: tensors that lie oddly are copied
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return path


def tokenizer_tensors(folder: Path) -> dict[str, Tensor]:
    """The files of write_tiny_tokenizers as the uint8 tensors of a checkpoint."""
    tensors = {}
    for name, part in (("clip_l", "clip_l"), ("t5xxl", "t5")):
        for file in sorted((folder / part).iterdir()):
            data = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
            tensors[f"text_encoders.{name}.tokenizer.{file.name}"] = data
    return tensors


def _write_diffusers(
    folder: Path, states: Mapping[str, dict[str, Tensor]], tokenizers: Path | None
) -> dict[str, Path]:
    index = {"_class_name": "StableDiffusion3Pipeline"}
    for part, state in states.items():
        file = folder / DIFFUSERS_FILES[part]
        file.parent.mkdir(parents=True, exist_ok=True)
        if part in ("mmdit", "vae"):
            state = {k: v.contiguous() for k, v in to_diffusers(part, state).items()}
        save_file(state, file, {"format": "pt"})
        config = {"_class_name": DIFFUSERS_CLASSES[part]}
        (file.parent / "config.json").write_text(json.dumps(config), encoding="utf-8")
        index[file.parent.name] = DIFFUSERS_CLASSES[part]
    if tokenizers is not None:
        for name, part in (("", "clip_l"), ("_2", "clip_l"), ("_3", "t5")):
            shutil.copytree(tokenizers / part, folder / f"tokenizer{name}")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return dict.fromkeys(states, folder)


def write_tiny_lora(path: Path, width: int = 128) -> Path:
    """A LoRA of rank 2 for the MMDiT and CLIP-L, with weights that show.

    width: of the MMDiT's layers; another one is another model's.
    """
    generator = torch.Generator().manual_seed(2)

    def adapter(module: str, rows: int, columns: int) -> Adapter:
        down = torch.randn(2, columns, generator=generator)
        return Adapter(module, LowRank(down, torch.randn(rows, 2, generator=generator), 2.0))

    save_lora(
        path,
        {
            "mmdit": (adapter("joint_blocks.0.x_block.attn.qkv", 3 * width, width),),
            "clip_l": (adapter("text_model.encoder.layers.0.mlp.fc1", 96, 64),),
        },
    )
    return path
