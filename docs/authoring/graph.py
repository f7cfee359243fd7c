"""A workflow said once in Python, and its two files: one for people, one for programs.

    graph = Graph("first-picture", node_shapes())
    graph.group("Load the model")
    load = graph.node("SD3LoadCheckpoint", ckpt_name="sd3.5_medium.safetensors")
    graph.group("Say what to draw")
    words = graph.node("SD3EncodePrompt", clip=load["CLIP"], prompt="a lighthouse", negative="")
    ui_form(graph), api_form(graph)

A value left out is the node's default.  A group is a column of nodes, from left to right.
"""

import math
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .node_shapes import Input, NodeShape

PACK = Path(__file__).parent.parent.parent
NAMESPACE = uuid.UUID("5d3c0de0-5d3c-4b3a-9f00-5d35d35d35d3")  # of our workflows' ids

# Pixels at 100 %, as the front end draws them.
TITLE, ROW, LINE, EDGE, GAP, MARGIN = 30, 20, 24, 16, 30, 15
HEADING = 44  # of a group
WIDTHS = {
    "SD3EncodePrompt": 400,
    "SD3Sweep": 420,
    "CLIPTextEncode": 400,
    "PrimitiveStringMultiline": 400,
}
WIDTH = 320
TEXT = 110  # a multiline text
PANEL = 90  # where our nodes tell what they did
CURVE = 130  # where the schedule is drawn
PICTURE = 320  # what a node of PICTURES shows
PICTURES = (
    *("LoadImage", "PreviewImage", "SaveImage", "LossGraphNode"),
    *("SD3TrainLoRA", "SD3TrainDPO", "SD3TimestepDensity", "SD3Pick"),
)
NOTE_WIDTH, NOTE_LINE, NOTE_LETTERS = 400, 22, 52  # letters in a line
VIEW = (1420, 720)  # the part of a window without buttons, in which the whole graph should fit
CORNER = (80, 110)  # where that part begins
BLUE, NOTE_COLOURS = "#3f789e", {"color": "#432", "bgcolor": "#653"}


@dataclass(frozen=True)
class ModelFile:
    """A file that a workflow names.  folder: of models/.  url: empty where none is known."""

    name: str
    folder: str
    url: str = ""
    optional: bool = False

    @property
    def line(self) -> str:
        """Of a note, in Markdown."""
        place = f"`models/{self.folder}/{self.name}`"
        source = f" ([source]({self.url}))" if self.url else ""
        return f"- {place}{source}{', may be left out' if self.optional else ''}"


@dataclass(frozen=True)
class Output:
    """One output of a node, to be given to another node's input."""

    node: "Node"
    slot: int
    type: str


@dataclass
class Node:
    id: int
    shape: NodeShape
    title: str
    values: Mapping[str, Any]  # by input: an Output, or what is typed
    files: Sequence[ModelFile]
    after_run: str = "fixed"  # what a seed does then: the same picture as the thumbnail's
    x: int = 0
    y: int = 0

    def __getitem__(self, output: str) -> Output:
        names = [name for name, _ in self.shape.outputs]
        if output not in names:
            raise ValueError(f"{self.shape.id} has the outputs {', '.join(names)}, not {output}.")
        slot = names.index(output)
        return Output(self, slot, self.shape.outputs[slot][1])

    @property
    def links(self) -> dict[str, Output]:
        return {name: value for name, value in self.values.items() if isinstance(value, Output)}

    def typed(self, entry: Input) -> Any:
        """The value of a widget: behind a link its default waits."""
        value = self.values.get(entry.name)
        return entry.default if value is None or isinstance(value, Output) else value

    @property
    def height(self) -> int:
        shape = self.shape
        rows = max(len(shape.sockets), len(shape.outputs))
        lines = sum(TEXT if entry.multiline else LINE for entry in shape.widgets)
        lines += sum(LINE for entry in shape.widgets if entry.control)
        shown = PICTURE if shape.id in PICTURES else PANEL if shape.is_ours else 0
        if shape.id == "SD3ShiftSchedule":
            shown = CURVE
        return rows * ROW + lines + shown + EDGE


@dataclass
class Group:
    title: str
    nodes: list[Node] = field(default_factory=list)

    @property
    def bounding(self) -> list[int]:
        """x, y, width, height."""
        first, last = self.nodes[0], self.nodes[-1]
        left, top = first.x - MARGIN, first.y - TITLE - HEADING
        return [left, top, self.width + 2 * MARGIN, last.y + last.height + MARGIN - top]

    @property
    def width(self) -> int:
        """Of each of its nodes."""
        return max(WIDTHS.get(node.shape.id, WIDTH) for node in self.nodes)


class Graph:
    """about: Markdown for the note beside the nodes."""

    def __init__(self, name: str, shapes: Mapping[str, NodeShape], about: str):
        self.name, self.shapes, self.about = name, shapes, about
        self.groups: list[Group] = []

    @property
    def nodes(self) -> list[Node]:
        return [node for group in self.groups for node in group.nodes]

    @property
    def files(self) -> list[ModelFile]:
        return list(dict.fromkeys(file for node in self.nodes for file in node.files))

    def group(self, title: str) -> None:
        """What is added next stands in a new column."""
        self.groups.append(Group(title))

    def node(
        self,
        kind: str,
        files: Sequence[ModelFile] = (),
        title: str = "",
        after_run: str = "fixed",
        **values: Any,
    ) -> Node:
        """files: what it loads.  after_run: of a seed.  values: by input, an Output or a literal.

        Raises ValueError for an input that is unknown, missing, or given another type's output.
        """
        shape = self.shapes[kind]
        check_values(shape, values)
        name = title or shape.title
        node = Node(len(self.nodes) + 1, shape, name, values, tuple(files), after_run)
        self._place(node)
        self.groups[-1].nodes.append(node)
        return node

    def _place(self, node: Node) -> None:
        above = self.groups[-1].nodes
        if above:
            node.x, node.y = above[-1].x, above[-1].y + above[-1].height + TITLE + GAP
            return
        edge = NOTE_WIDTH
        if len(self.groups) > 1:
            x, _, width, _ = self.groups[-2].bounding
            edge = x + width
        node.x, node.y = edge + GAP + MARGIN, 0


def check_values(shape: NodeShape, values: Mapping[str, Any]) -> None:
    inputs = {entry.name: entry for entry in shape.inputs}
    for name, value in values.items():
        if name not in inputs:
            raise ValueError(f"{shape.id} has no input {name}; it has {', '.join(inputs)}.")
        if isinstance(value, Output) and value.type != inputs[name].type:
            raise ValueError(f"{shape.id}.{name} takes {inputs[name].type}, not {value.type}.")
    for entry in inputs.values():
        nothing = entry.default is None if entry.is_widget else not entry.optional
        if nothing and entry.name not in values:
            raise ValueError(f"{shape.id}.{entry.name} needs a value.")


# The form for programs


def api_form(graph: Graph) -> dict[str, Any]:
    """What POST /prompt takes, and what the front end makes of the other form."""
    return {
        str(node.id): {
            "inputs": {entry.name: node.typed(entry) for entry in node.shape.widgets}
            | {name: [str(link.node.id), link.slot] for name, link in node.links.items()},
            "class_type": node.shape.id,
            "_meta": {"title": node.title},
        }
        for node in graph.nodes
    }


# The form for people


def ui_form(graph: Graph) -> dict[str, Any]:
    """What the front end opens and saves (version 0.4)."""
    links = [
        (
            link.node.id,
            link.slot,
            node.id,
            [entry.name for entry in node.shape.inputs].index(name),
            link.type,
        )
        for node in graph.nodes
        for name, link in node.links.items()
    ]
    numbered = [[number, *link] for number, link in enumerate(links, start=1)]
    note = note_node(graph, len(graph.nodes) + 1)
    return {
        "id": str(uuid.uuid5(NAMESPACE, graph.name)),
        "revision": 0,
        "last_node_id": note["id"],
        "last_link_id": len(links),
        "nodes": [
            note,
            *(
                ui_node(node, group.width, numbered)
                for group in graph.groups
                for node in group.nodes
            ),
        ],
        "links": numbered,
        "groups": [
            {
                "id": number,
                "title": group.title,
                "bounding": group.bounding,
                "color": BLUE,
                "font_size": 24,
                "flags": {},
            }
            for number, group in enumerate(graph.groups, start=1)
        ],
        "config": {},
        "extra": {"ds": view(graph)},
        "version": 0.4,
    }


def ui_node(node: Node, width: int, links: list[list[Any]]) -> dict[str, Any]:
    """links: [number, from node, slot, to node, slot, type]."""
    arriving = {link[4]: link[0] for link in links if link[3] == node.id}
    leaving = [
        [link[0] for link in links if link[1:3] == [node.id, i]]
        for i in range(len(node.shape.outputs))
    ]
    written = {
        "id": node.id,
        "type": node.shape.id,
        "pos": [node.x, node.y],
        "size": [width, node.height],
        "flags": {},
        "order": node.id,
        "mode": 0,
        "inputs": [ui_input(entry, arriving.get(i)) for i, entry in enumerate(node.shape.inputs)],
        "outputs": [
            {"name": name, "type": kind, "links": numbers or None}
            for (name, kind), numbers in zip(node.shape.outputs, leaving, strict=True)
        ],
        "properties": properties(node),
        "widgets_values": list(saved_widgets(node).values()),
        "widgets_values_named": saved_widgets(node),
    }
    return written if node.title == node.shape.title else {**written, "title": node.title}


def ui_input(entry: Input, link: int | None) -> dict[str, Any]:
    shape = {"shape": 7} if entry.optional else {}
    widget = {"widget": {"name": entry.name}} if entry.is_widget else {}
    return {"name": entry.name, **shape, "type": entry.type, **widget, "link": link}


def saved_widgets(node: Node) -> dict[str, Any]:
    """What the front end saves of the widgets, in its order: also their own small extra ones."""
    saved = {}
    for entry in node.shape.widgets:
        saved[entry.name] = node.typed(entry)
        if entry.control:
            saved["control_after_generate"] = node.after_run
        if entry.upload:
            saved["upload"] = "image"
    return saved


def properties(node: Node) -> dict[str, Any]:
    """Which pack brings the node, and where its files are to be had."""
    pack = (
        ("sd3-workbench", pack_version())
        if node.shape.is_ours
        else ("comfy-core", oldest_comfyui())
    )
    models = [
        {"name": file.name, "url": file.url, "directory": file.folder}
        for file in node.files
        if file.url and not file.optional
    ]
    return {
        "cnr_id": pack[0],
        "ver": pack[1],
        "Node name for S&R": node.shape.id,
        **({"models": models} if models else {}),
    }


def pack_version() -> str:
    return _pyproject(r'^version = "(.+)"$')


def oldest_comfyui() -> str:
    return _pyproject(r'^requires-comfyui = ">=(.+)"$')


def _pyproject(pattern: str) -> str:
    found = re.search(pattern, (PACK / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found, pattern
    return found[1]


def note_node(graph: Graph, number: int) -> dict[str, Any]:
    """What the workflow does and which files it needs; no program sees it."""
    files = "\n".join(file.line for file in graph.files)
    text = f"{graph.about}\n\n**Files**\n\n{files}\n" if files else f"{graph.about}\n"
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [0, -HEADING],
        "size": note_size(text),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "About this workflow",
        "properties": {},
        "widgets_values": [text],
        **NOTE_COLOURS,
    }


def note_size(text: str) -> list[int]:
    """Width and height; Markdown runs the lines of a paragraph together."""
    shown = re.sub(r"\]\(.*?\)", "", text)  # without the addresses of links
    blocks = shown.replace("\n- ", "\n\n- ").split("\n\n")
    lines = sum(1 + math.ceil(len(block) / NOTE_LETTERS) for block in blocks)
    return [NOTE_WIDTH, lines * NOTE_LINE + 2 * EDGE]


def view(graph: Graph) -> dict[str, Any]:
    """Scale and offset at which the whole graph is seen."""
    boxes = [group.bounding for group in graph.groups]
    right = max(x + width for x, _, width, _ in boxes)
    height = max(height for *_, height in boxes)
    scale = round(min(1.0, VIEW[0] / right, VIEW[1] / height), 2)
    top = -TITLE - HEADING
    return {"scale": scale, "offset": [round(CORNER[0] / scale), round(CORNER[1] / scale - top)]}
