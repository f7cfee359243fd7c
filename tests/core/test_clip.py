"""CLIP's text towers against the recordings and against transformers."""

import pytest
import torch
from build import with_recipe_weights
from recipe import recipe_state_dict
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.models.clip import CLIPConfig, CLIPTextModel


def golden_clip(recorded: dict, which: str) -> CLIPTextModel:
    config = recorded["config"]
    size = CLIPConfig(
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        window=config["max_position_embeddings"],
        activation=config["hidden_act"],
        projection_dim=None if which == "clip_l" else config["hidden_size"],
    )
    return with_recipe_weights(CLIPTextModel, size, config["SEED"])


@pytest.mark.parametrize("which", ["clip_l", "clip_g"])
def test_output_equals_the_recording(golden, which):
    expected, recorded = golden(f"te_{which}")
    output = golden_clip(recorded, which)(expected["input_ids"].long(), eos_id=49407)
    torch.testing.assert_close(output.hidden[..., ::8], expected["sd3_hidden"], atol=2e-5, rtol=0)
    torch.testing.assert_close(output.pooled, expected["sd3_pooled"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("which", ["clip_l", "clip_g"])
def test_output_equals_transformers(which):
    transformers = pytest.importorskip("transformers")
    config = CLIPConfig(
        hidden_size=128,
        num_layers=3,
        num_heads=2,
        intermediate_size=96,
        vocab_size=50,
        window=20,
        activation="quick_gelu" if which == "clip_l" else "gelu",
        projection_dim=None if which == "clip_l" else 72,
    )
    theirs = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=50,
            hidden_size=128,
            intermediate_size=96,
            projection_dim=72,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=20,
            hidden_act=config.activation,
            eos_token_id=49,
            bos_token_id=48,
        )
    ).eval()
    ours = with_recipe_weights(CLIPTextModel, config, seed=8)
    shapes = {name: tuple(t.shape) for name, t in theirs.state_dict().items()}
    theirs.load_state_dict(recipe_state_dict(shapes, seed=8))
    ids = torch.tensor([[48, 3, 4, 5, 49, 49, 49], [48, 7, 49, 0, 0, 0, 0]])
    with torch.no_grad():
        reference = theirs(ids, output_hidden_states=True)
        output = ours(ids, eos_id=49)
    torch.testing.assert_close(output.hidden, reference.hidden_states[-2], atol=2e-5, rtol=0)
    if which == "clip_g":  # transformers projects both towers, SD3 only bigG
        torch.testing.assert_close(output.pooled, reference.text_embeds, atol=2e-5, rtol=0)


def test_tokens_after_the_end_do_not_change_the_pooled_vector(golden):
    _, recorded = golden("te_clip_g")
    model = golden_clip(recorded, "clip_g")
    ids = torch.tensor([[49406, 320, 49407, 0, 0], [49406, 320, 49407, 49407, 5]])
    output = model(ids, eos_id=49407)
    torch.testing.assert_close(output.pooled[0], output.pooled[1], atol=1e-6, rtol=0)
    assert not torch.equal(output.hidden[0], output.hidden[1])


@pytest.mark.parametrize("which", ["clip_l", "clip_g"])
def test_sizes_are_read_back_from_their_shapes(which):
    config = CLIPConfig(
        hidden_size=192,
        num_layers=2,
        num_heads=3,
        intermediate_size=100,
        vocab_size=33,
        window=12,
        activation="quick_gelu" if which == "clip_l" else "gelu",
        projection_dim=None if which == "clip_l" else 80,
    )
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in CLIPTextModel(config).state_dict().items()}
    assert CLIPConfig.from_shapes(shapes, which) == config
    assert config.pooled_dim == (192 if which == "clip_l" else 80)


def test_shapes_of_another_network_are_refused():
    with pytest.raises(CheckpointError, match="no clip_l"):
        CLIPConfig.from_shapes({"shared.weight": (10, 4)}, "clip_l")
