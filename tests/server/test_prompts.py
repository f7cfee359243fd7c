"""Prompts over HTTP and websocket, as a program without the front end sends them."""

import io
import json
import time
import urllib.request

import pytest
from api_workflows import text_to_image
from comfy_server import DONE, PACK, cached_of, reports
from PIL import Image
from sd3_pack.sd3_core.checkpoints.header import fingerprint

SCHEMAS = json.loads((PACK / "tests/nodes/schemas.json").read_text(encoding="utf-8"))


def pixels(png: bytes) -> bytes:
    """Without the metadata, which names the prompt."""
    return Image.open(io.BytesIO(png)).tobytes()


# What is there


def test_exactly_our_nodes_are_registered(server):
    assert set(server.our_nodes()) == set(SCHEMAS)


def test_every_node_has_its_words(server):
    for name, node in server.our_nodes().items():
        assert node["display_name"].startswith("SD3 "), name
        assert node["category"].startswith("SD3 Workbench/"), name
        assert node["description"], name


# A picture


def test_a_prompt_shows_its_progress_and_previews(server):
    listener = server.listen()
    prompt = server.queue(text_to_image(steps=5, seed=101), listener.client_id, "latent2rgb")
    cached = listener.until("execution_cached", prompt).data["nodes"]  # of other tests
    assert listener.until(DONE, prompt).type == "execution_success"
    listener.close()
    steps = [e.data["value"] for e in listener.of("progress", prompt) if e.data["node"] == "sample"]
    assert steps == [1, 2, 3, 4, 5]
    previews = listener.of("preview")
    assert len(previews) == 5
    assert len({event.data for event in previews}) == 5, "each step has its own picture"
    states = [event.data["nodes"] for event in listener.of("progress_state", prompt)]
    assert {name for state in states for name in state} == set(text_to_image()) - set(cached)
    assert (
        states[-1]["sample"] | {"value": 5, "max": 5, "state": "finished"} == states[-1]["sample"]
    )


def test_the_same_prompt_again_comes_from_the_cache(server):
    workflow = text_to_image(seed=102)
    first = server.run(workflow)
    listener = server.listen()
    prompt = server.queue(workflow, listener.client_id)
    cached = listener.until("execution_cached", prompt).data["nodes"]
    listener.until(DONE, prompt)
    listener.close()
    assert set(cached) == set(workflow)
    assert reports(server.wait(prompt)) == reports(first), "headless readers miss nothing"


def test_another_seed_recomputes_no_more_than_it_must(server):
    server.run(text_to_image(seed=103))
    entry = server.run(text_to_image(seed=104))
    assert cached_of(entry) == {"load", "prompt", "empty", "schedule"}


def test_the_same_seed_gives_the_same_picture(server):
    first = server.run(text_to_image(seed=105, output="first"))
    server.run(text_to_image(seed=106))
    server.free()
    again = server.run(text_to_image(seed=105, output="again"))
    assert pixels(server.picture(first)) == pixels(server.picture(again))


# What headless readers learn


def test_history_tells_what_the_widgets_show(server):
    file = server.folder / "models" / "checkpoints" / "tiny.safetensors"
    told = reports(server.run(text_to_image("tiny.safetensors", "a red circle", seed=107)))
    note = {"file": "tiny.safetensors", "fingerprint": fingerprint(file)}
    assert told["load"]["files"] == dict.fromkeys(("mmdit", "vae", "clip_l", "clip_g", "t5"), note)
    assert told["prompt"]["positive"]["tokens"]["clip_l"] == 3
    assert told["empty"] == {"width": 64, "height": 64, "batch_size": 1}
    assert len(told["schedule"]["sigmas"]) == len(told["schedule"]["log_snr"]) == 5
    sample = told["sample"]
    assert (sample["sampler"], sample["seed"], sample["guidance"]["cfg"]) == ("dpmpp_2m", 107, 4.5)
    assert sample["files"] == {"mmdit": note}
    assert sample["latent"] == [1, 16, 8, 8]
    for node in ("sample", "decode"):
        assert told[node]["seconds"] > 0
        assert "peak_memory_mib" in told[node]
    assert str(server.folder) not in json.dumps(told), "folders are nobody's business"


def test_history_is_strict_json(server):
    """Python reads NaN and Infinity, other languages do not."""
    workflow = text_to_image(seed=108)
    prompt = server.queue(workflow)
    server.wait(prompt)
    text = urllib.request.urlopen(f"{server.url}/history/{prompt}").read()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in /history"))


# Names


@pytest.mark.parametrize("separator", ["/", "\\"])
def test_names_take_either_separator(server, separator):
    name = separator.join(("sub", "folder", "nested.safetensors"))
    told = reports(server.run(text_to_image(name, seed=109)))
    assert told["load"]["files"]["mmdit"]["file"] == "nested.safetensors"


def test_a_base_name_is_enough_where_only_one_file_has_it(server):
    told = reports(server.run(text_to_image("nested.safetensors", seed=110)))
    assert told["load"]["files"]["mmdit"]["file"] == "nested.safetensors"


@pytest.mark.parametrize("value", [7, "", "auto", "none", "x" * 5000, {"name": "tiny"}, None])
def test_odd_names_are_answered_with_a_sentence(server, value):
    assert "SD3:missing_file: " in server.refusal(with_inputs("load", ckpt_name=value))


@pytest.mark.parametrize(
    "name",
    [
        "../../outside.safetensors",
        "..\\..\\outside.safetensors",
        "sub/../../../outside.safetensors",
        "{folder}/outside.safetensors",
        "../../../../../../etc/passwd",
    ],
)
def test_names_do_not_leave_their_folder(server, name):
    said = server.refusal(text_to_image(name.format(folder=server.folder)))
    assert "SD3:missing_file: " in said


# What goes wrong is said in one sentence with a code


def with_inputs(
    node: str, more: dict | None = None, checkpoint: str = "tiny.safetensors", **inputs
):
    workflow = {**text_to_image(checkpoint, seed=111), **(more or {})}
    workflow[node]["inputs"].update(inputs)
    return workflow


LORA = {
    "lora": {
        "class_type": "SD3LoadLoRA",
        "inputs": {"model": ["load", 0], "lora_name": "flux.safetensors", "strength": 1.0},
    }
}
WIDE = {
    "wide": {
        "class_type": "SD3LoadMMDiT",
        "inputs": {"unet_name": "wide.safetensors", "weight_dtype": "auto"},
    }
}
NO_TEXT = {"t5xxl": "none", "clip_g": "none", "clip_l": "none"}
BAD = {
    "unknown file": ("missing_file", with_inputs("load", ckpt_name="tiny.safetensor")),
    "torn file": ("bad_file", with_inputs("load", ckpt_name="broken.safetensors")),
    "no encoder": ("missing_encoder", with_inputs("load", **NO_TEXT)),
    "no encoder in the file": (
        "missing_encoder",
        with_inputs("load", ckpt_name="no_text.safetensors"),
    ),
    "two models": ("wrong_encoders", with_inputs("sample", WIDE, model=["wide", 0])),
    "too large": ("bad_setting", with_inputs("empty", width=2048)),
    "blocks that are not there": ("bad_setting", with_inputs("sample", slg_scale=2.0)),
    "overflow": ("not_finite", with_inputs("load", ckpt_name="infinite.safetensors")),
    "another model's LoRA": ("wrong_lora", with_inputs("sample", LORA, model=["lora", 0])),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_with_its_code(server, case):
    code, workflow = BAD[case]
    said = server.refusal(workflow)
    assert f"SD3:{code}: " in said
    assert server.run(text_to_image(seed=112)), "the next prompt works"


# Stopping and freeing


def test_an_interrupt_ends_the_prompt_within_a_step(server):
    listener = server.listen()
    slow = text_to_image("tiny.safetensors", steps=500, pixels=384, batch_size=8, seed=113)
    prompt = server.queue(slow, listener.client_id)
    while listener.until("progress", prompt).data["value"] < 3:
        pass
    server.interrupt()
    assert listener.until(DONE, prompt, timeout=60).type == "execution_interrupted"
    listener.close()
    assert max(e.data["value"] for e in listener.of("progress", prompt)) <= 4
    entry = server.wait(prompt)
    assert entry["status"]["status_str"] == "error"
    assert "sample" not in entry["outputs"]
    assert reports(server.run(text_to_image(seed=114)))["sample"]["seed"] == 114


def test_free_forgets_results(server):
    workflow = text_to_image(seed=115)
    server.run(workflow)
    assert cached_of(server.run(workflow)) == set(workflow)
    server.free()  # acts now, or after a prompt that came too soon
    assert set() in [cached_of(server.run(workflow)) for _ in range(2)]


def test_free_gives_the_memory_of_a_model_back(server):
    workflow = text_to_image("tiny.safetensors", seed=116)
    server.run(workflow)
    before = server.memory()
    large = {"unet_name": "large.safetensors", "weight_dtype": "auto"}
    workflow["large"] = {"class_type": "SD3LoadMMDiT", "inputs": large}
    workflow["sample"]["inputs"]["model"] = ["large", 0]
    server.run(workflow)
    loaded = server.memory() - before
    size = (server.folder / "models/diffusion_models/large.safetensors").stat().st_size
    assert loaded > size / 2, "the measure sees a model"
    server.free()
    server.run(text_to_image("tiny.safetensors", seed=117))
    end = time.monotonic() + 30  # the freeing may come after a prompt, and so after its answer
    while server.memory() - before >= size / 4:
        assert time.monotonic() < end, "the memory of the large model is still held"
        time.sleep(0.1)
