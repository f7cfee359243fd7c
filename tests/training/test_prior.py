"""Prior preservation: on some pictures a LoRA is held to what the network answers without it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sd3_pack.sd3_core import lora
from sd3_pack.sd3_core.checkpoints.header import read_header
from sd3_pack.sd3_core.training.config import make_config, plain_settings
from sd3_pack.sd3_core.training.dataset import read_dataset
from sd3_pack.sd3_core.training.flow import FlowTask
from sd3_pack.sd3_core.training.folders import Source
from sd3_pack.sd3_core.training.run import RunRefused
from sd3_pack.sd3_core.training.trainer import train
from sd3_pack.sd3_core.training.validation import chosen
from training_set import write_pictures, write_training_set


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Two pictures to learn from, and seven whose look is to stay."""
    folder = tmp_path_factory.mktemp("prior")
    config = write_training_set(folder)
    new = Source(write_pictures(folder / "new", 2), repeats=4)
    return replace(config, data=(new, Source(folder / "pictures", prior=True)), batch_size=4)


@pytest.fixture
def config(given, request):
    return replace(given, run_name=re.sub(r"[^\w .-]", "_", request.node.name)[:90])


@pytest.fixture
def seen(monkeypatch):
    """For each part of a batch: which samples are prior ones, their losses, and what they would be
    if the network's own answers were asked from the start."""
    passes = []
    part = FlowTask.part

    def watched(task, step, rows, size):
        losses = part(task, step, rows, size)
        batch = task.batches.samples(step, rows, size)
        question = task.objective.ask(batch.x0, batch.noise, task.objective.draw(batch.u))
        with torch.no_grad():
            predict = task.network(batch.conditioning)
            moved = predict(question.x, question.timestep)
            with lora.disabled(task.model):
                before = predict(question.x, question.timestep)
        drift = (moved - before).pow(2).flatten(1).mean(1)
        passes.append((batch.prior, losses.each.detach(), drift))
        return losses

    monkeypatch.setattr(FlowTask, "part", watched)
    return passes


def test_a_prior_samples_loss_is_how_far_the_lora_has_moved_the_answer(config, seen):
    train(replace(config, steps=6))
    prior, losses, _ = seen[0]
    assert losses[prior].max() < 1e-8  # a fresh LoRA has moved nothing
    prior, losses, drift = (torch.cat(some) for some in zip(*seen, strict=True))
    assert losses[~prior].min() > 0.01
    torch.testing.assert_close(losses[prior], 4 * drift[prior], rtol=1e-3, atol=1e-7)
    assert losses[prior].max() > 1e-6  # of the later steps


def test_other_samples_are_not_touched(config, seen):
    """The order of draws is that of all pictures, so only the prior ones' losses differ."""
    train(replace(config, steps=1))
    plain = replace(config, run_name=config.run_name + " plain", steps=1)
    train(replace(plain, data=tuple(replace(source, prior=False) for source in config.data)))
    (prior, with_it, _), (none, without, _) = seen
    assert not none.any()
    torch.testing.assert_close(with_it[~prior], without[~prior])
    assert (with_it[prior] < without[prior]).all()


def test_with_a_prior_the_lora_forgets_less(config):
    """By the answers for the prior pictures' captions, after the same number of steps."""
    drifts = {}
    for weight in (1e-6, 4.0):
        run = replace(
            config,
            run_name=f"{config.run_name} {weight}",
            prior_weight=weight,
            steps=40,
            learning_rate=3e-3,
        )
        tasks = []

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FlowTask, "loss", watching(FlowTask.loss, tasks))
            train(run)
        drifts[weight] = drift_of(tasks[0])
    assert drifts[4.0] < 0.5 * drifts[1e-6]


def watching(loss, tasks):
    def watched(task, step, rows, size):
        tasks.append(task)
        return loss(task, step, rows, size)

    return watched


@torch.no_grad()
def drift_of(task: FlowTask) -> float:
    """Mean square by which the LoRA has moved the answers for prior samples."""
    total = 0.0
    for step in range(1000, 1020):
        for part in task.batches.parts(step, range(4), 4):
            batch = task.batches.samples(step, part, 4)
            if not batch.prior.any():
                continue
            question = task.objective.ask(batch.x0, batch.noise, task.objective.draw(batch.u))
            asked = task.as_before(question, batch)
            each = asked.loss(task.network(batch.conditioning))
            total += float(each[batch.prior].sum())
    return total


def test_validation_is_on_what_is_learnt(given):
    dataset = read_dataset(given.data, resolution=64, bucket_step=16)
    assert [item.prior for item in dataset.items] == [False] * 2 + [True] * 7
    assert chosen(dataset, 16) == list(dataset.items[:2])
    assert "7 pictures of these keep what the model knows: 47% of the draws" in "\n".join(
        dataset.report.lines()
    )


def test_the_product_counts_them_apart(config):
    told = read_header(train(replace(config, steps=1)).product).metadata
    assert (told["ss_num_train_images"], told["ss_num_reg_images"]) == ("2", "7")
    data = json.loads(told["sd3_workbench.training"])["data"]
    assert [one.get("prior", False) for one in data] == [False, True]


def test_a_run_without_its_prior_is_another_run(config):
    train(config)
    plain = tuple(replace(source, prior=False) for source in config.data)
    with pytest.raises(RunRefused, match="size, crop, repeats, weight or prior changed: .*0.png"):
        train(replace(config, data=plain))


def test_its_weight_belongs_to_the_run(config):
    train(config)
    with pytest.raises(RunRefused, match="weight or prior changed: .*pictures/0.png"):
        train(replace(config, prior_weight=2.0))


def test_settings_are_read_and_written(given):
    assert make_config(plain_settings(given)) == given
    table = {"run_name": "a", "data": ["a", {"path": "b", "prior": True}]}
    assert make_config(table).data == (Source(Path("a")), Source(Path("b"), prior=True))
    with pytest.raises(ValueError, match="data is"):
        make_config({**table, "data": [{"path": "b", "prior": "yes"}]})


@pytest.mark.parametrize("method", ["full", "scratch", "dpo"])
def test_only_a_lora_can_be_held_to_the_network_without_it(given, method):
    with pytest.raises(ValueError, match=rf'prior = true.*method is "{method}".*method = "lora"'):
        replace(given, method=method)


def test_there_must_be_something_to_learn_from(given):
    with pytest.raises(ValueError, match=r"nothing else: name the pictures to learn from"):
        replace(given, data=given.data[1:])
    with pytest.raises(ValueError, match="no meaning in validation_data"):
        replace(given, validation_data=given.data)
    with pytest.raises(ValueError, match="prior_weight is 0"):
        replace(given, prior_weight=0)
    with pytest.raises(ValueError, match=r"prior_weight is 2.0, but there is no prior"):
        replace(given, data=given.data[:1], prior_weight=2.0)


def test_a_prior_alone_teaches_nothing_and_is_refused(given, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a.png").write_bytes(b"no picture")
    sources = (Source(tmp_path / "new"), given.data[1])
    with pytest.raises(ValueError, match=r"new: none of 1 pictures can be used; .*a.png"):
        read_dataset(sources, resolution=64, bucket_step=16)


def test_folders_inside_one_another_are_refused(given, tmp_path):
    """Else pictures would be learnt and held, or learnt and measured, at once."""
    new = write_pictures(tmp_path / "new", 2)
    inside = Source(write_pictures(new / "kept", 2), prior=True)
    with pytest.raises(ValueError, match=r"kept: lies in .*new, which is given, too"):
        train(replace(given, data=(Source(new), inside)))
    held = (replace(inside, prior=False),)
    measured = replace(given, data=(Source(new),), validation_data=held, validate_every=1)
    with pytest.raises(ValueError, match=r"kept: lies in .*new, which is given, too"):
        train(measured)


def test_recomputed_blocks_and_parts_of_a_batch_change_nothing(config, seen):
    settings = ({}, {"gradient_checkpointing": True}, {"batch_size": 1, "accumulation": 4})
    found = []
    for number, changes in enumerate(settings):
        train(replace(config, run_name=f"{config.run_name} {number}", steps=3, **changes))
        found.append(torch.cat([losses for _, losses, _ in seen]))
        seen.clear()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[2], found[0], rtol=1e-3, atol=1e-6)


def test_the_log_tells_the_priors_part_of_the_loss(config):
    train(config)
    log = (config.output / "sd3" / config.run_name / "log.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in log]
    assert all(0 <= line["prior_loss"] <= line["loss"] for line in lines)
    assert max(line["prior_loss"] for line in lines) > 0
