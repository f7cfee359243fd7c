"""Settings of kohya's sd-scripts (sd3_train_network.py) as ours, and a list of what is not used."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import cut, quoted
from ..plain_text import check_whole, decode_text
from ..reading import read_regular, reason
from .config import LARGEST_SETTINGS, TEXT_ENCODERS_STAY, TrainConfig, make_config, read_settings
from .densities import find_density
from .kohya_data import (
    INHERITED,
    OF_DATASETS,
    OF_SOURCES,
    RENAMED_ARGUMENTS,
    UNSAID,
    Subset,
    given,
    merged_subsets,
    numbered_folders,
    sources,
)
from .kohya_names import (
    ALWAYS_SO,
    CHOICES,
    DEFAULTS_THERE,
    EXPECTED,
    INSTEAD,
    RENAMED,
    is_off,
    unused,
)
from .run import plain_name

MOST_BLOCKS = 1000  # no model has as many


@dataclass(frozen=True)
class Translated:
    """Our settings, as TOML or JSON hold them."""

    settings: dict[str, Any]
    ignored: tuple[str, ...]  # a line for each setting that is not used
    defaults: tuple[str, ...]  # settings of ours that would be other ones if nothing is said there
    notes: tuple[str, ...] = ()  # what is otherwise here, whatever is set

    def config(self) -> TrainConfig:
        return make_config(self.settings)

    def toml(self, ascii_only: bool = False) -> str:
        """ascii_only: for an output that does not hold every letter."""
        lines = (f"{name} = {_toml(value)}" for name, value in self.settings.items())
        text = "\n".join(lines)
        return _NOT_ASCII.sub(_escape, text) if ascii_only else text


def translate(path: Path) -> Translated:
    """What a sd-scripts configuration asks for; its dataset_config is read too, if it is there.

    The file may also be a dataset_config itself.  Names that are not given keep our defaults, but
    for alpha, whose default there is 1, and for the layers, of which there adaLN is one kind; where
    they differ in more, that is told.  Raises ValueError for a file that cannot be read and for
    values that make no sense.
    """
    try:
        return _translate(path)
    except OSError as error:  # names that no file can have, folders that may not be read
        name = f"{cut(error.filename)} " if error.filename else "what it names "
        raise ValueError(f"{path.name}: {name}cannot be looked at ({reason(error)}).") from error
    except RecursionError as error:
        raise ValueError(f"{path.name}: it is nested without end.") from error


def _translate(path: Path) -> Translated:
    table = read_settings(path)
    translation = Translation(path)
    datasets = dict(table) if "datasets" in table else None
    arguments = {k: v for k, v in table.items() if datasets is None or k not in _DATASET_FILE}
    arguments = given(_flat(arguments))
    if datasets is None and (name := arguments.pop("dataset_config", None)):
        beside = [Path(str(name)), path.parent / str(name)]
        if found := next((one for one in beside if one.is_file()), None):
            datasets = read_settings(found)
        else:
            translation.ignored.append(f"dataset_config = {cut(name)}: there is no such file")
    translation.read(arguments, datasets)
    defaults = tuple(
        f"{name} = {_toml(value)}"
        for name, value in DEFAULTS_THERE.items()
        if name not in translation.settings and INSTEAD.get(name) not in translation.seen
    )
    told = (tuple(translation.ignored), defaults, tuple(translation.notes))
    translated = Translated(translation.settings, *told)
    find_density(translated.config().density)
    return translated


_DATASET_FILE = ("general", "datasets")


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """Sections mean nothing to sd-scripts' arguments."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat.update(_flat(value) if isinstance(value, Mapping) else {name: value})
    return flat


class Translation:
    """A translation under way."""

    def __init__(self, path: Path):
        self.settings: dict[str, Any] = {"run_name": plain_name(path.stem)}
        self.ignored: list[str] = []
        self.notes: list[str] = []
        self.seen: set[str] = set()  # names of theirs that were given
        self.special: dict[str, Callable[[Any], bool]] = {
            "output_name": self._name,
            "unet_lr": self._rate,
            "lr_warmup_steps": self._warmup,
            "resolution": self._resolution,
            "enable_bucket": self._buckets,
            "optimizer_args": self._optimizer_arguments,
            "use_8bit_adam": lambda value: bool(value) and self._put("optimizer", "adamw_8bit"),
            "network_args": self._network_arguments,
            "min_timestep": lambda value: self._put("lowest_sigma", value / 1000),
            "max_timestep": lambda value: self._put("highest_sigma", value / 1000),
            "sample_prompts": self._prompts,
            "prior_loss_weight": self._prior_weight,
        }

    def read(self, arguments: dict[str, Any], datasets: Mapping[str, Any] | None) -> None:
        """datasets: what a dataset_config holds; None: there is none."""
        renamed = {RENAMED_ARGUMENTS[k]: v for k, v in arguments.items() if k in RENAMED_ARGUMENTS}
        arguments = {k: v for k, v in arguments.items() if k not in RENAMED_ARGUMENTS} | renamed
        shared = {k: v for k, v in arguments.items() if k in INHERITED}
        own = {k: v for k, v in arguments.items() if k not in INHERITED}
        if datasets is None:
            subsets = self._folders_of_arguments(own, shared)
        else:
            tables = datasets.get("datasets", [])
            subsets = merged_subsets(shared, datasets.get("general", {}), tables)
            for number in range(1, len(tables) + 1):
                if number not in {subset.dataset for subset in subsets}:
                    self.ignored.append(f"dataset {number}: has no subsets")
        if subsets and (data := self._with_something_learnt(sources(subsets, self.ignored))):
            self._put("data", data)
        general = {} if datasets is None else given(datasets.get("general", {}))
        self._settings_of_data(subsets or [Subset({**shared, **general})])
        self._arguments(own)
        self._tell(own, subsets)
        self.settings.setdefault("lora_alpha", 1.0)
        self.settings.setdefault("lora_kinds", ["attn", "attn2", "mlp", "adaLN"])

    # The data

    def _folders_of_arguments(
        self, arguments: dict[str, Any], shared: dict[str, Any]
    ) -> list[Subset]:
        """train_data_dir and reg_data_dir, whose numbered folders count."""
        folders, whole = [], []
        for name, prior in (("train_data_dir", False), ("reg_data_dir", True)):
            home = arguments.pop(name, None)
            if home is None:
                continue
            if not isinstance(home, str):
                raise ValueError(f"{name} is {quoted(home)}; sd-scripts has no such value.")
            if Path(home).is_dir():
                folders += numbered_folders(name, home, prior, self.ignored)
                continue
            whole.append({"path": home, **({"prior": True} if prior else {})})
            self.notes.append(
                f"{name} = {cut(home)} is not here, so nobody looked into it: all folders in it "
                "are taken, those named as in 10_cat 10 times; sd-scripts takes these alone"
            )
        if whole and (data := self._with_something_learnt(whole)):
            self._put("data", data)
        return merged_subsets(shared, {}, [{"subsets": folders}])

    def _with_something_learnt(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        data = [*self.settings.get("data", []), *data]
        if data and all(source.get("prior") for source in data):
            self.ignored.append("regularisation pictures: there is nothing else to learn from")
            return []
        return data

    def _settings_of_data(self, subsets: Sequence[Subset]) -> None:
        """Settings that differ between folders there: a run of ours has one, the first one's."""
        names = dict.fromkeys(name for subset in subsets for name in subset.settings)
        for name in names:
            if name in OF_SOURCES or name in ("metadata_file", "conditioning_data_dir"):
                continue
            values = [subset.settings.get(name, UNSAID.get(name)) for subset in subsets]
            first = next(value for value in values if value is not None)
            if self._has_place(name) or all(value == first for value in values):
                self._use(name, first)
            told = set()
            for subset, value in zip(subsets, values, strict=True):
                whole = name in OF_DATASETS
                label = f"dataset {subset.dataset}" if whole else subset.label
                if value is None or label in told:
                    continue
                told.add(label)
                if not self._has_place(name):
                    if name not in self.seen and not is_off(name, value) and name not in ALWAYS_SO:
                        self.ignored.append(unused(f"{label}: {name}", name, value))
                elif value != first:
                    line = f"{label}: {name} = {cut(value)}: a run has one, which is {cut(first)}"
                    self.ignored.append(line)

    # The arguments

    def _arguments(self, arguments: dict[str, Any]) -> None:
        order = {
            "max_train_steps": 0,  # a warm-up may be a part
            "unet_lr": 2,  # goes before learning_rate
            "use_8bit_adam": 0,
        }
        arguments = dict(sorted(arguments.items(), key=lambda entry: order.get(entry[0], 1)))
        self._density(arguments)
        self._encoder_dropout(arguments)
        for name, value in arguments.items():
            self._use(name, value)
        if "sample_every" in self.settings and "sample_prompts" not in self.settings:
            del self.settings["sample_every"]
            self.ignored.append("sample_every_n_steps: there are no sample_prompts")

    def _tell(self, arguments: Mapping[str, Any], subsets: Sequence[Subset]) -> None:
        """What is otherwise here, whatever is set."""
        if any(source.get("prior") for source in self.settings.get("data", [])):
            self.notes.append(
                "regularisation pictures: sd-scripts learns from as many of them as of the others; "
                "here they hold the LoRA to what the model answers without it, and repeats decide "
                "how often"
            )
        if arguments and "network_train_unet_only" not in arguments:
            self.notes.append(
                "sd-scripts trains CLIP-L and CLIP-G, too, unless network_train_unet_only is "
                f"given; {TEXT_ENCODERS_STAY}"
            )
        if any("caption_extension" not in subset.settings for subset in subsets):
            self.notes.append(
                "without a caption_extension sd-scripts reads .caption files alone; here .txt goes "
                "before them"
            )

    def _use(self, name: str, value: Any) -> None:
        """Translate a setting, or say why not."""
        self.seen.add(name)
        if name in ALWAYS_SO or value is None or value in EXPECTED.get(name, ()):
            return
        try:
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError
            taken = self._take(name, value)
        except (TypeError, ValueError, AttributeError, IndexError, OverflowError):
            raise ValueError(f"{name} is {quoted(value)}; sd-scripts has no such value.") from None
        if not taken and not is_off(name, value):
            self.ignored.append(unused(name, name, value))

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

    def _has_place(self, name: str) -> bool:
        return name in RENAMED or name in CHOICES or name in self.special

    def _put(self, name: str, value: Any) -> bool:
        self.settings[name] = value
        return True

    def _name(self, value: str) -> bool:
        name = plain_name(value)
        if name != value:
            self.notes.append(
                f"output_name = {cut(value)} cannot name a folder everywhere: run_name is {name}"
            )
        return self._put("run_name", name)

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

    def _buckets(self, value: bool) -> bool:
        """Without them all pictures are cut to the resolution; here that is a square."""
        return not value and self._put("widest", 1.0)

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
                self.ignored.append(f"optimizer_args: {cut(argument)}")
        return True

    def _network_arguments(self, values: list[str] | str) -> bool:
        for argument in [values] if isinstance(values, str) else values:
            name, _, text = argument.partition("=")
            if name == "train_block_indices" and re.fullmatch(r"[\d,\- ]+", text):
                self._put("lora_blocks", block_indices(text))
            elif text != "all":
                self.ignored.append(f"network_args: {cut(argument)}")
        return True

    def _prompts(self, value: str) -> bool:
        """A text file with a prompt in each line, options behind it."""
        path = Path(value)
        if path.suffix.lower() != ".txt" or not path.is_file():
            return False
        try:
            text = decode_text(read_regular(path, LARGEST_SETTINGS)).text
        except OSError as error:
            self.ignored.append(f"sample_prompts = {cut(value)}: cannot be read ({reason(error)})")
            return True
        lines = (line.partition(" --")[0].strip() for line in text.splitlines())
        prompts = [line for line in lines if line and line[0] != "#"]
        return bool(prompts) and self._put("sample_prompts", prompts)

    def _prior_weight(self, value: float) -> bool:
        """It weighs another loss, so only 0, for none, means the same."""
        data = self.settings.get("data", [])
        if not value and data:
            self._put("data", [one for one in data if not one.get("prior")])
        return not value

    def _density(self, table: dict[str, Any]) -> None:
        """weighting_scheme says how times are drawn, or (sigma_sqrt, cosmap) weighs the loss."""
        scheme = table.get("weighting_scheme")
        numbers = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}
        for name in numbers.keys() & table.keys():
            value = table.pop(name)
            try:
                numbers[name] = float(value)
            except (TypeError, ValueError, OverflowError):
                raise ValueError(
                    f"{name} is {quoted(value)}; sd-scripts has no such value."
                ) from None
        mean, std, scale = numbers.values()
        known = {
            "uniform": "uniform",
            "none": "uniform",
            "logit_normal": f"logit_normal({mean:g}, {std:g})",
            "mode": f"mode({scale:g})",
        }
        if isinstance(scheme, str) and scheme in known:
            self._put("density", known[table.pop("weighting_scheme")])

    def _encoder_dropout(self, table: dict[str, Any]) -> None:
        names = ("clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate")
        rates = [table.get(name, 0.0) for name in names]
        if all(rate == rates[0] for rate in rates) and any(name in table for name in names):
            self._put("encoder_dropout", rates[0])
            for name in names:
                table.pop(name, None)


def block_indices(text: str) -> list[int]:
    """ "0,1,4-6" -> [0, 1, 4, 5, 6].  Raises ValueError."""
    indices: list[int] = []
    for part in text.replace(" ", "").split(","):
        first, _, last = part.partition("-")
        last = int(last or first)
        if last >= MOST_BLOCKS:
            raise ValueError(f"block {last}")
        indices += range(int(first), last + 1)
    return indices


_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def _toml(value: Any) -> str:
    """Raises ValueError for half a character, which TOML cannot hold."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    text = json.dumps(value, ensure_ascii=False)
    return check_whole(text, quoted(value)).replace("\x7f", "\\u007f")


def _escape(letter: re.Match[str]) -> str:
    code = ord(letter[0])
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
