"""One ComfyUI for this folder, on the CPU, with small generated models."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfy_server import HAS_COMFYUI, Server, lay_out, serve
from recipe import recipe_state_dict
from safetensors.torch import load_file, save_file
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from tiny import MMDIT, SINGLE_FILE_PREFIXES, shapes_of, write_tiny_checkpoint
from tiny_tokenizers import write_tiny_tokenizers

METADATA = {"sd3_workbench.shift": "2.0", "sd3_workbench.native_pixels": str(64 * 64)}


def pytest_ignore_collect(collection_path: Path):
    """Nothing to test where there is no ComfyUI; tests/nodes says so."""
    return None if HAS_COMFYUI else True


def write_models(folder: Path) -> None:
    """Good files and bad ones, in models/ of a server's folder.

    checkpoints/tiny.safetensors, also as sub/folder/nested.safetensors: everything.
    checkpoints/broken.safetensors is torn, infinite.safetensors overflows, no_text.safetensors
    holds no text encoder.  diffusion_models/wide.safetensors takes wider prompts than tiny's,
    large.safetensors (300 MB) fits them.  loras/flux.safetensors is another model's.
    outside.safetensors, beside models/, must never be read.
    """
    checkpoints = folder / "models" / "checkpoints"
    write_tiny_tokenizers(folder / "tokenizers")
    tiny = checkpoints / "tiny.safetensors"
    write_tiny_checkpoint(tiny, tokenizers=folder / "tokenizers", metadata=METADATA)
    (checkpoints / "sub" / "folder").mkdir(parents=True)
    shutil.copy(tiny, checkpoints / "sub" / "folder" / "nested.safetensors")
    shutil.copy(tiny, folder / "outside.safetensors")
    (checkpoints / "broken.safetensors").write_bytes(tiny.read_bytes()[:100_000])
    tensors = load_file(tiny)
    last = SINGLE_FILE_PREFIXES["mmdit"] + "final_layer.linear.bias"
    save_file({**tensors, last: tensors[last] * float("inf")}, checkpoints / "infinite.safetensors")
    textless = {name: value for name, value in tensors.items() if "text_encoders" not in name}
    save_file(textless, checkpoints / "no_text.safetensors")
    write_tiny_checkpoint(folder / "bare", layout="bare", parts=("vae",))
    shutil.move(folder / "bare" / "vae.safetensors", folder / "models/vae/tiny_vae.safetensors")
    wide = recipe_state_dict(shapes_of(MMDiT, MMDiTConfig(depth=2, pos_embed_max_size=24)), seed=0)
    save_file(wide, folder / "models/diffusion_models/wide.safetensors")
    save_file(large_denoiser(), folder / "models/diffusion_models/large.safetensors")
    layer = "transformer.single_transformer_blocks.0.attn.to_q"
    flux = {
        f"{layer}.lora_A.weight": torch.ones(4, 64),
        f"{layer}.lora_B.weight": torch.ones(64, 4),
    }
    save_file(flux, folder / "models" / "loras" / "flux.safetensors")


def large_denoiser() -> dict[str, torch.Tensor]:
    """300 MB that fit tiny.safetensors' text encoders; one stretch of noise, over and over."""
    generator = torch.Generator().manual_seed(0)
    stretch = 0.02 * torch.randn(10_007, generator=generator)
    shapes = shapes_of(MMDiT, replace(MMDIT, depth=8))
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    return {
        name: stretch.repeat(-(-size // len(stretch)))[:size].reshape(shapes[name])
        for name, size in sizes.items()
    }


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    lay_out(folder)
    write_models(folder)
    with serve(folder) as running:
        yield running
