"""A sweep from files: every cell is what `generate` draws with its settings."""

from dataclasses import replace

import pytest
import torch
from sd3_pack.sd3_core import generate as generation
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.generate import generate
from sd3_pack.sd3_core.measures import distance
from sd3_pack.sd3_core.settings import Files, Settings
from sd3_pack.sd3_core.sweep import run
from sd3_pack.sd3_core.sweep.axes import lay_out, read_axis
from sd3_pack.sd3_core.sweep.run import make_plans, sweep, with_choice
from tiny import write_tiny_checkpoint, write_tiny_lora, write_tiny_model

QUICK = Settings(
    "a red circle",
    negative="blue",
    seed=7,
    steps=2,
    cfg=3.0,
    sampler="euler",
    device="cpu",
    skip_layers=(1,),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def files(folder):
    path = write_tiny_lora(folder / "style.safetensors")
    return Files(checkpoint=folder / "tiny.safetensors", loras=((path, 0.5),))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (("steps", "1, 3"), ("cfg", "1, 4")),
        (("shift", "1, 3"), ("sampler", "heun, dpmpp_2m")),
        (("encoders", "all, clip_l, t5+clip_g, none"), None),
        (("skip_scale", "0, 2"), ("skip_layers", "0, 1, 0+1")),
        (("lora_strength", "0, 1, 2"), ("encoders", "all, clip_l")),
        (("seed", "1, 2"), ("scheduler", "normal, beta")),
    ],
)
def test_a_cell_is_the_picture_of_its_settings(files, x, y):
    layout = lay_out(read_axis(*x), y and read_axis(*y))
    done = sweep(files, QUICK, layout)
    assert len(done.pictures) == len(layout.cells)
    for cell, pictures in zip(layout.cells, done.pictures, strict=True):
        alone = generate(*with_choice(files, QUICK, cell))
        assert torch.equal(pictures, alone.pixels), cell.label
    assert done.sheet.dtype == torch.uint8
    assert len(done.table.rows) == len(layout.cells)


def test_different_cells_differ(files):
    layout = lay_out(read_axis("lora_strength", "0, 1, 2"), read_axis("skip_scale", "0, 2"))
    pictures = sweep(files, QUICK, layout).pictures
    for number, one in enumerate(pictures):
        assert not any(torch.equal(one, other) for other in pictures[:number])


def test_networks_are_read_once(files, monkeypatch):
    reads = []
    for module, name in (
        (generation, name) for name in ("load_mmdit", "load_vae", "load_t5_to_fit")
    ):
        load = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, load=load, name=name, **k: reads.append(name) or load(*a, **k)
        )
    sweep(files, QUICK, lay_out(read_axis("steps", "1, 2"), read_axis("encoders", "all, t5")))
    assert sorted(reads) == ["load_mmdit", "load_t5_to_fit", "load_vae"]


def test_the_path_is_that_of_the_run(files):
    """One step is straight; its length is how far the picture's latent lies from the noise."""
    layout = lay_out(read_axis("steps", "1, 8"))
    straight, curved = (row.run for row in sweep(files, QUICK, layout).table.rows)
    assert straight.ratio == pytest.approx(1, abs=1e-5)
    assert curved.ratio > 1.001
    seen = []
    alone = replace(QUICK, steps=1)
    generate(files, alone, on_step=lambda step: seen.append(step))
    ((step,),) = [seen]
    assert straight.length == pytest.approx(float(distance(step.x, step.x0)), rel=1e-4)


def test_a_batch_is_compared_picture_by_picture(files):
    layout = lay_out(read_axis("cfg", "1, 4"))
    done = sweep(files, replace(QUICK, batch=2), layout)
    alone = generate(files, replace(QUICK, batch=2, cfg=4.0))
    assert torch.equal(done.pictures[1], alone.pixels)
    assert done.table.values()[0]["distance"] == 0 < done.table.values()[1]["distance"]


def test_every_step_of_every_cell_is_told(files):
    told = []
    layout = lay_out(read_axis("steps", "1, 2"))
    sweep(files, QUICK, layout, lambda cell, step: told.append((cell.number, step.index)))
    assert told == [(1, 0), (2, 0), (2, 1)]


def test_what_is_open_is_the_same_for_all_cells(files):
    """The preset's cfg for skip-layer guidance would change with the scale."""
    layout = lay_out(read_axis("skip_scale", "0, 2"))
    plans = make_plans(files, replace(QUICK, cfg=None), layout)
    assert len({plan.cfg for plan in plans.values()}) == 1


def test_a_cell_that_cannot_be_is_refused_before_any_weight_is_read(folder, files, monkeypatch):
    monkeypatch.setattr(run, "text_encoders", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(generation, "load_mmdit", lambda *_: pytest.fail("read"))
    write_tiny_checkpoint(folder / "other.safetensors", ("mmdit", "vae", "clip_l"), seed=1)
    with pytest.raises(ValueError, match=r"skip layers \[9\]"):
        sweep(files, replace(QUICK, skip_scale=1.0), lay_out(read_axis("skip_layers", "1, 9")))
    other = Files(checkpoint=folder / "other.safetensors")
    with pytest.raises(ValueError, match="CLIP-G, T5 is not loaded"):
        sweep(other, QUICK, lay_out(read_axis("encoders", "clip_l, all")))
    with pytest.raises(CheckpointError, match="none of the text encoders"):
        sweep(other, QUICK, lay_out(read_axis("encoders", "clip_l, t5")))
    with pytest.raises(ValueError, match="without a LoRA"):
        sweep(other, QUICK, lay_out(read_axis("lora_strength", "0, 1")))


def test_a_cell_approximates_as_generate_does(files):
    """Steps that the cache leaves out are left out here, too."""
    rough = replace(QUICK, steps=6, step_cache=1.0)
    done = sweep(files, rough, lay_out(read_axis("cfg", "3"), None))
    expected = generate(files, rough).pixels[0]
    exact = generate(files, replace(rough, step_cache=0.0)).pixels[0]
    assert torch.equal(done.pictures[0][0], torch.as_tensor(expected))
    assert not torch.equal(torch.as_tensor(expected), torch.as_tensor(exact))
