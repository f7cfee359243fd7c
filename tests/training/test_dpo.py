"""Whole DPO runs on a tiny model: where they begin, what moves, when they end and go on."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from sd3_pack.sd3_core.checkpoints.header import read_header
from sd3_pack.sd3_core.training.dpo import DPOTask
from sd3_pack.sd3_core.training.folders import Source
from sd3_pack.sd3_core.training.run import RunRefused
from sd3_pack.sd3_core.training.trainer import train
from training_set import write_training_set


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A DPO run of four steps; circles are preferred to squares of the same colour."""
    folder = tmp_path_factory.mktemp("preferences")
    config = write_training_set(folder)
    for side, other in (("chosen", (200, 40, 40)), ("rejected", (60, 60, 160))):
        (folder / "pairs" / side).mkdir(parents=True)
        for index in range(6):
            size = ((64, 64), (64, 48))[index % 2]
            picture = Image.new("RGB", size, (20 * index, *other[1:]))
            picture.paste(other, (8, 8, 40, 40))
            picture.save(folder / "pairs" / side / f"{index}.png")
            (folder / "pairs" / side / f"{index}.txt").write_text(f"a red circle {index}")
    return replace(
        config,
        method="dpo",
        data=(Source(folder / "pairs"),),
        learning_rate=1e-3,
        dpo_beta=20.0,
        caption_dropout=0.0,
        validation_items=3,
        validate_every=2,
    )


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


def lines(config):
    log = config.output / "sd3" / config.run_name / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def steps(config):
    return [line for line in lines(config) if "loss" in line]


def measured(config):
    return [line for line in lines(config) if "validation_loss" in line]


def test_a_fresh_lora_has_loss_ln_2_and_accuracy_one_half(config):
    train(replace(config, steps=1))
    first, start = steps(config)[0], measured(config)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["accuracy"] == 0.5
    assert first["winner_gap"] == first["loser_gap"] == first["margin"] == 0
    assert start["step"] == 0
    assert start["validation_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert start["validation_accuracy"] == 0.5


def test_the_preference_is_learnt(config):
    train(replace(config, steps=60, validate_every=60))
    start, end = measured(config)
    assert end["validation_loss"] < start["validation_loss"] - 0.05
    assert end["validation_accuracy"] > 0.9
    assert end["validation_margin"] > 0
    assert end["validation_margin"] == pytest.approx(
        end["validation_loser_gap"] - end["validation_winner_gap"], abs=1e-6
    )


def test_the_first_step_lowers_the_winner_s_error_and_raises_the_loser_s(config, monkeypatch):
    """The sign of the gradient, on the network itself: along it winners gain, losers lose."""
    seen = {}
    original = DPOTask.loss

    def loss(task, step, rows, size):
        if not seen:
            sides = {}
            for side in ("winner", "loser"):
                batches = _pairs(task, step, rows, size)
                error = getattr(task.errors(*batches), side).sum()
                sides[side] = torch.autograd.grad(error, list(task.parameters.values()))
            seen.update(sides)
            result = original(task, step, rows, size)
            total = torch.autograd.grad(
                result.each.sum(), list(task.parameters.values()), retain_graph=True
            )
            seen["total"] = total
            return result
        return original(task, step, rows, size)

    monkeypatch.setattr(DPOTask, "loss", loss)
    train(replace(config, steps=1, validate_every=0))
    quarter = config.dpo_beta / 4
    for total, winner, loser in zip(seen["total"], seen["winner"], seen["loser"], strict=True):
        torch.testing.assert_close(total, quarter * (winner - loser), rtol=1e-3, atol=1e-4)
    assert max(float(t.abs().max()) for t in seen["total"]) > 1e-3


def _pairs(task, step, rows, size):
    from sd3_pack.sd3_core.training.dpo import pairs

    return pairs(task.batches, step, rows, size)


def test_winner_and_loser_meet_one_noise_one_time_and_one_prompt(config, monkeypatch):
    seen = []
    original = DPOTask.errors

    def errors(task, winner, loser):
        seen.append((winner, loser))
        return original(task, winner, loser)

    monkeypatch.setattr(DPOTask, "errors", errors)
    train(replace(config, caption_dropout=0.5, validate_every=0))
    samples = sum(len(winner.x0) for winner, _ in seen)
    assert samples == 4 * config.batch_size * 2  # of four steps, for reference and trained
    for winner, loser in seen:
        assert torch.equal(winner.noise, loser.noise)
        assert torch.equal(winner.u, loser.u)
        assert torch.equal(winner.conditioning.context, loser.conditioning.context)
        assert winner.x0.shape == loser.x0.shape
        assert not torch.equal(winner.x0, loser.x0)


def test_a_run_stopped_and_started_again_equals_the_unbroken_one_bit_for_bit(config):
    config = replace(
        config,
        steps=7,
        batch_size=1,
        accumulation=2,
        ema=0.9,
        caption_dropout=0.3,
        gradient_checkpointing=True,
        validate_every=3,
    )
    whole = replace(config, run_name="unbroken dpo")
    train(whole)
    for stop in (1, 4):
        with pytest.raises(Stop):
            train(config, on_step=stop_after(stop))
    train(config)
    assert lines(config) == lines(whole)
    states = [
        (c.output / "sd3" / c.run_name / "state" / "step-00000007.safetensors").read_bytes()
        for c in (config, whole)
    ]
    assert states[0] == states[1]


def test_the_same_pairs_in_parts_give_the_same_step(config):
    """A pair belongs to one pass: accumulation divides pairs, never a pair."""
    train(replace(config, steps=2, batch_size=4, validate_every=0))
    parts = replace(config, run_name=config.run_name + " parts", batch_size=1, accumulation=4)
    train(replace(parts, steps=2, validate_every=0))
    for one, other in zip(steps(config), steps(parts), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["margin"] == pytest.approx(other["margin"], abs=1e-5)


def line(step, gap, loss=0.6):
    return {"step": step, "validation_winner_gap": gap, "validation_loss": loss}


@pytest.mark.parametrize(
    ("gaps", "ends"),
    [
        ([0.0, 0.1, 0.2, 0.3], True),
        ([-0.2, -0.1, 0.2, 0.3], False),  # only twice above
        ([0.0, 0.3, 0.2, 0.1], False),  # coming back
        ([0.0, 0.1, 0.3, 0.2], False),
        ([0.0, -0.1, -0.2, -0.1], False),
        ([0.1, 0.2], False),
    ],
)
def test_it_ends_when_the_winner_s_error_keeps_rising(config, gaps, ends):
    task = object.__new__(DPOTask)
    task.config = config
    sentence = task.verdict([line(10 * i, gap, 0.7 - i) for i, gap in enumerate(gaps)])
    assert bool(sentence) == ends
    if ends:
        assert "stopped at step 30" in sentence
        assert "dpo_sft_weight = 0.5" in sentence  # a tenth of beta / 4
        assert "No measured state is better than the untrained network" in sentence
    task.config = replace(config, dpo_patience=0)
    assert task.verdict([line(i, 1.0 + i) for i in range(9)]) == ""


def test_a_run_that_spoils_its_winners_ends_with_a_sentence_and_stays_ended(config, monkeypatch):
    original = DPOTask.validate

    def spoilt(task):
        values = dict(original(task))
        return {**values, "winner_gap": 0.1 + len(asked)}

    asked = []
    monkeypatch.setattr(DPOTask, "validate", lambda task: (asked.append(1), spoilt(task))[1])
    config = replace(config, steps=20, validate_every=2)
    notes = []
    outcome = train(config, on_note=notes.append)
    assert outcome.step == 4  # measured at 0, 2 and 4
    assert "making both pictures worse" in outcome.stopped
    assert outcome.stopped in notes[-1]
    assert outcome.product.exists()
    again = train(config)
    assert (again.step, again.stopped) == (outcome.step, outcome.stopped)


def test_the_last_measurement_is_judged_too_and_the_verdict_is_kept(config, monkeypatch):
    measured = iter({"loss": 0.5 + gap, "winner_gap": gap} for gap in (0.0, -0.1, 0.1, 0.2, 0.3))
    monkeypatch.setattr(DPOTask, "validate", lambda task: next(measured))
    config = replace(config, steps=8, validate_every=2)
    outcome = train(config)
    assert outcome.step == 8
    assert "that of step 2, the best" in outcome.stopped
    notes = []
    again = train(config, on_note=notes.append)
    assert "nothing was computed" in notes[-2]
    assert (again.stopped, again.best) == (outcome.stopped, outcome.best)


def test_the_reference_of_held_pairs_is_measured_once(config, monkeypatch):
    original, asked = DPOTask.held_errors, []
    monkeypatch.setattr(
        DPOTask,
        "held_errors",
        lambda task, *pair: (asked.append(pair[0]), original(task, *pair))[1],
    )
    train(replace(config, steps=2, validate_every=1))
    held = len(set(asked))
    assert len(asked) == held * (3 + 1)  # three measurements, one reference


@pytest.mark.parametrize(
    ("gaps", "best"),
    [
        ([0.0, -0.1, -0.2, 0.1, 0.2, 0.3], 4),  # the lowest loss among the kept, not of all
        ([0.0, 0.1, -0.1, 0.1, 0.2, 0.3], 4),  # one that came back
        ([0.0, 0.1, 0.2, 0.3], None),
    ],
)
def test_the_best_state_is_never_one_that_spoils_its_winners(config, monkeypatch, gaps, best):
    """In over-optimisation the loss falls on; by it the last state would be the best."""
    losses = iter([0.69 - 0.1 * i for i in range(len(gaps))])
    measured = iter(gaps)
    monkeypatch.setattr(
        DPOTask, "validate", lambda task: {"loss": next(losses), "winner_gap": next(measured)}
    )
    outcome = train(replace(config, steps=20, validate_every=2))
    assert outcome.step == 2 * (len(gaps) - 1)
    if best is None:
        assert outcome.best is None
        assert "No measured state is better than the untrained network" in outcome.stopped
    else:
        assert outcome.best is not None
        metadata = read_header(outcome.best).metadata
        assert metadata["ss_steps"] == str(best)
        assert f"that of step {best}, the best" in outcome.stopped


def test_the_conventions_are_told_in_the_file(config):
    told = json.loads(read_header(train(config).product).metadata["sd3_workbench.dpo"])
    assert told == {
        "beta": 20.0,
        "reduction": "mean",
        "half": True,
        "sft_weight": 0.0,
        "loser_scale": 1.0,
    }


def test_other_preferences_are_another_run(config, given, tmp_path):
    train(replace(config, steps=1, validate_every=0))
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        source = given.data[0].path / side
        (tmp_path / "swapped").mkdir(exist_ok=True)
        (tmp_path / "swapped" / other).symlink_to(source, target_is_directory=True)
    swapped = replace(config, data=(Source(tmp_path / "swapped"),), validate_every=0)
    with pytest.raises(RunRefused, match="pictures and captions"):
        train(swapped)


def test_dropout_in_the_lora_is_refused(config):
    with pytest.raises(ValueError, match="lora_dropout must be 0 for DPO"):
        replace(config, lora_dropout=0.1)
