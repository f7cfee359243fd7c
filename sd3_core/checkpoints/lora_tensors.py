"""Adapters as the named tensors of a LoRA file, in the three dialects that we write."""

import re
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from ..adapters.changes import Adapter, Change, Difference, LoHa, LoRA, LowRank
from ..errors import CheckpointError
from .diffusers import mmdit_rows, swap_halves

DIALECTS = ("comfy", "kohya", "diffusers")
_PREFIXES = {  # of the names we write; modules follow with dots, in kohya's with underscores
    "comfy": {
        "mmdit": "diffusion_model.",
        "clip_l": "text_encoders.clip_l.transformer.",
        "clip_g": "text_encoders.clip_g.transformer.",
        "t5": "text_encoders.t5xxl.transformer.",
    },
    "kohya": {
        "mmdit": "lora_unet_",
        "clip_l": "lora_te1_",
        "clip_g": "lora_te2_",
        "t5": "lora_te3_",
    },
    "diffusers": {
        "mmdit": "transformer.",
        "clip_l": "text_encoder.",
        "clip_g": "text_encoder_2.",
        "t5": "text_encoder_3.",
    },
}


def named_tensors(dialect: str, component: str, adapters: LoRA) -> dict[str, Tensor]:
    """The tensors of one network's adapters; see `lora_files.save_lora`.

    Raises CheckpointError for an adapter that the dialect cannot express.
    """
    if dialect == "diffusers":
        return _diffusers_tensors(component, adapters)
    return _native_tensors(dialect, component, adapters)


def _native_tensors(dialect: str, component: str, adapters: LoRA) -> dict[str, Tensor]:
    """Tensors under the networks' own module names, fused q, k, v."""
    tensors: dict[str, Tensor] = {}
    for adapter in _fused(adapters):
        module = adapter.module or adapter.parameter
        if dialect == "kohya":
            module = module.replace(".", "_")
        name = _PREFIXES[dialect][component] + module
        suffix = "_b" if adapter.parameter == "bias" else ""
        named = {f"{name}.{role}": t for role, t in _role_tensors(adapter.change, suffix).items()}
        if adapter.norms_changed:
            raise CheckpointError(
                f"PEFT's DoRA of {adapter.name} cannot be written in these names; merge it."
            )
        if adapter.magnitude is not None:
            named[f"{name}.dora_scale"] = adapter.magnitude
        if named.keys() & tensors.keys():
            raise CheckpointError(f"two changes of {adapter.name} cannot be written in one file.")
        tensors |= named
    return tensors


def _role_tensors(change: Change, suffix: str) -> dict[str, Tensor]:
    """Tensors by the end of their keys."""
    if isinstance(change, Difference):
        return {"diff" + suffix: change.value}
    prefix = "hada_" if isinstance(change, LoHa) else "lokr_"
    names = {"up": "lora_up.weight", "down": "lora_down.weight", "mid": "lora_mid.weight"}
    named: dict[str, Tensor] = {}
    for field in fields(change):
        value = getattr(change, field.name)
        if field.name == "alpha" and change.rank is not None:
            named["alpha"] = torch.tensor(float(change.rank if value is None else value))
        elif isinstance(value, Tensor):
            low_rank = isinstance(change, LowRank)
            named[names[field.name] if low_rank else prefix + field.name] = value
    return named


def _fused(adapters: LoRA) -> list[Adapter]:
    """Adapters of whole layers: changes of q, k and v alone become one of the stacked qkv."""
    whole = [adapter for adapter in adapters if adapter.rows is None]
    sliced: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        if adapter.rows is not None:
            sliced.setdefault(adapter.name, []).append(adapter)
    return whole + [_stacked(slices) for slices in sliced.values()]


def _stacked(slices: Sequence[Adapter]) -> Adapter:
    """One low-rank change of rank r1 + r2 + r3: downs stacked, ups block-diagonal, scale 1.

    With alpha left at r this would act at a third of its strength, which is sd-scripts' mistake.
    """
    first = slices[0]
    changes = [_plain_low_rank(adapter) for adapter in slices]
    rank = sum(change.rank for change in changes)
    down = torch.cat([change.down.flatten(1) for change in changes])
    up = torch.zeros(3 * changes[0].up.shape[0], rank)
    column = 0
    for adapter, change in zip(slices, changes, strict=True):
        start, length = adapter.rows or (0, 0)
        block = up[start : start + length, column : column + change.rank]
        block.copy_(change.up.float().flatten(1) * change.scale)
        column += change.rank
    return Adapter(first.module, LowRank(down, up, float(rank)), first.parameter)


def _plain_low_rank(adapter: Adapter) -> LowRank:
    change = adapter.change
    if not isinstance(change, LowRank) or change.mid is not None or adapter.magnitude is not None:
        raise CheckpointError(
            f"the change of {adapter.name} is no plain LoRA and cannot be written in these names; "
            f"use the dialect comfy, or merge it."
        )
    return change


def _diffusers_tensors(component: str, adapters: LoRA) -> dict[str, Tensor]:
    """PEFT's tensors: B carries the scale, q, k and v share the fused change's A."""
    tensors: dict[str, Tensor] = {}
    for adapter in adapters:
        change = _plain_low_rank(adapter)
        if adapter.parameter != "weight":
            raise CheckpointError(f"diffusers' LoRA has no place for a change of {adapter.name}.")
        up = change.up.float() * change.scale
        for name, rows in _their_rows(component, adapter, up):
            key = f"{_PREFIXES['diffusers'][component]}{name}"
            tensors[f"{key}.lora_A.weight"] = change.down
            tensors[f"{key}.lora_B.weight"] = rows
    return tensors


def _their_rows(component: str, adapter: Adapter, up: Tensor) -> list[tuple[str, Tensor]]:
    """(diffusers' module, its rows of up) for each module of diffusers that an adapter touches."""
    if component != "mmdit":
        return [(adapter.module, up)]
    block = re.match(r"joint_blocks\.(\d+)", adapter.module)
    rows = mmdit_rows(depth=1 if block is None else int(block[1]) + 1)
    row = next(row for row in rows if row.ours == adapter.module)
    if adapter.rows is not None:
        return [(row.theirs[adapter.rows[0] // adapter.rows[1]], up)]
    # Only the last block's context and the final layer modulate by two chunks, stored swapped.
    if row.swapped and up.shape[0] == 2 * adapter.change.shape[1]:
        up = swap_halves(up)
    return list(zip(row.theirs, up.chunk(len(row.theirs)), strict=True))
