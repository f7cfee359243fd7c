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

pytest_plugins = ("pretend_card.plugin",)  # the option --card

# Folders whose tests share a ComfyUI: of several processes one has the whole folder.
TOGETHER = {"nodes", "server", "browser"}


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's, which only `dev.py test` brings
def pytest_xdist_make_scheduler(config, log):
    """Under `dev.py test` two processes share the files, see TOGETHER."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.split("::")[0]
            folder = path.split("/")[1]
            return folder if folder in TOGETHER else path

    return Files(config, log)


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
