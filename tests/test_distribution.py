"""What the registry hands to ComfyUI's users.

With comfy-cli at hand (pip install comfy-cli) its own two commands are run on a clone; by hand:
comfy node validate && comfy node pack, in a clean clone, since pack writes node.zip there.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACK = Path(__file__).parent.parent
COMFY = shutil.which("comfy")
# What `comfy node validate` asks ruff to look for: exec, eval, two statements on a line.
REGISTRY_RULES = "S102,S307,E702"
USERS_NEED = (
    "__init__.py",
    "LICENSE",
    "README.md",
    "requirements.txt",
    "pyproject.toml",
    "locales/en/nodeDefs.json",
    "web/workbench.js",
    "web/docs/SD3Sample.md",
    "workflows/first-picture.json",
    "workflows/first-picture.jpg",
    "workflows/api/first-picture.json",
)
DEVELOPERS_ONLY = ("tests/", ".ci/", "dev.py", "docs/authoring/", ".gitignore")


def field(name: str) -> str:
    """A line of pyproject.toml, for Pythons that cannot read TOML."""
    text = (PACK / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf"^{name} = (.+?)(?:\s+#.*)?$", text, re.MULTILINE)
    assert found, name
    return found[1].strip('"')


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("name", r"[a-z][a-z0-9-]{0,99}"),
        ("version", r"\d+\.\d+\.\d+"),
        ("description", r".{20,200}"),
        ("license", r'\{ file = "LICENSE" \}'),
        ("requires-python", r">=3\.\d+"),
        ("Repository", r"https://github\.com/[\w-]+/[\w-]+"),
        ("PublisherId", r"[\w-]+"),
        ("DisplayName", r"\w.+"),
        ("requires-comfyui", r">=\d+\.\d+\.\d+"),
    ],
)
def test_the_registry_finds_what_it_asks_for(name, form):
    assert re.fullmatch(form, field(name)), field(name)


def test_the_registrys_id_is_not_named_after_comfyui():
    assert "comfy" not in field("name").lower()


def test_no_code_that_the_registry_forbids():
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", REGISTRY_RULES]
    checked = subprocess.run([*command, str(PACK)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_nothing_runs_when_the_pack_is_installed():
    assert not (PACK / "install.py").exists()


@pytest.fixture
def clone(tmp_path) -> Path:
    """The pack as it is committed."""
    if not (PACK / ".git").exists():
        pytest.skip("this folder is no git checkout")
    place = tmp_path / "pack"
    command = ["git", "-c", "safe.directory=*", "clone", "-q", str(PACK), str(place)]
    subprocess.run(command, check=True)
    return place


def left_out(name: str) -> bool:
    """Whether .comfyignore names this file; each of its lines is a file, or a folder with /."""
    lines = (PACK / ".comfyignore").read_text(encoding="utf-8").splitlines()
    entries = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return any(
        name == entry or (entry.endswith("/") and name.startswith(entry)) for entry in entries
    )


def test_users_get_what_they_need_and_nothing_of_the_workshop():
    assert not [name for name in USERS_NEED if left_out(name) or not (PACK / name).exists()]
    assert all(left_out(name) or left_out(f"{name}x") for name in DEVELOPERS_ONLY)


@pytest.mark.skipif(COMFY is None, reason="comfy-cli is not installed")
def test_comfy_cli_validates_and_packs_a_clone(clone):
    assert COMFY is not None
    run = [COMFY, "--skip-prompt", "--no-enable-telemetry", "node"]
    variables = {**os.environ, "NO_COLOR": "1"}
    validated = subprocess.run(
        [*run, "validate"],
        cwd=clone,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert "All validation checks passed" in validated.stdout
    subprocess.run([*run, "pack"], cwd=clone, env=variables, capture_output=True, check=True)
    with zipfile.ZipFile(clone / "node.zip") as archive:
        names = archive.namelist()
    assert not set(USERS_NEED) - set(names)
    assert not [name for name in names if name.startswith(DEVELOPERS_ONLY)]
