"""Pictures on a pretended card: what the CPU draws, no wait in the loop, nothing left behind."""

import functools
from collections import Counter

import pytest
import torch
from PIL import Image
from pretend_card import pretend_card
from sd3_pack.sd3_core.errors import OutOfMemory
from sd3_pack.sd3_core.generate import generate
from sd3_pack.sd3_core.samplers import SAMPLERS
from sd3_pack.sd3_core.settings import Files, Settings
from tiny import write_tiny_lora

STEPS = 4
NO_FLOAT64 = [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]

OPTIONS = {
    "cfg 1": {"cfg": 1.0},
    "cfg in a part": {"cfg_start": 0.2, "cfg_end": 0.7},
    "skip-layer": {"skip_scale": 2.0, "skip_layers": (1,), "skip_start": 0.0, "skip_end": 1.0},
    "batch": {"batch": 2},
    "a seed for each": {"batch": 2, "seed_each": True},
    "no T5": {"use": ("clip_l", "clip_g")},
    "auto shift": {"shift": "auto"},
}


@pytest.fixture(scope="module")
def draw(tiny_model, tmp_path_factory):
    """draw(device, on_step, lora, **settings) -> uint8 [B, H, W, 3]."""
    lora = write_tiny_lora(tmp_path_factory.mktemp("lora") / "lora.safetensors")

    def draw(device, on_step=None, with_lora=False, **more):
        files = Files(checkpoint=tiny_model, loras=((lora, 1.0),) if with_lora else ())
        wanted = {"dtype": "fp32", "steps": STEPS, "sampler": "euler", **more}
        settings = Settings("a (red:1.3) circle", device=device, **wanted)
        return generate(files, settings, on_step).pixels.float()

    return draw


@pytest.fixture(scope="module")
def plain(draw):
    """The CPU's pictures, each drawn once."""
    return functools.cache(lambda **more: draw("cpu", **more))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A picture and a mask of the size that the tiny model draws."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (64, 64), (200, 40, 40)).save(folder / "init.png")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    mask.save(folder / "mask.png")
    return folder


def check(card, ours, cpu):
    assert (ours - cpu).abs().max() <= 1
    assert card.live == 0
    assert not card.counts.hazards


def on_card(draw, cpu, device="cuda", lacks=(), **more) -> Counter:
    """Draw on a card and compare; returns where the host waits in the third step."""
    seen = []
    with pretend_card(8, device=device, lacks=lacks) as card:
        ours = draw(device, lambda step: seen.append(card.counts.copy()), **more)
        check(card, ours, cpu)
    return seen[2].since(seen[1]).waits


@pytest.mark.parametrize(
    "sampler",
    SAMPLERS,
)
def test_every_sampler_draws_what_the_cpu_draws_and_never_waits(draw, plain, sampler):
    assert on_card(draw, plain(sampler=sampler), sampler=sampler) == {}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_draws_what_the_cpu_draws_and_never_waits(draw, plain, options):
    assert on_card(draw, plain(**options), **options) == {}


def test_a_lora_acts_on_the_card(draw, plain):
    with_lora = draw("cpu", with_lora=True)
    assert (with_lora - plain()).abs().max() > 1
    assert on_card(draw, with_lora, with_lora=True) == {}


@pytest.mark.parametrize("masked", [False, True], ids=["image-to-image", "inpainting"])
def test_it_starts_from_a_picture(draw, picture, masked):
    more = {"init": picture / "init.png", "denoise": 0.6}
    more |= {"mask": picture / "mask.png"} if masked else {}
    assert on_card(draw, draw("cpu", **more), **more) == {}


def test_the_step_cache_serves_as_on_the_cpu_and_waits_once_a_step(draw, plain):
    more = {"steps": 6, "step_cache": 0.3}
    assert on_card(draw, plain(**more), **more).total() == 1


@pytest.mark.parametrize("capability", [(8, 9), (7, 5)], ids=["bf16", "fp16"])
def test_it_computes_in_the_precision_of_its_capability(draw, plain, capability):
    with pretend_card(8, capability=capability) as card:
        ours = draw("cuda", dtype="auto")
        assert card.live == 0
        assert not card.counts.hazards
    assert (ours - plain()).abs().mean() < 10


def test_float8_multiplies_where_the_card_can_and_is_refused_where_not(draw, plain):
    with pretend_card(8) as card:
        ours = draw("cuda", dtype="bf16", fp8=True)
        assert card.counts.kernels["_scaled_mm"].launches > 0
    assert (ours - plain()).abs().mean() < 20
    with pretend_card(8, capability=(8, 6)), pytest.raises(ValueError, match="8.9"):
        draw("cuda", dtype="bf16", fp8=True)


def test_the_second_card_is_used_alone(draw, plain):
    assert on_card(draw, plain(), device="cuda:1") == {}


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_makers_cards_draw_the_same(draw, plain, device):
    assert on_card(draw, plain(), device=device, lacks=NO_FLOAT64) == {}


def test_a_full_card_says_so_and_the_next_run_works(draw, plain):
    with pretend_card(gigabytes=0.001) as card:
        with pytest.raises(OutOfMemory, match="the memory is full"):
            draw("cuda")
        assert card.live == 0
        card.capacity = 2**30
        check(card, draw("cuda"), plain())
