"""Files of diffusers and transformers in ours, ours in theirs: the same outputs, both ways."""

import pytest
import torch
from recipe import recipe_state_dict
from safetensors.torch import load_file, save_file
from sd3_pack.sd3_core.checkpoints.diffusers import to_diffusers
from sd3_pack.sd3_core.checkpoints.layouts import find_components
from sd3_pack.sd3_core.checkpoints.load import load_clip, load_mmdit, load_t5, load_vae
from sd3_pack.sd3_core.checkpoints.save import export_checkpoint
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from tiny import MMDIT_X, VAE_SIZE, shapes_of, tiny_state_dicts

diffusers = pytest.importorskip("diffusers", reason="NO DIFFUSERS: its loaders are not compared")
transformers = pytest.importorskip("transformers")

SIZES = {
    "SD3": MMDiTConfig(3, context_dim=80, pooled_dim=48, pos_embed_max_size=20),
    "SD3.5 Large": MMDiTConfig(
        2, context_dim=80, pooled_dim=48, pos_embed_max_size=20, qk_norm=True
    ),
    "SD3.5 Medium": MMDiTConfig(
        3,
        context_dim=80,
        pooled_dim=48,
        pos_embed_max_size=20,
        qk_norm=True,
        dual_attention_layers=(0, 1),
    ),
}


def their_mmdit(config: MMDiTConfig):
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=16,
        num_layers=config.depth,
        attention_head_dim=64,
        num_attention_heads=config.depth,
        joint_attention_dim=config.context_dim,
        caption_projection_dim=config.hidden_size,
        pooled_projection_dim=config.pooled_dim,
        pos_embed_max_size=config.pos_embed_max_size,
        qk_norm="rms_norm" if config.qk_norm else None,
        dual_attention_layers=config.dual_attention_layers,
    ).eval()


def their_vae():
    torch.manual_seed(0)
    levels = len(VAE_SIZE.channels)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=VAE_SIZE.channels,
        layers_per_block=VAE_SIZE.blocks_per_level,
        latent_channels=VAE_SIZE.latent_channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def velocities(ours, theirs) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 12, 8, generator=draw)
    timestep = torch.tensor([3.0, 700.0])
    context = torch.randn(2, 7, 80, generator=draw)
    pooled = torch.randn(2, 48, generator=draw)
    with torch.no_grad():
        return ours(x, timestep, context, pooled), theirs(x, context, pooled, timestep).sample


def pictures(ours, theirs) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 16, 24, generator=draw) * 2 - 1
    with torch.no_grad():
        mean, their_mean = ours.encode(image).mean, theirs.encode(image).latent_dist.mean
        decoded = ours.decode(mean), theirs.decode(their_mean).sample
    return torch.cat([mean.flatten(), decoded[0].flatten()]), torch.cat(
        [their_mean.flatten(), decoded[1].flatten()]
    )


def assert_same(pair: tuple[torch.Tensor, torch.Tensor], tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(*pair, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shards", [None, "300KB"], ids=["whole", "sharded"])
def test_a_transformer_saved_by_diffusers_computes_the_same_here(tmp_path, size, shards):
    theirs = their_mmdit(SIZES[size])
    theirs.save_pretrained(
        tmp_path / "transformer", **({"max_shard_size": shards} if shards else {})
    )
    ours = load_mmdit(tmp_path)
    assert ours.config == SIZES[size]
    assert_same(velocities(ours, theirs))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_vae_saved_by_diffusers_computes_the_same_here(tmp_path, variant):
    theirs = their_vae()
    theirs.save_pretrained(tmp_path / "vae", variant=variant)
    ours = load_vae(tmp_path)
    assert ours.config == VAE_SIZE
    assert_same(pictures(ours, theirs), 5e-5)


def test_text_encoders_saved_by_transformers_compute_the_same_here(tmp_path):
    torch.manual_seed(0)
    size = {
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 1,
        "max_position_embeddings": 16,
        "bos_token_id": 1,
        "eos_token_id": 5,
    }
    clip_l = transformers.CLIPTextModel(transformers.CLIPTextConfig(**size)).eval()
    clip_g = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**size, projection_dim=48, hidden_act="gelu")
    ).eval()
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=200,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=5,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    for name, encoder in (("", clip_l), ("_2", clip_g), ("_3", t5)):
        encoder.save_pretrained(tmp_path / f"text_encoder{name}")
    ids = torch.randint(6, 200, (2, 16))
    ids[:, 9] = 5
    with torch.no_grad():
        for kind, theirs in (("clip_l", clip_l), ("clip_g", clip_g)):
            out = theirs(ids, output_hidden_states=True)
            ours = load_clip(tmp_path, kind)(ids, 5)
            pooled = out.text_embeds if kind == "clip_g" else out.pooler_output
            assert_same((ours.hidden, out.hidden_states[-2]))
            assert_same((ours.pooled, pooled))
        assert_same((load_t5(tmp_path)(ids), t5(ids).last_hidden_state), 5e-5)


@pytest.mark.parametrize("size", SIZES)
def test_diffusers_reads_our_export_of_its_own_folder(tmp_path, size):
    theirs = their_mmdit(SIZES[size])
    theirs.save_pretrained(tmp_path / "sd3" / "transformer")
    path = export_checkpoint(tmp_path / "sd3.safetensors", find_components(tmp_path / "sd3"))
    again = diffusers.SD3Transformer2DModel.from_single_file(
        path, config=str(tmp_path / "sd3"), subfolder="transformer"
    ).eval()
    wanted, found = theirs.state_dict(), again.state_dict()
    assert wanted.keys() == found.keys()
    assert all(found[key].equal(wanted[key]) for key in wanted)


def test_diffusers_reads_our_export_of_its_own_vae(tmp_path):
    theirs = their_vae()
    theirs.save_pretrained(tmp_path / "sd3" / "vae")
    path = export_checkpoint(tmp_path / "vae.safetensors", find_components(tmp_path / "sd3"))
    again = diffusers.AutoencoderKL.from_single_file(
        path, config=str(tmp_path / "sd3"), subfolder="vae"
    ).eval()
    wanted, found = theirs.state_dict(), again.state_dict()
    assert wanted.keys() == found.keys()
    assert all(found[key].equal(wanted[key]) for key in wanted)


@pytest.mark.parametrize("size", SIZES)
def test_our_names_become_theirs_without_rest(size):
    theirs = their_mmdit(SIZES[size])
    state = recipe_state_dict(shapes_of(MMDiT, SIZES[size]), seed=1)
    theirs.load_state_dict(to_diffusers("mmdit", state), strict=True)
    ours = MMDiT(SIZES[size])
    ours.load_state_dict(state)
    assert_same(velocities(ours, theirs))


def test_our_vae_s_names_become_theirs_without_rest():
    their_vae().load_state_dict(to_diffusers("vae", tiny_state_dicts(("vae",))["vae"]), strict=True)


def test_there_and_back_is_the_same_to_the_bit(tmp_path):
    state = recipe_state_dict(shapes_of(MMDiT, MMDIT_X), seed=2)
    theirs = {key: tensor.contiguous() for key, tensor in to_diffusers("mmdit", state).items()}
    save_file(theirs, tmp_path / "diffusion_pytorch_model.safetensors")
    path = export_checkpoint(tmp_path / "x.safetensors", find_components(tmp_path))
    back = load_file(path)
    assert {key.removeprefix("model.diffusion_model.") for key in back} == set(state)
    assert all(back[f"model.diffusion_model.{key}"].equal(state[key]) for key in state)
