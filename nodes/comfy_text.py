"""The text encoders as ComfyUI's CLIP.

ComfyUI's own SDClipModel and SDTokenizer stand around our networks and vocabularies: they know
`embedding:name`, prompt weights, clip skip and every option that other nodes set.  What is ours:
the networks, sized by their files, and the assembly, which takes no width for granted.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import torch
from torch import Tensor, nn

from ..sd3_core.checkpoints.layouts import Component
from ..sd3_core.checkpoints.load import CONVERTED_AT_MOST, read_config
from ..sd3_core.errors import CheckpointError
from ..sd3_core.generate import stored_files
from ..sd3_core.models.clip import CLIPConfig, CLIPTextModel
from ..sd3_core.models.mmdit import MMDiTConfig
from ..sd3_core.models.t5 import T5Config, T5Encoder
from ..sd3_core.text.encoders import ENCODERS, RELEASED_WINDOW, TITLES
from ..sd3_core.text.tokenizers import Tokenizer
from ..sd3_core.text.vocabularies import find_tokenizers
from .comfy_model import (
    AUTO,
    WEIGHT_DTYPES,
    TypedOps,
    assign_weights,
    dtype_of,
    elements,
    is_scaled,
    quantised_layers,
    read_weights,
)

MODULES = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}  # ours -> ComfyUI's
KEYS = {"clip_l": "l", "clip_g": "g", "t5": "t5xxl"}  # ours -> in ComfyUI's tokens
RELEASED_CONTEXT, RELEASED_POOLED = 4096, 2048
ENDLESS = 99_999_999  # tokens of T5 before anything is cut: never


# Networks


class ComfyCLIP(CLIPTextModel):
    """The core's CLIP by the call that ComfyUI's SDClipModel makes."""

    def __init__(self, sizes: Mapping[str, Any], dtype: torch.dtype, device: Any, operations: Any):
        with torch.device("meta"):  # weights are assigned
            super().__init__(sizes["config"], TypedOps(operations, dtype))
        self.num_layers = self.config.num_layers
        self.dtype = dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embeddings.token_embedding

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_tokens: Tensor | None,
        attention_mask: Tensor | None = None,
        embeds: Tensor | None = None,
        num_tokens: list[int] | None = None,
        intermediate_output: int | None = None,
        final_layer_norm_intermediate: bool = True,
        **ignored: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """embeds: [B, L, D] token embeddings; num_tokens: each row's, its end token included.

        Returns the last states, normed; those after layer `intermediate_output` (-2: the last but
        one); the pooled vectors projected; the same as they are.
        """
        assert embeds is not None
        assert num_tokens is not None
        length, device = embeds.shape[1], embeds.device
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        x = embeds + self.text_model.embeddings.position_embedding(
            torch.arange(length, device=device)
        )
        states = []
        for layer in self.text_model.encoder.layers:
            x = layer(x, mask)
            states.append(x)
        last = self.text_model.final_layer_norm(x)
        middle = None if intermediate_output is None else states[intermediate_output]
        if middle is not None and final_layer_norm_intermediate:
            middle = self.text_model.final_layer_norm(middle)
        ends = torch.tensor(num_tokens, device=device) - 1
        pooled = last[torch.arange(len(last), device=device), ends]
        return last, middle, self.text_projection(pooled), pooled


class ComfyT5(T5Encoder):
    """The core's T5 by the call that ComfyUI's SDClipModel makes."""

    def __init__(self, sizes: Mapping[str, Any], dtype: torch.dtype, device: Any, operations: Any):
        with torch.device("meta"):
            super().__init__(sizes["config"], TypedOps(operations, dtype))
        self.num_layers = self.config.num_layers
        self.dtype = dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_tokens: Tensor | None,
        attention_mask: Tensor | None = None,
        embeds: Tensor | None = None,
        num_tokens: list[int] | None = None,
        intermediate_output: int | None = None,
        **ignored: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the last states and those after `intermediate_output`, both normed."""
        assert embeds is not None
        x, states = embeds, []
        first: Any = self.encoder.block[0]
        bias = first.layer[0].SelfAttention.position_bias(x.shape[1], like=x)
        for block in self.encoder.block:
            x = block(x, bias)
            states.append(x)
        norm = self.encoder.final_layer_norm
        middle = None if intermediate_output is None else norm(states[intermediate_output])
        return norm(x), middle


def text_dtype(component: Component, wanted: str, device: Any) -> torch.dtype:
    """How its weights are kept: as stored; large float32 ones as ComfyUI keeps text encoders."""
    if wanted != AUTO:
        return WEIGHT_DTYPES[wanted]
    stored, usual = dtype_of(component), comfy.model_management.text_encoder_dtype(device)
    if is_scaled(component):
        return usual  # of the layers that are not
    small = elements(component) * stored.itemsize < CONVERTED_AT_MOST
    return stored if small or stored.itemsize <= usual.itemsize else usual


def make_encoder(kind: str, component: Component, tokenizer: Tokenizer, wanted: str) -> Any:
    """One encoder inside ComfyUI's SDClipModel.  Raises CheckpointError."""
    config = read_config(component)
    assert isinstance(config, CLIPConfig | T5Config)
    if tokenizer.size > config.vocab_size:
        raise CheckpointError(
            f"{component.file.name}: {TITLES[kind]} has {config.vocab_size} rows for tokens, the "
            f"tokenizer {tokenizer.size} entries: they belong to different models."
        )
    dtype = text_dtype(component, wanted, comfy.model_management.text_encoder_device())
    keep_scaled = is_scaled(component) and wanted == AUTO and quantised_layers()
    options: dict[str, Any] = {"model_name": MODULES[kind]}
    if keep_scaled:
        options["quantization_metadata"] = {"mixed_ops": True}
    special = {"start": tokenizer.start, "end": tokenizer.end, "pad": tokenizer.pad}
    encoder = comfy.sd1_clip.SDClipModel(
        device="cpu",
        textmodel_json_config={"config": config},
        dtype=dtype,
        model_class=ComfyT5 if kind == "t5" else ComfyCLIP,
        special_tokens={name: token for name, token in special.items() if token is not None},
        layer_norm_hidden_state=kind == "t5",
        return_projected_pooled=kind == "clip_g",
        model_options=options,
    )
    if kind != "t5":  # its constructor refuses this layer for a CLIP of two layers
        encoder.layer, encoder.layer_idx = "hidden", -2
        encoder.options_default = ("hidden", -2, kind == "clip_g")
    assign_weights(encoder.transformer, read_weights(component, dtype, keep_scaled))
    return encoder.requires_grad_(False)


class SD3TextModel(nn.Module):
    """The encoders there are, each under the name that ComfyUI, its LoRAs and its files use.

    context_dim, pooled_dim: what the MMDiT takes.  window: tokens per pass of the CLIPs.
    """

    def __init__(self, encoders: Mapping[str, Any], context_dim: int, pooled_dim: int, window: int):
        super().__init__()
        self.clip_l = encoders.get("clip_l")
        self.clip_g = encoders.get("clip_g")
        self.t5xxl = encoders.get("t5")
        self.context_dim, self.pooled_dim, self.window = context_dim, pooled_dim, window
        self.dtypes = {encoder.transformer.dtype for encoder in encoders.values()}

    def encoders(self) -> list[Any]:
        return [
            encoder for encoder in (self.clip_l, self.clip_g, self.t5xxl) if encoder is not None
        ]

    def set_clip_options(self, options: Mapping[str, Any]) -> None:
        for encoder in self.encoders():
            encoder.set_clip_options(options)

    def reset_clip_options(self) -> None:
        for encoder in self.encoders():
            encoder.reset_clip_options()

    def encode_token_weights(
        self, tokens: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """ComfyUI's tokens -> context [1, L, Dc], pooled [1, Dp] and nothing else.

        As in ComfyUI a missing encoder's part is left out of the context; so is one whose tokens
        are None.  No tokens for either CLIP: no CLIP part.
        """
        device = comfy.model_management.intermediate_device()
        pooled = torch.zeros(1, self.pooled_dim, device=device)
        parts = []
        if tokens["l"] or tokens["g"]:
            left, left_pooled = encoded(self.clip_l, tokens["l"])
            right, right_pooled = encoded(self.clip_g, tokens["g"])
            # CLIP-L's pooled vector is as wide as its states, so this holds without CLIP-L too.
            offset = self.pooled_dim - (0 if right_pooled is None else right_pooled.shape[1])
            rows = min((part.shape[1] for part in (left, right) if part is not None), default=0)
            context = torch.zeros(1, rows, self.context_dim, device=device)
            if left is not None and left_pooled is not None:
                context[..., : left.shape[2]] = left[:, :rows]
                pooled[:, : left_pooled.shape[1]] = left_pooled
            if right is not None and right_pooled is not None:
                context[..., offset : offset + right.shape[2]] = right[:, :rows]
                pooled[:, offset:] = right_pooled
            parts.append(context)
        parts.append(encoded(self.t5xxl, tokens["t5xxl"])[0])
        found = [part for part in parts if part is not None and part.shape[1]]
        nothing = torch.zeros(1, self.window, self.context_dim, device=device)
        return torch.cat(found, dim=1) if found else nothing, pooled, {}


def encoded(encoder: Any, tokens: Any) -> tuple[Tensor | None, Tensor | None]:
    """States [1, L, D] and pooled [1, Dp] of one encoder, None where it does not take part."""
    if encoder is None or tokens is None:
        return None, None
    states, pooled = encoder.encode_token_weights(tokens)[:2]
    return states, pooled


# Tokenizers


@dataclass(frozen=True)
class Vocabulary:
    """One of the core's tokenizers by the calls that ComfyUI's SDTokenizer makes."""

    tokenizer: Tokenizer

    def from_pretrained(self, path: str) -> "Vocabulary":
        return self

    def __call__(self, text: str) -> dict[str, list[int]]:
        around = self.tokenizer
        start = [] if around.start is None else [around.start]
        return {"input_ids": [*start, *around.ids(text), around.end]}

    def get_vocab(self) -> dict[str, int]:
        return {}


@dataclass(frozen=True)
class SD3Tokenizer:
    """Three SDTokenizers; `files`: those that a small model carries, kept when it is saved."""

    clip_l: Any
    clip_g: Any
    t5xxl: Any
    files: Mapping[str, Tensor] = field(default_factory=dict)

    def tokenize_with_weights(
        self,
        text: str,
        return_word_ids: bool = False,
        tokenizer_options: Mapping[str, Any] | None = None,
        **ignored: Any,
    ) -> dict[str, Any]:
        options = {"tokenizer_options": dict(tokenizer_options or {})}
        return {
            key: getattr(self, MODULES[kind]).tokenize_with_weights(
                text, return_word_ids, **options
            )
            for kind, key in KEYS.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.files)


def make_tokenizer(
    kind: str, tokenizer: Tokenizer, width: int, window: int, embeddings: Any
) -> Any:
    """ComfyUI's SDTokenizer over one vocabulary.  width: of its encoder, for `embedding:name`."""
    clip = kind != "t5"
    return comfy.sd1_clip.SDTokenizer(
        tokenizer_path="",
        max_length=window if clip else ENDLESS,
        min_length=None if clip else window,
        pad_to_max_length=clip,
        pad_with_end=kind == "clip_l",
        has_start_token=clip,
        embedding_directory=embeddings,
        embedding_size=width,
        embedding_key=MODULES[kind],
        tokenizer_class=Vocabulary(tokenizer),
    )


# CLIP


@dataclass(frozen=True)
class TextWidths:
    context: int
    pooled: int
    window: int


def text_widths(configs: Mapping[str, Any], mmdit: MMDiTConfig | None) -> TextWidths:
    """What the encoders make together; the MMDiT of the same file tells it surely.

    window: the smallest of the CLIPs', 77 at most: a Long-CLIP lengthens neither the part that it
    shares with another CLIP, nor T5's.
    """
    clips = [configs[kind] for kind in ("clip_l", "clip_g") if kind in configs]
    window = min([*(config.window for config in clips), RELEASED_WINDOW])
    if mmdit is not None:
        return TextWidths(mmdit.context_dim, mmdit.pooled_dim, window)
    both = sum(config.pooled_dim for config in clips) if len(clips) == 2 else RELEASED_POOLED
    context = configs["t5"].d_model if "t5" in configs else RELEASED_CONTEXT
    return TextWidths(context, both, window)


@dataclass(frozen=True)
class TextTarget:
    """What the constructor of comfy.sd.CLIP asks for: something that makes both halves."""

    model: SD3TextModel
    tokens: SD3Tokenizer
    params: dict[str, Any] = field(default_factory=dict)

    def clip(self, dtype: Any, device: Any, model_options: Any) -> SD3TextModel:
        return self.model

    def tokenizer(self, embedding_directory: Any, tokenizer_data: Any) -> SD3Tokenizer:
        return self.tokens


def make_clip(
    parts: Mapping[str, Component],
    *,
    mmdit: MMDiTConfig | None = None,
    weight_dtype: str = AUTO,
    embeddings: Any = None,
    plain: bool = False,
) -> Any:
    """The CLIP of these text encoders ("clip_l", "clip_g", "t5"), of which at least one is there.

    mmdit: of the model they are for, where that is known.  Raises CheckpointError.
    """
    files = tokenizer_files(part.file for part in parts.values())
    tokenizers = find_tokenizers(ENCODERS, checkpoint=files or None)
    configs = {kind: read_config(part) for kind, part in parts.items()}
    widths = text_widths(configs, mmdit)
    encoders = {
        kind: make_encoder(kind, part, getattr(tokenizers, kind), weight_dtype)
        for kind, part in parts.items()
    }
    model = SD3TextModel(encoders, widths.context, widths.pooled, widths.window)
    tokens = SD3Tokenizer(
        **{
            MODULES[kind]: make_tokenizer(
                kind,
                getattr(tokenizers, kind),
                width_of(configs.get(kind)),
                getattr(configs.get(kind), "window", widths.window),
                embeddings,
            )
            for kind in ENCODERS
        },
        files={
            name.removeprefix("text_encoders."): torch.frombuffer(
                bytearray(read()), dtype=torch.uint8
            )
            for name, read in files.items()
        },
    )
    extra = {"disable_dynamic": plain}
    known = inspect.signature(comfy.sd.CLIP.__init__).parameters
    return comfy.sd.CLIP(
        TextTarget(model.eval(), tokens),
        embedding_directory=embeddings,
        parameters=sum(elements(part) for part in parts.values()),
        model_options={"initial_device": torch.device("cpu")},
        **{name: value for name, value in extra.items() if name in known},
    )


def tokenizer_files(paths: Iterable[Any]) -> dict[str, Any]:
    """Readers of the tokenizers that lie inside these files, by tensor name."""
    found: dict[str, Any] = {}
    for path in dict.fromkeys(paths):
        stored = stored_files(path) or {}
        found |= {name: read for name, read in stored.items() if ".tokenizer." in name}
    return found


def width_of(config: Any) -> int:
    if isinstance(config, CLIPConfig):
        return config.hidden_size
    return config.d_model if isinstance(config, T5Config) else 0
