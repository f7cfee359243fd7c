"""Generated files under the names that the shipped workflows ask for, small enough for a CPU."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from recipe import recipe_state_dict
from released_widths import ENCODERS, MMDIT, prefixed
from safetensors.torch import save_file
from sample_pictures import save_texture
from sd3_pack.sd3_core.models.mmdit import MMDiT
from sd3_pack.sd3_core.models.vae import VAE, VAEConfig
from tiny import VAE_SIZE, tokenizer_tensors
from tiny_tokenizers import write_tiny_tokenizers
from torch import Tensor

NATIVE_PIXELS = 128 * 128
# Skip-layer guidance leaves out the blocks 7, 8 and 9.  ComfyUI's own loader, which takes this file
# too, knows the VAE at its released size alone.
MEDIUM = ("sd3.5_medium", replace(MMDIT, depth=10), VAEConfig())
OTHERS = ("sd3_medium_incl_clips", "sd3.5_large", "sd3.5_large_turbo")
FILE_OF = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl_fp16"}


def write_shipped_files(folder: Path) -> None:
    """folder: of a server, with models/ and input/ in it."""
    models = folder / "models"
    write_tiny_tokenizers(folder / "tokenizers")
    tokenizers = tokenizer_tensors(folder / "tokenizers")
    for name, mmdit, vae in (MEDIUM, *((name, MMDIT, VAE_SIZE) for name in OTHERS)):
        tensors = {**half("mmdit", MMDiT, mmdit), **half("vae", VAE, vae)}
        if name.endswith("_incl_clips"):
            tensors |= half("clip_l", *ENCODERS["clip_l"]) | half("clip_g", *ENCODERS["clip_g"])
            tensors |= tokenizers
        save(models / "checkpoints" / f"{name}.safetensors", tensors)
    for kind, file in FILE_OF.items():
        tensors = half(kind, *ENCODERS[kind]) | tokenizers
        save(models / "text_encoders" / f"{file}.safetensors", tensors)
    save(models / "loras" / "my_style.safetensors", lora(MEDIUM[1].hidden_size))
    name = "sd3.5_large_controlnet_canny.safetensors"
    save(models / "controlnet" / name, controlnet(MMDIT.hidden_size))
    save_texture(folder / "input" / "example.png", 256, 192)


def half(kind: str, network_class, config) -> dict[str, Tensor]:
    return prefixed(kind, network_class, config, dtype=torch.float16)


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    metadata = {"sd3_workbench.native_pixels": str(NATIVE_PIXELS)}
    save_file(dict(tensors), path, metadata)


def lora(width: int, rank: int = 4) -> dict[str, Tensor]:
    """One layer, in PEFT's names."""
    layer = "diffusion_model.joint_blocks.0.x_block.attn.proj"
    shapes = {f"{layer}.lora_A.weight": (rank, width), f"{layer}.lora_B.weight": (width, rank)}
    return recipe_state_dict(shapes, seed=7)


def controlnet(width: int) -> dict[str, Tensor]:
    """Stability's kind for SD3.5 Large, with one block; Canny edges are its type 1."""
    linear = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, 2048),
        "y_embedder.mlp.2": (width, width),
        "transformer_blocks.0.attn.qkv": (3 * width, width),
        "transformer_blocks.0.attn.proj": (width, width),
        "transformer_blocks.0.mlp.fc1": (4 * width, width),
        "transformer_blocks.0.mlp.fc2": (width, 4 * width),
        "transformer_blocks.0.adaLN_modulation.1": (6 * width, width),
        "controlnet_blocks.0": (width, width),
        "x_embedder.proj": (width, 16, 2, 2),
        "pos_embed_input.proj": (width, 16, 2, 2),
    }
    shapes = {f"{layer}.weight": shape for layer, shape in linear.items()}
    shapes |= {f"{layer}.bias": shape[:1] for layer, shape in linear.items()}
    return {**recipe_state_dict(shapes, seed=7), "control_type": torch.tensor([1.0])}
