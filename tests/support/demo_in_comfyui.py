"""Draw a prompt in a real ComfyUI, headless, with the first workflow: PROMPT PICTURE SEED

For `dev.py demo`, which has no pytest.
"""

import json
import sys
import tempfile
from pathlib import Path

from comfy_server import PACK, Refused, ServerFailed, serve

FORM = PACK / "workflows" / "api" / "first-picture.json"


def workflow(prompt: str, seed: int) -> dict:
    """The first workflow with another prompt and seed."""
    nodes = json.loads(FORM.read_text(encoding="utf-8"))
    for node in nodes.values():
        for name, value in (("prompt", prompt), ("seed", seed)):
            if name in node["inputs"]:
                node["inputs"][name] = value
    return nodes


def main(prompt: str, picture: Path, seed: int) -> None:
    nodes = workflow(prompt, seed)
    saver = next(name for name, node in nodes.items() if node["class_type"] == "SaveImage")
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as server:
        picture.write_bytes(server.picture(server.run(nodes), saver))


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    except (OSError, Refused, ServerFailed) as error:  # serve() has printed the server's log
        sys.exit(str(error).splitlines()[0])
