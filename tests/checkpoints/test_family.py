"""Which model a denoiser in a folder of diffusers is: names, index, configurations, scheduler."""

import json
from pathlib import Path

import pytest
from sd3_pack.sd3_core.checkpoints.family import model_family, model_preset, told_to_a_single_file
from sd3_pack.sd3_core.checkpoints.inspect import inspect
from sd3_pack.sd3_core.checkpoints.layouts import Component, find_components
from sd3_pack.sd3_core.checkpoints.load import component_of
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.models.mmdit import MMDiTConfig
from sd3_pack.sd3_core.settings import Files, Settings, make_plan
from special_files import CAN_BE_MADE, make_special
from tiny import write_tiny_checkpoint

LARGE = MMDiTConfig(38, qk_norm=True)
MEDIUM = MMDiTConfig(
    24, pos_embed_max_size=384, qk_norm=True, dual_attention_layers=tuple(range(13))
)


def write_folder(folder: Path, scheduler: object = None, **configurations: object) -> Component:
    """As diffusers saves it, around a file that nothing here reads."""
    (folder / "transformer").mkdir(parents=True)
    written = {"transformer/config": {"_class_name": "SD3Transformer2DModel"}, "model_index": {}}
    for name, contents in (written | configurations).items():
        (folder / f"{name}.json").write_text(json.dumps(contents))
    if scheduler is not None:
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return Component("mmdit", folder / "transformer" / "diffusion_pytorch_model.safetensors", {})


@pytest.mark.parametrize(
    "place",
    [
        "stable-diffusion-3.5-large-turbo",
        "models--stabilityai--stable-diffusion-3.5-large-turbo/snapshots/0ba6cff",
    ],
)
def test_the_folders_name_tells_a_turbo(tmp_path, place):
    mmdit = write_folder(tmp_path / place)
    assert model_family(mmdit, LARGE) == "sd3.5_large_turbo"
    preset = model_preset(mmdit, LARGE)
    assert (preset.steps, preset.cfg, preset.shift) == (4, 1.0, 3.0)
    assert model_family(write_folder(tmp_path / "x"), LARGE) == "sd3.5_large"


@pytest.mark.parametrize("name", ["model_index", "transformer/config"])
def test_a_configuration_tells_a_turbo(tmp_path, name):
    source = {"_name_or_path": "stabilityai/stable-diffusion-3.5-large-turbo"}
    assert model_family(write_folder(tmp_path, **{name: source}), LARGE) == "sd3.5_large_turbo"


def test_the_index_of_shards_and_a_relative_path_tell_as_much(tmp_path, monkeypatch):
    folder = tmp_path / "large-turbo"
    write_folder(folder)
    monkeypatch.chdir(folder)
    index = Path("transformer/diffusion_pytorch_model.safetensors.index.json")
    assert model_family(Component("mmdit", index, {}), LARGE) == "sd3.5_large_turbo"


def test_a_file_with_a_name_of_its_own_is_not_called_by_its_folder(tmp_path):
    (tmp_path / "turbo").mkdir()
    (tmp_path / "turbo" / "config.json").write_text("{}")
    mmdit = Component("mmdit", tmp_path / "turbo" / "sd3.5_large.safetensors", {})
    assert model_family(mmdit, LARGE) == "sd3.5_large"


def test_the_scheduler_tells_the_shift(tmp_path):
    mmdit = write_folder(tmp_path / "stable-diffusion-3.5-medium-turbo", {"shift": 5.0})
    preset = model_preset(mmdit, MEDIUM)
    assert (preset.title, preset.steps, preset.shift) == ("SD3.5 Medium Turbo", 8, 5.0)
    assert model_preset(write_folder(tmp_path / "a", {"shift": 2}), MEDIUM).shift == 2.0
    dynamic = {"shift": 2.0, "use_dynamic_shifting": True}
    assert model_preset(write_folder(tmp_path / "b", dynamic), MEDIUM).shift == 3.0
    assert model_preset(write_folder(tmp_path / "c", {}), MEDIUM).shift == 3.0


@pytest.mark.parametrize("scheduler", [{"shift": "5"}, {"shift": 0}, {"shift": True}, [5.0]])
def test_a_damaged_scheduler_is_named(tmp_path, scheduler):
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json: .*Download it again"):
        model_preset(write_folder(tmp_path, scheduler), MEDIUM)


@pytest.mark.skipif(not CAN_BE_MADE, reason="this system makes no pipes")
@pytest.mark.parametrize("kind", ["pipe", "endless device"])
def test_configurations_that_are_no_files_are_not_read(tmp_path, kind):
    mmdit = write_folder(tmp_path / "turbo")
    (tmp_path / "turbo" / "model_index.json").unlink()
    make_special(tmp_path / "turbo" / "model_index.json", kind)
    assert model_family(mmdit, LARGE) == "sd3.5_large_turbo"
    (tmp_path / "turbo" / "scheduler").mkdir()
    make_special(tmp_path / "turbo" / "scheduler" / "scheduler_config.json", kind)
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json: .*no regular file"):
        model_preset(mmdit, MEDIUM)


def test_a_damaged_configuration_only_hints_at_nothing(tmp_path):
    mmdit = write_folder(tmp_path / "turbo")
    (tmp_path / "turbo" / "model_index.json").write_text("{" * 9)
    (tmp_path / "turbo" / "transformer" / "config.json").write_text("[" * 50_000)
    assert model_family(mmdit, LARGE) == "sd3.5_large_turbo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    write_tiny_checkpoint(folder, layout="diffusers")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"shift": 5.0}))
    return folder


def test_inspect_and_the_run_agree(folder):
    """Of the whole folder, its subfolder and the file in it."""
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for path in (folder, folder / "transformer", weights):
        report = inspect(path)
        plan = make_plan(
            Files(checkpoint=folder, mmdit=None if path == folder else path),
            Settings("x", use=(), width=64, height=64, device="cpu"),
        )
        told = (plan.settings.steps, plan.cfg, plan.sampler, plan.schedule.shift)
        assert told == tuple(report.preset.values()) == (28, 4.5, "euler", 5.0)
        assert (
            "drawn by default with: steps 28, cfg 4.5, sampler euler, shift 5.0" in report.lines()
        )


def test_a_file_made_of_a_folder_keeps_what_the_folder_told(folder, tmp_path):
    mmdit = find_components(folder)["mmdit"]
    from sd3_pack.sd3_core.__main__ import main

    whole = tmp_path / "whole.safetensors"
    assert main(["export", str(whole), "--checkpoint", str(folder)]) == 0
    assert model_preset(component_of(whole, "mmdit"), MMDiTConfig(2)).shift == 5.0
    turbo = write_folder(tmp_path / "large-turbo", {"shift": 3.0})
    told = told_to_a_single_file(turbo, LARGE, "a.safetensors")
    assert told == {"sd3_workbench.family": "sd3.5_large_turbo"}
    single = Component("mmdit", tmp_path / "a.safetensors", {}, told)
    assert model_family(single, LARGE) == "sd3.5_large_turbo"
    assert told_to_a_single_file(turbo, LARGE, "large_turbo.safetensors") == {}
    assert mmdit.file.is_file()
