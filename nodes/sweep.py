"""One or two settings varied: a labelled grid of pictures, and a table of what was measured."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import comfy.model_management
import comfy.samplers
import latent_preview
import torch
from comfy_api.latest import io
from torch import Tensor

from ..sd3_core.checkpoints.header import read_header
from ..sd3_core.errors import quoted
from ..sd3_core.guidance import note_on_cfg
from ..sd3_core.measures import Trail
from ..sd3_core.noise import noise
from ..sd3_core.schedule import Schedule
from ..sd3_core.speed.prompts import users_cache
from ..sd3_core.sweep.axes import AXES, Axis, Layout, by_strength, check_axes, lay_out, read_axis
from ..sd3_core.sweep.sheet import labelled
from ..sd3_core.sweep.table import Run as Measured
from ..sd3_core.sweep.table import Table, judged, make_table
from ..sd3_core.text.encoders import ENCODERS
from ._compat import advanced, schema
from .errors import NodeError, coded
from .latents import check_vae
from .lora import has_lora, with_lora_strength
from .passage import Passage, walk
from .progress import Callback, Meter, check_finite
from .sampling import (
    MOST_SKIP_SCALE,
    Guidance,
    cfg_input,
    chosen_sampler,
    denoise_input,
    draw,
    fitted_samples,
    parse_layers,
    prepare,
    sampler_input,
    scheduler_input,
    seed_input,
    skip_and_window_inputs,
    steps_input,
)
from .text import Shape, check_clip, look_up_or_encode, present, prompt_input, tokenize
from .wires import (
    CATEGORY,
    check_conditioning,
    mark_shift,
    origin_of,
    report,
    widths_of,
)

NO_AXIS = "none"
WIDGETS = {"sampler": "sampler_name", "skip_scale": "slg_scale", "skip_layers": "slg_layers"}
NAMES = {WIDGETS.get(name, name): name for name in AXES}  # of an axis on the node -> the core's


@dataclass(frozen=True)
class Setting:
    """All that draws one cell; what an axis varies bears the axis's name."""

    steps: int
    cfg: float
    shift: float
    sampler: str
    scheduler: str
    seed: int
    encoders: tuple[str, ...]
    skip_scale: float
    skip_layers: tuple[int, ...]
    lora_strength: float  # times that of the LoRAs on MODEL and CLIP
    denoise: float
    cfg_span: tuple[float, float]
    skip_span: tuple[float, float]

    def sigmas(self) -> Tensor:
        """Raises ValueError."""
        schedule = Schedule(self.shift)
        sigmas = schedule.sigmas(self.steps, self.scheduler, self.denoise)
        return mark_shift(sigmas, self.shift)

    def guidance(self) -> Guidance:
        layers = self.skip_layers if self.skip_scale else ()
        return Guidance(self.cfg, self.cfg_span, self.skip_scale, layers, self.skip_span)


@dataclass(frozen=True)
class Prompts:
    positive: Any  # CONDITIONING
    negative: Any


@dataclass(frozen=True)
class Drawn:
    x0: Tensor  # [B, C, H, W] in VAE space
    run: Measured


class SD3Sweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3Sweep",
                "display_name": "SD3 Sweep",
                "category": f"{CATEGORY}/sampling",
                "description": "Vary one or two settings: a labelled grid of pictures, and for "
                "each of them time, memory, length of the path and distance from a reference.",
                "search_aliases": ["xy plot", "xyz plot", "grid", "compare", "sweep", "study"],
                "inputs": [
                    io.Model.Input("model", tooltip="The denoiser: ours or ComfyUI's SD3."),
                    io.Clip.Input("clip", tooltip="The text encoders: ours, or ComfyUI's for SD3."),
                    io.Vae.Input("vae", tooltip="The VAE of SD3: ours or ComfyUI's."),
                    io.Latent.Input(
                        "latent_image",
                        tooltip="What to draw on: empty, or an encoded picture (with its mask). "
                        "With a batch each cell is measured over several pictures.",
                    ),
                    prompt_input("prompt", "What the pictures show."),
                    prompt_input(
                        "negative", "What to steer away from; at cfg 1 it does not count."
                    ),
                    *axis_inputs(),
                    seed_input(),
                    steps_input(),
                    cfg_input(),
                    io.Float.Input(
                        "shift",
                        default=0.0,
                        min=0.0,
                        max=100.0,
                        step=0.01,
                        tooltip="Of the noise levels. 0: the one that the MODEL is set to.",
                    ),
                    sampler_input(),
                    scheduler_input(),
                    *advanced(
                        [
                            io.Int.Input(
                                "reference_cell",
                                default=0,
                                min=0,
                                max=10000,
                                optional=True,
                                tooltip="The cell that the others are compared with, counted from "
                                "1 as the grid is read. 0: the last.",
                            ),
                            denoise_input(optional=True),
                            *skip_and_window_inputs(),
                        ]
                    ),
                ],
                "outputs": [
                    io.Image.Output(display_name="grid", tooltip="One picture, labelled."),
                    io.Image.Output(
                        display_name="pictures", tooltip="Every picture, as the grid is read."
                    ),
                    io.String.Output(
                        display_name="table", tooltip="A row for each cell; see Preview as Text."
                    ),
                    io.String.Output(display_name="csv", tooltip="The same for programs."),
                ],
            }
        )

    @classmethod
    def validate_inputs(
        cls,
        x_axis: str | None = None,
        x_values: str | None = None,
        y_axis: str | None = None,
        y_values: str | None = None,
        reference_cell: int | None = None,
    ) -> bool | str:
        """What is typed, before anything runs; a linked value is None and is looked at later."""
        typed = [one for one in (x_axis, x_values, y_axis, y_values) if one is not None]
        if len(typed) < 4:
            return True
        try:
            layout_of(typed[0], typed[1], typed[2], typed[3], reference_cell)
        except NodeError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        latent_image: dict[str, Any],
        prompt: str,
        negative: str,
        x_axis: str,
        x_values: str,
        y_axis: str,
        y_values: str,
        seed: int,
        steps: int,
        cfg: float,
        shift: float,
        sampler_name: str,
        scheduler: str,
        reference_cell: int = 0,
        denoise: float = 1.0,
        slg_scale: float = 0.0,
        slg_layers: str = "7, 8, 9",
        slg_start_percent: float = 0.01,
        slg_end_percent: float = 0.2,
        cfg_start_percent: float = 0.0,
        cfg_end_percent: float = 1.0,
    ) -> io.NodeOutput:
        layout = layout_of(x_axis, x_values, y_axis, y_values, reference_cell)
        widths_of(model)  # refuses other models
        own = model.get_model_object("model_sampling")
        base = Setting(
            steps=steps,
            cfg=cfg,
            shift=shift or float(getattr(own, "shift", 3.0)),
            sampler=chosen_sampler(sampler_name, model),
            scheduler=scheduler,
            seed=seed,
            encoders=ENCODERS,
            skip_scale=slg_scale,
            skip_layers=parse_layers(slg_layers),
            lora_strength=1.0,
            denoise=denoise,
            cfg_span=(cfg_start_percent, cfg_end_percent),
            skip_span=(slg_start_percent, slg_end_percent),
        )
        meter = Meter(model.load_device)
        sweep = Sweep(model, clip, latent_image, layout, base)
        check_vae(vae, sweep.samples)
        drawn = sweep.draw(sweep.encode(prompt, negative))
        pictures = [decode(vae, one.x0) for one in drawn]
        levels = [(one.clamp(0, 1) * 255).to(torch.uint8).cpu() for one in pictures]
        known, notes = judged(metadata_of(model), prompt)
        notes = (*notes, *sweep.notes)
        table = make_table(layout, [one.run for one in drawn], levels, known)
        contents = {
            **described(layout, base, table),
            "files": origin_of(model).files,
            "loras": list(origin_of(model).loras),
            "notes": [*notes, *filter(None, map(note_on_cfg, layout.values_of("cfg") or [cfg]))],
            "seconds": meter.reading()["seconds"],
            "peak_memory_mib": max(one.run.peak_memory_mib or 0 for one in drawn) or None,
        }
        grid = labelled(layout, levels)[None].to(pictures[0]) / 255
        return io.NodeOutput(
            grid, torch.cat(pictures), table.text(), table.csv(), ui=report(contents)
        )


def axis_inputs() -> list[Any]:
    """x_axis, x_values, y_axis, y_values."""
    says = "Commas between; sets are joined by +: 5, 10, 20 or all, clip_l+clip_g, t5."
    return [
        io.Combo.Input(
            "x_axis",
            options=list(NAMES),
            default="steps",
            tooltip="What varies from left to right; its own widget then does not count.",
        ),
        io.String.Input("x_values", default="5, 10, 20", tooltip=f"Its values. {says}"),
        io.Combo.Input(
            "y_axis",
            options=[NO_AXIS, *NAMES],
            default=NO_AXIS,
            tooltip="What varies from top to bottom.",
        ),
        io.String.Input("y_values", default="", tooltip=f"Its values. {says}"),
    ]


def layout_of(
    x_axis: str, x_values: str, y_axis: str, y_values: str, reference: int | None
) -> Layout:
    """Raises NodeError."""
    with coded("bad_setting"), named_as_widgets():
        x = axis_of(x_axis, x_values)
        y = None if y_axis == NO_AXIS else axis_of(y_axis, y_values)
        return lay_out(x, y, reference or 0)


def axis_of(name: str, text: str) -> Axis:
    """name: a widget's.  Raises ValueError."""
    if name not in NAMES:
        raise ValueError(f"the axis is {quoted(name)}; choose one of {', '.join(NAMES)}.")
    axis = read_axis(NAMES[name], text)
    if axis.name == "skip_scale":
        for value in axis.values:
            if not 0 <= value <= MOST_SKIP_SCALE:
                raise ValueError(
                    f"{name}: {value:g} is no value of it; expected numbers from 0 to "
                    f"{MOST_SKIP_SCALE:g}, such as {AXES[axis.name].example}."
                )
    return axis


@contextmanager
def named_as_widgets() -> Iterator[None]:
    """The core's errors about axes, by the names that the node has for them."""
    try:
        yield
    except ValueError as error:
        names = rf"(?<!')\b({'|'.join(WIDGETS)})\b"  # what was typed is in quotes
        raise ValueError(re.sub(names, lambda found: WIDGETS[found[0]], str(error))) from error


class Sweep:
    """The cells of one run of the node, checked; the networks are ComfyUI's to move."""

    def __init__(
        self, model: Any, clip: Any, latent: dict[str, Any], layout: Layout, base: Setting
    ):
        """Raises NodeError for what cannot be drawn."""
        check_clip(clip)
        self.model, self.clip, self.latent, self.layout = model, clip, latent, layout
        self.samples = fitted_samples(model, latent)
        self.settings = {cell.number: replace(base, **cell.choice) for cell in layout.cells}
        with coded("bad_setting"):
            with named_as_widgets():
                check_axes(
                    layout,
                    depth=len(model.model.diffusion_model.joint_blocks),
                    encoders=present(clip),
                    loras=has_lora(model) or has_lora(clip.patcher),
                    skip_scale=base.skip_scale,
                    skip_layers=base.skip_layers,
                )
            self.sigmas = {number: one.sigmas() for number, one in self.settings.items()}
            self.noises = {
                seed: noise(self.samples.shape, seed, latent.get("batch_index"))
                for seed in {one.seed for one in self.settings.values()}
            }

    def encode(self, prompt: str, negative: str) -> dict[int, Prompts]:
        """By cell; each set of encoders reads the prompts once.  Raises NodeError."""
        widths, least = widths_of(self.model), Shape.of(self.clip.cond_stage_model).window
        with coded("bad_setting"):
            words = [
                tokenize(self.clip, dict.fromkeys(ENCODERS, text), least)
                for text in (prompt, negative)
            ]
            cache = users_cache()
        self.notes = tuple(dict.fromkeys(note for one in words for note in one.notes))
        encoded: dict[Any, Prompts] = {}
        found = {}
        for number, setting in self.settings.items():
            strength = setting.lora_strength if has_lora(self.clip.patcher) else 1.0
            key = strength, setting.encoders
            if key not in encoded:
                comfy.model_management.throw_exception_if_processing_interrupted()
                clip = clip_with_strength(self.clip, strength)
                use = list(setting.encoders)
                both = [look_up_or_encode(clip, one, use, cache).conditioning for one in words]
                for name, conditioning in zip(("prompt", "negative"), both, strict=True):
                    check_conditioning(name, conditioning, widths)
                encoded[key] = Prompts(*both)
            found[number] = encoded[key]
        return found

    def draw(self, prompts: dict[int, Prompts]) -> list[Drawn]:
        """By cell, those of one state of the weights after each other.  Raises NodeError."""
        bar = Bar(self.model, sum(len(sigmas) - 1 for sigmas in self.sigmas.values()))
        device = self.model.load_device
        drawn: dict[int, Drawn] = {}
        for cells in by_strength(self.layout.cells):
            first = cells[0].number
            model = with_strength(self.model, self.settings[first].lora_strength)
            # One step for nothing, so that loading the model does not count for the first cell.
            self._draw(first, model, prompts[first], Watched(device, steps=1), ignore)
            for number in (cell.number for cell in cells):
                drawn[number] = self._draw(number, model, prompts[number], Watched(device), bar)
                bar.done += len(self.sigmas[number]) - 1
        return [drawn[cell.number] for cell in self.layout.cells]

    def _draw(
        self,
        number: int,
        model: Any,
        prompts: Prompts,
        watched: "Watched",
        callback: Callable[..., None],
    ) -> Drawn:
        setting, sigmas = self.settings[number], self.sigmas[number]
        with coded("bad_setting"):
            run = prepare(model, sigmas, setting.sampler, setting.guidance())
        sampler = comfy.samplers.KSAMPLER(watched.sampler(setting.sampler, run.dtype))
        run.guider.set_conds(prompts.positive, prompts.negative)
        x0 = draw(
            replace(run, sampler=sampler),
            self.samples,
            self.noises[setting.seed],
            self.latent.get("noise_mask"),
            sigmas,
            setting.seed,
            callback,
        )
        return Drawn(x0, watched.measured())


class Watched:
    """A run from its first to its last latent, without loading and preparing.

    steps: after which it stops; ComfyUI, and with it our table of modulations, hears of all.
    """

    def __init__(self, device: Any, steps: int | None = None):
        self.device, self.steps = device, steps
        self.trail = Trail()
        self.spent: tuple[float, int | None] = (0.0, None)

    def sampler(self, name: str, dtype: torch.dtype) -> Callable[..., Tensor]:
        """As `walk`, by the call that comfy.samplers.KSAMPLER makes."""

        def walked(
            model: Callable[..., Tensor],
            x: Tensor,
            sigmas: Tensor,
            extra_args: dict[str, Any],
            callback: Callback | None = None,
            disable: bool | None = None,
        ) -> Tensor:
            self.trail = Trail()  # SD3 Speed may measure by another run before this one

            def keep(state: dict[str, Any]) -> None:
                self.trail.points.append(state["x"])
                if callback is not None:
                    callback(state)

            levels = sigmas if self.steps is None else sigmas[: self.steps + 1]
            meter = Meter(self.device)
            x0 = walk(Passage(name), dtype, model, x, levels, extra_args, keep, disable)
            self.spent = meter.spent()
            self.trail.end(x0)
            return x0

        return walked

    def measured(self) -> Measured:
        return Measured.of(self.trail.points, *self.spent)


class Bar:
    """One bar and preview over all cells.  done: steps of the cells that are drawn."""

    def __init__(self, model: Any, total: int):
        self.show = latent_preview.prepare_callback(model, total)
        self.total, self.done = total, 0

    def __call__(self, step: int, x0: Tensor, x: Tensor, steps: int) -> None:
        self.show(self.done + step, x0, x, self.total)


def ignore(step: int, x0: Tensor, x: Tensor, steps: int) -> None:
    """Steps that nobody sees."""


def with_strength(patcher: Any, strength: float) -> Any:
    return patcher if strength == 1 else with_lora_strength(patcher, strength)


def clip_with_strength(clip: Any, strength: float) -> Any:
    if strength == 1:
        return clip
    clip = clip.clone()
    clip.patcher = with_lora_strength(clip.patcher, strength)
    return clip


def decode(vae: Any, x0: Tensor) -> Tensor:
    """IMAGE of one cell, alone, as SD3 VAE Decode would.  Raises NodeError."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    images = vae.decode(x0)
    with coded("bad_setting"):
        check_finite(images, "the VAE's decoder", vae.vae_dtype)
    return images


def metadata_of(model: Any) -> dict[str, str]:
    """Of the file a MODEL of ours comes from; nothing for another's."""
    path = origin_of(model).paths.get("mmdit")
    return {} if path is None else dict(read_header(path).metadata)


def described(layout: Layout, base: Setting, table: Table) -> dict[str, Any]:
    """What varied, what did not, and every cell."""
    varied = [axis.name for axis in layout.axes]
    fixed = {name: value for name, value in asdict(base).items() if name not in varied}
    rows = [
        {"label": cell.label, **row} for cell, row in zip(layout.cells, table.values(), strict=True)
    ]
    return {"varied": varied, "reference": layout.reference, "fixed": fixed, "cells": rows}
