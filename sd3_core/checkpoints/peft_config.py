"""PEFT's own settings of an adapter, which alone know its strength: alpha and rank, by layer.

PEFT writes them as `adapter_config.json` beside `adapter_model.safetensors`; diffusers writes them
as JSON into the file's header (`lora_adapter_metadata`), under a prefix for each network.  A layer
acts at alpha / rank, with `use_rslora` at alpha / sqrt(rank) (arXiv:2312.03732).  LoHa and LoKr
have no such root, and LoKr is scaled also where both its factors are whole.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, quoted
from ..reading import open_regular
from .header import Header, shown

FILE = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"  # beside which PEFT writes it
METADATA = "lora_adapter_metadata"  # diffusers' key in the header
_LARGEST = 2**20  # bytes of settings: a thousand times what PEFT writes
_METHODS = ("LORA", "LOHA", "LOKR")
_PREFIXES = {  # of diffusers, by network, as it numbers the encoders
    "mmdit": ("transformer.", ""),
    "clip_l": ("text_encoder.", ""),
    "clip_g": ("text_encoder_2.", "text_encoder.", ""),
    "t5": ("text_encoder_3.", ""),
}
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # ways to begin: init_lora_weights
_OTHER_SUMS = (  # settings that, when set, make a LoRA something else than W + scale * B A
    *("use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config"),
    *("alora_invocation_tokens", "layer_replication", "target_parameters"),
)


@dataclass(frozen=True)
class PeftConfig:
    """Ranks and alphas of one network's layers; the first pattern that fits a layer decides."""

    rank: int
    alpha: float
    ranks: tuple[tuple[re.Pattern[str], int], ...] = ()
    alphas: tuple[tuple[re.Pattern[str], float], ...] = ()
    rooted: bool = False  # rsLoRA

    def rank_of(self, module: str) -> int:
        """module: PEFT's name of the layer, a path in the network it was made for."""
        return next((rank for like, rank in self.ranks if like.match(module)), self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = next((alpha for like, alpha in self.alphas if like.match(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rooted else rank)


@dataclass(frozen=True)
class Settings:
    """What is known of a file's scales.

    place: where the settings are, in words.  file: where, if not in the header.  configs: by
    prefix.  fault: why they cannot be used.
    """

    place: str
    file: Path | None
    configs: Mapping[str, PeftConfig]
    fault: str = ""

    def of(self, component: str) -> PeftConfig | None:
        prefixes = _PREFIXES[component]
        return next((self.configs[p] for p in prefixes if p in self.configs), None)


def config_file(header: Header, from_peft: bool) -> Path | None:
    """The adapter_config.json that belongs to a LoRA file.

    from_peft: its keys have PEFT's own prefix.  A folder of many LoRAs may hold the settings of
    one: they count for a file that is named as PEFT names it, that PEFT has written, or that lies
    there alone.
    """
    file = header.path.parent / FILE
    if not file.is_file():
        return None
    if header.path.name == WEIGHTS or from_peft:
        return file
    return file if list(header.path.parent.glob("*.safetensors")) == [header.path] else None


def read_settings(header: Header, file: Path | None) -> Settings | None:
    """The settings in the header, else those in the file (see config_file); None: there are none.

    Raises CheckpointError for an adapter that PEFT computes in a way that is not known here.
    """
    text: str | bytes
    if METADATA in header.metadata:
        text, place, file = header.metadata[METADATA], f"the header's {METADATA}", None
    elif file is not None:
        text, place = _beginning(file), f"{FILE} beside it"
    else:
        return None
    try:
        if len(text) > _LARGEST:
            raise ValueError(f"they are longer than {_LARGEST:,} bytes")
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("they are no JSON object")
        sections = _sections(values)
    except (ValueError, RecursionError) as error:
        return Settings(place, file, {}, str(error))
    for section in sections.values():
        _check_method(header.path.name, place, section)
    try:
        return Settings(place, file, {name: _config(values) for name, values in sections.items()})
    except ValueError as error:
        return Settings(place, file, {}, str(error))


def _beginning(file: Path) -> bytes:
    """A file, or what is enough to see that it is too long."""
    try:
        with open_regular(file) as stream:
            return stream.read(_LARGEST + 1)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}.") from error


def _sections(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each network, by the prefix of their names."""
    prefixes = {prefix for known in _PREFIXES.values() for prefix in known}
    found = {p: {n[len(p) :]: v for n, v in values.items() if n.startswith(p)} for p in prefixes}
    sections = {p: section for p, section in found.items() if "r" in section}
    if not sections:
        raise ValueError("they have no r")
    return sections


def _check_method(file: str, place: str, values: Mapping[str, Any]) -> None:
    method = values.get("peft_type") or "LORA"
    if method not in _METHODS:
        raise CheckpointError(
            f"{file}: uses {shown(str(method))} by {place}, which is not supported here. PEFT's "
            f"LoRA (rsLoRA and DoRA too), LoHa and LoKr are; merge it into a model with PEFT."
        )
    begun = values.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{file}: was begun with init_lora_weights {shown(begun)} by {place}, which takes a "
            f"part out of the model's own weights, so that it cannot be added to the model as it "
            f"is. Save it with PEFT's path_initial_model_for_weight_conversion, as a plain LoRA."
        )
    if other := [name for name in _OTHER_SUMS if values.get(name)]:
        raise CheckpointError(
            f"{file}: was trained with {', '.join(other)} by {place}, which is not supported here; "
            f"merge it into a model with PEFT."
        )


def _config(values: Mapping[str, Any]) -> PeftConfig:
    """Raises ValueError for settings that are none of PEFT's."""
    name = "lora_alpha" if "lora_alpha" in values else "alpha"
    rooted = values.get("use_rslora") or False
    if not isinstance(rooted, bool):
        raise ValueError(f"use_rslora is {quoted(rooted)}; true or false is expected")
    return PeftConfig(
        rank=_rank("r", values["r"]),
        alpha=_alpha(name, values.get(name)),
        ranks=_patterns("rank_pattern", values, _rank),
        alphas=_patterns("alpha_pattern", values, _alpha),
        rooted=rooted and name == "lora_alpha",
    )


def _rank(name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {quoted(value)}; a whole number above 0 is expected")
    return value


def _alpha(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise ValueError(f"{name} is {quoted(value)}; a number is expected")
    return float(value)


def _patterns(name: str, values: Mapping[str, Any], number: Any) -> tuple[tuple[Any, Any], ...]:
    """PEFT's rule: a pattern is a regular expression for a layer's name, or its end after a dot."""
    given = values.get(name) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{name} is {quoted(given)}; a table is expected")
    made = []
    for pattern, value in given.items():
        _check_pattern(name, pattern)
        try:
            like = re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise ValueError(f"{name} has {shown(pattern)}, no pattern: {error}") from error
        made.append((like, number(f"{name}[{shown(pattern)}]", value)))
    return tuple(made)


def _check_pattern(name: str, pattern: str) -> None:
    """A file from anywhere may not make the matching endless: few repeats, none of a group."""
    repeats = len(re.findall(r"[*+{]", pattern))
    if len(pattern) > 500 or repeats > 4 or re.search(r"\)[*+{]|\\[1-9]|\(\?[P=!<(]", pattern):
        raise ValueError(f"{name} has {shown(pattern)}, a pattern too complicated to be meant")
