"""Training on a real server: interrupted, restarted, resumed, saved, used; the queue told of it."""

import json

from api_workflows import EMBEDDED, text_to_image
from comfy_server import Listener, reports, serve
from training_set import write_pictures


def training(steps: int, run_name: str = "shapes"):
    nodes = {
        "load": ("SD3LoadCheckpoint", {"ckpt_name": EMBEDDED}),
        "pictures": (
            "SD3TrainingImages",
            {"clip": ["load", 1], "vae": ["load", 2], "folder": "shapes", "repeats": 1},
        ),
        "density": ("SD3TimestepDensity", {"density": "logit_normal", "shift": 1.0}),
        "train": (
            "SD3TrainLoRA",
            {
                "model": ["load", 0],
                "dataset": ["pictures", 0],
                "density": ["density", 0],
                "run_name": run_name,
                "steps": steps,
                "learning_rate": 0.01,
                "rank": 2,
                "batch_size": 1,
                "resolution": 64,
                "seed": 0,
                "warmup": 0,
                "validate_every": 0,
                "more": "bucket_step = 16\nsample_steps = 2",
            },
        ),
        "save": (
            "SD3SaveLoRA",
            {
                "lora": ["train", 1],
                "filename_prefix": "loras/shapes",
                "dialect": "kohya",
                "save_dtype": "fp16",
            },
        ),
        "loss": ("LossGraphNode", {"loss": ["train", 2], "filename_prefix": "loss"}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def with_lora(name: str):
    workflow = text_to_image()
    workflow["lora"] = {
        "class_type": "SD3LoadLoRA",
        "inputs": {"model": ["load", 0], "lora_name": name, "strength": 1.0},
    }
    workflow["sample"]["inputs"]["model"] = ["lora", 0]
    return workflow


def logged_steps(folder):
    log = folder / "output" / "sd3" / "shapes" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def goes_on_from(entry) -> int:
    """The step that a run's report says it went on from."""
    told = "\n".join(reports(entry)["train"]["notes"])
    return int(told.partition("goes on from step ")[2].split()[0])


def test_a_run_is_interrupted_survives_a_restart_goes_on_and_is_used(tmp_path):
    write_pictures(tmp_path / "input" / "shapes", 4)
    with serve(tmp_path) as server:
        listener = Listener(server.url)
        prompt = server.queue(training(100_000), listener.client_id)
        done = 0
        while done < 3:
            event = listener.until("progress_state", prompt)
            state = event.data["nodes"].get("train", {})
            done = state.get("value", 0) if state.get("state") == "running" else 0
        server.interrupt(prompt)
        listener.until("execution_interrupted", prompt, timeout=120)
        reached = logged_steps(tmp_path)
        assert 3 <= len(reached) < 1000
        told = [event.data.decode(errors="replace") for event in listener.of("text")]
        plan = next(text for text in told if "time: about" in text)
        assert "memory: about" in plan
        assert "The queue is busy until this run ends" in plan
        assert "step 1 of" not in "".join(told[: told.index(plan) + 1])  # it came before the steps
        assert any("steps left, about" in text for text in told)
        assert listener.of("preview")
        listener.close()
        server.free()
        steps = len(reached) + 1
        entry = server.run(training(steps))
        assert logged_steps(tmp_path) == list(range(1, steps + 1))
        assert goes_on_from(entry) == len(reached)
        server.free()
        base = server.picture(server.run(text_to_image()))
    with serve(tmp_path) as server:
        steps += 1
        entry = server.run(training(steps))
        assert logged_steps(tmp_path) == list(range(1, steps + 1))
        report = reports(entry)["train"]
        assert report["steps"] == steps
        assert goes_on_from(entry) == steps - 1
        assert entry["outputs"]["train"]["images"]
        _, saved = sorted((tmp_path / "output" / "loras").glob("shapes*.safetensors"))
        drawn = server.run(with_lora(saved.name))
        assert reports(drawn)["lora"]["unmatched"] == 0
        assert server.picture(drawn) != base
        server.free()  # else ComfyUI does not even ask the node
        notes = reports(server.run(training(steps)))["train"]["notes"]
        assert "is finished; nothing was computed" in notes[-1]
        assert logged_steps(tmp_path) == list(range(1, steps + 1))
