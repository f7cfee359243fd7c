"""A run's folder: its name, its lock, its states and its log."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.training.run import Run, RunRefused, State, open_run, run_folder

HOLD = """
import sys, types
pack = types.ModuleType("sd3_pack"); pack.__path__ = [sys.argv[1]]; sys.modules["sd3_pack"] = pack
from pathlib import Path
from sd3_pack.sd3_core.training.run import open_run
with open_run(Path(sys.argv[2]), "held"):
    print("held", flush=True)
    sys.stdin.read()
"""
PACK = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x", "a/b", "a\\b", "/etc", "C:x", ".hidden", "x.", "x ", " x", "-x"),
        *("a\nb", "a\0b", "con", "NUL.txt", "x" * 101, "a*b", "a?b", "~x", "$HOME"),
        *("猫" * 64, "com¹", "LPT³.txt", "con .x"),
    ],
)
def test_a_name_that_is_no_plain_folder_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="run_name is"):
        run_folder(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "my cat 3.5", "größe_2", "2024-01-01+x", "猫" * 60, "¹"])
def test_plain_names_become_folders_of_their_own(tmp_path, name):
    assert run_folder(tmp_path, name).parent == tmp_path / "sd3"


def test_a_link_to_another_place_is_no_run(tmp_path):
    (tmp_path / "sd3").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "sd3" / "run").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(ValueError, match="link to another place"):
        run_folder(tmp_path, "run")


def test_a_run_that_is_open_cannot_be_opened_again(tmp_path):
    with open_run(tmp_path, "run"), pytest.raises(RunRefused, match="by another process"):
        open_run(tmp_path, "run").__enter__()
    with open_run(tmp_path, "run"):
        pass


def test_a_killed_process_leaves_no_lock_behind(tmp_path):
    command = [sys.executable, "-c", HOLD, str(PACK), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunRefused, match=f"process {holder.pid} since"):
            open_run(tmp_path, "held").__enter__()
        holder.kill()
        holder.wait()
    with open_run(tmp_path, "held"):
        pass


def test_what_a_killed_process_was_writing_is_swept_away(tmp_path):
    with open_run(tmp_path, "run") as run:
        run.save(State(1, {"x": torch.zeros(2)}), keep=1, best=None)
    left = [
        run.folder / "state" / ".step-00000002.safetensors.77.part",
        run.folder / ".config.json.77.part",
    ]
    for path in left:
        path.write_bytes(b"half")
    (run.folder / "notes.txt").write_text("the user's own")
    with open_run(tmp_path, "run") as run:
        assert not any(path.exists() for path in left)
        assert (run.folder / "notes.txt").exists()
        assert list(run.states()) == [1]


def test_a_state_is_read_back_as_it_was(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4), "c": torch.randn(2).bfloat16()}
    with open_run(tmp_path, "run") as run:
        run.save(State(7, tensors, {"best": [1, 0.5]}), keep=1, best=None)
        state = run.newest()
    assert state is not None
    assert (state.step, state.values) == (7, {"best": [1, 0.5]})
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in tensors.items())


def test_the_log_is_cut_where_the_state_ends(tmp_path):
    run = Run(tmp_path)
    run.rewind(-1, looked=False)
    for step in range(1, 6):
        run.write({"step": step, "loss": 1.0 / step})
    run.write({"step": 3, "validation_loss": 0.5})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    run.rewind(3, looked=True)
    assert [line["step"] for line in run.lines] == [1, 2, 3, 3]
    run.rewind(3, looked=False)
    assert [line["step"] for line in run.lines] == [1, 2, 3]


def test_states_without_settings_are_refused(tmp_path):
    with open_run(tmp_path, "run") as run:
        run.save(State(1, {"x": torch.zeros(1)}), keep=1, best=None)
        with pytest.raises(RunRefused, match="config.json: is missing"):
            run.settle({"a": 1}, 5, {})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"steps": "x", "identity": 1}'])
def test_a_damaged_config_is_refused_not_overwritten(tmp_path, text):
    with open_run(tmp_path, "run") as run:
        (run.folder / "config.json").write_text(text)
        with pytest.raises(RunRefused, match="is damaged"):
            run.settle({"a": 1}, 5, {})
        assert (run.folder / "config.json").read_text() == text


def test_every_difference_is_listed(tmp_path):
    with open_run(tmp_path, "run") as run:
        run.settle({"a": 1, "b": (1, 2), "gone": True}, 5, {})
        run.save(State(5, {"x": torch.zeros(1)}), keep=1, best=None)
        run.settle({"a": 1, "b": [1, 2], "gone": True}, 6, {})
        run.settle({"a": 1, "b": [1, 2], "gone": True}, 5, {})  # the sixth step was not done
        with pytest.raises(RunRefused) as error:
            run.settle({"a": 2, "b": [1, 2], "new": None}, 4, {})
    lines = str(error.value).splitlines()
    assert [line.strip() for line in lines[1:-1]] == [
        "a: 1 -> 2",
        "gone: true -> null",
        "steps: 5 -> 4 (5 are done already)",
    ]


def test_a_run_that_learnt_nothing_takes_new_settings(tmp_path):
    with open_run(tmp_path, "run") as run:
        run.settle({"batch": 64}, 5, {})
        run.save(State(0, {"x": torch.zeros(1)}), keep=1, best=None)
        run.settle({"batch": 2}, 5, {})
        assert not run.states()
        run.save(State(1, {"x": torch.zeros(1)}), keep=1, best=None)
        with pytest.raises(RunRefused, match="batch: 2 -> 4"):
            run.settle({"batch": 4}, 5, {})


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    """What the system says when a file is flushed names none."""

    def full(*given, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_run(tmp_path, "run") as run:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"step-00000001\.safetensors: cannot be written"):
            run.save(State(1, {"x": torch.zeros(1)}), keep=1, best=None)
        run._log = SimpleNamespace(write=full, close=full)
        with pytest.raises(CheckpointError, match=r"log\.jsonl: cannot be written: No space left"):
            run.write({"step": 1})
        with pytest.raises(CheckpointError, match=r"log\.jsonl: cannot be written"):
            run.close_log()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match=r"lock\.txt: cannot be written"):
        open_run(tmp_path, "run").__enter__()
