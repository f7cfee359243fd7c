"""Starting noise equals ComfyUI's, and disturbs nobody else's random numbers."""

import pytest
import torch
from recorded import assert_as_recorded
from sd3_pack.sd3_core.noise import noise, noise_per_image

SEED = 23  # of the recordings in `units`


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_is_one_draw_bit_for_bit(golden, batch):
    expected = golden("units")[0][f"noise.batch{batch}_16x4x6"]
    assert_as_recorded(noise((batch, 16, 4, 6), SEED), expected)


def test_batch_index_picks_pictures_drawn_one_by_one(golden):
    expected = golden("units")[0]["noise.comfy_batch_index_0_3"]
    assert_as_recorded(noise((2, 16, 4, 6), SEED, batch_index=[0, 3]), expected)


def test_batch_index_may_repeat_and_reorder():
    drawn = noise((3, 4, 2, 2), SEED, batch_index=[2, 0, 2])
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1:2], noise((1, 4, 2, 2), SEED))


def test_seeds_per_image_give_the_noise_of_images_made_alone():
    drawn = noise_per_image((2, 16, 4, 6), [5, 6])
    assert torch.equal(drawn[0:1], noise((1, 16, 4, 6), 5))
    assert torch.equal(drawn[1:2], noise((1, 16, 4, 6), 6))


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    noise((1, 16, 4, 6), SEED)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_every_seed_of_comfyui_works(seed):
    expected = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(noise((1, 2, 3, 3), seed), expected)


def test_a_seed_beyond_64_bits_is_an_error():
    with pytest.raises(ValueError, match=r"seed is 18446744073709551616; it must lie between 0"):
        noise((1, 2, 3, 3), 2**64)


@pytest.mark.parametrize("batch_index", [[0], [0, -1]])
def test_a_batch_index_that_does_not_fit_is_an_error(batch_index):
    with pytest.raises(ValueError, match="for a batch of 2; give one number per picture"):
        noise((2, 2, 3, 3), SEED, batch_index)


def test_a_missing_seed_is_an_error():
    with pytest.raises(ValueError, match="1 seeds for a batch of 2; give one per picture"):
        noise_per_image((2, 2, 3, 3), [5])
