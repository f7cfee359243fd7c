"""What a run is asked to do: flat settings, checked when they are made, read from TOML or JSON."""

import difflib
import json
import math
import re
import types
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import LONGEST_ECHO, cut, quoted
from ..lora import KINDS, STREAMS
from ..plain_text import check_whole, decode_text
from ..reading import read_regular, reason
from ..settings import FLAGS, LARGEST, LONGEST_T5, Files
from ..text.encoders import ENCODERS
from .folders import Source

MOST_DOTS = 16  # of a name in TOML; settings have none, other programs' files a few
LARGEST_SETTINGS = 2**18  # bytes of a file; a whole run is told in a few thousand
LORA_OPTIMIZERS = ("adamw", "adafactor", "adamw_8bit", "prodigy")
OPTIMIZERS = (*LORA_OPTIMIZERS, "muon")  # that one for the matrices of a whole model
PRIOR_WEIGHT = 4.0  # more forgets less and learns more slowly
LR_SCHEDULES = ("constant", "cosine")
OF_A_FOLDER = tuple(field.name for field in fields(Source) if field.name != "path")
TEXT_ENCODERS_STAY = "text encoders are not trained here: a LoRA changes the MMDiT alone"
_OF_TEXT_ENCODERS = re.compile(
    r"text_?encoder|(^|_)(te\d?|clip(_[lg])?|t5(xxl)?)_(lr|lora|rank)|train_(te|clip|t5)"
)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What every kind of training shares: how long, how fast, what is kept and shown."""

    steps: int = 1000  # optimiser steps in all; raising it later extends the run
    batch_size: int = 1  # samples that one process computes at once
    accumulation: int = 1  # passes whose gradients make one step
    learning_rate: float = 1e-4
    optimizer: str = "adamw"  # of OPTIMIZERS; prodigy finds its own rate: give learning_rate 1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-15  # Esser et al. 2024: keeps bf16 stable together with qk norm
    weight_decay: float = 0.01
    warmup: int = 100  # steps in which the learning rate rises from 0
    lr_schedule: str = "constant"  # of LR_SCHEDULES, after the warm-up
    clip: float = 1.0  # largest norm of the gradient; 0: not limited; little acts on muon
    ema: float = 0.0  # decay of the averaged weights, e.g. 0.999; 0: none
    seed: int = 0
    checkpoint_every: int = 100  # steps between saved states
    keep: int = 2  # newest states kept; the best one is kept besides
    export_every: int = 0  # steps between exported products; 0: only the best and the last
    validate_every: int = 100  # steps between measurements of the validation loss; 0: never
    sample_every: int = 0  # steps between sample pictures; 0: never

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "checkpoint_every", "keep"):
            _check(self, name, getattr(self, name) >= 1, "a whole number from 1")
        for name in ("warmup", "export_every", "validate_every", "sample_every", "weight_decay"):
            _check(self, name, getattr(self, name) >= 0, "0 or more")
        _check(self, "learning_rate", 0 < self.learning_rate < math.inf, "above 0, such as 1e-4")
        _check(self, "weight_decay", self.weight_decay < math.inf, "a number such as 0.01")
        _check(self, "eps", 0 < self.eps < 1, "a very small number, such as 1e-15")
        _check(self, "betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in 0..1")
        _check(self, "clip", 0 <= self.clip < math.inf, "0 (not limited) or more")
        _check(self, "ema", 0 <= self.ema < 1, "0 (none) or below 1, such as 0.999")
        _check(self, "seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1")
        _choice(self, "optimizer", OPTIMIZERS)
        _choice(self, "lr_schedule", LR_SCHEDULES)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """A LoRA for an MMDiT, or an MMDiT itself, taught from pictures with captions.

    None: the model decides.  Paths are relative to the working directory.
    """

    run_name: str  # the run's folder is <output>/sd3/<run_name>
    output: Path = Path("output")
    # dpo: a LoRA taught by preferences, `data` then names pairs; scratch: a new, small MMDiT
    method: Literal["lora", "dpo", "full", "scratch"] = "lora"

    # Networks, as for drawing; a file named for one network wins over the checkpoint.
    checkpoint: Path | None = None
    mmdit: Path | None = None
    vae: Path | None = None
    clip_l: Path | None = None
    clip_g: Path | None = None
    t5: Path | None = None
    tokenizers: Path | None = None

    # Pictures and captions
    data: tuple[Source, ...] = ()
    validation_data: tuple[Source, ...] = ()  # none: measured on pictures that are trained on
    validation_items: int = 16  # pictures measured at most
    resolution: int | None = None  # buckets have at most resolution² pixels
    bucket_step: int = 64  # pixels
    widest: float = 2.0  # aspect of the widest bucket
    alpha: str = "mask"  # transparency: "mask" weighs the loss, "composite" is only laid on
    background: str = "white"
    crop: str = "centre"  # or "random"
    original_share: float = 0.5  # of draws, where there are original and synthetic captions
    use: tuple[str, ...] = ENCODERS  # text encoders that take part
    t5_length: int | str = "auto"  # least number of T5 tokens; auto: CLIP's window
    caption_dropout: float = 0.1  # how often a caption is replaced by the empty one
    encoder_dropout: float = 0.0  # how often each encoder is zeroed; pre-training: 0.464
    posterior: bool = True  # draw from the VAE's posterior; False: train on its mean
    prior_weight: float = PRIOR_WEIGHT  # of the loss on pictures given with prior = true

    # Objective
    objective: str = (
        "flow_matching"  # or eps_linear, v_linear, eps_cosine, v_cosine, edm(-1.2, 1.2)
    )
    density: str = (
        "logit_normal(0, 1)"  # of timesteps; or uniform, mode(1.29), cosmap, beta(1.5, 1)
    )
    shift: float | str | None = None  # "auto": the model's own, scaled to the resolution
    loss_space: Literal["velocity", "x0", "eps"] = "velocity"
    lowest_sigma: float = 0.0  # noise levels outside are never trained
    highest_sigma: float = 1.0
    stratified: bool = False  # spread the times of a batch evenly: lower variance

    # LoRA
    rank: int = 16
    lora_alpha: float | None = None  # None: rank, a scale of 1
    lora_dropout: float = 0.0
    lora_kinds: tuple[str, ...] = ("attn", "attn2", "mlp")  # of lora.KINDS
    lora_streams: tuple[str, ...] = STREAMS
    lora_blocks: tuple[int, ...] | None = None  # joint blocks; None: all
    dialect: str = "comfy"  # of the file: comfy, kohya or diffusers
    save_dtype: str = "fp16"  # of the product: fp32, fp16, bf16

    # Preferences; see preference.diffusion_dpo_loss
    dpo_beta: float = 2000.0  # how dear it is to leave the reference; mean errors, with the half
    dpo_sft_weight: float = 0.0  # holds the winner's error down; 0.05 to 0.2 times dpo_beta / 4
    dpo_loser_scale: float = 1.0  # below 1: making the loser worse pays less
    dpo_patience: int = 3  # measurements with a rising winner's error, then it ends; 0: never

    # A new MMDiT; its widths follow from the VAE and the text encoders
    depth: int = 3
    patch_size: int = 2
    qk_norm: bool | None = None  # None: as the model has it, True for a new one
    dual_attention_blocks: tuple[int, ...] = ()
    position_size: int = 32  # patches per side that the position table holds

    # Sample pictures, drawn as `generate` draws
    sample_prompts: tuple[str, ...] = ()
    sample_steps: int | None = None
    sample_cfg: float | None = None
    sample_seed: int = 0

    # Machine
    gradient_checkpointing: bool = False  # less memory, about a third more time
    device: str = "auto"
    dtype: str = "auto"  # of the computation: bf16, fp32; what is trained stays fp32
    check_memory: bool = True  # refuse a run whose estimate exceeds the free memory

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice(self, "method", ("lora", "dpo", "full", "scratch"))
        _choice(self, "loss_space", ("velocity", "x0", "eps"))
        _choice(self, "dialect", ("comfy", "kohya", "diffusers"))
        _choice(self, "save_dtype", ("fp32", "fp16", "bf16"))
        if set(self.lora_kinds) & {*ENCODERS, "te", "text_encoder"}:
            raise ValueError(f"lora_kinds is {quoted(self.lora_kinds)}; {TEXT_ENCODERS_STAY}.")
        for name, known in (("use", ENCODERS), ("lora_kinds", KINDS), ("lora_streams", STREAMS)):
            given = getattr(self, name)
            _check(self, name, set(given) <= set(known), f"some of {', '.join(known)}")
        for name in ("caption_dropout", "encoder_dropout", "lora_dropout", "original_share"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("rank", "depth", "patch_size", "position_size", "validation_items"):
            _check(self, name, getattr(self, name) >= 1, "a whole number from 1")
        _check(self, "lora_dropout", self.lora_dropout < 1, "below 1: at 1 nothing is learnt")
        alpha = 1.0 if self.lora_alpha is None else self.lora_alpha
        _check(self, "lora_alpha", 0 < alpha < math.inf, "above 0; leave it away for the rank")
        resolution = 1024 if self.resolution is None else self.resolution
        _check(self, "resolution", resolution >= 16, "pixels, such as 1024")
        rising = 0 <= self.lowest_sigma < self.highest_sigma <= 1
        _check(self, "lowest_sigma", rising, "below highest_sigma, both between 0 and 1")
        _check(
            self,
            "dtype",
            self.dtype in ("auto", "bf16", "fp32"),
            "auto, bf16 or fp32: fp16 overflows in training",
        )
        steps, cfg = self.sample_steps or 1, self.sample_cfg or 0.0
        _check(self, "sample_steps", self.sample_steps != 0 and steps >= 1, "a whole number from 1")
        _check(self, "sample_cfg", abs(cfg) <= LARGEST, f"a number, at most {LARGEST:g} in size")
        _check(self, "sample_seed", 0 <= self.sample_seed < 2**64, "between 0 and 2**64 - 1")
        rows = LONGEST_T5 if self.t5_length == "auto" else self.t5_length
        good = isinstance(rows, int) and 1 <= rows <= LONGEST_T5
        _check(self, "t5_length", good, f"auto or a number of tokens from 1 to {LONGEST_T5}")
        if self.sample_every and not self.sample_prompts:
            raise ValueError("sample_every is set without sample_prompts: give a list of prompts.")
        _check(self, "dpo_beta", 0 < self.dpo_beta < math.inf, "above 0, such as 2000")
        _check(self, "dpo_sft_weight", 0 <= self.dpo_sft_weight < math.inf, "0 (none) or more")
        _check(self, "dpo_loser_scale", 0 <= self.dpo_loser_scale <= 1, "between 0 and 1")
        _check(self, "dpo_patience", self.dpo_patience >= 0, "a whole number from 0")
        self._check_prior()
        if self.method == "dpo" and self.lora_dropout:
            raise ValueError(
                "lora_dropout must be 0 for DPO: winner, loser and reference have to meet the same "
                "network."
            )
        if self.trains_lora and self.optimizer not in LORA_OPTIMIZERS:
            raise ValueError(
                f"optimizer is {quoted(self.optimizer)}, which is for whole models (method full or "
                f"scratch); for a LoRA choose one of {', '.join(LORA_OPTIMIZERS)}."
            )
        if self.trains_lora and self.qk_norm:
            raise ValueError(
                'qk_norm = true adds weights that no LoRA file can carry: use method = "full".'
            )

    def _check_prior(self) -> None:
        good = 0 < self.prior_weight < math.inf
        _check(self, "prior_weight", good, "above 0; for none leave the prior away")
        prior = [source.path for source in self.data if source.prior]
        if self.prior_weight != PRIOR_WEIGHT and not prior:
            raise ValueError(
                f"prior_weight is {self.prior_weight}, but there is no prior to weigh: give one, "
                "or take the setting away."
            )
        if prior and self.method != "lora":
            raise ValueError(
                f"{prior[0]} is given with prior = true, which holds a LoRA to what the network "
                f'answers without it; method is "{self.method}". Take prior away, or set method = '
                '"lora".'
            )
        if prior and len(prior) == len(self.data):
            raise ValueError(
                f"{prior[0]} is given with prior = true, and nothing else: name the pictures to "
                "learn from as well."
            )
        if held := [source.path for source in self.validation_data if source.prior]:
            raise ValueError(
                f"{held[0]}: prior has no meaning in validation_data, which is measured against "
                "the pictures; take it away."
            )

    @property
    def trains_lora(self) -> bool:
        """Whether the network itself stays as it is."""
        return self.method in ("lora", "dpo")

    @property
    def files(self) -> Files:
        """Where the networks are."""
        paths = {name: getattr(self, name) for name in ("checkpoint", "tokenizers", *FLAGS)}
        return Files(**paths)


def _check(config: Any, name: str, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{name} is {quoted(getattr(config, name))}; expected {expected}.")


def _choice(config: Any, name: str, known: tuple[str, ...]) -> None:
    _check(config, name, getattr(config, name) in known, f"one of {', '.join(known)}")


def read_settings(path: Path) -> dict[str, Any]:
    """The table in a .toml or .json file.  Raises ValueError."""
    try:
        read = decode_text(read_regular(path, LARGEST_SETTINGS))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({reason(error)}).") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error
    if read.note:
        warnings.warn(f"{path.name} {read.note}.", stacklevel=2)
    text = read.text
    try:
        table = json.loads(text) if path.suffix.lower() == ".json" else read_toml(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {cut(error)}.") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path.name}: expected settings as name = value.")
    return table


def read_toml(text: str) -> dict[str, Any]:
    """Raises ValueError for text that is no TOML."""
    try:
        import tomllib
    except ImportError:  # Python 3.10; what many packages bring there has the same two functions
        try:
            import tomli as tomllib
        except ImportError:
            raise ValueError(
                "TOML needs Python 3.11; on 3.10 install the package tomli (a file of "
                "settings may be .json instead)"
            ) from None
    if any(key.count(".") > MOST_DOTS for line in text.splitlines() for key in _keys(line)):
        raise ValueError(f"a name has more than {MOST_DOTS} dots")  # reading it would take long
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested without end") from error


def _keys(line: str) -> Iterator[str]:
    """About what a line of TOML names: what stands before each =, and the name of a table."""
    *before, _ = line.split("=")
    yield from (re.split(r"[{,]", part)[-1] for part in before)
    if line.lstrip().startswith("[") and "," not in line:
        yield line


def make_config(table: Mapping[str, Any]) -> TrainConfig:
    """Plain values, as TOML, JSON or a node give them, checked one by one.

    Raises ValueError for a setting that is unknown, missing or of the wrong kind.
    """
    hints = get_type_hints(TrainConfig)
    for name in table:
        if name not in hints:
            if _OF_TEXT_ENCODERS.search(name):
                raise ValueError(f"there is no setting {quoted(name)}: {TEXT_ENCODERS_STAY}.")
            if name in OF_A_FOLDER:
                raise ValueError(
                    f"{name} is said of a folder: "
                    f'data = [{{ path = "pictures", {name} = {cut(json.dumps(table[name]))} }}].'
                )
            close = difflib.get_close_matches(name[:LONGEST_ECHO], hints, 1)
            guess = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"there is no setting {quoted(name)}.{guess}")
    missing = [f.name for f in fields(TrainConfig) if f.default is MISSING and f.name not in table]
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing; it names the run and its folder.")
    for name, value in table.items():
        if not {Path, Source} & {hints[name], *get_args(hints[name])}:  # names of files may be odd
            _check_texts(name, value)
    return TrainConfig(**{name: _value(name, table[name], hints[name]) for name in table})


def _check_texts(name: str, value: Any) -> None:
    """Raises ValueError for half a character."""
    for text in value if isinstance(value, list | tuple) else [value]:
        if isinstance(text, str):
            check_whole(text, name)


def plain_settings(config: LoopConfig) -> dict[str, Any]:
    """The opposite of make_config: every setting as JSON holds it."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def told_settings(config: LoopConfig) -> dict[str, Any]:
    """As plain_settings, for a file that is given away: folders are left out."""
    settings = plain_settings(config)
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Path):
            settings[field.name] = value.name
        elif isinstance(value, tuple) and any(isinstance(one, Source) for one in value):
            settings[field.name] = [{**_plain(one), "path": one.path.name} for one in value]
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, Source):
        plain = {"path": value.path.as_posix(), "repeats": value.repeats, "weight": value.weight}
        rare = {field.name: getattr(value, field.name) for field in fields(Source)[len(plain) :]}
        unsaid = {field.name: field.default for field in fields(Source)}
        return plain | {name: one for name, one in rare.items() if one != unsaid[name]}
    if isinstance(value, Path):
        return value.as_posix()
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _value(name: str, value: Any, hint: Any) -> Any:
    """value as the setting's type; ValueError when it is of another kind."""
    try:
        return _converted(value, hint)
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError):
        raise ValueError(f"{name} is {quoted(value)}; expected {_described(hint)}.") from None


def _converted(value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _first_fitting(value, arguments)
    if origin is tuple:
        return _tuple(value, arguments)
    if origin is Literal or hint is str:
        return _of(value, str)
    if hint is Path:
        return Path(_of(value, str, Path))
    if hint is Source:
        return _source(value)
    if hint is float:
        return float(_of(value, int, float))
    return _of(value, hint)


def _of(value: Any, *kinds: type) -> Any:
    """The value itself; true is no number here."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError
    return value


def _first_fitting(value: Any, hints: tuple[Any, ...]) -> Any:
    if value is None and type(None) in hints:
        return None
    for hint in hints:
        try:
            return _converted(value, hint)
        except (TypeError, ValueError):
            continue
    raise TypeError


def _tuple(value: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    inner, *others = arguments
    if inner is Source and isinstance(value, str | Path | Mapping):
        value = [value]
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise TypeError
    if others and others[0] is not Ellipsis and len(value) != len(arguments):
        raise TypeError
    return tuple(_converted(one, inner) for one in value)


def _source(value: Any) -> Source:
    if isinstance(value, Source):
        return value
    if isinstance(value, str | Path):
        return Source(Path(value))
    known = {"path", *OF_A_FOLDER}
    if not isinstance(value, Mapping) or not {"path"} <= set(value) <= known:
        raise TypeError
    return Source(
        Path(_of(value["path"], str)),
        _of(value.get("repeats", 1), int),
        float(_of(value.get("weight", 1.0), int, float)),
        _of(value.get("prior", False), bool),
        _of(value.get("subfolders", True), bool),
        _of(value.get("caption", ""), str),
        _of(value.get("caption_extension", ""), str),
        _of(value.get("lines", Source.lines), str),
    )


def _described(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(one) for one in arguments if one is not type(None))
    if origin is tuple:
        inner = _described(arguments[0])
        if arguments[-1] is not Ellipsis:
            return f"[{', '.join(_described(one) for one in arguments)}]"
        return f"a list: [{inner}, ...]"
    if origin is Literal:
        return " or ".join(f'"{one}"' for one in arguments)
    if hint is Source:
        return (
            'a folder, "pictures", or {path = "pictures", repeats = 2, weight = 1.0, prior = true, '
            'lines = "whole"}'
        )
    words = {int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(hint, "text in quotes")
