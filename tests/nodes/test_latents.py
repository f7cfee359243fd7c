"""Our VAE in ComfyUI's nodes, theirs in ours; sizes and masks."""

import copy
import gc
import weakref

import comfy.model_patcher
import pytest
import torch
from build import recipe_tensor
from comfy.ldm.models.autoencoder import AutoencodingEngine
from sd3_pack.nodes.errors import NodeError
from sd3_pack.nodes.latents import (
    ASPECTS,
    SD3EmptyLatent,
    SD3VAEDecode,
    SD3VAEEncode,
    picture_size,
)
from sd3_pack.nodes.loaders import load_vae
from sd3_pack.nodes.wires import fitted_mask
from sd3_pack.sd3_core.checkpoints.load import component_of
from sd3_pack.sd3_core.checkpoints.load import load_vae as load_core_vae
from sd3_pack.sd3_core.speed import stripes

import nodes


@pytest.fixture(scope="module")
def our_vae(tiny):
    with torch.inference_mode():
        return load_vae(component_of(tiny, "vae"))


@pytest.fixture(scope="module")
def their_vae(our_vae):
    """ComfyUI's own network, of the tiny VAE's size, with the same weights."""
    config = {
        "double_z": True,
        "z_channels": 16,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    halves = {
        half.lower() + "_config": {
            "target": f"comfy.ldm.modules.diffusionmodules.model.{half}",
            "params": config,
        }
        for half in ("Encoder", "Decoder")
    }
    regularizer = "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"
    with torch.inference_mode():
        network = AutoencodingEngine(regularizer_config={"target": regularizer}, **halves).eval()
        network.load_state_dict(our_vae.first_stage_model.state_dict(), strict=True)
        vae = copy.copy(our_vae)
        vae.first_stage_model = network
        vae.patcher = comfy.model_patcher.ModelPatcher(network, vae.device, vae.device)
    return vae


@pytest.fixture
def pixels():
    return torch.rand(2, 64, 48, 3, generator=torch.Generator().manual_seed(4))


def test_the_native_nodes_encode_and_decode_with_ours(our_vae, tiny, pixels):
    core = load_core_vae(tiny, dtype=torch.float32)
    (latent,) = nodes.VAEEncode().encode(our_vae, pixels)
    mean = core.encode(pixels.movedim(-1, 1) * 2 - 1).mean
    torch.testing.assert_close(latent["samples"], mean, atol=2e-5, rtol=0)
    (images,) = nodes.VAEDecode().decode(our_vae, latent)
    expected = ((core.decode(mean) + 1) / 2).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(images, expected, atol=5e-5, rtol=0)


def test_tiles_are_what_the_native_network_makes_of_them(our_vae, their_vae):
    big = torch.rand(1, 192, 160, 3, generator=torch.Generator().manual_seed(4))
    both = (our_vae, their_vae)
    ours, theirs = (nodes.VAEEncodeTiled().encode(vae, big, 64, 16)[0] for vae in both)
    torch.testing.assert_close(ours["samples"], theirs["samples"], atol=2e-5, rtol=0)
    images = [nodes.VAEDecodeTiled().decode(vae, ours, 64, 16)[0] for vae in both]
    torch.testing.assert_close(*images, atol=5e-5, rtol=0)


def test_vae_encode_for_inpaint_works_with_ours(our_vae, their_vae, pixels):
    mask = torch.zeros(1, 64, 48)
    mask[:, 20:40] = 1
    ours, theirs = (
        nodes.VAEEncodeForInpaint().encode(vae, pixels, mask, 6)[0] for vae in (our_vae, their_vae)
    )
    torch.testing.assert_close(ours["samples"], theirs["samples"], atol=2e-5, rtol=0)
    assert torch.equal(ours["noise_mask"], theirs["noise_mask"])


def test_our_nodes_take_the_native_vae(our_vae, their_vae, pixels):
    ours, theirs = (SD3VAEEncode.execute(pixels, vae).args[0] for vae in (our_vae, their_vae))
    torch.testing.assert_close(ours["samples"], theirs["samples"], atol=2e-5, rtol=0)
    ours, theirs = (SD3VAEDecode.execute(ours, vae).args[0] for vae in (our_vae, their_vae))
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


def test_a_mask_becomes_the_latents_noise_mask(our_vae, pixels):
    mask = torch.rand(1, 64, 48)
    latent = SD3VAEEncode.execute(pixels, our_vae, mask).args[0]
    assert torch.equal(latent["noise_mask"], mask[:, None])
    assert "noise_mask" not in SD3VAEEncode.execute(pixels, our_vae).args[0]


def test_a_mask_is_cropped_as_the_picture_is():
    mask = torch.arange(70.0).expand(1, 67, 70)
    fitted = fitted_mask(mask, 67, 70)
    assert fitted.shape == (1, 1, 64, 64)
    assert fitted[0, 0, 0, 0] == 3
    assert fitted_mask(torch.ones(2, 8, 8), 64, 48).shape == (2, 1, 64, 48)


def test_what_is_cut_or_stretched_is_told(our_vae):
    (told,) = SD3VAEEncode.execute(torch.rand(1, 67, 40, 3), our_vae, torch.ones(1, 9, 9)).ui[
        "sd3_report"
    ]
    assert (told["width"], told["height"], told["latent"]) == (40, 64, [1, 16, 8, 5])
    assert told["notes"] == [
        "The picture is 40 x 67 pixels: cut around its centre to 40 x 64.",
        "The mask is 9 x 9 pixels, its picture 40 x 67: the mask is stretched over the whole "
        "picture.",
    ]
    (told,) = SD3VAEEncode.execute(torch.rand(1, 64, 40, 3), our_vae, torch.ones(1, 64, 40)).ui[
        "sd3_report"
    ]
    assert told["notes"] == []


def test_a_picture_smaller_than_one_latent_is_refused(our_vae):
    with pytest.raises(NodeError, match=r"^SD3:bad_setting: the picture is 5 x 64 pixels"):
        SD3VAEEncode.execute(torch.rand(1, 64, 5, 3), our_vae)


def test_a_black_picture_is_an_error(our_vae):
    latent = {"samples": torch.full((1, 16, 8, 8), torch.nan)}
    with pytest.raises(NodeError, match=r"^SD3:not_finite: the VAE's decoder"):
        SD3VAEDecode.execute(latent, our_vae)


def test_a_latent_or_vae_of_another_model_is_refused(our_vae):
    with pytest.raises(NodeError, match=r"^SD3:wrong_latent: the latent has 4 channels"):
        SD3VAEDecode.execute({"samples": torch.zeros(1, 4, 8, 8)}, our_vae)
    with pytest.raises(NodeError, match=r"^SD3:missing_part: no VAE arrived"):
        SD3VAEEncode.execute(torch.zeros(1, 8, 8, 3), None)


# SD3EmptyLatent


@pytest.mark.parametrize("pixels", [1024 * 1024, 128 * 128])
@pytest.mark.parametrize("aspect", list(ASPECTS))
def test_presets_keep_the_pixel_count(aspect, pixels):
    width, height = picture_size(aspect, pixels)
    assert width % 16 == height % 16 == 0
    assert width * height == pytest.approx(pixels, rel=0.12)


def test_the_size_follows_the_connected_model(tiny_three, our_model):
    def shape(aspect, model, width=1024, height=1024):
        out = SD3EmptyLatent.execute(aspect, width, height, 2, model)
        return tuple(out.args[0]["samples"].shape)

    assert shape("1:1", None) == (2, 16, 128, 128)
    assert shape("16:9", None) == (2, 16, 96, 168)
    assert shape("1:1", tiny_three[0]) == (2, 16, 8, 8)
    assert shape("custom", None, 512, 768) == (2, 16, 96, 64)
    with pytest.raises(NodeError, match=r"^SD3:bad_setting: 1024 x 1024: this model draws at most"):
        SD3EmptyLatent.execute("custom", 1024, 1024, 1, our_model)


def test_the_report_tells_the_size():
    (told,) = SD3EmptyLatent.execute("3:2", 0, 0, 1).ui["sd3_report"]
    assert told == {"width": 1280, "height": 832, "batch_size": 1}


@pytest.mark.parametrize("which", ["our_vae", "their_vae"])
def test_a_grey_image_is_encoded_as_grey(which, request):
    vae = request.getfixturevalue(which)
    grey = torch.rand(1, 16, 24, 1)
    (one, *_) = SD3VAEEncode.execute(grey, vae).args
    (three, *_) = SD3VAEEncode.execute(grey.repeat(1, 1, 1, 3), vae).args
    torch.testing.assert_close(one["samples"], three["samples"])


def test_what_is_no_picture_is_refused_by_its_input_before_it_is_encoded(our_vae):
    pixels = torch.rand(3, 16, 16, 3)
    pixels[1, 4, 4, 0] = float("nan")
    with pytest.raises(NodeError, match="not_finite: pixels holds NaN.*in picture 2 of 3"):
        SD3VAEEncode.execute(pixels, our_vae)
    mask = torch.full((1, 16, 16), float("inf"))
    with pytest.raises(NodeError, match="not_finite: mask holds NaN or infinity"):
        SD3VAEEncode.execute(torch.rand(1, 16, 16, 3), our_vae, mask)
    with pytest.raises(NodeError, match="bad_setting: pixels is .* 1, 3 or 4 channels"):
        SD3VAEEncode.execute(torch.rand(1, 16, 16, 2), our_vae)


@pytest.mark.parametrize(("free", "whole"), [(8e9, True), (1e6, False)])
def test_comfyuis_free_memory_decides_how_a_picture_is_decoded(
    tiny, recipe_latents, monkeypatch, free, whole
):
    """And what ComfyUI is told to keep free is what that takes."""
    with torch.inference_mode():
        vae = load_vae(component_of(tiny, "vae"))
    plainly = vae.first_stage_model.decoder(recipe_latents).movedim(1, -1)
    monkeypatch.setattr(vae.patcher, "get_free_memory", lambda device: free)
    hows, original = [], stripes._decode

    def watched(vae, latents, how, affine):
        hows.append(how)
        return original(vae, latents, how, affine)

    monkeypatch.setattr(stripes, "_decode", watched)
    shape, dtype = recipe_latents.shape, vae.vae_dtype
    asked = vae.memory_used_decode(shape, dtype)
    images = vae.decode(recipe_latents)
    assert [how is None for how in hows] == [whole]
    assert asked == stripes.memory_needed(vae.vae_config, shape, dtype, hows[0])
    assert asked < free or hows[0] == stripes.LEAST
    torch.testing.assert_close(images, ((plainly + 1) / 2).clamp(0, 1), atol=1e-5, rtol=0)


@pytest.fixture
def recipe_latents():
    return recipe_tensor("latents", (1, 16, 24, 24), 3)


def test_a_vae_leaves_when_nobody_holds_it(tiny):
    """Nothing of ours refers back to it in a circle."""
    with torch.inference_mode():
        vae = load_vae(component_of(tiny, "vae"))
    network = weakref.ref(vae.first_stage_model)
    enabled = gc.isenabled()
    gc.disable()
    try:
        del vae
        assert network() is None
    finally:
        if enabled:
            gc.enable()
