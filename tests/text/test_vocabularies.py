"""Where tokenizers are found, in which order, and what is said when they are not."""

import shutil
import sys
import types

import pytest
import torch
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.text.vocabularies import (
    COMFY_CLIP,
    COMFY_T5,
    find_tokenizers,
    pack_tokenizers,
)
from tiny_tokenizers import WORDS, write_tiny_clip, write_tiny_spiece, write_tiny_t5

ENCODERS = ("clip_l", "clip_g", "t5")
TEXT = "a photo of a cat"


@pytest.fixture(autouse=True)
def no_comfyui(monkeypatch, tmp_path):
    """A machine without ComfyUI, whatever this one has."""
    monkeypatch.delitem(sys.modules, "comfy", raising=False)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path / "nobody")


def write_comfyui(folder, words=WORDS):
    write_tiny_clip(folder / COMFY_CLIP, words)
    write_tiny_t5(folder / COMFY_T5, words)
    return folder


def blobs(tensors):
    """Tensors of a checkpoint as the finder takes them."""
    return {name: tensor.numpy().tobytes for name, tensor in tensors.items()}


def test_a_given_directory_in_our_layout(tiny_folder):
    found = find_tokenizers(ENCODERS, directory=tiny_folder)
    assert found.places["clip_g"] == found.places["clip_l"] == str(tiny_folder / "clip_l")
    assert found.clip_l.ids(TEXT) == found.clip_g.ids(TEXT)


def test_a_given_directory_in_diffusers_layout(tmp_path):
    write_tiny_clip(tmp_path / "tokenizer")
    write_tiny_clip(tmp_path / "tokenizer_2")
    write_tiny_spiece(tmp_path / "tokenizer_3")
    found = find_tokenizers(ENCODERS, directory=tmp_path)
    assert found.places == {
        "clip_l": str(tmp_path / "tokenizer"),
        "clip_g": str(tmp_path / "tokenizer_2"),
        "t5": str(tmp_path / "tokenizer_3"),
    }


def test_a_given_directory_that_is_comfyui(tmp_path):
    found = find_tokenizers(ENCODERS, directory=write_comfyui(tmp_path))
    assert found.places["t5"] == str(tmp_path / COMFY_T5)


@pytest.mark.parametrize(("inner", "needed"), [("clip_l", ("clip_l", "clip_g")), ("t5", ("t5",))])
def test_a_given_directory_that_is_one_tokenizer(tiny_folder, inner, needed):
    found = find_tokenizers(needed, directory=tiny_folder / inner)
    assert set(found.places.values()) == {str(tiny_folder / inner)}


def test_tokenizer_json_is_told_apart_by_its_model(tiny_folder, tmp_path):
    shutil.copy(tiny_folder / "t5" / "tokenizer.json", tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer for CLIP"):
        find_tokenizers(ENCODERS, directory=tmp_path)


def test_only_what_is_needed_is_searched(tmp_path):
    write_tiny_t5(tmp_path / "t5")
    found = find_tokenizers(("t5",), directory=tmp_path)
    assert found.clip_l is None
    assert found.t5 is not None


def test_each_tokenizer_comes_from_the_first_place_that_has_it(tmp_path, tiny_folder):
    """directory, then checkpoint, then diffusers' folder, then ComfyUI."""
    write_tiny_clip(tmp_path / "given" / "clip_l")
    write_tiny_clip(tmp_path / "model" / "tokenizer")
    write_tiny_t5(tmp_path / "model" / "tokenizer_3")
    inside = blobs(pack_tokenizers(tiny_folder))
    given, model = tmp_path / "given", tmp_path / "model"
    found = find_tokenizers(ENCODERS, directory=given, checkpoint=inside, diffusers=model)
    assert found.places["clip_l"] == str(given / "clip_l")
    assert found.places["t5"].startswith("inside the checkpoint")
    found = find_tokenizers(ENCODERS, checkpoint={}, diffusers=model)
    assert found.places["t5"] == str(model / "tokenizer_3")


def test_comfyui_that_runs_comes_before_the_one_of_the_environment(tmp_path, monkeypatch):
    running, named = write_comfyui(tmp_path / "running"), write_comfyui(tmp_path / "named")
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert find_tokenizers(("t5",)).places["t5"] == str(named / COMFY_T5)
    package = types.ModuleType("comfy")
    package.__path__ = [str(running / "comfy")]
    monkeypatch.setitem(sys.modules, "comfy", package)
    assert find_tokenizers(("t5",)).places["t5"] == str(running / COMFY_T5)


def test_comfyui_is_found_where_its_installer_puts_it(tmp_path):
    home = write_comfyui(tmp_path / "nobody" / "comfy" / "ComfyUI")
    assert find_tokenizers(("clip_l",)).places["clip_l"] == str(home / COMFY_CLIP)


def test_packed_tokenizers_come_back_the_same(tiny_folder, tiny_tokenizers):
    packed = pack_tokenizers(tiny_folder)
    assert sorted(packed) == [
        "text_encoders.clip_l.tokenizer.merges.txt",
        "text_encoders.clip_l.tokenizer.vocab.json",
        "text_encoders.t5xxl.tokenizer.tokenizer.json",
    ]
    assert {tensor.dtype for tensor in packed.values()} == {torch.uint8}
    found = find_tokenizers(ENCODERS, checkpoint=blobs(packed))
    for name in ENCODERS:
        ours, theirs = getattr(found, name), getattr(tiny_tokenizers, name)
        assert ours.ids(TEXT) == theirs.ids(TEXT)
        assert (ours.start, ours.end, ours.pad) == (theirs.start, theirs.end, theirs.pad)


def test_a_clip_g_of_its_own_is_packed_too(tmp_path):
    write_tiny_clip(tmp_path / "clip_l")
    write_tiny_clip(tmp_path / "clip_g", words=("cat",))
    packed = pack_tokenizers(tmp_path)
    assert "text_encoders.clip_g.tokenizer.vocab.json" in packed
    found = find_tokenizers(("clip_l", "clip_g"), checkpoint=blobs(packed))
    assert found.clip_g.size < found.clip_l.size


def test_clip_g_alone_pads_with_zero(tiny_folder):
    found = find_tokenizers(("clip_g", "clip_l"), directory=tiny_folder)
    assert (found.clip_g.pad, found.clip_l.pad) == (0, found.clip_l.end)


def test_one_error_lists_all_that_is_missing_the_places_and_the_download(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "elsewhere"))
    with pytest.raises(CheckpointError) as error:
        find_tokenizers(ENCODERS, checkpoint={}, diffusers=tmp_path / "model")
    message = str(error.value)
    assert "no tokenizer for CLIP and T5" in message
    for place in (
        "inside the checkpoint",
        str(tmp_path / "model"),
        str(tmp_path / "elsewhere"),
        str(tmp_path / "nobody" / "comfy" / "ComfyUI"),
        "hf download openai/clip-vit-large-patch14 vocab.json merges.txt",
        "hf download google/t5-v1_1-xxl spiece.model",
    ):
        assert place in message


def test_the_error_names_only_the_download_that_is_missing(tmp_path):
    write_tiny_clip(tmp_path / "clip_l")
    with pytest.raises(CheckpointError, match="no tokenizer for T5") as error:
        find_tokenizers(ENCODERS, directory=tmp_path)
    assert "clip-vit" not in str(error.value)


@pytest.mark.parametrize("use", [lambda p: find_tokenizers((), directory=p), pack_tokenizers])
def test_a_directory_without_any_tokenizer_is_an_error(tmp_path, use):
    with pytest.raises(CheckpointError, match="no tokenizer in it. Expected clip_l/"):
        use(tmp_path / "empty")
