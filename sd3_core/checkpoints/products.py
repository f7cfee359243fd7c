"""What a file says of the products of its scaled fp8 layers, for programs that multiply in fp8.

Where the core computes, weights are unscaled first and products have the computation's precision.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from .header import shown
from .layouts import Component
from .sources import Source
from .stored import Part
from .tensors import map_tensors

NOTE = "comfy_quant"  # ComfyUI's note beside a weight: JSON in bytes
NOTES = "_quantization_metadata"  # the same for all layers, in the file's metadata
MARKER = "scaled_fp8"  # of the older spelling; of two elements it asks for full precision
INPUT_SCALES = ("input_scale", "scale_input")
FULL_PRECISION = "full_precision_matrix_mult"


@dataclass(frozen=True)
class Product:
    """Of one layer.  input_scale: float32 [], by which an input in fp8 is divided; None: 1."""

    full_precision: bool = False
    input_scale: Tensor | None = None

    def note(self, form: str) -> Mapping[str, object]:
        """ComfyUI's note; form: its name of the weight's dtype."""
        return {"format": form} | ({FULL_PRECISION: True} if self.full_precision else {})


def read_products(component: Component) -> dict[str, Product]:
    """By module, for the scaled weights that are stored in one piece.  Raises CheckpointError."""
    stated = _stated(component)
    return {
        name.rpartition(".")[0]: _product(component, source.parts[0], stated)
        for name, source in component.sources.items()
        if is_whole(source)
    }


def is_whole(source: Source) -> bool:
    return len(source.parts) == 1 and any(source.scales)


def _product(component: Component, weight: Part, stated: Mapping[str, object] | None) -> Product:
    module, tensors = weight.key.rpartition(".")[0], weight.header.tensors
    marker = tensors.get(f"{component.prefix}{MARKER}")
    note: object = None
    if stated is not None and module in stated:
        note = stated[module]
    elif f"{module}.{NOTE}" in tensors:
        stored = map_tensors(weight.header, [f"{module}.{NOTE}"])
        note = _parsed(component, module, bytes(stored[f"{module}.{NOTE}"].flatten().tolist()))
    elif marker is not None and stated is None:
        note = {FULL_PRECISION: marker.elements == 2}
    wanted = isinstance(note, dict) and bool(note.get(FULL_PRECISION, False))
    return Product(wanted, next(_input_scales(component, weight, module), None))


def _input_scales(component: Component, weight: Part, module: str) -> Iterator[Tensor]:
    for key in (f"{module}.{end}" for end in INPUT_SCALES):
        info = weight.header.tensors.get(key)
        if info is None:
            continue
        if info.elements != 1 or not info.dtype.is_floating_point:
            raise CheckpointError(
                f"{component.file.name}: {shown(key)} is {list(info.shape)} of {info.dtype}, where "
                "one number scales a layer's input. Get another version of the file."
            )
        yield map_tensors(weight.header, [key])[key].to(torch.float32, copy=True).reshape(())


def _stated(component: Component) -> Mapping[str, object] | None:
    """By the layer's full stored name; None where the file's metadata says nothing."""
    text = component.metadata.get(NOTES)
    if text is None:
        return None
    found = _parsed(component, NOTES, text.encode())
    layers = found.get("layers") if isinstance(found, dict) else None
    if not isinstance(layers, dict):
        raise CheckpointError(
            f"{component.file.name}: its {NOTES} names no layers. Download the file again."
        )
    return layers


def _parsed(component: Component, name: str, text: bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{component.file.name}: what it says of the quantisation of {shown(name)} is no JSON. "
            "Download the file again."
        ) from error
