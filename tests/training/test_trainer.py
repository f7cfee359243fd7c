"""Whole runs on a tiny model: what is trained, what comes out, when a run goes on."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sd3_pack.sd3_core import lora
from sd3_pack.sd3_core.checkpoints.header import read_header
from sd3_pack.sd3_core.checkpoints.layouts import find_components
from sd3_pack.sd3_core.checkpoints.load import load_mmdit
from sd3_pack.sd3_core.checkpoints.lora_files import read_lora
from sd3_pack.sd3_core.checkpoints.save import export_checkpoint
from sd3_pack.sd3_core.errors import CheckpointError, OutOfMemory
from sd3_pack.sd3_core.training import stages
from sd3_pack.sd3_core.training.flow import FlowTask
from sd3_pack.sd3_core.training.folders import Source
from sd3_pack.sd3_core.training.run import RunRefused
from sd3_pack.sd3_core.training.trainer import Base, train
from training_set import scratch, write_pictures, write_training_set


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A LoRA run of four steps; tests give it names of their own."""
    return write_training_set(tmp_path_factory.mktemp("training"))


@pytest.fixture
def config(given, request):
    return replace(given, run_name=re.sub(r"[^\w .-]", "_", request.node.name)[:90])


class Stop(Exception):
    pass


def stop_after(step: int):
    def on_step(progress):
        if progress.step == step:
            raise Stop

    return on_step


def losses(config) -> list[float]:
    log = config.output / "sd3" / config.run_name / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def run_files(config) -> dict[str, bytes]:
    """States, log and samples of a run; products carry the moment they were written at."""
    root = config.output / "sd3" / config.run_name
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.parent.name in ("state", "samples") or path.name == "log.jsonl"
    }


def inputs(model):
    torch.manual_seed(0)
    size = model.config
    return (
        torch.randn(2, size.in_channels, 8, 6),
        torch.tensor([100.0, 700.0]),
        torch.randn(2, 9, size.context_dim),
        torch.randn(2, size.pooled_dim),
    )


# What comes out


def test_a_trained_lora_merged_equals_the_same_lora_attached(config):
    outcome = train(config)
    file = read_lora(outcome.product)
    assert file.report.unmatched == ()
    model = load_mmdit(config.checkpoint)
    given = inputs(model)
    with torch.no_grad():
        base = model(*given)
        with lora.attached(model, [(file.parts["mmdit"], 1.0)]):
            attached = model(*given)
        lora.merge(model, file.parts["mmdit"], 1.0)
        merged = model(*given)
    assert (attached - base).abs().max() > 1e-3  # it has learnt something
    torch.testing.assert_close(merged, attached, rtol=1e-4, atol=1e-4)


def test_a_fresh_lora_changes_nothing(config):
    model = load_mmdit(config.checkpoint)
    given = inputs(model)
    with torch.no_grad():
        base = model(*given)
        lora.add(model, rank=4)
        # adding zeros gives a tensor that lies elsewhere, and attention then sums in another order
        torch.testing.assert_close(model(*given), base, rtol=0, atol=1e-5)


def test_the_product_tells_what_it_is(config):
    told = read_header(train(config).product).metadata
    assert told["sd3_workbench.steps"] == "4"
    assert told["sd3_workbench.training_shift"] == "1.0"
    assert told["sd3_workbench.t5_length"] == "16"
    assert told["ss_network_dim"] == "2"
    assert told["ss_network_alpha"] == "2.0"
    assert told["modelspec.architecture"].endswith("/lora")
    assert len(told["sd3_workbench.data"]) == 64
    assert str(config.output.parent) not in json.dumps(told)  # a name of a home may be in it
    assert json.loads(told["sd3_workbench.training"])["learning_rate"] == 1e-2


@pytest.mark.parametrize("dialect", ["comfy", "kohya", "diffusers"])
def test_every_dialect_is_read_back_as_the_same_change(config, dialect):
    outcome = train(replace(config, dialect=dialect, steps=2))
    plain = train(replace(config, run_name=config.run_name + " plain", steps=2))
    model = load_mmdit(config.checkpoint)
    given = inputs(model)
    results = []
    for path in (outcome.product, plain.product):
        file = read_lora(path)
        with torch.no_grad(), lora.attached(model, [(file.parts["mmdit"], 1.0)]):
            results.append(model(*given))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_a_new_model_starts_at_the_power_of_the_velocity(config):
    """Every block is the identity and the last layer zero: the loss is the mean of (eps - x0)^2."""
    config = replace(scratch(config), validate_every=1, steps=1)
    train(config)
    log = config.output / "sd3" / config.run_name / "log.jsonl"
    first = json.loads(log.read_text().splitlines()[0])
    levels = [value for name, value in first.items() if name.startswith("validation_t")]
    assert len(levels) == 8
    assert max(levels) - min(levels) < 1e-5  # the same at every noise level
    untrained = load_mmdit(log.parent / "state" / "untrained.safetensors")
    assert untrained(*inputs(untrained)).abs().max() == 0


def test_a_new_model_is_written_in_the_released_layout(config):
    outcome = train(scratch(config))
    header = read_header(outcome.product)
    assert all(name.startswith("model.diffusion_model.") for name in header.tensors)
    assert header.metadata["sd3_workbench.native_pixels"] == str(64 * 64)
    model = load_mmdit(outcome.product)
    assert model.config.qk_norm
    assert model(*inputs(model)).abs().max() > 0


def test_full_training_moves_every_weight(config):
    outcome = train(replace(config, method="full", learning_rate=1e-3))
    before, after = load_mmdit(config.checkpoint), load_mmdit(outcome.product)
    still = [
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if torch.equal(old, new)
    ]
    assert still == []


def test_qk_norm_can_be_added_to_a_model_without_it(config, tmp_path):
    without = train(replace(scratch(config), qk_norm=False, steps=1)).product
    name = config.run_name + " added"
    added = replace(config, run_name=name, method="full", mmdit=without, qk_norm=True, steps=1)
    model = load_mmdit(train(added).product)
    assert model.config.qk_norm
    # one step away from one
    torch.testing.assert_close(
        model.joint_blocks[0].x_block.attn.ln_q.weight, torch.ones(64), rtol=0, atol=0.02
    )


@pytest.mark.parametrize("objective", ["eps_linear", "v_cosine", "edm(-0.6, 1.2)"])
def test_the_papers_baselines_train_and_draw(config, objective):
    config = replace(
        config,
        objective=objective,
        steps=2,
        sample_every=2,
        sample_prompts=("a red circle",),
        sample_steps=2,
    )
    assert len(list((train(config).folder / "samples").iterdir())) == 2


def test_sample_pictures_are_those_that_generate_draws(config):
    """The product merged at generation gives the picture that the run drew at its last step."""
    import numpy as np
    from PIL import Image
    from sd3_pack.sd3_core.generate import generate
    from sd3_pack.sd3_core.settings import Files, Settings

    config = replace(
        config, sample_every=4, sample_prompts=("a red circle",), sample_steps=3, sample_seed=5
    )
    outcome = train(config)
    drawn = np.asarray(Image.open(outcome.folder / "samples/step-000004-1.png")).astype(int)
    files = Files(checkpoint=config.checkpoint, loras=((outcome.product, 1.0),))
    settings = Settings("a red circle", width=64, height=64, steps=3, seed=5, device="cpu")
    again = generate(files, settings).pixels[0].numpy().astype(int)
    assert np.abs(drawn - again).max() <= 1  # attached and merged round differently


# Going on


def test_a_run_stopped_and_started_again_equals_the_unbroken_one_bit_for_bit(config):
    """Across buckets, epochs, accumulation, dropout, averaged weights, validation and samples."""
    config = replace(
        config,
        steps=9,  # more than two epochs
        batch_size=1,
        accumulation=2,
        ema=0.9,
        lora_dropout=0.2,
        encoder_dropout=0.3,
        caption_dropout=0.3,
        stratified=True,
        gradient_checkpointing=True,
        validate_every=3,
        validation_items=2,
        sample_every=6,
        sample_prompts=("a red circle",),
        sample_steps=2,
    )
    whole = replace(config, run_name="unbroken")
    train(whole)
    for stop in (1, 4, 6):
        with pytest.raises(Stop):
            train(config, on_step=stop_after(stop))
    train(config)
    assert losses(config) == losses(whole)
    assert run_files(config) == run_files(whole)


@pytest.mark.parametrize("where", ["loss", "validate", "sample"])
def test_an_interruption_within_a_step_or_what_follows_it_loses_nothing(config, where, monkeypatch):
    config = replace(
        config,
        steps=6,
        ema=0.9,
        validate_every=3,
        sample_every=3,
        sample_prompts=("a red circle",),
        sample_steps=3,
    )
    whole = replace(config, run_name=f"unbroken by {where}")
    train(whole)
    done, inside, asked = [], [], []
    original = getattr(FlowTask, where)

    def watched(task, *given):
        inside.append(where)
        try:
            return original(task, *given)
        finally:
            inside.clear()

    def poll():
        if inside and done and done[-1] == 3:
            asked.append(where)
            if where == "loss" or len(asked) == 2:
                raise Stop

    monkeypatch.setattr(FlowTask, where, watched)
    with pytest.raises(Stop):
        train(config, on_step=lambda progress: done.append(progress.step), poll=poll)
    monkeypatch.setattr(FlowTask, where, original)
    assert done == [1, 2, 3]
    train(config)
    assert losses(config) == losses(whole)
    assert run_files(config) == run_files(whole)


def test_an_interruption_while_pictures_are_looked_at_comes_at_the_next_one(config, monkeypatch):
    from sd3_pack.sd3_core.training import trainer

    asked = []

    def poll():
        asked.append(1)
        if len(asked) == 2:
            raise Stop

    monkeypatch.setattr(trainer, "opened", None)  # it comes before the run is opened
    with pytest.raises(Stop):
        train(config, poll=poll)
    assert len(asked) == 2


def test_gradient_checkpointing_changes_no_bit(config):
    train(config)
    recomputed = replace(config, run_name=config.run_name + " 2", gradient_checkpointing=True)
    train(recomputed)
    assert losses(recomputed) == losses(config)


def test_a_finished_run_is_returned_without_work(config, monkeypatch):
    from sd3_pack.sd3_core.training import trainer

    outcome = train(config)
    monkeypatch.setattr(trainer, "model_cache", None)  # nothing may be encoded or loaded
    monkeypatch.setattr(trainer, "load_mmdit", None)
    notes = []
    assert train(config, on_note=notes.append) == outcome
    assert "is finished" in notes[-1]


def test_a_finished_run_whose_product_was_deleted_writes_it_again(config):
    product = train(config).product
    written = read_lora(product).parts["mmdit"]
    product.unlink()
    again = read_lora(train(config).product).parts["mmdit"]
    assert all(torch.equal(a.change.up, b.change.up) for a, b in zip(written, again, strict=True))


def test_more_steps_extend_a_run(config):
    train(config)
    train(replace(config, steps=6))
    whole = replace(config, run_name=config.run_name + " whole", steps=6)
    train(whole)
    assert losses(replace(config, steps=6)) == losses(whole)


def test_any_other_difference_stops_with_the_list_of_what_differs(config, tmp_path):
    train(config)
    with pytest.raises(RunRefused) as error:
        train(replace(config, rank=3, learning_rate=5e-3, steps=3))
    text = str(error.value)
    assert "rank: 2 -> 3" in text
    assert "learning_rate: 0.01 -> 0.005" in text
    assert "steps: 4 -> 3" in text
    pictures = write_pictures(tmp_path / "others", 5)
    (pictures / "1.txt").write_text("a blue box")
    with pytest.raises(RunRefused) as error:
        train(replace(config, data=(Source(pictures),)))
    assert [line.strip() for line in str(error.value).splitlines()[1:-1]] == [
        "pictures and captions: removed: 5.png, 6.png",
        "pictures and captions: captions changed: 1.png",
    ]


def test_the_same_run_may_divide_its_batch_otherwise_and_move(config, tmp_path):
    first = replace(config, steps=2)
    train(first)
    moved = tmp_path / "moved"
    moved.symlink_to(config.data[0].path, target_is_directory=True)
    train(replace(config, batch_size=1, accumulation=2, data=(Source(moved),)))
    with pytest.raises(RunRefused, match="samples of a step: 2 -> 3"):
        train(replace(config, batch_size=3))


def test_a_step_of_several_buckets_costs_the_same_however_it_is_divided(config):
    """Seven pictures of three sizes, in batches of 4: two steps an epoch, and one draw more."""
    notes = []
    config = replace(config, batch_size=4, steps=5, validate_every=0)
    train(config, on_note=notes.append)
    divided = replace(config, run_name=config.run_name + " 2", batch_size=1, accumulation=4)
    train(divided)
    assert losses(divided) == pytest.approx(losses(config), rel=1e-4)
    assert any(
        "4 samples each: 2.5 epochs in all; an epoch's last step is filled up with 1 draw more"
        in note
        for note in notes
    )


def test_a_run_whose_pictures_came_in_another_order_before_is_refused_in_words(config, tmp_path):
    """As an earlier version wrote it: it kept each step to one bucket."""

    def written_before(config):
        path = config.output / "sd3" / config.run_name / "config.json"
        known = json.loads(path.read_text())
        known["identity"].pop("order of the pictures", None)
        path.write_text(json.dumps(known))

    for name, data, batch_size in (
        ("fills", config.data, 1),
        ("one bucket", (Source(write_pictures(tmp_path / "square", 2)),), 3),
    ):
        same = replace(config, run_name=f"{name} of before", data=data, batch_size=batch_size)
        train(replace(same, steps=1))
        written_before(same)
        train(replace(same, steps=2))
    train(replace(config, steps=1))
    written_before(config)
    with pytest.raises(RunRefused, match="order of the pictures: null -> .*filled each one up"):
        train(replace(config, steps=2))


# Refusals


def test_a_run_that_cannot_fit_is_refused_with_advice(config, monkeypatch):
    from sd3_pack.sd3_core.training import trainer

    monkeypatch.setattr(trainer, "free_memory", lambda device: 1000.0)
    for asked in (config, replace(scratch(config), run_name="new"), replace(config, ema=0.9)):
        with monkeypatch.context() as nothing_encoded:
            nothing_encoded.setattr(trainer, "encode_all", None)
            nothing_encoded.setattr(trainer, "encode_samples", None)
            with pytest.raises(ValueError, match="gradient_checkpointing.*check_memory = false"):
                train(asked)
    train(replace(config, check_memory=False))


def test_a_run_whose_states_do_not_fit_on_the_disk_is_refused(config, monkeypatch):
    from sd3_pack.sd3_core.checkpoints import save

    monkeypatch.setattr(save.shutil, "disk_usage", lambda place: SimpleNamespace(free=10**6))
    with pytest.raises(
        CheckpointError, match=r"bytes will be written there and 1,000,000 are free"
    ):
        train(replace(config, rank=64, ema=0.9))


def test_what_is_free_is_looked_at_again_when_the_network_is_there(config, monkeypatch):
    """Another program may take the memory while pictures are encoded."""
    from sd3_pack.sd3_core.training import trainer

    free = iter((2.0**40, 1000.0))
    monkeypatch.setattr(trainer, "free_memory", lambda device: next(free))
    with pytest.raises(ValueError, match="check_memory = false"):
        train(config)
    assert next(free, None) is None


def test_full_memory_saves_the_steps_before_it_and_names_settings(config, monkeypatch):
    plainly = FlowTask.loss

    def hungry(task, step, rows, size):
        if step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plainly(task, step, rows, size)

    monkeypatch.setattr(FlowTask, "loss", hungry)
    notes = []
    with pytest.raises(OutOfMemory, match="while training. Try gradient_checkpointing = true"):
        train(config, on_note=notes.append)
    assert any("stopped after step 1" in note and "saved" in note for note in notes)
    monkeypatch.undo()
    train(replace(config, gradient_checkpointing=True), on_note=notes.append)
    assert any("goes on from step 1" in note for note in notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ()}, "data is missing"),
        ({"checkpoint": None}, "no mmdit and no vae"),
        ({"lora_blocks": (0, 7)}, r"lora_blocks is \[0, 7\]; the model's blocks are 0 to 1"),
        ({"lora_blocks": ()}, "the model's blocks are 0 to 1"),
        ({"use": ()}, "no text encoder takes part: the files hold clip_l, clip_g, t5"),
        ({"sample_every": 1, "sample_prompts": ("x",), "sample_steps": 0}, "steps is 0"),
        ({"objective": "flow"}, "objective is 'flow'"),
        ({"density": "mode(9)"}, "mode"),
        ({"bucket_step": 12}, "bucket_step"),
        ({"run_name": "../elsewhere"}, "run_name"),
        ({"device": "cuda:99"}, "device"),
    ],
)
def test_what_cannot_work_is_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        train(replace(config, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "prodigy"}, "needs the package prodigyopt"),
        ({"lora_blocks": (7,)}, "lora_blocks"),
        ({"sample_every": 1, "sample_prompts": ("x",), "sample_steps": 0}, "steps is 0"),
    ],
)
def test_it_is_refused_before_anything_is_encoded(config, change, message, monkeypatch):
    from sd3_pack.sd3_core.training import trainer

    monkeypatch.setattr(trainer, "encode_all", None)
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ValueError, match=message):
        train(replace(config, **change))


def test_an_encoder_that_is_not_among_the_files_is_told(config, tmp_path):
    from tiny import write_tiny_checkpoint

    paths = write_tiny_checkpoint(tmp_path / "split", layout="split")
    files = {name: paths[name] for name in ("mmdit", "vae", "clip_l", "clip_g")}
    tokenizers = config.checkpoint.parent / "tokenizers"
    notes = []
    given = replace(config, checkpoint=None, tokenizers=tokenizers, steps=1, **files)
    train(given, on_note=notes.append)
    assert "t5 is not among the files: zeros stand for it, here and wherever this is used" in notes
    notes.clear()
    without = replace(given, run_name=config.run_name + " 2", use=("clip_l", "clip_g"))
    train(without, on_note=notes.append)
    assert not any("t5" in note for note in notes)


def test_an_output_that_is_a_file_is_refused_in_words(config, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="output is .*file is a file; name a folder"):
        train(replace(config, output=tmp_path / "file" / "deeper"))


def test_a_missing_file_is_named(config, tmp_path):
    with pytest.raises(CheckpointError, match="missing.safetensors"):
        train(replace(config, checkpoint=tmp_path / "missing.safetensors"))


@pytest.mark.parametrize("kind", ["bf16", "fp8", "scaled fp8"])
def test_a_lora_is_taught_on_a_base_in_any_precision(config, tmp_path, kind):
    """The base stays as it is stored; LoRA and optimiser are float32."""
    from safetensors.torch import save_file
    from tiny import quantised, tiny_state_dicts, with_prefixes

    state = tiny_state_dicts(["mmdit"])["mmdit"]
    if kind == "scaled fp8":
        state, _ = quantised(state, "comfy_quant")
    else:
        dtype = torch.bfloat16 if kind == "bf16" else torch.float8_e4m3fn
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    path = tmp_path / "base.safetensors"
    save_file(with_prefixes({"mmdit": state}), path)
    before = path.read_bytes()
    outcome = train(replace(config, mmdit=path, dtype="bf16" if kind == "bf16" else "fp32"))
    assert path.read_bytes() == before
    values = losses(config)
    assert all(0 < value < 20 for value in values)
    (adapter, *_) = read_lora(outcome.product).parts["mmdit"]
    assert adapter.change.up.dtype == torch.float32
    assert adapter.change.up.abs().max() > 0


# A network that another program holds


def test_a_lora_may_be_taught_on_a_network_that_the_host_has_changed(config):
    def load(part, place):
        model = load_mmdit(part, dtype=place.dtype, device=place.device)
        with torch.no_grad():
            model.final_layer.linear.weight.mul_(2)
        return model

    changed = Base(load, ("style.safetensors (0123) x 0.8",))
    plain = replace(config, run_name=config.run_name + " plain")
    train(plain)
    outcome = train(config, base=changed)
    assert losses(config) != losses(plain)
    told = read_header(outcome.product).metadata["sd3_workbench.base_changes"]
    assert json.loads(told) == ["style.safetensors (0123) x 0.8"]
    with pytest.raises(RunRefused, match="changes of the network"):
        train(replace(config, steps=6))


# Names that are no text


def test_a_name_that_is_not_utf8_is_trained_on_like_any_other(config, tmp_path):
    """Of an old zip: in the run's records, its product and its sentences."""
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        write_pictures(odd, 3)
    except OSError as error:
        pytest.skip(f"this file system has no such names ({error})")
    (odd / "0.png").rename(odd / os.fsdecode(b"na\xefve.png"))
    held = write_pictures(tmp_path / os.fsdecode(b"\xe9cart\xe9"), 1)
    odd_model = tmp_path / os.fsdecode(b"mod\xe8le.safetensors")
    shutil.copy(config.checkpoint, odd_model)
    told: list[str] = []
    given = replace(
        config,
        checkpoint=odd_model,
        data=(Source(odd),),
        validation_data=(Source(held),),
        validate_every=2,
        sample_every=4,
        sample_prompts=("a red circle",),
    )
    outcome = train(given, on_note=told.append)
    assert any("na\udcefve.png" in line for line in told)  # without its caption
    header = outcome.product.read_bytes()
    length = int.from_bytes(header[:8], "little")
    metadata = json.loads(header[8 : 8 + length].decode())["__metadata__"]
    "".join(metadata.values()).encode()  # readers in other languages refuse halves of characters
    assert metadata["ss_sd_model_name"] == "mod\\xe8le.safetensors"
    assert json.loads(metadata["sd3_workbench.training"])["data"][0]["path"] == odd.name
    with safe_open(outcome.product, "pt") as file:
        assert file.metadata() == metadata
    assert train(given).step == 4  # known again
    (odd / os.fsdecode(b"na\xefve.txt")).write_text("a red circle")
    with pytest.raises(RunRefused, match="captions changed: na\udcefve.png"):
        train(given)


def test_half_a_character_in_a_caption_is_named_before_anything_is_encoded(config, tmp_path):
    folder = write_pictures(tmp_path / "pictures", 1)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a \\ud83d cat"}')
    with pytest.raises(ValueError, match=r"metadata.jsonl:1: text holds half a character"):
        train(replace(config, data=(Source(folder),)))


# Refused before anything is encoded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 2048}, r"resolution is 2048, .* ends at (\d+) pixels .*resolution = \1\."),
        ({"resolution": 2048, "method": "scratch"}, "or position_size = 128"),
        ({"bucket_step": 5}, r"its bucket is \d+x\d+, .*multiples of 8 .*; bucket_step is 5"),
        ({"lora_kinds": ("attn2",)}, r"lora_kinds is \['attn2'\]"),
        ({"lora_blocks": (9,)}, "lora_blocks is"),
        ({"qk_norm": False}, "qk_norm is false, but the model has it"),
        ({"sample_every": 2, "sample_prompts": ("(x:inf)",)}, "weight inf of"),
        ({"use": ("t5",), "t5": None, "checkpoint": "no t5"}, "no text encoder takes part"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_encoded(
    given, tmp_path, monkeypatch, changes, message
):
    def encode(*_, **__):
        raise AssertionError("something is encoded")

    monkeypatch.setattr(stages, "load_vae", encode)
    monkeypatch.setattr(stages, "load_clip", encode)
    monkeypatch.setattr(stages, "load_t5_to_fit", encode)
    if changes.get("checkpoint") == "no t5":
        path = tmp_path / "clips.safetensors"
        parts = find_components(given.checkpoint)
        export_checkpoint(path, {k: v for k, v in parts.items() if k != "t5"}, {}, {})
        changes = {**changes, "checkpoint": path}
    if changes.get("method") == "scratch":
        given = scratch(given)
    config = replace(given, output=tmp_path / "output", run_name="refused", **changes)
    with pytest.raises(ValueError, match=message):
        train(config)


def test_a_picture_wider_than_the_position_table_is_named_with_the_setting(given, tmp_path):
    """Its square fits; what a panorama becomes does not."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (800, 100), "red").save(pictures / "wide.png")
    most = 8 * 2 * 8  # pixels of a table of 8 patches a side
    config = replace(
        scratch(given), output=tmp_path, data=(Source(pictures),), resolution=most, widest=8.0
    )
    with pytest.raises(ValueError, match=r"wide.png: its bucket is \d+x\d+, .* set widest = 1 or"):
        train(config)
    assert train(replace(config, widest=1.0, steps=1)).step == 1


def test_sample_pictures_take_any_resolution_that_training_takes(config):
    """Not a multiple of the VAE's 8: pictures go to buckets, samples to the next smaller square."""
    outcome = train(
        replace(config, resolution=70, sample_every=4, sample_prompts=("x",), sample_steps=1)
    )
    assert Image.open(outcome.folder / "samples" / "step-000004-1.png").size == (64, 64)


def test_validation_on_what_is_learnt_from_is_refused(config):
    (source,) = config.data
    same = Source(source.path / ".." / source.path.name, repeats=2)
    with pytest.raises(ValueError, match="is learnt from, and given as validation"):
        train(replace(config, validation_data=(same,), validate_every=2))
