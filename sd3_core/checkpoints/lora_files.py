"""LoRA files: read in every dialect that `lora_keys` knows, written in three.

A file is read into memory, not mapped, so that it can be replaced while the LoRA is in use.
"""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.changes import Adapter, LoRA, LowRank
from ..errors import CheckpointError
from ..lora import check_fit
from . import lora_keys
from .header import Header, is_folder, read_header
from .layouts import TITLES
from .lora_adapters import adapters_of
from .lora_keys import LOADED, Keys, Place, kind_of
from .lora_refusals import check_dtypes, check_finite, check_for_sd3, check_supported
from .lora_tensors import DIALECTS, named_tensors
from .peft_config import WEIGHTS, config_file, read_settings
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
    """A LoRA for up to four networks: parts["mmdit"], ["clip_l"], ["clip_g"], ["t5"].

    layers: the adapters by the name that the file has for their layer; none where it means nothing.
    settings: PEFT's file beside it, from which the scales are.
    """

    parts: dict[str, LoRA]
    report: LoRAReport
    metadata: dict[str, str] = field(default_factory=dict)
    layers: dict[str, LoRA] = field(default_factory=dict)
    settings: Path | None = None


# Reading

IN_FOLDER = (WEIGHTS, "pytorch_lora_weights.safetensors")  # as PEFT and diffusers name them


def lora_path(path: str | Path) -> Path:
    """The LoRA file that a path means: itself, or the one in a folder that PEFT or diffusers wrote.

    Raises CheckpointError for a folder without one, or with several.
    """
    path = Path(path)
    if not is_folder(path):
        return path
    if found := lora_in(path) or _only(path.glob("*.safetensors")):
        return found
    inside = [file.name for file in sorted(path.glob("*.safetensors")) or sorted(path.iterdir())]
    raise CheckpointError(
        f"{path}: is a folder without {' or '.join(IN_FOLDER)}, or with several (it holds "
        f"{name_list(inside) or 'nothing'}). Name a .safetensors file in it."
    )


def lora_in(folder: Path) -> Path | None:
    """The LoRA in a folder of PEFT or diffusers, by its name; None for other folders."""
    # an adapter with a name of its own lies in a folder of that name
    places = [place + name for name in IN_FOLDER for place in ("", "*/")]
    return next((found for place in places if (found := _only(folder.glob(place)))), None)


def _only(found: Iterable[Path]) -> Path | None:
    files = list(found)
    return files[0] if len(files) == 1 else None


def read_lora(path: str | Path, loaded: Collection[str] = LOADED) -> LoRAFile:
    """The adapters of a LoRA file, or of a folder with one (`lora_path`), by network.

    loaded: the networks there are, which decides what a few old names mean (`lora_keys.place`).
    A scale is the file's own alpha, else PEFT's settings (`peft_config`), else 1.
    Warns, and says so in the report, when only a part is understood or when the file acts at
    another strength than it was trained at.  Raises CheckpointError when the file is no LoRA, is
    one for another model, an adapter is incomplete, or its method or quantisation is not supported.
    """
    header = read_header(lora_path(path))
    keys = lora_keys.sort_keys(header.tensors)
    check_supported(header, keys)
    groups = {name: roles for name, roles in keys.groups.items() if kind_of(roles) is not None}
    places = {
        name: place for name in groups if (place := lora_keys.place(name, loaded)) is not None
    }
    check_for_sd3(header, keys, groups, places)
    check_dtypes(header, keys, [groups[name] for name in places])
    peft = _peft_scales(header, groups, places)
    tensors = read_tensors(header, [key for name in places for key in groups[name].values()])
    check_finite(header, tensors)
    parts: dict[str, list[Adapter]] = {}
    layers: dict[str, tuple[Adapter, ...]] = dict.fromkeys(groups, ())
    for name, place in places.items():
        given = {role: tensors[key] for role, key in groups[name].items()}
        if place.component == "clip_l" and place.module == "text_projection":
            continue  # SD3 does not project L
        layers[name] = tuple(
            adapters_of(header.path.name, name, place, given, peft.scales.get(name))
        )
        parts.setdefault(place.component, []).extend(layers[name])
    used = {key for name in places for key in groups[name].values()}
    unmatched = tuple(key for key in header.tensors if key not in used)
    notes = (
        *_partial(header, len(used), unmatched, keys),
        *_split_qkv(header, parts),
        *peft.notes,
    )
    for note in notes:
        warnings.warn(note, stacklevel=2)
    report = LoRAReport(lora_keys.dialect(groups), len(used), unmatched, notes)
    return LoRAFile(
        parts={kind: tuple(part) for kind, part in parts.items()},
        report=report,
        metadata=header.metadata,
        layers=layers,
        settings=peft.file,
    )


def parts_that_fit(
    file: str, lora: LoRAFile, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, LoRA]:
    """The adapters whose parameter is there, by network.

    shapes: of the networks there are, by network, then by parameter.  Raises CheckpointError when
    the LoRA changes none of these networks, or is for others of their kind (`check_fit`).
    """
    parts: dict[str, LoRA] = {}
    for kind, adapters in lora.parts.items():
        if adapters and kind in shapes:
            try:
                parts[kind] = check_fit(adapters, shapes[kind])
            except CheckpointError as error:
                raise CheckpointError(f"{file}: {error}") from error
    if not parts:
        changed = ", ".join(TITLES[kind] for kind in lora.parts) or "nothing that is used"
        raise CheckpointError(
            f"{file}: changes {changed} alone, and only "
            f"{', '.join(TITLES[kind] for kind in shapes)} is there. Add what it changes, or leave "
            f"the LoRA away."
        )
    return parts


@dataclass(frozen=True)
class _Scales:
    """scales: by name.  notes: what is in doubt.  file: from which they are, if not the header."""

    scales: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    file: Path | None = None


def _peft_scales(
    header: Header, groups: Mapping[str, Mapping[str, str]], places: Mapping[str, Place]
) -> _Scales:
    """PEFT's scales of the adapters without an alpha of their own.

    Raises CheckpointError as `peft_config.read_settings`.
    """
    bare = [
        name
        for name in places
        if "alpha" not in groups[name] and kind_of(groups[name]) != "difference"
    ]
    if not bare:
        return _Scales()
    from_peft = lora_keys.is_from_peft(bare)
    settings = read_settings(header, config_file(header, from_peft))
    if settings is None:
        return _Scales(notes=(_unsaid(header),) if from_peft else ())
    shapes = {key: info.shape for key, info in header.tensors.items()}
    scales: dict[str, float] = {}
    fault = settings.fault
    for name in bare:
        config = settings.of(places[name].component)
        if config is None:
            continue
        module = lora_keys.module_of(name)
        rank = lora_keys.rank_of(groups[name], shapes)
        if rank is not None and rank != config.rank_of(module):
            fault = f"they say rank {config.rank_of(module)} for {module}, its tensors have {rank}"
        scales[name] = config.scale_of(module)
    if fault:
        return _Scales(
            notes=(
                f"{header.path.name}: PEFT's settings in {settings.place} cannot be used "
                f"({fault}); it acts with alpha = rank",
            )
        )
    return _Scales(scales, file=settings.file)


def _unsaid(header: Header) -> str:
    return (
        f"{header.path.name}: was saved by PEFT, which keeps the strength in adapter_config.json; "
        f"without that beside it, it acts with alpha = rank"
    )


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
