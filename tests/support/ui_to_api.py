"""What ComfyUI's front end makes of a saved workflow when Run is pressed, written from its files.

Values are read by position, as every version of the front end can; docs/authoring/ is not asked.
"""

from collections.abc import Mapping
from typing import Any

NOTES = ("Note", "MarkdownNote")
MUTED, BYPASSED = 2, 4


def to_api(workflow: Mapping[str, Any], classes: Mapping[str, Any], titles: Mapping[str, str]):
    """workflow: the UI form.  classes, titles: of nodes, by id.  Returns the API form."""
    origins = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        assert node["mode"] not in (MUTED, BYPASSED), "not needed so far"
        inputs = positional_values(node, classes[node["type"]])
        for entry in node["inputs"]:
            if entry["link"] is not None:
                inputs[entry["name"]] = origins[entry["link"]]
        title = node.get("title", titles[node["type"]])
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": title},
        }
    return prompt


def positional_values(node: Mapping[str, Any], node_class: Any) -> dict[str, Any]:
    """widgets_values by name: required inputs before optional ones, extra widgets passed over."""
    sections = node_class.INPUT_TYPES()
    specs = {**sections.get("required", {}), **sections.get("optional", {})}
    values = list(node["widgets_values"])
    named = {}
    for name, spec in specs.items():
        options = spec[1] if len(spec) > 1 else {}
        if not (
            isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
        ):
            continue
        named[name] = values.pop(0)
        for extra in ("control_after_generate", "image_upload"):
            if options.get(extra):
                values.pop(0)
    assert not values, f"{node['type']}: {values} belong to no widget"
    return named
