"""python docs/authoring workflows thumbnails pictures pages: any of them; see __init__.py."""

import argparse
import importlib.util
import sys
from pathlib import Path

PACK = Path(__file__).parent.parent.parent
KINDS = ("workflows", "thumbnails", "pictures", "pages")  # pages show what pictures there are


def start() -> None:
    """Give the pack a name, and put ComfyUI where its nodes look for it."""
    sys.path[:] = [
        entry for entry in sys.path if Path(entry or ".").resolve() != PACK / "docs" / "authoring"
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
        sys.exit("no ComfyUI found: say in COMFYUI_PATH where it is.")
    sys.path.insert(0, str(comfyui))
    sys.argv[1:] = []  # ComfyUI reads them too
    from comfy.cli_args import args

    args.cpu = True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python docs/authoring", description=__doc__)
    parser.add_argument("what", nargs="+", choices=KINDS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of workflows, for thumbnails")
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="for pictures")
    chosen = parser.parse_args()
    start()
    from sd3_pack.docs.authoring.files import workflow_files, write
    from sd3_pack.docs.authoring.node_pictures import node_pictures
    from sd3_pack.docs.authoring.node_shapes import node_shapes
    from sd3_pack.docs.authoring.pages import page_files
    from sd3_pack.docs.authoring.thumbnails import thumbnail_files
    from sd3_pack.docs.authoring.workflows import WORKFLOWS

    makers = {
        "workflows": lambda: workflow_files(node_shapes()),
        "thumbnails": lambda: thumbnail_files(chosen.only or list(WORKFLOWS), node_shapes()),
        "pictures": lambda: node_pictures(chosen.server),
        "pages": page_files,
    }
    for kind in KINDS:
        if kind in chosen.what:
            write(makers[kind]())


if __name__ == "__main__":
    main()
