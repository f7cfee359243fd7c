"""The pack as ComfyUI imports it: from a folder with a hyphen, under the name of its path."""

import json
import os
import subprocess
import sys
from pathlib import Path

import comfy
import pytest
from sd3_pack.nodes import NODES

PACK = Path(__file__).parent.parent.parent

SCRIPT = """
import asyncio, json, sys, time
sys.path.insert(0, sys.argv[1])
from comfy.cli_args import args
args.cpu = True
import nodes
import comfy.sd, comfy.lora, comfy.lora_convert, comfy_api.latest  # what ComfyUI has loaded by then
import latent_preview, server
start = time.process_time()
found = asyncio.run(nodes.load_custom_node(sys.argv[2], module_parent="custom_nodes"))
seconds = time.process_time() - start
ours = sorted(name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("SD3"))
print(json.dumps({"found": found, "ids": ours, "seconds": seconds, "nodes": nodes.__file__}))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    link = tmp_path_factory.mktemp("custom_nodes") / "sd3-workbench-main"
    link.symlink_to(PACK, target_is_directory=True)
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(Path(comfy.__path__[0]).parent), str(link)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    return json.loads(answer.stdout.splitlines()[-1])


def test_comfyui_finds_every_node(loaded):
    assert loaded["found"]
    assert set(loaded["ids"]) >= {node.GET_SCHEMA().node_id for node in NODES}


def test_comfyuis_own_nodes_module_stays_its_own(loaded):
    assert "sd3-workbench" not in loaded["nodes"]


def test_importing_takes_less_than_a_second(loaded):
    """Of the processor: other programs may slow the clock on the wall."""
    assert loaded["seconds"] < 1
