"""What a configuration is about: networks, pictures, objective; found, checked, nothing loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import lora
from ..checkpoints.family import model_family, model_preset
from ..checkpoints.layouts import Component, find_components
from ..checkpoints.load import component_of, read_config
from ..models.mmdit import MMDiT, MMDiTConfig
from ..presets import PRESETS, Preset
from ..schedule import Schedule, Window
from ..settings import FLAGS, check_sizes, settled_shift
from ..text.encoders import ENCODERS
from .config import TrainConfig
from .dataset import Dataset, Item, read_dataset
from .densities import find_density
from .folders import Source, check_apart, check_held
from .framing import Framing
from .loop import Poll, never
from .networks import check_trainable
from .objectives import Objective, RectifiedFlow, find_objective
from .preferences import read_preferences


@dataclass(frozen=True)
class Subject:
    """What is trained, and what it is trained on; no weight is read yet."""

    parts: dict[str, Component]  # without the MMDiT when it is a new one
    mmdit: MMDiTConfig
    preset: Preset
    family: str
    resolution: int
    schedule: Schedule
    objective: Objective
    dataset: Dataset
    held: Dataset | None  # to validate on; None: the dataset itself


def find_subject(config: TrainConfig, poll: Poll = never) -> Subject:
    """Read headers and look at the pictures, asking `poll` after each.

    Raises CheckpointError and ValueError.
    """
    if not config.data:
        raise ValueError('data is missing; name a folder of pictures: data = "pictures".')
    check_held(config.data, config.validation_data)
    if config.method != "dpo":  # pairs are listed, not all that lies in a folder
        check_apart((*config.data, *config.validation_data))
    parts = find_networks(config)
    sizes: dict[str, Any] = {kind: read_config(part) for kind, part in parts.items()}
    if config.method == "scratch":
        sizes["mmdit"] = new_mmdit(config, sizes)
        preset, kind = PRESETS["other"], "other"
        preset = replace(preset, shift=1.0, native_pixels=(config.resolution or 0) ** 2)
    else:
        check_sizes(parts, sizes)
        preset = model_preset(parts["mmdit"], sizes["mmdit"])
        kind = model_family(parts["mmdit"], sizes["mmdit"])
    check_encoders(config, parts)
    check_network(config, parts, sizes["mmdit"])
    resolution = config.resolution or int(preset.native_pixels**0.5)
    schedule = Schedule(settled_shift(config.shift, preset, resolution**2))
    flow = RectifiedFlow(
        find_density(config.density),
        schedule,
        config.loss_space,
        Window(high=config.highest_sigma, low=config.lowest_sigma),
    )
    objective = find_objective(config.objective, flow)
    most = sizes["mmdit"].pos_embed_max_size * sizes["mmdit"].patch_size * sizes["vae"].factor
    check_resolution(config, resolution, most)
    held = None
    if config.validation_data and config.validate_every:
        held = dataset_of(config, config.validation_data, resolution, poll)
    dataset = dataset_of(config, weighed(config), resolution, poll)
    for one in (dataset, held):
        for item in () if one is None else one.items:
            check_bucket(config, item, sizes["vae"].factor, resolution, most)
    return Subject(
        parts, sizes["mmdit"], preset, kind, resolution, schedule, objective, dataset, held
    )


def find_networks(config: TrainConfig) -> dict[str, Component]:
    """The networks of the configuration's files, from their headers."""
    files, parts = config.files, {}
    if files.checkpoint is not None:
        parts.update(find_components(files.checkpoint))
    for kind in FLAGS:
        if (path := getattr(files, kind)) is not None:
            parts[kind] = component_of(path, kind)
    if config.method == "scratch":
        parts.pop("mmdit", None)
    needed = ("vae",) if config.method == "scratch" else ("mmdit", "vae")
    if missing := [kind for kind in needed if kind not in parts]:
        raise ValueError(
            f'no {" and no ".join(missing)} in the files of this run: set checkpoint = "...", or '
            f"{' and '.join(f'{kind} = ...' for kind in missing)}."
        )
    return parts


def check_encoders(config: TrainConfig, parts: Mapping[str, Component]) -> None:
    """Raises ValueError when nothing would read the captions."""
    if not set(config.use) & set(parts):
        raise ValueError(
            f"no text encoder takes part: the files hold "
            f"{', '.join(name for name in ENCODERS if name in parts) or 'none'}, and use is "
            f"{list(config.use)}. Set clip_l, clip_g and t5 to their files, or take use away."
        )


def zero_encoders(config: TrainConfig, parts: Mapping[str, Component]) -> list[str]:
    """Encoders that are asked for and not among the files: zeros stand for them."""
    return [name for name in ENCODERS if name in config.use and name not in parts]


def check_blocks(config: TrainConfig, size: MMDiTConfig) -> None:
    """Raises ValueError for a LoRA on joint blocks that the model does not have."""
    blocks = config.lora_blocks
    if blocks is not None and (not blocks or not set(blocks) <= set(range(size.depth))):
        raise ValueError(
            f"lora_blocks is {list(blocks)}; the model's blocks are 0 to {size.depth - 1}."
        )


def check_network(config: TrainConfig, parts: Mapping[str, Component], size: MMDiTConfig) -> None:
    """Raises ValueError for a network that cannot be trained as it is asked; only headers tell."""
    check_blocks(config, size)
    if config.qk_norm is False and size.qk_norm and config.method != "scratch":
        raise ValueError("qk_norm is false, but the model has it; leave the setting away.")
    if config.method == "full":
        check_trainable(parts["mmdit"])
    if config.trains_lora:
        with torch.device("meta"):
            model = MMDiT(size)
        try:
            lora_targets(model, config)
        except ValueError as error:
            raise ValueError(
                f"lora_kinds is {list(config.lora_kinds)}, lora_streams {list(config.lora_streams)}"
                f" and lora_blocks {config.lora_blocks and list(config.lora_blocks)}: the model has"
                " no such layer, so nothing would be taught. attn2 is in SD3.5 Medium alone."
            ) from error


def lora_targets(model: MMDiT, config: TrainConfig) -> list[str]:
    """Paths of the layers that a LoRA is taught on.  Raises ValueError where there are none."""
    return lora.mmdit_targets(
        model, kinds=config.lora_kinds, streams=config.lora_streams, blocks=config.lora_blocks
    )


def check_resolution(config: TrainConfig, resolution: int, most: int) -> None:
    """Before pictures are looked at: whether even a square one is too large.

    most: pixels of a side at which the position table ends.  Raises ValueError.
    """
    side = resolution // config.bucket_step * config.bucket_step
    if side > most:
        raise ValueError(
            f"resolution is {resolution}, and this model's position table ends at {most} pixels a "
            f"side: set resolution = {most}{_larger_table(config, side, most)}."
        )


def check_bucket(config: TrainConfig, item: Item, factor: int, resolution: int, most: int) -> None:
    """Before anything is encoded: whether VAE and position table take a picture's size.

    factor: pixels of a latent pixel.  most: see check_resolution.  Raises ValueError.
    """
    width, height = item.bucket
    if width % factor or height % factor:
        raise ValueError(
            f"{item.name}: its bucket is {width}x{height}, and the VAE takes multiples of {factor} "
            f"pixels; bucket_step is {config.bucket_step}, set one of these."
        )
    if max(width, height) > most:
        widest = math.floor(100 * most**2 / resolution**2) / 100
        raise ValueError(
            f"{item.name}: its bucket is {width}x{height}, and this model's position table ends at "
            f"{most} pixels a side: set widest = {max(widest, 1.0):g} or a smaller resolution"
            f"{_larger_table(config, max(width, height), most)}."
        )


def _larger_table(config: TrainConfig, side: int, most: int) -> str:
    if config.method != "scratch":
        return ""
    return f", or position_size = {-(-side * config.position_size // most)}"


def new_mmdit(config: TrainConfig, sizes: Mapping[str, Any]) -> MMDiTConfig:
    """The size of a new MMDiT: as wide as the encoders and the VAE ask for."""
    if config.resolution is None:
        raise ValueError("resolution is missing; a new model needs one, such as 64.")
    clips = [sizes[kind] for kind in ("clip_l", "clip_g") if kind in sizes]
    if not clips or ("t5" not in sizes and len(clips) < 2):
        raise ValueError(
            "a new model needs its text encoders: clip_l, clip_g and t5, or at least two."
        )
    width = sum(clip.hidden_size for clip in clips)
    qk_norm = True if config.qk_norm is None else config.qk_norm
    return MMDiTConfig(
        depth=config.depth,
        patch_size=config.patch_size,
        in_channels=sizes["vae"].latent_channels,
        context_dim=sizes["t5"].d_model if "t5" in sizes else width,
        pooled_dim=sum(clip.pooled_dim for clip in clips),
        pos_embed_max_size=config.position_size,
        qk_norm=qk_norm,
        dual_attention_layers=config.dual_attention_blocks,
    )


def weighed(config: TrainConfig) -> tuple[Source, ...]:
    """The sources to train on, those of the prior with its weight."""
    return tuple(
        replace(source, weight=source.weight * config.prior_weight) if source.prior else source
        for source in config.data
    )


def dataset_of(
    config: TrainConfig, sources: tuple[Source, ...], resolution: int, poll: Poll
) -> Dataset:
    memory = cache_folder(config) / "pictures.jsonl"

    def on_progress(done: int, total: int) -> None:
        poll()

    if config.method == "dpo":
        framing = Framing(
            resolution,
            config.bucket_step,
            config.widest,
            config.alpha,
            config.background,
            config.crop,
            config.seed,
        )
        return read_preferences(sources, framing=framing, memory=memory, on_progress=on_progress)
    return read_dataset(
        sources,
        resolution=resolution,
        bucket_step=config.bucket_step,
        widest=config.widest,
        alpha=config.alpha,
        background=config.background,
        crop=config.crop,
        crop_seed=config.seed,
        original_share=config.original_share,
        memory=memory,
        on_progress=on_progress,
    )


def cache_folder(config: TrainConfig) -> Path:
    """One for all runs: entries are keyed by what they hold, so runs share them."""
    return config.output / "sd3" / ".cache"


def patch_pixels(subject: Subject) -> int:
    """Side of what becomes one token, in pixels."""
    vae: Any = read_config(subject.parts["vae"])
    return vae.factor * subject.mmdit.patch_size


def small_model(subject: Subject) -> dict[str, str]:
    """What a model of no released family tells of itself; see checkpoints/family.py."""
    return {
        "sd3_workbench.shift": str(subject.schedule.shift),
        "sd3_workbench.native_pixels": str(subject.resolution**2),
    }
