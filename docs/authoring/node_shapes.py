"""What a node looks like from outside, read from the class that ComfyUI would run."""

import asyncio
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...nodes import NODES, TRAINING_NODES

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
# Of comfy_extras/, what our workflows use besides the nodes of ComfyUI's nodes.py.
EXTRAS = ("nodes_canny", "nodes_mask", "nodes_primitive", "nodes_sd3", "nodes_train")


@dataclass(frozen=True)
class Input:
    """default: None where a workflow has to name the value."""

    name: str
    type: str
    optional: bool
    default: Any
    control: str  # of a seed: what happens to it after a run; empty for any other input
    multiline: bool
    upload: bool  # a button stands behind the widget, and saved files count it as a value

    @property
    def is_widget(self) -> bool:
        return self.type in WIDGETS


@dataclass(frozen=True)
class NodeShape:
    """inputs: in the order of the front end, what is wired before what is typed."""

    id: str
    title: str
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, str], ...]  # name and type
    is_ours: bool  # of this pack; else ComfyUI's own

    @property
    def widgets(self) -> list[Input]:
        return [entry for entry in self.inputs if entry.is_widget]

    @property
    def sockets(self) -> list[Input]:
        return [entry for entry in self.inputs if not entry.is_widget]


def node_shapes() -> Mapping[str, NodeShape]:
    """By id: this pack's nodes, and those of ComfyUI that our workflows may use."""
    comfyui = importlib.import_module("nodes")  # its name in ComfyUI's folder, not ours
    known = dict(comfyui.NODE_CLASS_MAPPINGS)
    titles = dict(comfyui.NODE_DISPLAY_NAME_MAPPINGS)
    ours = [*NODES, *TRAINING_NODES]
    for node in [*extra_nodes(), *ours]:
        schema = node.GET_SCHEMA()
        known[schema.node_id] = node
        titles[schema.node_id] = schema.display_name
    return {
        name: read_shape(name, node, titles.get(name) or name, node in ours)
        for name, node in known.items()
    }


def extra_nodes() -> list[Any]:
    modules = [importlib.import_module(f"comfy_extras.{name}") for name in EXTRAS]
    return [node for module in modules for node in asyncio.run(listed(module))]


async def listed(module: Any) -> list[Any]:
    return await (await module.comfy_entrypoint()).get_node_list()


def read_shape(name: str, node: Any, title: str, is_ours: bool) -> NodeShape:
    """node: a class of either of ComfyUI's two kinds."""
    sections = node.INPUT_TYPES()
    inputs = [
        read_input(key, spec, optional)
        for section, optional in (("required", False), ("optional", True))
        for key, spec in sections.get(section, {}).items()
    ]
    types = list(node.RETURN_TYPES)
    names = list(getattr(node, "RETURN_NAMES", None) or types)
    return NodeShape(
        name,
        title,
        tuple(sorted(inputs, key=lambda entry: entry.is_widget)),  # a stable sort
        tuple(zip(names, types, strict=True)),
        is_ours,
    )


def read_input(name: str, spec: tuple[Any, ...], optional: bool) -> Input:
    """spec: the type, or the list of choices, and the options, as INPUT_TYPES has them."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    control = options.get("control_after_generate") or ""
    return Input(
        name=name,
        type="COMBO" if isinstance(kind, list) else kind,
        optional=optional,
        default=options.get("default"),
        control="randomize" if control is True else getattr(control, "value", control),
        multiline=bool(options.get("multiline")),
        upload=bool(options.get("image_upload")),
    )
