"""More of ComfyUI's nodes at our sockets: ControlNet, merging by block, compiling, saving."""

from pathlib import Path

import comfy.cldm.dit_embedder
import comfy.controlnet
import comfy.ops
import comfy.sd
import folder_paths
import pytest
import torch
from comfy_call import call
from comfy_extras.nodes_model_merging import CLIPSave, VAESave
from comfy_extras.nodes_model_merging_model_specific import ModelMergeSD35_Large
from comfy_extras.nodes_sd3 import EmptySD3LatentImage
from recipe import recipe_state_dict
from sd3_pack.nodes.loaders import load_vae
from sd3_pack.nodes.sampling import SD3Sample, SD3ShiftSchedule
from sd3_pack.sd3_core.checkpoints.layouts import find_components
from sd3_pack.sd3_core.checkpoints.load import component_of

import nodes

TOLERANCE = {"atol": 1e-4, "rtol": 0}  # golden README: sampling, final latent


def ours(model, positive, negative, latent):
    sigmas = SD3ShiftSchedule.execute(3, 3.0, "normal", 1.0).args[0]
    out = SD3Sample.execute(model, positive, negative, latent, sigmas, 5, 3.0, "euler")
    return out.args[0]["samples"]


def theirs(model, positive, negative, latent):
    return nodes.common_ksampler(model, 5, 3, 3.0, "euler", "normal", positive, negative, latent)[
        0
    ]["samples"]


@pytest.fixture(scope="module")
def controlnet():
    """An SD3.5 ControlNet of one block, for the model of the tests."""
    sizes = {
        "img_size": None,
        "patch_size": 2,
        "in_chans": 16,
        "attention_head_dim": 64,
        "num_attention_heads": 2,
        "adm_in_channels": 2048,
        "num_layers": 1,
        "main_model_double": 2,
        "double_y_emb": False,
    }
    network = comfy.cldm.dit_embedder.ControlNetEmbedder(
        **sizes, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    with torch.inference_mode():
        return comfy.controlnet.load_controlnet_sd35(recipe_state_dict(shapes, 3))


def test_a_controlnet_acts_as_on_the_native_model(
    our_model, their_model, tiny_three, controlnet, conditioning
):
    picture = torch.rand(1, 128, 96, 3, generator=torch.Generator().manual_seed(2))
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
        conditioning(1), conditioning(2), controlnet, picture, 0.8, 0.0, 0.7, vae=tiny_three[2]
    )
    latent = {"samples": torch.zeros(1, 16, 16, 12)}
    controlled = ours(our_model, positive, negative, latent)
    natively = theirs(their_model, positive, negative, latent)
    torch.testing.assert_close(controlled, natively, **TOLERANCE)
    plain = ours(our_model, conditioning(1), conditioning(2), latent)
    assert (controlled - plain).abs().max() > 1e-2


def test_models_are_merged_block_by_block_as_natively(our_model, their_model, conditioning):
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    results = []
    for model in (our_model, their_model):
        other = model.clone()
        name = "diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"
        change = torch.ones_like(model.model.state_dict()[name])
        other.add_patches({name: ("diff", (change,))}, 0.05)
        ratios = {"joint_blocks.0.": 0.25, "joint_blocks.1.": 1.0}
        (merged,) = ModelMergeSD35_Large().merge(model, other, **ratios)
        results.append(theirs(merged, conditioning(1), conditioning(2), latent))
    torch.testing.assert_close(*results, **TOLERANCE)


def test_a_compiled_model_draws_the_same(our_model, conditioning):
    compile_api = pytest.importorskip("comfy_api.torch_helpers.torch_compile")
    compiled = our_model.clone()
    compile_api.set_torch_compile_wrapper(model=compiled, backend="eager")
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    prompts = conditioning(1), conditioning(2)
    once = ours(compiled, *prompts, latent)
    torch.testing.assert_close(once, ours(our_model, *prompts, latent), **TOLERANCE)


def test_the_native_empty_latent_fits(our_model, conditioning):
    (latent,) = call(EmptySD3LatentImage, 128, 64, 1)
    assert ours(our_model, conditioning(1), conditioning(2), latent).shape == (1, 16, 8, 16)


def test_an_empty_latent_of_four_channels_is_widened_as_natively(our_model, conditioning):
    (latent,) = nodes.EmptyLatentImage().generate(64, 64)
    prompts = conditioning(1), conditioning(2)
    drawn = ours(our_model, *prompts, latent)
    torch.testing.assert_close(drawn, theirs(our_model, *prompts, latent), **TOLERANCE)


def saved_files(prefix):
    return sorted(Path(folder_paths.get_output_directory()).glob(f"**/{prefix}*.safetensors"))


def test_a_saved_vae_loads_in_ours(tiny_three):
    vae = tiny_three[2]
    VAESave().save(vae, "saved_vae")
    again = load_vae(component_of(saved_files("saved_vae")[0], "vae"))
    pixels = torch.rand(1, 32, 32, 3)
    assert torch.equal(vae.encode(pixels), again.encode(pixels))


def test_saved_text_encoders_load_in_ours(tiny_three):
    CLIPSave().save(tiny_three[1], "saved_clip")
    kinds = {kind for file in saved_files("saved_clip") for kind in find_components(file)}
    assert kinds == {"clip_l", "clip_g", "t5"}
