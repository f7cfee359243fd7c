"""The shipped workflows, opened as a user opens them."""

import json

import pytest
from comfy_server import PACK

API_FORMS = PACK / "workflows" / "api"
WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_it_opens_without_a_red_node_and_converts_to_its_api_form(editor, screenshot, path):
    editor.open(read(path))
    screenshot(fit=True)
    assert editor.red_nodes() == []
    assert editor.to_api() == read(API_FORMS / path.name)


def test_the_first_picture_runs(editor, screenshot):
    workflow = read(PACK / "workflows" / "first-picture.json")
    editor.open(workflow)
    editor.run()
    for node in workflow["nodes"]:
        if node["type"].startswith("SD3") and node["type"] != "SD3ShiftSchedule":
            editor.until(lambda number=node["id"]: editor.report_of(number))
    pictures = "() => app.graph.nodes.flatMap((node) => node.imgs ?? []).length"
    editor.until(lambda: editor.page.evaluate(pictures) == 1)
    screenshot(fit=True)
