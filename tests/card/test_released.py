"""The released sizes on cards of real sizes, shapes alone: what fits, and what a decoding costs."""

import pytest
import torch
from pretend_card import on_card, pretend_card
from released import OTHERS, write_denoiser, write_other
from sd3_pack.sd3_core.generate import decode, generate
from sd3_pack.sd3_core.settings import Files, Settings, make_plan
from tiny_tokenizers import write_tiny_tokenizers

GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    write_tiny_tokenizers(folder / "tokenizers")
    for part in OTHERS:
        write_other(folder, part)
    return folder


def files_of(folder, name: str) -> Files:
    others = {part: folder / f"{part}.safetensors" for part in OTHERS}
    return Files(mmdit=write_denoiser(folder, name), tokenizers=folder / "tokenizers", **others)


def draw(folder, name: str) -> None:
    generate(files_of(folder, name), Settings("a red circle", device="cuda", steps=2))


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("SD3.5 Medium", 12),
        pytest.param("SD3 Medium", 12, marks=pytest.mark.long),
        pytest.param("SD3.5 Large", 24, marks=pytest.mark.long),
        ("SD3.5 Medium", 8),
    ],
)
def test_a_whole_picture_fits_where_the_largest_network_does(folder, name, gigabytes):
    """Text encoders (T5 in 16 bits among them), denoiser and VAE, one after the other."""
    with pretend_card(gigabytes, numbers=False, kernels=True) as card:
        draw(folder, name)
        assert card.peak <= gigabytes * GIB
        assert card.live == 0


def test_one_that_does_not_fit_says_so_and_leaves_nothing(folder):
    with pretend_card(8, numbers=False, kernels=True) as card:
        with pytest.raises(Exception, match="(?i)memory"):
            draw(folder, "SD3.5 Large")
        assert card.live == 0


# --- decoding ---------------------------------------------------------------------------------


def decoded(folder, gigabytes: float, device="cuda:0", dtype="bf16", lacks=()):
    """(launches, arithmetic, waits in it, the card's peak in GiB) of decoding 1024 x 1024."""
    with pretend_card(gigabytes, device=device, numbers=False, lacks=lacks) as card:
        settings = Settings("", device=device, dtype=dtype, width=1024, height=1024)
        plan = make_plan(files_of(folder, "SD3.5 Medium"), settings)
        with torch.inference_mode():
            decode(plan, on_card((1, 16, 128, 128)))
        counts = card.counts
        launches = counts.launches - counts.kernels["copy from the CPU"].launches
        waits = sum(n for place, n in counts.waits.items() if "stripes.py" in place)
        return launches, counts.flops, waits, card.peak / GIB


def test_a_picture_is_decoded_whole_where_there_is_room(folder):
    launches, flops, waits, peak = decoded(folder, 24)
    assert launches <= 160
    assert flops < 10.5e12
    assert waits == 0
    assert peak < 2.1


def test_a_picture_is_decoded_in_stripes_where_there_is_little(folder):
    _, _, waits, peak = decoded(folder, 0.8)
    assert peak <= 0.8
    assert waits == 0


@pytest.mark.parametrize("device", ["mps:0", "xpu:0"])
def test_a_large_picture_is_decoded_without_float64(folder, device):
    decoded(folder, 2.5, device, "fp32", lacks=[torch.float64])
