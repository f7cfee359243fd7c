"""python authoring workflows | pages | thumbnails [NAME ...]: see __init__.py."""

import argparse
import importlib.util
import sys
from pathlib import Path

PACK = Path(__file__).parent.parent


def start() -> None:
    """Give the pack a name, and put ComfyUI where its nodes look for it."""
    sys.path[:] = [
        entry for entry in sys.path if Path(entry or ".").resolve() != PACK / "authoring"
    ]
    spec = importlib.util.spec_from_file_location(
        "sd3_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["sd3_pack"] = importlib.util.module_from_spec(spec)
    from sd3_pack.dev import find_comfyui

    comfyui = find_comfyui()
    if comfyui is None:
        sys.exit("no ComfyUI in ~/comfy/ComfyUI: say in COMFYUI_PATH where it is.")
    sys.path.insert(0, str(comfyui))
    sys.argv[1:] = []  # ComfyUI reads them too
    from comfy.cli_args import args

    args.cpu = True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python authoring", description=__doc__)
    parser.add_argument("what", choices=("workflows", "pages", "thumbnails"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="of workflows, for thumbnails")
    chosen = parser.parse_args()
    start()
    from sd3_pack.authoring.files import workflow_files, write
    from sd3_pack.authoring.node_shapes import node_shapes

    if chosen.what == "workflows":
        write(workflow_files(node_shapes()))


if __name__ == "__main__":
    main()
