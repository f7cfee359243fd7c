"""cuda:1 while cuda:0 is current, which is where Triton starts its kernels, whatever they read.

A kernel that starts on the wrong card fails, and the code then computes without it and says why.
"""

import pytest
import torch
from pretend_card import pretend_card
from sd3_pack.sd3_core.embedded.drawing import Painter
from sd3_pack.sd3_core.generate import generate
from sd3_pack.sd3_core.models import fused
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from sd3_pack.sd3_core.settings import Files, Settings

pytest.importorskip("triton")

SECOND = torch.device("cuda", 1)


def settings(**more) -> Settings:
    return Settings("a red circle", device="cuda:1", width=32, height=32, steps=1, cfg=1.0, **more)


def draw(model):
    generate(Files(checkpoint=model), settings())


def paint(model):
    Painter(Files(checkpoint=model), settings())(["a red circle"], 1)


def validate(model):
    """As training's validation and samples do: the network, and nothing that chooses a card."""
    network = MMDiT(MMDiTConfig(depth=1, context_dim=64, pooled_dim=64, pos_embed_max_size=8))
    network = network.requires_grad_(False).to(SECOND)
    given = ((1, 16, 8, 8), (1,), (1, 3, 64), (1, 64))
    with torch.no_grad():
        network(*(torch.zeros(shape, device=SECOND) for shape in given))


@pytest.mark.parametrize("work", [draw, paint, validate])
def test_the_kernels_serve_on_the_second_card(tiny_model, work):
    with pretend_card(8, device="cuda:1", numbers=False, kernels=True) as card:
        work(tiny_model)
        assert fused.why_not(SECOND) == ""
        assert card.counts.kernels["_norm_modulate"].launches > 0
        assert torch.cuda.current_device() == 0
