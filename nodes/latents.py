"""Empty latents; pictures <-> latents."""

import math
from typing import Any

import comfy.model_management
from comfy_api.latest import io
from torch import Tensor

from ..sd3_core.presets import MEGAPIXEL
from ..sd3_core.sizes import Fit
from ._compat import advanced, intermediate_dtype, schema
from .errors import NodeError, coded
from .progress import Meter, check_finite
from .wires import (
    CATEGORY,
    LATENT_FACTOR,
    NATIVE_PIXELS,
    check_numbers,
    checked_images,
    empty_latent,
    fitted_mask,
    origin_of,
    report,
    widths_of,
    without_ratios,
)

CUSTOM = "custom"
ASPECTS = {  # name -> width / height
    "1:1": 1.0,
    "5:4": 5 / 4,
    "4:3": 4 / 3,
    "3:2": 3 / 2,
    "16:9": 16 / 9,
    "21:9": 21 / 9,
    "4:5": 4 / 5,
    "3:4": 3 / 4,
    "2:3": 2 / 3,
    "9:16": 9 / 16,
    "9:21": 9 / 21,
}
MOST_SIDE = 16384


def picture_size(aspect: str, pixels: int) -> tuple[int, int]:
    """Width and height with about this many pixels; sides are multiples of 64, of 16 if small."""
    step = 64 if pixels >= 512 * 512 else 16
    ratio = ASPECTS[aspect]

    def side(length: float) -> int:
        return max(step, round(length / step) * step)

    return side(math.sqrt(pixels * ratio)), side(math.sqrt(pixels / ratio))


class SD3EmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3EmptyLatent",
                "display_name": "SD3 Empty Latent",
                "category": f"{CATEGORY}/latent",
                "description": "An empty picture to draw on, at the size the model was trained on.",
                "search_aliases": ["empty latent", "resolution", "aspect ratio", "size", "width"],
                "inputs": [
                    io.Combo.Input(
                        "aspect",
                        options=[*ASPECTS, CUSTOM],
                        default="1:1",
                        tooltip="Width to height, with as many pixels as the connected model was "
                        "trained on (1 megapixel without one). custom: the next two.",
                    ),
                    io.Int.Input(
                        "width",
                        default=1024,
                        min=16,
                        max=MOST_SIDE,
                        step=16,
                        tooltip="Pixels; counts only with aspect custom.",
                    ),
                    io.Int.Input(
                        "height",
                        default=1024,
                        min=16,
                        max=MOST_SIDE,
                        step=16,
                        tooltip="Pixels; counts only with aspect custom.",
                    ),
                    io.Int.Input(
                        "batch_size", default=1, min=1, max=4096, tooltip="Pictures at a time."
                    ),
                    *advanced(
                        [
                            io.Model.Input(
                                "model",
                                optional=True,
                                tooltip="Tells how many pixels a picture should have.",
                            )
                        ]
                    ),
                ],
                "outputs": [io.Latent.Output(tooltip="For SD3 Sample or KSampler.")],
            }
        )

    @classmethod
    def execute(
        cls, aspect: str, width: int, height: int, batch_size: int, model: Any = None
    ) -> io.NodeOutput:
        pixels = MEGAPIXEL if model is None else origin_of(model).preset.native_pixels
        if aspect != CUSTOM:
            width, height = picture_size(aspect, pixels)
        if model is not None and max(width, height) > widths_of(model).most_pixels:
            most = widths_of(model).most_pixels
            raise NodeError(
                "bad_setting",
                f"{width} x {height}: this model draws at most {most} pixels a side.",
            )
        device = comfy.model_management.intermediate_device()
        samples = empty_latent(batch_size, height, width, device, intermediate_dtype())
        latent = {"samples": samples, "downscale_ratio_spacial": 8, NATIVE_PIXELS: pixels}
        contents = {"width": width, "height": height, "batch_size": batch_size}
        return io.NodeOutput(latent, ui=report(contents))


def check_vae(vae: Any, samples: Tensor | None = None) -> None:
    """Raises NodeError unless the VAE is there and has the channels of the latents."""
    if vae is None or getattr(vae, "first_stage_model", None) is None:
        raise NodeError("missing_part", "no VAE arrived: load one with SD3 Load VAE.")
    channels = getattr(vae, "latent_channels", 16)
    if channels != 16 or (samples is not None and samples.shape[1] != channels):
        seen = f"the latent has {samples.shape[1]} channels, " if samples is not None else ""
        raise NodeError(
            "wrong_latent",
            f"{seen}the VAE {channels}, SD3 16: one of them is another model's. Load the VAE of "
            "SD3 with SD3 Load VAE.",
        )


class SD3VAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3VAEDecode",
                "display_name": "SD3 VAE Decode",
                "category": f"{CATEGORY}/latent",
                "description": "Latents -> pictures. Says so where a picture would turn out black.",
                "search_aliases": ["vae decode", "latent to image"],
                "inputs": [
                    io.Latent.Input("samples", tooltip="What SD3 Sample or KSampler gives."),
                    io.Vae.Input("vae", tooltip="The VAE of SD3: ours or ComfyUI's."),
                ],
                "outputs": [io.Image.Output(tooltip="The pictures.")],
            }
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any) -> io.NodeOutput:
        latents = samples["samples"]
        check_vae(vae, latents)
        meter = Meter(vae.device)
        images = vae.decode(latents)
        with coded("bad_setting"):
            check_finite(images, "the VAE's decoder", vae.vae_dtype)
        batch, height, width, _ = images.shape
        contents = {
            "width": width,
            "height": height,
            "batch_size": batch,
            "files": origin_of(vae.patcher).files,
        }
        return io.NodeOutput(images, ui=report({**contents, **meter.reading()}))


class SD3VAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3VAEEncode",
                "display_name": "SD3 VAE Encode",
                "category": f"{CATEGORY}/latent",
                "description": "Pictures -> latents, to start from (denoise below 1 in SD3 Shift "
                "Schedule) or to repaint where a mask is white.",
                "search_aliases": ["vae encode", "image to latent", "inpaint", "img2img"],
                "inputs": [
                    io.Image.Input("pixels", tooltip="The pictures; cropped to multiples of 8."),
                    io.Vae.Input("vae", tooltip="The VAE of SD3: ours or ComfyUI's."),
                    *advanced(
                        [
                            io.Mask.Input(
                                "mask",
                                optional=True,
                                tooltip="White is painted anew, black is kept.",
                            )
                        ]
                    ),
                ],
                "outputs": [io.Latent.Output(tooltip="For SD3 Sample or KSampler.")],
            }
        )

    @classmethod
    def execute(cls, pixels: Tensor, vae: Any, mask: Tensor | None = None) -> io.NodeOutput:
        check_vae(vae)
        pixels = checked_images("pixels", pixels)
        fit = whole_latents(pixels)
        notes = [fit.note("The picture")]
        if mask is not None:
            check_numbers("mask", mask)
            notes.append(fit.note_on_mask("The mask", (mask.shape[-1], mask.shape[-2])))
        meter = Meter(vae.device)
        samples = vae.encode(pixels)
        with coded("bad_setting"):
            check_finite(samples, "the VAE's encoder", vae.vae_dtype)
        latent: dict[str, Any] = without_ratios({"samples": samples})
        if mask is not None:
            latent["noise_mask"] = fitted_mask(mask, pixels.shape[1], pixels.shape[2])
        contents = {
            "width": fit.size[0],
            "height": fit.size[1],
            "latent": list(samples.shape),
            "masked": mask is not None,
            "notes": list(filter(None, notes)),
        }
        return io.NodeOutput(latent, ui=report({**contents, **meter.reading()}))


def whole_latents(pixels: Tensor) -> Fit:
    """How ComfyUI cuts pictures [B, H, W, C] before it encodes them.  Raises NodeError."""
    picture = (pixels.shape[2], pixels.shape[1])
    if min(picture) < LATENT_FACTOR:
        raise NodeError(
            "bad_setting",
            f"the picture is {picture[0]} x {picture[1]} pixels, and one of a latent's stands for "
            f"{LATENT_FACTOR} x {LATENT_FACTOR}: scale it up first.",
        )
    size = (
        picture[0] // LATENT_FACTOR * LATENT_FACTOR,
        picture[1] // LATENT_FACTOR * LATENT_FACTOR,
    )
    return Fit.of(picture, size, LATENT_FACTOR)
