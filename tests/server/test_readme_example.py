"""The README's script, run as it stands there."""

import os
import re
import subprocess
import sys

from comfy_server import PACK


def test_the_example_draws_a_picture(server):
    readme = (PACK / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert len([line for line in script.splitlines() if line]) <= 18
    finished = subprocess.run(
        [sys.executable, "-c", script],
        cwd=PACK,
        env={**os.environ, "COMFYUI_URL": server.url},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert "'sampler': 'euler_ancestral'" in finished.stdout
    (name,) = re.findall(r"'filename': '(.+?)'", finished.stdout)
    assert list((server.folder / "output").rglob(name))
