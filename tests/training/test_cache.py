"""Caches: made once, never stale, and only what changed is made anew.

The networks are stubs that count their calls; test_stages.py has the real ones.
"""

import gc
import weakref
from dataclasses import dataclass, field, replace

import pytest
import torch
from sample_pictures import save_texture, with_hole
from sd3_pack.sd3_core.models.vae import Posterior, to_model_space
from sd3_pack.sd3_core.training.cache import Cache, CachedLatents, PictureStage, Reading, TextStage
from sd3_pack.sd3_core.training.dataset import Source, read_dataset, tensor_dataset
from sd3_pack.sd3_core.training.layout import Layout, Span, States, without

LAYOUT = Layout(
    length=5,
    width=6,
    pooled=4,
    spans={"clip": Span((0, 2), (0, 4), (0, 4)), "t5": Span((2, 5), (0, 6))},
)


@dataclass
class Calls:
    """What the stubs were asked, in order."""

    loaded: list[str] = field(default_factory=list)
    pictures: int = 0
    texts: dict[str, list[str]] = field(default_factory=dict)
    alive: list[weakref.ref] = field(default_factory=list)

    def clear(self):
        self.loaded, self.pictures, self.texts, self.alive = [], 0, {}, []

    @property
    def encoded(self) -> dict[str, int]:
        return {"pictures": self.pictures, **{k: len(v) for k, v in self.texts.items()}}


class StubVAE:
    """Latents that tell the picture: its mean colour in each of 2 channels."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, images):
        self.calls.pictures += 1
        mean = torch.nn.functional.avg_pool2d(images[:, :2], 8)
        return Posterior(mean, mean - 4)


class StubEncoder:
    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def __call__(self, texts):
        return map(self.states, texts)

    def states(self, text):
        self.calls.texts.setdefault(self.name, []).append(text)
        value = float(len(text))
        if self.name == "clip":
            return States(torch.full((2, 4), value), torch.full((4,), -value))
        return States(torch.full((3, 6), value), torch.zeros(0))


def picture_stage(calls, identity="vae"):
    def load():
        calls.loaded.append("vae")
        vae = StubVAE(calls)
        calls.alive.append(weakref.ref(vae))
        return vae

    return PictureStage(identity, factor=8, channels=2, load=load)


def text_stage(name, calls, identity="", length=50):
    def load():
        calls.loaded.append(name)
        assert not any(network() for network in calls.alive)  # the one before has left
        encoder = StubEncoder(name, calls)
        calls.alive.append(weakref.ref(encoder))
        return encoder

    def read(caption):
        text = caption[:length]
        return Reading(text, tuple(text.encode()), cut=len(caption) > length)

    return TextStage(identity or name, read, load)


@pytest.fixture
def calls():
    return Calls()


@pytest.fixture
def cache(tmp_path, calls):
    texts = {name: text_stage(name, calls) for name in ("clip", "t5")}
    return Cache(tmp_path / "cache", picture_stage(calls), texts, LAYOUT)


@pytest.fixture
def folder(tmp_path):
    for n in range(3):
        path = save_texture(tmp_path / "set" / f"{n}.png", 64, 64, n)
        path.with_suffix(".txt").write_text(f"picture {n}")
    return tmp_path / "set"


def read(folder, **options):
    return read_dataset([Source(folder)], **{"resolution": 64, "bucket_step": 16, **options})


def test_everything_is_made_once_and_then_found(cache, calls, folder):
    first = cache.prepare(read(folder))
    assert calls.encoded == {"pictures": 3, "clip": 4, "t5": 4}  # three captions, and the empty one
    assert (first.pictures, first.captions, first.found) == (3, {"clip": 4, "t5": 4}, 0)
    calls.clear()
    second = cache.prepare(read(folder))
    assert calls.loaded == []  # nothing missing: no network is loaded
    assert (second.pictures, second.captions, second.found) == (0, {"clip": 0, "t5": 0}, 11)


def test_what_is_read_is_what_was_encoded(cache, folder):
    dataset = read(folder)
    cache.prepare(dataset)
    for item in dataset.items:
        latents = cache.latents(item)
        expected = torch.nn.functional.avg_pool2d(item.picture.read().image[:2], 8)
        torch.testing.assert_close(latents.mean, expected, rtol=2**-11, atol=1e-6)
        torch.testing.assert_close(latents.logvar, expected - 4, rtol=2**-11, atol=1e-6)
        assert latents.mask is None
    prompt = cache.conditioning("picture 0")
    assert prompt.conditioning.context[0, :2, :4].unique().tolist() == [9.0]
    assert prompt.conditioning.context[0, :2, 4:].unique().tolist() == [0.0]
    assert prompt.conditioning.context[0, 2:].unique().tolist() == [9.0]
    assert prompt.conditioning.pooled.unique().tolist() == [-9.0]
    dropped = without(prompt.conditioning, prompt.layout, {"t5"})
    assert dropped.context[0, 2:].abs().max() == 0


def test_latents_pass_into_model_space_once_and_here():
    mean, logvar, noise = torch.randn(2, 4, 4), torch.randn(2, 4, 4), torch.randn(2, 4, 4)
    cached = CachedLatents(mean, logvar)
    torch.testing.assert_close(cached.draw(), (mean - 0.0609) * 1.5305)
    sample = mean + torch.exp(logvar / 2) * noise
    torch.testing.assert_close(cached.draw(noise), to_model_space(sample))
    torch.testing.assert_close(CachedLatents(mean).draw(noise), to_model_space(mean))


def test_a_mask_is_kept_at_the_size_of_the_latents(cache, tmp_path):
    (tmp_path / "set").mkdir()
    with_hole(64, 64).save(tmp_path / "set" / "hole.png")
    dataset = read(tmp_path / "set")
    cache.prepare(dataset)
    mask = cache.latents(dataset.items[0]).mask
    assert mask is not None
    assert mask.shape == (1, 8, 8)
    assert mask[0, 0].tolist() == pytest.approx([0, 0, 0, 0, 1, 1, 1, 1], abs=0.1)


# --- only what changed --------------------------------------------------------------------------


def change_caption(folder, cache, calls):
    (folder / "1.txt").write_text("another text")
    return cache, {}


def change_file(folder, cache, calls):
    save_texture(folder / "1.png", 64, 64, 77)
    return cache, {}


def add_file(folder, cache, calls):
    save_texture(folder / "new.png", 64, 64, 77)
    (folder / "new.txt").write_text("picture 1")
    return cache, {}


def change_vae(folder, cache, calls):
    return replace(cache, pictures=picture_stage(calls, "another VAE")), {}


def change_encoder(folder, cache, calls):
    return replace(cache, texts={**cache.texts, "t5": text_stage("t5", calls, "other weights")}), {}


def change_length(folder, cache, calls):
    """Tokens change for those captions that were longer than the new length."""
    return replace(cache, texts={**cache.texts, "t5": text_stage("t5", calls, length=3)}), {}


def turn_encoder_off(folder, cache, calls):
    return replace(cache, texts={"clip": cache.texts["clip"]}), {}


def change_resolution(folder, cache, calls):
    return cache, {"resolution": 32}


def change_alpha_without_alpha(folder, cache, calls):
    return cache, {"alpha": "composite"}


def change_storage(folder, cache, calls):
    return replace(cache, storage=torch.float32), {}


@pytest.mark.parametrize(
    ("change", "encoded"),
    [
        (change_caption, {"pictures": 0, "clip": 1, "t5": 1}),
        (change_file, {"pictures": 1}),
        (add_file, {"pictures": 1}),
        (change_vae, {"pictures": 3}),
        (change_encoder, {"pictures": 0, "t5": 4}),
        (change_length, {"pictures": 0, "t5": 1}),  # all three begin alike
        (turn_encoder_off, {"pictures": 0}),
        (change_resolution, {"pictures": 3}),
        (change_alpha_without_alpha, {"pictures": 0}),
        (change_storage, {"pictures": 3, "clip": 4, "t5": 4}),
    ],
)
def test_a_change_costs_what_depends_on_it_and_no_more(cache, calls, folder, change, encoded):
    cache.prepare(read(folder))
    calls.clear()
    changed = replace(cache, _known={})
    changed, options = change(folder, changed, calls)
    changed = replace(changed, _known={})
    dataset = read(folder, **options)
    changed.prepare(dataset)
    assert calls.encoded == encoded
    for item in dataset.items:
        changed.latents(item)
    calls.clear()
    changed.prepare(dataset)
    assert calls.loaded == []


def test_a_change_taken_back_costs_nothing(cache, calls, folder):
    cache.prepare(read(folder))
    change_caption(folder, cache, calls)
    cache.prepare(read(folder))
    calls.clear()
    (folder / "1.txt").write_text("picture 1")
    cache.prepare(read(folder))
    assert calls.loaded == []


def test_equal_files_and_captions_are_encoded_once(cache, calls, folder):
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "copy.txt").write_text("picture 0")
    cache.prepare(read(folder))
    assert calls.encoded == {"pictures": 3, "clip": 4, "t5": 4}


# --- memory, damage, interrupts -----------------------------------------------------------------


def test_networks_leave_when_their_part_is_done(cache, calls, folder):
    cache.prepare(read(folder))
    assert calls.loaded == ["vae", "clip", "t5"]
    gc.collect()
    assert not any(network() for network in calls.alive)


def test_only_the_network_that_is_needed_is_loaded(cache, calls, folder):
    cache.prepare(read(folder))
    calls.clear()
    cache.prepare(read(folder), extra=["", "a sample prompt"])
    assert calls.loaded == ["clip", "t5"]


@pytest.mark.parametrize("damaged", [b"", b"garbage", None])
def test_damaged_entries_are_made_again_and_counted(cache, calls, folder, damaged):
    dataset = read(folder)
    cache.prepare(dataset)
    expected = cache.latents(dataset.items[0]).mean
    entries = sorted((cache.folder / "latents").rglob("*.safetensors"))
    text = sorted((cache.folder / "text").rglob("*.safetensors"))[0]
    for entry in (*entries, text):
        entry.write_bytes(entry.read_bytes()[:-7] if damaged is None else damaged)
    calls.clear()
    prepared = cache.prepare(dataset)
    assert sum(calls.encoded.values()) == prepared.damaged == 4
    assert "4 damaged entries were made again" in prepared.lines()
    torch.testing.assert_close(cache.latents(dataset.items[0]).mean, expected, rtol=0, atol=0)


def test_the_folder_may_be_deleted_in_part(cache, calls, folder):
    cache.prepare(read(folder))
    calls.clear()
    for entry in (cache.folder / "latents").rglob("*.safetensors"):
        entry.unlink()
    prepared = cache.prepare(read(folder))
    assert calls.encoded == {"pictures": 3}
    assert prepared.damaged == 0


def test_an_interrupt_keeps_what_is_done_and_leaves_no_other_file(cache, calls, folder):
    def interrupt(progress):
        if (progress.what, progress.done) == ("clip", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.prepare(read(folder), on_progress=interrupt)
    assert {path.suffix for path in cache.folder.rglob("*.*")} == {".safetensors"}
    calls.clear()
    cache.prepare(read(folder))
    assert calls.encoded == {"pictures": 0, "clip": 2, "t5": 4}


def test_a_full_disk_is_told_before_anything_is_loaded(cache, calls, folder, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1000, 900, 100))
    with pytest.raises(OSError, match=r"cache: the disk is full: [\d,]+ bytes are needed, 100 are"):
        cache.prepare(read(folder))
    assert calls.loaded == []


def test_progress_counts_each_stage(cache, folder):
    seen = []
    cache.prepare(read(folder), on_progress=lambda p: seen.append((p.what, p.done, p.total)))
    assert seen[:3] == [("pictures", 1, 3), ("pictures", 2, 3), ("pictures", 3, 3)]
    assert seen[3:7] == [("clip", n, 4) for n in range(1, 5)]


def test_no_word_of_a_caption_or_name_is_in_the_folder(cache, folder):
    (folder / "0.txt").write_text("unmistakable words")
    cache.prepare(read(folder, memory=cache.folder / "scan.json"))
    for path in cache.folder.rglob("*"):
        assert "unmistakable" not in path.name
        if path.is_file():
            assert b"unmistakable" not in path.read_bytes()
            assert b"0.png" not in path.read_bytes()


def test_captions_that_are_too_long_are_counted(cache, folder):
    (folder / "0.txt").write_text("x" * 60)
    prepared = cache.prepare(read(folder))
    assert prepared.cut == {"clip": 1, "t5": 1}
    assert "1 captions are longer than what t5 is given, and cut" in prepared.lines()


def test_a_picture_that_does_not_fit_the_vae_is_refused(cache):
    with pytest.raises(ValueError, match="image 0: 12x8 does not fit the VAE"):
        cache.prepare(tensor_dataset([torch.zeros(3, 8, 12)], ["a"]))


def test_pictures_in_memory_are_cached_by_their_values(cache, calls):
    images = [torch.rand(3, 16, 16) for _ in range(2)]
    cache.prepare(tensor_dataset(images, ["a", "b"]))
    calls.clear()
    again = tensor_dataset([image.clone() for image in images], ["a", "b"])
    cache.prepare(again)
    assert calls.loaded == []
    assert cache.latents(again.items[0]).mean.shape == (2, 2, 2)


def test_what_is_read_can_be_trained_on_even_inside_inference_mode(cache, folder):
    dataset = read(folder)
    with torch.inference_mode():
        cache.prepare(dataset)
        latents = cache.latents(dataset.items[0])
        prompt = cache.conditioning("")
    assert not latents.mean.is_inference()
    assert not prompt.conditioning.context.is_inference()
