"""ComfyUI's editor in a headless Chromium, driven as a user would drive it.

    with open_browser() as browser:
        editor = Editor(browser, server.url)
        editor.open(workflow)               # UI or API form
        api = editor.to_api()               # what a click on Run would queue
        editor.run()

Chromium is the machine's own (Debian: `apt install chromium`), never a download of Playwright's.
"""

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comfy_server import COMFYUI, HAS_COMFYUI

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM_PATH") or next(
    filter(None, map(shutil.which, CHROMIUM_NAMES)), None
)
HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None
PATIENCE = 120  # seconds, for a machine that does other work too
VIEWPORT = {"width": 1600, "height": 1000}
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# What ComfyUI's own page says in a fresh installation without a network: files that are not there
# yet, and the models of its default workflow.
NOT_OURS = (
    "user.css",
    "/api/userdata",
    "huggingface.co",
    "graph accessed before initialization",
    "comfy.templates.json",
)
READY = "() => !!(window.app?.extensionManager && window.LiteGraph?.registered_node_types[%s])"
IDLE = """async () => {
    const queue = await (await fetch("/queue")).json();
    return queue.queue_running.length + queue.queue_pending.length === 0;
}"""


def missing() -> str:
    """What keeps the tests from opening a page, with its remedy; empty when nothing does."""
    if not HAS_COMFYUI:
        return f"no ComfyUI at {COMFYUI} (COMFYUI_PATH says where)"
    if not HAS_PLAYWRIGHT:
        return "the Python package playwright is not installed (dev.py test brings it)"
    if not CHROMIUM:
        return "no Chromium (Debian: apt install chromium; elsewhere CHROMIUM_PATH says where)"
    return ""


@contextmanager
def open_browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


class Editor:
    """One tab.  `errors` collects what the page complained of, less NOT_OURS."""

    def __init__(self, browser: Any, url: str, node: str = "SD3Sample"):
        """node: one whose registration shows that the page is ready."""
        self.context = browser.new_context(viewport=VIEWPORT, color_scheme="dark")
        self.context.set_default_timeout(PATIENCE * 1000)
        self.page = self.context.new_page()
        self.url, self.node = url, node
        self.errors: list[str] = []
        self.opened = 0
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: dialog.accept())  # "leave this page?"
        self.visit()

    def _heard(self, message: Any) -> None:
        said = f"{message.text} ({message.location.get('url')})"
        if message.type == "error" and not any(known in said for known in NOT_OURS):
            self.errors.append(said)

    def visit(self) -> None:
        """Load the page, or load it anew."""
        self.page.goto(self.url, wait_until="domcontentloaded")
        self.page.wait_for_function(READY % json.dumps(self.node))
        self.page.wait_for_function("() => !!app.canvas?.graph")
        self.page.wait_for_timeout(1000)  # the last workflow is being restored

    def until(self, probe: Callable[[], Any], timeout: float = PATIENCE) -> Any:
        """The first true answer of probe()."""
        end = time.monotonic() + timeout
        while not (answer := probe()):
            assert time.monotonic() < end, f"waited {timeout:g} s in vain"
            self.page.wait_for_timeout(50)
        return answer

    def set(self, setting: str, value: Any) -> None:
        """Returns when the server has it too: it outlives the page."""
        if self.get(setting) == value:
            return
        change = "([s, v]) => { app.extensionManager.setting.set(s, v); }"
        stored = "async (s) => (await (await fetch('/settings')).json())[s] ?? null"
        self.page.evaluate(change, [setting, value])
        self.until(lambda: self.page.evaluate(stored, setting) == value)

    def use_renderer(self, renderer: str) -> None:
        """renderer: "canvas" (LiteGraph) or "vue" (Nodes 2.0)."""
        self.set("Comfy.VueNodes.Enabled", renderer == "vue")
        self.page.wait_for_timeout(500)

    def get(self, setting: str) -> Any:
        return self.page.evaluate("s => app.extensionManager.setting.get(s)", setting)

    def open(self, workflow: Mapping[str, Any]) -> None:
        """A workflow in UI form (it has `nodes`) or in API form, in a tab of its own.

        ComfyUI would give a second workflow of the same name the outputs of the first.
        """
        self.opened += 1
        name = f"test {self.opened}"
        call = (
            "([w, n]) => app.loadGraphData(w, true, true, n)"
            if "nodes" in workflow
            else "([w, n]) => app.loadApiJson(w, n)"
        )
        self.page.evaluate(call, [workflow, name])
        self.page.wait_for_timeout(400)  # two frames to lay out and draw

    def fit(self) -> None:
        """The whole graph in view."""
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_timeout(500)

    def red_nodes(self) -> list[str]:
        """Nodes that are unknown here, or marked with an error."""
        return self.page.evaluate(
            """() => app.graph.nodes
                .filter((n) => n.has_errors || !LiteGraph.registered_node_types[n.type])
                .map((n) => `${n.id} ${n.type}`)"""
        )

    def to_api(self) -> dict[str, Any]:
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def to_ui(self) -> dict[str, Any]:
        return self.page.evaluate("() => app.graph.serialize()")

    def run(self, timeout: float = PATIENCE) -> None:
        """As a click on Run; returns when the queue is empty and the page has heard of it."""
        self.page.evaluate("() => app.queuePrompt(0, 1)")
        self.until(lambda: self.page.evaluate(IDLE), timeout)
        self.page.wait_for_timeout(300)

    def set_widget(self, node_id: int, widget: str, value: Any) -> None:
        """As if typed in."""
        self.page.evaluate(
            """([id, name, value]) => {
                const node = app.graph.getNodeById(id);
                const widget = node.widgets.find((w) => w.name === name);
                widget.value = value;
                widget.callback?.(value, app.canvas, node);
            }""",
            [node_id, widget, value],
        )

    def report_of(self, node_id: int) -> str | None:
        """The text that one of our nodes shows; None before there is any report."""
        return self.page.evaluate(
            """(id) => {
                const widgets = app.graph.getNodeById(id)?.widgets ?? [];
                const panel = widgets.find((w) => w.name === "sd3_report")?.element;
                return panel?.dataset.filled ? panel.innerText : null;
            }""",
            node_id,
        )

    def screenshot(self, path: Path) -> None:
        """Of the page as it is."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)

    def close(self) -> None:
        self.context.close()
