"""A picture of each node for its help page, taken in a running ComfyUI that has this pack.

Needs Playwright and a Chromium of the machine's own.  Nodes of the first-picture workflow are shown
with its settings, the others as they are when they are added.
"""

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from .files import FOLDER
from .pages import DOCS

EDGE = 12  # of the graph around a node
WIDEST = 420
PLACE = (80, 140)  # where the node is put in the window, clear of its buttons
READY = (
    "() => !!(window.app?.extensionManager && window.LiteGraph?.registered_node_types.SD3Sample)"
)
# The ids of our nodes that this ComfyUI has.
OURS = """() => Object.values(LiteGraph.registered_node_types).map(type => type.nodeData)
    .filter(node => node?.category?.startsWith("SD3 Workbench/")).map(node => node.name)"""
# Puts one node alone on the canvas; returns its box in the window, with the title.
SHOW = """async ([id, values, [left, top]]) => {
    for (const old of [...app.graph._nodes]) app.graph.remove(old);  // clear() would reuse its id
    const node = LiteGraph.createNode(id);
    app.graph.add(node);
    for (const widget of node.widgets ?? []) {
        if (!(widget.name in values)) continue;
        widget.value = values[widget.name];
        widget.callback?.(widget.value);
    }
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, 320), Math.max(height, node.size[1])]);
    app.canvas.ds.scale = 1;
    const frame = app.canvas.canvas.getBoundingClientRect();
    app.canvas.ds.offset = [0, 0];
    node.pos = [left, top];
    app.canvas.setDirty(true, true);
    await new Promise(done => setTimeout(done, 3000));
    return [frame.left + left, frame.top + top - 30, node.size[0], node.size[1] + 30];
}"""


def values_of(workflow: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Widgets by name, by type of node."""
    return {
        node["type"]: node["widgets_values_named"]
        for node in workflow["nodes"]
        if "widgets_values_named" in node
    }


def node_pictures(server: str) -> dict[Path, bytes]:
    """server: such as http://127.0.0.1:8188.  Returns WebP files."""
    from playwright.sync_api import sync_playwright

    chosen = values_of(json.loads((FOLDER / "first-picture.json").read_text(encoding="utf-8")))
    files = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 900, "height": 1300})
        page.goto(server, wait_until="domcontentloaded")
        page.wait_for_function(READY, timeout=300_000)
        for name in page.evaluate(OURS):
            x, y, width, height = page.evaluate(SHOW, [name, chosen.get(name, {}), PLACE])
            taken = page.screenshot(
                clip={
                    "x": x - EDGE,
                    "y": y - EDGE,
                    "width": min(width, WIDEST) + 2 * EDGE,
                    "height": height + 2 * EDGE,
                }
            )
            files[DOCS / "pictures" / f"{name}.webp"] = as_webp(taken)
        browser.close()
    return files


def as_webp(png: bytes) -> bytes:
    data = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(data, "WEBP", quality=85, method=6)
    return data.getvalue()
