"""What a run is taught from, item by item: a hash of it all tells that it differs, not where."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.save import save_bytes
from ..plain_text import as_json
from ..reading import LARGEST_TEXT, read_regular
from .report import some_names

PARTS = ("captions", "picture", "size, crop, repeats, weight or prior")

Contents = Mapping[str, Sequence[str]]  # by the item's name a short hash of each of its PARTS


def short_hash(value: object) -> str:
    """48 bits of a value's repr."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def changes(known: Contents, now: Contents) -> list[str]:
    """What happened to the items since, a line for each kind of change."""
    removed = [name for name in known if name not in now]
    added = [name for name in now if name not in known]
    renamed = _renamed(known, now, removed, added)
    new_names = set(renamed.values())
    lists = {
        "added": [name for name in added if name not in new_names],
        "removed": [name for name in removed if name not in renamed],
        "renamed": [f"{old} -> {new}" for old, new in renamed.items()],
    }
    both = [name for name in known if name in now]
    for index, part in enumerate(PARTS):
        lists[f"{part} changed"] = [n for n in both if known[n][index] != now[n][index]]
        if part == "picture":  # another one may well be of another size
            both = [name for name in both if known[name][index] == now[name][index]]
    lines = [f"{what}: {some_names(names)}" for what, names in lists.items() if names]
    return lines or ["the same ones, drawn in another order or share"]


def _renamed(
    known: Contents, now: Contents, removed: Sequence[str], added: Sequence[str]
) -> dict[str, str]:
    """Old name -> new name of items that are otherwise the same."""
    waiting: dict[tuple[str, ...], list[str]] = {}
    for name in added:
        waiting.setdefault(tuple(now[name]), []).append(name)
    found = {}
    for name in removed:
        if names := waiting.get(tuple(known[name])):
            found[name] = names.pop(0)
    return found


def write_contents(
    path: Path, contents: Mapping[str, Contents], identity: Mapping[str, Any]
) -> None:
    """Keep the contents behind these entries of an identity, each with the entry it stands for."""
    stored = {
        name: {"identity": identity[name], "items": dict(items)} for name, items in contents.items()
    }
    save_bytes(path, as_json(stored).encode(), aside=False)


def read_contents(path: Path, identity: Mapping[str, Any]) -> dict[str, Contents]:
    """The contents that stand for entries of this identity; without a sound file none."""
    try:
        stored = json.loads(read_regular(path, LARGEST_TEXT))
        return {
            name: {item: tuple(hashes) for item, hashes in one["items"].items()}
            for name, one in stored.items()
            if one["identity"] == identity[name]
            and all(len(hashes) == len(PARTS) for hashes in one["items"].values())
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
