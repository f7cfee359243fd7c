"""Good settings to begin with, one table per family of models; the user's own numbers rule."""

from collections.abc import Iterable
from dataclasses import dataclass

from .models.mmdit import MMDiTConfig

MEGAPIXEL = 1024 * 1024


@dataclass(frozen=True)
class SkipLayerPreset:
    """Skip-layer guidance for those who turn it on."""

    layers: tuple[int, ...]
    scale: float
    start: float  # percent of the run, 0 to 1
    end: float
    cfg: float  # guidance scale that goes with it


@dataclass(frozen=True)
class Preset:
    title: str
    steps: int
    cfg: float
    sampler: str
    scheduler: str = "normal"
    shift: float = 3.0
    native_pixels: int = MEGAPIXEL  # picture size that the shift is meant for
    skip_layers: SkipLayerPreset | None = None


# Steps and cfg: within what Stability AI's model cards and sd3.5 reference program suggest.
# Samplers and skip-layer guidance: that program (sd3_infer.py, CONFIGS).
# Shift: 3.0 for Stability's, as in ComfyUI and diffusers; the program takes 1.0 for SD3 Medium.
PRESETS = {
    "sd3_medium": Preset("SD3 Medium", steps=28, cfg=5.0, sampler="dpmpp_2m"),
    "sd3.5_medium": Preset(
        "SD3.5 Medium",
        steps=40,
        cfg=4.5,
        sampler="dpmpp_2m",
        skip_layers=SkipLayerPreset(layers=(7, 8, 9), scale=2.5, start=0.01, end=0.20, cfg=4.0),
    ),
    # Distilled by TensorArt; as its pipeline is called, with the shift of its scheduler.
    "sd3.5_medium_turbo": Preset(
        "SD3.5 Medium Turbo", steps=8, cfg=1.5, sampler="euler", shift=5.0
    ),
    "sd3.5_large": Preset("SD3.5 Large", steps=28, cfg=4.5, sampler="dpmpp_2m"),
    "sd3.5_large_turbo": Preset("SD3.5 Large Turbo", steps=4, cfg=1.0, sampler="euler"),
    # The embedded model; measured with `python -m sd3_core score`.
    "sd3_tiny": Preset(
        "SD3 Tiny", steps=28, cfg=3.0, sampler="euler_ancestral", native_pixels=128 * 128
    ),
    "other": Preset("other MMDiT", steps=28, cfg=4.5, sampler="euler"),
}


def family(config: MMDiTConfig, hints: Iterable[str] = ()) -> str:
    """The key of PRESETS that a network most likely belongs to.

    hints: file name, values of the file's metadata, names around it.  A Turbo model has the shapes
    of its teacher, and the embedded model those of any small one, so only these tell them apart.  A
    guess, good enough for defaults.
    """
    lowered = [hint.lower() for hint in hints]
    if any("sd3-tiny" in hint for hint in lowered):
        return "sd3_tiny"
    turbo = any("turbo" in hint for hint in lowered)
    if config.depth == 38 and config.qk_norm:
        return "sd3.5_large_turbo" if turbo else "sd3.5_large"
    if config.depth == 24 and config.qk_norm and config.dual_attention_layers:
        return "sd3.5_medium_turbo" if turbo else "sd3.5_medium"
    if config.depth == 24 and not config.qk_norm:
        return "sd3_medium"
    return "other"
