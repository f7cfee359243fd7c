"""The T5 encoder against the recordings and against transformers."""

import pytest
import torch
from build import with_recipe_weights
from recipe import recipe_state_dict
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.models.t5 import T5Config, T5Encoder, relative_position_bucket


def golden_t5(recorded: dict) -> T5Encoder:
    config = recorded["config"]
    size = T5Config(
        d_model=config["d_model"],
        d_ff=config["d_ff"],
        d_kv=config["d_kv"],
        num_heads=config["num_heads"],
        num_layers=config["num_layers"],
        vocab_size=config["vocab_size"],
        num_buckets=config["relative_attention_num_buckets"],
    )
    return with_recipe_weights(T5Encoder, size, config["SEED"])


@pytest.mark.parametrize("name", ["te_t5_a", "te_t5_b"])
def test_output_equals_the_recording(golden, name):
    expected, recorded = golden(name)
    model = golden_t5(recorded)
    lengths = [key.split(".")[0] for key in expected if key.endswith("input_ids")]
    assert lengths
    for length in lengths:
        hidden = model(expected[f"{length}.input_ids"].long())
        torch.testing.assert_close(
            hidden[..., ::4], expected[f"{length}.last_hidden"], atol=5e-5, rtol=0
        )


def test_buckets_equal_the_recording(golden):
    expected, _ = golden("units")
    buckets = relative_position_bucket(expected["t5_bucket.relative_position"], num_buckets=32)
    assert torch.equal(buckets, expected["t5_bucket.bucket"])


def test_output_equals_transformers_at_other_sizes():
    transformers = pytest.importorskip("transformers")
    config = T5Config(
        d_model=40, d_ff=56, d_kv=12, num_heads=3, num_layers=3, vocab_size=60, num_buckets=16
    )
    theirs = transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=40,
            d_ff=56,
            d_kv=12,
            num_heads=3,
            num_layers=3,
            vocab_size=60,
            relative_attention_num_buckets=16,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    shapes = {name: tuple(t.shape) for name, t in theirs.state_dict().items()}
    theirs.load_state_dict(recipe_state_dict(shapes, seed=4))
    ours = with_recipe_weights(T5Encoder, config, seed=4)
    ids = torch.arange(150).reshape(2, 75) % 60
    with torch.no_grad():
        # transformers masks what looks like padding; SD3 masks nothing
        reference = theirs(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        torch.testing.assert_close(ours(ids), reference, atol=5e-5, rtol=0)


def test_sizes_are_read_back_from_their_shapes():
    config = T5Config(
        d_model=40, d_ff=56, d_kv=12, num_heads=3, num_layers=2, vocab_size=60, num_buckets=16
    )
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in T5Encoder(config).state_dict().items()}
    assert T5Config.from_shapes(shapes) == config


def test_shapes_of_another_network_are_refused():
    with pytest.raises(CheckpointError, match="no T5"):
        T5Config.from_shapes({"text_projection.weight": (10, 4)})
