"""Which file is this? Told from names and shapes: single file, split, without prefixes, diffusers.

`find_components` answers with one Component for each of the five networks it finds. A component
lists, under the released names, where each parameter comes from; `load` checks and reads it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError
from . import diffusers
from .foreign import describe_names
from .header import is_folder
from .sources import Source, make_source
from .stored import (
    Part,
    Stored,
    describe_folder,
    is_shard,
    name_list,
    read_stored,
    weights_in,
    what_to_do,
)

COMPONENTS = ("mmdit", "vae", "clip_l", "clip_g", "t5")
PREFIXES = {  # of the released single files
    "mmdit": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
TITLES = {
    "mmdit": "the denoiser (MMDiT)",
    "vae": "the VAE",
    "clip_l": "the text encoder CLIP-L",
    "clip_g": "the text encoder CLIP-G",
    "t5": "the text encoder T5",
}
SUPPLIERS = {  # the released files that hold a component
    "mmdit": "sd3.5_medium.safetensors or sd3.5_large.safetensors",
    "vae": "sd3.5_medium.safetensors (the VAE is inside, the same for all SD3 models)",
    "clip_l": "clip_l.safetensors",
    "clip_g": "clip_g.safetensors",
    "t5": "t5xxl_fp16.safetensors or t5xxl_fp8_e4m3fn.safetensors",
}
_RELEASED_CLIPS: dict[tuple[tuple[int, ...], int], str] = {  # (width,), layers
    ((768,), 12): "clip_l",
    ((1280,), 32): "clip_g",
}
_FOLDERS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")

# What only this network's names contain, whatever stands before it; `style` is who names so.
_SIGNS = (
    ("mmdit", "released", re.compile(r"(.*?)joint_blocks\.\d+\.(?:x|context)_block\.")),
    (
        "mmdit",
        "diffusers",
        re.compile(r"(.*?)transformer_blocks\.\d+\.(?:attn\.add_|attn\.to_add|norm1_c|ff_context)"),
    ),
    ("vae", "released", re.compile(r"(.*?)(?:en|de)coder\.(?:down|mid|up)\.(?:\d+\.)?(?:bl|at)")),
    ("vae", "diffusers", re.compile(r"(.*?)(?:en|de)coder\.(?:down|up)_blocks\.\d+\.resnets\.")),
    ("clip", "released", re.compile(r"(.*?)text_model\.encoder\.layers\.\d+\.")),
    ("clip", "transformers 5", re.compile(r"(.*?)(?<!text_model\.)embeddings\.token_embedding\.")),
    ("t5", "released", re.compile(r"(.*?)encoder\.block\.\d+\.layer\.\d+\.")),
)
# What files carry beside the parameters and no computation of ours needs.
_IGNORED = re.compile(
    r"(?:.*\.)?(?:scaled_fp8|comfy_quant|weight_scale|scale_weight|input_scale|scale_input)"
    r"|(?:.*\.)?(?:position_ids|logit_scale|spiece_model)|tokenizer\..*"
)
_IGNORED_IN = {
    "mmdit": re.compile(r"(?!)"),
    "vae": re.compile(r"(?!)"),
    "clip_l": re.compile(r"vision_model\..*|visual_projection\.weight|text_projection\.weight"),
    "clip_g": re.compile(r"vision_model\..*|visual_projection\.weight"),
    "t5": re.compile(r"encoder\.embed_tokens\.weight|decoder\..*|lm_head\.weight"),
}


@dataclass(frozen=True, eq=False)
class Component:
    """One network in a file or folder.

    sources: by the released name without prefix.  style: whose names the file uses ("released",
    "diffusers"; "transformers 5" leaves `text_model.` out).
    """

    kind: str
    file: Path
    sources: dict[str, Source]
    metadata: dict[str, str] = field(default_factory=dict)
    prefix: str = ""
    style: str = "released"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: source.shape for key, source in self.sources.items()}


def find_components(path: str | Path, clip: str | None = None) -> dict[str, Component]:
    """The networks in a file, an index of shards or a diffusers folder, by their kind.

    clip: "clip_l" or "clip_g", what a CLIP is that neither its size nor its prefix tells.
    Raises CheckpointError that says what the file is when no network of SD3 is in it.
    """
    path = Path(path)
    if is_folder(path):
        return _in_folder(path, clip)
    return _in_tensors(read_stored(path), ClipHints("", clip, path.name))


def _in_folder(folder: Path, clip: str | None) -> dict[str, Component]:
    """The networks of a diffusers folder, or of one of its subfolders."""
    if is_folder(folder / "unet"):
        raise CheckpointError(
            f"{folder}: is a diffusers folder of Stable Diffusion 1.x, 2.x or XL (it has a unet). "
            "This program runs Stable Diffusion 3 and 3.5."
        )
    subfolders = [folder / name for name in _FOLDERS if is_folder(folder / name)]
    found: dict[str, Component] = {}
    for subfolder in subfolders or [folder]:
        weights = weights_in(subfolder)
        if weights is not None:
            place = subfolder.name if subfolders else ""
            hints = ClipHints(place, clip, folder.name)
            found.update(_in_tensors(read_stored(weights), hints))
    if not found:
        raise CheckpointError(f"{folder}: is no diffusers folder of SD3. {describe_folder(folder)}")
    return found


@dataclass(frozen=True)
class ClipHints:
    """What tells CLIP-L from CLIP-G beside the tensors, strongest first."""

    place: str  # the subfolder of a diffusers folder
    clip: str | None  # what the caller says it is
    name: str  # of the file or folder


def _in_tensors(stored: Stored, hints: ClipHints) -> dict[str, Component]:
    if meaning := describe_names(stored.parts):
        raise CheckpointError(f"{stored.file.name}: {meaning}")
    roots = list(_roots(stored.parts))
    if not roots:
        raise CheckpointError(
            f"{stored.file.name}: holds no part of Stable Diffusion 3 "
            f"({len(stored.parts)} tensors: {name_list(stored.parts)})."
            + (f" {what_to_do(stored.file)}" if is_shard(stored.file) else "")
        )
    _check_claimed(stored, [root.prefix for root in roots])
    found: dict[str, Component] = {}
    for root in roots:
        names = _names_under(root.prefix, stored.parts, [other.prefix for other in roots])
        if root.style == "transformers 5":
            names = {_with_text_model(name): part for name, part in names.items()}
        kind = _clip_kind(root.prefix, names, hints) if root.kind == "clip" else root.kind
        found.setdefault(kind, _component(kind, root, names, stored))
    return {kind: found[kind] for kind in COMPONENTS if kind in found}


def _check_claimed(stored: Stored, prefixes: list[str]) -> None:
    """What stands under a released prefix is a network, or the remains of one."""
    strays = [key for key in stored.parts if not key.startswith(tuple(prefixes))]
    for kind, prefix in PREFIXES.items():
        inside = [key for key in strays if key.startswith(prefix)]
        torn = [key for key in inside if not _is_ignored(kind, key.removeprefix(prefix))]
        if torn:
            raise CheckpointError(
                f"{stored.file.name}: holds {len(torn)} tensors of {TITLES[kind]} "
                f"({name_list(torn)}), and the rest of it is missing. {what_to_do(stored.file)}"
            )


def _is_ignored(kind: str, name: str) -> bool:
    return any(names.fullmatch(name) for names in (_IGNORED, _IGNORED_IN[kind]))


def _with_text_model(name: str) -> str:
    return f"text_model.{name}" if name.startswith(("embeddings.", "encoder.", "final_")) else name


def _names_under(prefix: str, parts: Mapping[str, Part], prefixes: list[str]) -> dict[str, Part]:
    """The tensors of the network with this prefix, without it; those of longer prefixes are not."""
    longer = tuple(other for other in prefixes if len(other) > len(prefix))
    return {
        key[len(prefix) :]: part
        for key, part in parts.items()
        if key.startswith(prefix) and not key.startswith(longer)
    }


@dataclass(frozen=True)
class _Root:
    kind: str  # as in COMPONENTS, or "clip"
    style: str
    prefix: str


def _roots(keys: Mapping[str, Part]) -> Iterator[_Root]:
    """Where a network begins: its kind and the prefix before its names.

    Only CLIP is there twice (looked for at most eight times, lest a hostile header take hours);
    of the others the prefix with most names counts, the first one of equals (an EMA copy comes
    after the model).
    """
    counts: dict[str, Counter[_Root]] = {}
    for key in keys:
        for kind, style, sign in _SIGNS:
            if found := sign.match(key):
                counts.setdefault(kind, Counter())[_Root(kind, style, found[1])] += 1
    for kind, counter in counts.items():
        for root, _ in counter.most_common(8 if kind == "clip" else 1):
            yield root


def _clip_kind(prefix: str, names: Mapping[str, Part], hints: ClipHints) -> str:
    """CLIP-L or CLIP-G: by a released size, then where it lies, what its caller says, its name.

    A CLIP that none of them tells is G if it has the projection that only G needs.
    """
    released = clip_of_released_size({name: part.info.shape for name, part in names.items()})
    told = released or _clip_in_text(prefix) or _clip_in_text(hints.place)
    told = told or (hints.clip if hints.clip in ("clip_l", "clip_g") else None)
    projected = "clip_g" if "text_projection.weight" in names else "clip_l"
    return told or _clip_in_text(hints.name) or projected


def _clip_in_text(text: str) -> str | None:
    if re.search(r"clip.?g|big.?g|text_encoder_2", text.lower()):
        return "clip_g"
    if re.search(r"clip.?l|vit.?l|text_encoder(?!s|_3)", text.lower()):
        return "clip_l"
    return None


def clip_of_released_size(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Which CLIP these shapes are, if it is one of the released ones."""
    layers = {key.split(".")[3] for key in shapes if key.startswith("text_model.encoder.layers.")}
    width = shapes.get("text_model.final_layer_norm.weight", ())
    return _RELEASED_CLIPS.get((tuple(width), len(layers)))


def _component(kind: str, root: _Root, names: dict[str, Part], stored: Stored) -> Component:
    if kind == "t5" and "shared.weight" not in names:
        names = {_with_shared(name): part for name, part in names.items()}
    kept = {name: part for name, part in names.items() if not _is_ignored(kind, name)}
    sources = {
        key: make_source(stored.file, key, their_keys, names, swapped)
        for key, their_keys, swapped in _assignments(kind, root.style, kept)
    }
    return Component(
        kind=kind,
        file=stored.file,
        sources=sources,
        metadata=stored.metadata,
        prefix=root.prefix,
        style=root.style,
    )


def _with_shared(name: str) -> str:
    """T5's table under the name that the decoder shares; its scale moves with it."""
    module, dot, end = name.rpartition(".")
    return f"shared{dot}{end}" if module == "encoder.embed_tokens" else name


def _assignments(
    kind: str, style: str, kept: Mapping[str, Part]
) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """(our key, stored keys, halves swapped) for each; a name without a place keeps its own."""
    if style != "diffusers":
        yield from ((name, (name,), False) for name in kept)
        return
    left = dict.fromkeys(kept)
    for row in diffusers.rows_for(kind, kept):
        for ours, theirs in diffusers.parameters(row):
            if all(name in left for name in theirs):
                yield ours, theirs, row.swapped
                for name in theirs:
                    del left[name]
    yield from ((name, (name,), False) for name in left)
