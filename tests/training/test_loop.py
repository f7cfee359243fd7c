"""The loop on a task of two small tensors: resume, accumulation, saving, stopping."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from sd3_pack.sd3_core.errors import CheckpointError, NumericalError
from sd3_pack.sd3_core.training import loop
from sd3_pack.sd3_core.training.loop import Losses, spoken_time
from sd3_pack.sd3_core.training.optimizers import (
    Average,
    learning_rate,
    make_optimizer,
    optimizer_state,
    restore_optimizer,
)
from toy_task import TOY, ToyTask, train_toy

OPTIMIZERS = ("adamw", "adafactor", "muon")


class Stop(Exception):
    pass


def stop_after(step: int):
    def on_step(progress):
        if progress.step == step:
            raise Stop

    return on_step


def files(folder) -> dict[str, bytes]:
    """What a run left behind, but for what names a machine or a moment."""
    root = folder / "sd3" / "toy"
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(("lock", "config"))
    }


def final(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "sd3/toy/model/toy.safetensors")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of an unbroken run, by optimiser."""
    folders = {}
    for optimizer in OPTIMIZERS:
        folders[optimizer] = tmp_path_factory.mktemp(optimizer)
        train_toy(folders[optimizer], replace(TOY, optimizer=optimizer, accumulation=2))
    return folders


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stop", [1, 3, 4, 5, 9])
def test_a_run_stopped_at_any_step_ends_bit_for_bit_as_the_unbroken_one(
    tmp_path, unbroken, stop, optimizer
):
    config = replace(TOY, optimizer=optimizer, accumulation=2)
    with pytest.raises(Stop):
        train_toy(tmp_path, config, on_step=stop_after(stop))
    train_toy(tmp_path, config)
    assert files(tmp_path) == files(unbroken[optimizer])


def test_a_longer_run_is_the_extension_of_the_shorter_one(tmp_path):
    train_toy(tmp_path / "whole", replace(TOY, steps=15))
    train_toy(tmp_path / "longer", replace(TOY, steps=10))
    train_toy(tmp_path / "longer", replace(TOY, steps=15))
    assert final(tmp_path / "longer").keys() == {"weight", "offset"}
    for name, tensor in final(tmp_path / "whole").items():
        assert torch.equal(tensor, final(tmp_path / "longer")[name])


def test_it_learns(tmp_path):
    losses = []
    train_toy(
        tmp_path, replace(TOY, steps=300), on_step=lambda progress: losses.append(progress.loss)
    )
    assert sum(losses[-20:]) < 0.01 * sum(losses[:20])


def test_accumulated_passes_are_one_larger_batch(tmp_path):
    whole, _ = train_toy(tmp_path / "a", replace(TOY, batch_size=6))
    parts, _ = train_toy(tmp_path / "b", replace(TOY, batch_size=2, accumulation=3))
    assert parts.seen == whole.seen
    for name, parameter in whole.parameters.items():
        # the same sums in another order
        torch.testing.assert_close(parts.parameters[name], parameter, rtol=0, atol=1e-6)


def test_the_newest_states_and_the_best_are_kept(tmp_path):
    class Worsening(ToyTask):
        def validate(self):
            self.validated.append(len(self.validated))
            return {"loss": {0: 3.0, 1: 1.0}.get(len(self.validated) - 1, 2.0)}

    config = replace(TOY, steps=20, keep=2, checkpoint_every=3)
    task, outcome = train_toy(tmp_path, config, Worsening())
    names = sorted(path.name for path in (outcome.folder / "state").iterdir())
    assert names == [f"step-{step:08}.safetensors" for step in (4, 18, 20)]
    assert len(task.validated) == 6
    assert outcome.best is not None
    assert outcome.best.name == "toy-best.safetensors"


def test_the_averaged_weights_are_what_comes_out(tmp_path):
    task, _ = train_toy(tmp_path, replace(TOY, ema=0.9))
    state = load_file(tmp_path / "sd3/toy/state/step-00000010.safetensors")
    assert torch.equal(final(tmp_path)["weight"], state["average/weight"])
    assert torch.equal(task.parameters["weight"], state["trained/weight"])
    assert not torch.equal(state["average/weight"], state["trained/weight"])


def test_the_average_of_a_constant_is_the_constant_and_warms_up():
    parameters = {"w": torch.nn.Parameter(torch.zeros(3))}
    average = Average(parameters, decay=0.999)
    parameters["w"].data.fill_(1.0)
    average.update(parameters, 1)
    torch.testing.assert_close(average.tensors["w"], torch.full((3,), 1 - 2 / 11))
    for step in range(2, 200):
        average.update(parameters, step)
    torch.testing.assert_close(average.tensors["w"], torch.ones(3))


def test_the_log_is_a_line_for_each_step_and_measurement(tmp_path):
    train_toy(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "sd3/toy/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 4, 8, 10]
    assert all(math.isfinite(line["largest"]) for line in lines if "loss" in line)


def test_pictures_are_drawn_when_they_are_due(tmp_path):
    task, _ = train_toy(tmp_path, replace(TOY, sample_every=4))
    assert task.sampled == [0, 4, 8, 10]


def test_products_on_the_way_are_written_when_asked(tmp_path):
    _, outcome = train_toy(tmp_path, replace(TOY, export_every=4))
    assert {path.name for path in outcome.product.parent.iterdir()} >= {
        "toy-step000004.safetensors",
        "toy-step000008.safetensors",
        "toy.safetensors",
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_leaves(tmp_path, number):
    def send(progress):
        if progress.step == 5:
            os.kill(os.getpid(), number)

    notes = []
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path / "broken", on_step=send, on_note=notes.append)
    assert signal.getsignal(number) is before
    assert "stopped after step 6 of 10; saved" in notes[-2]
    train_toy(tmp_path / "broken")
    train_toy(tmp_path / "whole")
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def stopped_product(folder):
    return folder / "sd3/toy/model/toy-stopped.safetensors"


def test_a_stopped_run_leaves_what_it_has_learnt_until_it_goes_on_to_its_end(tmp_path):
    notes = []
    with pytest.raises(Stop):
        train_toy(tmp_path / "stopped", on_step=stop_after(5), on_note=notes.append)
    path = stopped_product(tmp_path / "stopped")
    assert notes[-1] == f"what was learnt in these 5 steps: {path}"
    train_toy(tmp_path / "short", replace(TOY, steps=5))
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, final(tmp_path / "short")[name])  # the average, as in the end
    train_toy(tmp_path / "stopped")
    assert not path.exists()
    assert final(tmp_path / "stopped")


def test_a_run_stopped_before_its_first_step_leaves_no_product(tmp_path):
    class Broken(ToyTask):
        def loss(self, step, rows, size):
            raise MemoryError

    with pytest.raises(MemoryError):
        train_toy(tmp_path, TOY, Broken())
    assert not stopped_product(tmp_path).exists()


def test_a_product_that_cannot_be_left_hides_neither_the_reason_nor_the_state(tmp_path):
    class Full(ToyTask):
        def export(self, path, step):
            raise CheckpointError("No space left on device.")

    notes, config = [], replace(TOY, validate_every=0)
    with pytest.raises(Stop):
        train_toy(tmp_path, config, Full(), on_step=stop_after(5), on_note=notes.append)
    assert "stopped after step 5 of 10; saved" in notes[-2]
    assert notes[-1] == "what was learnt so far could not be exported (No space left on device.)."
    assert loaded_states(tmp_path)[-1] == 5


def test_an_error_in_the_middle_of_an_update_is_not_saved(tmp_path, monkeypatch):
    def half_an_update(self, parameters, step):
        if step == 5:
            raise MemoryError
        return original(self, parameters, step)

    original = Average.update
    monkeypatch.setattr(Average, "update", half_an_update)
    notes = []
    with pytest.raises(MemoryError):
        train_toy(tmp_path, on_note=notes.append)
    assert "the saved state is that of step 4" in notes[-1]
    assert 5 not in loaded_states(tmp_path)
    assert not stopped_product(tmp_path).exists()


def loaded_states(folder) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (folder / "sd3/toy/state").glob("step-*"))


def test_out_of_memory_in_a_batch_saves_the_steps_before_it(tmp_path):
    class Hungry(ToyTask):
        def loss(self, step, rows, size):
            if step == 7:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().loss(step, rows, size)

    notes = []
    with pytest.raises(torch.OutOfMemoryError):
        train_toy(tmp_path, TOY, Hungry(), on_note=notes.append)
    assert loaded_states(tmp_path)[-1] == 7
    assert "stopped after step 7 of 10; saved" in notes[-2]


def test_a_full_disk_says_what_is_saved_and_loses_nothing(tmp_path, monkeypatch):
    written = []

    def full(path, tensors, metadata=None):
        written.append(path)
        if len(written) == 3:
            raise CheckpointError(f"{path}: cannot be written: No space left on device.")
        return original(path, tensors, metadata)

    from sd3_pack.sd3_core.training import run

    original = run.save_tensors
    monkeypatch.setattr(run, "save_tensors", full)
    notes = []
    with pytest.raises(CheckpointError, match="No space left"):
        train_toy(tmp_path, replace(TOY, validate_every=0), on_note=notes.append)
    assert "saved" in notes[-2]
    monkeypatch.setattr(run, "save_tensors", original)
    train_toy(tmp_path, replace(TOY, validate_every=0))
    train_toy(tmp_path / "whole", replace(TOY, validate_every=0))
    assert torch.equal(final(tmp_path)["weight"], final(tmp_path / "whole")["weight"])


def test_a_disk_that_stays_full_keeps_the_older_states(tmp_path, monkeypatch):
    from sd3_pack.sd3_core.training import run

    def full(path, tensors, metadata=None):
        if "step-00000003" not in path.name:
            raise CheckpointError(f"{path}: cannot be written: No space left on device.")
        return original(path, tensors, metadata)

    original = run.save_tensors
    monkeypatch.setattr(run, "save_tensors", full)
    notes = []
    with pytest.raises(CheckpointError, match="No space left"):
        train_toy(tmp_path, replace(TOY, validate_every=0), on_note=notes.append)
    assert "could not be saved" in notes[-2]
    assert "the saved state is that of step 3" in notes[-2]
    assert loaded_states(tmp_path) == [3]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_it_spoils_the_weights(tmp_path, value):
    class Diverging(ToyTask):
        def loss(self, step, rows, size):
            losses = super().loss(step, rows, size)
            return Losses(losses.each * (value if step == 4 else 1.0))

    task = Diverging()
    notes = []
    with pytest.raises(NumericalError, match="step 5 .* again. Begin a run of another name"):
        train_toy(tmp_path, TOY, task, on_note=notes.append)
    assert notes[-2] == "toy: stopped after step 4 of 10; saved."  # and no advice to repeat it
    assert all(parameter.isfinite().all() for parameter in task.parameters.values())
    assert loaded_states(tmp_path)[-1] == 4


def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path):
    train_toy(tmp_path / "whole")
    with pytest.raises(Stop):
        train_toy(tmp_path / "broken", on_step=stop_after(8))
    newest = tmp_path / "broken/sd3/toy/state/step-00000008.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    notes = []
    train_toy(tmp_path / "broken", on_note=notes.append)
    assert notes[0].startswith(
        "toy: a saved state is passed over: step-00000008.safetensors: is cut"
    )
    assert "ownload" not in notes[0]
    assert notes[1] == "toy: goes on from step 6"
    assert torch.equal(final(tmp_path / "broken")["weight"], final(tmp_path / "whole")["weight"])


@pytest.mark.parametrize("place", ["tensors", "values"])
def test_one_flipped_bit_in_a_state_is_noticed(tmp_path, place):
    train_toy(tmp_path / "whole")
    with pytest.raises(Stop):
        train_toy(tmp_path / "broken", on_step=stop_after(8))
    newest = tmp_path / "broken/sd3/toy/state/step-00000008.safetensors"
    data = bytearray(newest.read_bytes())
    if place == "tensors":
        data[-5] ^= 1
    else:
        at = data.index(b'step\\": 8') + len(b'step\\": ')
        data[at] = ord("7")
    newest.write_bytes(data)
    notes = []
    train_toy(tmp_path / "broken", replace(TOY, keep=1), on_note=notes.append)
    assert "step-00000008.safetensors: is damaged" in notes[0]
    assert notes[1] == "toy: goes on from step 6"
    assert torch.equal(final(tmp_path / "broken")["weight"], final(tmp_path / "whole")["weight"])
    assert newest.with_name(f"{newest.name}.damaged").exists()  # nothing is thrown away


def test_a_run_whose_states_are_all_damaged_is_not_begun_anew(tmp_path):
    with pytest.raises(Stop):
        train_toy(tmp_path, on_step=stop_after(5))
    for path in (tmp_path / "sd3/toy/state").iterdir():
        path.write_bytes(b"")
    with pytest.raises(
        CheckpointError, match="no saved state can be read .* empty .*, or delete"
    ) as e:
        train_toy(tmp_path)
    assert "ownload" not in str(e.value)
    assert len(list((tmp_path / "sd3/toy/state").glob("step-*.safetensors"))) == 2  # untouched


def test_a_state_of_another_task_is_refused(tmp_path):
    train_toy(tmp_path)
    task = ToyTask()
    task.parameters["weight"] = torch.nn.Parameter(torch.zeros(5, 3))
    with pytest.raises(CheckpointError, match="another network"):
        train_toy(tmp_path, replace(TOY, steps=12), task)


def test_the_learning_rate_rises_then_holds_or_falls():
    constant = [learning_rate(TOY, step) / TOY.learning_rate for step in range(10)]
    assert constant == pytest.approx([1 / 3, 2 / 3, *[1.0] * 8])
    cosine = replace(TOY, lr_schedule="cosine")
    falling = [learning_rate(cosine, step) / TOY.learning_rate for step in range(11)]
    assert falling[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert falling[10] == pytest.approx(0.0)
    assert falling[3:] == sorted(falling[3:], reverse=True)


@pytest.mark.parametrize(
    ("name", "package"), [("adamw_8bit", "bitsandbytes"), ("prodigy", "prodigyopt")]
)
def test_an_optimiser_whose_package_is_absent_is_one_sentence(monkeypatch, name, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ValueError, match=f"needs the package {package} .pip install {package}."):
        make_optimizer(ToyTask().parameters, replace(TOY, optimizer=name))


def test_the_remaining_time_is_told_after_two_steps(tmp_path):
    notes, progress = [], []
    train_toy(tmp_path, on_note=notes.append, on_step=progress.append)
    assert [step.seconds_left is None for step in progress[:3]] == [True, False, False]
    assert notes == ["8 steps left, about 0 s"]


def test_the_time_is_told_before_the_first_step_by_passes_that_change_nothing(
    tmp_path, monkeypatch
):
    longer = replace(TOY, steps=60)
    heard = []
    train_toy(
        tmp_path / "told",
        longer,
        on_note=heard.append,
        on_step=lambda progress: heard.append(progress.step),
    )
    assert heard[0] == "time: about 0 s for 60 steps"
    assert heard[1] == 1
    monkeypatch.setattr(loop, "FORETOLD", 1000)
    task, _ = train_toy(tmp_path / "silent", longer)
    assert len(task.seen) == 60 * TOY.batch_size
    told, silent = (
        (tmp_path / name / "sd3/toy/state/step-00000060.safetensors").read_bytes()
        for name in ("told", "silent")
    )
    assert told == silent


def test_measurements_are_counted_in_the_time_left(tmp_path, monkeypatch):
    clock = [0.0]  # a pass takes one second, a measurement ten
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])

    class Timed(ToyTask):
        def loss(self, step, rows, size):
            clock[0] += 1
            return super().loss(step, rows, size)

        def validate(self):
            clock[0] += 10
            return super().validate()

    left = []
    train_toy(tmp_path, task=Timed(), on_step=lambda progress: left.append(progress.seconds_left))
    # measured at 4, 8 and 10: a step is told before it is measured
    assert left == [None, 38, 37, 36, 25, 24, 23, 22, 11, 10]


def test_times_are_spoken():
    assert [spoken_time(s) for s in (4.2, 600, 12000)] == ["4 s", "10 min", "3 h 20 min"]


def test_a_curve_is_drawn(tmp_path):
    from PIL import Image

    _, outcome = train_toy(tmp_path)
    picture = Image.open(outcome.folder / "curve.png")
    assert picture.size == (loop.draw_curve.__globals__["WIDTH"], 480)
    assert len(picture.convert("RGB").getcolors(2**20) or []) > 4


@pytest.mark.parametrize(
    ("optimizer", "package"), [("prodigy", "prodigyopt"), ("adamw_8bit", "bitsandbytes")]
)
def test_extra_optimisers_resume_bit_for_bit_too(tmp_path, optimizer, package):
    pytest.importorskip(package, reason=f"{package} is an extra, imported when it is chosen")
    config = replace(TOY, optimizer=optimizer)
    train_toy(tmp_path / "whole", config)
    with pytest.raises(Stop):
        train_toy(tmp_path / "broken", config, on_step=stop_after(5))
    train_toy(tmp_path / "broken", config)
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_an_optimiser_s_nested_tables_survive():
    """bitsandbytes keeps its quantised state in a table within the state."""
    parameters = ToyTask().parameters
    optimizer = make_optimizer(parameters, TOY)
    first = {"step": torch.tensor(3.0), "table": {"state1": torch.arange(4), "rounds": 7}}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {0: first, 1: {}}, "param_groups": groups})
    tensors, numbers = optimizer_state(optimizer, list(parameters))
    assert set(tensors) == {"weight:step", "weight:table>state1"}
    assert numbers["values"] == {"weight:table>rounds": 7}
    fresh = make_optimizer(parameters, TOY)
    restore_optimizer(fresh, list(parameters), tensors, numbers)
    assert fresh.state_dict()["state"][0]["table"]["rounds"] == 7


def test_a_verdict_ends_a_run_saved_and_again_at_the_same_step(tmp_path):
    def verdict(lines):
        measured = [line["step"] for line in lines if "validation_loss" in line]
        return "it is enough" if measured[-1] >= 4 else ""

    said = []
    _, outcome = train_toy(tmp_path, verdict=verdict, on_note=said.append)
    assert (outcome.step, outcome.stopped) == (4, "it is enough")
    assert said[-1] == "toy: it is enough"
    assert outcome.product.exists()
    _, again = train_toy(tmp_path, verdict=verdict)
    assert again.step == 4
    _, on = train_toy(tmp_path)
    assert (on.step, on.stopped) == (10, "")
