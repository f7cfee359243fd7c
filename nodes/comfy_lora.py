"""A LoRA as the core reads it -> the patches by which ComfyUI changes a MODEL and a CLIP.

The core reads, checks and refuses, as on the command line; ComfyUI's patcher puts the changes on
the weights, so that fp8, offloaded weights and dynamic VRAM go on working.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, WeightAdapterBase
from torch import Tensor

from ..sd3_core.adapters.changes import Adapter, Change, LoHa, LoKr, LoRA, LowRank
from ..sd3_core.checkpoints import lora_keys
from ..sd3_core.checkpoints.header import read_header
from ..sd3_core.checkpoints.layouts import TITLES
from ..sd3_core.checkpoints.lora_files import LoRAFile, parts_that_fit, read_lora
from .comfy_text import MODULES
from .errors import coded
from .wires import widths_of

Target = str | tuple[str, tuple[int, int, int]]  # a parameter, or (axis, start, length) of it
Patches = dict[Target, Any]
_PREFIXES = {"mmdit": "diffusion_model."} | {
    kind: f"{module}.transformer." for kind, module in MODULES.items()
}


@dataclass(frozen=True)
class Found:
    """What a LoRA changes here.

    model, clip: patches, in as many rounds as one parameter has.  matched, unmatched: layers as the
    file names them, changed and not.
    """

    model: list[Patches]
    clip: list[Patches]
    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    notes: tuple[str, ...]


@torch.inference_mode(False)  # patches may end up in a training run
def find_patches(path: Path, model: Any, clip: Any) -> Found:
    """The patches of a LoRA file for this MODEL and CLIP, which may be None.

    Raises NodeError with the core's sentence for a file that is damaged, no LoRA, or for another
    model; and for a MODEL that is no SD3.
    """
    widths_of(model)
    shapes = _shapes(model.model, ["mmdit"])
    if clip is not None:
        shapes |= _shapes(clip.cond_stage_model, MODULES)
    with coded("bad_file"):
        read_header(path)
    with coded("wrong_lora"):
        lora = read_lora(path, tuple(shapes))
        parts = parts_that_fit(path.name, lora, shapes)
        texts = {kind: part for kind, part in parts.items() if kind != "mmdit"}
        merged = {id(adapter) for part in parts.values() for adapter in part}
        matched = [
            name for name, adapters in lora.layers.items() if any(id(a) in merged for a in adapters)
        ]
        return Found(
            model=_rounds(_patches("mmdit", parts.get("mmdit", ()), shapes)),
            clip=_rounds(p for kind, part in texts.items() for p in _patches(kind, part, shapes)),
            matched=tuple(matched),
            unmatched=tuple(_unmatched(lora, set(matched))),
            notes=(*lora.report.warnings, *_absent(path, lora, shapes)),
        )


def _shapes(network: Any, kinds: Iterable[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The parameters of the networks in a MODEL or CLIP, by the core's names."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    tensors = network.state_dict() | dict(network.named_parameters())  # which are never packed
    for name, tensor in tensors.items():
        for kind in kinds:
            if name.startswith(prefix := _PREFIXES[kind]):
                found.setdefault(kind, {})[name.removeprefix(prefix)] = tuple(tensor.shape)
    return found


def _unmatched(lora: LoRAFile, matched: set[str]) -> Iterator[str]:
    yield from (name for name in lora.layers if name not in matched)
    rest = lora_keys.sort_keys(lora.report.unmatched)
    yield from (name for name in rest.groups if name not in lora.layers)
    yield from (*rest.strangers, *rest.embeddings)


def _absent(path: Path, lora: LoRAFile, shapes: Mapping[str, Any]) -> Iterator[str]:
    if absent := [TITLES[kind] for kind in lora.parts if kind not in shapes]:
        yield f"{path.name}: changes {', '.join(absent)} too, which is not connected."


# One change


def _patches(
    kind: str, adapters: LoRA, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> Iterator[tuple[Target, Any]]:
    for adapter in adapters:
        outputs, *others = shapes[kind][adapter.name]
        name = _PREFIXES[kind] + adapter.name
        if adapter.rows is None:
            yield name, _patch(adapter, (outputs, *others))
        else:
            start, length = adapter.rows
            yield (name, (0, start, length)), _patch(adapter, (length, *others))


def _rounds(patches: Iterable[tuple[Target, Any]]) -> list[Patches]:
    """Patches in tables, since a parameter with several takes one of a table."""
    rounds: list[Patches] = []
    for target, patch in patches:
        free = next((taken for taken in rounds if target not in taken), None)
        if free is None:
            rounds.append(free := {})
        free[target] = patch
    return rounds


def _patch(adapter: Adapter, shape: tuple[int, ...]) -> Any:
    """shape: of the rows that it changes."""
    change, magnitude = adapter.change, adapter.magnitude
    if adapter.norms_changed:
        return CoreAdapter.of(adapter)
    if isinstance(change, LowRank):
        weights = (change.up, change.down, change.alpha, change.mid, magnitude, None)
        return LoRAAdapter(set(), weights)
    if isinstance(change, LoHa):
        first, second = (change.w1_a, change.w1_b), (change.w2_a, change.w2_b)
        weights = (*first, change.alpha, *second, change.t1, change.t2, magnitude)
        return LoHaAdapter(set(), weights)
    if isinstance(change, LoKr):
        if change.t2 is not None:  # ComfyUI 0.33 fails on a core that is not contiguous
            return CoreAdapter.of(adapter)
        halves = (change.w1_a, change.w1_b, change.w2_a, change.w2_b)
        weights = (change.w1, change.w2, change.alpha, *halves, None, magnitude)
        return LoKrAdapter(set(), weights)
    return ("diff", (change.delta().reshape(shape),))


class CoreAdapter(WeightAdapterBase):
    """A change that ComfyUI does not compute as it is meant, computed by the core.

    weights: the change's kind, its fields, the magnitude, whether that norms the changed weight.
    """

    name = "sd3_workbench"
    KINDS: dict[str, type[Change]] = {kind.__name__: kind for kind in (LowRank, LoHa, LoKr)}

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]):
        self.loaded_keys = loaded_keys  # ComfyUI makes another of the same when it moves tensors
        self.weights = weights

    @classmethod
    def of(cls, adapter: Adapter) -> "CoreAdapter":
        change = adapter.change
        values = tuple(getattr(change, field.name) for field in fields(change))
        rule = (adapter.magnitude, adapter.norms_changed)
        return cls(set(), (type(change).__name__, values, *rule))

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weights: Any = None,
    ) -> Tensor:
        """weight: what is left of the layer's rows after `offset`; changed where it is."""
        kind, values, magnitude, norms_changed = self.weights
        change = self.KINDS[kind](*values)
        adapter = Adapter("", change, magnitude=magnitude, norms_changed=norms_changed)
        return weight.copy_(adapter.to(weight.device).apply(weight.float(), strength))
