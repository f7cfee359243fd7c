"""The training nodes in process: runs, their outputs on ComfyUI's own nodes, what they refuse."""

import errno
import json
import os
import shutil
import types
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import pytest
import torch
from comfy_extras import nodes_train
from safetensors.torch import load_file, save_file
from sd3_pack.nodes import datasets, training
from sd3_pack.nodes.datasets import SD3Preferences, SD3TrainingImages
from sd3_pack.nodes.errors import NodeError
from sd3_pack.nodes.frozen_base import FrozenBase
from sd3_pack.nodes.lora import SD3LoadLoRA
from sd3_pack.nodes.speed import SD3Speed
from sd3_pack.nodes.training import SD3SaveLoRA, SD3TimestepDensity, SD3TrainDPO, SD3TrainLoRA
from sd3_pack.sd3_core.checkpoints.header import read_header
from sd3_pack.sd3_core.training import scan
from sd3_pack.sd3_core.training.dpo import DPOTask
from sd3_pack.sd3_core.training.flow import FlowTask
from training_set import write_pictures

import nodes

QKV = "joint_blocks.0.x_block.attn.qkv"
SETTINGS = {
    "steps": 4,
    "learning_rate": 1e-2,
    "rank": 2,
    "batch_size": 2,
    "resolution": 64,
    "seed": 0,
    "warmup": 0,
    "validate_every": 0,
    "checkpoint_every": 2,
    "sample_every": 0,
    "sample_prompt": "",
}
MORE = "bucket_step = 16\nsample_steps = 2"


@pytest.fixture(autouse=True)
def places(models, tmp_path, monkeypatch):
    """ComfyUI's input, output and temporary folders of this test alone; pictures in input."""
    import folder_paths

    for name in ("input", "output", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    write_pictures(tmp_path / "input" / "pictures", 5)
    return tmp_path


@pytest.fixture
def pictures(tiny_three):
    return SD3TrainingImages.execute(tiny_three[1], tiny_three[2], "pictures").args[0]


@pytest.fixture
def preferences(tiny_three, places):
    from PIL import Image

    for side, colour in (("chosen", "red"), ("rejected", "blue")):
        folder = places / "input" / "pairs" / side
        folder.mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (64, 64), colour).point(lambda v, i=index: v // (i + 1)).save(
                folder / f"{index}.png"
            )
            (folder / f"{index}.txt").write_text(f"a circle {index}")
    return SD3Preferences.execute(tiny_three[1], tiny_three[2], "pairs").args[0]


def train(model, data, node=SD3TrainLoRA, run_name="mine", more=MORE, **changes):
    return node.execute(
        model=model, dataset=data, run_name=run_name, more=more, **SETTINGS | changes
    )


def told(output):
    return output.ui["sd3_report"][0]


def weight(model, key=f"diffusion_model.{QKV}.weight"):
    model.patch_weight_to_device(key)
    patched = model.model.state_dict()[key].clone()
    model.unpatch_model()
    return patched


# What comes out


def test_a_run_gives_what_comfyuis_own_nodes_take(tiny_three, pictures, places):
    model = tiny_three[0]
    output = train(model, pictures)
    trained, lora, loss, images = output.args
    assert len(loss["loss"]) == 4
    assert images.shape[1:] == (64, 64, 3)
    assert len(images) == 2  # drawn before the first step and after the last
    assert not model.patches  # the MODEL that came in is as it was
    by_comfyui = nodes_train.LoraModelLoader.execute(model, lora, 1.0).args[0]
    assert not torch.equal(weight(trained), weight(model))
    assert torch.equal(weight(trained), weight(by_comfyui))
    assert not any(tensor.is_inference() for tensor in lora.values())
    nodes_train.LossGraphNode.execute(loss, "loss")
    nodes_train.SaveLoRA.execute(lora, "loras/native", 4)
    (native,) = (places / "output" / "loras").glob("native*.safetensors")
    assert set(load_file(native)) == set(lora)
    report = told(output)
    assert report["steps"] == 4
    assert report["run"] == "mine"
    assert report["base_loras"] == []
    assert "memory: about" in "\n".join(report["notes"])  # the plan
    assert json.dumps(report)
    assert len(output.ui["images"]) == 2  # the curve, the last sample


def test_a_saved_lora_is_found_read_and_acts_as_the_run_s(tiny_three, pictures, places):
    import folder_paths

    trained, lora, *_ = train(tiny_three[0], pictures).args
    loaded = {}
    for dialect in ("comfy", "kohya", "diffusers"):
        SD3SaveLoRA.execute(lora, f"loras/{dialect}", dialect, "fp32")
        (path,) = (places / "output" / "loras").glob(f"{dialect}*.safetensors")
        metadata = read_header(path).metadata
        assert metadata["ss_network_dim"] == "2"
        assert json.loads(metadata["sd3_workbench.training"])["run_name"] == "mine"
        (Path(folder_paths.get_folder_paths("loras")[0]) / path.name).write_bytes(path.read_bytes())
        folder_paths.filename_list_cache.clear()
        ours = SD3LoadLoRA.execute(tiny_three[0], path.name, 1.0).args[0]
        native = nodes.LoraLoaderModelOnly().load_lora_model_only(tiny_three[0], path.name, 1.0)[0]
        assert torch.equal(weight(ours), weight(native))
        loaded[dialect] = weight(ours)
    for patched in loaded.values():
        torch.testing.assert_close(patched, weight(trained), rtol=0, atol=1e-5)
    assert not list((places / "output" / "loras").glob(".*"))


def test_what_comes_out_is_not_rounded_and_an_older_run_still_goes_on(tiny_three, pictures, places):
    def rounded(output):
        tensors = output.args[1].values()
        return all(torch.equal(tensor, tensor.half().float()) for tensor in tensors)

    assert not rounded(train(tiny_three[0], pictures))
    as_fp16 = MORE + '\nsave_dtype = "fp16"'
    assert rounded(train(tiny_three[0], pictures, run_name="older", more=as_fp16, steps=2))
    # before, the precision of the file belonged to what a run is
    path = places / "output" / "sd3" / "older" / "config.json"
    config = json.loads(path.read_text())
    config["identity"]["save_dtype"] = "fp16"
    path.write_text(json.dumps(config))
    again = train(tiny_three[0], pictures, run_name="older", steps=2)  # written anew
    assert not rounded(again)
    assert len(train(tiny_three[0], pictures, run_name="older").args[2]["loss"]) == 4


def test_the_workflow_lies_in_the_file(tiny_three, pictures, places, monkeypatch):
    from comfy.cli_args import args

    lora = train(tiny_three[0], pictures).args[1]

    class Hidden:
        prompt = {"1": {"class_type": "SD3TrainLoRA", "inputs": {}}}
        extra_pnginfo = {"workflow": {"nodes": []}}

    class Node(SD3SaveLoRA):
        hidden = Hidden

    Node.execute(lora, "loras/graph", "comfy", "fp16")
    monkeypatch.setattr(args, "disable_metadata", True)
    Node.execute(lora, "loras/silent", "comfy", "fp16")
    with_graph, silent = (
        read_header(next((places / "output" / "loras").glob(f"{name}*"))).metadata
        for name in ("graph", "silent")
    )
    assert json.loads(with_graph["workflow"]) == {"nodes": []}
    assert json.loads(with_graph["prompt"]) == Hidden.prompt
    assert "workflow" not in silent


def test_dpo_begins_at_ln_2_and_says_what_it_measured(tiny_three, preferences, places, monkeypatch):
    shown = []
    monkeypatch.setattr(training.Listener, "tell", lambda self, text, every=0.0: shown.append(text))
    output = train(
        tiny_three[0], preferences, SD3TrainDPO, steps=3, dpo_beta=20.0, validate_every=3
    )
    losses = output.args[2]["loss"]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[-1] != losses[0]
    log = (places / "output" / "sd3" / "mine" / "log.jsonl").read_text().splitlines()
    last = json.loads(log[-1])
    told_numbers = told(output)["preference"]
    assert told_numbers == {
        "step": 3,
        **{n: last[f"validation_{n}"] for n in ("accuracy", "winner_gap", "loser_gap", "margin")},
    }
    notes = "\n".join(told(output)["notes"])
    assert "validation is on pairs that are trained on" in notes
    accuracy, gap = told_numbers["accuracy"], told_numbers["winner_gap"]
    assert f"at step 3 the preference is followed in {accuracy:.0%} of the pairs" in notes
    assert f"the chosen pictures' error is {gap:+.2g}" in notes
    (live,) = (text for text in shown if text.startswith("step 1 of 3"))
    assert "followed in 50% of the pairs" in live  # before the first update
    assert json.loads(output.args[1].metadata["sd3_workbench.dpo"])["beta"] == 20.0


def test_a_run_that_spoils_its_winners_gives_out_the_best_state_before(
    tiny_three, preferences, monkeypatch
):
    measured = [(0.0, 0.69), (-0.1, 0.6), (0.1, 0.5), (0.2, 0.4), (0.3, 0.3)]
    left = iter(measured)

    def validate(task):
        gap, loss = next(left)
        return {"loss": loss, "winner_gap": gap, "loser_gap": 1.0, "accuracy": 1.0, "margin": 1.0}

    monkeypatch.setattr(DPOTask, "validate", validate)

    def run():
        return train(tiny_three[0], preferences, SD3TrainDPO, steps=8, validate_every=2)

    for output in (run(), run()):  # queued again it is the same, and nothing is computed
        assert "making both pictures worse" in told(output)["stopped"]
        assert output.args[1].metadata["ss_steps"] == "2"
        assert told(output)["steps"] == 8


def test_a_clip_with_another_last_layer_is_refused(tiny_three, pictures):
    clip = tiny_three[1].clone()
    clip.clip_layer(-2)
    with pytest.raises(NodeError, match="this CLIP is changed"):
        SD3TrainingImages.execute(clip, tiny_three[2], "", 1, torch.rand(1, 64, 64, 3), "x")


def test_at_most_so_many_samples_come_out_with_the_last_one():
    names = [Path(f"{number}") for number in range(150)]
    some = training.spread(names, 64)
    assert len(some) == 50
    assert some[-1] == names[-1]
    assert some == sorted(some, key=names.index)
    assert training.spread(names[:5], 64) == names[:5]
    assert training.spread([], 64) == []


def test_a_torn_line_of_the_log_does_not_cost_the_run(tiny_three, pictures, places):
    train(tiny_three[0], pictures)
    log = places / "output" / "sd3" / "mine" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 4, "lo')
    assert len(train(tiny_three[0], pictures).args[2]["loss"]) == 4


def test_several_lines_are_what_the_node_says(tiny_three, places):
    """The report says how they are read, and so does the run."""
    (places / "input" / "pictures" / "0.txt").write_text("a red circle\n\non grey")
    clip, vae = tiny_three[1:]
    output = SD3TrainingImages.execute(clip, vae, "pictures")
    assert told(output)["captions"][0] == "a red circle"
    assert told(output)["notes"][0].startswith("1 caption of several lines, each an alternative")
    whole = SD3TrainingImages.execute(clip, vae, "pictures", lines="whole")
    note = "1 caption of several lines, read as one caption: 0.png"
    assert told(whole)["captions"][0] == "a red circle\non grey"
    assert told(whole)["notes"] == [note]
    assert note in told(train(tiny_three[0], whole.args[0], steps=1))["notes"]
    for side in ("chosen", "rejected"):
        write_pictures(places / "input" / "two" / side, 1)
        (places / "input" / "two" / side / "0.txt").write_text("a red circle\n\non grey")
    pairs = told(SD3Preferences.execute(clip, vae, "two", lines="first"))
    assert pairs["captions"] == ["a red circle"]
    assert pairs["notes"] == ["1 caption of several lines, of which the first is read: 0"]


def test_the_node_says_which_pictures_are_left_out(tiny_three, places):
    folder = places / "input" / "pictures"
    (folder / "0-masklabel.png").write_bytes((folder / "0.png").read_bytes())
    report = told(SD3TrainingImages.execute(*tiny_three[1:], "pictures"))
    assert report["pictures"] == 5
    assert report["notes"][0].startswith("1 picture left out, masks and control pictures by")
    for path in folder.glob("?.png"):
        path.unlink()
    with pytest.raises(NodeError, match=r"no picture in it; 1 picture left out, .*masklabel\.png"):
        SD3TrainingImages.execute(*tiny_three[1:], "pictures")


def test_only_a_line_feed_parts_the_captions_of_pictures_of_the_graph(tiny_three):
    images = torch.rand(2, 64, 64, 3)
    output = SD3TrainingImages.execute(*tiny_three[1:], "", 1, images, "a\u2028b\r\nc")
    assert told(output)["captions"] == ["a\u2028b", "c"]


def test_pictures_of_the_graph_outlive_the_temporary_folder(tiny_three, places):
    output = SD3TrainingImages.execute(*tiny_three[1:], "", 1, torch.rand(1, 64, 64, 3), "x")
    folder = output.args[0].source.path
    assert folder.is_relative_to(places / "output" / "sd3" / ".pictures")


def test_pictures_of_the_graph_are_taught_as_those_of_a_folder(tiny_three):
    images = torch.rand(3, 64, 64, 3)
    clip, vae = tiny_three[1:]
    execute = SD3TrainingImages.execute
    output = execute(clip, vae, "", 1, images, "red\nblue\ngreen")
    assert told(output)["captions"] == ["red", "blue", "green"]
    again = execute(clip, vae, "", 1, images, "red\nblue\ngreen").args[0]
    assert again.source == output.args[0].source
    assert told(execute(clip, vae, "", 1, images, "one for all"))["captions"] == ["one for all"]
    assert len(train(tiny_three[0], again, steps=1).args[2]["loss"]) == 1


def test_pictures_of_the_graph_that_are_none_are_named(tiny_three):
    clip, vae = tiny_three[1:]
    images, fine = torch.rand(3, 64, 64, 3), torch.rand(3, 64, 64, 3)
    images[2, 0, 0, 0] = float("nan")
    with pytest.raises(NodeError, match="not_finite: images holds NaN .* in picture 3 of 3"):
        SD3TrainingImages.execute(clip, vae, "", 1, images, "x")
    with pytest.raises(NodeError, match="not_finite: rejected holds NaN .* in picture 3 of 3"):
        SD3Preferences.execute(clip, vae, "", fine, images, "x")
    with pytest.raises(NodeError, match="bad_setting: images is .*1, 3 or 4 channels"):
        SD3TrainingImages.execute(clip, vae, "", 1, fine[..., :2], "x")
    with pytest.raises(NodeError, match="bad_setting: captions holds half a character"):
        SD3TrainingImages.execute(clip, vae, "", 1, fine, "x \ud83d")


def test_grey_pictures_of_the_graph_are_taught_as_grey(tiny_three):
    clip, vae = tiny_three[1:]
    grey = torch.rand(2, 64, 64, 1)
    one = SD3TrainingImages.execute(clip, vae, "", 1, grey, "x").args[0].source.path
    three = SD3TrainingImages.execute(clip, vae, "", 1, grey.repeat(1, 1, 1, 3), "x")
    assert one == three.args[0].source.path  # named by its content


def test_pairs_of_the_graph_are_preferences(tiny_three):
    clip, vae = tiny_three[1:]
    chosen, rejected = torch.rand(2, 64, 64, 3), torch.rand(2, 64, 64, 3)
    output = SD3Preferences.execute(clip, vae, "", chosen, rejected, "one for all")
    assert (told(output)["pairs"], told(output)["captions"]) == (2, ["one for all"])
    losses = train(tiny_three[0], output.args[0], SD3TrainDPO, steps=1).args[2]["loss"]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    for sides in ((chosen, None), (chosen, rejected[:1]), (None, None)):
        with pytest.raises(NodeError, match="name a folder of pairs, or connect as many"):
            SD3Preferences.execute(clip, vae, "", *sides)


def test_the_density_decides_shift_and_window(tiny_three, pictures, places):
    density = SD3TimestepDensity.execute("mode", 1.5, mode_scale=0.5, lowest_sigma=0.2)
    report = told(density)
    assert report["density"] == "mode(0.5)"
    total = sum(report["pdf"]) / len(report["pdf"])
    assert total == pytest.approx(1.0, abs=0.02)
    assert max(p for s, p in zip(report["sigma"], report["pdf"], strict=True) if s < 0.199) == 0
    train(tiny_three[0], pictures, density=density.args[0], steps=1)
    config = json.loads((places / "output" / "sd3" / "mine" / "config.json").read_text())
    assert config["identity"]["density"] == "mode(0.5)"
    assert config["identity"]["shift"] == 1.5
    assert config["identity"]["lowest_sigma"] == 0.2


def test_without_a_density_the_shift_is_that_of_the_model(tiny_three, pictures, places):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    (model,) = ModelSamplingSD3().patch(tiny_three[0], 2.5)
    train(model, pictures, steps=1)
    config = json.loads((places / "output" / "sd3" / "mine" / "config.json").read_text())
    assert config["identity"]["shift"] == 2.5


# Going on


def test_an_interrupted_run_is_saved_and_goes_on_as_if_unbroken(
    tiny_three, pictures, places, monkeypatch
):
    whole = train(tiny_three[0], pictures, run_name="whole").args[2]["loss"]
    stop = training.Listener.on_step

    def interrupting(listener, progress):
        if progress.step == 3:
            comfy.model_management.interrupt_current_processing()
        stop(listener, progress)

    monkeypatch.setattr(training.Listener, "on_step", interrupting)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(tiny_three[0], pictures)
    monkeypatch.setattr(training.Listener, "on_step", stop)
    states = places / "output" / "sd3" / "mine" / "state"
    assert "step-00000003.safetensors" in {path.name for path in states.iterdir()}
    assert train(tiny_three[0], pictures).args[2]["loss"] == whole
    # nothing is left to do: the same run queued again is returned as it is
    again = train(tiny_three[0], pictures)
    assert again.args[2]["loss"] == whole
    assert "is finished; nothing was computed" in told(again)["notes"][-1]
    extended = train(tiny_three[0], pictures, steps=6).args[2]["loss"]
    assert extended[:4] == whole
    assert len(extended) == 6


def test_another_run_of_the_same_name_is_refused_with_what_differs(tiny_three, pictures):
    train(tiny_three[0], pictures)
    with pytest.raises(NodeError, match=r"SD3:run_refused: .*\n  rank: 2 -> 3"):
        train(tiny_three[0], pictures, rank=3)


def test_an_interruption_while_encoding_leaves_nothing_half_done(tiny_three, pictures, places):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(tiny_three[0], pictures)
    assert train(tiny_three[0], pictures, steps=1).args[2]["loss"]


@pytest.mark.parametrize("where", ["look_at", "validate", "sample"])
def test_an_interruption_is_heard_where_no_step_is_done(
    tiny_three, pictures, places, monkeypatch, where
):
    """While pictures are looked at, in validation, and while sample pictures are drawn."""
    owner = scan if where == "look_at" else FlowTask
    original = getattr(owner, where)

    def interrupted(*given):
        comfy.model_management.interrupt_current_processing()
        return original(*given)

    monkeypatch.setattr(owner, where, interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(tiny_three[0], pictures, validate_every=2)
    comfy.model_management.interrupt_current_processing(False)  # other threads look on
    log = places / "output" / "sd3" / "mine" / "log.jsonl"
    if where == "look_at":
        assert not log.parent.exists()
    else:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert len(lines) == (0 if where == "validate" else 1)  # that of step 0, no step
    monkeypatch.setattr(owner, where, original)
    assert len(train(tiny_three[0], pictures, validate_every=2).args[2]["loss"]) == 4


# The base


@pytest.fixture
def styled(tiny_three, models):
    """The MODEL with a LoRA by our loader."""
    import folder_paths

    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"diffusion_model.{QKV}.lora_up.weight": torch.randn(384, 2, generator=generator),
        f"diffusion_model.{QKV}.lora_down.weight": torch.randn(2, 128, generator=generator),
    }
    save_file(tensors, models / "loras" / "style.safetensors")
    folder_paths.filename_list_cache.clear()
    return SD3LoadLoRA.execute(tiny_three[0], "style.safetensors", 0.5).args[0]


def test_a_lora_on_the_model_belongs_to_the_frozen_base(tiny_three, styled, pictures):
    seen = {}
    load = training.FrozenBase.load

    def spying(base, part, place):
        network = load(base, part, place)
        seen["weight"] = network.get_submodule(QKV).weight.detach().cpu().clone()
        return network

    training.FrozenBase.load = spying
    try:
        output = train(styled, pictures)
    finally:
        training.FrozenBase.load = load
    torch.testing.assert_close(
        seen["weight"].float(), weight(styled).cpu().float(), rtol=0, atol=1e-6
    )
    assert told(output)["base_loras"] == ["style.safetensors x 0.5"]
    trained, lora, *_ = output.args
    assert len(trained.patches[f"diffusion_model.{QKV}.weight"]) == 2
    changes = json.loads(lora.metadata["sd3_workbench.base_changes"])
    assert changes[0] == "style.safetensors x 0.5"
    with pytest.raises(NodeError, match="run_refused: .*"):
        train(tiny_three[0], pictures, steps=6)


def test_a_lora_of_another_loader_is_carried_and_counted(tiny_three, styled, pictures):
    (model,) = nodes.LoraLoaderModelOnly().load_lora_model_only(
        tiny_three[0], "style.safetensors", 0.5
    )
    output = train(model, pictures, steps=1)
    assert told(output)["base_loras"] == ["a LoRA of 1 layers from another loader"]


def test_loras_of_both_kinds_of_loader_are_named(styled):
    (model,) = nodes.LoraLoaderModelOnly().load_lora_model_only(styled, "style.safetensors", 0.5)
    assert FrozenBase(styled).loras == ["style.safetensors x 0.5"]
    both = ["style.safetensors x 0.5", "1 patches from another loader"]
    assert FrozenBase(model).loras == both
    assert FrozenBase(model).base.changes[:2] == tuple(both)


def test_a_prior_holds_the_lora_to_the_model_as_it_came(
    tiny_three, styled, pictures, places, monkeypatch
):
    parts, part = [], FlowTask.part

    def watched(task, step, rows, size):
        losses = part(task, step, rows, size)
        parts.append((task.batches.samples(step, rows, size).prior, losses.each.detach()))
        return losses

    monkeypatch.setattr(FlowTask, "part", watched)
    write_pictures(places / "input" / "others", 7)
    prior = SD3TrainingImages.execute(tiny_three[1], tiny_three[2], "others").args[0]
    output = train(styled, pictures, prior=prior, steps=1, batch_size=12)
    is_prior, losses = (torch.cat(some) for some in zip(*parts, strict=True))
    assert 0 < is_prior.sum() < 12
    assert losses[is_prior].max() < 1e-8  # with the LoRA that was on it
    assert losses[~is_prior].min() > 0.01
    assert any("7 pictures of these keep" in line for line in told(output)["notes"])


def test_a_prior_of_other_files_or_the_same_pictures_is_refused(tiny_three, pictures, places):
    with pytest.raises(
        NodeError, match="bad_setting: prior is the folder pictures, which is learnt"
    ):
        train(tiny_three[0], pictures, prior=pictures)
    elsewhere = replace(pictures, files={**pictures.files, "vae": places / "other.safetensors"})
    with pytest.raises(
        NodeError, match="bad_setting: prior is encoded by other files .*; connect one"
    ):
        train(tiny_three[0], pictures, prior=elsewhere)


def test_validation_is_on_pictures_of_its_own(tiny_three, pictures, places):
    write_pictures(places / "input" / "others", 7)
    held = SD3TrainingImages.execute(tiny_three[1], tiny_three[2], "others").args[0]
    train(tiny_three[0], pictures, validation=held, validate_every=2)
    log = (places / "output" / "sd3" / "mine" / "log.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in log]
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 2, 4]
    config = json.loads((places / "output" / "sd3" / "mine" / "config.json").read_text())
    found = config["identity"]["pictures of validation"]
    assert found not in (None, config["identity"]["pictures and captions"])


def test_validation_on_what_is_learnt_from_is_refused_as_by_the_command_line(
    tiny_three, pictures, preferences
):
    for data, node in ((pictures, SD3TrainLoRA), (preferences, SD3TrainDPO)):
        with pytest.raises(NodeError, match="bad_setting: .* is learnt from, and given as valid"):
            train(tiny_three[0], data, node, validation=data, validate_every=2)


@pytest.mark.parametrize("changes", [{"resolution": 4096}, {"more": "bucket_step = 5"}])
def test_a_size_that_does_not_fit_is_refused_before_anything_is_encoded(
    tiny_three, pictures, changes, places
):
    name = "resolution" if "resolution" in changes else "bucket_step"
    with pytest.raises(NodeError, match=rf"bad_setting: .*{name} is"):
        train(tiny_three[0], pictures, **changes)
    assert not list((places / "output").rglob("*.safetensors"))


def test_a_name_that_is_not_utf8_reaches_the_page_as_text(
    tiny_three, pictures, places, monkeypatch
):
    from server import PromptServer

    folder = places / "input" / "pictures"
    try:
        (folder / "0.png").rename(folder / os.fsdecode(b"caf\xe9.png"))
    except OSError as error:
        pytest.skip(f"this file system has no such names ({error})")
    told = []
    page = types.SimpleNamespace(
        send_progress_text=lambda text, node, sid=None: told.append(text.encode())
    )
    monkeypatch.setattr(PromptServer, "instance", page, raising=False)
    hidden = types.SimpleNamespace(unique_id="7", prompt=None, extra_pnginfo=None)
    monkeypatch.setattr(SD3TrainLoRA, "hidden", hidden, raising=False)
    data = SD3TrainingImages.execute(tiny_three[1], tiny_three[2], "pictures").args[0]
    assert SD3TrainingImages.fingerprint_inputs(folder="pictures", repeats=1)
    output = train(tiny_three[0], data, steps=1)
    assert any(b"caf\\xe9.png" in text for text in told)
    json.dumps(output.ui["sd3_report"]).encode()


def test_dpo_is_measured_on_held_out_pairs_where_there_are_some(tiny_three, preferences, places):
    output = train(tiny_three[0], preferences, SD3TrainDPO, run_name="plain", validate_every=4)
    assert any("pairs that are trained on" in line for line in told(output)["notes"])
    shutil.copytree(places / "input" / "pairs", places / "input" / "held")
    for file in (places / "input" / "held").rglob("[01].*"):  # two of the four pairs
        file.unlink()
    held = SD3Preferences.execute(tiny_three[1], tiny_three[2], "held").args[0]
    output = train(
        tiny_three[0], preferences, SD3TrainDPO, run_name="held", validation=held, validate_every=4
    )
    assert not any("pairs that are trained on" in line for line in told(output)["notes"])
    assert told(output)["preference"]["step"] == 4


def test_a_model_set_to_be_sampled_otherwise_is_refused_by_name(tiny_three):
    from comfy_extras import nodes_model_advanced as native

    (model,) = native.ModelSamplingDiscrete().patch(tiny_three[0], "eps", False)
    with pytest.raises(NodeError, match="wrong_model: .*sampled by ModelSamplingDiscrete and EPS"):
        FrozenBase(model)
    (model,) = native.ModelSamplingContinuousEDM().patch(tiny_three[0], "eps", 120.0, 0.002)
    with pytest.raises(NodeError, match="sampled by ModelSamplingContinuousEDM and EPS"):
        FrozenBase(model)
    (model,) = native.ModelSamplingAuraFlow().patch_aura(tiny_three[0], 1.73)  # multiplier 1
    with pytest.raises(NodeError, match="DiscreteFlow and CONST with multiplier 1,"):
        FrozenBase(model)
    (model,) = native.ModelSamplingSD3().patch(tiny_three[0], 2.5)
    assert FrozenBase(model).shift == 2.5


def test_speed_is_of_sampling_and_does_not_keep_a_model_from_training(tiny_three):
    model = SD3Speed.execute(tiny_three[0], 0.1).args[0]
    base, plain = (FrozenBase(one).base for one in (model, tiny_three[0]))
    assert base.changes == plain.changes == ()


def test_what_a_run_cannot_carry_is_refused_by_name(tiny_three, pictures):
    model = tiny_three[0].clone()
    model.set_model_unet_function_wrapper(lambda apply, options: apply(**options))
    with pytest.raises(NodeError, match="wrong_model: .*option model_function_wrapper"):
        train(model, pictures)
    model = tiny_three[0].clone()
    model.set_model_patch_replace(lambda a, b: a, "dit", "double_block", 1)
    with pytest.raises(NodeError, match=r"block patch dit \('double_block', 1\)"):
        train(model, pictures)
    model = tiny_three[0].clone()
    model.add_object_patch("diffusion_model.final_layer", torch.nn.Identity())
    with pytest.raises(NodeError, match="object patch diffusion_model.final_layer"):
        train(model, pictures)


def test_options_of_sampling_do_not_matter(tiny_three, pictures):
    model = tiny_three[0].clone()
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    assert train(model, pictures, steps=1).args[2]["loss"]


def test_a_model_of_another_loader_is_refused(their_model, pictures):
    with pytest.raises(NodeError, match="wrong_model: .*comes from another loader"):
        train(their_model, pictures)


def test_a_clip_with_a_lora_is_refused(tiny_three):
    clip = tiny_three[1].clone()
    key = next(iter(clip.patcher.model_state_dict()))
    clip.patcher.patches[key] = [(1.0, ("diff", (torch.zeros(1),)), 1.0, None, None)]
    with pytest.raises(NodeError, match="wrong_encoders: this CLIP is changed by a LoRA"):
        SD3TrainingImages.execute(clip, tiny_three[2], "pictures")


def test_memory_is_given_back(tiny_three, pictures):
    import gc

    comfy.model_management.unload_all_models()
    before = len(comfy.model_management.current_loaded_models)
    train(tiny_three[0], pictures, steps=1, run_name="one")
    gc.collect()
    comfy.model_management.cleanup_models()
    assert len(comfy.model_management.current_loaded_models) == before


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_name": "../elsewhere"}, "run_name is '../elsewhere'"),
        ({"more": 'data = "/etc"'}, "more names data"),
        ({"more": "rank = 3"}, "more repeats rank"),
        *(
            ({"more": line}, f"more names {line.split()[0]}, .*: use the node SD3 Timestep")
            for line in (
                'density = "uniform"',
                "shift = 1.0",
                "lowest_sigma = 0.1",
                "highest_sigma = 0.9",
            )
        ),
        ({"more": 'sample_prompts = ["a", "b"]'}, "more names sample_prompts, .* sample_prompt"),
        ({"more": "rnk = 3"}, "there is no setting 'rnk'. Did you mean rank"),
        ({"more": "steps"}, "bad_setting"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
def test_bad_settings_are_one_sentence(tiny_three, pictures, changes, message):
    with pytest.raises(NodeError, match=message):
        train(tiny_three[0], pictures, **changes)


@pytest.mark.parametrize(
    "name",
    [
        *("../output/../../x", "/etc", "..", ".", "missing", "pictures/../../..", "C:\\x", "~"),
        *("\\\\host\\share", "//host/share", "a\0b", "x" * 5000),
    ],
)
def test_a_folder_elsewhere_is_refused(name):
    with pytest.raises(NodeError, match="missing_file: folder is"):
        datasets.find_data(name)
    assert "missing_file" in str(SD3TrainingImages.validate_inputs(name))


def test_a_name_outside_is_not_even_looked_at(monkeypatch):
    """On Windows a look at //host/share tells that host who is asking."""
    looked = []
    original = Path.resolve
    roots = {root for one in datasets.data_roots() for root in (one, one.resolve())}
    monkeypatch.setattr(
        Path, "resolve", lambda path, *given: (looked.append(path), original(path, *given))[1]
    )
    NodeError("missing_file", "")  # looks for ComfyUI's own folders in any message
    known = roots | set(looked)
    for name in ("//host/share", "\\\\host\\share\\x", "/etc", "../x"):
        with pytest.raises(NodeError):
            datasets.find_data(name)
    assert set(looked) <= known


def test_a_root_may_be_a_link(places, tmp_path, monkeypatch):
    import folder_paths

    (tmp_path / "linked").symlink_to(places / "input", target_is_directory=True)
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "linked"))
    for name in ("pictures", str(tmp_path / "linked" / "pictures"), str(places / "input/pictures")):
        assert datasets.find_data(name) == (places / "input" / "pictures").resolve()
    for root in (tmp_path / "linked", places / "input"):
        with pytest.raises(NodeError, match="missing_file"):
            datasets.find_data(str(root))


@pytest.mark.parametrize("inner", ["", "deep/er"])
@pytest.mark.parametrize("what", ["folder", "picture", "caption", "metadata.jsonl"])
def test_a_link_inside_a_folder_is_looked_at_as_the_folder_is(
    places, tmp_path_factory, what, inner
):
    outside = write_pictures(tmp_path_factory.mktemp("outside"), 1)
    write_pictures(nest := places / "input" / "nest" / inner, 1)
    (other := places / "output" / "other").mkdir(parents=True)
    targets = {"folder": outside, "picture": outside / "0.png"}
    (nest / "fine").symlink_to(other, target_is_directory=True)
    assert datasets.find_data("nest")
    link = {"picture": "link.png", "caption": "0.txt"}.get(what, what)
    (nest / link).unlink(missing_ok=True)
    (nest / link).symlink_to(targets.get(what, outside / "0.txt"))
    with pytest.raises(NodeError, match=rf"missing_file: nest: .*{link} in it is a link") as raised:
        datasets.find_data("nest")
    assert str(outside) not in str(raised.value)
    assert datasets.folder_fault("nest") is not True
    (other / "again").symlink_to(nest, target_is_directory=True)  # a circle
    (nest / link).unlink()
    assert datasets.find_data("nest")


def test_a_link_that_a_list_of_pairs_names_is_looked_at(tiny_three, places, tmp_path_factory):
    outside = write_pictures(tmp_path_factory.mktemp("outside"), 1)
    home = write_pictures(places / "input" / "pairs", 2)
    (home / "link.png").symlink_to(outside / "0.png")
    lines = home / "mine.jsonl"
    lines.write_text(json.dumps({"prompt": "x", "chosen": "0.png", "rejected": "1.png"}))
    clip, vae = tiny_three[1:]
    assert SD3Preferences.execute(clip, vae, "pairs/mine.jsonl")
    lines.write_text(json.dumps({"prompt": "x", "chosen": "0.png", "rejected": "link.png"}))
    with pytest.raises(NodeError, match=r"missing_file: pairs: link.png in it is a link"):
        SD3Preferences.execute(clip, vae, "pairs/mine.jsonl")


def test_a_link_out_of_the_folder_is_not_followed(places, tmp_path_factory):
    outside = write_pictures(tmp_path_factory.mktemp("outside"), 1)
    (places / "input" / "link").symlink_to(outside, target_is_directory=True)
    with pytest.raises(NodeError, match="missing_file"):
        datasets.find_data("link")


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        ("../out", "leads out of the output folder"),
        ("a/../../out", "leads out"),
        ("file/out", "Not a directory"),
        ("x" * 300, "too long"),
        ("loras/" + "x" * 300 + "/a", "too long"),
        ("猫" * 100, "too long"),
        ("loras/com¹", "Windows keeps"),
        ("", "too long, or"),
    ],
)
def test_a_prefix_that_cannot_be_is_a_sentence_with_a_code(places, prefix, reason):
    (places / "output" / "file").write_bytes(b"")
    with pytest.raises(NodeError, match="SD3:bad_setting: filename_prefix is ") as raised:
        SD3SaveLoRA.execute({"x": torch.zeros(1)}, prefix, "comfy", "fp16")
    assert reason in str(raised.value)
    assert str(places) not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_disk_that_takes_no_pictures_is_a_sentence_with_a_code(tiny_three, places, monkeypatch):
    def full(*given, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(places / "output/sd3/x.png"))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(NodeError) as raised:
        SD3TrainingImages.execute(*tiny_three[1:], "", images=torch.rand(1, 64, 64, 3))
    assert str(raised.value) == "SD3:bad_file: output/sd3/x.png: No space left on device."


def test_an_error_tells_no_place_of_the_machine(places, tmp_path_factory):
    import folder_paths

    for place, shown in (
        (places / "output" / "sd3" / "x", "output/sd3/x"),
        (places / "input", "input"),
        (Path(folder_paths.get_folder_paths("loras")[0]) / "x", "loras/x"),
        (Path(folder_paths.base_path) / "custom_nodes" / "x", "custom_nodes/x"),
    ):
        told = str(NodeError("bad_file", f"{place}: is gone."))
        assert told == f"SD3:bad_file: {shown}: is gone."
    (places / "output" / "sd3").mkdir()
    (places / "output" / "sd3" / "link").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    told = SD3TrainLoRA.validate_inputs("link")
    assert told.startswith("SD3:bad_setting: output/sd3/link: is a link to another place")
    assert str(places) not in str(SD3TrainingImages.validate_inputs("missing"))


def test_folder_or_pictures_not_both_and_not_neither(tiny_three):
    clip, vae = tiny_three[1:]
    for folder, images in (("", None), ("pictures", torch.rand(1, 64, 64, 3))):
        with pytest.raises(NodeError, match="either a folder or pictures"):
            SD3TrainingImages.execute(clip, vae, folder, 1, images)
    with pytest.raises(NodeError, match="captions has 2 lines for 3 pictures"):
        SD3TrainingImages.execute(clip, vae, "", 1, torch.rand(3, 64, 64, 3), "a\nb")


def test_pairs_of_a_folder_and_of_the_graph_are_not_mixed(tiny_three, preferences):
    clip, vae = tiny_three[1:]
    for sides in ({"chosen": torch.rand(1, 64, 64, 3)}, {"rejected": torch.rand(1, 64, 64, 3)}):
        with pytest.raises(NodeError, match="bad_setting: folder is 'pairs' and pictures are"):
            SD3Preferences.execute(clip, vae, "pairs", **sides)


def test_the_fingerprint_of_a_folder_follows_its_files(places):
    first = SD3TrainingImages.fingerprint_inputs(folder="pictures", repeats=1)
    assert SD3TrainingImages.fingerprint_inputs(folder="pictures", repeats=1) == first
    (places / "input" / "pictures" / "0.txt").write_text("another caption")
    assert SD3TrainingImages.fingerprint_inputs(folder="pictures", repeats=1) != first


def test_a_lora_that_is_none_is_refused_and_leaves_no_file(places):
    with pytest.raises(NodeError, match="wrong_lora"):
        SD3SaveLoRA.execute({"a": torch.zeros(2)}, "loras/none", "comfy", "fp16")
    folder = places / "output" / "loras"
    assert not folder.exists() or not list(folder.iterdir())
