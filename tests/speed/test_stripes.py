"""Decoding in stripes against decoding the whole; what it holds in memory."""

import weakref

import pytest
import torch
from build import recipe_tensor, with_recipe_weights
from sd3_pack.sd3_core.models.vae import VAE, VAEConfig
from sd3_pack.sd3_core.speed import stripes
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SIZES = [
    VAEConfig(channels=(32, 64, 96, 128), blocks_per_level=2),
    VAEConfig(channels=(32, 32, 64, 64), blocks_per_level=1),
    VAEConfig(channels=(64, 32), blocks_per_level=1),
]


@pytest.fixture(autouse=True)
def small_stripes(monkeypatch):
    """Of 8 rows, so that even a small picture has many cuts."""
    monkeypatch.setattr(stripes, "STRIPE", 1)


def latents(*shape: int) -> torch.Tensor:
    return recipe_tensor("latents", shape, 3)


@pytest.mark.parametrize("config", SIZES, ids=lambda config: str(config.channels))
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (5, 12)])
def test_the_picture_is_that_of_the_whole(config, size):
    """Float32 sums in another order: 2e-6 of the largest value in each of a dozen norms."""
    vae = with_recipe_weights(VAE, config, 5)
    given = latents(2, 16, *size)
    kept = given.clone()
    whole = vae.decode(given)
    found = stripes.decode_in_stripes(vae.decoder, given)
    assert_close(found, whole, atol=1e-5 * float(whole.abs().max()), rtol=0)
    assert found.is_contiguous()
    assert torch.equal(given, kept)


def test_bfloat16_is_as_near_to_float32_as_the_whole_is():
    vae = with_recipe_weights(VAE, SIZES[0], 5)
    given = latents(1, 16, 10, 10)
    true = vae.decode(given)
    half = vae.to(torch.bfloat16)
    whole = half.decode(given.bfloat16()) - true
    found = stripes.decode_in_stripes(half.decoder, given.bfloat16()) - true
    assert found.square().mean() < 1.2 * whole.square().mean()


def test_statistics_far_from_zero_are_exact():
    """A sum of squares in float32 would leave nothing of this variance."""
    x = 1000 + 0.01 * latents(2, 8, 40, 6)
    mean, variance = stripes.group_statistics(stripes.whole(x), groups=4)
    exact = x.double().reshape(2, 4, -1)
    assert_close(mean[:, ::2], exact.mean(dim=2), atol=1e-4, rtol=0)
    assert_close(variance[:, ::2], exact.var(dim=2, correction=0), atol=0, rtol=0.02)


def test_only_large_pictures_are_cut(monkeypatch):
    vae = with_recipe_weights(VAE, SIZES[1], 5)
    given = latents(2, 16, 6, 6)
    whole = vae.decode(given)
    monkeypatch.setattr(stripes, "decode_in_stripes", None)  # not to be called
    assert torch.equal(stripes.decode(vae, given), whole)
    monkeypatch.undo()
    monkeypatch.setattr(stripes, "PLAIN_UP_TO", 1000)
    cut = stripes.decode(vae, given)
    assert not torch.equal(cut, whole)
    assert_close(cut, whole, atol=1e-4, rtol=0)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive; `most` is their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.leave, storage._cdata)

    def leave(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.95e9), (torch.bfloat16, 0.6e9)])
def test_a_megapixel_takes_less_than_a_gigabyte(monkeypatch, dtype, most):
    """The released size without data; attention, which needs no table of scores, is left out."""
    monkeypatch.undo()
    config = VAEConfig()
    with torch.device("meta"):
        vae = VAE(config, attention=lambda q, k, v, mask: q[:, 0].clone()).to(dtype)
        given = torch.empty(1, 16, 128, 128, dtype=dtype)
    with Live() as live:
        picture = stripes.decode(vae, given)
    assert picture.shape == (1, 3, 1024, 1024)
    assert live.most < most
    assert live.most < stripes.memory_needed(config, given.shape, dtype)
    with torch.no_grad(), Live() as whole:
        vae.decode(given)
    assert live.most < 0.4 * whole.most
