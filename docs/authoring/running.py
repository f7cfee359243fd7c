"""A workflow run in this process by ComfyUI's own executor, as its server would run it."""

import asyncio
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...nodes import NODES, TRAINING_NODES
from .node_shapes import extra_nodes

SHOWING = ("PreviewImage", "SaveImage")


class Unwatched:
    """What the executor asks of the web server, with nobody on the other side."""

    client_id = last_node_id = last_prompt_id = None
    sockets_metadata: Mapping[str, Any] = {}

    def send_sync(self, event: str, data: Any, sid: str | None = None) -> None:
        """Progress, for nobody."""

    def queue_updated(self) -> None:
        """Likewise."""


def register() -> None:
    """Make our nodes, and those of comfy_extras/ that workflows use, known to the executor."""
    known = importlib.import_module("nodes").NODE_CLASS_MAPPINGS
    for node in [*extra_nodes(), *NODES, *TRAINING_NODES]:
        known[node.GET_SCHEMA().node_id] = node


def run(prompt: Mapping[str, Any]) -> list[Path]:
    """The pictures that an API workflow shows or saves, in the order of its nodes.

    Raises RuntimeError with ComfyUI's words when it is refused or fails.
    """
    import execution

    valid, error, outputs, faults = asyncio.run(execution.validate_prompt("p", prompt, None))
    if not valid:
        raise RuntimeError(f"refused: {error} {faults}")
    known = inspect.signature(execution.PromptExecutor.__init__).parameters
    cache = {"cache_args": {"ram": 0, "ram_inactive": 0, "lru": 0}}
    executor = execution.PromptExecutor(
        Unwatched(), **{name: value for name, value in cache.items() if name in known}
    )
    executor.execute(prompt, "p", {}, outputs)
    if not executor.success:
        raise RuntimeError(str(executor.status_messages[-1]))
    shown = executor.history_result["outputs"]
    showing = [node for node in sorted(shown, key=int) if prompt[node]["class_type"] in SHOWING]
    images = [image for node in showing for image in shown[node]["images"]]
    return [place(image) for image in images]


def place(image: Mapping[str, str]) -> Path:
    """image: as /history names it."""
    import folder_paths

    folder = folder_paths.get_directory_by_type(image["type"])
    assert folder is not None
    return Path(folder, image["subfolder"], image["filename"])
