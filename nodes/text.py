"""Prompt -> CONDITIONING."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io
from torch import Tensor

from ..sd3_core.checkpoints.header import read_header
from ..sd3_core.conditioning import Conditioning
from ..sd3_core.embedded.model import note
from ..sd3_core.speed.prompts import PromptCache, users_cache
from ..sd3_core.text.encoders import ENCODERS, RELEASED_WINDOW, TITLES, note_on_windows
from ._compat import advanced, schema
from .comfy_text import KEYS, MODULES, RELEASED_CONTEXT, RELEASED_POOLED, SD3TextModel
from .embeddings import Reader, notes_on_embeddings
from .errors import NodeError, coded
from .wires import CATEGORY, origin_of, report

RELEASED_CLIP_L = 768  # width of CLIP-L, which ComfyUI's own SD3 CLIP does not tell


@dataclass(frozen=True)
class Shape:
    """What one of the encoders' CLIP makes: ours of any width, or ComfyUI's own."""

    context: int
    pooled: int
    window: int
    clip_l: int  # channels of CLIP-L, in the context and in the pooled vector
    ours: bool

    @staticmethod
    def of(model: Any) -> "Shape":
        if not isinstance(model, SD3TextModel):
            return Shape(
                RELEASED_CONTEXT, RELEASED_POOLED, RELEASED_WINDOW, RELEASED_CLIP_L, ours=False
            )
        right = model.clip_g.transformer.config.pooled_dim if model.clip_g is not None else 0
        return Shape(
            model.context_dim, model.pooled_dim, model.window, model.pooled_dim - right, ours=True
        )


@dataclass(frozen=True)
class Words:
    """A prompt as ComfyUI's tokens, each encoder's own."""

    tokens: dict[str, Any]
    counts: dict[str, int]  # as EncodedPrompt.tokens
    notes: tuple[str, ...]


def check_clip(clip: Any) -> None:
    """Raises NodeError unless it is a CLIP of Stable Diffusion 3."""
    if clip is None:
        raise NodeError(
            "missing_encoder",
            "no CLIP arrived: the checkpoint has no text encoders. Load them with SD3 Load Text "
            "Encoders.",
        )
    model = clip.cond_stage_model
    if not all(hasattr(model, name) for name in MODULES.values()):
        raise NodeError(
            "wrong_encoders",
            f"this CLIP is a {type(model).__name__}, not that of Stable Diffusion 3 (CLIP-L, "
            "CLIP-G and T5). Load it with SD3 Load Text Encoders or TripleCLIPLoader.",
        )


def present(clip: Any) -> list[str]:
    return [kind for kind in ENCODERS if getattr(clip.cond_stage_model, MODULES[kind]) is not None]


def tokenize(clip: Any, texts: Mapping[str, str], least: int) -> Words:
    """texts: by encoder.  least: T5's least number of tokens."""
    options = {"t5xxl_min_length": least}
    read = {
        text: clip.tokenize(text, return_word_ids=True, tokenizer_options=options)
        for text in {*texts.values(), ""}
    }
    rows = {kind: list(read[texts[kind]][key]) for kind, key in KEYS.items()}
    read_by = [kind for kind in present(clip) if kind != "t5"] or ["clip_l", "clip_g"]
    windows = max(len(rows[kind]) for kind in read_by)
    for kind in ("clip_l", "clip_g"):
        rows[kind] += read[""][KEYS[kind]] * (windows - len(rows[kind]))
    readers = {kind: Reader(kind, getattr(clip.tokenizer, MODULES[kind])) for kind in ENCODERS}
    real = {
        kind: sum(
            entry[2] > 0 and readers[kind].fits(entry[0]) for row in rows[kind] for entry in row
        )
        for kind in ENCODERS
    }
    length = sum(len(row) for row in rows["t5"])
    return Words(
        tokens={key: [[entry[:2] for entry in row] for row in rows[k]] for k, key in KEYS.items()},
        counts={**real, "clip_windows": windows, "t5_length": length},
        notes=(
            *notes_on_length(clip, real, windows, length, least),
            *notes_on_embeddings((readers[kind] for kind in present(clip)), texts),
        ),
    )


def clip_window(clip: Any, kind: str) -> int:
    """Tokens that one of its CLIPs reads at once."""
    return getattr(clip.tokenizer, MODULES[kind]).max_length


def notes_on_length(
    clip: Any, real: Mapping[str, int], windows: int, length: int, least: int
) -> list[str]:
    there = present(clip)
    own = {kind: clip_window(clip, kind) for kind in there if kind != "t5"}
    notes = note_on_windows(own)
    if windows > 1 and own:
        notes.append(
            f"CLIP read {max(real['clip_l'], real['clip_g'])} tokens in {windows} windows of "
            f"{min(own.values())}; its pooled vector comes from the first."
        )
    if length > least and "t5" in there:
        notes.append(f"T5 read {real['t5']} tokens: its part grew from {least} to {length} rows.")
    return notes


@dataclass(frozen=True)
class Encoded:
    conditioning: list[list[Any]]  # CONDITIONING
    known: bool  # found on disk, so that no encoder was needed


def look_up_or_encode(
    clip: Any, words: Words, use: list[str], cache: PromptCache | None
) -> Encoded:
    key = hash_of(clip, words, use)
    if cache is None or key is None:
        return Encoded(encode(clip, words, use), known=False)
    found = cache.get(key)
    if found is not None:
        device = comfy.model_management.intermediate_device()
        found = found.to(device, torch.float32)
        return Encoded([[found.context, {"pooled_output": found.pooled}]], known=True)
    conditioning = encode(clip, words, use)
    ((context, extra),) = conditioning
    if set(extra) == {"pooled_output"}:
        cache[key] = Conditioning(context, extra["pooled_output"])
    return Encoded(conditioning, known=False)


def hash_of(clip: Any, words: Words, use: list[str]) -> str | None:
    """Of all that decides the conditioning; None where a patch, hook or embedding has a say too."""
    model, files = clip.cond_stage_model, origin_of(clip.patcher).files
    rows = [row for key in KEYS.values() for row in words.tokens[key]]
    embedded = not all(isinstance(token, int) for row in rows for token, _ in row)
    if is_changed(clip) or embedded or not files or not isinstance(model, SD3TextModel):
        return None
    encoders = {
        kind: [files[kind]["fingerprint"], str(getattr(model, MODULES[kind]).transformer.dtype)]
        for kind in present(clip)
    }
    shape = asdict(Shape.of(model))
    deciding = [encoders, clip.patcher.load_device.type, shape, use, words.counts, words.tokens]
    return hashlib.sha256(json.dumps(["comfyui", deciding]).encode()).hexdigest()


def is_changed(clip: Any) -> bool:
    """Whether patches, hooks, a schedule or another last layer have a say, beside the files."""
    patcher = clip.patcher
    return bool(
        patcher.patches
        or patcher.object_patches.keys() - {"manual_cast_dtype"}  # which every CLIP has
        or patcher.forced_hooks
        or clip.apply_hooks_to_conds
        or clip.use_clip_schedule
        or clip.layer_idx is not None
    )


def encode(clip: Any, words: Words, use: list[str]) -> list[list[Any]]:
    """CONDITIONING in which every encoder that is missing or off left zeros of normal length."""
    shape = Shape.of(clip.cond_stage_model)
    there = present(clip)
    # Ours leave out what is None; ComfyUI's own run it, and it is blanked afterwards.
    run = [kind for kind in there if kind in use] if shape.ours else there
    tokens = {
        key: words.tokens[key] if kind in run or not shape.ours else None
        for kind, key in KEYS.items()
    }
    clips = [kind for kind in run if kind != "t5"] or [kind for kind in there if kind != "t5"]
    long = [sum(map(len, words.tokens[KEYS[kind]])) for kind in clips]
    clip_rows = min(long, default=words.counts["clip_windows"] * shape.window)
    conditioning = []
    for context, extra in clip.encode_from_tokens_scheduled(tokens):
        clips = context[:, :clip_rows] if {"clip_l", "clip_g"} & set(run) else None
        t5 = context[:, -words.counts["t5_length"] :] if "t5" in run else None
        context = torch.cat(
            [
                zeros_unless(clips, context, clip_rows, shape.context),
                zeros_unless(t5, context, words.counts["t5_length"], shape.context),
            ],
            dim=1,
        )
        pooled = extra["pooled_output"].clone()
        blank(context, pooled, [kind for kind in run if kind not in use], clip_rows, shape)
        conditioning.append([context, {**extra, "pooled_output": pooled}])
    return conditioning


def zeros_unless(part: Tensor | None, like: Tensor, rows: int, width: int) -> Tensor:
    return like.new_zeros(like.shape[0], rows, width) if part is None else part


def blank(context: Tensor, pooled: Tensor, off: list[str], clip_rows: int, shape: Shape) -> None:
    """Zeros, in place, where an encoder that is off has written."""
    if "clip_l" in off:
        context[:, :clip_rows, : shape.clip_l] = 0
        pooled[:, : shape.clip_l] = 0
    if "clip_g" in off:
        context[:, :clip_rows, shape.clip_l :] = 0
        pooled[:, shape.clip_l :] = 0
    if "t5" in off:
        context[:, clip_rows:] = 0


def notes_on_encoders(clip: Any, use: list[str]) -> list[str]:
    there = present(clip)
    notes = [
        f"{TITLES[kind]} is {'off' if kind in there else 'not loaded'}: zeros stand in its place."
        for kind in ENCODERS
        if kind not in there or kind not in use
    ]
    nothing = not set(there) & set(use)
    return [*notes, "No encoder is on: this is the picture of no prompt."] if nothing else notes


def notes_on_world(clip: Any, prompt: str) -> list[str]:
    """What the embedded model has to say of words that it was never taught."""
    for path in origin_of(clip.patcher).paths.values():
        if said := note(read_header(path).metadata, prompt):
            return [said]
    return []


def prompt_input(name: str, tooltip: str, optional: bool = False) -> Any:
    return io.String.Input(
        name,
        multiline=True,
        dynamic_prompts=True,
        default="",
        optional=optional,
        tooltip=tooltip,
    )


def switch_input(name: str, title: str) -> Any:
    return io.Boolean.Input(
        name,
        default=True,
        optional=True,
        tooltip=f"Off: {title} leaves zeros, as the model met it in training.",
    )


class SD3EncodePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3EncodePrompt",
                "display_name": "SD3 Encode Prompt",
                "category": f"{CATEGORY}/text",
                "description": "Prompt and negative prompt for SD3, with the tokens that each "
                "encoder read. (word:1.2) weighs a word, embedding:name inserts an embedding.",
                "search_aliases": ["prompt", "clip text encode", "text encode", "t5", "negative"],
                "inputs": [
                    io.Clip.Input("clip", tooltip="The text encoders: ours, or ComfyUI's for SD3."),
                    prompt_input("prompt", "What the picture shows, for all three encoders."),
                    prompt_input(
                        "negative", "What to steer away from; at cfg 1 it does not count."
                    ),
                    *advanced(
                        [
                            prompt_input(
                                "prompt_clip_g", "Another text for CLIP-G. Empty: the prompt.", True
                            ),
                            prompt_input(
                                "prompt_t5", "Another text for T5. Empty: the prompt.", True
                            ),
                            switch_input("use_clip_l", "CLIP-L"),
                            switch_input("use_clip_g", "CLIP-G"),
                            switch_input("use_t5", "T5"),
                            io.Int.Input(
                                "t5_length",
                                default=0,
                                min=0,
                                max=4096,
                                optional=True,
                                tooltip="T5's least number of tokens. 0: 77, as in training. Long "
                                "prompts are never cut.",
                            ),
                        ]
                    ),
                ],
                "outputs": [
                    io.Conditioning.Output(display_name="positive", tooltip="Of the prompt."),
                    io.Conditioning.Output(
                        display_name="negative", tooltip="Of the negative prompt."
                    ),
                ],
            }
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        prompt: str,
        negative: str,
        prompt_clip_g: str = "",
        prompt_t5: str = "",
        use_clip_l: bool = True,
        use_clip_g: bool = True,
        use_t5: bool = True,
        t5_length: int = 0,
    ) -> io.NodeOutput:
        check_clip(clip)
        switches = zip(ENCODERS, (use_clip_l, use_clip_g, use_t5), strict=True)
        use = [kind for kind, on in switches if on]
        least = t5_length or Shape.of(clip.cond_stage_model).window
        texts = {"clip_l": prompt, "clip_g": prompt_clip_g or prompt, "t5": prompt_t5 or prompt}
        with coded("bad_setting"):
            positive_words = tokenize(clip, texts, least)
            negative_words = tokenize(clip, dict.fromkeys(ENCODERS, negative), least)
            cache = users_cache()
        both = [positive_words, negative_words]
        encoded = [look_up_or_encode(clip, words, use, cache) for words in both]
        contents = {
            **{
                name: {"tokens": words.counts, "notes": list(words.notes), "known": done.known}
                for name, words, done in zip(("positive", "negative"), both, encoded, strict=True)
            },
            "window": Shape.of(clip.cond_stage_model).window,
            "use": use,
            "loaded": present(clip),
            "notes": [*notes_on_encoders(clip, use), *notes_on_world(clip, prompt)],
            "files": origin_of(clip.patcher).files,
        }
        return io.NodeOutput(*(done.conditioning for done in encoded), ui=report(contents))
