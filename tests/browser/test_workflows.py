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
    editor.fit()
    screenshot()
    assert editor.red_nodes() == []
    assert editor.to_api() == read(API_FORMS / path.name)


def test_the_first_picture_runs(editor, screenshot):
    editor.open(read(PACK / "workflows" / "first-picture.json"))
    editor.run()
    editor.fit()
    screenshot()
    ids = {
        node["type"]: node["id"]
        for node in read(PACK / "workflows" / "first-picture.json")["nodes"]
    }
    for kind, number in ids.items():
        if kind.startswith("SD3") and kind != "SD3ShiftSchedule":
            assert editor.report_of(number), kind
    pictures = "() => app.graph.nodes.reduce((sum, node) => sum + (node.imgs?.length ?? 0), 0)"
    assert editor.page.evaluate(pictures) == 1
