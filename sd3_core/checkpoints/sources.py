"""How one parameter comes from stored tensors: stacked, swapped, scaled; described, then read."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .diffusers import swap_halves
from .header import shown
from .stored import Part, name_list
from .tensors import map_tensors

SCALE_NAMES = ("weight_scale", "scale_weight")  # of comfy_quant, and the older one
SCALE_SIGNS = ("comfy_quant", "input_scale", "scale_input")  # beside a weight that has a scale
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALED_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, eq=False)
class Source:
    """Where one parameter comes from: stored parts stacked along the rows.

    swapped: the halves of the rows are stored the other way round.  scales: the fp8 scale of each
    part, or None; empty when no part has one.
    """

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    swapped: bool = False
    scales: tuple[Part | None, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """As stored; float32 when the parts differ."""
        dtypes = {part.info.dtype for part in self.parts}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return sum(part.info.end - part.info.start for part in self.parts)


def make_source(
    file: Path, key: str, stored_keys: tuple[str, ...], names: Mapping[str, Part], swapped: bool
) -> Source:
    parts = tuple(names[name] for name in stored_keys)
    for part in parts:
        _check_dtype(file, part)
    shape = _stacked_shape(file, parts)
    if ".mid.attn_1." in key and key.endswith(".weight") and len(shape) == 2:
        shape = (*shape, 1, 1)  # the same map, stored as a linear layer or as a 1x1 convolution
    scales = tuple(_scale(file, name, names) for name in stored_keys)
    return Source(parts, shape, swapped, scales if any(scales) else ())


def _check_dtype(file: Path, part: Part) -> None:
    dtype = part.info.dtype
    if not dtype.is_floating_point or dtype == getattr(torch, "float8_e8m0fnu", None):
        raise CheckpointError(
            f"{file.name}: {shown(part.key)} is stored as {dtype}: a quantisation that is not "
            f"read here. Get the file in bf16, fp16 or fp8 (plain or scaled)."
        )


def _stacked_shape(file: Path, parts: tuple[Part, ...]) -> tuple[int, ...]:
    shapes = [part.info.shape for part in parts]
    if len(shapes) == 1:
        return shapes[0]
    if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
        raise CheckpointError(
            f"{file.name}: {name_list([part.key for part in parts])} do not fit on each other "
            f"({', '.join(str(list(shape)) for shape in shapes)}). Download the file again."
        )
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _scale(file: Path, name: str, names: Mapping[str, Part]) -> Part | None:
    """The fp8 scale stored beside a weight: one number, or one for each row.

    Raises CheckpointError for any other scale, and for a missing one that the file speaks of.
    """
    module, _, end = name.rpartition(".")
    if end != "weight":
        return None
    weight = names[name]
    is_fp8 = weight.info.dtype in SCALED_DTYPES
    found = [names[key] for s in SCALE_NAMES if (key := f"{module}.{s}") in names]
    if not found:
        if is_fp8 and any(f"{module}.{sign}" in names for sign in SCALE_SIGNS):
            raise CheckpointError(
                f"{file.name}: {shown(weight.key)} is scaled fp8, and its scale "
                f"{shown(weight.key + '_scale')} is missing. Download the file again."
            )
        return None
    if not is_fp8:
        raise CheckpointError(
            f"{file.name}: {shown(found[0].key)} scales a weight that is stored as "
            f"{weight.info.dtype}, where only fp8 has scales. Get another version of the file."
        )
    if not _scales_rows(found[0], weight):
        raise CheckpointError(
            f"{file.name}: {shown(found[0].key)} scales blocks of the weight: a quantisation that "
            f"is not read here. Get the file in bf16, fp16 or fp8 (plain or scaled)."
        )
    return found[0]


def _scales_rows(scale: Part, weight: Part) -> bool:
    """Whether it is one number, [rows] or [rows, 1, ...], in a precision that scales have."""
    shape, rows = scale.info.shape, weight.info.shape[:1]
    of_rows = shape[:1] == rows and all(n == 1 for n in shape[1:])
    return scale.info.dtype in SCALE_DTYPES and (scale.info.elements == 1 or of_rows)


def read_sources(sources: Mapping[str, Source]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters as stored, and the float32 scales of those that have one, by name.

    Parameters are mapped from their files, except where parts are stacked or swapped.
    """
    stored = _map_parts(sources.values())
    state = {key: _read(source, stored) for key, source in sources.items()}
    scales = {key: _read_scale(s, stored) for key, s in sources.items() if s.scales}
    return state, scales


def _map_parts(sources: Iterable[Source]) -> dict[Part, Tensor]:
    """Every stored tensor these sources name, each file mapped once."""
    by_file: dict[Path, list[Part]] = {}
    for source in sources:
        for part in (*source.parts, *(scale for scale in source.scales if scale is not None)):
            by_file.setdefault(part.header.path, []).append(part)
    mapped: dict[Part, Tensor] = {}
    for parts in by_file.values():
        tensors = map_tensors(parts[0].header, [part.key for part in parts])
        mapped.update({part: tensors[part.key] for part in parts})
    return mapped


def _read(source: Source, stored: Mapping[Part, Tensor]) -> Tensor:
    parts = [stored[part].to(source.dtype) for part in source.parts]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (swap_halves(tensor) if source.swapped else tensor).reshape(source.shape)


def _read_scale(source: Source, stored: Mapping[Part, Tensor]) -> Tensor:
    """float32, [] or [rows, 1, ...]."""
    scales = [torch.ones(1) if p is None else stored[p].float().flatten() for p in source.scales]
    if len(scales) == 1 and scales[0].numel() == 1:
        return scales[0].reshape(())
    rows = torch.cat(
        [scale.expand(part.info.shape[0]) for scale, part in zip(scales, source.parts, strict=True)]
    )
    rows = swap_halves(rows) if source.swapped else rows
    return rows.reshape(-1, *[1] * (len(source.shape) - 1))
