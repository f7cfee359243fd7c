"""Help pages and English texts for ComfyUI's front end, from the schemas and from help.md."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...nodes import NODES, TRAINING_NODES
from ...nodes.files import EMBEDDED
from ...sd3_core.presets import PRESETS
from .files import as_json
from .graph import PACK

HELP = PACK / "docs" / "authoring" / "help.md"
DOCS = PACK / "web" / "docs"
LOCALES = PACK / "locales" / "en"
CODES = "Codes"  # the section that is no node's
FEW = 12  # choices that a table lists; more are ComfyUI's own long lists


@dataclass(frozen=True)
class Help:
    """What was written by hand of a node, and the codes of its errors."""

    text: str
    errors: tuple[str, ...]


def schemas() -> list[Any]:
    return [node.GET_SCHEMA() for node in [*NODES, *TRAINING_NODES]]


def sections() -> dict[str, str]:
    """help.md by heading."""
    text = re.sub(r"{presets: (\w+), (\w+)}", preset_table, HELP.read_text(encoding="utf-8"))
    parts = re.split(r"^# (\w+)$", text, flags=re.MULTILINE)
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def preset_table(names: re.Match[str]) -> str:
    """Two settings of every family of models that has a name."""
    rows = [
        (preset.title, *(str(getattr(preset, name)) for name in names.groups()))
        for family, preset in PRESETS.items()
        if family != "other"
    ]
    return table(("model", *names.groups()), rows)


def read_help() -> dict[str, Help]:
    """By node id."""
    found = {}
    for name, text in sections().items():
        if name != CODES:
            words, _, codes = text.partition("\nErrors: ")
            found[name] = Help(words.strip(), tuple(code for code in codes.split(", ") if code))
    return found


def read_codes() -> dict[str, str]:
    """What each code of an error means, in one line."""
    entries = re.findall(r"^- (\w+): ((?:.+\n?)(?:  .+\n?)*)", sections()[CODES], re.MULTILINE)
    return {code: " ".join(text.split()) for code, text in entries}


# Pages


def page(schema: Any, written: Help | None, codes: Mapping[str, str]) -> str:
    """Markdown of one node; the front end shows it beside the graph."""
    parts = [f"# {schema.display_name}", schema.description]
    if written is not None:
        parts.append(written.text)
    picture = DOCS / "pictures" / f"{schema.node_id}.webp"
    if picture.exists():
        parts.append(f"![{schema.display_name}](pictures/{picture.name})")
    parts += ["## Inputs", table(("input", "type", "default", "what it is"), input_rows(schema))]
    if schema.outputs:
        parts += ["## Outputs", table(("output", "type", "what it is"), output_rows(schema))]
    if written is not None and written.errors:
        rows = [(f"`SD3:{code}`", codes[code]) for code in written.errors]
        parts += ["## When it stops", table(("error", "what it means"), rows)]
    return "\n\n".join(parts) + "\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def input_rows(schema: Any) -> list[tuple[str, str, str, str]]:
    return [
        (
            f"`{entry.id}`",
            kind(entry),
            default(entry),
            entry.tooltip + (" *Advanced.*" if getattr(entry, "advanced", None) else ""),
        )
        for entry in schema.inputs
    ]


def output_rows(schema: Any) -> list[tuple[str, str, str]]:
    return [(output_name(entry), entry.get_io_type(), entry.tooltip) for entry in schema.outputs]


def output_name(entry: Any) -> str:
    return entry.display_name or entry.get_io_type()


def kind(entry: Any) -> str:
    """Type of an input with its range, or its choices; files are the user's and stay unsaid."""
    name = entry.get_io_type()
    choices = [str(choice) for choice in getattr(entry, "options", None) or []]
    fixed = [c for c in choices if not c.endswith(".safetensors") and c != EMBEDDED]
    if fixed and len(fixed) <= FEW:
        return ", ".join(fixed)
    low, high = getattr(entry, "min", None), getattr(entry, "max", None)
    return name if low is None or high is None else f"{name}, {low} to {high}"


def default(entry: Any) -> str:
    """What counts when nothing is connected or typed."""
    value = getattr(entry, "default", None)
    if value is None:
        return "nothing" if entry.optional else ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) if value != "" else "empty"


# Texts


def node_texts(schema: Any) -> dict[str, Any]:
    """Of nodeDefs.json, from which translations start."""
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {
            entry.id: {"name": entry.display_name or entry.id, "tooltip": entry.tooltip}
            for entry in schema.inputs
        },
        "outputs": {
            str(slot): {"name": output_name(entry), "tooltip": entry.tooltip}
            for slot, entry in enumerate(schema.outputs)
        },
    }


def page_files() -> dict[Path, str]:
    """Every generated file of web/docs/ and locales/en/, and its text."""
    listed, written, codes = schemas(), read_help(), read_codes()
    files = {
        DOCS / f"{schema.node_id}.md": page(schema, written.get(schema.node_id), codes)
        for schema in listed
    }
    categories = dict.fromkeys(part for schema in listed for part in schema.category.split("/"))
    texts = {schema.node_id: node_texts(schema) for schema in listed}
    files[LOCALES / "nodeDefs.json"] = as_json(texts)
    files[LOCALES / "main.json"] = as_json({"nodeCategories": {name: name for name in categories}})
    return files
