"""Settings of kohya's sd-scripts (sd3_train_network.py) as ours, and a list of what is not used."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import TEXT_ENCODERS_STAY, TrainConfig, make_config, read_settings

# What is always so here, or belongs to a way of working that there is not: no word about these.
ALWAYS_SO = frozenset(
    (
        *("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "save_state"),
        *("cache_text_encoder_outputs_to_disk", "save_state_on_train_end", "skip_cache_check"),
        *("sdpa", "xformers", "mem_eff_attn", "highvram", "lowvram", "vae_batch_size"),
        *("max_data_loader_n_workers", "persistent_data_loader_workers"),
        *("logging_dir", "log_with", "log_prefix", "console_log_level", "metadata_title"),
    )
)
# As ALWAYS_SO, but at these values only.
EXPECTED = {
    "network_module": ("networks.lora_sd3",),
    "network_train_unet_only": (True,),
    "enable_bucket": (True,),
    "caption_extension": (".txt", ".caption"),
    "save_model_as": ("safetensors",),
}
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
    "save_every_n_epochs": "give export_every, in steps",
    "sample_every_n_epochs": "give sample_every, in steps",
    "network_train_unet_only": TEXT_ENCODERS_STAY,
    "text_encoder_lr": TEXT_ENCODERS_STAY,
    "network_module": "a LoRA on attention, MLP and adaLN is taught",
    "enable_bucket": "every picture goes to a bucket of its aspect; widest = 1 makes all square",
    "caption_extension": "captions are read from .txt and .caption files",
    "save_model_as": "files are safetensors",
    "class_tokens": "write captions, or name the folder as in 10_cat",
    "fp8_base": "give an fp8 file of the model; it is kept as it is stored",
    "blocks_to_swap": "blocks stay on the device; gradient_checkpointing saves most",
    "prior_loss_weight": "here prior_weight weighs how far the LoRA moves regularisation pictures",
    "reg_data_dir": "a dataset_config names its own, with is_reg",
    "flip_aug": "pictures are never mirrored",
    "mixed_precision": "fp16 overflows in training",
    "apply_t5_attn_mask": "SD3 was trained without masks",
    "apply_lg_attn_mask": "SD3 was trained without masks",
}


# What sd-scripts does when nothing is said, and we do not: our setting, and the value it has there.
DEFAULTS_THERE = {
    "rank": 4,
    "warmup": 0,
    "t5_length": 256,
    "caption_dropout": 0.0,
    "density": "uniform",
    "shift": 1.0,
    "loss_space": "x0",
}


_OF_A_SOURCE = ("subsets", "image_dir", "num_repeats", "is_reg")


@dataclass(frozen=True)
class Translated:
    """Our settings, as TOML or JSON hold them."""

    settings: dict[str, Any]
    ignored: tuple[str, ...]  # a line for each setting that is not used
    defaults: tuple[str, ...]  # settings of ours that would be other ones if nothing is said there

    def config(self) -> TrainConfig:
        return make_config(self.settings)

    def toml(self) -> str:
        return "\n".join(f"{name} = {_toml(value)}" for name, value in self.settings.items())


def translate(path: Path) -> Translated:
    """What a sd-scripts configuration asks for; its dataset_config is read too, if it is there.

    Names that are not given keep our defaults, but for alpha, whose default there is 1, and for the
    layers, of which there adaLN is one kind; where they differ in more, that is told.  Raises
    ValueError for a file that cannot be read and for values that make no sense.
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
    defaults = tuple(
        f"{name} = {_toml(value)}"
        for name, value in DEFAULTS_THERE.items()
        if name not in translation.settings
    )
    translated = Translated(translation.settings, tuple(translation.ignored), defaults)
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
            "reg_data_dir": self._prior_folder,
            "prior_loss_weight": self._prior_weight,
        }

    def read(self, table: dict[str, Any]) -> None:
        order = {
            "max_train_steps": 0,  # a warm-up may be a part
            "datasets": 2,  # its own settings win
            "reg_data_dir": 2,
            "prior_loss_weight": 3,
        }
        table = dict(sorted(table.items(), key=lambda entry: order.get(entry[0], 1)))
        self._density(table)
        self._encoder_dropout(table)
        for name, value in table.items():
            self._use(name, value)
        if "sample_every" in self.settings and "sample_prompts" not in self.settings:
            del self.settings["sample_every"]
            self.ignored.append("sample_every_n_steps: there are no sample_prompts")
        data = self.settings.get("data", "")
        if any(isinstance(one, dict) and one.get("prior") for one in data):
            self.ignored.append(
                "regularisation pictures: sd-scripts learns from as many of them as of the others; "
                "here they hold the LoRA to what the model answers without it, and repeats decide "
                "how often"
            )
        self.settings.setdefault("lora_alpha", 1.0)
        self.settings.setdefault("lora_kinds", ["attn", "attn2", "mlp", "adaLN"])

    def _use(self, name: str, value: Any) -> None:
        """Translate a setting, or say why not."""
        if name in ALWAYS_SO or value is None or value in EXPECTED.get(name, ()):
            return
        try:
            taken = self._take(name, value)
        except (TypeError, ValueError, AttributeError, IndexError):
            raise ValueError(f"{name} is {value!r}; sd-scripts has no such value.") from None
        off = name not in EXPECTED and value in (False, 0, "", [])
        if not taken and not off:
            reason = NOT_USED.get(name)
            self.ignored.append(f"{name} = {value}" + (f": {reason}" if reason else ""))

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

    def _optimizer_arguments(self, values: list[str] | str) -> bool:
        for argument in [values] if isinstance(values, str) else values:
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

    def _network_arguments(self, values: list[str] | str) -> bool:
        for argument in [values] if isinstance(values, str) else values:
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
        for number, dataset in enumerate(datasets, 1):
            for subset in dataset.get("subsets", []):
                source = {"path": subset.get("image_dir", "")}
                if "num_repeats" in subset:
                    source["repeats"] = subset["num_repeats"]
                if subset.get("is_reg"):
                    source["prior"] = True
                data.append(source)
            for table in (dataset, *dataset.get("subsets", [])):
                own = {k: v for k, v in table.items() if k not in _OF_A_SOURCE}
                self._own(own, f"dataset {number}" if number > 1 else "")
        return self._put("data", data)

    def _prior_folder(self, value: str) -> bool:
        data = self.settings.get("data", "")
        if not value or not isinstance(data, str):
            return False  # beside a dataset_config sd-scripts leaves it alone, too
        return self._put(
            "data", [*([{"path": data}] if data else []), {"path": value, "prior": True}]
        )

    def _prior_weight(self, value: float) -> bool:
        """It weighs another loss, so only 0, for none, means the same."""
        data = self.settings.get("data", "")
        if not value and not isinstance(data, str):
            self._put("data", [one for one in data if not one.get("prior")])
        return not value

    def _own(self, table: Mapping[str, Any], later: str) -> None:
        """Settings of one dataset: here they are those of the run, so the first one's count."""
        before = dict(self.settings)
        for name, value in table.items():
            self._use(name, value)
        if later:
            for name, value in self.settings.items():
                if name in before and before[name] != value:
                    self.ignored.append(f"{later}: {name} = {_toml(value)}: a run has one")
            self.settings.update(before)

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
