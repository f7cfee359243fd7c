"""Files -> MODEL, CLIP, VAE."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..sd3_core.checkpoints.family import model_preset
from ..sd3_core.checkpoints.layouts import SUPPLIERS, Component
from ..sd3_core.checkpoints.load import component_of, read_config
from ..sd3_core.errors import CheckpointError
from ..sd3_core.models.mmdit import MMDiTConfig
from ..sd3_core.settings import check_sizes
from ..sd3_core.text.encoders import ENCODERS
from ._compat import advanced, inference_dtype, schema, set_reload
from .comfy_model import AUTO, SD3VAE, WEIGHT_DTYPES, make_model
from .comfy_text import make_clip
from .errors import NodeError, coded
from .files import (
    NONE,
    choose,
    components,
    file_names,
    files_fingerprint,
    find_component,
    find_file,
    missing_note,
    name_fault,
)
from .wires import CATEGORY, Origin, describe, origin_of, report, set_origin

DTYPES = [AUTO, *WEIGHT_DTYPES]
DTYPE_TIP = (
    "How the weights are kept in memory. auto: as stored where that is small, else bf16 (float32 "
    "on hardware without bf16). fp16 can give black pictures with SD3.5."
)


# Making and remaking


def load_model(component: Component, weight_dtype: str) -> Any:
    """Our MODEL, with its file noted on it.  Raises NodeError."""
    with coded("bad_file"):
        patcher = make_model(component, weight_dtype)
        config = read_config(component)
    assert isinstance(config, MMDiTConfig)
    set_reload(patcher, reload_model, (str(component.file), weight_dtype))
    preset = model_preset(component, config)
    set_origin(patcher, replace(Origin.of({"mmdit": component}), preset=preset))
    return patcher


def dtypes_of(model: Any) -> dict[str, str]:
    dtypes = {"weights": model.model.get_dtype(), "compute": inference_dtype(model.model)}
    return {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}


def preset_of(model: Any) -> dict[str, Any]:
    """What to begin with.  Fresh nodes begin with SD3.5 Large's steps and cfg, whatever model comes
    to them; its shift and its sampler they take from it."""
    preset = origin_of(model).preset
    return {name: getattr(preset, name) for name in ("steps", "cfg", "sampler", "shift")}


def reload_model(path: str, weight_dtype: str, disable_dynamic: bool = False) -> Any:
    return make_model(component_of(path, "mmdit"), weight_dtype, disable_dynamic)


def load_vae(component: Component) -> Any:
    with coded("bad_file"):
        vae = SD3VAE(component)
    set_reload(vae.patcher, reload_vae, (str(component.file),))
    set_origin(vae.patcher, Origin.of({"vae": component}))
    return vae


def reload_vae(path: str, disable_dynamic: bool = False) -> Any:
    return SD3VAE(component_of(path, "vae"), disable_dynamic).patcher


def load_clip(parts: Mapping[str, Component], weight_dtype: str) -> Any:
    """The CLIP of these text encoders.  Raises NodeError when there is none."""
    if not parts:
        files = ", ".join(SUPPLIERS[kind] for kind in ENCODERS)
        raise NodeError(
            "missing_encoder",
            f"no text encoder was found or chosen, so no word would count. Put {files} into "
            "models/text_encoders (one of them is enough), or load the denoiser alone with SD3 "
            "Load MMDiT.",
        )
    with coded("bad_file"):
        clip = make_clip(
            parts,
            mmdit=config_beside(parts),
            weight_dtype=weight_dtype,
            embeddings=folder_paths.get_folder_paths("embeddings"),
        )
    files = tuple((kind, str(part.file)) for kind, part in parts.items())
    set_reload(clip.patcher, reload_clip, (files, weight_dtype))
    set_origin(clip.patcher, Origin.of(parts))
    return clip


def reload_clip(
    files: tuple[tuple[str, str], ...], weight_dtype: str, disable_dynamic: bool = False
) -> Any:
    parts = {kind: component_of(path, kind) for kind, path in files}
    mmdit = config_beside(parts)
    clip = make_clip(parts, mmdit=mmdit, weight_dtype=weight_dtype, plain=disable_dynamic)
    return clip.patcher


def config_beside(parts: Mapping[str, Component]) -> MMDiTConfig | None:
    """The size of the denoiser that lies in the same file as one of these encoders."""
    for part in parts.values():
        mmdit = components(part.file).get("mmdit")
        if mmdit is not None:
            config = read_config(mmdit)
            assert isinstance(config, MMDiTConfig)
            return config
    return None


def check_together(parts: Mapping[str, Component]) -> None:
    """Whether these networks are of one model.  Raises CheckpointError; needs mmdit and vae."""
    check_sizes(parts, {kind: read_config(part) for kind, part in parts.items()})


# Nodes


class SD3LoadMMDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3LoadMMDiT",
                "display_name": "SD3 Load MMDiT",
                "category": f"{CATEGORY}/loaders",
                "description": "Load the denoiser of Stable Diffusion 3 or 3.5 as a MODEL that "
                "every node of ComfyUI takes. The file is checked before a weight is read.",
                "search_aliases": ["unet", "unet loader", "diffusion model", "sd3", "sd3.5"],
                "inputs": [
                    io.Combo.Input(
                        "unet_name",
                        options=file_names("diffusion_models"),
                        tooltip="A .safetensors file in models/diffusion_models: released, split, "
                        "diffusers or fp8, the layout is told from its tensors.",
                    ),
                    io.Combo.Input("weight_dtype", options=DTYPES, default=AUTO, tooltip=DTYPE_TIP),
                ],
                "outputs": [io.Model.Output(tooltip="The denoiser, for SD3 Sample or KSampler.")],
            }
        )

    @classmethod
    def validate_inputs(cls, unet_name: str) -> bool | str:
        return name_fault("diffusion_models", unet_name) or True

    @classmethod
    def fingerprint_inputs(cls, unet_name: str, weight_dtype: str) -> str:
        return files_fingerprint(("diffusion_models", unet_name))

    @classmethod
    def execute(cls, unet_name: str, weight_dtype: str = AUTO) -> io.NodeOutput:
        component = find_component("diffusion_models", unet_name, "mmdit")
        model = load_model(component, weight_dtype)
        contents = {
            "files": describe({"mmdit": component}),
            "preset": preset_of(model),
            **dtypes_of(model),
        }
        return io.NodeOutput(model, ui=report(contents))


def encoder_input(name: str, title: str, optional: bool = False) -> Any:
    return io.Combo.Input(
        name,
        options=[AUTO, NONE, *file_names("text_encoders")],
        default=AUTO,
        optional=optional,
        tooltip=f"{title}. auto: the first that fits in models/text_encoders. none: leave it out, "
        "the model then sees zeros in its place.",
    )


def encoder_fault(name: Any) -> str | None:
    return name_fault("text_encoders", name, AUTO, NONE)


class SD3LoadTextEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3LoadTextEncoders",
                "display_name": "SD3 Load Text Encoders",
                "category": f"{CATEGORY}/loaders",
                "description": "Load CLIP-L, CLIP-G and T5 as one CLIP. Each may be left out: SD3 "
                "was trained to do without any of them.",
                "search_aliases": ["triple clip", "clip loader", "t5", "t5xxl", "text encoder"],
                "inputs": [
                    encoder_input("clip_l", "CLIP-L"),
                    encoder_input("clip_g", "CLIP-G"),
                    encoder_input("t5xxl", "T5-XXL, the largest: it reads long prompts and text"),
                    *advanced(
                        [
                            io.Combo.Input(
                                "weight_dtype",
                                options=DTYPES,
                                default=AUTO,
                                optional=True,
                                tooltip="How the weights are kept in memory. auto: as stored. "
                                "fp8_e4m3fn halves T5.",
                            )
                        ]
                    ),
                ],
                "outputs": [
                    io.Clip.Output(tooltip="For SD3 Encode Prompt or any text node of ComfyUI.")
                ],
            }
        )

    @classmethod
    def validate_inputs(cls, clip_l: str, clip_g: str, t5xxl: str) -> bool | str:
        faults = [encoder_fault(name) for name in (clip_l, clip_g, t5xxl)]
        return next(filter(None, faults), True)

    @classmethod
    def fingerprint_inputs(
        cls, clip_l: str, clip_g: str, t5xxl: str, weight_dtype: str = AUTO
    ) -> str:
        return files_fingerprint(*(("text_encoders", name) for name in (clip_l, clip_g, t5xxl)))

    @classmethod
    def execute(
        cls, clip_l: str, clip_g: str, t5xxl: str, weight_dtype: str = AUTO
    ) -> io.NodeOutput:
        choices = dict(zip(ENCODERS, (clip_l, clip_g, t5xxl), strict=True))
        chosen = {kind: choose(kind, choice, {}) for kind, choice in choices.items()}
        parts = {kind: part for kind, part in chosen.items() if part is not None}
        clip = load_clip(parts, weight_dtype)
        notes = [missing_note(k) for k, c in choices.items() if c == AUTO and k not in parts]
        return io.NodeOutput(clip, ui=report({"files": describe(parts), "notes": notes}))


class SD3LoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3LoadVAE",
                "display_name": "SD3 Load VAE",
                "category": f"{CATEGORY}/loaders",
                "description": "Load the VAE of Stable Diffusion 3 (the same for all SD3 models).",
                "search_aliases": ["vae loader", "autoencoder"],
                "inputs": [
                    io.Combo.Input(
                        "vae_name",
                        options=file_names("vae"),
                        tooltip="A .safetensors file in models/vae; a whole checkpoint will do.",
                    )
                ],
                "outputs": [io.Vae.Output(tooltip="For SD3 VAE Decode or any VAE node.")],
            }
        )

    @classmethod
    def validate_inputs(cls, vae_name: str) -> bool | str:
        return name_fault("vae", vae_name) or True

    @classmethod
    def fingerprint_inputs(cls, vae_name: str) -> str:
        return files_fingerprint(("vae", vae_name))

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        component = find_component("vae", vae_name, "vae")
        vae = load_vae(component)
        return io.NodeOutput(vae, ui=report({"files": describe({"vae": component})}))


def checkpoint_parts(
    file: Path, choices: Mapping[str, str]
) -> tuple[dict[str, Component], list[str]]:
    """All networks of a checkpoint, with what the widgets replace or add, and notes on the rest.

    Raises CheckpointError and NodeError.
    """
    inside = components(file)
    mmdit = inside.get("mmdit")
    if mmdit is None:
        find_component("checkpoints", file.name, "mmdit")  # says what is there instead
        raise NodeError("missing_part", f"{file.name} holds no denoiser.")
    parts: dict[str, Component] = {"mmdit": mmdit}
    vae = choose("vae", choices["vae"], inside, fits=lambda part: "sd3" in part.file.name.lower())
    if vae is None:
        raise NodeError(
            "missing_part",
            f"{file.name} holds no VAE. Put {SUPPLIERS['vae']} into models/vae and name it in "
            "vae_name.",
        )
    parts["vae"] = vae
    for kind in ENCODERS:
        part = choose(kind, choices[kind], inside, fits=lambda part: fits_beside(parts, part))
        if part is not None:
            parts[kind] = part
    check_together(parts)
    missing = [kind for kind in ENCODERS if choices[kind] == AUTO and kind not in parts]
    return parts, [missing_note(kind) for kind in missing]


def fits_beside(parts: Mapping[str, Component], part: Component) -> bool:
    try:
        check_together({**parts, part.kind: part})
    except CheckpointError:
        return False
    return True


class SD3LoadCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3LoadCheckpoint",
                "display_name": "SD3 Load Checkpoint",
                "category": f"{CATEGORY}/loaders",
                "description": "Load denoiser, text encoders and VAE in one step. What the "
                "checkpoint does not hold is looked for in models/text_encoders and models/vae.",
                "search_aliases": ["checkpoint loader", "sd3", "sd3.5", "load model", "tiny"],
                "inputs": [
                    io.Combo.Input(
                        "ckpt_name",
                        options=file_names("checkpoints"),
                        tooltip="A .safetensors file in models/checkpoints that holds at least "
                        "the denoiser.",
                    ),
                    *advanced(
                        [
                            encoder_input("t5xxl", "T5-XXL", optional=True),
                            encoder_input("clip_g", "CLIP-G", optional=True),
                            encoder_input("clip_l", "CLIP-L", optional=True),
                            io.Combo.Input(
                                "vae_name",
                                options=[AUTO, *file_names("vae")],
                                default=AUTO,
                                optional=True,
                                tooltip="auto: inside the checkpoint, else the SD3 VAE in "
                                "models/vae.",
                            ),
                            io.Combo.Input(
                                "weight_dtype",
                                options=DTYPES,
                                default=AUTO,
                                optional=True,
                                tooltip=DTYPE_TIP,
                            ),
                        ]
                    ),
                ],
                "outputs": [
                    io.Model.Output(tooltip="The denoiser."),
                    io.Clip.Output(tooltip="The text encoders."),
                    io.Vae.Output(tooltip="The VAE."),
                ],
            }
        )

    @classmethod
    def validate_inputs(
        cls,
        ckpt_name: str,
        t5xxl: str = AUTO,
        clip_g: str = AUTO,
        clip_l: str = AUTO,
        vae_name: str = AUTO,
    ) -> bool | str:
        faults = [encoder_fault(name) for name in (t5xxl, clip_g, clip_l)]
        faults += [name_fault("checkpoints", ckpt_name), name_fault("vae", vae_name, AUTO)]
        return next(filter(None, faults), True)

    @classmethod
    def fingerprint_inputs(
        cls,
        ckpt_name: str,
        t5xxl: str = AUTO,
        clip_g: str = AUTO,
        clip_l: str = AUTO,
        vae_name: str = AUTO,
        weight_dtype: str = AUTO,
    ) -> str:
        encoders = [("text_encoders", name) for name in (t5xxl, clip_g, clip_l)]
        return files_fingerprint(("checkpoints", ckpt_name), *encoders, ("vae", vae_name))

    @classmethod
    def execute(
        cls,
        ckpt_name: str,
        t5xxl: str = AUTO,
        clip_g: str = AUTO,
        clip_l: str = AUTO,
        vae_name: str = AUTO,
        weight_dtype: str = AUTO,
    ) -> io.NodeOutput:
        choices = {"t5": t5xxl, "clip_g": clip_g, "clip_l": clip_l, "vae": vae_name}
        with coded("bad_file"):
            parts, notes = checkpoint_parts(find_file("checkpoints", ckpt_name), choices)
        text = {kind: part for kind, part in parts.items() if kind in ENCODERS}
        model = load_model(parts["mmdit"], weight_dtype)
        contents = {
            "files": describe(parts),
            "notes": notes,
            "preset": preset_of(model),
            **dtypes_of(model),
        }
        return io.NodeOutput(
            model, load_clip(text, AUTO), load_vae(parts["vae"]), ui=report(contents)
        )
