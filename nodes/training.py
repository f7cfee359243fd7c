"""Training in the graph: thin over sd3_core.training, whose run folders outlive ComfyUI's cache.

A run is named.  The same node queued again goes on where it stopped, also after a restart; more
steps extend it; any other change is refused with the list of what differs.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..sd3_core.checkpoints.header import read_header
from ..sd3_core.checkpoints.lora_files import read_lora as read_adapters
from ..sd3_core.checkpoints.lora_files import save_lora
from ..sd3_core.checkpoints.save import save_tensors, temporary_name
from ..sd3_core.checkpoints.tensors import read_tensors
from ..sd3_core.errors import quoted
from ..sd3_core.schedule import Schedule, Window
from ..sd3_core.text.encoders import ENCODERS
from ..sd3_core.training.config import (
    LORA_OPTIMIZERS,
    LR_SCHEDULES,
    TrainConfig,
    make_config,
    read_toml,
)
from ..sd3_core.training.curve import density_image
from ..sd3_core.training.densities import find_density
from ..sd3_core.training.dpo import newest_numbers, spoken
from ..sd3_core.training.flow import STORED
from ..sd3_core.training.folders import check_held, list_pictures
from ..sd3_core.training.loop import Outcome
from ..sd3_core.training.objectives import RectifiedFlow
from ..sd3_core.training.preferences import list_pairs
from ..sd3_core.training.run import RunRefused, is_usable_name, read_log, run_folder
from ..sd3_core.training.trainer import train
from ._compat import advanced, schema
from .comfy_lora import find_patches
from .datasets import DATASET, PREFERENCES, TrainingData, tokenizer_file
from .errors import NodeError, coded
from .frozen_base import FrozenBase
from .lora import patched
from .progress import Meter
from .training_progress import Listener, as_images, opened, sample_files
from .wires import CATEGORY, REPORT, describe_file, report, widths_of

DENSITY = "SD3_TIMESTEP_DENSITY"
LORA_MODEL, LOSS_MAP = "LORA_MODEL", "LOSS_MAP"  # ComfyUI's own
TRAINING = f"{CATEGORY}/training"
POINTS = 201  # of a drawn density
# Settings that a workflow may not give in `more`: they name files, or belong to ComfyUI.
WITHHELD = (
    *("run_name", "output", "method", "checkpoint", "mmdit", "vae", "clip_l", "clip_g", "t5"),
    *("tokenizers", "data", "validation_data", "device", "dialect", "use"),
)
# Others that are set elsewhere in the graph, and where.
ELSEWHERE = {
    **dict.fromkeys(
        ("density", "shift", "lowest_sigma", "highest_sigma"),
        "the node SD3 Timestep Density on the input density",
    ),
    "sample_prompts": "the input sample_prompt",
}
UNSET = {"resolution": 0, "lora_alpha": 0.0}  # what stands for None in a widget
MOST_SAMPLES = 64  # pictures in one IMAGE, which holds 12 MB for each of 1024 x 1024
SELDOM = 10**6  # steps between sample pictures: before the first step and after the last


# Timestep density


@dataclass(frozen=True)
class TimestepDensity:
    """SD3_TIMESTEP_DENSITY: how often training visits each noise level."""

    density: str  # as TrainConfig.density
    shift: float | None  # None: the MODEL's
    lowest_sigma: float
    highest_sigma: float

    def flow(self, shift: float) -> RectifiedFlow:
        window = Window(high=self.highest_sigma, low=self.lowest_sigma)
        schedule = Schedule(self.shift or shift)
        return RectifiedFlow(find_density(self.density), schedule, window=window)


class SD3TimestepDensity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        def number(name: str, default: float, low: float, high: float, tooltip: str) -> Any:
            return io.Float.Input(
                name, default=default, min=low, max=high, step=0.01, optional=True, tooltip=tooltip
            )

        return schema(
            {
                "node_id": "SD3TimestepDensity",
                "display_name": "SD3 Timestep Density",
                "category": TRAINING,
                "description": "Which noise levels training looks at, and how often. Without this "
                "node: the paper's logit_normal(0, 1) with the MODEL's own shift.",
                "search_aliases": ["timesteps", "logit normal", "shift", "sigma", "density"],
                "inputs": [
                    io.Combo.Input(
                        "density",
                        options=["logit_normal", "mode", "cosmap", "uniform", "beta"],
                        default="logit_normal",
                        tooltip="The law of the times before the shift; logit_normal is the "
                        "paper's best of 61.",
                    ),
                    io.Float.Input(
                        "shift",
                        default=0.0,
                        min=0.0,
                        max=100.0,
                        step=0.01,
                        tooltip="Moves all of them to higher noise. 0: the MODEL's own, as it is "
                        "sampled with.",
                    ),
                    *advanced(
                        [
                            number("mean", 0.0, -5, 5, "logit_normal: above 0 favours noise."),
                            number("std", 1.0, 0.05, 5, "logit_normal: how wide it is."),
                            number("mode_scale", 1.29, -1, 1.75, "mode: above 0, the middle."),
                            number("beta_a", 1.5, 0.5, 10, "beta: above b favours noise."),
                            number("beta_b", 1.0, 0.5, 10, "beta: above a favours data."),
                            number("lowest_sigma", 0.0, 0, 1, "Less noise is never trained."),
                            number("highest_sigma", 1.0, 0, 1, "More noise is never trained."),
                        ]
                    ),
                ],
                "outputs": [
                    io.Custom(DENSITY).Output(
                        display_name="density", tooltip="For SD3 Train LoRA and SD3 Train DPO."
                    )
                ],
            }
        )

    @classmethod
    def execute(
        cls,
        density: str,
        shift: float,
        mean: float = 0.0,
        std: float = 1.0,
        mode_scale: float = 1.29,
        beta_a: float = 1.5,
        beta_b: float = 1.0,
        lowest_sigma: float = 0.0,
        highest_sigma: float = 1.0,
    ) -> io.NodeOutput:
        numbers = {
            "logit_normal": f"({mean:g}, {std:g})",
            "mode": f"({mode_scale:g})",
            "beta": f"({beta_a:g}, {beta_b:g})",
        }
        text = density + numbers.get(density, "")
        with coded("bad_setting"):
            chosen = TimestepDensity(text, shift or None, lowest_sigma, highest_sigma)
            drawn = shift or Schedule().shift
            flow = chosen.flow(drawn)
        sigma = torch.linspace(0, 1, POINTS, dtype=torch.float64)[1:-1]  # some end in infinity
        points = list(zip(sigma.tolist(), flow.pdf(sigma).tolist(), strict=True))
        title = f"{text}, shift {drawn:g}" + ("" if shift else " (the MODEL's decides)")
        contents = {
            "density": text,
            "shift": shift or None,
            "sigma": [round(x, 4) for x, _ in points],
            "pdf": [round(y, 5) for _, y in points],
        }
        picture = ui.PreviewImage(as_images([density_image(points, title)]), cls=cls).as_dict()
        return io.NodeOutput(chosen, ui={**picture, **report(contents)})


# Runs


class LoRATensors(dict):
    """A LORA_MODEL: ComfyUI's own nodes see a dict of tensors.

    metadata: what the training wrote into its file.
    """

    metadata: Mapping[str, str]

    def __init__(self, path: Path):
        header = read_header(path)
        with torch.inference_mode(False):  # they may end up in a training run
            super().__init__(read_tensors(header))
        self.metadata = header.metadata


def run_settings(widgets: Mapping[str, Any], more: str) -> dict[str, Any]:
    """TrainConfig's settings from a node's widgets.  Raises ValueError."""
    settings = {k: v for k, v in widgets.items() if k not in UNSET or v != UNSET[k]}
    prompt = settings.pop("sample_prompt", "")
    settings["sample_prompts"] = [prompt] if prompt else []
    extra = read_toml(more) if more.strip() else {}
    if withheld := sorted(set(extra) & set(WITHHELD)):
        raise ValueError(
            f"more names {', '.join(withheld)}, which the node's own inputs decide; remove it."
        )
    for name in extra:
        if where := ELSEWHERE.get(name):
            raise ValueError(f"more names {name}, which is not set there: use {where}.")
    if twice := sorted(set(extra) & set(widgets)):
        raise ValueError(f"more repeats {', '.join(twice)}, which is an input of the node.")
    return {**settings, **extra}


def density_settings(density: TimestepDensity | None, shift: float) -> dict[str, Any]:
    density = density or TimestepDensity("logit_normal(0, 1)", None, 0.0, 1.0)
    return {
        "density": density.density,
        "shift": density.shift or shift,
        "lowest_sigma": density.lowest_sigma,
        "highest_sigma": density.highest_sigma,
    }


@dataclass(frozen=True)
class Datasets:
    """What arrives at a training node."""

    taught: TrainingData
    prior: TrainingData | None = None  # held to the network's answers without the LoRA
    validation: TrainingData | None = None

    def __post_init__(self) -> None:
        for name, other in (("prior", self.prior), ("validation", self.validation)):
            if other is None:
                continue
            if other.files != self.taught.files:
                raise ValueError(
                    f"{name} is encoded by other files than what is learnt from; connect one CLIP "
                    "and one VAE to both."
                )
            if name == "prior" and other.source.path == self.taught.source.path:
                raise ValueError(
                    f"prior is the folder {other.source.path.name}, which is learnt from; it takes "
                    "another one."
                )
        held = () if self.validation is None else (self.validation.source,)
        check_held((self.taught.source,), held)

    def settings(self, mmdit: Path) -> dict[str, Any]:
        """Pictures and the networks that read them; a text encoder not connected takes no part."""
        files = {**self.taught.files, "mmdit": mmdit}
        prior = [] if self.prior is None else [replace(self.prior.source, prior=True)]
        return {
            **files,
            "checkpoint": tokenizer_file(files),
            "data": [self.taught.source, *prior],
            "validation_data": [] if self.validation is None else [self.validation.source],
            "use": [kind for kind in ENCODERS if kind in self.taught.files],
        }


def first_caption(data: TrainingData, pairs: bool) -> str:
    """A prompt of the data itself, to draw what it has taught."""
    if pairs:
        captions = (pair.captions for pair in list_pairs(data.source).pairs)
    else:
        found = list_pictures(data.source).found
        captions = (one.captions[0] for one in found if one.captions)
    return next((some[0] for some in captions if some), "")


def plan_run(
    base: FrozenBase,
    data: Datasets,
    method: str,
    density: TimestepDensity | None,
    widgets: Mapping[str, Any],
    more: str,
) -> TrainConfig:
    """The run that a node asks for.  Raises ValueError."""
    settings = run_settings(widgets, more)
    if not settings["sample_prompts"]:
        settings["sample_prompts"] = [first_caption(data.taught, method == "dpo")]
    return make_config(
        {
            "save_dtype": "fp32",  # what leaves the node is rounded once, by what saves it
            **({"weight_decay": 0.0} if method == "dpo" else {}),  # the reference draws back enough
            **settings,
            **density_settings(density, base.shift),
            **data.settings(base.path),
            "method": method,
            "output": Path(folder_paths.get_output_directory()),
            "device": str(comfy.model_management.get_torch_device()),
            "sample_every": settings.get("sample_every") or SELDOM,
        }
    )


def train_in_graph(
    cls: Any,
    method: str,
    model: Any,
    data: TrainingData,
    density: TimestepDensity | None,
    more: str,
    widgets: Mapping[str, Any],
    **others: TrainingData | None,
) -> io.NodeOutput:
    """MODEL and data -> MODEL with the LoRA, LORA_MODEL, LOSS_MAP, IMAGE.

    others: see Datasets.
    """
    widths_of(model)  # says no to another kind of model
    base = FrozenBase(model)
    with coded("bad_setting"):
        config = plan_run(base, Datasets(data, **others), method, density, widgets, more)
        folder = run_folder(config.output, config.run_name)
    meter = Meter(comfy.model_management.get_torch_device())
    node_id = getattr(cls.hidden, "unique_id", None)
    listener = Listener(str(node_id or ""), config.steps, folder / "samples")
    for lora in base.loras:
        listener.on_note(f"the base that is kept as it is includes {lora}")
    outcome = run_to_the_end(config, base, listener)
    product = outcome.best if outcome.stopped and outcome.best else outcome.product
    return result(cls, model, product, outcome, base, listener, meter)


def run_to_the_end(config: TrainConfig, base: FrozenBase, listener: Listener) -> Outcome:
    """The core's training, outside ComfyUI's inference mode and with its memory to itself."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    try:
        with torch.inference_mode(False), torch.enable_grad(), coded("bad_setting"):
            heard = (listener.on_step, listener.on_note, listener.on_encoded)
            poll = comfy.model_management.throw_exception_if_processing_interrupted
            return train(config, *heard, base.base, poll)
    except NodeError as error:
        if isinstance(error.__cause__, RunRefused):
            raise NodeError("run_refused", str(error.__cause__)) from error
        raise
    finally:
        base.release()


def result(
    cls: Any,
    model: Any,
    product: Path,
    outcome: Outcome,
    base: FrozenBase,
    listener: Listener,
    meter: Meter,
) -> io.NodeOutput:
    tensors = LoRATensors(product)
    trained, _ = patched(model, None, find_patches(product, model, None), product, 1.0)
    lines = read_log(outcome.folder)
    losses = [line["loss"] for line in lines if "loss" in line]
    preference = newest_numbers(lines)
    if preference:
        listener.on_note(f"at step {preference['step']} {spoken(preference)}")
    samples = sample_files(outcome.folder / "samples")
    curve = opened(outcome.folder / "curve.png")
    some = spread(samples, MOST_SAMPLES)
    images = as_images([opened(path) for path in some]) if samples else as_images([curve])
    contents = {
        "run": outcome.folder.name,
        "steps": outcome.step,
        "loss": losses[-1] if losses else None,
        "lora": describe_file(product),
        "base_loras": base.loras,
        "stopped": outcome.stopped,
        **({"preference": preference} if preference else {}),
        "notes": listener.notes,
        **meter.reading(),
    }
    shown = ui.PreviewImage(as_images([curve]), cls=cls).as_dict()
    if samples:
        shown["images"] = [*shown["images"], *ui.PreviewImage(images[-1:], cls=cls).values]
    return io.NodeOutput(
        trained, tensors, {"loss": losses}, images, ui={**shown, REPORT: [contents]}
    )


def spread(paths: Sequence[Path], most: int) -> list[Path]:
    """At most so many, evenly, with the last one."""
    every = max(1, -(-len(paths) // most))
    return list(paths[::-1][::every][::-1])


# Nodes


def run_inputs(data_type: str, run_name: str, rate: float, rank: int, steps: int) -> list[Any]:
    pairs = data_type == PREFERENCES
    return [
        io.Model.Input("model", tooltip="What is taught; LoRAs on it belong to the frozen base."),
        io.Custom(data_type).Input(
            "dataset",
            display_name="preferences" if pairs else "dataset",
            tooltip="Pairs: SD3 Preferences." if pairs else "Pictures: SD3 Training Images.",
        ),
        io.String.Input(
            "run_name",
            default=run_name,
            tooltip="Names the run and its folder, output/sd3/NAME. The same name goes on where it "
            "stopped; other settings need another name.",
        ),
        io.Int.Input(
            "steps", default=steps, min=1, max=10**6, tooltip="In all; more extend the run."
        ),
        io.Float.Input(
            "learning_rate",
            default=rate,
            min=0.0,
            max=10.0,
            step=1e-6,
            round=False,
            tooltip="How far a step goes.",
        ),
        io.Int.Input(
            "rank", default=rank, min=1, max=1024, tooltip="Of the LoRA: how much it can hold."
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=1024,
            tooltip=f"{'Pairs' if pairs else 'Pictures'} at once; costs memory.",
        ),
        io.Int.Input(
            "resolution",
            default=0,
            min=0,
            max=4096,
            step=16,
            tooltip="Pictures are scaled to about resolution x resolution. 0: the model's own.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**63 - 1,
            control_after_generate=False,  # another seed is another run
            tooltip="Decides all that is drawn.",
        ),
    ]


def rare_inputs(pairs: bool) -> list[Any]:
    """Behind the density; all optional, in the order in which they froze."""
    return [
        io.Int.Input(
            "accumulation",
            default=16 if pairs else 1,
            min=1,
            max=4096,
            optional=True,
            tooltip="Passes whose gradients make one step: a larger batch without its memory.",
        ),
        io.Float.Input(
            "lora_alpha",
            default=0.0,
            min=0.0,
            max=4096.0,
            optional=True,
            tooltip="The LoRA acts at alpha / rank. 0: the rank, a scale of 1.",
        ),
        io.Combo.Input(
            "optimizer",
            options=list(LORA_OPTIMIZERS),
            default="adamw",
            optional=True,
            tooltip="adafactor needs least memory; adamw_8bit and prodigy need extra packages.",
        ),
        io.Combo.Input(
            "lr_schedule",
            options=list(LR_SCHEDULES),
            default="constant",
            optional=True,
            tooltip="The learning rate after the warm-up.",
        ),
        io.Int.Input(
            "warmup",
            default=50 if pairs else 100,
            min=0,
            max=10**6,
            optional=True,
            tooltip="Steps in which the learning rate rises from 0.",
        ),
        io.Float.Input(
            "caption_dropout",
            default=0.0 if pairs else 0.1,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="How often a caption is replaced by the empty one.",
        ),
        io.Float.Input(
            "ema",
            default=0.0,
            min=0.0,
            max=0.99999,
            step=0.001,
            round=False,
            optional=True,
            tooltip="Decay of averaged weights, such as 0.999. 0: none.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=True,
            optional=True,
            tooltip="Far less memory, about a third more time.",
        ),
        io.String.Input(
            "sample_prompt",
            default="",
            optional=True,
            tooltip="What to draw on the way. Empty: the first caption.",
        ),
        io.Int.Input(
            "sample_every",
            default=0,
            min=0,
            max=10**6,
            optional=True,
            tooltip="Steps between sample pictures. 0: before the first step and after the last.",
        ),
        io.Int.Input(
            "validate_every",
            default=100,
            min=0,
            max=10**6,
            optional=True,
            tooltip="Steps between measurements with fixed noise; 0: never.",
        ),
        io.Int.Input(
            "checkpoint_every",
            default=100,
            min=1,
            max=10**6,
            optional=True,
            tooltip="Steps between saved states; an interrupted run is saved in any case.",
        ),
    ]


def more_input() -> Any:
    return io.String.Input(
        "more",
        multiline=True,
        default="",
        optional=True,
        tooltip="Any other setting of docs/train-lora.toml, a line each: lora_blocks = [0, 1].",
    )


def validation_input(data_type: str) -> Any:
    pairs = data_type == PREFERENCES
    what, maker = ("pairs", "Preferences") if pairs else ("pictures", "Training Images")
    return io.Custom(data_type).Input(
        "validation",
        optional=True,
        tooltip=f"Other {what}, only measured on: SD3 {maker}. Without them it is measured on "
        "those that are learnt from, and looks better than it is.",
    )


def run_outputs() -> list[Any]:
    return [
        io.Model.Output(tooltip="The MODEL with the LoRA on it, at strength 1."),
        io.Custom(LORA_MODEL).Output(
            display_name="lora", tooltip="The LoRA, for SD3 Save LoRA, or ComfyUI's own nodes."
        ),
        io.Custom(LOSS_MAP).Output(
            display_name="loss", tooltip="The loss of each step, for Plot Loss Graph."
        ),
        io.Image.Output(
            display_name="samples", tooltip="Sample pictures by step; else the loss curve."
        ),
    ]


def run_fault(run_name: str) -> bool | str:
    """For validate_inputs."""
    try:
        run_folder(Path(folder_paths.get_output_directory()), run_name)
    except ValueError as error:
        return str(NodeError("bad_setting", str(error)))
    return True


class SD3TrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3TrainLoRA",
                "display_name": "SD3 Train LoRA",
                "category": TRAINING,
                "description": "Teach the model a subject or a style from pictures with captions. "
                "The queue waits until it is done; interrupting saves, queueing again goes on.",
                "search_aliases": ["train", "lora", "fine-tune", "finetune", "dreambooth"],
                "is_output_node": True,
                "hidden": [io.Hidden.unique_id],
                "inputs": [
                    *run_inputs(DATASET, "my-lora", 1e-4, rank=16, steps=1000),
                    io.Custom(DENSITY).Input(
                        "density",
                        optional=True,
                        tooltip="Which noise levels are trained: SD3 Timestep Density.",
                    ),
                    *advanced([*rare_inputs(pairs=False), more_input()]),
                    io.Custom(DATASET).Input(
                        "prior",
                        optional=True,
                        tooltip="Pictures of other things: SD3 Training Images. On them the model "
                        "is held to what it answers without the LoRA, so that it forgets less; "
                        "prior_weight (4) in more weighs them.",
                    ),
                    validation_input(DATASET),
                ],
                "outputs": run_outputs(),
            }
        )

    @classmethod
    def validate_inputs(cls, run_name: str) -> bool | str:
        return run_fault(run_name) if run_name is not None else True

    @classmethod
    def execute(
        cls,
        model: Any,
        dataset: TrainingData,
        density: TimestepDensity | None = None,
        more: str = "",
        prior: TrainingData | None = None,
        validation: TrainingData | None = None,
        **widgets: Any,
    ) -> io.NodeOutput:
        others = {"prior": prior, "validation": validation}
        return train_in_graph(cls, "lora", model, dataset, density, more, widgets, **others)


class SD3TrainDPO(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3TrainDPO",
                "display_name": "SD3 Train DPO",
                "category": TRAINING,
                "description": "Teach the model what you prefer, from pairs of its own pictures "
                "(Diffusion-DPO). Ends with a sentence when the preferred pictures get worse too.",
                "search_aliases": ["dpo", "preference", "alignment", "rlhf", "train"],
                "is_output_node": True,
                "hidden": [io.Hidden.unique_id],
                "inputs": [
                    *run_inputs(PREFERENCES, "my-taste", 5e-5, rank=32, steps=500),
                    io.Custom(DENSITY).Input(
                        "density",
                        optional=True,
                        tooltip="Which noise levels are trained: SD3 Timestep Density.",
                    ),
                    *advanced(
                        [
                            *rare_inputs(pairs=True),
                            io.Float.Input(
                                "dpo_beta",
                                default=2000.0,
                                min=0.01,
                                max=1e6,
                                optional=True,
                                tooltip="How dear it is to leave the model as it was; mean errors, "
                                "with the half.",
                            ),
                            io.Float.Input(
                                "dpo_sft_weight",
                                default=0.0,
                                min=0.0,
                                max=1e6,
                                optional=True,
                                tooltip="Holds the preferred pictures' error down: 25 to 100 at "
                                "beta 2000.",
                            ),
                            io.Float.Input(
                                "dpo_loser_scale",
                                default=1.0,
                                min=0.0,
                                max=1.0,
                                step=0.05,
                                optional=True,
                                tooltip="Below 1, making the other pictures worse pays less.",
                            ),
                            io.Int.Input(
                                "dpo_patience",
                                default=3,
                                min=0,
                                max=1000,
                                optional=True,
                                tooltip="Ends after so many measurements with a rising error of "
                                "the preferred pictures. 0: never.",
                            ),
                            more_input(),
                        ]
                    ),
                    validation_input(PREFERENCES),
                ],
                "outputs": run_outputs(),
            }
        )

    @classmethod
    def validate_inputs(cls, run_name: str) -> bool | str:
        return run_fault(run_name) if run_name is not None else True

    @classmethod
    def execute(
        cls,
        model: Any,
        dataset: TrainingData,
        density: TimestepDensity | None = None,
        more: str = "",
        validation: TrainingData | None = None,
        **widgets: Any,
    ) -> io.NodeOutput:
        others = {"validation": validation}
        return train_in_graph(cls, "dpo", model, dataset, density, more, widgets, **others)


class SD3SaveLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3SaveLoRA",
                "display_name": "SD3 Save LoRA",
                "category": TRAINING,
                "description": "Write a LoRA into ComfyUI's output folder, where the LoRA loaders "
                "find it. The workflow is inside: drop the file on the canvas to get it back.",
                "search_aliases": ["save lora", "export lora", "kohya", "diffusers", "peft"],
                "is_output_node": True,
                "hidden": [io.Hidden.prompt, io.Hidden.extra_pnginfo],
                "inputs": [
                    io.Custom(LORA_MODEL).Input("lora", tooltip="From a training node."),
                    io.String.Input(
                        "filename_prefix",
                        default="loras/sd3",
                        tooltip="Place and name below the output folder.",
                    ),
                    io.Combo.Input(
                        "dialect",
                        options=["comfy", "kohya", "diffusers"],
                        default="comfy",
                        tooltip="The names inside: ComfyUI's, sd-scripts' or PEFT's. ComfyUI reads "
                        "all three.",
                    ),
                    io.Combo.Input(
                        "save_dtype",
                        options=["fp16", "bf16", "fp32"],
                        default="fp16",
                        tooltip="How numbers are kept.",
                    ),
                ],
                "outputs": [],
            }
        )

    @classmethod
    def execute(
        cls, lora: Mapping[str, Tensor], filename_prefix: str, dialect: str, save_dtype: str
    ) -> io.NodeOutput:
        path, subfolder = save_place(filename_prefix)
        plain = path.with_name(temporary_name(f"{path.name}.plain"))
        with coded("wrong_lora"), torch.inference_mode(False):
            try:
                save_tensors(plain, {key: tensor.clone() for key, tensor in lora.items()})
                adapters = read_adapters(plain).parts
            finally:
                plain.unlink(missing_ok=True)
            metadata = {**getattr(lora, "metadata", {}), **graph_metadata(cls.hidden)}
            path = save_lora(path, adapters, dialect, metadata, STORED[save_dtype])
        contents = {
            "lora": describe_file(path),
            "subfolder": subfolder,
            "dialect": dialect,
            "layers": sum(len(part) for part in adapters.values()),
        }
        return io.NodeOutput(ui=report(contents))


def save_place(prefix: str) -> tuple[Path, str]:
    """The next file of this prefix below the output folder, and its folder there.  NodeError."""
    reason = "a part of it is too long, or a name that Windows keeps for itself"
    parts = [part for part in re.split(r"[/\\]", prefix) if part not in ("", ".")]
    if parts and all(map(is_usable_name, parts)):
        try:
            folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
                prefix, folder_paths.get_output_directory()
            )
            return Path(folder) / f"{name}_{counter:05}_.safetensors", subfolder
        except OSError as error:  # it runs through a file, or may not be written
            reason = error.strerror or "it cannot be made"
        except Exception:  # ComfyUI's own, for a place outside
            reason = "it leads out of the output folder"
    raise NodeError(
        "bad_setting",
        f"filename_prefix is {quoted(prefix)}: {reason}. Name a place and the beginning of a file "
        "name below the output folder, such as loras/sd3.",
    )


def graph_metadata(hidden: Any) -> dict[str, str]:
    """The graph, under the names by which ComfyUI's canvas finds it; nothing where it is off."""
    from comfy.cli_args import args

    if args.disable_metadata or hidden is None:
        return {}
    known = {**(hidden.extra_pnginfo or {})}
    if hidden.prompt is not None:
        known["prompt"] = hidden.prompt
    return {name: json.dumps(value) for name, value in known.items()}
