"""Real PEFT adapters on a small SD3 of diffusers: saved as PEFT and diffusers save, and merged."""

import copy
import json
import warnings

import torch
from safetensors.torch import save_file
from sd3_pack.sd3_core.checkpoints.diffusers import to_diffusers

TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "ff.net.0.proj", "ff.net.2"),
    *("norm1.linear", "norm1_context.linear", "norm_out.linear", "context_embedder", "proj_out"),
]
CONVOLUTION = "pos_embed.proj"


def base_model(diffusers, model):
    """diffusers' twin of an MMDiT of ours."""
    config = model.config
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=config.depth,
        attention_head_dim=64,
        num_attention_heads=config.depth,
        joint_attention_dim=config.context_dim,
        caption_projection_dim=config.hidden_size,
        pooled_projection_dim=config.pooled_dim,
        out_channels=16,
        pos_embed_max_size=config.pos_embed_max_size,
        dual_attention_layers=config.dual_attention_layers,
        qk_norm="rms_norm",
    )
    theirs.load_state_dict(to_diffusers("mmdit", model.state_dict()), strict=True)
    return theirs


def trained(peft, base, config, name="default"):
    """A PeftModel whose adapter has learnt something, at random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in made.named_parameters():
            if "magnitude" in key:
                value.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator))
            elif any(part in key for part in ("lora_", "hada_", "lokr_")):
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return made


def merged(made):
    """The weights that PEFT merges, by diffusers' names."""
    return {k: v.detach() for k, v in made.merge_and_unload().state_dict().items()}


def save_with_header(made, path, prefix="transformer."):
    """As diffusers' save_lora_weights: the settings as JSON in the header."""
    tensors = {
        prefix + key.removeprefix("base_model.model."): value.contiguous()
        for key, value in _adapter_state(made).items()
    }
    settings = {prefix + key: value for key, value in made.peft_config["default"].to_dict().items()}
    text = json.dumps(settings, default=_plain, indent=2, sort_keys=True)
    save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": text})
    return path


def _adapter_state(made):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(made)


def _plain(value):
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))
