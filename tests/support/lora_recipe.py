"""The recorded LoRA files, made from the seeded recipe; `fingerprint` tells that they are the same.

W' = W + strength * (alpha / rank) * up @ down;  up = 0.3 * normal("lora_up." + module),
down = normal("lora_down." + module) / sqrt(fan_in).  One change in four dialects.
"""

import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from recipe import normal
from torch import Tensor

DIFFUSERS = {  # written out, so that the test does not trust the table it tests
    "context_embedder": "context_embedder",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
Factors = dict[str, tuple[np.ndarray, np.ndarray]]  # module -> (up, down)


def factors(description: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> Factors:
    """shapes: of the model's parameters."""
    rank, seed = description["rank"], description["seed"]
    made: Factors = {}
    for module in description["targets"]:
        outputs, *inputs = shapes[f"{module}.weight"]
        up = normal(f"lora_up.{module}", (outputs, rank, *[1] * (len(inputs) - 1)), seed)
        down = normal(f"lora_down.{module}", (rank, *inputs), seed)
        scale = np.float32(math.sqrt(math.prod(inputs)))
        made[module] = (np.float32(0.3) * up, down / scale)
    return made


def lora_file(dialect: str, description: Mapping, shapes: Mapping) -> dict[str, Tensor]:
    """kohya, kohya_split_qkv, diffusers_peft or comfy_generic."""
    made = factors(description, shapes)
    if dialect == "diffusers_peft":
        tensors = _diffusers(made, description)
    else:
        tensors = _native(dialect, made, description)
    return {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}


def _native(dialect: str, made: Factors, description: Mapping) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for module, (up, down) in made.items():
        if dialect == "comfy_generic":
            name = f"diffusion_model.{module}"
        else:
            name = "lora_unet_" + module.replace(".", "_")
        if dialect == "kohya_split_qkv" and module.endswith("qkv"):
            parts = np.split(up, 3)
            zero = np.zeros_like(parts[0])
            blocks = [[parts[i] if i == j else zero for j in range(3)] for i in range(3)]
            up, down = np.block(blocks), np.concatenate([down] * 3)
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.alpha"] = np.float32(description["alpha"])
    if dialect == "comfy_generic":
        for module, role, size in (("attn.ln_q", "diff", 64), ("attn.qkv", "diff_b", 576)):
            path = f"joint_blocks.0.x_block.{module}"
            value = normal(f"lora_{role}.{path}", (size,), description["seed"])
            tensors[f"diffusion_model.{path}.{role}"] = np.float32(0.1) * value
    return tensors


def _diffusers(made: Factors, description: Mapping) -> dict[str, np.ndarray]:
    """PEFT's names; the scale is in B, since the file has no alpha."""
    last = f"joint_blocks.{description['model']['depth'] - 1}.context_block.adaLN_modulation.1"
    tensors: dict[str, np.ndarray] = {}
    for module, (up, down) in made.items():
        up = up * np.float32(description["alpha"] / description["rank"])
        if module in (last, "final_layer.adaLN_modulation.1"):
            up = np.concatenate(np.split(up, 2)[::-1])
        block, own = "", module
        if module.startswith("joint_blocks."):
            _, index, own = module.split(".", 2)
            block = f"transformer_blocks.{index}."
        theirs = DIFFUSERS[own]
        theirs = (theirs,) if isinstance(theirs, str) else theirs
        for name, rows in zip(theirs, np.split(up, len(theirs)), strict=True):
            tensors[f"transformer.{block}{name}.lora_A.weight"] = down
            tensors[f"transformer.{block}{name}.lora_B.weight"] = rows
    return tensors


def fingerprint(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 over names and values, in the names' order."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().numpy().tobytes(), value)
        value = zlib.crc32(name.encode(), value)
    return value
