"""Where the workflows lie, and how their JSON is written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .graph import PACK, api_form, ui_form
from .node_shapes import NodeShape
from .workflows import WORKFLOWS, describe

FOLDER = PACK / "workflows"


def as_json(contents: Mapping[str, Any]) -> str:
    return json.dumps(contents, indent=2, ensure_ascii=False) + "\n"


def workflow_files(shapes: Mapping[str, NodeShape]) -> dict[Path, str]:
    """Every file of workflows/ and its text."""
    files = {}
    for name in WORKFLOWS:
        graph = describe(name, shapes)
        files[FOLDER / f"{name}.json"] = as_json(ui_form(graph))
        files[FOLDER / "api" / f"{name}.json"] = as_json(api_form(graph))
    return files


def write(files: Mapping[Path, str | bytes]) -> None:
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
