"""What saved workflows rely on, and what users read, of every node's schema."""

import asyncio
import gc
import inspect
import json
import shutil
from pathlib import Path

import comfy.model_management
import execution
import pytest
import torch
from comfy_api.latest import io
from sd3_pack.nodes import NODES, TRAINING_NODES, SD3Extension, training_allowed

import nodes

SNAPSHOT = Path(__file__).parent / "schemas.json"
SCHEMAS = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in [*NODES, *TRAINING_NODES]}


@pytest.fixture(autouse=True)
def lists(models):
    """The widgets' lists are those of the test's own folders."""


def shape_of(schema):
    """What a released node keeps: ids, order, types and what an absent input stands for."""
    return {
        "inputs": [
            [socket.id, socket.get_io_type(), bool(socket.optional), default_of(socket)]
            for socket in schema.inputs
        ],
        "outputs": [socket.get_io_type() for socket in schema.outputs],
    }


def written(shapes):
    """JSON with a line for each input, so that a change shows in a diff."""
    nodes_text = [
        f'"{name}": {{"outputs": {json.dumps(shape["outputs"])}, "inputs": [\n  '
        + ",\n  ".join(json.dumps(socket) for socket in shape["inputs"])
        + "\n ]}"
        for name, shape in shapes.items()
    ]
    return "{\n" + ",\n".join(nodes_text) + "\n}\n"


def default_of(socket):
    return getattr(socket, "default", None)


def test_ids_inputs_and_outputs_are_frozen():
    """A released node keeps its inputs: new ones go to the end, optional, with a default.

    To record a wanted change: delete schemas.json and run this test twice.
    """
    shapes = {name: shape_of(schema) for name, schema in sorted(SCHEMAS.items())}
    if not SNAPSHOT.exists():
        SNAPSHOT.write_text(written(shapes), encoding="utf-8")
        pytest.fail("schemas.json was missing and has been written")
    assert shapes == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_the_extension_lists_every_node_once(monkeypatch):
    listed = asyncio.run(SD3Extension().get_node_list())
    assert [node.GET_SCHEMA().node_id for node in listed] == list(SCHEMAS)
    monkeypatch.setenv("SD3_WORKBENCH_NO_TRAINING", "1")
    assert not training_allowed()
    assert set(NODES) <= set(asyncio.run(SD3Extension().get_node_list()))


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_a_schema_is_complete(schema):
    assert schema.node_id.startswith("SD3")
    assert schema.display_name.startswith("SD3 ")
    assert schema.category.startswith("SD3 Workbench/")
    assert schema.description.endswith(".")
    assert getattr(schema, "search_aliases", ["?"])
    schema.validate()
    for socket in [*schema.inputs, *schema.outputs]:
        assert socket.tooltip, f"{schema.node_id}.{socket.id} has no tooltip"
        assert socket.tooltip.endswith("."), f"{schema.node_id}.{socket.id}: {socket.tooltip}"


def test_native_types_are_on_every_socket():
    native = {
        getattr(io, name).io_type
        for name in ("Model", "Clip", "Vae", "Conditioning", "Latent", "Sigmas", "Image", "Mask")
    }
    native |= {"LORA_MODEL", "LOSS_MAP"}  # nodes_train's, which io does not name
    widgets = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
    ours = {"SD3_DATASET", "SD3_PREFERENCES", "SD3_TIMESTEP_DENSITY"}
    for schema in SCHEMAS.values():
        for socket in [*schema.inputs, *schema.outputs]:
            assert socket.get_io_type() in native | widgets | ours


def test_rare_inputs_are_folded_away():
    folded = [socket.id for socket in SCHEMAS["SD3Sample"].inputs if getattr(socket, "advanced", 0)]
    assert not hasattr(io.Model.Input("x"), "advanced") or len(folded) == 8


# A whole graph, as ComfyUI's server runs it


def graph(**changes):
    prompt = {
        "1": {"class_type": "SD3LoadCheckpoint", "inputs": {"ckpt_name": "tiny.safetensors"}},
        "2": {
            "class_type": "SD3EncodePrompt",
            "inputs": {"clip": ["1", 1], "prompt": "a red circle", "negative": ""},
        },
        "3": {
            "class_type": "SD3EmptyLatent",
            "inputs": {
                "aspect": "1:1",
                "width": 64,
                "height": 64,
                "batch_size": 1,
                "model": ["1", 0],
            },
        },
        "4": {
            "class_type": "SD3ShiftSchedule",
            "inputs": {"steps": 2, "shift": 2.0, "scheduler": "normal", "denoise": 1.0},
        },
        "5": {
            "class_type": "SD3Sample",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["2", 1],
                "latent_image": ["3", 0],
                "sigmas": ["4", 0],
                "seed": 1,
                "cfg": 3.0,
                "sampler_name": "euler",
            },
        },
        "6": {"class_type": "SD3VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
    }
    for place, value in changes.items():
        node, name = place.split("_", 1)
        prompt[node.removeprefix("n")]["inputs"][name] = value
    return prompt


class Server:
    """What execution.PromptExecutor asks of ComfyUI's web server."""

    client_id = last_node_id = last_prompt_id = None
    sockets_metadata = {}

    def send_sync(self, event, data, sid=None):
        pass

    def queue_updated(self):
        pass


@pytest.fixture
def registered(monkeypatch):
    for node in NODES:
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, node.GET_SCHEMA().node_id, node)


def run(prompt):
    with torch.inference_mode(False):
        valid = asyncio.run(execution.validate_prompt("p", prompt, None))
    if not valid[0]:
        return valid[3], None
    known = inspect.signature(execution.PromptExecutor.__init__).parameters
    options = {"cache_args": {"ram": 0, "ram_inactive": 0, "lru": 0}}
    options = {name: value for name, value in options.items() if name in known}
    runner = execution.PromptExecutor(Server(), **options)
    runner.execute(prompt, "p", {}, valid[2])
    return runner.status_messages, runner


def test_a_graph_of_our_nodes_runs_and_its_history_tells_what_was_done(registered):
    messages, runner = run(graph())
    assert runner.success, [data for event, data in messages if event == "execution_error"]
    outputs = runner.history_result["outputs"]
    told = {node: outputs[node]["sd3_report"][0] for node in "123456"}
    assert told["1"]["files"]["mmdit"]["file"] == "tiny.safetensors"
    assert told["2"]["positive"]["tokens"]["clip_l"] == 3
    assert told["3"]["width"] == 64
    assert told["5"]["shift"] == 2.0
    json.dumps(told, allow_nan=False)


def test_a_wrong_name_is_refused_before_anything_runs(registered):
    errors, _ = run(graph(n1_ckpt_name="tinny.safetensors"))
    details = errors["1"]["errors"][0]["details"]
    assert "SD3:missing_file" in details
    assert "Did you mean tiny.safetensors" in details


def test_a_base_name_and_either_separator_pass_the_servers_check(registered, models):
    import folder_paths

    below = models / "checkpoints" / "below"
    below.mkdir()
    shutil.copy(models / "checkpoints" / "tiny.safetensors", below / "deep.safetensors")
    folder_paths.filename_list_cache.clear()
    try:
        messages, runner = run(graph(n1_ckpt_name="below\\deep.safetensors"))
    finally:
        (below / "deep.safetensors").unlink()
        below.rmdir()
        folder_paths.filename_list_cache.clear()
    assert runner.success, [data for event, data in messages if event == "execution_error"]


def test_an_error_while_running_begins_with_its_code(registered):
    messages, runner = run(graph(n5_slg_scale=1.0, n5_slg_layers="99"))
    assert not runner.success
    (error,) = [data for event, data in messages if event == "execution_error"]
    assert error["exception_message"].startswith("SD3:bad_setting: skip layers [99]")


def test_finished_runs_leave_no_models_behind(registered):
    gc.collect()
    comfy.model_management.unload_all_models()
    comfy.model_management.cleanup_models()
    before = len(comfy.model_management.current_loaded_models)
    for seed in range(2):
        _, runner = run(graph(n5_seed=seed))
        assert runner.success
    del runner
    gc.collect()
    comfy.model_management.cleanup_models()
    assert len(comfy.model_management.current_loaded_models) == before


def test_a_seed_that_names_a_run_stays_as_it_is():
    """The front end gives every input named seed a "randomize" unless it is told not to."""
    for name in ("SD3TrainLoRA", "SD3TrainDPO", "SD3Pick"):
        (seed,) = [socket for socket in SCHEMAS[name].inputs if socket.id == "seed"]
        assert seed.as_dict()["control_after_generate"] is False
