"""The prompt cache: what is found in it, what is not, what it keeps and what it does to others."""

import os
from dataclasses import replace

import pytest
import torch
from recipe import normal
from sd3_pack.sd3_core import generate as generation
from sd3_pack.sd3_core.__main__ import main
from sd3_pack.sd3_core.adapters.changes import Adapter, LowRank
from sd3_pack.sd3_core.checkpoints.lora_files import save_lora
from sd3_pack.sd3_core.conditioning import Conditioning
from sd3_pack.sd3_core.generate import generate
from sd3_pack.sd3_core.settings import Files, Settings
from sd3_pack.sd3_core.speed import prompts
from sd3_pack.sd3_core.speed.prompts import PLACE, PromptCache, users_cache
from tiny import write_tiny_checkpoint
from tiny_tokenizers import write_tiny_tokenizers

QUICK = Settings("a red circle", seed=7, width=64, height=64, steps=1, cfg=3.0, device="cpu")
LOADERS = ("load_clip", "load_t5_to_fit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_tokenizers(folder / "tokenizers")
    for name, seed in (("tiny", 0), ("other", 1)):
        write_tiny_checkpoint(
            folder / f"{name}.safetensors", tokenizers=folder / "tokenizers", seed=seed
        )
    return folder


@pytest.fixture
def files(folder):
    return Files(checkpoint=folder / "tiny.safetensors")


@pytest.fixture
def cache(tmp_path):
    return PromptCache(tmp_path / "prompts")


@pytest.fixture
def opened(monkeypatch):
    """The text encoders that are read from disk."""
    names = []

    def noting(name):
        load = getattr(generation, name)

        def loaded(part, *args, **kwargs):
            names.append(part.kind)
            return load(part, *args, **kwargs)

        return loaded

    for name in LOADERS:
        monkeypatch.setattr(generation, name, noting(name))
    return names


def entry(number: int, rows: int = 4) -> tuple[str, Conditioning]:
    tensors = (normal(f"entry {number}", (1, rows, 8), 0), normal("pooled", (1, 4), number))
    return f"{number:064x}", Conditioning(*map(torch.from_numpy, tensors))


def test_a_known_prompt_opens_no_encoder_and_gives_equal_bits(files, cache, opened):
    first = generate(files, QUICK, known=cache)
    assert sorted(opened) == ["clip_g", "clip_l", "t5"]
    opened.clear()
    again = generate(files, QUICK, known=cache)
    assert not opened
    assert torch.equal(again.pixels, first.pixels)
    assert (again.tokens, again.notes) == (first.tokens, first.notes)
    assert torch.equal(generate(files, QUICK).pixels, first.pixels)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue circle"},
        {"prompt": "a (red:1.2) circle"},
        {"negative": "a dog"},
        {"prompt_clip_g": "a dog"},
        {"prompt_t5": "a dog"},
        {"use": ("clip_l", "t5")},
        {"use": ("clip_l",), "t5_length": 20},
        {"t5_length": 20},
        {"dtype": "bf16"},
    ],
)
def test_what_changes_a_prompt_is_another_entry(files, cache, opened, change):
    generate(files, QUICK, known=cache)
    opened.clear()
    changed = replace(QUICK, **change)
    found = generate(files, changed, known=cache)
    assert opened
    assert torch.equal(found.pixels, generate(files, changed).pixels)


def test_other_encoders_are_other_entries(folder, files, cache, opened):
    generate(files, QUICK, known=cache)
    opened.clear()
    generate(replace(files, t5=folder / "other.safetensors"), QUICK, known=cache)
    assert opened


@pytest.mark.parametrize("change", [{"seed": 8}, {"steps": 2}, {"cfg": 4.0}, {"width": 128}])
def test_what_changes_the_picture_alone_finds_its_prompt(files, cache, opened, change):
    generate(files, QUICK, known=cache)
    opened.clear()
    generate(files, replace(QUICK, **change), known=cache)
    assert not opened


def test_changed_encoders_are_not_kept(files, cache, tmp_path):
    layer = "text_model.encoder.layers.0.mlp.fc1"
    change = LowRank(torch.ones(1, 64), torch.ones(96, 1), 1.0)
    path = save_lora(tmp_path / "style.safetensors", {"clip_l": (Adapter(layer, change),)})
    generate(replace(files, loras=((path, 1.0),)), QUICK, known=cache)
    assert len(cache) == 0


def test_no_word_is_stored(files, cache):
    generate(files, QUICK, known=cache)
    paths = list(cache.folder.iterdir())
    assert len(paths) == 2
    for path in paths:
        assert not any(word in path.read_bytes() for word in (b"red", b"circle", b"clip"))
        assert "circle" not in path.name


def test_a_damaged_entry_is_encoded_anew(files, cache, opened):
    first = generate(files, QUICK, known=cache)
    for path in cache.folder.iterdir():
        path.write_bytes(path.read_bytes()[:-40])
    opened.clear()
    assert torch.equal(generate(files, QUICK, known=cache).pixels, first.pixels)
    assert opened
    opened.clear()
    generate(files, QUICK, known=cache)
    assert not opened


def test_a_folder_that_cannot_be_written_costs_only_the_cache(files, tmp_path):
    (tmp_path / "file").write_text("no folder")
    cache = PromptCache(tmp_path / "file" / "prompts")
    assert torch.equal(generate(files, QUICK, known=cache).pixels, generate(files, QUICK).pixels)


def test_the_longest_unused_leave_first_and_other_files_stay(tmp_path):
    cache = PromptCache(tmp_path, limit=10**9)
    for number in range(4):
        key, conditioning = entry(number)
        cache[key] = conditioning
        os.utime(tmp_path / f"{key}.safetensors", (number, number))
    foreign = tmp_path / "model.safetensors"
    foreign.write_bytes(b"x" * 10_000)
    size = (tmp_path / f"{entry(0)[0]}.safetensors").stat().st_size
    assert torch.equal(cache[entry(0)[0]].context, entry(0)[1].context)  # used now
    cache.limit = 3 * size
    key, conditioning = entry(4)
    cache[key] = conditioning
    assert set(cache) == {entry(number)[0] for number in (0, 3, 4)}
    assert foreign.exists()


def test_an_entry_that_another_program_took_away_is_unknown(cache):
    key, conditioning = entry(1)
    cache[key] = conditioning
    assert key in cache
    (cache.folder / f"{key}.safetensors").unlink()
    assert key not in cache
    assert len(cache) == 0


def test_an_entry_is_found_in_a_folder_that_may_only_be_read(cache, monkeypatch):
    key, conditioning = entry(1)
    cache[key] = conditioning

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "utime", refused)
    assert torch.equal(cache[key].pooled, conditioning.pooled)


def test_the_users_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    for off in ("off", "OFF", "0"):
        monkeypatch.setenv(PLACE, off)
        assert users_cache() is None
    monkeypatch.setenv(PLACE, str(tmp_path / "here"))
    cache = users_cache()
    assert cache is not None
    assert cache.folder == tmp_path / "here"
    monkeypatch.delenv(PLACE)
    monkeypatch.setattr(prompts, "usual_folder", lambda: tmp_path)
    cache = users_cache()
    assert cache is not None
    assert cache.folder == tmp_path / "sd3-workbench" / "prompts"
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(PLACE, str(tmp_path / "file"))
    with pytest.raises(ValueError, match="a file; name a folder, or say off"):
        users_cache()


def test_the_command_line_keeps_prompts_unless_told_not_to(files, tmp_path, monkeypatch, opened):
    monkeypatch.setenv(PLACE, str(tmp_path / "prompts"))
    command = ["generate", "a red circle", "--checkpoint", str(files.checkpoint), "--seed", "1"]
    command += ["--width", "64", "--height", "64", "--steps", "1", "--device", "cpu"]
    command += ["-o", str(tmp_path / "picture.png")]
    assert main([*command, "--no-prompt-cache"]) == 0
    assert not (tmp_path / "prompts").exists()
    assert main(command) == 0
    opened.clear()
    assert main(command) == 0
    assert not opened
    assert main([*command, "--no-prompt-cache"]) == 0
    assert opened
