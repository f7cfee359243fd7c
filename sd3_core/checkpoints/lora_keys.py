"""Names in LoRA files, in every dialect, and the parameters of ours that they mean.

A key is a name and a role: `lora_unet_joint_blocks_0_x_block_attn_qkv` + `.lora_up.weight`.  The
name begins with the dialect's prefix; what follows is a module of the released checkpoints or of
diffusers, with dots or with underscores.  Both are looked up in one spelling, without dots and
block numbers.  What ComfyUI 0.33 accepts is accepted, and some names more.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .diffusers import mmdit_rows

LOADED = ("mmdit", "clip_l", "clip_g", "t5")  # the networks a LoRA may change


@dataclass(frozen=True)
class Place:
    """What a name means.

    part: which third of the rows of a stacked q, k, v, None is all rows.  swapped: the halves of
    the rows are the other way round; "if two": only where the rows are twice the columns, because
    the last block alone has two chunks.
    """

    component: str
    module: str  # "" for a parameter of the network itself
    parameter: str = "weight"
    part: int | None = None
    swapped: str = "never"  # "always", "if two"


# Names of modules, one spelling for all dialects


def _spelling(name: str) -> tuple[str, str]:
    """The name without dots and block number, and that number."""
    plain = name.replace(".", "_")
    number = re.search(r"(?<=blocks_)\d+|(?<=layers_)\d+|(?<=block_)\d+(?=_layer)", plain)
    if number is None:
        return plain, ""
    return plain[: number.start()] + "{}" + plain[number.end() :], number[0]


def _mmdit_places() -> dict[str, Place]:
    places: dict[str, Place] = {}
    for row in mmdit_rows(depth=1):
        ours = row.ours.replace("joint_blocks.0.", "joint_blocks.{}.")
        if ours == "pos_embed":
            places["pos_embed"] = places["pos_embed_pos_embed"] = Place("mmdit", "", "pos_embed")
            continue
        swapped = "never"
        if row.swapped:  # in a table of one block, the only one is the last
            swapped = "if two" if "joint_blocks" in ours else "always"
        for part, theirs in enumerate(row.theirs):
            stacked = part if len(row.theirs) > 1 else None
            places[_spelling(theirs)[0]] = Place("mmdit", ours, "weight", stacked, swapped)
        places[_spelling(row.ours)[0]] = Place("mmdit", ours)
    return places


def _text_places(component: str, modules: Iterable[str]) -> dict[str, Place]:
    return {module.replace(".", "_"): Place(component, module) for module in modules}


_CLIP_LAYER = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"),
)
_CLIP = (
    "text_model.embeddings.token_embedding",
    "text_model.embeddings.position_embedding",
    *(f"text_model.encoder.layers.{{}}.{name}" for name in _CLIP_LAYER),
    "text_model.final_layer_norm",
    "text_projection",
)
_T5_BLOCK = (
    *(f"layer.0.SelfAttention.{name}" for name in ("q", "k", "v", "o", "relative_attention_bias")),
    *(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
    *("layer.0.layer_norm", "layer.1.layer_norm"),
)
_T5 = ("shared", *(f"encoder.block.{{}}.{n}" for n in _T5_BLOCK), "encoder.final_layer_norm")

_PLACES = {
    "mmdit": _mmdit_places(),
    "clip_l": _text_places("clip_l", _CLIP),
    "clip_g": _text_places("clip_g", _CLIP),
    "t5": _text_places("t5", _T5),
}


def _lookup(component: str, module: str) -> Place | None:
    """The place of a module's name without prefix; `.bias` at its end names the bias."""
    spelling, number = _spelling(module)
    place = _PLACES[component].get(spelling)
    if place is None and spelling.endswith("_bias"):
        weight = _PLACES[component].get(spelling.removesuffix("_bias"))
        place = weight and Place(component, weight.module, "bias", weight.part, weight.swapped)
    if place is None:
        return None
    path = place.module.replace("{}", number)
    return Place(component, path, place.parameter, place.part, place.swapped)


# Prefixes


@dataclass(frozen=True)
class _Prefix:
    text: str
    dialect: str
    components: tuple[str, ...]  # tried in this order


_PREFIXES = (
    _Prefix("lora_unet_", "kohya", ("mmdit",)),
    _Prefix("lora_transformer_", "OneTrainer", ("mmdit",)),
    _Prefix("lycoris_", "LyCORIS", ("mmdit",)),
    _Prefix("model.diffusion_model.", "ComfyUI", ("mmdit",)),
    _Prefix("diffusion_model.", "ComfyUI", ("mmdit",)),
    _Prefix("transformer.", "diffusers", ("mmdit",)),
    # The encoders are numbered as loaded: alone, T5 is number one, and CLIP-G takes L's names.
    _Prefix("lora_te1_", "kohya", ("clip_l", "t5")),
    _Prefix("lora_te2_", "kohya", ("clip_g", "t5")),
    _Prefix("lora_te3_", "kohya", ("t5",)),
    _Prefix("lora_te_", "kohya", ("clip_l", "clip_g")),
    _Prefix("lora_prior_te_", "kohya", ("clip_g",)),
    _Prefix("text_encoders.clip_l.transformer.", "ComfyUI", ("clip_l",)),
    _Prefix("text_encoders.clip_g.transformer.", "ComfyUI", ("clip_g",)),
    _Prefix("text_encoders.t5xxl.transformer.", "ComfyUI", ("t5",)),
    _Prefix("text_encoders.transformer.", "ComfyUI", ("t5",)),
    _Prefix("text_encoder.", "diffusers", ("clip_l", "clip_g")),
    _Prefix("text_encoder_2.", "diffusers", ("clip_g",)),
    _Prefix("text_encoder_3.", "diffusers", ("t5",)),
    _Prefix("", "bare", ("mmdit",)),
)


# What training leaves in a path, anywhere: torch.compile, DDP, FSDP, checkpointing, PEFT.
_WRAPPERS = re.compile(
    r"_orig_mod[._]|(?:^|(?<=\.))"
    r"(?:module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model)\."
)
_PEFT = "base_model.model."


def _apart(name: str) -> tuple[_Prefix, str]:
    """The prefix of a name, and the module behind it."""
    plain = _WRAPPERS.sub("", name)
    prefix = next(prefix for prefix in _PREFIXES if plain.startswith(prefix.text))
    return prefix, plain[len(prefix.text) :]


def module_of(name: str) -> str:
    """The module that a name means, as the program that wrote it spells it."""
    return _apart(name)[1]


def place(name: str, loaded: Collection[str] = LOADED) -> Place | None:
    """The parameter that a key's name means, or None.

    loaded: the networks there are; where a name fits several, the first of those that is loaded,
    else the first.
    """
    prefix, module = _apart(name)
    for component in sorted(prefix.components, key=lambda kind: kind not in loaded):
        found = _lookup(component, module)
        if found is not None:
            return found
    return None


def is_from_peft(names: Iterable[str]) -> bool:
    """Whether PEFT has written these names: it puts its own prefix before them."""
    return any(_PEFT in name for name in names)


# Roles

_ADAPTER = r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?"  # the name that PEFT gave it
_ROLES = (  # the end of a key, and what the tensor is
    (r"(?:\.lora_up|_lora\.up|\.lora\.up|\.lora_linear_layer\.up)\.weight", "up"),
    (r"(?:\.lora_down|_lora\.down|\.lora\.down|\.lora_linear_layer\.down)\.weight", "down"),
    (rf"\.lora_B{_ADAPTER}(?:\.weight)?", "up"),
    (rf"\.lora_A{_ADAPTER}(?:\.weight)?", "down"),
    (rf"\.lora_B{_ADAPTER}\.bias", "up_bias"),
    (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "magnitude"),
    (r"\.lora_mid\.weight", "mid"),
    (rf"\.(?P<role>hada_(?:w[12]_[ab]|t[12])){_ADAPTER}", None),
    (rf"\.(?P<role>lokr_(?:w[12](?:_[ab])?|t2)){_ADAPTER}", None),
    (r"\.(?P<role>alpha|dora_scale)", None),  # None: the role is the captured name
    (r"\.(?:diff|w_norm)", "diff"),
    (r"\.(?:diff_b|b_norm)", "diff_b"),
)
_ROLE_PATTERNS = tuple((re.compile(f"(?P<name>.*?){pattern}"), role) for pattern, role in _ROLES)

_UNSUPPORTED = (
    (re.compile(r"\.oft_(blocks|diag)$|\.oft_R\b"), "OFT"),
    (re.compile(r"\.[ab][12]\.weight$"), "GLoRA"),
    (re.compile(r"\.lora_E\b|\.ranknum\b"), "AdaLoRA"),
    (re.compile(r"\.set_weight$|\.reshape_weight$"), "replaced weights (set_weight)"),
    (re.compile(r"\.on_input$|\.ia3_l\b"), "IA3"),
    (re.compile(r"\.(vera_lambda|lora_embedding_[AB]|boft_[RP])\b"), "an adapter of PEFT's"),
)
_EMBEDDINGS = re.compile(r"bundle_emb\.|emb_params$|string_to_param|learned_embeds|^clip_[lg]$")


@dataclass(frozen=True)
class Keys:
    """The keys of a file, sorted.

    groups: by name, then by role, the key.  unsupported: key -> the method it belongs to.
    embeddings: textual inversions in the same file.  strangers: keys of no known role.
    adapters: the names that PEFT gave, where keys have them.  doubled: key -> the earlier key of
    the same name and role.
    """

    groups: dict[str, dict[str, str]]
    unsupported: dict[str, str]
    embeddings: tuple[str, ...]
    strangers: tuple[str, ...]
    adapters: tuple[str, ...]
    doubled: dict[str, str]


def sort_keys(keys: Iterable[str]) -> Keys:
    """Take the keys of a LoRA file apart."""
    groups: dict[str, dict[str, str]] = {}
    unsupported: dict[str, str] = {}
    embeddings: list[str] = []
    strangers: list[str] = []
    adapters: list[str] = []
    doubled: dict[str, str] = {}
    for key in keys:
        split = _split(key)
        if _EMBEDDINGS.search(key):
            embeddings.append(key)
        elif split is not None:
            name, role, adapter = split
            adapters += [adapter] if adapter else []
            if (earlier := groups.setdefault(name, {}).setdefault(role, key)) != key:
                doubled[key] = earlier
        elif method := next((m for pattern, m in _UNSUPPORTED if pattern.search(key)), None):
            unsupported[key] = method
        else:
            strangers.append(key)
    return Keys(
        groups,
        unsupported,
        tuple(embeddings),
        tuple(strangers),
        tuple(dict.fromkeys(adapters)),
        doubled,
    )


def _split(key: str) -> tuple[str, str, str | None] | None:
    """(name, role, PEFT's name of the adapter) of a key."""
    for pattern, role in _ROLE_PATTERNS:
        found = pattern.fullmatch(key)
        if found is not None:
            parts = found.groupdict()
            return parts["name"], role or parts["role"], parts.get("adapter")
    return None


def kind_of(roles: Collection[str]) -> str | None:
    """The method that these roles make up: "LoRA", "LoHa", "LoKr", "difference", or None."""
    if {"up", "down", "mid", "magnitude", "up_bias"} & set(roles):
        return "LoRA"
    for start, kind in (("hada_", "LoHa"), ("lokr_", "LoKr")):
        if any(role.startswith(start) for role in roles):
            return kind
    return "difference" if "diff" in roles or "diff_b" in roles else None


# What a file is

_FAMILIES = (  # names in one spelling -> whose they are
    (r"double_blocks_|single_(transformer_)?blocks_", "Flux or a relative of it"),
    (r"(input|output|down|up)_blocks_|mid_block_|middle_block_", "Stable Diffusion 1, 2 or XL"),
    (r"(^|_)blocks_\{\}_(self|cross)_attn|(^|_)blocks_\d+_(self|cross)_attn", "Wan or a relative"),
    (r"adaln_single|caption_projection", "PixArt or a relative of it"),
    (r"(^|_)layers_\d+_(attention|adaLN)|noise_refiner", "Lumina or Z-Image"),
    (r"transformer_blocks_\d+_(img|txt)_m(od|lp)", "Qwen-Image"),
)


def family(names: Iterable[str]) -> str | None:
    """Whose model these names, none of them SD3's, belong to, as far as known.

    Only names of a denoiser tell: text encoders are shared between families.
    """
    denoisers = (name for name in names if _apart(name)[0].components == ("mmdit",))
    text = "\n".join(name.replace(".", "_") for name in denoisers)
    return next((owner for sign, owner in _FAMILIES if re.search(sign, text, re.M)), None)


def dialect(names: Iterable[str]) -> str:
    """The dialect of most of the names."""
    counts = Counter("PEFT" if _PEFT in name else _apart(name)[0].dialect for name in names)
    return counts.most_common(1)[0][0] if counts else "unknown"


@dataclass(frozen=True)
class LoRADescription:
    """A LoRA file from its header alone.

    kinds: method -> adapters.  unsupported: the methods among them that are refused.
    components: network -> adapted parameters.  ranks: those in the file, ascending.  modules: names
    of the networks' modules, e.g. for a table.  unmatched: keys that mean nothing in SD3.  family:
    whose model it is for, if another is known; then nothing counts as SD3's, though the text
    encoders' names are the same.
    """

    dialect: str
    kinds: dict[str, int]
    unsupported: tuple[str, ...]
    components: dict[str, int]
    ranks: tuple[int, ...]
    modules: tuple[str, ...]
    unmatched: tuple[str, ...]
    family: str | None


def describe(shapes: Mapping[str, Sequence[int]]) -> LoRADescription | None:
    """What kind of LoRA these keys and shapes are; None when they are no LoRA."""
    keys = sort_keys(shapes)
    groups = {name: roles for name, roles in keys.groups.items() if kind_of(roles)}
    foreign_methods = {_adapted(key): method for key, method in keys.unsupported.items()}
    names = dict.fromkeys([*groups, *foreign_methods])
    places = {name: where for name in names if (where := place(name)) is not None}
    if not groups and not places and all(_apart(name)[0].dialect == "bare" for name in names):
        return None
    owner = family(name for name in names if name not in places)
    found = {} if owner else places
    missed = [key for name in groups if name not in found for key in groups[name].values()]
    missed += [key for key in keys.unsupported if _adapted(key) not in found]
    ranks = {rank for roles in groups.values() if (rank := rank_of(roles, shapes)) is not None}
    return LoRADescription(
        dialect=dialect(names),
        kinds=_kinds(groups, foreign_methods),
        unsupported=tuple(sorted(set(foreign_methods.values()))),
        components=dict(Counter(where.component for where in found.values())),
        ranks=tuple(sorted(ranks)),
        modules=tuple(sorted({where.module for where in found.values()})),
        unmatched=(*missed, *keys.embeddings, *keys.strangers),
        family=owner,
    )


def _adapted(key: str) -> str:
    """The name before the role of a method that is not supported."""
    return next(key[: found.start()] for p, _ in _UNSUPPORTED if (found := p.search(key)))


def _kinds(groups: Mapping[str, Collection[str]], others: Mapping[str, str]) -> dict[str, int]:
    """Adapters by method; a DoRA counts beside the method whose change it norms."""
    kinds = Counter(str(kind_of(roles)) for roles in groups.values())
    kinds.update(others.values())
    if normed := sum(bool({"dora_scale", "magnitude"} & set(roles)) for roles in groups.values()):
        kinds["DoRA"] = normed
    return dict(kinds)


def rank_of(roles: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The inner size of an adapter, from the factor whose first dimension it is; None: it has none.

    roles: its keys.  shapes: by key.
    """
    for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if role in roles and shapes[roles[role]] and math.prod(shapes[roles[role]]):
            return shapes[roles[role]][0]
    return None
