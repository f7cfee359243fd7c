"""The VAE against Stability's recordings, and the pair of functions between the two spaces."""

import pytest
import torch
from build import recipe_tensor, with_recipe_weights
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.models.vae import (
    VAE,
    Posterior,
    VAEConfig,
    to_model_space,
    to_vae_space,
)

RECORDINGS = ["vae_ch32_64x64", "vae_ch32_48x80", "vae_ch128_64x64"]


def golden_vae(recorded: dict) -> VAE:
    config = recorded["config"]
    channels = tuple(config["ch"] * factor for factor in config["ch_mult"])
    size = VAEConfig(channels, config["num_res_blocks"], config["z_channels"])
    return with_recipe_weights(VAE, size, config["SEED"])


def golden_input(recorded: dict, name: str) -> torch.Tensor:
    """The recording's input; its name in the recipe stands quoted in the json."""
    recipe = recorded["recipe_inputs"]
    tensor = recipe_tensor(
        recipe[name].split("'")[1], recorded["input_shapes"][name], recipe["seed"]
    )
    return (0.5 * tensor).clamp(-1, 1) if name == "image" else tensor


@pytest.mark.parametrize("name", RECORDINGS)
def test_encoder_equals_the_recording(golden, name):
    expected, recorded = golden(name)
    posterior = golden_vae(recorded).encode(golden_input(recorded, "image"))
    mean, logvar = expected["encoder_out"].chunk(2, dim=1)
    torch.testing.assert_close(posterior.mean, mean, atol=2e-5, rtol=0)
    torch.testing.assert_close(posterior.logvar, logvar, atol=2e-5, rtol=0)
    torch.testing.assert_close(
        to_model_space(posterior.mean), expected["mean_process_in"], atol=4e-5, rtol=0
    )


@pytest.mark.parametrize("name", RECORDINGS)
def test_decoder_equals_the_recording(golden, name):
    expected, recorded = golden(name)
    latents = to_vae_space(golden_input(recorded, "latent_model_space"))
    torch.testing.assert_close(latents, expected["latent_process_out"], atol=1e-6, rtol=0)
    images = golden_vae(recorded).decode(latents)[: len(expected["decoded"])]
    torch.testing.assert_close(images, expected["decoded"], atol=5e-5, rtol=0)


def test_the_two_spaces_are_each_others_inverse():
    latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(to_vae_space(to_model_space(latents)), latents)
    torch.testing.assert_close(to_model_space(torch.tensor(0.0609)), torch.tensor(0.0))
    torch.testing.assert_close(to_vae_space(torch.tensor(1.5305)), torch.tensor(1.0609))


def test_a_sample_has_the_posteriors_mean_and_deviation():
    mean, logvar = torch.tensor([2.0]), torch.tensor([4.0])
    posterior = Posterior(mean, logvar)
    torch.testing.assert_close(posterior.sample(torch.zeros(1)), mean)
    torch.testing.assert_close(posterior.sample(torch.ones(1)), mean + torch.e**2)


def test_a_wild_log_variance_is_clamped():
    wild = Posterior(torch.zeros(2), torch.tensor([1e4, -1e4]))
    assert wild.sample(torch.ones(2)).isfinite().all()


@pytest.mark.parametrize("channels", [(32, 64, 128, 128), (32, 32), (64, 32, 96)])
def test_sizes_are_read_back_from_their_shapes(channels):
    config = VAEConfig(channels, blocks_per_level=1, latent_channels=6)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in VAE(config).state_dict().items()}
    assert VAEConfig.from_shapes(shapes) == config


def test_shapes_of_another_network_are_refused():
    with pytest.raises(CheckpointError, match="no VAE"):
        VAEConfig.from_shapes({"x_embedder.proj.weight": (64, 16, 2, 2)})


def test_batch_of_two_equals_two_batches_of_one():
    vae = with_recipe_weights(VAE, VAEConfig((32, 32)), seed=3)
    images = recipe_tensor("images", (2, 3, 16, 12), 3).clamp(-1, 1)
    means = torch.cat([vae.encode(image[None]).mean for image in images])
    torch.testing.assert_close(vae.encode(images).mean, means, atol=1e-5, rtol=0)
    decoded = torch.cat([vae.decode(mean[None]) for mean in means])
    torch.testing.assert_close(vae.decode(means), decoded, atol=1e-5, rtol=0)
    assert decoded.shape == images.shape
