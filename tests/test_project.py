"""What is true of the repository as a whole: its documents, its requirements, what it may hold."""

import re
import shlex
import subprocess
from itertools import chain
from pathlib import Path

import pytest
from sd3_pack.sd3_core.__main__ import parser

PACK = Path(__file__).parent.parent
MIB = 1024 * 1024

# Read from ComfyUI 0.33.0's requirements.txt; "" where ComfyUI names no version.
COMFYUI_REQUIRES = {
    "torch": "",
    "torchsde": "",
    "torchvision": "",
    "torchaudio": "",
    "numpy": "1.25.0",
    "einops": "",
    "transformers": "4.50.3",
    "tokenizers": "0.13.3",
    "sentencepiece": "",
    "safetensors": "0.4.2",
    "aiohttp": "3.11.8",
    "yarl": "1.18.0",
    "pyyaml": "",
    "pillow": "",
    "scipy": "",
    "tqdm": "",
    "psutil": "",
}
VOCABULARIES = ("vocab.json", "merges.txt", "spiece.model", "tokenizer.json", "tokenizer.model")
# Folders of the machines this was written on, and of people's homes: none belongs in a file.
MACHINE_PATHS = re.compile(
    r"(?:^|[^a-z.~])/(?:work|root|farm|home|Users)/|\.library" + r"/|farm-[a-z]|[A-Z]:\\Users\\",
    re.MULTILINE,
)


def text_of(name: str) -> str:
    return (PACK / name).read_text(encoding="utf-8")


def tracked_files() -> list[Path]:
    """Files under version control; in a folder that is no git checkout, every file of the pack."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    try:
        listed = subprocess.run(command, cwd=PACK, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return [path for path in PACK.rglob("*") if path.is_file() and not is_hidden(path)]
    return [PACK / name for name in listed.stdout.split("\0") if name and (PACK / name).is_file()]


def is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in path.relative_to(PACK).parts)


def code_blocks(markdown: str) -> list[str]:
    return re.findall(r"^```[a-z]*\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)


def requirements() -> dict[str, str]:
    """requirements.txt as name -> the rest of the line."""
    lines = [line.partition("#")[0].strip() for line in text_of("requirements.txt").splitlines()]
    found = [re.fullmatch(r"([A-Za-z0-9_-]+)(.*)", line) for line in lines if line]
    return {match[1].lower(): match[2].strip() for match in found if match}


def version_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def pyproject_version() -> str:
    found = re.search(r'^version = "(.+)"$', text_of("pyproject.toml"), re.MULTILINE)
    assert found
    return found[1]


# --- documents ------------------------------------------------------------------------------------


def test_the_readme_holds_two_commands_for_a_fresh_machine():
    lines = chain.from_iterable(block.splitlines() for block in code_blocks(text_of("README.md")))
    commands = [line.split()[:3] for line in lines if line.startswith("python dev.py")]
    assert commands == [["python", "dev.py", "demo"], ["python", "dev.py", "test"]]


def test_the_readmes_examples_are_commands_that_exist():
    lines = chain.from_iterable(block.splitlines() for block in code_blocks(text_of("README.md")))
    examples = [line.partition(" -m sd3_core ")[2] for line in lines if " -m sd3_core " in line]
    assert examples
    for example in examples:
        parser().parse_args(shlex.split(example))  # exits when an option is not known


def test_the_landing_check_runs_the_readmes_test_command():
    assert '"$python" dev.py test </dev/null' in text_of(".ci/run")


def test_what_the_readme_links_to_exists():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text_of("README.md"))
    assert not [link for link in links if not (PACK / link).exists()]


def test_the_version_is_the_changelogs_first():
    released = re.search(r"^## (\S+)", text_of("CHANGELOG.md"), re.MULTILINE)
    assert released
    assert released[1] == pyproject_version()


def test_the_licence_is_apache_2_and_names_its_holder():
    licence = text_of("LICENSE")
    assert "Apache License\n                           Version 2.0, January 2004" in licence
    assert re.search(r"Copyright \d{4} SD3 Workbench authors", licence)


# --- requirements ---------------------------------------------------------------------------------


def test_only_what_comfyui_brings_is_required():
    assert requirements()
    assert set(requirements()) <= set(COMFYUI_REQUIRES)


@pytest.mark.parametrize("name", sorted(requirements()))
def test_a_requirement_is_a_lower_bound_not_below_comfyuis(name):
    ours, comfyuis = requirements()[name], COMFYUI_REQUIRES[name]
    assert re.fullmatch(r"|>=[0-9.]+", ours), f"{name}{ours} is more than a lower bound"
    if comfyuis:
        assert version_numbers(ours.removeprefix(">=")) >= version_numbers(comfyuis)


# --- what the repository holds --------------------------------------------------------------------


def test_no_file_is_larger_than_4_mib():
    # The embedded model is the one large file that is meant.
    embedded = PACK / "sd3_core" / "embedded"
    large = [path for path in tracked_files() if path.stat().st_size > 4 * MIB]
    assert not [path for path in large if embedded not in path.parents]


def test_golden_data_fits_in_8_mib():
    golden = [path for path in (PACK / "tests" / "golden").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in golden) <= 8 * MIB


def test_no_vocabulary_but_the_embedded_models_own():
    found = [path for path in tracked_files() if path.name in VOCABULARIES]
    assert not [path for path in found if PACK / "sd3_core" / "embedded" not in path.parents]


def test_no_tracked_text_names_a_path_of_somebodys_machine():
    named = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # pictures and tensors
            continue
        named += [f"{path.relative_to(PACK)}: {hit[0]!r}" for hit in MACHINE_PATHS.finditer(text)]
    assert not named, "\n".join(named)


@pytest.mark.parametrize("text", ["see /" + "work/x", "C:" + "\\Users\\me", "'/" + "home/me/'"])
def test_a_path_of_somebodys_machine_is_noticed(text):
    assert MACHINE_PATHS.search(text)


@pytest.mark.parametrize("text", ["~/comfy/ComfyUI", "frame/work/x", "https://a.example/root/b"])
def test_other_paths_are_let_through(text):
    assert not MACHINE_PATHS.search(text)
