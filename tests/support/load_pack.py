"""Import it in a script, before anything of sd3_pack: gives the pack its name, as ComfyUI does."""

import importlib.util
import sys
from pathlib import Path

PACK = Path(__file__).parent.parent.parent

if "sd3_pack" not in sys.modules:  # under pytest tests/conftest.py did it
    spec = importlib.util.spec_from_file_location(
        "sd3_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["sd3_pack"] = pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
