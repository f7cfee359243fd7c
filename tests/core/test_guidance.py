"""Guidance: its formulas, which branches run, and how much of the network each of them costs."""

import pytest
import torch
from build import recipe_tensor, with_recipe_weights
from sd3_pack.sd3_core.conditioning import Conditioning
from sd3_pack.sd3_core.guidance import (
    SkipLayers,
    classifier_free,
    classifier_free_guidance,
    inpaint,
    latent_mask,
    note_on_cfg,
    plain,
    run_branches,
    skip_layer_guidance,
)
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from sd3_pack.sd3_core.noise import noise
from sd3_pack.sd3_core.samplers import SAMPLERS, euler
from sd3_pack.sd3_core.schedule import Schedule, Window
from torch.testing import assert_close

CONFIG = MMDiTConfig(
    depth=4,
    context_dim=32,
    pooled_dim=16,
    pos_embed_max_size=8,
    qk_norm=True,
    dual_attention_layers=(0,),
)
NEVER = Window(high=0.0, low=1.0)
# A batch of another size rounds otherwise: 2e-6 or so in each branch, times the weights of cfg 4.5
# and skip-layer 2.5, which add up to 13.  Measured up to 2.1e-5.
GUIDED = 5e-5


@pytest.fixture(scope="module")
def model():
    return with_recipe_weights(MMDiT, CONFIG, 7)


def prompt(name: str, batch: int = 1, length: int = 6) -> Conditioning:
    return Conditioning(
        recipe_tensor(f"{name}.context", (batch, length, CONFIG.context_dim), 1),
        recipe_tensor(f"{name}.pooled", (batch, CONFIG.pooled_dim), 1),
    )


def latents(batch: int = 2) -> torch.Tensor:
    return noise((batch, 16, 6, 8), 3)


def level(sigma: float, batch: int = 2) -> torch.Tensor:
    return torch.full((batch,), sigma)


class Work:
    """Counts the batch rows that each joint block computes, and notes the lengths of the texts."""

    def __init__(self, model: MMDiT):
        self.rows, self.lengths = [0] * model.config.depth, []
        self.hooks = [
            block.register_forward_pre_hook(lambda _, args, i=i: self.count(i, args))
            for i, block in enumerate(model.joint_blocks)
        ]

    def count(self, index, args):
        self.rows[index] += args[0].shape[0]
        if index == 0:
            self.lengths.append(args[1].shape[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("cfg", "told"),
    [
        (0.0, "cfg is 0: the prompt does not count"),
        (0.5, "cfg is 0.5: the picture is drawn towards the negative prompt"),
        (-1.0, "cfg is -1: the picture is drawn away from the prompt"),
        (1.0, ""),
        (4.5, ""),
    ],
)
def test_a_guidance_scale_below_one_is_told(cfg, told):
    assert note_on_cfg(cfg).startswith(told)
    assert bool(note_on_cfg(cfg)) == bool(told)


def test_classifier_free_guidance_is_linear_in_the_scale():
    positive, negative = noise((2, 1, 4, 3), 1).double()
    at = {scale: classifier_free_guidance(positive, negative, scale) for scale in (0, 1, 2, 7.5)}
    assert_close(at[0], negative)
    assert_close(at[1], positive)
    assert_close(at[7.5] - at[0], 7.5 * (at[1] - at[0]))
    assert_close(at[2] - at[1], positive - negative)


def test_skip_layer_guidance_moves_away_from_the_skipped_branch():
    guided, positive, skipped = noise((3, 1, 4, 3), 1).double()
    moved = skip_layer_guidance(guided, positive, skipped, 2.5)
    assert_close(moved, guided + 2.5 * positive - 2.5 * skipped)
    assert torch.equal(skip_layer_guidance(guided, positive, positive, 2.5), guided)


def test_guidance_on_velocities_is_guidance_on_denoised_latents():
    x, positive, negative = noise((3, 1, 4, 3), 1).double()
    sigma = 0.7
    on_x0 = classifier_free_guidance(x - sigma * positive, x - sigma * negative, 4.5)
    assert_close(on_x0, x - sigma * classifier_free_guidance(positive, negative, 4.5))


def test_a_plain_velocity_is_the_networks(model):
    x, sigma, positive = latents(), level(0.6), prompt("a", 2)
    expected = model(x, 1000 * sigma, positive.context, positive.pooled)
    assert torch.equal(plain(model, positive)(x, sigma), expected)


@pytest.mark.parametrize("negative_length", [6, 9])
def test_cfg_combines_both_prompts(model, negative_length):
    x, sigma = latents(), level(0.6)
    positive, negative = prompt("a"), prompt("b", length=negative_length)
    expected = classifier_free_guidance(
        plain(model, positive)(x, sigma), plain(model, negative)(x, sigma), 4.5
    )
    guided = classifier_free(model, positive, negative, 4.5)(x, sigma)
    assert_close(guided, expected, atol=GUIDED, rtol=0)


def test_cfg_one_runs_the_positive_branch_and_nothing_else(model):
    x, sigma, positive = latents(), level(0.6), prompt("a")
    with Work(model) as work:
        guided = classifier_free(model, positive, prompt("b"), 1.0)(x, sigma)
    assert work.rows == [2, 2, 2, 2]
    assert torch.equal(guided, plain(model, positive)(x, sigma))


def test_prompts_of_one_length_share_a_batch(model):
    with Work(model) as work:
        classifier_free(model, prompt("a"), prompt("b"), 4.5)(latents(), level(0.6))
    assert work.lengths == [6]
    assert work.rows == [4, 4, 4, 4]


def test_prompts_of_different_length_run_one_after_the_other_unpadded(model):
    with Work(model) as work:
        classifier_free(model, prompt("a"), prompt("b", length=9), 4.5)(latents(), level(0.6))
    assert work.lengths == [6, 9]
    assert work.rows == [4, 4, 4, 4]


@pytest.mark.parametrize("negative_length", [6, 9])
def test_a_batch_of_two_equals_two_batches_of_one(model, negative_length):
    skip = SkipLayers((1,), 2.5)
    positive, negative = prompt("a", 2), prompt("b", length=negative_length)
    together = classifier_free(model, positive, negative, 4.5, skip=skip)(latents(), level(0.6))
    for i in range(2):
        own = Conditioning(positive.context[i : i + 1], positive.pooled[i : i + 1])
        alone = classifier_free(model, own, negative, 4.5, skip=skip)(
            latents()[i : i + 1], level(0.6, 1)
        )
        assert_close(together[i : i + 1], alone, atol=GUIDED, rtol=0)


def test_each_image_may_be_at_its_own_noise_level(model):
    """As in training and validation; a window is then judged by the first."""
    sigma = torch.tensor([0.3, 0.8])
    velocity = classifier_free(model, prompt("a"), prompt("b"), 4.5)
    together = velocity(latents(), sigma)
    for i in range(2):
        alone = velocity(latents()[i : i + 1], sigma[i : i + 1])
        assert_close(together[i : i + 1], alone, atol=GUIDED, rtol=0)


def test_outside_its_window_cfg_costs_nothing(model):
    x, positive = latents(), prompt("a")
    velocity = classifier_free(model, positive, prompt("b"), 4.5, window=Window(0.8, 0.4))
    for sigma in (0.81, 0.39):
        with Work(model) as work:
            assert torch.equal(velocity(x, level(sigma)), plain(model, positive)(x, level(sigma)))
        assert work.rows[0] == 2 + 2  # ours, and the plain one it is compared with
    with Work(model) as work:
        velocity(x, level(0.6))
    assert work.rows[0] == 4


def test_a_guidance_interval_is_told_in_percent_of_the_run(model):
    schedule = Schedule(3.0)
    sigmas = schedule.sigmas(10, "simple")
    window = schedule.window(0.2, 0.6)
    with Work(model) as work:
        euler(
            classifier_free(model, prompt("a"), prompt("b"), 4.5, window=window), latents(), sigmas
        )
    guided = sum(sigma in window for sigma in sigmas[:-1].tolist())
    assert 0 < guided < 10
    assert work.rows[0] == 2 * 10 + 2 * guided


@pytest.mark.parametrize("layers", [(1,), (0,), (3,), (1, 2), (2, 1), (0, 2), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize(("cfg", "negative_length"), [(1.0, 6), (4.0, 6), (4.0, 9)])
def test_skip_layer_guidance_equals_a_pass_of_its_own(model, layers, cfg, negative_length):
    x, sigma = latents(), level(0.6)
    positive, negative = prompt("a", 2), prompt("b", 2, negative_length)
    skipped = model(x, 1000 * sigma, positive.context, positive.pooled, skip_layers=layers)
    expected = skip_layer_guidance(
        classifier_free(model, positive, negative, cfg)(x, sigma),
        plain(model, positive)(x, sigma),
        skipped,
        1.0,
    )
    guided = classifier_free(model, positive, negative, cfg, skip=SkipLayers(layers, 1.0))
    assert_close(guided(x, sigma), expected, atol=GUIDED, rtol=0)


@pytest.mark.parametrize("layers", [(1,), (1, 2), (0, 2), (3,)])
@pytest.mark.parametrize("negative", [None, prompt("b", 2), prompt("b", 2, 9)])
def test_the_shared_prefix_changes_nothing(model, layers, negative):
    x, sigma, positive = latents(), level(0.6), prompt("a", 2)
    skipped = run_branches(model, x, sigma, positive, negative, layers).skipped
    alone = model(x, 1000 * sigma, positive.context, positive.pooled, skip_layers=layers)
    assert_close(skipped, alone, atol=5e-6, rtol=0)  # rounding of another batch size


@pytest.mark.parametrize(
    ("layers", "rows"),
    [
        ((2,), [4, 4, 4, 6]),  # shared, shared, left out, all three branches
        ((1, 2), [4, 4, 4, 6]),
        ((0, 2), [4, 6, 4, 6]),
        ((3,), [4, 4, 4, 4]),
    ],
)
def test_blocks_before_the_first_skipped_one_run_once(model, layers, rows):
    with Work(model) as work:
        velocity = classifier_free(model, prompt("a"), prompt("b"), 4.0, skip=SkipLayers(layers, 1))
        velocity(latents(), level(0.6))
    assert work.rows == rows


@pytest.mark.parametrize(
    "skip", [SkipLayers((1,), 2.5, NEVER), SkipLayers((1,), 0.0), SkipLayers((), 2.5)]
)
def test_skip_layers_without_effect_cost_nothing(model, skip):
    x, sigma = latents(), level(0.6)
    with Work(model) as work:
        guided = classifier_free(model, prompt("a"), prompt("b"), 4.0, skip=skip)(x, sigma)
    assert work.rows == [4, 4, 4, 4]
    assert torch.equal(guided, classifier_free(model, prompt("a"), prompt("b"), 4.0)(x, sigma))


def test_the_ends_of_the_skip_window_belong_to_it(model):
    """As in ComfyUI: sigma_end <= sigma <= sigma_start."""
    skip = SkipLayers((1,), 2.5, Window(high=0.75, low=0.5))
    velocity = classifier_free(model, prompt("a"), prompt("b"), 4.0, skip=skip)
    for sigma, rows in ((0.76, 4), (0.75, 6), (0.5, 6), (0.49, 4)):
        with Work(model) as work:
            velocity(latents(), level(sigma))
        assert work.rows[3] == rows


def test_one_prompt_serves_the_whole_batch(model):
    x, sigma, one = latents(), level(0.6), prompt("a")
    assert torch.equal(plain(model, one)(x, sigma), plain(model, one.repeat(2))(x, sigma))


def test_prompts_that_do_not_fit_the_batch_are_an_error(model):
    with pytest.raises(ValueError, match="3 prompts for a batch of 2 latents; give one prompt, or"):
        plain(model, prompt("a", 3))(latents(), level(0.6))


@pytest.mark.parametrize("layer", [4, -1])
def test_a_block_that_the_network_lacks_is_an_error_at_once(model, layer):
    with pytest.raises(ValueError, match=rf"skip layers \[{layer}\]: .* the blocks 0 to 3"):
        classifier_free(model, prompt("a"), prompt("b"), 4.0, skip=SkipLayers((1, layer), 2.5))


@pytest.mark.parametrize("skip", [None, SkipLayers((1,), 2.5)])
def test_the_network_computes_in_the_dtype_of_the_conditioning(skip):
    half = with_recipe_weights(MMDiT, CONFIG, 7).bfloat16()
    seen = []
    half.x_embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    a, b = (prompt(name).to("cpu", torch.bfloat16) for name in "ab")
    guided = classifier_free(half, a, b, 4.0, skip=skip)(latents(), level(0.6))
    assert seen == [torch.bfloat16]
    assert guided.dtype == torch.float32


def smooth(x, sigma):
    return torch.sin(2 * x) * sigma.reshape(-1, 1, 1, 1) + 0.5 * x.flip(-1)


def half_mask() -> torch.Tensor:
    mask = torch.zeros(1, 1, 6, 8)
    mask[..., 4:] = 1
    return mask


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_inpainting_keeps_what_is_not_painted(sampler):
    kept, start, mask = noise((2, 16, 6, 8), 1), noise((2, 16, 6, 8), 2), half_mask()
    final = sampler(inpaint(smooth, kept, start, mask), start, Schedule(3.0).sigmas(12))
    unmasked = (mask == 0).expand_as(final)
    # the sampler adds the last step to x: one float32 rounding of a latent of size 4
    assert_close(final[unmasked], kept[unmasked], atol=5e-7, rtol=0)
    assert (final - kept)[~unmasked].abs().mean() > 0.1


def test_inpainting_shows_the_network_the_kept_part_at_its_noise_level():
    kept, start, sigma = noise((2, 16, 6, 8), 1), noise((2, 16, 6, 8), 2), level(0.3)
    seen = []

    def watch(x, sigma):
        seen.append(x)
        return smooth(x, sigma)

    inpaint(watch, kept, start, half_mask())(torch.zeros_like(kept), sigma)
    assert_close(seen[0][..., :4], (0.3 * start + 0.7 * kept)[..., :4])
    assert (seen[0][..., 4:] == 0).all()


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_a_mask_of_ones_paints_everything_as_without_a_mask(sampler):
    kept, start = noise((2, 16, 6, 8), 1), noise((2, 16, 6, 8), 2)
    sigmas = Schedule(3.0).sigmas(8)
    masked = sampler(inpaint(smooth, kept, start, torch.ones(1, 1, 6, 8)), start, sigmas)
    assert_close(masked, sampler(smooth, start, sigmas), atol=1e-5, rtol=0)


def test_a_pixel_mask_is_scaled_as_comfyui_does(golden):
    tensors, _ = golden("comfy_samplers")
    small = latent_mask(tensors["pixel_mask"], tensors["latents"])
    assert torch.equal(small, tensors["latent_mask"])


def test_one_mask_serves_the_whole_batch(golden):
    tensors, _ = golden("comfy_samplers")
    small = latent_mask(tensors["pixel_mask"][:1], tensors["latents"])
    assert torch.equal(small, tensors["latent_mask_one"])


def test_missing_masks_repeat_in_turn():
    masks = torch.stack([torch.zeros(16, 16), torch.ones(16, 16)])
    small = latent_mask(masks, torch.zeros(5, 16, 2, 2))
    assert small.shape == (5, 1, 2, 2)
    assert small.mean(dim=(1, 2, 3)).tolist() == [0, 1, 0, 1, 0]
