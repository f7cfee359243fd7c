"""Settings of kohya's sd-scripts (sd3_train_network.py) as ours, and a list of what is not used."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import TrainConfig, make_config, read_settings

# What is always so here, or belongs to a way of working that there is not: no word about these.
ALWAYS_SO = frozenset(
    (
        *("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "enable_bucket"),
        *("cache_text_encoder_outputs_to_disk", "network_train_unet_only", "save_model_as"),
        *(
            "sdpa",
            "xformers",
            "mem_eff_attn",
            "highvram",
            "lowvram",
            "save_state",
            "prior_loss_weight",
        ),
        *("max_data_loader_n_workers", "persistent_data_loader_workers", "vae_batch_size"),
        *("skip_cache_check", "network_module", "logging_dir", "log_with", "log_prefix"),
        *("caption_extension", "console_log_level", "save_state_on_train_end", "metadata_title"),
    )
)
RENAMED = {
    "max_train_steps": "steps",
    "train_batch_size": "batch_size",
    "batch_size": "batch_size",  # of a dataset
    "gradient_accumulation_steps": "accumulation",
    "learning_rate": "learning_rate",
    "max_grad_norm": "clip",
    "network_dim": "rank",
    "network_alpha": "lora_alpha",
    "network_dropout": "lora_dropout",
    "seed": "seed",
    "output_dir": "output",
    "pretrained_model_name_or_path": "checkpoint",
    "vae": "vae",
    "clip_l": "clip_l",
    "clip_g": "clip_g",
    "t5xxl": "t5",
    "t5xxl_max_token_length": "t5_length",
    "train_data_dir": "data",
    "bucket_reso_steps": "bucket_step",
    "save_every_n_steps": "export_every",
    "sample_every_n_steps": "sample_every",
    "gradient_checkpointing": "gradient_checkpointing",
    "training_shift": "shift",
    "caption_dropout_rate": "caption_dropout",
}
CHOICES = {
    "optimizer_type": (
        "optimizer",
        {
            "adamw": "adamw",
            "adamw8bit": "adamw_8bit",
            "adafactor": "adafactor",
            "prodigy": "prodigy",
        },
    ),
    "lr_scheduler": (
        "lr_schedule",
        {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine"},
    ),
    "mixed_precision": ("dtype", {"bf16": "bf16", "no": "fp32"}),
    "save_precision": ("save_dtype", {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}),
    "random_crop": ("crop", {"true": "random", "false": "centre"}),
    "alpha_mask": ("alpha", {"true": "mask", "false": "composite"}),
}
NOT_USED = {
    "max_train_epochs": "give steps; `train` tells how many epochs they are",
    "blocks_to_swap": "blocks stay on the device; gradient_checkpointing saves most",
    "flip_aug": "pictures are never mirrored",
    "mixed_precision": "fp16 overflows in training",
    "apply_t5_attn_mask": "SD3 was trained without masks",
    "apply_lg_attn_mask": "SD3 was trained without masks",
}


@dataclass(frozen=True)
class Translated:
    """Our settings, as TOML or JSON hold them, and a line for each setting that is not used."""

    settings: dict[str, Any]
    ignored: tuple[str, ...]

    def config(self) -> TrainConfig:
        return make_config(self.settings)

    def toml(self) -> str:
        return "\n".join(f"{name} = {_toml(value)}" for name, value in self.settings.items())


def translate(path: Path) -> Translated:
    """What a sd-scripts configuration asks for; its dataset_config is read too, if it is there.

    Names that are not given keep our defaults, but for alpha, whose default there is 1, and for the
    layers, of which there adaLN is one kind.  Raises ValueError for a file that cannot be read and
    for values that make no sense.
    """
    table = _flat(read_settings(path))
    translation = Translation(path)
    if name := table.pop("dataset_config", None):
        beside = [Path(name), path.parent / name]
        if found := next((one for one in beside if one.is_file()), None):
            table = {**_flat(read_settings(found)), **table}
        else:
            translation.ignored.append(f"dataset_config = {name}: there is no such file")
    translation.read(table)
    translated = Translated(translation.settings, tuple(translation.ignored))
    translated.config()
    return translated


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """Sections mean nothing to sd-scripts; lists of tables (datasets) stay."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat.update(_flat(value) if isinstance(value, Mapping) else {name: value})
    return flat


class Translation:
    """A translation under way."""

    def __init__(self, path: Path):
        name = re.sub(r"[^\w .+-]", "_", path.stem).strip(" .-+") or "run"
        self.settings: dict[str, Any] = {"run_name": name}
        self.ignored: list[str] = []
        self.special: dict[str, Callable[[Any], bool]] = {
            "output_name": self._name,
            "unet_lr": self._rate,
            "lr_warmup_steps": self._warmup,
            "resolution": self._resolution,
            "optimizer_args": self._optimizer_arguments,
            "network_args": self._network_arguments,
            "min_timestep": lambda value: self._put("lowest_sigma", value / 1000),
            "max_timestep": lambda value: self._put("highest_sigma", value / 1000),
            "sample_prompts": self._prompts,
            "datasets": self._datasets,
        }

    def read(self, table: dict[str, Any]) -> None:
        first = {"max_train_steps": table["max_train_steps"]} if "max_train_steps" in table else {}
        table = {**first, **table}  # the warm-up may be a part of it
        self._density(table)
        self._encoder_dropout(table)
        for name, value in table.items():
            if name in ALWAYS_SO or value is None:
                continue
            if not self._take(name, value):
                reason = NOT_USED.get(name)
                self.ignored.append(f"{name} = {value}" + (f": {reason}" if reason else ""))
        if "sample_every" in self.settings and "sample_prompts" not in self.settings:
            del self.settings["sample_every"]
            self.ignored.append("sample_every_n_steps: there are no sample_prompts")
        self.settings.setdefault("lora_alpha", 1.0)
        self.settings.setdefault("lora_kinds", ["attn", "attn2", "mlp", "adaLN"])
        self._tell_other_defaults()

    def _tell_other_defaults(self) -> None:
        """What sd-scripts does when nothing is said, and we do not."""
        if "density" not in self.settings:
            self.ignored.append('the timesteps there are uniform: density = "uniform"')
        if "shift" not in self.settings:
            self.ignored.append("training_shift there is 1: shift = 1.0")
        self.ignored.append('the loss there is that of x0: loss_space = "x0"')

    def _take(self, name: str, value: Any) -> bool:
        """Whether the setting has a place here."""
        if name in RENAMED:
            if RENAMED[name] == "lora_alpha":
                value = float(value)
            return self._put(RENAMED[name], value)
        if name in CHOICES:
            ours, known = CHOICES[name]
            key = str(value).lower()
            return key in known and self._put(ours, known[key])
        return name in self.special and self.special[name](value)

    def _put(self, name: str, value: Any) -> bool:
        self.settings[name] = value
        return True

    def _name(self, value: str) -> bool:
        return self._put("run_name", value)

    def _rate(self, value: float) -> bool:
        return self._put("learning_rate", value)

    def _warmup(self, value: float) -> bool:
        steps = self.settings.get("steps", 0)
        if 0 < value < 1 and not steps:
            return False  # a part of an unknown number of steps
        return self._put("warmup", round(value * steps) if 0 < value < 1 else int(value))

    def _resolution(self, value: Any) -> bool:
        sides = [int(side) for side in re.findall(r"\d+", str(value))]
        return self._put("resolution", math.isqrt(sides[0] * sides[-1]))

    def _optimizer_arguments(self, values: list[str]) -> bool:
        for argument in values:
            name, _, text = argument.partition("=")
            if name == "weight_decay":
                self._put("weight_decay", float(text))
            elif name == "eps":
                self._put("eps", float(text))
            elif name == "betas":
                self._put("betas", [float(number) for number in re.findall(r"[\d.]+", text)])
            else:
                self.ignored.append(f"optimizer_args: {argument}")
        return True

    def _network_arguments(self, values: list[str]) -> bool:
        for argument in values:
            name, _, text = argument.partition("=")
            if name == "train_block_indices" and re.fullmatch(r"[\d,\- ]+", text):
                self._put("lora_blocks", block_indices(text))
            elif text != "all":
                self.ignored.append(f"network_args: {argument}")
        return True

    def _prompts(self, value: str) -> bool:
        """A text file with a prompt in each line, options behind it."""
        path = Path(value)
        if path.suffix.lower() != ".txt" or not path.is_file():
            return False
        lines = (line.partition(" --")[0].strip() for line in path.read_text("utf-8").splitlines())
        return self._put("sample_prompts", [line for line in lines if line and line[0] != "#"])

    def _datasets(self, datasets: list[dict[str, Any]]) -> bool:
        data = []
        for dataset in datasets:
            for subset in dataset.pop("subsets", []):
                source = {"path": subset.pop("image_dir", "")}
                if "num_repeats" in subset:
                    source["repeats"] = subset.pop("num_repeats")
                data.append(source)
                self._rest(subset)
            self._rest(dataset)
        return self._put("data", data)

    def _rest(self, table: dict[str, Any]) -> None:
        for name, value in table.items():
            if name not in ALWAYS_SO and not self._take(name, value):
                self.ignored.append(f"{name} = {value} (of a dataset)")

    def _density(self, table: dict[str, Any]) -> None:
        """weighting_scheme says how times are drawn, or (sigma_sqrt, cosmap) weighs the loss."""
        scheme = table.get("weighting_scheme")
        mean, std, scale = (
            table.pop(name, default)
            for name, default in (("logit_mean", 0.0), ("logit_std", 1.0), ("mode_scale", 1.29))
        )
        known = {
            "uniform": "uniform",
            "none": "uniform",
            "logit_normal": f"logit_normal({mean:g}, {std:g})",
            "mode": f"mode({scale:g})",
        }
        if scheme in known:
            self._put("density", known[table.pop("weighting_scheme")])

    def _encoder_dropout(self, table: dict[str, Any]) -> None:
        names = ("clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate")
        rates = {table.get(name, 0.0) for name in names}
        if len(rates) == 1 and any(name in table for name in names):
            self._put("encoder_dropout", rates.pop())
            for name in names:
                table.pop(name, None)


def block_indices(text: str) -> list[int]:
    """ "0,1,4-6" -> [0, 1, 4, 5, 6]."""
    indices: list[int] = []
    for part in text.replace(" ", "").split(","):
        first, _, last = part.partition("-")
        indices += range(int(first), int(last or first) + 1)
    return indices


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    return json.dumps(value, ensure_ascii=False)
