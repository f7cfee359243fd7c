"""Gives the pack an import name, as ComfyUI does, and the fixtures that every folder shares."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

PACK = Path(__file__).parent.parent
GOLDEN = PACK / "tests" / "golden"

os.environ["SD3_WORKBENCH_PROMPT_CACHE"] = "off"  # no test reads or fills the user's own

# `nodes` and `tests` are ComfyUI's own top-level names: the pack's folder never stays on the path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != PACK]
spec = importlib.util.spec_from_file_location(
    "sd3_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
)
assert spec is not None
assert spec.loader is not None
sys.modules["sd3_pack"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)


# Folders whose tests share a ComfyUI: of several processes one has the whole folder.
TOGETHER = {"nodes", "server", "browser"}


def pytest_collection_modifyitems(config, items):
    """The browser's tests come last: Playwright leaves an event loop running in their thread.

    Under `dev.py test` two processes share the files, see TOGETHER.
    """
    items.sort(key=lambda item: "browser" in item.path.parts)
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            path = item.path.relative_to(PACK / "tests")
            group = path.parts[0] if path.parts[0] in TOGETHER else str(path)
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def golden():
    """golden(name) -> (tensors, json) of one recording in tests/golden."""
    from safetensors.torch import load_file

    def load(name: str):
        description = GOLDEN / f"{name}.json"
        tensors = GOLDEN / f"{name}.safetensors"
        return (
            load_file(tensors) if tensors.exists() else {},
            json.loads(description.read_text(encoding="utf-8")) if description.exists() else {},
        )

    return load
