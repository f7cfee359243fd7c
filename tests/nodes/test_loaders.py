"""Names to files to models, and what the user reads when a name or a file is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from sd3_pack.nodes import files
from sd3_pack.nodes.errors import CODES, NodeError
from sd3_pack.nodes.loaders import (
    SD3LoadCheckpoint,
    SD3LoadMMDiT,
    SD3LoadTextEncoders,
    SD3LoadVAE,
)
from sd3_pack.nodes.wires import origin_of
from sd3_pack.sd3_core.checkpoints.load import component_of
from sd3_pack.sd3_core.embedded.model import FILE
from sd3_pack.sd3_core.presets import PRESETS
from tiny import write_tiny_checkpoint


@pytest.fixture
def folder(models):
    """folder(name) -> a model folder to write into; what a test adds is gone after it."""
    import folder_paths

    before = {path for path in models.rglob("*") if path.is_file()}

    def get(name):
        folder_paths.filename_list_cache.clear()
        return models / name

    yield get
    for path in models.rglob("*"):
        if path.is_file() and path not in before:
            path.unlink()
    folder_paths.filename_list_cache.clear()


def test_a_checkpoint_gives_three_native_objects_and_names_its_files(tiny_three, tiny):
    model, clip, vae = tiny_three
    assert origin_of(model).files["mmdit"]["file"] == "tiny.safetensors"
    assert origin_of(model).preset.native_pixels == 64 * 64
    assert set(origin_of(clip.patcher).files) == {"clip_l", "clip_g", "t5"}
    assert set(origin_of(vae.patcher).files) == {"vae"}


def test_every_loader_reports_files_as_json(models):
    out = SD3LoadCheckpoint.execute("tiny.safetensors")
    (told,) = json.loads(json.dumps(out.ui["sd3_report"]))
    assert set(told["files"]) == {"mmdit", "vae", "clip_l", "clip_g", "t5"}
    assert len(told["files"]["vae"]["fingerprint"]) == 16
    assert str(models) not in json.dumps(told)


def test_a_loader_names_the_settings_to_begin_with():
    (told,) = SD3LoadCheckpoint.execute(files.EMBEDDED).ui["sd3_report"]
    preset = PRESETS["sd3_tiny"]
    assert told["preset"] == {
        "steps": preset.steps,
        "cfg": preset.cfg,
        "sampler": preset.sampler,
        "shift": float(component_of(FILE, "mmdit").metadata["sd3_workbench.shift"]),
    }


@pytest.mark.parametrize("layout", ["split", "bare"])
def test_parts_in_files_of_their_own_load_one_by_one(folder, layout, tmp_path):
    written = write_tiny_checkpoint(tmp_path / layout, layout=layout)
    shutil.copy(written["mmdit"], folder("diffusion_models") / "denoiser.safetensors")
    shutil.copy(written["vae"], folder("vae") / "decoder.safetensors")
    assert SD3LoadMMDiT.execute("denoiser.safetensors").args[0].model.diffusion_model.config.depth
    assert SD3LoadVAE.execute("decoder.safetensors").args[0].latent_channels == 16


def add_encoders(folder, tmp_path, kinds=("clip_l", "clip_g", "t5"), below=""):
    written = write_tiny_checkpoint(tmp_path / "parts", parts=kinds, layout="bare")
    target = folder("text_encoders") / below
    target.mkdir(exist_ok=True)
    for path in written.values():
        shutil.copy(path, target / path.name)
    folder("text_encoders")


def test_auto_finds_the_encoders_that_fit_a_checkpoint(folder, tmp_path, models):
    write_tiny_checkpoint(folder("checkpoints") / "bare.safetensors", parts=("mmdit", "vae"))
    shutil.copy(
        models / "checkpoints" / "wide.safetensors", folder("text_encoders") / "a.safetensors"
    )
    add_encoders(folder, tmp_path, ("clip_l", "clip_g"))
    parts, notes = checkpoint_parts("bare.safetensors")
    assert parts["clip_l"].file.name == "clip_l.safetensors"  # not a.safetensors, which is wider
    assert "t5" not in parts
    assert notes == ["No T5 that fits is in models/text_encoders: zeros stand in its place."]


def checkpoint_parts(name, **choices):
    from sd3_pack.nodes.loaders import checkpoint_parts

    every = dict.fromkeys(("t5", "clip_g", "clip_l", "vae"), "auto")
    return checkpoint_parts(files.find_file("checkpoints", name), {**every, **choices})


def test_none_leaves_an_encoder_out(models):
    parts, notes = checkpoint_parts("tiny.safetensors", t5="none")
    assert "t5" not in parts
    assert notes == []


def test_text_encoders_are_found_by_what_they_are(folder, tmp_path):
    with pytest.raises(NodeError, match=r"^SD3:missing_encoder: no text encoder was found"):
        SD3LoadTextEncoders.execute("auto", "auto", "auto")
    with pytest.raises(NodeError, match=r"^SD3:missing_encoder"):
        SD3LoadTextEncoders.execute("none", "none", "none")


def test_parts_of_different_models_are_refused_before_sampling(folder, models):
    shutil.copy(
        models / "checkpoints" / "wide.safetensors", folder("text_encoders") / "w.safetensors"
    )
    with pytest.raises(NodeError, match=r"^SD3:bad_file: w.safetensors: .* belong to different"):
        SD3LoadCheckpoint.execute("tiny.safetensors", t5xxl="w.safetensors")


# Names


@pytest.mark.parametrize("name", ["sub/one.safetensors", "sub\\one.safetensors", "one.safetensors"])
def test_a_file_is_found_with_either_separator_or_by_its_base_name(folder, models, name):
    (folder("vae") / "sub").mkdir(exist_ok=True)
    (models / "vae" / "sub" / "one.safetensors").write_bytes(b"x")
    assert files.find_file("vae", name) == models / "vae" / "sub" / "one.safetensors"
    assert SD3LoadVAE.validate_inputs(name) is True


def test_a_base_name_that_is_there_twice_is_refused(folder, models):
    for sub in ("a", "b"):
        (folder("vae") / sub).mkdir(exist_ok=True)
        (models / "vae" / sub / "one.safetensors").write_bytes(b"x")
    with pytest.raises(NodeError, match=r"^SD3:missing_file: one.safetensors is there 2 times"):
        files.find_file("vae", "one.safetensors")


def test_a_name_that_a_link_brings_is_looked_at_when_the_node_runs(models):
    """ComfyUI hands None to validate_inputs and fingerprint_inputs for a linked input."""
    assert SD3LoadCheckpoint.validate_inputs(None, None, None, None, None) is True
    stable = SD3LoadVAE.fingerprint_inputs(None)
    assert stable == SD3LoadVAE.fingerprint_inputs(None)


def test_near_matches_are_named(models):
    told = SD3LoadCheckpoint.validate_inputs("tinny.safetensors", "auto", "auto", "none", "auto")
    assert told.startswith("SD3:missing_file: tinny.safetensors is not in ComfyUI's folder")
    assert "Did you mean tiny.safetensors" in told


def test_a_name_cannot_leave_its_folder(models):
    with pytest.raises(NodeError, match="^SD3:missing_file"):
        files.find_file("vae", "../checkpoints/nothing.safetensors")


def test_only_safetensors_are_offered(folder):
    (folder("vae") / "old.ckpt").write_bytes(b"x")
    (folder("vae") / "new.safetensors").write_bytes(b"x")
    assert files.safetensors_in("vae") == ["new.safetensors"]


def test_a_file_of_another_kind_is_told_apart(folder, models):
    shutil.copy(models / "checkpoints" / "tiny.safetensors", folder("vae") / "all.safetensors")
    write_tiny_checkpoint(folder("vae") / "text.safetensors", parts=["clip_l"])
    assert SD3LoadVAE.execute("all.safetensors").args[0].first_stage_model is not None
    with pytest.raises(NodeError, match=r"^SD3:bad_file: text.safetensors: holds the text encoder"):
        SD3LoadVAE.execute("text.safetensors")
    (models / "vae" / "web.safetensors").write_bytes(b"<html>")
    folder("vae")
    with pytest.raises(NodeError, match=r"^SD3:bad_file: web.safetensors"):
        SD3LoadVAE.execute("web.safetensors")


def test_a_fingerprint_follows_the_file_not_its_name(folder, models):
    shutil.copy(models / "checkpoints" / "tiny.safetensors", folder("vae") / "a.safetensors")
    before = SD3LoadVAE.fingerprint_inputs("a.safetensors")
    assert SD3LoadVAE.fingerprint_inputs("a.safetensors") == before
    save_file({"x": torch.zeros(3)}, models / "vae" / "a.safetensors")
    assert SD3LoadVAE.fingerprint_inputs("a.safetensors") != before


def test_the_built_in_model_is_offered_only_where_it_is(models, tiny, monkeypatch):
    if files.embedded_file() is None:
        assert files.EMBEDDED not in files.file_names("checkpoints")
    monkeypatch.setattr(files, "embedded_file", lambda: tiny)
    assert files.file_names("checkpoints")[0] == files.EMBEDDED
    assert files.EMBEDDED not in files.file_names("loras")
    assert files.find_file("vae", files.EMBEDDED) == tiny
    assert len(SD3LoadCheckpoint.execute(files.EMBEDDED).args) == 3


def test_every_code_is_known():
    assert len(set(CODES)) == len(CODES)
