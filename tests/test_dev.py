"""dev.py: what it installs when, what it runs, and how it says no."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

PACK = Path(__file__).parent.parent
ALL_STAGES = ["lint", "format", "types", "card", "tests"]
CARD_APART = ["--ignore", "tests/card"]
SIDE_BY_SIDE = ["-n", "2"]


@pytest.fixture
def dev(monkeypatch, tmp_path):
    """dev.py as a module of its own, with its environment in an empty folder."""
    spec = importlib.util.spec_from_file_location("dev_under_test", PACK / "dev.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path)
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    monkeypatch.setenv("COMFYUI_PATH", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "nobody")
    return module


@pytest.fixture
def pip_calls(dev, monkeypatch):
    calls = []
    monkeypatch.setattr(dev, "install", calls.append)
    return calls


def make_comfyui(folder: Path, requirement: str) -> None:
    (folder / "comfy").mkdir(parents=True, exist_ok=True)
    (folder / "requirements.txt").write_text(requirement)


def test_a_second_run_installs_nothing(dev, pip_calls):
    dev.prepare("test")
    dev.prepare("test")
    assert len(pip_calls) == 1


def test_a_demo_needs_nothing_more_after_the_tests(dev, pip_calls):
    dev.prepare("test")
    dev.prepare("demo")
    assert len(pip_calls) == 1


def test_the_tests_need_more_than_a_demo(dev, pip_calls):
    dev.prepare("demo")
    dev.prepare("test")
    assert len(pip_calls) == 2
    assert set(pip_calls[0]) < set(pip_calls[1])


def test_a_changed_requirement_of_comfyui_installs_again(dev, pip_calls, monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "ComfyUI"))
    for requirement in ("torch", "torch\nav", "torch\nav"):
        make_comfyui(tmp_path / "ComfyUI", requirement)
        dev.prepare("test")
    assert len(pip_calls) == 2


def test_a_failed_installation_is_tried_again(dev, monkeypatch):
    def fail(arguments):
        raise dev.SetupError("no")

    monkeypatch.setattr(dev, "install", fail)
    for _ in range(2):
        with pytest.raises(dev.SetupError):
            dev.prepare("test")


def test_an_old_python_is_told_its_age(dev):
    with pytest.raises(dev.SetupError, match=r"this is Python 3\.9, but .* needs 3\.10"):
        dev.check_interpreter((3, 9))


def test_a_comfyui_path_without_comfyui_is_an_error(dev, monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "absent"))
    with pytest.raises(dev.SetupError, match="holds no ComfyUI checkout"):
        dev.find_comfyui()


@pytest.mark.parametrize(
    ("platform", "settings"),
    [
        ("linux", ".config"),
        ("darwin", "Library/Application Support"),
        ("win32", "AppData/Local"),
    ],
)
def test_comfyui_is_where_comfy_cli_says(dev, monkeypatch, tmp_path, platform, settings):
    """Of the places that hold a checkout: the default, the last used, where comfy-cli installs."""
    monkeypatch.setattr(dev.sys, "platform", platform)
    assert dev.find_comfyui() is None
    home = tmp_path / "nobody"
    default, recent = tmp_path / "100% mine", tmp_path / "recent"
    config = home / settings / "comfy-cli" / "config.ini"
    config.parent.mkdir(parents=True)
    config.write_text(f"[DEFAULT]\ndefault_workspace = {default}\nrecent_workspace = {recent}\n")
    for place in (home / "Documents" / "comfy" / "ComfyUI", recent, default):
        make_comfyui(place, "")
        assert dev.find_comfyui() == place.resolve()
    config.write_text("torn")
    assert dev.find_comfyui() == (home / "Documents" / "comfy" / "ComfyUI").resolve()
    monkeypatch.setenv("COMFYUI_PATH", str(recent))
    assert dev.find_comfyui() == recent.resolve()


def test_a_pip_without_network_ends_in_one_sentence(dev, monkeypatch, capfd):
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", dev.os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: refused
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(dev.SetupError, match="pip cannot reach its package index"):
        dev.install(["sd3-workbench-no-such-package"])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "stages", "pytest_command"),
    [
        ([], ALL_STAGES, ["-m", "pytest", "-q", "-m", "not long", *CARD_APART, *SIDE_BY_SIDE]),
        (["--all"], [*ALL_STAGES, "plain"], ["-m", "pytest", "-q", *CARD_APART, *SIDE_BY_SIDE]),
        (["-k", "x"], ["tests"], ["-m", "pytest", "-q", "-m", "not long", "-k", "x"]),
        (["--all", "tests/core"], ["tests"], ["-m", "pytest", "-q", "tests/core"]),
    ],
)
def test_test_runs_these_stages(dev, pip_calls, monkeypatch, arguments, stages, pytest_command):
    commands = []
    monkeypatch.setattr(dev, "run", lambda command, **_: commands.append(command) or 0)
    assert dev.main(["test", *arguments]) == 0
    assert len(commands) == len(stages)
    assert commands[-1] == pytest_command


def test_the_plain_stage_multiplies_as_an_older_processor(dev, monkeypatch):
    """Without bfloat16 products, whatever processor this is."""
    question = "import sys, torch; sys.exit(torch.ops.mkldnn._is_mkldnn_bf16_supported())"
    monkeypatch.setattr(dev, "PYTHON", sys.executable)
    assert dev.run(["-c", question], settings=dev.PLAIN_ARITHMETIC) == 0


def test_one_failed_stage_fails_the_whole_and_is_named(dev, pip_calls, monkeypatch, capsys):
    monkeypatch.setattr(dev, "run", lambda command, **_: int("basedpyright" in command))
    assert dev.main(["test"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("dev.py test: FAILED (types) after ")


def test_the_demo_makes_a_picture_and_judges_it(dev, pip_calls, monkeypatch, tmp_path, capfd):
    for name in ("pytest", "diffusers"):  # a demo's environment has neither
        (tmp_path / f"{name}.py").write_text("raise ImportError(__name__)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(dev, "PICTURE", tmp_path / "demo.png")
    monkeypatch.setattr(dev, "find_comfyui", lambda: None)
    assert dev.main(["demo", "a", "red", "circle"]) == 0
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.size == (128, 128)
    said = capfd.readouterr().out
    assert str(tmp_path / "demo.png") in said
    assert re.search(r"^seen: .*as asked", said, re.MULTILINE)


def test_the_demo_draws_in_comfyui_where_there_is_one(dev, pip_calls, monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(dev, "find_comfyui", lambda: tmp_path)
    monkeypatch.setattr(dev, "wanted", lambda purpose: [purpose])
    monkeypatch.setattr(dev, "run", lambda command: commands.append(command) or 0)
    assert dev.main(["demo", "a", "red", "circle"]) == 0
    assert commands[0][0].endswith("demo_in_comfyui.py")
    assert commands[0][1] == "a red circle"
    assert commands[1][:3] == ["-m", "sd3_core", "check"]


def test_a_comfyui_that_fails_does_not_end_the_demo(dev, pip_calls, monkeypatch, tmp_path, capsys):
    commands = []

    def run(command):
        commands.append(command)
        return int(command[0].endswith("demo_in_comfyui.py"))

    monkeypatch.setattr(dev, "find_comfyui", lambda: tmp_path)
    monkeypatch.setattr(dev, "wanted", lambda purpose: [purpose])
    monkeypatch.setattr(dev, "run", run)
    assert dev.main(["demo", "a", "red", "circle"]) == 0
    assert [command[:3] for command in commands[1:]] == [
        ["-m", "sd3_core", "generate"],
        ["-m", "sd3_core", "check"],
    ]
    assert "That ComfyUI could not draw it" in capsys.readouterr().out


def test_ci_gets_no_colours(dev, monkeypatch):
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("FORCE_COLOR", "1")
    variables = dev.environment()
    assert variables["NO_COLOR"] == "1"
    assert "FORCE_COLOR" not in variables


def test_tests_never_ask_the_hub(dev):
    assert dev.environment()["HF_HUB_OFFLINE"] == "1"
