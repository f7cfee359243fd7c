"""LoRA files: read in every dialect that `lora_keys` knows, written in three.

A file is read into memory, not mapped, so that it can be replaced while the LoRA is in use.
"""

import json
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.changes import Adapter, Change, Difference, LoHa, LoKr, LoRA, LowRank
from ..errors import CheckpointError
from . import lora_keys
from .diffusers import swap_halves
from .header import Header, read_header
from .lora_keys import LOADED, Keys, Place, kind_of
from .lora_refusals import (
    GET_AGAIN,
    check_complete,
    check_dtypes,
    check_finite,
    check_for_sd3,
    check_supported,
    shapes_by_role,
)
from .lora_tensors import DIALECTS, named_tensors
from .save import save_tensors
from .stored import name_list
from .tensors import read_tensors


@dataclass(frozen=True)
class LoRAReport:
    """How much of a file was understood; counts are of keys, not of adapters."""

    dialect: str
    matched: int
    unmatched: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LoRAFile:
    """A LoRA for up to four networks: parts["mmdit"], ["clip_l"], ["clip_g"], ["t5"]."""

    parts: dict[str, LoRA]
    report: LoRAReport
    metadata: dict[str, str] = field(default_factory=dict)


# Reading


def read_lora(path: str | Path, loaded: Collection[str] = LOADED) -> LoRAFile:
    """The adapters of a LoRA file, by network.

    loaded: the networks there are, which decides what a few old names mean (`lora_keys.place`).
    Warns, and says so in the report, when only a part is understood or when the file acts at
    another strength than it was trained at.  Raises CheckpointError when the file is no LoRA, is
    one for another model, an adapter is incomplete, or its method or quantisation is not supported.
    """
    header = read_header(path)
    keys = lora_keys.sort_keys(header.tensors)
    check_supported(header, keys)
    groups = {name: roles for name, roles in keys.groups.items() if kind_of(roles) is not None}
    places = {
        name: place for name in groups if (place := lora_keys.place(name, loaded)) is not None
    }
    check_for_sd3(header, keys, groups, places)
    check_dtypes(header, keys, [groups[name] for name in places])
    tensors = read_tensors(header, [key for name in places for key in groups[name].values()])
    check_finite(header, tensors)
    parts: dict[str, list[Adapter]] = {}
    for name, place in places.items():
        given = {role: tensors[key] for role, key in groups[name].items()}
        adapters = _adapters(header.path.name, name, place, given)
        if not (place.component == "clip_l" and place.module == "text_projection"):
            parts.setdefault(place.component, []).extend(adapters)  # SD3 does not project L
    used = {key for name in places for key in groups[name].values()}
    unmatched = tuple(key for key in header.tensors if key not in used)
    notes = (
        *_partial(header, len(used), unmatched, keys),
        *_split_qkv(header, parts),
        *(() if any("alpha" in groups[name] for name in places) else _peft_scale(header)),
    )
    for note in notes:
        warnings.warn(note, stacklevel=2)
    report = LoRAReport(lora_keys.dialect(groups), len(used), unmatched, notes)
    return LoRAFile({kind: tuple(part) for kind, part in parts.items()}, report, header.metadata)


def _partial(header: Header, matched: int, unmatched: Sequence[str], keys: Keys) -> Iterable[str]:
    name = header.path.name
    if keys.embeddings:
        yield (
            f"{name}: the {len(keys.embeddings)} tensors of textual-inversion embeddings bundled "
            f"with this LoRA are not applied"
        )
    others = [key for key in unmatched if key not in keys.embeddings]
    if others:
        yield (
            f"{name}: LoRA understood in part: {matched} keys match, {len(others)} do not and are "
            f"left out (first: {name_list(others)})"
        )


def _split_qkv(header: Header, parts: Mapping[str, Sequence[Adapter]]) -> Iterable[str]:
    """sd-scripts with split_qkv=True writes rank 3r for alpha / r, so every reader takes a third.

    A file with the scale set right (ours) has scale 1 there.
    """
    split = [
        adapter.module
        for adapter in parts.get("mmdit", ())
        if adapter.module.endswith(".qkv") and _is_split(adapter)
    ]
    if split:
        yield (
            f"{header.path.name}: was trained with split q, k, v, which sd-scripts saves so that "
            f"{len(split)} attention layers act at a third of the trained strength, here as in "
            f"ComfyUI and sd-scripts (first: {split[0]})"
        )


def _is_split(adapter: Adapter) -> bool:
    """Whether q, k and v have a third of the rank each, and a scale other than 1."""
    change = adapter.change
    if not isinstance(change, LowRank) or adapter.rows is not None or change.scale == 1:
        return False
    rows, rank = change.up.flatten(1).shape
    if rows % 3 or rank % 3:
        return False
    blocks = change.up.flatten(1).reshape(3, rows // 3, 3, rank // 3)
    apart = torch.stack([blocks[i, :, j] for i in range(3) for j in range(3) if i != j])
    return not apart.any() and bool(change.up.any())


def _peft_scale(header: Header) -> Iterable[str]:
    """PEFT keeps alpha in the metadata, where ComfyUI does not look; nor do we, but we say so."""
    try:
        config = json.loads(header.metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        return
    for key, rank in config.items() if isinstance(config, dict) else ():
        alpha = config.get(f"{key[:-1]}lora_alpha") if key.split(".")[-1] == "r" else None
        if isinstance(alpha, int | float) and isinstance(rank, int) and rank and alpha != rank:
            yield (
                f"{header.path.name}: was trained with alpha {alpha:g} at rank {rank}, which its "
                f"metadata says but no .alpha tensor; it acts with alpha = rank, as in ComfyUI. "
                f"Strength {alpha / rank:g} gives the trained effect"
            )


# One adapter


def _adapters(file: str, name: str, place: Place, given: Mapping[str, Tensor]) -> list[Adapter]:
    """The changes that the tensors of one name, by role, ask for."""
    made: list[Adapter] = []
    check_complete(file, name, given)
    try:
        change = _change(given, given["alpha"].item() if "alpha" in given else None)
        if change is not None:
            made.append(_placed(place, place.parameter, change, given.get("dora_scale")))
        for role, parameter in (("diff", place.parameter), ("diff_b", "bias")):
            if role in given:
                made.append(_placed(place, parameter, Difference(given[role]), None))
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: the adapter {name} is damaged ({error}); it has {shapes_by_role(given)}. "
            f"{GET_AGAIN}"
        ) from error
    return made


def _change(given: Mapping[str, Tensor], alpha: float | None) -> Change | None:
    """None: plain differences alone."""
    kind = kind_of(given)
    if kind == "LoRA":
        return LowRank(given["down"], given["up"], alpha, given.get("mid"))
    if kind == "LoHa":
        whole = {name: given[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
        return LoHa(alpha=alpha, t1=given.get("hada_t1"), t2=given.get("hada_t2"), **whole)
    if kind == "LoKr":
        factors = {role[len("lokr_") :]: t for role, t in given.items() if role.startswith("lokr_")}
        return LoKr(alpha=alpha, **factors)
    return None


def _placed(place: Place, parameter: str, change: Change, magnitude: Tensor | None) -> Adapter:
    """The change on its parameter: its third of the rows, its halves in our order."""
    rows, columns = change.shape
    if place.swapped == "if two" and parameter == "bias":
        raise ValueError("a bias does not tell whether its block is the last")
    if place.swapped == "always" or (place.swapped == "if two" and rows == 2 * columns):
        change = _swapped(change)
        if magnitude is not None and magnitude.shape[0] == rows:
            magnitude = swap_halves(magnitude)
    if magnitude is not None and not _is_magnitude(magnitude, rows, columns):
        raise ValueError("its dora_scale is neither one per output nor one per input")
    taken = None if place.part is None else (place.part * rows, rows)
    return Adapter(place.module, change, parameter, taken, magnitude)


def _is_magnitude(magnitude: Tensor, rows: int, columns: int) -> bool:
    if magnitude.shape[:1] == (rows,):
        return magnitude.numel() == rows
    return magnitude.shape[:1] == (1,) and columns % max(magnitude.numel(), 1) == 0


def _swapped(change: Change) -> Change:
    if isinstance(change, LowRank):
        return replace(change, up=swap_halves(change.up))
    return Difference(swap_halves(change.delta()))  # of two small layers; factors do not swap


# Writing


def save_lora(
    path: str | Path,
    parts: Mapping[str, LoRA],
    dialect: str = "comfy",
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a LoRA, atomically; returns the file's path (`save_tensors` tells when it differs).

    parts: adapters by network.  dialect: "comfy" (ComfyUI's own names), "kohya" (sd-scripts'), both
    with `.alpha`; "diffusers" (PEFT's names, q, k and v apart, alpha multiplied into the tensors,
    because diffusers' loader takes none).  dtype: None is as they are.  Raises CheckpointError for
    an adapter that the dialect cannot express.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"unknown dialect {dialect!r}; choose from {', '.join(DIALECTS)}")
    tensors: dict[str, Tensor] = {}
    for component, adapters in parts.items():
        if component not in LOADED:
            raise ValueError(f"unknown network {component!r}; choose from {', '.join(LOADED)}")
        tensors |= named_tensors(dialect, component, adapters)
    stored = {
        key: tensor.detach().to("cpu", dtype if tensor.dim() else None, copy=True).contiguous()
        for key, tensor in tensors.items()  # alpha, a number, stays exact
    }
    return save_tensors(path, stored, dict(metadata or {}))
