"""LoRA files -> patches on a MODEL and a CLIP, by ComfyUI's own patching."""

import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch
from comfy_api.latest import io
from torch import Tensor

from ..sd3_core.checkpoints.header import read_header
from ..sd3_core.checkpoints.tensors import read_tensors
from ._compat import advanced, schema
from .errors import NodeError, coded
from .files import files_fingerprint, find_file, name_fault, safetensors_in
from .wires import CATEGORY, origin_of, report, set_origin, with_lora

LISTED = 20  # names of a kind in a report
# What stands behind a layer's name in a LoRA file.
_ENDING = re.compile(
    r"\.(?:lora_(?:up|down|mid|A|B)(?:\.default)?(?:\.weight)?|lora\.(?:up|down)\.weight"
    r"|lora_linear_layer\.(?:up|down)\.weight|alpha|dora_scale|diff(?:_b)?|set_weight"
    r"|hada_\w+|lokr_\w+|oft_\w+|[abwxy]_norm|reshape_weight|norm|bias|magnitude_vector)$"
)


@dataclass(frozen=True)
class Matched:
    """Which layers of a file found their place."""

    model: dict[str, Any]  # ComfyUI's patches, by parameter
    clip: dict[str, Any]
    matched: tuple[str, ...]  # layers as the file names them
    unmatched: tuple[str, ...]


@torch.inference_mode(False)  # patches may end up in a training run
def read_lora(path: Path) -> dict[str, Tensor]:
    """Raises CheckpointError for anything but a whole safetensors file."""
    return read_tensors(read_header(path))


def layer_names(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(_ENDING.sub("", key) for key in keys))


def match(tensors: Mapping[str, Tensor], model: Any, clip: Any) -> Matched:
    """The patches of a LoRA for this MODEL and CLIP; either may be None."""
    tensors = comfy.lora_convert.convert_lora(dict(tensors))
    of_model: dict[str, Any] = {}
    of_clip: dict[str, Any] = {}
    if model is not None:
        of_model = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        of_clip = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    names = layer_names(tensors)
    known = {**of_model, **of_clip}
    return Matched(
        model=comfy.lora.load_lora(tensors, of_model, log_missing=False),
        clip=comfy.lora.load_lora(tensors, of_clip, log_missing=False),
        matched=tuple(name for name in names if name in known),
        unmatched=tuple(name for name in names if name not in known),
    )


def check_match(found: Matched, path: Path) -> None:
    """Raises NodeError when the LoRA changes nothing here."""
    if not found.model and not found.clip:
        raise NodeError(
            "wrong_lora",
            f"{path.name}: none of its {len(found.unmatched)} layers is in this model (first: "
            f"{', '.join(found.unmatched[:3])}). It was made for another one, such as Flux or "
            "SDXL; use a LoRA for SD3.",
        )


def check_shapes(patches: Mapping[Any, Any], network: Any, path: Path) -> None:
    """Raises NodeError when a low-rank change does not fit its parameter."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for target, adapter in patches.items():
        name, part = (target, None) if isinstance(target, str) else (target[0], target[1])
        up, down = getattr(adapter, "weights", (None, None))[:2]
        shape = shapes.get(name)
        if shape is None or not (torch.is_tensor(up) and torch.is_tensor(down)):
            continue
        rows = part[2] if part else shape[0]
        if type(adapter).__name__ == "LoRAAdapter" and (up.shape[0], down.shape[1]) != (
            rows,
            shape[1],
        ):
            raise NodeError(
                "wrong_lora",
                f"{path.name}: its change of {name} is {up.shape[0]} x {down.shape[1]}, the "
                f"model's layer {rows} x {shape[1]}. It was made for another size of SD3 (Medium "
                "and Large differ); use the model it was trained on.",
            )


class SD3LoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3LoadLoRA",
                "display_name": "SD3 Load LoRA",
                "category": f"{CATEGORY}/loaders",
                "description": "Apply a LoRA, and say which of its layers found their place.",
                "search_aliases": ["lora", "lora loader", "lycoris", "adapter"],
                "inputs": [
                    io.Model.Input("model", tooltip="The denoiser: ours or ComfyUI's SD3."),
                    *advanced(
                        [
                            io.Clip.Input(
                                "clip",
                                optional=True,
                                tooltip="The text encoders, for a LoRA that changes them too.",
                            )
                        ]
                    ),
                    io.Combo.Input(
                        "lora_name",
                        options=safetensors_in("loras"),
                        tooltip="A .safetensors file in models/loras: kohya, diffusers (PEFT), "
                        "OneTrainer or ComfyUI names.",
                    ),
                    io.Float.Input(
                        "strength",
                        default=1.0,
                        min=-100.0,
                        max=100.0,
                        step=0.01,
                        tooltip="How much of the change is applied; 0 is none.",
                    ),
                ],
                "outputs": [
                    io.Model.Output(tooltip="The denoiser with the LoRA."),
                    io.Clip.Output(tooltip="The text encoders with the LoRA."),
                ],
            }
        )

    @classmethod
    def validate_inputs(cls, lora_name: str) -> bool | str:
        return name_fault("loras", lora_name) or True

    @classmethod
    def fingerprint_inputs(
        cls, lora_name: str, strength: float, model: Any = None, clip: Any = None
    ) -> str:
        return files_fingerprint(("loras", lora_name))

    @classmethod
    def execute(
        cls, model: Any, lora_name: str, strength: float, clip: Any = None
    ) -> io.NodeOutput:
        path = find_file("loras", lora_name)
        with coded("bad_file"):
            found = match(read_lora(path), model, clip)
        check_match(found, path)
        check_shapes(found.model, model.model, path)
        if clip is not None:
            check_shapes(found.clip, clip.cond_stage_model, path)
        if strength != 0:
            model, clip = patched(model, clip, found, path, strength)
        contents = {
            "file": path.name,
            "strength": strength,
            "matched": len(found.matched),
            "unmatched": len(found.unmatched),
            "unmatched_names": list(found.unmatched[:LISTED]),
            "model_patches": len(found.model),
            "clip_patches": len(found.clip),
        }
        return io.NodeOutput(model, clip, ui=report(contents))


def patched(model: Any, clip: Any, found: Matched, path: Path, strength: float) -> tuple[Any, Any]:
    """Clones of MODEL and CLIP that carry the patches."""
    model = model.clone()
    added = model.add_patches(found.model, strength)
    set_origin(model, with_lora(origin_of(model), path, strength, len(added)))
    if clip is not None:
        clip = clip.clone()
        clip.add_patches(found.clip, strength)
    return model, clip


# Strength of what is on a model already


def has_lora(patcher: Any) -> bool:
    """Whether anything is added to the weights; a merged model's own patches do not count."""
    return any(is_added(patch) for patches in patcher.patches.values() for patch in patches)


def is_added(patch: tuple[Any, ...]) -> bool:
    """ComfyUI's (strength, change, strength of the weight itself, ...).

    A merge, such as ModelMergeAdd's, has another model's weight and its patches, a list.
    """
    return patch[2] == 1.0 and not isinstance(patch[1], list)


def with_lora_strength(patcher: Any, factor: float) -> Any:
    """A clone on which every LoRA's strength is multiplied; at 0 they are gone."""
    clone = patcher.clone()
    clone.patches = {}
    for name, patches in patcher.patches.items():
        kept = [
            (patch[0] * factor, *patch[1:]) if is_added(patch) else patch
            for patch in patches
            if factor != 0 or not is_added(patch)
        ]
        if kept:
            clone.patches[name] = kept
    clone.patches_uuid = uuid.uuid4()  # by which ComfyUI knows that the weights are others
    return clone
