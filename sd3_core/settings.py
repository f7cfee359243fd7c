"""What the user asks for, and all that can be said against it before the long work starts."""

import math
import warnings
from collections.abc import Container, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from .checkpoints.family import model_preset
from .checkpoints.layouts import SUPPLIERS, TITLES, Component, find_components
from .checkpoints.load import component_of, read_config
from .checkpoints.lora_files import LoRAFile, parts_that_fit, read_lora
from .errors import CheckpointError, cut, quoted
from .guidance import SkipLayers, check_layers, note_on_cfg
from .models.mmdit import MMDiTConfig
from .models.vae import VAEConfig
from .pictures import picture_size
from .plain_text import check_whole
from .precision import pick_device, pick_dtype, wide_dtype
from .presets import Preset
from .samplers import SAMPLERS
from .schedule import Schedule, Window, auto_shift
from .sizes import Fit, Sides
from .speed import fp8
from .speed.step_cache import check_threshold
from .text.encoders import ENCODERS, RELEASED_WINDOW, check_weights, least_length
from .text.prompt import parse_prompt

FLAGS = {
    "mmdit": "--mmdit",
    "vae": "--vae",
    "clip_l": "--clip-l",
    "clip_g": "--clip-g",
    "t5": "--t5",
}
LARGEST = 1e4  # of any number below: far beyond use, small enough not to overflow
LONGEST_T5 = 4096  # rows to pad to: eight times what anyone trained with, small enough to compute


@dataclass(frozen=True)
class Files:
    """Where the networks are; a file named for one network wins over the checkpoint."""

    checkpoint: Path | None = None
    mmdit: Path | None = None
    vae: Path | None = None
    clip_l: Path | None = None
    clip_g: Path | None = None
    t5: Path | None = None
    tokenizers: Path | None = None  # folder; None: in the checkpoint, or ComfyUI's
    loras: tuple[tuple[Path, float], ...] = ()  # with their strengths, merged in this order


@dataclass(frozen=True)
class Settings:
    """What to draw.  None: the preset of the model's family decides."""

    prompt: str
    negative: str = ""
    prompt_clip_g: str | None = None  # None: as `prompt`
    prompt_t5: str | None = None
    use: tuple[str, ...] = ENCODERS  # text encoders that take part; the others give zeros
    t5_length: int | str = "auto"  # least number of T5 tokens; auto: CLIP's window
    width: int | None = None  # pixels; None: that of `init`, else the model's own
    height: int | None = None
    batch: int = 1
    seed: int = 0
    seed_each: bool = False  # picture i of a batch as if drawn alone with seed + i
    steps: int | None = None
    cfg: float | None = None
    cfg_start: float = 0.0  # percent of the run in which cfg holds, 0..1
    cfg_end: float = 1.0
    shift: float | str | None = None  # "auto": the model's own, scaled to the picture's size
    scheduler: str | None = None
    sampler: str | None = None
    skip_scale: float = 0.0  # skip-layer guidance; 0: off
    skip_layers: tuple[int, ...] | None = None
    skip_start: float | None = None
    skip_end: float | None = None
    init: Path | None = None  # picture to start from
    mask: Path | None = None  # white: drawn anew, black: kept
    denoise: float = 1.0  # part of the path that is walked, 0..1
    dtype: str = "auto"
    device: str = "auto"
    step_cache: float = 0.0  # change of the velocity up to which the last one serves; 0: off
    fp8: bool = False  # the image stream's products in float8


@dataclass(frozen=True)
class Plan:
    """A run with nothing left to decide."""

    parts: dict[str, Component]
    loras: tuple[tuple[LoRAFile, float], ...]
    settings: Settings  # no None in what the presets decide
    mmdit: MMDiTConfig
    vae: VAEConfig
    clip_windows: dict[str, int]  # tokens per pass of each CLIP that is there
    width: int  # pixels
    height: int
    fit: Fit | None  # of `init`
    latent_shape: tuple[int, int, int, int]  # [B, C, H/8, W/8]
    schedule: Schedule
    sigmas: torch.Tensor  # [steps + 1]
    sampler: str
    cfg: float
    cfg_window: Window
    skip: SkipLayers | None
    device: torch.device
    dtype: torch.dtype  # of the MMDiT and the CLIPs
    wide_dtype: torch.dtype  # of T5 and the VAE


def make_plan(files: Files, settings: Settings) -> Plan:
    """Read the headers, decide what is open, refuse what cannot work; touch no weight.

    Raises CheckpointError for the files and ValueError for the settings.
    """
    parts = find_parts(files)
    sizes: dict[str, Any] = {kind: read_config(part) for kind, part in parts.items()}
    check_sizes(parts, sizes)
    mmdit: MMDiTConfig = sizes["mmdit"]
    vae: VAEConfig = sizes["vae"]
    preset = model_preset(parts["mmdit"], mmdit)
    most = mmdit.pos_embed_max_size * mmdit.patch_size * vae.factor
    sides = Sides(vae.factor, most, preset.native_pixels)
    width, height, fit = drawn_size(settings, sides)
    settings = settled(replace(settings, width=width, height=height), preset)
    check(settings, parts, mmdit)
    loras = tuple(
        (read_lora(path, tuple(parts)), _number(f"the strength of {path.name}", strength))
        for path, strength in files.loras
    )
    loras = tuple(
        (check_lora(path, lora, parts, settings.use), strength)
        for (path, _), (lora, strength) in zip(files.loras, loras, strict=True)
    )
    schedule = Schedule(_number("shift", settings.shift))
    skip = SkipLayers(
        settings.skip_layers or (),
        settings.skip_scale,
        schedule.window(
            _number("skip_start", settings.skip_start), _number("skip_end", settings.skip_end)
        ),
    )
    cfg = _number("cfg", settings.cfg)
    if note := note_on_cfg(cfg):
        warnings.warn(note, stacklevel=2)
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    if settings.fp8:
        fp8.check(device)
    return Plan(
        parts=parts,
        loras=loras,
        settings=settings,
        mmdit=mmdit,
        vae=vae,
        clip_windows={kind: sizes[kind].window for kind in ("clip_l", "clip_g") if kind in sizes},
        width=width,
        height=height,
        fit=fit,
        latent_shape=(settings.batch, mmdit.in_channels, height // vae.factor, width // vae.factor),
        schedule=schedule,
        sigmas=schedule.sigmas(settings.steps or 0, settings.scheduler or "", settings.denoise),
        sampler=settings.sampler or "",
        cfg=cfg,
        cfg_window=schedule.window(settings.cfg_start, settings.cfg_end),
        skip=skip if settings.skip_scale else None,
        device=device,
        dtype=dtype,
        wide_dtype=wide_dtype(dtype, device),
    )


def chosen_paths(files: Files) -> dict[str, Path]:
    """The files and folders named one by one, without the LoRAs."""
    return {
        field.name: path
        for field in fields(files)
        if field.name != "loras" and (path := getattr(files, field.name)) is not None
    }


def find_networks(files: Files) -> dict[str, Component]:
    """Every network in these files, told from their headers alone."""
    parts: dict[str, Component] = {}
    if files.checkpoint is not None:
        parts.update(find_components(files.checkpoint))
    for kind in FLAGS:
        path = getattr(files, kind)
        if path is not None:
            parts[kind] = component_of(path, kind)
    return parts


def find_parts(files: Files) -> dict[str, Component]:
    """The networks that draw a picture.

    Raises CheckpointError when the MMDiT or the VAE is missing, naming what would supply it.
    """
    parts = find_networks(files)
    missing = [kind for kind in ("mmdit", "vae") if kind not in parts]
    if missing:
        given = ", ".join(str(path) for path in chosen_paths(files).values()) or "no file"
        needs = "; ".join(f"add {FLAGS[kind]} FILE (usually {SUPPLIERS[kind]})" for kind in missing)
        raise CheckpointError(
            f"{given}: holds {', '.join(parts) or 'nothing'}, but no {' and no '.join(missing)}: "
            f"{needs}."
        )
    return parts


def check_sizes(parts: Mapping[str, Component], sizes: Mapping[str, Any]) -> None:
    """Networks of different models do not work together; their sizes tell.

    Raises CheckpointError.
    """
    mmdit: MMDiTConfig = sizes["mmdit"]

    def refuse(kind: str, gives: str, takes: str) -> None:
        raise CheckpointError(
            f"{parts[kind].file.name}: {TITLES[kind]} gives {gives}, but the MMDiT in "
            f"{parts['mmdit'].file.name} takes {takes}. They belong to different models: take both "
            "from the same one."
        )

    if sizes["vae"].latent_channels != mmdit.in_channels:
        refuse("vae", f"{sizes['vae'].latent_channels} latent channels", f"{mmdit.in_channels}")
    towers = [kind for kind in ("clip_l", "clip_g") if kind in parts]
    width = sum(sizes[kind].hidden_size for kind in towers)
    pooled = sum(sizes[kind].pooled_dim for kind in towers)
    if width > mmdit.context_dim:
        refuse(towers[-1], f"tokens {width} wide", f"{mmdit.context_dim}")
    # One tower alone leaves room in the pooled vector for the other.
    if pooled != mmdit.pooled_dim and (len(towers) == 2 or pooled > mmdit.pooled_dim):
        refuse(towers[-1], f"{pooled} pooled channels in all", f"{mmdit.pooled_dim}")
    if "t5" in parts and sizes["t5"].d_model != mmdit.context_dim:
        refuse("t5", f"tokens {sizes['t5'].d_model} wide", f"{mmdit.context_dim}")


def check_lora(
    path: Path, lora: LoRAFile, parts: Mapping[str, Component], use: Container[str]
) -> LoRAFile:
    """The LoRA without what these files have no network for.

    Warns of parts that do nothing.  Raises CheckpointError when it is for another model.
    """
    shapes = {kind: part.shapes for kind, part in parts.items()}
    here = parts_that_fit(path.name, lora, shapes)
    for kinds, why in (
        ([kind for kind in here if kind in ENCODERS and kind not in use], "which is off"),
        ([kind for kind in lora.parts if kind not in parts], "which is not among the files given"),
    ):
        if kinds:
            changed = ", ".join(TITLES[kind] for kind in kinds)
            warnings.warn(f"{path.name}: changes {changed}, {why}.", stacklevel=2)
    return replace(lora, parts={kind: lora.parts[kind] for kind in here})


def drawn_size(settings: Settings, sides: Sides) -> tuple[int, int, Fit | None]:
    """Width and height, and how the picture to start from comes to them; warns of what is lost.

    Raises ValueError for a size that cannot be drawn and a picture that cannot be read.
    """
    wanted = (settings.width, settings.height)
    if settings.init is None:
        return *sides.without_picture(wanted), None
    name, picture = Path(settings.init).name, picture_size(settings.init)
    size = sides.with_picture(wanted, picture, name)
    fit = Fit.of(picture, size, sides.factor)
    notes = [fit.note(name)]
    if wanted == (None, None):
        notes.append(sides.note_on_own(name, picture))
    if settings.mask is not None:
        notes.append(fit.note_on_mask(Path(settings.mask).name, picture_size(settings.mask)))
    for note in filter(None, notes):
        warnings.warn(note, stacklevel=3)
    return *size, fit


def settled(settings: Settings, preset: Preset) -> Settings:
    """The settings with the preset's numbers where the user gave none; width and height are set."""
    pixels = (settings.width or 0) * (settings.height or 0)
    skip = preset.skip_layers
    skip_cfg = skip.cfg if skip and settings.skip_scale else None
    return replace(
        settings,
        steps=_first(settings.steps, preset.steps),
        cfg=_first(settings.cfg, skip_cfg, preset.cfg),
        shift=settled_shift(settings.shift, preset, pixels),
        scheduler=_first(settings.scheduler, preset.scheduler),
        sampler=_first(settings.sampler, preset.sampler),
        skip_layers=_first(settings.skip_layers, skip and skip.layers, ()),
        skip_start=_first(settings.skip_start, skip and skip.start, 0.0),
        skip_end=_first(settings.skip_end, skip and skip.end, 1.0),
    )


def settled_shift(shift: float | str | None, preset: Preset, pixels: int) -> float:
    if shift is None:
        return preset.shift
    if shift == "auto":
        return auto_shift(preset.shift, preset.native_pixels, pixels)
    return _number("shift", shift)


def check(settings: Settings, parts: Mapping[str, Component], mmdit: MMDiTConfig) -> None:
    """Raises ValueError or CheckpointError for what make_plan does not find by itself."""
    if settings.batch < 1:
        raise ValueError(f"batch is {settings.batch}; it must be at least 1.")
    if settings.sampler not in SAMPLERS:
        raise ValueError(
            f"sampler is {quoted(settings.sampler)}; choose one of {', '.join(SAMPLERS)}."
        )
    if settings.mask is not None and settings.init is None:
        raise ValueError("a mask needs a picture to keep: give --init too.")
    if settings.denoise < 1 and settings.init is None:
        raise ValueError(
            f"denoise is {settings.denoise} without a picture to start from: give --init, "
            "or leave denoise at 1."
        )
    if settings.skip_scale:
        check_layers(settings.skip_layers or (), mmdit.depth)
        if not settings.skip_layers:
            raise ValueError("skip-layer guidance needs its blocks, e.g. --skip-layers 7,8,9.")
    if not 0 <= settings.seed <= 2**64 - settings.batch:
        raise ValueError(f"seed is {settings.seed}; it must lie between 0 and {2**64 - 1}.")
    for prompt in (
        settings.prompt,
        settings.negative,
        settings.prompt_clip_g or "",
        settings.prompt_t5 or "",
    ):
        check_prompt(prompt)
    for start, end in (("cfg_start", "cfg_end"), ("skip_start", "skip_end")):
        for name in (start, end):
            if not 0 <= _number(name, getattr(settings, name)) <= 1:
                raise ValueError(
                    f"{name} is {getattr(settings, name)}; it is a part of the run, from 0 (the "
                    "first step) to 1 (the last)."
                )
        Schedule().window(getattr(settings, start), getattr(settings, end))
    _number("skip_scale", settings.skip_scale)
    check_threshold(_number("step_cache", settings.step_cache))
    if least_length(settings.t5_length, RELEASED_WINDOW) > LONGEST_T5:
        raise ValueError(f"t5_length is {settings.t5_length}; {LONGEST_T5} is the limit. Try 256.")
    if settings.use and not any(name in parts for name in settings.use):
        needs = "; ".join(f"{FLAGS[name]} FILE ({SUPPLIERS[name]})" for name in settings.use)
        raise CheckpointError(
            f"{parts['mmdit'].file.name}: none of the text encoders is in it, so no word would "
            f"count: add {needs}. One of them is enough; to draw without words, turn all three "
            "off (--no-clip-l --no-clip-g --no-t5)."
        )


def check_prompt(prompt: str) -> None:
    """Raises ValueError for a prompt that no encoder can read."""
    check_whole(prompt, "the prompt")
    try:
        check_weights(parse_prompt(prompt))
    except RecursionError as error:
        raise ValueError("the prompt's parentheses are nested too deeply to be meant.") from error


def _first(*choices: Any) -> Any:
    return next(choice for choice in choices if choice is not None)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:
        hint = " or auto" if name == "shift" else ""
        raise ValueError(f"{name} is {cut(value)}; give a number{hint}, at most {LARGEST} in size.")
    return number
