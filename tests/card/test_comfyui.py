"""ComfyUI with the released sizes on cards of 6 to 24 GB, however it manages their memory."""

import pytest
from comfy_on_card import COMFYUI, outcomes
from step_counts import recorded

pytestmark = pytest.mark.skipif(
    not (COMFYUI / "comfy").is_dir(), reason="needs a ComfyUI checkout: set COMFYUI_PATH"
)

MODELS = ("SD3 Medium", "SD3.5 Medium", "SD3.5 Large")
SIZES = (6, 8, 12, 16, 24)  # GB
LATENTS_AND_RESULTS = 2.5  # GiB that a card needs beside its weights


NEEDED = 2.7  # GiB: SD3.5 Medium's weights without those that the table stands in for


@pytest.fixture(scope="module")
def few():
    """Static and dynamic memory, in one process."""
    return outcomes(
        [
            {"model": "SD3.5 Medium", "gigabytes": 8},
            {"model": "SD3.5 Medium", "gigabytes": 24, "dynamic": 3.5},
        ]
    )


def test_nothing_stays_on_the_card(few):
    assert [case["left"] for case in few] == [0, 0]


def test_it_fits(few):
    assert all(case["fits"] for case in few)
    assert all(case["peak"] <= case["gigabytes"] for case in few)


def test_a_step_starts_no_more_kernels_than_recorded(few):
    assert few[0]["launches"] <= recorded()["SD3.5 Medium"]["ours"].launches


def test_with_room_for_all_weights_none_is_carried(few):
    assert few[0]["carried"] < 0.1


def test_dynamic_vram_drops_first_what_the_table_stands_in_for(few):
    """Those weights fill what room is left, and no other one is carried for their sake."""
    assert 0 < few[1]["idle"] < 3.5 - NEEDED
    assert few[1]["carried"] < 0.01


def test_no_step_waits_for_the_card_beyond_comfyuis_own(few):
    ours = [place for place in few[0]["waits"] if "/nodes/" in place or "sd3_core/" in place]
    assert ours == []


@pytest.mark.long
@pytest.mark.parametrize("vram", ["normal", "low", "no"])
@pytest.mark.parametrize("model", MODELS)
def test_every_size_of_card_draws(model, vram):
    found = outcomes([{"model": model, "gigabytes": size, "vram": vram} for size in SIZES])
    assert [case["fits"] for case in found] == [True] * len(SIZES)
    assert [case["left"] for case in found] == [0] * len(SIZES)
    carried = [case["carried"] for case in found]
    assert carried == sorted(carried, reverse=True)  # a larger card carries no more


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_dynamic_vram_carries_no_more_than_comfyuis_own_network(model):
    cases = [
        {"model": model, "gigabytes": size, "dynamic": max(size - LATENTS_AND_RESULTS, 1)}
        for size in SIZES
    ]
    ours = outcomes(cases)
    native = outcomes([{**case, "arm": "native"} for case in cases])
    for mine, theirs in zip(ours, native, strict=True):
        assert mine["fits"]
        assert mine["left"] == 0
        assert mine["carried"] <= theirs["carried"] + 0.01
