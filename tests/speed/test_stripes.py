"""Decoding in stripes against decoding the whole; what it holds in memory."""

import weakref

import pytest
import torch
from build import recipe_tensor, with_recipe_weights
from sd3_pack.sd3_core.models.vae import VAE, VAEConfig
from sd3_pack.sd3_core.speed import stripes
from sd3_pack.sd3_core.speed.stripes import Cut
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SIZES = [
    VAEConfig(channels=(32, 64, 96, 128), blocks_per_level=2),
    VAEConfig(channels=(32, 32, 64, 64), blocks_per_level=1),
    VAEConfig(channels=(64, 32), blocks_per_level=1),
]


# Of 8 rows, so that even a small picture has many cuts.
FINE = Cut(stripe=1, twice=True)
KEPT = Cut(stripe=1, twice=False)


def latents(*shape: int) -> torch.Tensor:
    return recipe_tensor("latents", shape, 3)


@pytest.mark.parametrize("config", SIZES, ids=lambda config: str(config.channels))
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (5, 12)])
@pytest.mark.parametrize("how", [FINE, KEPT, Cut(9000, twice=False)], ids=str)
def test_the_picture_is_that_of_the_whole(config, size, how):
    """Float32 sums in another order: 2e-6 of the largest value in each of a dozen norms."""
    vae = with_recipe_weights(VAE, config, 5)
    given = latents(2, 16, *size)
    kept = given.clone()
    whole = vae.decode(given)
    found = stripes.decode_in_stripes(vae.decoder, given, how)
    assert_close(found, whole, atol=1e-5 * float(whole.abs().max()), rtol=0)
    assert found.is_contiguous()
    assert torch.equal(given, kept)


def test_bfloat16_is_as_near_to_float32_as_the_whole_is():
    vae = with_recipe_weights(VAE, SIZES[0], 5)
    given = latents(1, 16, 10, 10)
    true = vae.decode(given)
    half = vae.to(torch.bfloat16)
    whole = half.decode(given.bfloat16()) - true
    found = stripes.decode_in_stripes(half.decoder, given.bfloat16(), FINE) - true
    assert found.square().mean() < 1.2 * whole.square().mean()


@pytest.mark.parametrize("rows", [40, 43])  # stripes of 8, the last one shorter
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_are_those_of_float64(rows, offset):
    """A sum of squares in float32 would leave nothing of the variance so far from zero."""
    x = offset + (0.01 if offset else 1.0) * latents(2, 8, rows, 6)
    x[:, :, 8:20] += 0.05  # stripes that lie apart
    mean, variance = stripes.group_statistics(stripes.whole(x, FINE), groups=4)
    exact = x.double().reshape(2, 4, -1)
    true = exact.var(dim=2, correction=0)
    assert_close(mean[:, ::2].double(), exact.mean(dim=2), atol=2e-7 * (offset + 1), rtol=0)
    # what float32 holds of numbers around the offset, and a millionth
    rounding = (2**-24 * (offset + 1)) ** 2 + 2**-24 * (offset + 1) * true.sqrt()
    assert ((variance[:, ::2].double() - true).abs() < 2e-6 * true + rounding).all()


class NoFloat64(TorchDispatchMode):
    """Raises where a tensor of float64 is made: Apple's GPUs, and Intel's small ones, have none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                raise TypeError(f"{func} gives float64")
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [FINE, KEPT], ids=str)
def test_no_float64_is_asked_for_and_nothing_moves_to_the_host(dtype, how):
    """Without data, so that reading a number would fail."""
    with torch.device("meta"):
        vae = VAE(SIZES[1], attention=lambda q, k, v, mask: q[:, 0].clone()).to(dtype)
        given = torch.empty(1, 16, 9, 8, dtype=dtype)
    with NoFloat64():
        assert stripes.decode_in_stripes(vae.decoder, given, how).dtype == dtype


CONFIG = VAEConfig()
MEGAPIXEL = (1, 16, 128, 128)


def cut(free, shape=MEGAPIXEL, dtype=torch.bfloat16):
    return stripes.cut(CONFIG, shape, dtype, free)


def test_free_memory_decides_how_a_picture_is_cut():
    whole = stripes.memory_needed(CONFIG, MEGAPIXEL, torch.bfloat16, None)
    assert cut(8e9) is None
    assert cut(whole) is not None  # something is left for others
    assert not cut(2e9).twice
    assert cut(1e9).twice
    assert cut(1e6) == stripes.LEAST
    assert cut(2e9, (1, 16, 32, 32)) is None
    assert cut(8e9, (4, *MEGAPIXEL[1:])) is not None  # one after the other
    # where nobody tells, the size decides
    assert cut(None) == stripes.LEAST
    assert cut(None, (1, 16, 64, 64)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cut_needs_no_more_than_is_free_and_more_memory_makes_fewer_stripes(dtype):
    before = 0
    for free in (1.4e9, 1.8e9, 2.2e9, 2.6e9, 3e9):
        how = cut(free, dtype=dtype)
        if how is None:
            break
        assert stripes.memory_needed(CONFIG, MEGAPIXEL, dtype, how) <= free
        size = how.stripe + 1e12 * (not how.twice)
        assert size >= before
        before = size


def test_what_fits_is_decoded_whole_and_the_rest_is_cut():
    vae = with_recipe_weights(VAE, SIZES[1], 5)
    given = latents(2, 16, 6, 6)
    whole = vae.decode(given)
    found, how = stripes.decode(vae, given, free=1e9)
    assert how is None
    assert torch.equal(found, whole)
    found, how = stripes.decode(vae, given, free=1.0)
    assert how == stripes.LEAST
    assert_close(found, whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("failures", "last"), [(1, stripes.LEAST), (2, stripes.THINNEST)])
def test_a_thinner_cut_is_tried_when_the_memory_is_full(monkeypatch, failures, last):
    """And what the failed attempt held is given back before."""
    vae, held, attempts = with_recipe_weights(VAE, SIZES[1], 5), [], []
    plainly = stripes._decode

    def hungry(vae, latents, how, affine):
        attempts.append(how)
        assert not [one for one in held if one() is not None]
        if len(attempts) > failures:
            return plainly(vae, latents, how, affine)
        buffer = torch.empty(10)
        held.append(weakref.ref(buffer))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stripes, "_decode", hungry)
    given = latents(1, 16, 6, 6)
    found, how = stripes.decode(vae, given, free=1e9)
    assert how == last
    assert len(attempts) == failures + 1
    assert_close(found, vae.decode(given), atol=1e-4, rtol=0)


def test_when_the_thinnest_does_not_fit_torchs_own_error_comes_out(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stripes, "_decode", full)
    with pytest.raises(torch.OutOfMemoryError):
        stripes.decode(with_recipe_weights(VAE, SIZES[1], 5), latents(1, 16, 6, 6), free=1e9)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("how", "most", "share"),
    [
        (None, 3.3, 1.0),
        (Cut(128_000_000, twice=False), 2.0, 0.85),
        (Cut(stripes.STRIPE, twice=False), 1.7, 0.6),
        (stripes.LEAST, 0.95, 0.4),
        (stripes.THINNEST, 0.85, 0.3),
    ],
    ids=str,
)
def test_a_megapixel_takes_what_is_said(dtype, how, most, share):
    """The released size without data; attention, which needs no table of scores, is left out.

    most: GB in float32.  share: of what the whole takes.
    """
    with torch.device("meta"):
        vae = VAE(CONFIG, attention=lambda q, k, v, mask: q[:, 0].clone()).to(dtype)
        given = torch.empty(MEGAPIXEL, dtype=dtype)
    with torch.no_grad(), Live() as whole:
        vae.decode(given)
    with torch.no_grad(), Live() as live:
        picture = stripes._decode(vae, given, how, stripes.affine)
    assert picture.shape == (1, 3, 1024, 1024)
    assert live.most < most * 1e9 * (1 if dtype == torch.float32 else 0.65)
    assert live.most <= share * whole.most
    needed = stripes.memory_needed(CONFIG, MEGAPIXEL, dtype, how)
    assert 0.5 * needed < live.most < needed
