"""What the README counts is so."""

from pathlib import Path

import torch
from sd3_pack.sd3_core.models.clip import CLIPConfig, CLIPTextModel
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from sd3_pack.sd3_core.models.t5 import T5Config, T5Encoder
from sd3_pack.sd3_core.models.vae import VAE, VAEConfig

PACK = Path(__file__).parent.parent
README = (PACK / "README.md").read_text(encoding="utf-8")

RELEASED = {  # read off the released files' tensors
    "SD3 Medium": (MMDiT, MMDiTConfig(depth=24)),
    "SD3.5 Medium": (
        MMDiT,
        MMDiTConfig(
            depth=24,
            pos_embed_max_size=384,
            qk_norm=True,
            dual_attention_layers=tuple(range(13)),
        ),
    ),
    "SD3.5 Large and Large Turbo": (MMDiT, MMDiTConfig(depth=38, qk_norm=True)),
    "T5": (T5Encoder, T5Config(4096, 10240, 64, 64, 24, 32128, 32)),
    "CLIP-G": (CLIPTextModel, CLIPConfig(1280, 32, 20, 5120, 49408, 77, "gelu", 1280)),
    "CLIP-L": (CLIPTextModel, CLIPConfig(768, 12, 12, 3072, 49408, 77, "quick_gelu", None)),
    "VAE": (VAE, VAEConfig()),
}


def table_row(name: str, network_class, config) -> str:
    with torch.device("meta"):
        network = network_class(config)
    count = sum(tensor.numel() for tensor in network.state_dict().values()) / 1e9
    return f"| {name} | {count:.1f} billion | {2 * count:.1f} GB | {count:.1f} GB |"


def test_the_table_of_weights_is_counted():
    for name, (network_class, config) in RELEASED.items():
        assert table_row(name, network_class, config) in README
