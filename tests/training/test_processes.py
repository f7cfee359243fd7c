"""Runs in processes of their own: killed at random moments, stopped by signals, several at once."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sd3_pack.sd3_core.checkpoints.header import read_header
from sd3_pack.sd3_core.checkpoints.lora_files import read_lora
from sd3_pack.sd3_core.training.config import TrainConfig, plain_settings
from training_set import write_training_set

PACK = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    config = write_training_set(tmp_path_factory.mktemp("processes"))
    return replace(
        config, steps=30, checkpoint_every=4, validate_every=9, validation_items=2, ema=0.9
    )


def start(config: TrainConfig, environment: dict[str, str] | None = None) -> subprocess.Popen:
    path = config.output.parent / f"{config.run_name}.json"
    path.write_text(json.dumps(plain_settings(config)))
    command = [sys.executable, "-m", "sd3_core", "train", str(path)]
    return subprocess.Popen(
        command,
        cwd=PACK,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return out


def folder(config: TrainConfig) -> Path:
    return config.output / "sd3" / config.run_name


def losses(config: TrainConfig, name: str = "loss") -> list[float]:
    lines = (folder(config) / "log.jsonl").read_text().splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]


def wait_for(config: TrainConfig, step: int, process: subprocess.Popen) -> None:
    """Until the run's log has this step."""
    log = folder(config) / "log.jsonl"
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def unbroken(given):
    finish(start(replace(given, run_name="unbroken")))
    return replace(given, run_name="unbroken")


def kill_and_go_on(config: TrainConfig, kills: int, chance: random.Random) -> int:
    """Kill a run so often, each time at a random moment after it began; returns steps computed."""
    highest = 0
    for _ in range(kills):
        process = start(config)
        saved = [int(path.stem[5:]) for path in (folder(config) / "state").glob("step-*")]
        wait_for(config, max(saved, default=0) + 1, process)
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.communicate()
        states = sorted((folder(config) / "state").glob("step-*"))
        for path in states:
            load_file(path)  # each is whole
        numbers = [int(path.stem[5:]) for path in states]
        reached = max((n for n, _ in enumerate(losses(config), 1)), default=0)
        assert max(numbers, default=0) >= reached - config.checkpoint_every
        assert max(numbers, default=0) >= highest  # nothing saved is ever lost
        highest = max(numbers, default=0)
    finish(start(config))
    return highest


# A process that ends itself, as kill -9 would, at its n-th call of fsync or replace.
DIE = """
import os, signal, sys
left = int(sys.argv[1])
def deadly(call):
    def wrapped(*given, **named):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*given, **named)
    return wrapped
os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
from sd3_core.__main__ import main
sys.exit(main(["train", sys.argv[2]]))
"""


def die_at(config: TrainConfig, call: int) -> bool:
    """Whether the run was killed there; else it ended before."""
    path = config.output.parent / f"{config.run_name}.json"
    path.write_text(json.dumps(plain_settings(config)))
    command = [sys.executable, "-c", DIE, str(call), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACK)}
    done = subprocess.run(command, cwd=PACK, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def unfinished(config: TrainConfig) -> list[Path]:
    """What is left of files that were being written: here and in the caches."""
    return [path for path in config.output.rglob("*") if path.name.endswith((".part", ".tmp"))]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    "calls",
    [
        pytest.param((9,), id="one"),
        pytest.param(range(1000), id="each", marks=pytest.mark.long),
    ],
)
def test_a_run_killed_at_a_write_ends_bit_for_bit_as_the_unbroken_one(
    given, unbroken, calls, tmp_path
):
    name = f"killed at {len(calls)}"
    config = replace(given, run_name=name, output=tmp_path / "out")  # with a cache of its own
    for call in calls:
        if not die_at(config, call):
            break
    finish(start(config))
    check_equal(config, unbroken)
    assert unfinished(config) == []


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(2, id="2"),
        pytest.param(12, id="12", marks=pytest.mark.long),
        pytest.param(50, id="50", marks=pytest.mark.long),
    ],
)
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_the_unbroken_one(
    given, unbroken, kills
):
    config = replace(given, run_name=f"killed {kills}")
    kill_and_go_on(config, kills, random.Random(kills))
    check_equal(config, unbroken)
    assert unfinished(config) == []


def check_equal(config: TrainConfig, unbroken: TrainConfig) -> None:
    """To the bit: log, states and product."""
    assert (folder(config) / "log.jsonl").read_bytes() == (
        folder(unbroken) / "log.jsonl"
    ).read_bytes()
    for path in (folder(unbroken) / "state").iterdir():
        assert (folder(config) / "state" / path.name).read_bytes() == path.read_bytes()
    theirs = load_file(folder(unbroken) / "lora" / "unbroken.safetensors")
    ours = load_file(folder(config) / "lora" / f"{config.run_name}.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
def test_sigterm_saves_says_so_and_leaves(given, unbroken):
    config = replace(given, run_name="terminated", checkpoint_every=1000)
    process = start(config)
    wait_for(config, 3, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "saved" in said
    assert "Traceback" not in said
    (state,) = (folder(config) / "state").glob("step-*")
    left = folder(config) / "lora" / "terminated-stopped.safetensors"
    assert str(left) in said
    assert read_header(left).metadata["sd3_workbench.steps"] == str(int(state.stem[5:]))
    assert read_lora(left).report.unmatched == ()
    finish(start(config))
    assert not left.exists()


def test_a_run_that_is_being_trained_is_refused_to_others(given):
    config = replace(given, run_name="twice", steps=1000)
    process = start(config)
    wait_for(config, 1, process)
    second = start(config)
    _, said = second.communicate(timeout=300)
    process.kill()
    process.communicate()
    assert second.returncode == 2
    assert "is being trained by another process" in said


# Several processes as one


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_in(world: int, config: TrainConfig) -> None:
    """As torchrun would start it."""
    shared = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    processes = [
        start(config, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * world, outputs


def test_two_processes_draw_the_curve_of_one_and_resume_as_one(given):
    alone = replace(
        given, run_name="alone", steps=10, batch_size=1, accumulation=4, validate_every=5
    )
    finish(start(alone))
    together = replace(alone, run_name="together", steps=6, accumulation=2)
    train_in(2, together)
    # goes on as one process, which divides the same batch otherwise
    finish(start(replace(together, steps=10, accumulation=4)))
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    measured = losses(together, "validation_loss")
    del measured[2]  # of step 6, which was the last one at first
    assert measured == pytest.approx(losses(alone, "validation_loss"), rel=1e-5)
    ours = load_file(folder(together) / "lora" / "together.safetensors")
    for name, tensor in load_file(folder(alone) / "lora" / "alone.safetensors").items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4)
    log = (folder(together) / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in log if '"loss"' in line]
    assert steps == list(range(1, 11))  # one process writes


def test_a_launcher_that_says_only_half_is_refused(given):
    process = start(replace(given, run_name="half"), {"WORLD_SIZE": "2"})
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "start with torchrun" in said
