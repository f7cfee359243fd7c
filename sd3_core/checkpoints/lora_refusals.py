"""What `lora_files.read_lora` refuses; every refusal says what the file is and what to do."""

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import lora_keys
from .foreign import describe_names
from .header import Header, shown
from .layouts import TITLES, find_components
from .lora_keys import Keys, kind_of
from .stored import name_list

GET_AGAIN = "Download it again, or save it again with the program it was trained with."
_FOR_SD3 = "Use a LoRA that was trained on Stable Diffusion 3 or 3.5."
_FACTORS = {  # method -> its tensors, each set enough for one factor
    "LoRA": ((("down",),), (("up",),)),
    "LoHa": tuple(((f"hada_{side}",),) for side in ("w1_a", "w1_b", "w2_a", "w2_b")),
    "LoKr": tuple(((f"lokr_w{i}",), (f"lokr_w{i}_a", f"lokr_w{i}_b")) for i in (1, 2)),
}
_IN_FILES = {"down": "lora_down (lora_A)", "up": "lora_up (lora_B)"}  # role -> its names
_QUANTISED = re.compile(
    r"(^|\.)(weight_scale(_2)?|scale_weight|scaled_fp8|comfy_quant|absmax|qweight|SCB)$"
    r"|\.quant_state\."
)


def check_supported(header: Header, keys: Keys) -> None:
    """Raises CheckpointError for a method that is not computed here, or two adapters in one."""
    if keys.unsupported:
        methods = sorted(set(keys.unsupported.values()))
        raise CheckpointError(
            f"{header.path.name}: uses {' and '.join(methods)}, which is not supported here (first "
            f"keys: {name_list(keys.unsupported)}). LoRA, LoHa, LoKr, DoRA (dora_scale) and plain "
            f"differences are; merge it into a model with the program it was trained with."
        )
    if len(keys.adapters) > 1:
        raise CheckpointError(
            f"{header.path.name}: holds {len(keys.adapters)} adapters side by side "
            f"({name_list(keys.adapters)}), and nothing says which is meant. Save the one alone."
        )
    for key, earlier in keys.doubled.items():
        raise CheckpointError(
            f"{header.path.name}: {shown(key)} and {shown(earlier)} are the same part of one "
            f"adapter. {GET_AGAIN}"
        )


def check_for_sd3(
    header: Header, keys: Keys, names: Collection[str], places: Collection[str]
) -> None:
    """Raises CheckpointError unless some names of adapters have a place in SD3.

    Also when the others name another model: SDXL's LoRAs share the text encoders' names with
    SD3's, Flux's and Qwen-Image's some of the denoiser's.
    """
    file = header.path.name
    if not names:
        raise CheckpointError(f"{file}: {_no_lora(header, keys)}")
    others = [name for name in names if name not in places]
    owner = lora_keys.family(others)
    if not places:
        guess = f"It looks made for {owner}." if owner else "Was it made for another model?"
        raise CheckpointError(
            f"{file}: none of its {len(header.tensors)} keys belongs to Stable Diffusion 3 "
            f"({lora_keys.dialect(names)} names; first: {name_list(names)}). {guess} {_FOR_SD3}"
        )
    if owner:
        raise CheckpointError(
            f"{file}: is a LoRA for {owner}: {len(others)} of its {len(names)} layers are none of "
            f"Stable Diffusion 3's (first: {name_list(others)}). {_FOR_SD3}"
        )


def _no_lora(header: Header, keys: Keys) -> str:
    """What a file without one adapter is, and what to do."""
    if keys.embeddings:
        return (
            "holds textual-inversion embeddings and no LoRA. In ComfyUI, put it into the folder "
            "models/embeddings and write embedding:name in the prompt."
        )
    try:
        found = list(find_components(header.path))
    except CheckpointError:
        found = []
    if found:
        return (
            f"is no LoRA but a model: {', '.join(TITLES[kind] for kind in found)}. Give it as "
            f"{_option(found)} or to a model loader, and a LoRA in its place."
        )
    parts_alone = [key for roles in keys.groups.values() for key in roles.values()]
    parts_alone += [key for key in keys.strangers if key.startswith("lora_")]
    if parts_alone and len(parts_alone) == len(header.tensors):
        return (
            f"is no LoRA that can be used: it lacks the matrices of every adapter (lora_up and "
            f"lora_down, or the like) and holds only {name_list(parts_alone)}. {GET_AGAIN}"
        )
    what = describe_names(header.tensors) or f"its keys: {name_list(header.tensors)}."
    return f"is no LoRA; {what} {_FOR_SD3}"


def _option(kinds: Collection[str]) -> str:
    """The option of the command line that takes these networks."""
    (*_, last) = kinds
    return "--checkpoint" if len(kinds) > 1 else f"--{last.replace('_', '-')}"


def check_dtypes(header: Header, keys: Keys, groups: Iterable[Mapping[str, str]]) -> None:
    """Raises CheckpointError for quantised tensors, whose numbers mean nothing without a scale.

    alpha may be an integer: sd-scripts writes a rank that was never given as alpha as such.
    """
    scales = [key for key in keys.strangers if _QUANTISED.search(key)]
    stored = [
        key
        for roles in groups
        for role, key in roles.items()
        if not _is_plain(header.tensors[key].dtype, integers=role == "alpha")
    ]
    if strange := stored + scales:
        dtype = header.tensors[strange[0]].dtype
        raise CheckpointError(
            f"{header.path.name}: {shown(strange[0])} ({dtype}) belongs to a quantisation of LoRAs "
            f"that is not read here. Get the file in bf16, fp16 or fp32."
        )


def _is_plain(dtype: torch.dtype, integers: bool) -> bool:
    if dtype.is_floating_point:
        return dtype != getattr(torch, "float8_e8m0fnu", None)
    return integers and not dtype.is_complex


def check_finite(header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for NaN or infinity, which would spoil every picture."""
    for key, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            raise CheckpointError(
                f"{header.path.name}: {shown(key)} holds NaN or infinity, as after a training that "
                f"diverged. Use an earlier save of it, or download it again."
            )


def check_complete(file: str, name: str, given: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for an adapter that lacks one of its factors.

    given: the tensors by role.
    """
    kind = kind_of(given)
    lacking = []
    for choices in _FACTORS.get(str(kind), ()):
        if not any(given.keys() >= set(roles) for roles in choices):
            begun = max(choices, key=lambda roles: len(given.keys() & set(roles)))
            lacking += [_IN_FILES.get(role, role) for role in begun if role not in given]
    if lacking:
        raise CheckpointError(
            f"{file}: the adapter {name} is incomplete: of a {kind} it lacks "
            f"{' and '.join(lacking)}; it has {shapes_by_role(given)}. {GET_AGAIN}"
        )


def shapes_by_role(given: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in given.items())
