"""LoRA files on a MODEL and a CLIP; the strength of those that are there."""

import uuid
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..sd3_core.checkpoints import peft_config
from ._compat import advanced, schema
from .comfy_lora import Found, find_patches
from .files import files_fingerprint, find_file, name_fault, safetensors_in
from .wires import CATEGORY, origin_of, report, set_origin, with_lora

LISTED = 20  # names of a kind in a report


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
        return files_fingerprint(("loras", lora_name)) + settings_beside(lora_name)

    @classmethod
    def execute(
        cls, model: Any, lora_name: str, strength: float, clip: Any = None
    ) -> io.NodeOutput:
        path = find_file("loras", lora_name)
        found = find_patches(path, model, clip)
        if strength != 0:
            model, clip = patched(model, clip, found, path, strength)
        contents = {
            "file": path.name,
            "strength": strength,
            "matched": len(found.matched),
            "unmatched": len(found.unmatched),
            "unmatched_names": list(found.unmatched[:LISTED]),
            "model_patches": sum(map(len, found.model)),
            "clip_patches": sum(map(len, found.clip)),
            "notes": list(found.notes),
        }
        return io.NodeOutput(model, clip, ui=report(contents))


def settings_beside(lora_name: str | None) -> str:
    """When the settings that PEFT may have left beside a file last changed."""
    if lora_name is None:
        return ""
    file = find_file("loras", lora_name).parent / peft_config.FILE
    return f"|{file.stat().st_mtime_ns}" if file.is_file() else ""


def patched(model: Any, clip: Any, found: Found, path: Path, strength: float) -> tuple[Any, Any]:
    """Clones of MODEL and CLIP that carry the patches."""
    model = model.clone()
    added = sum(len(model.add_patches(patches, strength)) for patches in found.model)
    set_origin(model, with_lora(origin_of(model), path, strength, added))
    if clip is not None:
        clip = clip.clone()
        for patches in found.clip:
            clip.add_patches(patches, strength)
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
