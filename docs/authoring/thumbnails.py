"""The small pictures that ComfyUI's template browser shows beside our workflows.

A workflow of the built-in model is run, and its pictures are laid side by side.  The others name
files that are not ours to run here: their graph is drawn instead.
"""

import io
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ...nodes.files import EMBEDDED, embedded_file
from .files import FOLDER
from .graph import Graph, api_form, ui_form
from .node_shapes import NodeShape
from .running import register, run
from .workflows import describe

SIZE = 512
GAP = 8
MARGIN = 24
HEAD = 130  # above a drawn graph, for its title
GROUND, GROUP, BODY, TEXT, FAINT = "#1e1e1e", "#26394a", "#454545", "#eeeeee", "#aaaaaa"
OTHER = "#99aa99"
WIRES = {  # as the front end colours them
    "CLIP": "#ffd500",
    "CONDITIONING": "#ffa931",
    "CONTROL_NET": "#6ee7b7",
    "IMAGE": "#64b5f6",
    "LATENT": "#ff9cf9",
    "MASK": "#81c784",
    "MODEL": "#b39ddb",
    "SIGMAS": "#cdffcd",
    "VAE": "#ff6e6e",
}


def thumbnail(name: str, shapes: Mapping[str, NodeShape]) -> bytes:
    """JPEG."""
    graph = describe(name, shapes)
    image = montage(pictures(graph)) if runs_here(graph) else drawing(graph)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=88, optimize=True)
    return data.getvalue()


def runs_here(graph: Graph) -> bool:
    """Whether it needs no file, and the built-in model is in the pack."""
    files = [
        value
        for node in graph.nodes
        for value in node.values.values()
        if value == EMBEDDED or str(value).endswith(".safetensors")
    ]
    return embedded_file() is not None and set(files) == {EMBEDDED}


def pictures(graph: Graph) -> list[Image.Image]:
    """What a run of it saves, or lays before the person who picks."""
    import folder_paths

    register()
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        folder_paths.set_temp_directory(folder)
        saved = list(run(api_form(graph)))
        candidates = sorted(Path(folder).glob("sd3_picks/*/pictures/*.png"))
        return [Image.open(path).convert("RGB") for path in saved or candidates]


def montage(shown: Sequence[Image.Image]) -> Image.Image:
    """Square tiles in rows, about as many in a row as there are rows."""
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    side = (SIZE - GAP * (columns - 1)) // columns
    top = (SIZE - rows * side - GAP * (rows - 1)) // 2
    canvas = Image.new("RGB", (SIZE, SIZE), GROUND)
    for number, image in enumerate(shown):
        row, column = divmod(number, columns)
        tile = image.resize((side, side), Image.Resampling.LANCZOS)
        canvas.paste(tile, (column * (side + GAP), top + row * (side + GAP)))
    return canvas


def drawing(graph: Graph) -> Image.Image:
    """Title, first words of the note, and the graph in small."""
    workflow = ui_form(graph)
    canvas = Image.new("RGB", (SIZE, SIZE), GROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, 20), graph.name, TEXT, ImageFont.load_default(34))
    words = re.sub(r"[*`]", "", graph.about.partition(".**")[0])
    draw.multiline_text((MARGIN, 68), wrapped(words), FAINT, ImageFont.load_default(18))
    boxes = [group["bounding"] for group in workflow["groups"]]
    right = max(x + width for x, _, width, _ in boxes)
    bottom = max(y + height for _, y, _, height in boxes)
    left, top = boxes[0][:2]
    scale = min((SIZE - 2 * MARGIN) / (right - left), (SIZE - HEAD - MARGIN) / (bottom - top))

    def at(x: float, y: float) -> tuple[float, float]:
        return MARGIN + (x - left) * scale, HEAD + (y - top) * scale

    for x, y, width, height in boxes:
        draw.rectangle([*at(x, y), *at(x + width, y + height)], GROUP)
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] != "MarkdownNote"}
    for node in nodes.values():
        (x, y), (width, height) = node["pos"], node["size"]
        draw.rounded_rectangle([*at(x, y - 30), *at(x + width, y + height)], 4, BODY)
    for _, start, slot, end, entry, kind in workflow["links"]:
        line = [at(*socket(nodes[start], slot, 1)), at(*socket(nodes[end], entry, 0))]
        draw.line(line, WIRES.get(kind, OTHER), 2)
    return canvas


def socket(node: Mapping[str, Any], slot: int, side: int) -> tuple[float, float]:
    """Where a wire begins (side 1, the right one) or ends (0)."""
    return node["pos"][0] + side * node["size"][0], node["pos"][1] + 14 + 20 * slot


def wrapped(text: str, letters: int = 50) -> str:
    """In lines, whole words."""
    return re.sub(rf"(.{{1,{letters}}})(?:\s+|$)", r"\1\n", text).strip()


def thumbnail_files(names: Sequence[str], shapes: Mapping[str, NodeShape]) -> dict[Path, bytes]:
    return {FOLDER / f"{name}.jpg": thumbnail(name, shapes) for name in names}
