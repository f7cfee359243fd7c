"""What travels between nodes: reports for /history, the files behind a model, latents, masks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.model_base
import torch
import torch.nn.functional as F
from torch import Tensor

from ..sd3_core.checkpoints.header import fingerprint
from ..sd3_core.checkpoints.layouts import Component
from ..sd3_core.presets import PRESETS, Preset
from .errors import NodeError

CATEGORY = "SD3 Workbench"
REPORT = "sd3_report"  # key of every node's JSON in /history: a list with one object
ATTACHMENT = "sd3_workbench"
NATIVE_PIXELS = "sd3_native_pixels"  # key in a LATENT
LATENT_FACTOR = 8  # image pixels per latent pixel, along one side


def report(contents: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The `ui` of a node; ComfyUI wants lists."""
    return {REPORT: [dict(contents)]}


# Where a model comes from


@dataclass(frozen=True)
class Origin:
    """What one of our loaders knows of a MODEL, CLIP or VAE; travels with its patcher's clones.

    files: "mmdit", "clip_l", ... -> {"file", "fingerprint"}.  preset: what suits the MODEL.
    paths: of the same files; never reported.
    """

    files: dict[str, dict[str, str]] = field(default_factory=dict)
    loras: tuple[dict[str, Any], ...] = ()
    lora_patches: int = 0  # of weights, that these put there
    preset: Preset = PRESETS["sd3.5_large"]
    paths: dict[str, Path] = field(default_factory=dict)

    @staticmethod
    def of(parts: Mapping[str, Component]) -> "Origin":
        return Origin(describe(parts), paths={kind: part.file for kind, part in parts.items()})


def describe(parts: Mapping[str, Component]) -> dict[str, dict[str, str]]:
    return {kind: describe_file(part.file) for kind, part in parts.items()}


def describe_file(path: Path) -> dict[str, str]:
    """By name alone: a report travels with pictures, and folders are nobody's business."""
    return {"file": path.name, "fingerprint": fingerprint(path)}


def set_origin(patcher: Any, origin: Origin) -> None:
    patcher.attachments[ATTACHMENT] = origin


def origin_of(patcher: Any) -> Origin:
    """Without files for what another pack's loader made."""
    return getattr(patcher, "attachments", {}).get(ATTACHMENT) or Origin()


def with_lora(origin: Origin, path: Path, strength: float, patches: int) -> Origin:
    lora = {**describe_file(path), "strength": strength}
    return replace(origin, loras=(*origin.loras, lora), lora_patches=origin.lora_patches + patches)


def loras_on(model: Any) -> list[str]:
    """The LoRAs of a MODEL in words; what other packs' nodes put there is counted."""
    origin = origin_of(model)
    named = [f"{one['file']} x {one['strength']:g}" for one in origin.loras]
    others = sum(map(len, model.patches.values())) - origin.lora_patches
    if not named and model.patches:
        return [f"a LoRA of {len(model.patches)} layers from another loader"]
    return [*named, *([f"{others} patches from another loader"] if others > 0 else [])]


# MODEL and CONDITIONING


@dataclass(frozen=True)
class Widths:
    """What a MODEL takes: channels of the latents, of the context, of the pooled vector."""

    latent: int
    context: int
    pooled: int
    most_pixels: int  # of one side of a picture


def widths_of(model: Any) -> Widths:
    """Ours or ComfyUI's SD3.  Raises NodeError for any other model."""
    network = getattr(model.model, "diffusion_model", None)
    if not isinstance(model.model, comfy.model_base.SD3) or network is None:
        raise NodeError(
            "wrong_model",
            f"this MODEL is a {type(model.model).__name__}, not Stable Diffusion 3 or 3.5. "
            "Use KSampler for it, or load an SD3 model.",
        )
    patch = network.x_embedder.proj
    side = math.isqrt(network.pos_embed.shape[1])
    return Widths(
        latent=patch.in_channels,
        context=network.context_embedder.in_features,
        pooled=network.y_embedder.mlp[0].in_features,
        most_pixels=side * patch.kernel_size[0] * LATENT_FACTOR,
    )


def check_conditioning(name: str, conditioning: Any, widths: Widths) -> None:
    """Before the long work: whether a CONDITIONING was made by this model's text encoders."""
    for context, extra in conditioning:
        pooled = extra.get("pooled_output")
        seen = (context.shape[-1], None if pooled is None else pooled.shape[-1])
        if seen != (widths.context, widths.pooled):
            raise NodeError(
                "wrong_encoders",
                f"{name} is {seen[0]} wide with a pooled vector of {seen[1]}, the model takes "
                f"{widths.context} and {widths.pooled}: it comes from another model's text "
                "encoders. Load MODEL and CLIP that belong together.",
            )


# IMAGE, LATENT, MASK


def checked_images(name: str, images: Tensor) -> Tensor:
    """An IMAGE as [B, H, W, 3], or 4 with alpha; one channel is grey.  Raises NodeError.

    name: of the input.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise NodeError(
            "bad_setting",
            f"{name} is {list(images.shape)}; an IMAGE is [pictures, height, width, channels] with "
            "1, 3 or 4 channels.",
        )
    check_numbers(name, images)
    return images.expand(*images.shape[:-1], 3) if images.shape[-1] == 1 else images


def check_numbers(name: str, pictures: Tensor) -> None:
    """Raises NodeError for NaN and infinity in an IMAGE or MASK [B, ...], before it is used."""
    bad = [number for number, one in enumerate(pictures, 1) if not one.isfinite().all()]
    if bad:
        raise NodeError(
            "not_finite",
            f"{name} holds NaN or infinity in picture {bad[0]} of {len(pictures)}: look at the "
            "node that it comes from.",
        )


def check_latents(samples: Tensor, widths: Widths) -> None:
    """samples: [B, C, H, W]."""
    if samples.ndim != 4 or samples.shape[1] != widths.latent:
        raise NodeError(
            "wrong_latent",
            f"the latent is {list(samples.shape)}; this model takes {widths.latent} channels. "
            "Use SD3 Empty Latent, or encode the picture with an SD3 VAE.",
        )
    side = max(samples.shape[-2:]) * LATENT_FACTOR
    if side > widths.most_pixels:
        raise NodeError(
            "wrong_latent",
            f"the picture would be {side} pixels long; this model's position table ends at "
            f"{widths.most_pixels}. Choose a smaller width and height.",
        )


def without_ratios(latent: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without what ComfyUI notes on empty latents only."""
    gone = ("downscale_ratio_spacial", "downscale_ratio_temporal")
    return {name: value for name, value in latent.items() if name not in gone}


def fitted_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """A MASK [B, H, W] at the size of its pixels, cropped to whole latents as the VAE crops.

    Returns [B, 1, H', W'] with H' and W' multiples of 8.
    """
    mask = mask.reshape(-1, 1, *mask.shape[-2:])
    if mask.shape[-2:] != (height, width):
        mask = F.interpolate(mask.float(), size=(height, width), mode="bilinear")
    for axis, size in ((2, height), (3, width)):
        surplus = size % LATENT_FACTOR
        mask = mask.narrow(axis, surplus // 2, size - surplus)
    return mask


# SIGMAS


def mark_shift(sigmas: Tensor, shift: float) -> Tensor:
    """SIGMAS that still know the shift they were made with; slices of them do not."""
    sigmas.sd3_shift = shift  # pyright: ignore[reportAttributeAccessIssue]
    return sigmas


def shift_of(sigmas: Tensor) -> float | None:
    return getattr(sigmas, "sd3_shift", None)


def finite_list(values: Tensor, most: float) -> list[float]:
    """For JSON, which has no infinity."""
    return [round(float(value), 6) for value in values.clamp(-most, most)]


def empty_latent(batch: int, height: int, width: int, device: Any, dtype: torch.dtype) -> Tensor:
    """height, width: of the picture, in pixels."""
    shape = (batch, 16, height // LATENT_FACTOR, width // LATENT_FACTOR)
    return torch.zeros(shape, device=device, dtype=dtype)
