"""Every shipped workflow runs on a server that has never seen a browser."""

import json
from pathlib import Path

import pytest
from api_workflows import EMBEDDED
from comfy_server import PACK, Server, reports
from shipped_files import write_shipped_files

API_FORMS = sorted((PACK / "workflows" / "api").glob("*.json"))


@pytest.fixture(scope="module")
def stocked(server) -> Server:
    """The server with a file for each name that a workflow mentions."""
    write_shipped_files(server.folder)
    return server


def made_small(workflow: dict) -> dict:
    """For one CPU core: four steps and 128 pixels where a workflow says a megapixel.

    ComfyUI builds its text encoders at their full size, 11 GB; ours stand in for them.
    """
    for node in workflow.values():
        inputs, kind = node["inputs"], node["class_type"]
        if kind in ("EmptySD3LatentImage", "ImageScale"):
            inputs |= {"width": 128, "height": 128}
        elif kind == "SD3ShiftSchedule":
            inputs["steps"] = min(inputs["steps"], 4)
        elif kind == "TripleCLIPLoader":
            node["class_type"] = "SD3LoadTextEncoders"
            names = {
                name: inputs.pop(f"clip_name{i}")
                for i, name in ((1, "clip_l"), (2, "clip_g"), (3, "t5xxl"))
            }
            inputs |= names
    return workflow


def test_there_are_workflows_in_both_forms():
    assert API_FORMS
    both = {form.name for form in API_FORMS}
    assert both == {form.name for form in (PACK / "workflows").glob("*.json")}


@pytest.mark.parametrize("form", API_FORMS, ids=lambda form: form.stem)
def test_a_shipped_workflow_runs(stocked, form: Path):
    workflow = json.loads(form.read_text(encoding="utf-8"))
    if EMBEDDED not in form.read_text(encoding="utf-8"):
        workflow = made_small(workflow)
    entry = stocked.run(workflow)
    savers = {name for name, node in workflow.items() if node["class_type"] == "SaveImage"}
    assert savers or "SD3Pick" in {node["class_type"] for node in workflow.values()}
    for saver in savers:
        assert stocked.picture(entry, saver).startswith(b"\x89PNG")
    told = reports(entry)
    for name, node in workflow.items():
        if node["class_type"].startswith("SD3"):
            assert told[name], f"{node['class_type']} reports"
