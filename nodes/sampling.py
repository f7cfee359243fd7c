"""SIGMAS, and the sampler: sd3_core's schedule, steps, guidance and noise on ComfyUI's MODEL.

The network is only ever called by ComfyUI, so patches, hooks, ControlNets, areas, masks and timed
prompts act as in KSampler; what comes back, x0, is turned into the velocity that sd3_core walks.
"""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io
from torch import Tensor

from ..sd3_core.errors import quoted
from ..sd3_core.guidance import SkipLayers, check_layers, note_on_cfg, skip_layer_guidance
from ..sd3_core.noise import noise
from ..sd3_core.presets import MEGAPIXEL
from ..sd3_core.samplers import SAMPLERS
from ..sd3_core.schedule import (
    ALWAYS,
    SCHEDULERS,
    Schedule,
    Window,
    auto_shift,
    log_snr,
)
from ._compat import advanced, fix_empty_latent, inference_dtype, intermediate_dtype, schema
from .comfy_model import AUTO
from .comfy_speed import last_run, level_in, watch_runs
from .comfy_table import LEVELS
from .errors import coded
from .passage import Passage, begun, check_levels, ended, leave, levels_of_all, walk
from .progress import Meter, check_finite
from .wires import (
    CATEGORY,
    LATENT_FACTOR,
    NATIVE_PIXELS,
    check_conditioning,
    check_latents,
    finite_list,
    mark_shift,
    origin_of,
    report,
    shift_of,
    widths_of,
    without_ratios,
)

MOST_LOG_SNR = 20.0  # drawn instead of infinity
MOST_SKIP_SCALE = 10.0


class SD3ShiftSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3ShiftSchedule",
                "display_name": "SD3 Shift Schedule",
                "category": f"{CATEGORY}/sampling",
                "description": "The noise levels of a run. A larger shift spends more steps at "
                "high noise, where the picture's layout is decided.",
                "search_aliases": ["scheduler", "sigmas", "shift", "basic scheduler", "timesteps"],
                "inputs": [
                    steps_input(),
                    io.Float.Input(
                        "shift",
                        default=3.0,
                        min=0.01,
                        max=100.0,
                        step=0.01,
                        tooltip="3 for the released models at one megapixel; 1 is no shift.",
                    ),
                    scheduler_input(),
                    denoise_input(),
                    *advanced(
                        [
                            io.Boolean.Input(
                                "auto_shift",
                                default=False,
                                optional=True,
                                tooltip="Adapt the shift to the size of the connected latent: "
                                "shift * sqrt(its pixels / the model's).",
                            ),
                            io.Latent.Input(
                                "latent", optional=True, tooltip="Tells auto_shift the size."
                            ),
                        ]
                    ),
                ],
                "outputs": [io.Sigmas.Output(tooltip="For SD3 Sample or SamplerCustomAdvanced.")],
            }
        )

    @classmethod
    def execute(
        cls,
        steps: int,
        shift: float,
        scheduler: str,
        denoise: float,
        auto_shift: bool = False,
        latent: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        with coded("bad_setting"):
            used = adapted_shift(shift, latent) if auto_shift else shift
            sigmas = Schedule(used).sigmas(steps, scheduler, denoise)
        sigmas = mark_shift(sigmas.clone(), used)  # see levels_of_all
        return io.NodeOutput(sigmas, ui=report(schedule_report(used, sigmas)))


def steps_input() -> Any:
    return io.Int.Input("steps", default=28, min=1, max=10000, tooltip="Calls of the model.")


def scheduler_input() -> Any:
    return io.Combo.Input(
        "scheduler",
        options=list(SCHEDULERS),
        default="normal",
        tooltip="How the levels are spread; normal is Stability's.",
    )


def denoise_input(optional: bool = False) -> Any:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        optional=optional,
        tooltip="Part of the path that is walked: 1 draws anew, less keeps more of the latent it "
        "starts from.",
    )


def schedule_report(shift: float, sigmas: Tensor) -> dict[str, Any]:
    """The two curves of a schedule.  sigmas: [steps + 1]."""
    return {
        "shift": shift,
        "sigmas": finite_list(sigmas, 1.0),
        # In float32 some shifts put the first level a hair above 1, which has no logarithm.
        "log_snr": finite_list(log_snr(sigmas.clamp(0, 1)), MOST_LOG_SNR),
    }


def adapted_shift(shift: float, latent: dict[str, Any] | None) -> float:
    """Raises ValueError without a latent."""
    if latent is None:
        raise ValueError(
            "auto_shift needs the size of the picture: connect a latent, or turn it off."
        )
    height, width = latent["samples"].shape[-2:]
    native = latent.get(NATIVE_PIXELS, MEGAPIXEL)
    return auto_shift(shift, native, height * width * LATENT_FACTOR**2)


# Guidance


class SD3Guider(comfy.samplers.CFGGuider):
    """Classifier-free guidance inside a window, skip-layer guidance inside another."""

    def __init__(self, model: Any, window: Window = ALWAYS, skip: SkipLayers | None = None):
        super().__init__(model)
        self.window, self.skip = window, skip

    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """x: [B, C, H, W]; timestep: sigma [B].  Returns x0, whatever ComfyUI calls it."""
        level = level_in(model_options, timestep)
        options = dict(model_options or {})
        if self.skip is not None and self.skip.active(level):
            after = options.get("sampler_post_cfg_function", [])
            options["sampler_post_cfg_function"] = [*after, partial(guide_by_skipping, self.skip)]
        return comfy.samplers.sampling_function(
            self.inner_model,
            x,
            timestep,
            self.conds.get("negative"),
            self.conds.get("positive"),
            self.cfg if level in self.window else 1.0,
            model_options=options,
            seed=seed,
        )


def guide_by_skipping(skip: SkipLayers, run: dict[str, Any]) -> Tensor:
    """The guided x0 of a step, moved away from what the network says without some blocks."""
    options = dict(run["model_options"])
    for layer in skip.layers:
        options = comfy.model_patcher.set_model_options_patch_replace(
            options, leave_out, "dit", "double_block", layer
        )
    (skipped,) = comfy.samplers.calc_cond_batch(
        run["model"], [run["cond"]], run["input"], run["sigma"], options
    )
    return skip_layer_guidance(run["denoised"], run["cond_denoised"], skipped, skip.scale)


def leave_out(arguments: dict[str, Any], block: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    """In place of a block: its input, unchanged."""
    return arguments


# Runs


@dataclass(frozen=True)
class Guidance:
    """How a run is guided; spans are parts of the run, 0 to 1."""

    cfg: float
    span: tuple[float, float]  # in which cfg holds
    skip_scale: float  # of skip-layer guidance; 0: off
    skip_layers: tuple[int, ...]
    skip_span: tuple[float, float]


@dataclass(frozen=True)
class Run:
    """A run with nothing left to decide."""

    model: Any  # MODEL with the shift of the sigmas
    guider: SD3Guider
    sampler: Any  # SAMPLER
    shift: float
    dtype: torch.dtype  # of the computation
    notes: tuple[str, ...]


def with_shift_of(sigmas: Tensor, model: Any) -> tuple[Any, float, tuple[str, ...]]:
    """The MODEL whose percents are counted with the shift that the SIGMAS were made with.

    Returns it, the shift, and a note where the two disagreed.
    """
    own = model.get_model_object("model_sampling")
    own_shift = float(getattr(own, "shift", 3.0))
    given = shift_of(sigmas)
    if given is None or math.isclose(given, own_shift, rel_tol=1e-6):
        return model, own_shift, ()
    sampling = copy.deepcopy(own)
    sampling.set_parameters(shift=given, multiplier=sampling.multiplier)
    shifted = model.clone()
    shifted.add_object_patch("model_sampling", sampling)
    note = (
        f"The sigmas were made with shift {given:g}, the model is set to {own_shift:g}: the sigmas "
        "decide, and percents of the run are counted with theirs."
    )
    return shifted, given, (note,)


def parse_layers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


class SD3Sample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3Sample",
                "display_name": "SD3 Sample",
                "category": f"{CATEGORY}/sampling",
                "description": "Draw: from noise to a clean latent along the rectified flow. Takes "
                "any SD3 MODEL; patches, LoRAs, ControlNets, areas and masks act as in KSampler.",
                "search_aliases": ["ksampler", "sampler", "sample", "generate", "skip layer"],
                "inputs": [
                    io.Model.Input("model", tooltip="The denoiser: ours or ComfyUI's SD3."),
                    io.Conditioning.Input("positive", tooltip="What the picture shows."),
                    io.Conditioning.Input("negative", tooltip="What to steer away from."),
                    io.Latent.Input(
                        "latent_image",
                        tooltip="What to draw on: empty, or an encoded picture (with its mask).",
                    ),
                    io.Sigmas.Input("sigmas", tooltip="The noise levels: SD3 Shift Schedule."),
                    seed_input(),
                    cfg_input(),
                    sampler_input(),
                    *advanced([*skip_and_window_inputs(), *noise_inputs()]),
                ],
                "outputs": [
                    io.Latent.Output(
                        tooltip="For SD3 VAE Decode; still noisy where the sigmas end above 0."
                    )
                ],
            }
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        sigmas: Tensor,
        seed: int,
        cfg: float,
        sampler_name: str,
        slg_scale: float = 0.0,
        slg_layers: str = "7, 8, 9",
        slg_start_percent: float = 0.01,
        slg_end_percent: float = 0.2,
        cfg_start_percent: float = 0.0,
        cfg_end_percent: float = 1.0,
        add_noise: bool = True,
        return_with_leftover_noise: bool = True,
    ) -> io.NodeOutput:
        guidance = Guidance(
            cfg=cfg,
            span=(cfg_start_percent, cfg_end_percent),
            skip_scale=slg_scale,
            skip_layers=parse_layers(slg_layers) if slg_scale else (),
            skip_span=(slg_start_percent, slg_end_percent),
        )
        samples = check_inputs(model, positive, negative, latent_image)
        sampler_name = chosen_sampler(sampler_name, model)
        with coded("bad_setting"):
            notes = check_levels(sigmas, sampler_name)
            start = begun(
                samples,
                sigmas,
                add_noise,
                lambda: noise(samples.shape, seed, latent_image.get("batch_index")),
            )
            passage = Passage(sampler_name, start.begin, levels_of_all(sigmas, add_noise))
            run = prepare(model, sigmas, sampler_name, guidance, passage)
            levels, said = ended(sigmas, return_with_leftover_noise)
        notes += [*start.notes, *said, note_on_cfg(cfg)]
        run.guider.set_conds(positive, negative)
        meter = Meter(run.model.load_device)
        x0 = draw(run, start.image, start.noise, latent_image.get("noise_mask"), levels, seed)
        last = float(levels[-1]) if len(levels) else 0.0
        x0 = leave(x0, passage.leftover(last, start.noise, start.image))
        contents = {
            "sampler": sampler_name,
            "seed": seed,
            "guidance": asdict(guidance),
            "shift": run.shift,
            "sigmas": finite_list(levels, 1e6),
            "start": start.how,
            "leftover_noise": last,
            "latent": list(x0.shape),
            "dtype": str(run.dtype).removeprefix("torch."),
            "files": origin_of(model).files,
            "loras": list(origin_of(model).loras),
            "notes": list(filter(None, [*run.notes, *notes])),
            **speed_report(run.guider.model_patcher),  # with hooks another than run.model
            **meter.reading(),
        }
        return io.NodeOutput({**without_ratios(latent_image), "samples": x0}, ui=report(contents))


def seed_input() -> Any:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=2**64 - 1,
        control_after_generate=True,
        tooltip="Which noise to start from; the same noise as KSampler's.",
    )


def cfg_input() -> Any:
    return io.Float.Input(
        "cfg",
        default=4.5,
        min=0.0,
        max=100.0,
        step=0.1,
        tooltip="How strongly the prompt counts. 1 leaves the negative prompt out and halves the "
        "time; Turbo models take 1. At 0 the negative prompt alone is drawn.",
    )


def sampler_input() -> Any:
    return io.Combo.Input(
        "sampler_name",
        options=[AUTO, *SAMPLERS],
        default=AUTO,
        tooltip="How to walk. auto: what suits the model, for other packs' dpmpp_2m. euler is "
        "plainest, dpmpp_2m needs fewer steps, heun calls the model twice a step, euler_ancestral "
        "adds noise on the way and suits small models.",
    )


def chosen_sampler(name: str, model: Any) -> str:
    return origin_of(model).preset.sampler if name == AUTO else name


def speed_report(model: Any) -> dict[str, Any]:
    """What of the speed acted in the run that is just done."""
    told = last_run(model)
    if told is None:
        return {}
    return {"speed": [asdict(gain) for gain in told.gains], "distance": told.distance}


def skip_and_window_inputs() -> list[Any]:
    percent = {"min": 0.0, "max": 1.0, "step": 0.001, "optional": True}
    return [
        io.Float.Input(
            "slg_scale",
            default=0.0,
            min=0.0,
            max=MOST_SKIP_SCALE,
            step=0.1,
            optional=True,
            tooltip="Skip-layer guidance: away from what the model draws without some of its "
            "blocks. 0 is off; 2.5 with cfg 4 for SD3.5 Medium.",
        ),
        io.String.Input(
            "slg_layers",
            default="7, 8, 9",
            optional=True,
            tooltip="The blocks that are left out, counted from 0.",
        ),
        io.Float.Input(
            "slg_start_percent",
            default=0.01,
            tooltip="Part of the run after which skip-layer guidance begins.",
            **percent,
        ),
        io.Float.Input(
            "slg_end_percent",
            default=0.2,
            tooltip="Part of the run after which skip-layer guidance ends.",
            **percent,
        ),
        io.Float.Input(
            "cfg_start_percent",
            default=0.0,
            tooltip="Part of the run after which cfg begins; before, the prompt counts alone. With "
            "a span in SD3 Speed, too, cfg holds where both do.",
            **percent,
        ),
        io.Float.Input(
            "cfg_end_percent",
            default=1.0,
            tooltip="Part of the run after which cfg ends; ending early saves time. With a span in "
            "SD3 Speed, too, cfg holds where both do; measure there leaves this one on.",
            **percent,
        ),
    ]


def noise_inputs() -> list[Any]:
    """For a run in parts, on split sigmas; as KSampler Advanced has them."""
    return [
        io.Boolean.Input(
            "add_noise",
            default=True,
            optional=True,
            tooltip="Off: the latent was left noisy by another sampler, and the sigmas go on where "
            "it stopped (second output of SplitSigmas). With another SD3 Sample of the same "
            "settings before it this is the run in one, bit for bit.",
        ),
        io.Boolean.Input(
            "return_with_leftover_noise",
            default=True,
            optional=True,
            tooltip="On: where the sigmas end above 0, the latent keeps that noise, for another "
            "SD3 Sample with add_noise off. Off: the last step goes on to 0.",
        ),
    ]


def check_inputs(model: Any, positive: Any, negative: Any, latent: dict[str, Any]) -> Tensor:
    """All that can be told before the long work.  Returns the samples [B, C, H, W]."""
    widths = widths_of(model)
    check_conditioning("positive", positive, widths)
    check_conditioning("negative", negative, widths)
    return fitted_samples(model, latent)


def fitted_samples(model: Any, latent: dict[str, Any]) -> Tensor:
    """The samples [B, C, H, W]; an empty latent gets the model's channels.  Raises NodeError."""
    widths = widths_of(model)
    samples = fix_empty_latent(model, latent)
    check_latents(samples, widths)
    return samples


def prepare(
    model: Any,
    sigmas: Tensor,
    sampler_name: str,
    guidance: Guidance,
    passage: Passage | None = None,
) -> Run:
    """passage: of a run in parts.  Raises ValueError for settings that cannot be."""
    if sampler_name not in SAMPLERS:
        known = ", ".join((AUTO, *SAMPLERS))
        raise ValueError(f"sampler_name is {quoted(sampler_name)}; choose one of {known}.")
    shifted, shift, notes = with_shift_of(sigmas, model)
    shifted = shifted.clone()
    watch_runs(shifted)
    if passage is not None and passage.levels is not None:
        shifted.model_options.setdefault("transformer_options", {})[LEVELS] = passage.levels
    dtype = inference_dtype(model.model)
    return Run(
        model=shifted,
        guider=make_guider(shifted, guidance, Schedule(shift)),
        sampler=comfy.samplers.KSAMPLER(partial(walk, passage or Passage(sampler_name), dtype)),
        shift=shift,
        dtype=dtype,
        notes=notes,
    )


def make_guider(model: Any, guidance: Guidance, schedule: Schedule) -> SD3Guider:
    """schedule: the one by which percents of the run are noise levels."""
    check_layers(guidance.skip_layers, len(model.model.diffusion_model.joint_blocks))
    window = schedule.window(*guidance.skip_span)
    skip = SkipLayers(guidance.skip_layers, guidance.skip_scale, window)
    guider = SD3Guider(model, schedule.window(*guidance.span), skip)
    guider.set_cfg(guidance.cfg)
    return guider


def draw(
    run: Run,
    samples: Tensor,
    start_noise: Tensor,
    mask: Tensor | None,
    sigmas: Tensor,
    seed: int,
    callback: Callable[..., None] | None = None,
) -> Tensor:
    """From noise to the clean latent [B, C, H, W] in VAE space.

    callback: by ComfyUI's call (step, x0, x, steps); None: this run's own bar and preview.
    Raises NodeError on overflow.
    """
    callback = callback or latent_preview.prepare_callback(run.model, len(sigmas) - 1)
    with coded("bad_setting"):
        x0 = run.guider.sample(
            start_noise.to(samples.dtype),
            samples,
            run.sampler,
            sigmas,
            denoise_mask=mask,
            callback=callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        check_finite(x0, "the MMDiT", run.dtype)
    return x0.to(comfy.model_management.intermediate_device(), intermediate_dtype())
