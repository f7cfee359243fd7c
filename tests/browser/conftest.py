"""A real ComfyUI, and Chromium looking at it.

Without Chromium, Playwright or ComfyUI only test_without_browser.py runs, to say so.
SD3_SCREENSHOTS names a folder that keeps screenshots; without it none are taken.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_page import Editor, missing, open_browser
from comfy_server import PACK, Server, lay_out, serve
from PIL import Image

API_FORMS = PACK / "workflows" / "api"
FOLDER_OF_INPUT = {  # where ComfyUI looks for what a loader's widget names
    "ckpt_name": "checkpoints",
    "unet_name": "diffusion_models",
    "vae_name": "vae",
    "lora_name": "loras",
    "control_net_name": "controlnet",
    **dict.fromkeys(
        ("clip_l", "clip_g", "t5xxl", "clip_name1", "clip_name2", "clip_name3"), "text_encoders"
    ),
}


def pytest_ignore_collect(collection_path: Path):
    if missing() and collection_path.name.startswith("test_"):
        return collection_path.name != "test_without_browser.py"
    return None


def write_named_files(folder: Path) -> None:
    """Whatever the shipped workflows name, so that their widgets' lists hold it.

    Opening a workflow reads no weight: the model files are empty.
    """
    for form in API_FORMS.glob("*.json"):
        for node in json.loads(form.read_text(encoding="utf-8")).values():
            for name, value in node["inputs"].items():
                if name in FOLDER_OF_INPUT and str(value).endswith(".safetensors"):
                    place = folder / "models" / FOLDER_OF_INPUT[name] / value
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.touch()
                elif name == "image" and isinstance(value, str):
                    Image.new("RGBA", (128, 128), "teal").save(folder / "input" / value)


@pytest.fixture(scope="package")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("browser")
    lay_out(folder)
    write_named_files(folder)
    with serve(folder) as running:
        yield running


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """Closed after the folder: Playwright keeps an event loop running in the tests' thread."""
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="package", params=["canvas", "vue"])
def editor(request, browser, server) -> Iterator[Editor]:
    """One page for all tests of a renderer: a page takes 5 s to open."""
    page = Editor(browser, server.url)
    page.use_renderer(request.param)
    yield page
    page.close()


@pytest.fixture(autouse=True)
def no_complaints(request) -> Iterator[None]:
    """Whatever a test does, the page's console stays free of errors."""
    yield
    if "editor" in request.fixturenames:
        page = request.getfixturevalue("editor")
        heard, page.errors = page.errors, []
        assert not heard


@pytest.fixture
def screenshot(request, editor):
    """screenshot() keeps what the page shows, where SD3_SCREENSHOTS names a folder.

    fit: with the whole graph in view.
    """
    folder = os.environ.get("SD3_SCREENSHOTS")

    def take(suffix: str = "", fit: bool = False) -> None:
        name = request.node.name.replace("[", "-").rstrip("]") + suffix
        if fit and folder:
            editor.fit()
        if folder:
            editor.screenshot(Path(folder) / f"{name}.png")

    return take
