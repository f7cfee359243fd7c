"""The approximations of SD3 Speed under ComfyUI's samplers, and the line that tells what acted.

Two wrappers that ComfyUI calls around every run and every step of it, whichever node samples: so
the step cache sees the velocity that leaves guidance, with LoRAs, ControlNets, areas and masks in
it, of a MODEL of ours or of ComfyUI's own.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..sd3_core.schedule import ALWAYS, Schedule, Window, per_image
from ..sd3_core.speed.gains import NOT_ASKED, Gain, asked, fused_kernels, sentence
from ..sd3_core.speed.step_cache import StepCache, relative_rms
from .comfy_levels import Levels, calls_once_a_step
from .comfy_table import RUN, obstacle

KEY = "sd3_speed"  # in transformer_options: Speed; also the wrappers' name
FOREIGN = "it was not loaded by SD3 Workbench"
HOOKED = "hooks may change its weights within a run"
OWN_SCALES = "this guider has scales of its own"
SAMPLER, SIGMAS, CALLBACK = 2, 3, 5  # their places among outer_sample's arguments


@dataclass(frozen=True)
class Speed:
    """What was asked for; percents are parts of the run, 0 to 1."""

    step_cache: float = 0.0
    cfg_start: float = 0.0
    cfg_end: float = 1.0
    fp8: bool = False
    measure: bool = False

    @property
    def approximates(self) -> bool:
        return bool(self.step_cache) or (self.cfg_start, self.cfg_end) != (0.0, 1.0) or self.fp8


OFF = Speed()


@dataclass
class Run:
    """One run, as far as it has come."""

    asked: Speed
    window: Window  # in which cfg holds
    levels: Levels
    hooked: bool  # whether weights may change on the way
    guidable: bool = True  # whether cfg is the guider's scale
    plain: bool = False  # nothing of it acts: the run that the distance is measured from
    cache: StepCache | None = None
    evaluations: int = 0
    guided: int = 0
    tabled: int = 0  # calls of the network with its modulations from the table
    in_float8: int = 0  # and with float8 products


@dataclass(frozen=True)
class Told:
    """What acted in the last run of a model."""

    gains: tuple[Gain, ...]
    distance: float | None

    def sentence(self) -> str:
        line = sentence(self.gains)
        if self.distance is not None:
            line += f" Distance from the run without approximations: {self.distance:.4f}."
        return line


@dataclass
class Runs:
    """The last run of each model that is still there."""

    last: WeakKeyDictionary[Any, Told] = field(default_factory=WeakKeyDictionary)


RUNS = Runs()


def last_run(patcher: Any) -> Told | None:
    return RUNS.last.get(patcher.model)


def watch_runs(patcher: Any) -> None:
    """Put the two wrappers on a MODEL, once."""
    if not patcher.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, around_run)
        patcher.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, around_step)


def around_run(executor: Callable[..., Tensor], *arguments: Any, **more: Any) -> Tensor:
    """OUTER_SAMPLE: once around a run, which returns its latents."""
    guider: Any = executor.class_obj  # pyright: ignore[reportFunctionMemberAccess]
    wanted = guider.model_options.get("transformer_options", {}).get(KEY, OFF)
    plain = None
    if wanted.measure and wanted.approximates:
        positional, named = without_callback(arguments, more)
        plain, _ = carried_out(executor, wanted, positional, named, plain=True)
    latents, run = carried_out(executor, wanted, arguments, more)
    distance = None if plain is None else relative_rms(latents, plain)
    told = Told(gains_of(run, guider.model_patcher), distance)
    RUNS.last[guider.model_patcher.model] = told
    logging.info("SD3 Workbench: %s", told.sentence())
    return latents


def carried_out(
    executor: Callable[..., Tensor],
    wanted: Speed,
    arguments: tuple[Any, ...],
    more: dict[str, Any],
    plain: bool = False,
) -> tuple[Tensor, Run]:
    """The latents of a run, and what it did; the guider's conds are those from before."""
    guider: Any = executor.class_obj  # pyright: ignore[reportFunctionMemberAccess]
    options = guider.model_options.setdefault("transformer_options", {})
    conds = guider.conds
    sampler = more["sampler"] if "sampler" in more else arguments[SAMPLER]
    sigmas = more["sigmas"] if "sigmas" in more else arguments[SIGMAS]
    steps, in_order = sigmas[:-1].float().tolist(), calls_once_a_step(sampler)
    for levels in (Levels(steps, in_order), Levels(steps, trusting=False)):
        guider.conds = {name: [one.copy() for one in every] for name, every in conds.items()}
        run = options[RUN] = begun(guider, wanted, levels, plain)
        latents = executor(*arguments, **more)
        if not levels.misled():
            break
        logging.info("SD3 Workbench: this sampler's noise levels are not the steps'; once more.")
    guider.conds = conds
    return latents, run


def without_callback(
    arguments: tuple[Any, ...], more: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What outer_sample was called with; the callback, sixth or by name, is None."""
    if "callback" in more:
        return arguments, {**more, "callback": None}
    return tuple(None if n == CALLBACK else one for n, one in enumerate(arguments)), more


def begun(guider: Any, wanted: Speed, levels: Levels, plain: bool = False) -> Run:
    sampling = guider.model_patcher.get_model_object("model_sampling")
    schedule = Schedule(float(getattr(sampling, "shift", 3.0)))
    guidable = not hasattr(guider, "cfg2")  # as DualCFGGuider, which never looks at cfg
    cut = guidable and not plain
    window = schedule.window(wanted.cfg_start, wanted.cfg_end) if cut else ALWAYS
    return Run(wanted, window, levels, has_hooks(guider), guidable, plain)


def has_hooks(guider: Any) -> bool:
    return any(one.get("hooks") is not None for every in guider.conds.values() for one in every)


def around_step(
    executor: Callable[..., Tensor], x: Tensor, timestep: Tensor, *more: Any, **named: Any
) -> Tensor:
    """PREDICT_NOISE: x [B, C, H, W] at sigma [B] -> x0, whatever ComfyUI calls it."""
    guider: Any = executor.class_obj  # pyright: ignore[reportFunctionMemberAccess]
    run = run_of(guider.model_options)
    if run is not None:
        run.levels.enter(timestep)
    if run is None or run.plain:
        return executor(x, timestep, *more, **named)
    level, sigma = level_in(guider.model_options, timestep), per_image(timestep, x)
    if run.asked.step_cache and not run.hooked and run.cache is None:
        run.cache = StepCache(run.asked.step_cache, [run.window, *windows_of(guider)])
    velocity = run.cache.look_up(x, level) if run.cache is not None else None
    if velocity is not None:
        return x - sigma * velocity
    run.evaluations += 1
    run.guided += level in run.window
    cfg = guider.cfg
    guider.cfg = cfg if level in run.window else 1.0
    try:
        x0 = executor(x, timestep, *more, **named)
    finally:
        guider.cfg = cfg
    if run.cache is not None:
        run.cache.keep(x, level, (x - x0) / sigma)
    return x0


def run_of(model_options: dict[str, Any] | None) -> Run | None:
    return (model_options or {}).get("transformer_options", {}).get(RUN)


def level_in(model_options: dict[str, Any] | None, timestep: Tensor) -> float:
    """The noise level of the guider's call at sigma, `timestep` [B]."""
    run = run_of(model_options)
    return float(timestep[0]) if run is None else run.levels.of(timestep)


def windows_of(guider: Any) -> Iterator[Window]:
    """Where a prompt, a ControlNet or a guidance of SD3 Sample acts for a part of the run."""
    for every in guider.conds.values():
        for one in every:
            yield spanned(one.get("timestep_start"), one.get("timestep_end"))
            control = one.get("control")
            while control is not None:
                yield spanned(*(getattr(control, "timestep_range", None) or (None, None)))
                control = getattr(control, "previous_controlnet", None)
    yield getattr(guider, "window", ALWAYS)
    skip = getattr(guider, "skip", None)
    yield ALWAYS if skip is None or not skip.scale else skip.window


def spanned(start: float | None, end: float | None) -> Window:
    """start, end: noise levels, the first the higher one."""
    return Window(math.inf if start is None else float(start), float(end or 0.0))


def gains_of(run: Run, patcher: Any) -> tuple[Gain, ...]:
    wanted = run.asked
    why = why_no_table(run, patcher)
    pages = bool(getattr(patcher, "is_dynamic", bool)())
    leave = "ComfyUI pages its weights" if pages else "its weights are the first to make room"
    ours = hasattr(patcher.model.diffusion_model, "tabled")
    spanned_cfg = (wanted.cfg_start, wanted.cfg_end) != (0.0, 1.0)
    guided = f"cfg in {run.guided} of {run.evaluations} evaluations"
    idle = NOT_ASKED if not wanted.step_cache else HOOKED if run.hooked else "no step was taken"
    left_out = run.cache.sentence() if run.cache else idle
    return (
        Gain("modulation table", not why, why or leave),
        fused_kernels(patcher.load_device) if ours else Gain("fused kernels", False, FOREIGN),
        asked("guidance interval", spanned_cfg, guided)
        if run.guidable or not spanned_cfg
        else Gain("guidance interval", False, OWN_SCALES),
        Gain("step cache", run.cache is not None, left_out),
        Gain("fp8", run.in_float8 > 0, "" if run.in_float8 else why if wanted.fp8 else NOT_ASKED),
    )


def why_no_table(run: Run, patcher: Any) -> str:
    """Why the modulations were computed in every step; empty where they were not."""
    if run.tabled:
        return ""
    if not hasattr(patcher.model.diffusion_model, "tabled"):
        return FOREIGN
    if run.hooked:
        return HOOKED
    return obstacle(patcher) or "the sampler did not tell its noise levels"
