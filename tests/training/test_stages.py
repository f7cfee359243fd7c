"""A tiny model's own networks behind the cache."""

import gc

import pytest
import torch
from sample_pictures import save_texture
from sd3_pack.sd3_core.checkpoints.layouts import find_components
from sd3_pack.sd3_core.checkpoints.load import load_clip, load_t5, load_vae
from sd3_pack.sd3_core.settings import Files
from sd3_pack.sd3_core.speed import streaming
from sd3_pack.sd3_core.text.encoders import TextEncoders
from sd3_pack.sd3_core.text.vocabularies import find_tokenizers
from sd3_pack.sd3_core.training import stages
from sd3_pack.sd3_core.training.dataset import Source, read_dataset
from sd3_pack.sd3_core.training.stages import (
    Machine,
    fingerprint_of,
    literal,
    model_cache,
    read_caption,
)
from tiny import write_tiny_checkpoint
from tiny_tokenizers import write_tiny_tokenizers

CPU = Machine(torch.device("cpu"), torch.float32)
LONG = "a red circle of the photo " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_tokenizers(folder / "tokenizers")
    write_tiny_checkpoint(folder / "tiny.safetensors", tokenizers=folder / "tokenizers")
    return folder / "tiny.safetensors"


@pytest.fixture
def dataset(tmp_path):
    for n, caption in enumerate(["a red circle", "a photo (of the cat)"]):
        path = save_texture(tmp_path / "set" / f"{n}.png", 32, 32, n)
        path.with_suffix(".txt").write_text(caption)
    return read_dataset([Source(tmp_path / "set")], resolution=32, bucket_step=16)


def make(folder, model, **options):
    return model_cache(folder, Files(checkpoint=model), CPU, storage=torch.float32, **options)


def encoders(model, **parts):
    tokenizers = find_tokenizers(("clip_l", "clip_g", "t5"), directory=model.parent / "tokenizers")
    return TextEncoders(tokenizers, context_dim=224, pooled_dim=160, window=16, **parts)


def all_encoders(model):
    return encoders(
        model,
        clip_l=load_clip(model, "clip_l"),
        clip_g=load_clip(model, "clip_g"),
        t5=load_t5(model),
    )


def test_the_cache_holds_what_generation_would_compute(tmp_path, model, dataset):
    """Each encoder alone, cut out and put together again: bit for bit the three at once."""
    cache = make(tmp_path / "cache", model, t5_length=24)
    cache.prepare(dataset)
    together = all_encoders(model)
    for caption in ("a red circle", ""):
        expected = together.encode(caption, t5_length=24).conditioning
        cached = cache.conditioning(caption).conditioning
        torch.testing.assert_close(cached.context, expected.context, rtol=0, atol=0)
        torch.testing.assert_close(cached.pooled, expected.pooled, rtol=0, atol=0)
    item = dataset.items[0]
    posterior = load_vae(model).encode(item.picture.read().image[None])
    torch.testing.assert_close(cache.latents(item).mean, posterior.mean[0], rtol=0, atol=0)
    torch.testing.assert_close(cache.latents(item).logvar, posterior.logvar[0], rtol=0, atol=0)


@pytest.mark.parametrize("off", ["clip_l", "clip_g", "t5"])
def test_encoders_that_are_off_give_zeros_and_cost_nothing(tmp_path, model, dataset, off):
    use = tuple(name for name in ("clip_l", "clip_g", "t5") if name != off)
    cache = make(tmp_path, model, use=use)
    assert off not in cache.prepare(dataset).captions
    expected = all_encoders(model).encode("a red circle", use=use).conditioning
    cached = cache.conditioning("a red circle").conditioning
    torch.testing.assert_close(cached.context, expected.context, rtol=0, atol=0)
    torch.testing.assert_close(cached.pooled, expected.pooled, rtol=0, atol=0)


def test_parentheses_in_captions_are_words(tmp_path, model, dataset):
    cache = make(tmp_path, model)
    cache.prepare(dataset)
    expected = all_encoders(model).encode(r"a photo \(of the cat\)").conditioning
    cached = cache.conditioning("a photo (of the cat)").conditioning
    torch.testing.assert_close(cached.context, expected.context, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("caption", "prompt"),
    [
        ("plain", "plain"),
        ("a (b:1.5)", r"a \(b:1.5\)"),
        (r"kept \(as tagged\)", r"kept \(as tagged\)"),
        ("((", r"\(\("),
    ],
)
def test_captions_become_prompts_without_weights(caption, prompt):
    assert literal(caption) == prompt


def test_long_captions_are_cut_after_a_word_to_one_length(tmp_path, model, dataset):
    cache = make(tmp_path, model, t5_length=20)
    prepared = cache.prepare(dataset, extra=["", LONG])
    assert prepared.cut["t5"] == prepared.cut["clip_l"] == 1
    assert cache.conditioning(LONG).conditioning.context.shape == (1, 16 + 20, 224)
    text = cache.texts["t5"].read(LONG).text
    assert LONG.startswith(text)
    assert text.split() == LONG.split()[: len(text.split())]
    assert len(text.split()) == 19  # a word is a token here, and one is the end


def test_what_has_no_words_is_cut_between_characters():
    reading = read_caption("x" * 100, lambda text: tuple(text.encode()) if len(text) < 9 else None)
    assert (reading.text, reading.cut) == ("x" * 8, True)


def test_another_t5_length_leaves_clip_alone(tmp_path, model, dataset):
    make(tmp_path, model).prepare(dataset)
    again = make(tmp_path, model, t5_length=30).prepare(dataset)
    assert again.captions == {"clip_l": 0, "clip_g": 0, "t5": 3}
    assert again.pictures == 0


def test_the_dtype_is_part_of_the_key(tmp_path, model, dataset):
    """CLIPs compute in float32 whatever the others do."""
    make(tmp_path, model).prepare(dataset)
    half = Machine(torch.device("cpu"), torch.bfloat16)
    again = model_cache(tmp_path, Files(checkpoint=model), half, storage=torch.float32).prepare(
        dataset
    )
    assert again.captions == {"clip_l": 0, "clip_g": 0, "t5": 3}
    assert again.pictures == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captions_of_a_streamed_t5_are_those_of_one_that_fits(
    tmp_path, model, dataset, monkeypatch, dtype
):
    """Bit for bit, though several captions share a pass."""
    said, machine = [], Machine(torch.device("cpu"), dtype)
    captions = ("a red circle", "a photo (of the cat)", "")

    def context(folder):
        cache = model_cache(
            folder, Files(checkpoint=model), machine, storage=torch.float32, say=said.append
        )
        cache.prepare(dataset)
        return torch.cat([cache.conditioning(caption).conditioning.context for caption in captions])

    whole = context(tmp_path / "whole")
    monkeypatch.setattr(streaming, "fits", lambda part, dtype, device: False)
    monkeypatch.setattr(streaming, "AT_ONCE", 2)
    assert torch.equal(context(tmp_path / "streamed"), whole)
    (note,) = said
    assert "block by block" in note


def test_networks_are_gone_when_prepare_returns(tmp_path, model, dataset, monkeypatch):
    import weakref

    seen = []
    for name in ("load_vae", "load_clip", "load_t5_to_fit"):
        load = getattr(stages, name)

        def watched(*arguments, load=load, **options):
            assert not any(network() for network in seen)
            network = load(*arguments, **options)
            seen.append(weakref.ref(network))
            return network

        monkeypatch.setattr(stages, name, watched)
    cache = make(tmp_path, model)
    cache.prepare(dataset)
    gc.collect()
    assert len(seen) == 4
    assert not any(network() for network in seen)
    cache.prepare(dataset)
    assert len(seen) == 4


def test_a_networks_fingerprint_is_its_own(tmp_path, model):
    """The same weights in another file are the same network; the others do not count."""
    paths = write_tiny_checkpoint(tmp_path / "split", layout="split")
    other = write_tiny_checkpoint(tmp_path / "other", layout="split", seed=1)
    for kind in ("vae", "clip_l", "t5"):
        own = fingerprint_of(find_components(model)[kind])
        assert own == fingerprint_of(find_components(paths[kind], clip="clip_l")[kind])
        assert own != fingerprint_of(find_components(other[kind], clip="clip_l")[kind])


def test_an_impossible_length_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match="t5_length is 0"):
        make(tmp_path, model, t5_length=0)
