"""One sampling step at the released sizes, bf16, 256 px, weights generated (about 5 GB on disk)."""

import gc

import pytest
import torch
from safetensors.torch import save_file
from sd3_pack.sd3_core.checkpoints.diffusers import to_diffusers
from sd3_pack.sd3_core.checkpoints.load import load_mmdit
from sd3_pack.sd3_core.conditioning import Conditioning
from sd3_pack.sd3_core.guidance import classifier_free
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig, position_table
from sd3_pack.sd3_core.noise import noise
from sd3_pack.sd3_core.samplers import euler

SIZES = {
    "sd3_medium": MMDiTConfig(depth=24),
    "sd3.5_medium": MMDiTConfig(
        depth=24,
        pos_embed_max_size=384,
        qk_norm=True,
        dual_attention_layers=tuple(range(13)),
    ),
}


def generated_weights(config: MMDiTConfig) -> dict[str, torch.Tensor]:
    """bf16, scaled to keep activations near one; the recipe's float32 would take minutes."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in MMDiT(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        if name == "pos_embed":
            size = config.pos_embed_max_size
            state[name] = position_table(config.hidden_size, size, base=64).bfloat16()
        elif name.endswith((".ln_q.weight", ".ln_k.weight")):
            state[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            fan_in = max(shape[1:].numel(), 1) if len(shape) > 1 else 2500
            state[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(
                0, fan_in**-0.5, generator=generator
            )
    return state


@pytest.mark.long
@pytest.mark.parametrize("family", SIZES)
def test_one_guided_step_at_full_size_agrees_with_diffusers(family, tmp_path):
    """bf16 carries 8 bits: two orders of the same sums part by a few percent after 24 blocks."""
    diffusers = pytest.importorskip("diffusers")
    config = SIZES[family]
    path = tmp_path / f"{family}.safetensors"
    state = generated_weights(config)
    save_file({f"model.diffusion_model.{name}": value for name, value in state.items()}, path)
    del state
    gc.collect()
    generator = torch.Generator().manual_seed(1)
    prompts = [
        Conditioning(
            torch.randn(1, 154, 4096, generator=generator).bfloat16(),
            torch.randn(1, 2048, generator=generator).bfloat16(),
        )
        for _ in range(2)
    ]
    x = noise((1, 16, 32, 32), seed=1)
    with torch.inference_mode():
        model = load_mmdit(path, dtype=torch.bfloat16)
        assert model.config == config
        velocity = classifier_free(model, *prompts, 4.5)
        x0 = euler(velocity, x, torch.tensor([1.0, 0.0]))
        del velocity

        theirs = diffusers_model(diffusers, config, model)
        outputs = [
            theirs(
                hidden_states=x.bfloat16(),
                encoder_hidden_states=prompt.context,
                pooled_projections=prompt.pooled,
                timestep=torch.tensor([1000.0]),
                return_dict=False,
            )[0].float()
            for prompt in prompts
        ]
    reference = x - (outputs[1] + (outputs[0] - outputs[1]) * 4.5)
    assert x0.isfinite().all()
    error = (x0 - reference).pow(2).mean().sqrt() / reference.pow(2).mean().sqrt()
    assert error < 0.05


def diffusers_model(diffusers, config: MMDiTConfig, ours: MMDiT):
    """diffusers' transformer on the same memory."""
    with torch.device("meta"):
        theirs = diffusers.SD3Transformer2DModel(
            sample_size=128,
            num_layers=config.depth,
            attention_head_dim=64,
            num_attention_heads=config.depth,
            joint_attention_dim=4096,
            caption_projection_dim=config.hidden_size,
            pooled_projection_dim=2048,
            pos_embed_max_size=config.pos_embed_max_size,
            dual_attention_layers=config.dual_attention_layers,
            qk_norm="rms_norm" if config.qk_norm else None,
        )
    theirs.load_state_dict(to_diffusers("mmdit", ours.state_dict()), strict=True, assign=True)
    return theirs.eval()
