"""Stable Diffusion 3 at its released sizes, in files that take no room: shapes without weights."""

from pathlib import Path

from sd3_pack.sd3_core.models.clip import CLIPConfig, CLIPTextModel
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from sd3_pack.sd3_core.models.t5 import T5Config, T5Encoder
from sd3_pack.sd3_core.models.vae import VAE, VAEConfig
from tiny import SINGLE_FILE_PREFIXES, shapes_of, write_hollow

DENOISERS = {
    "SD3 Medium": MMDiTConfig(depth=24),
    "SD3.5 Medium": MMDiTConfig(
        depth=24,
        pos_embed_max_size=384,
        qk_norm=True,
        dual_attention_layers=tuple(range(13)),
    ),
    "SD3.5 Large": MMDiTConfig(depth=38, qk_norm=True),
}
OTHERS = {
    "vae": (VAE, VAEConfig()),
    "clip_l": (CLIPTextModel, CLIPConfig(768, 12, 12, 3072, 49408, 77, "quick_gelu", None)),
    "clip_g": (CLIPTextModel, CLIPConfig(1280, 32, 20, 5120, 49408, 77, "gelu", 1280)),
    "t5": (T5Encoder, T5Config(4096, 10240, 64, 64, 24, 32128, 32)),
}


def write_denoiser(folder: Path, name: str) -> Path:
    """The MMDiT of this release in bf16."""
    shapes = shapes_of(MMDiT, DENOISERS[name])
    return write_hollow(folder / f"{name}.safetensors", prefixed("mmdit", shapes), "BF16")


def write_other(folder: Path, part: str) -> Path:
    """The VAE in bf16, or a text encoder in fp16."""
    shapes = prefixed(part, shapes_of(*OTHERS[part]))
    dtype = "BF16" if part == "vae" else "F16"
    return write_hollow(folder / f"{part}.safetensors", shapes, dtype)


def prefixed(part: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {SINGLE_FILE_PREFIXES[part] + name: shape for name, shape in shapes.items()}
