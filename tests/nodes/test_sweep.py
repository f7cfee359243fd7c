"""SD3Sweep: its cells are SD3Sample's pictures, and the table tells how they were drawn."""

import csv
import io
import re
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from comfy_extras.nodes_model_merging import ModelAdd
from sd3_pack.nodes.errors import NodeError
from sd3_pack.nodes.files import EMBEDDED
from sd3_pack.nodes.latents import SD3VAEDecode
from sd3_pack.nodes.loaders import SD3LoadCheckpoint
from sd3_pack.nodes.lora import SD3LoadLoRA, has_lora, with_lora_strength
from sd3_pack.nodes.sampling import SD3Sample, SD3ShiftSchedule
from sd3_pack.nodes.speed import SD3Speed
from sd3_pack.nodes.sweep import SD3Sweep
from sd3_pack.nodes.text import SD3EncodePrompt
from tiny import write_tiny_lora

PROMPT, NEGATIVE = "a red circle", "blue"
BASE = {
    "seed": 5,
    "steps": 2,
    "cfg": 3.0,
    "shift": 0.0,
    "sampler_name": "euler",
    "scheduler": "normal",
}
SKIP = {"slg_layers": "1", "slg_start_percent": 0.0, "slg_end_percent": 1.0}


def empty(side=8, batch=1):
    return {"samples": torch.zeros(batch, 16, side, side)}


def sweep(three, x, y=("none", ""), latent=None, prompt=PROMPT, **more):
    model, clip, vae = three
    settings = {**BASE, **more}
    latent = latent or empty()
    return SD3Sweep.execute(model, clip, vae, latent, prompt, NEGATIVE, *x, *y, **settings)


def told(out):
    return out.ui["sd3_report"][0]


def single(three, latent=None, use=(True, True, True), strength=None, **changes):
    """The picture of the nodes laid side by side."""
    model, clip, vae = three
    if strength is not None:
        model, clip = SD3LoadLoRA.execute(model, "swept.safetensors", strength, clip).args
    settings = {**BASE, **changes}
    words = SD3EncodePrompt.execute(clip, PROMPT, NEGATIVE, "", "", *use).args
    shift = settings["shift"] or 2.0  # the tiny checkpoint's own
    sigmas = SD3ShiftSchedule.execute(
        settings["steps"], shift, settings["scheduler"], settings.get("denoise", 1.0)
    ).args[0]
    skip = {name: settings[name] for name in settings if name.startswith("slg_")}
    drawn = SD3Sample.execute(
        model,
        *words,
        latent or empty(),
        sigmas,
        settings["seed"],
        settings["cfg"],
        settings["sampler_name"],
        **skip,
    ).args[0]
    return SD3VAEDecode.execute(drawn, vae).args[0]


@pytest.fixture(scope="module")
def lora(models):
    return write_tiny_lora(models / "loras" / "swept.safetensors")


@pytest.fixture
def with_lora(tiny_three, lora):
    model, clip, vae = tiny_three
    return (*SD3LoadLoRA.execute(model, lora.name, 1.0, clip).args, vae)


@pytest.mark.parametrize(
    ("x", "y", "cells"),
    [
        (
            ("steps", "1, 3"),
            ("cfg", "1, 4"),
            [{"steps": s, "cfg": c} for c in (1.0, 4.0) for s in (1, 3)],
        ),
        (
            ("shift", "1, 3"),
            ("sampler_name", "heun, dpmpp_2m"),
            [{"shift": s, "sampler_name": n} for n in ("heun", "dpmpp_2m") for s in (1.0, 3.0)],
        ),
        (
            ("encoders", "all, clip_l, clip_g+t5, none"),
            ("none", ""),
            [
                {"use": use}
                for use in (
                    (True, True, True),
                    (True, False, False),
                    (False, True, True),
                    (False, False, False),
                )
            ],
        ),
        (
            ("slg_scale", "0, 2"),
            ("slg_layers", "0, 1"),
            [{"slg_scale": s, "slg_layers": n} for n in "01" for s in (0.0, 2.0)],
        ),
        (
            ("seed", "1, 2"),
            ("scheduler", "normal, beta"),
            [{"seed": s, "scheduler": n} for n in ("normal", "beta") for s in (1, 2)],
        ),
    ],
)
def test_a_cell_is_sd3_samples_picture_bit_for_bit(tiny_three, x, y, cells):
    more = SKIP if x[0] == "slg_scale" else {}
    _, pictures, _, _ = sweep(tiny_three, x, y, **more).args
    assert len(pictures) == len(cells)
    for picture, changes in zip(pictures, cells, strict=True):
        assert torch.equal(picture, single(tiny_three, **{**more, **changes})[0]), changes


def test_a_lora_counts_by_the_strength_of_its_cell(tiny_three, with_lora):
    before = single(tiny_three)
    x, y = ("lora_strength", "0, 0.5, 1"), ("encoders", "all, clip_l")
    _, pictures, _, _ = sweep(with_lora, x, y).args
    for number, picture in enumerate(pictures):
        row, column = divmod(number, 3)
        use = (True, row == 0, row == 0)
        alone = single(tiny_three, strength=(0.0, 0.5, 1.0)[column], use=use)
        assert torch.equal(picture, alone[0]), number
    assert len({tuple(picture.flatten().tolist()) for picture in pictures}) == 6
    torch.testing.assert_close(single(tiny_three), before, atol=1e-4, rtol=0)
    assert has_lora(with_lora[0])


def test_a_merged_models_own_patches_keep_their_strength(tiny_three):
    model = tiny_three[0].clone()
    name = "diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"
    other = {name: (model.model.state_dict()[name],)}
    model.add_patches(other, 0.3, 0.7)  # as ModelMergeSimple does
    assert not has_lora(model)
    assert with_lora_strength(model, 0.0).patches == model.patches


def test_what_a_merge_adds_is_no_lora(tiny_three, with_lora):
    (model,) = ModelAdd().merge(tiny_three[0], with_lora[0])
    assert model.patches
    assert not has_lora(model)
    assert with_lora_strength(model, 0.0).patches == model.patches


def test_every_axis_is_a_widget_of_the_node_or_has_none():
    sockets = {socket.id: socket for socket in SD3Sweep.define_schema().inputs}
    axes = sockets["x_axis"].options
    assert set(axes) - set(sockets) == {"encoders", "lora_strength"}
    assert sockets["y_axis"].options == ["none", *axes]


def test_the_run_that_sd3_speed_measures_by_is_no_part_of_a_cells_path(tiny_three):
    model, clip, vae = tiny_three
    paths = []
    for measure in (False, True):
        options = {"cfg_end_percent": 0.5, "measure": measure}
        three = SD3Speed.execute(model, 0.0, **options).args[0], clip, vae
        cells = told(sweep(three, ("steps", "3, 4")))["cells"]
        paths.append([(cell["path_length"], cell["path_ratio"]) for cell in cells])
    assert paths[0] == paths[1]


def test_image_to_image_and_a_batch_are_swept(tiny_three):
    latent = {"samples": torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3))}
    out = sweep(tiny_three, ("cfg", "1, 4"), latent=latent, denoise=0.6)
    _, pictures, _, _ = out.args
    assert len(pictures) == 4
    assert torch.equal(pictures[2:], single(tiny_three, latent, cfg=4.0, denoise=0.6))
    assert told(out)["cells"][0]["distance"] > 0 == told(out)["cells"][1]["distance"]


def test_a_run_without_a_step_has_no_path(tiny_three):
    report = told(sweep(tiny_three, ("cfg", "0, 4"), denoise=0.0))
    assert [cell["path_length"] for cell in report["cells"]] == [0, 0]
    assert [note[:9] for note in report["notes"]] == ["cfg is 0:"]


def test_the_grid_the_table_and_the_report_tell_the_same(tiny_three):
    out = sweep(tiny_three, ("steps", "1, 8"), ("cfg", "1, 4"), reference_cell=1)
    grid, pictures, table, text = out.args
    assert grid.shape[0] == 1
    assert grid.shape[1] > 2 * 128 < grid.shape[2]  # 64 pixels are shown twice as large
    assert grid.dtype == torch.float32
    assert 0 <= grid.min() < grid.max() <= 1
    report = told(out)
    assert report["varied"] == ["steps", "cfg"]
    assert "cfg" not in report["fixed"]
    assert report["fixed"]["shift"] == 2.0
    assert report["files"]["mmdit"]["file"] == "tiny.safetensors"
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["path_ratio"] for row in rows] == [f"{c['path_ratio']}" for c in report["cells"]]
    assert [float(row["distance"]) == 0 for row in rows] == [True, False, False, False]
    assert [float(row["path_ratio"]) > 1.0001 for row in rows] == [False, True, False, True]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert table.splitlines()[2].startswith("| 1 | 1 | 1 |")
    assert "right" not in rows[0]  # this model has no checker
    assert pictures.shape == (4, 64, 64, 3)


def test_the_embedded_model_is_judged_on_its_world(models):
    three = SD3LoadCheckpoint.execute(EMBEDDED).args
    out = sweep(three, ("steps", "1, 2"), latent=empty(16))
    assert {cell["pictures"] for cell in told(out)["cells"]} == {1}
    assert "right" in out.args[3].splitlines()[0]
    out = sweep(three, ("steps", "1"), latent=empty(16), prompt="a lighthouse")
    assert "right" not in told(out)["cells"][0]
    assert told(out)["notes"][0].startswith('No score: "lighthouse"')


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (("steps", "1, two"), ("none", ""), "SD3:bad_setting: steps: 'two' is no value"),
        (("steps", ""), ("none", ""), "SD3:bad_setting: steps has no values"),
        (("steps", "1"), ("steps", "2"), "both axes are steps"),
        (("cfg", ",".join(map(str, range(101)))), ("none", ""), "'100' is|101 cells"),
        (("steps", "1"), ("nothing", "2"), "the axis is 'nothing'"),
        (("skip_scale", "1"), ("none", ""), "the axis is 'skip_scale'; .* slg_scale, slg_layers"),
        (("sampler_name", "x"), ("none", ""), "SD3:bad_setting: sampler_name: 'x' is no value"),
        (("slg_scale", "0, 10.5"), ("none", ""), "slg_scale: 10.5 is no .* from 0 to 10"),
        (("slg_scale", "-1"), ("none", ""), "slg_scale: -1 is no value of it"),
    ],
)
def test_what_is_typed_is_refused_when_it_is_queued(tiny_three, x, y, message):
    answer = SD3Sweep.validate_inputs(*x, *y)
    assert isinstance(answer, str)
    assert re.search(message, answer)
    with pytest.raises(NodeError, match=message):
        sweep(tiny_three, x, y)
    assert SD3Sweep.validate_inputs("steps", None, "none", "") is True
    assert SD3Sweep.validate_inputs("steps", "1, 2", "none", "", 2) is True


@pytest.mark.parametrize(
    ("x", "more", "message"),
    [
        (("lora_strength", "0, 1"), {}, "bad_setting: lora_strength changes nothing without"),
        (("slg_layers", "0, 1"), {}, "slg_layers changes nothing where skip-layer guidance is off"),
        (
            ("slg_scale", "0, 1"),
            {},
            r"skip layers \[7, 8, 9\]: this network has the blocks 0 to 1",
        ),
        (("steps", "1, 2"), {"reference_cell": 3}, "there are the cells 1 to 2"),
        (("steps", "1, 2"), {"latent": empty(64)}, "wrong_latent: the picture would be 512 pixels"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_the_work(
    tiny_three, monkeypatch, x, more, message
):
    monkeypatch.setattr(
        "sd3_pack.nodes.sweep.look_up_or_encode", lambda *_: pytest.fail("long work")
    )
    with pytest.raises(NodeError, match=message):
        sweep(tiny_three, x, **more)


def test_an_encoder_that_the_clip_lacks_is_refused(tiny_three, monkeypatch):
    monkeypatch.setattr("sd3_pack.nodes.sweep.present", lambda clip: ["clip_l", "clip_g"])
    with pytest.raises(NodeError, match=r"encoders all: T5 is not loaded.*clip_l\+clip_g"):
        sweep(tiny_three, ("encoders", "clip_l, all"))


def test_a_model_or_clip_of_another_kind_is_refused(tiny_three):
    model, clip, vae = tiny_three
    with pytest.raises(NodeError, match="wrong_model"):
        sweep((SimpleNamespace(model=SimpleNamespace()), clip, vae), ("steps", "1"))
    with pytest.raises(NodeError, match="missing_encoder"):
        sweep((model, None, vae), ("steps", "1"))
    with pytest.raises(NodeError, match="missing_part"):
        sweep((model, clip, None), ("steps", "1"))


def test_every_step_of_every_cell_moves_one_bar(tiny_three, monkeypatch):
    shown = []

    def prepare(model, total):
        return lambda step, x0, x, steps: shown.append((step, steps, total))

    monkeypatch.setattr("sd3_pack.nodes.sweep.latent_preview.prepare_callback", prepare)
    sweep(tiny_three, ("steps", "1, 3"))
    assert shown == [(step, 4, 4) for step in range(4)]


def test_an_interruption_ends_it_within_a_step(tiny_three, monkeypatch):
    calls = []

    def prepare(model, total):
        def callback(step, x0, x, steps):
            calls.append(step)
            comfy.model_management.interrupt_current_processing()

        return callback

    monkeypatch.setattr("sd3_pack.nodes.sweep.latent_preview.prepare_callback", prepare)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sweep(tiny_three, ("steps", "8, 9"))
    comfy.model_management.interrupt_current_processing(False)
    assert calls == [0]
