"""Each encoder's place in a Conditioning."""

import pytest
import torch
from sd3_pack.sd3_core.conditioning import Conditioning
from sd3_pack.sd3_core.training.layout import States, sd3_layout, without
from tiny import CLIP_G, CLIP_L, T5

SIZES = {"context_dim": 224, "pooled_dim": 160, "window": 16, "t5_length": 20}


@pytest.fixture
def layout():
    return sd3_layout({"clip_l": CLIP_L, "clip_g": CLIP_G}, T5, **SIZES)


def ones(layout, batch=1):
    return Conditioning(
        torch.ones(batch, layout.length, layout.width), torch.ones(batch, layout.pooled)
    )


def test_what_is_placed_is_taken_again(layout):
    states = {
        "clip_l": States(torch.randn(16, 64), torch.randn(64)),
        "clip_g": States(torch.randn(16, 128), torch.randn(96)),
        "t5": States(torch.randn(20, 224), torch.zeros(0)),
    }
    placed = layout.place(states)
    assert placed.context.shape == (1, 36, 224)
    for name, expected in states.items():
        taken = layout.take(placed, name)
        torch.testing.assert_close(taken.context, expected.context, rtol=0, atol=0)
        torch.testing.assert_close(taken.pooled, expected.pooled, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dropped", "context", "pooled"),
    [("clip_l", 16 * 64, 64), ("clip_g", 16 * 128, 96), ("t5", 20 * 224, 0)],
)
def test_dropping_an_encoder_clears_its_part_and_no_other(layout, dropped, context, pooled):
    whole = ones(layout, batch=2)
    less = without(whole, layout, {dropped})
    assert (less.context == 0).sum() == 2 * context
    assert (less.pooled == 0).sum() == 2 * pooled
    assert whole.context.min() == 1  # the given one is left alone


def test_dropping_all_leaves_nothing_but_what_nobody_fills(layout):
    less = without(ones(layout), layout, {"clip_l", "clip_g", "t5"})
    assert less.pooled.max() == 0
    assert less.context.sum() == 16 * (224 - 64 - 128)


def test_a_missing_encoder_has_no_place_and_cannot_be_dropped():
    layout = sd3_layout({"clip_g": CLIP_G}, None, **SIZES)
    assert set(layout.spans) == {"clip_g"}
    assert layout.spans["clip_g"].columns == (64, 192)  # as if CLIP-L were there
    less = without(ones(layout), layout, {"t5", "clip_l"})
    assert less.context.min() == 1
