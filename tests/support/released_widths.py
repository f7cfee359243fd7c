"""Networks as wide as the released ones, so that ComfyUI's own classes load them, and shallow."""

import torch
from recipe import recipe_state_dict
from sd3_pack.sd3_core.models.clip import CLIPConfig, CLIPTextModel
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from sd3_pack.sd3_core.models.t5 import T5Config, T5Encoder
from tiny import SINGLE_FILE_PREFIXES, shapes_of
from tiny_tokenizers import clip_vocabulary, t5_vocabulary
from torch import Tensor

MMDIT = MMDiTConfig(depth=2, pos_embed_max_size=24, qk_norm=True, dual_attention_layers=(0,))
ENCODERS = {
    "clip_l": (
        CLIPTextModel,
        CLIPConfig(768, 3, 12, 64, len(clip_vocabulary()), 77, "quick_gelu", None),
    ),
    "clip_g": (
        CLIPTextModel,
        CLIPConfig(1280, 3, 20, 64, len(clip_vocabulary()), 77, "gelu", 1280),
    ),
    "t5": (T5Encoder, T5Config(4096, 64, 64, 2, 2, len(t5_vocabulary()), 32)),
}
RELEASED_WIDTHS = {"mmdit": (MMDiT, MMDIT), **ENCODERS}


def prefixed(kind: str, network_class, config, seed: int = 7, dtype=torch.float32):
    """A network's generated weights under the names of a released single file."""
    state: dict[str, Tensor] = recipe_state_dict(shapes_of(network_class, config), seed)
    return {SINGLE_FILE_PREFIXES[kind] + name: value.to(dtype) for name, value in state.items()}
