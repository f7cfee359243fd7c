"""A model's files -> its cache: which network encodes what, each loaded when it is needed."""

import hashlib
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.layouts import Component
from ..checkpoints.load import load_clip, load_vae, read_config
from ..checkpoints.stored import Part
from ..errors import quoted
from ..generate import stored_files
from ..models.vae import VAE, Posterior
from ..precision import CLIP_DTYPE, check_finite
from ..settings import Files, check_sizes, find_parts
from ..speed.streaming import load_t5_to_fit, prompts_at_once
from ..text.encoders import ENCODERS, RELEASED_WINDOW, TextEncoders
from ..text.prompt import parse_prompt
from ..text.tokenizers import Tokenizer, clip_windows, t5_sequence
from ..text.vocabularies import Tokenizers, find_tokenizers
from .cache import Cache, PictureStage, Reading, TextStage
from .layout import Layout, States, sd3_layout

# Of a stored tensor: all of it up to the first number, else that many blocks of that size.
WHOLE_TENSOR = 2**20
BLOCKS, BLOCK = 16, 64 * 2**10

_BARE_PARENTHESIS = re.compile(r"(?<!\\)[()]")


@dataclass(frozen=True)
class Machine:
    """What the networks compute on and in."""

    device: torch.device
    wide_dtype: torch.dtype  # of T5 and the VAE


def model_cache(
    folder: Path,
    files: Files,
    machine: Machine,
    *,
    use: Collection[str] = ENCODERS,
    t5_length: int | str = "auto",
    storage: torch.dtype = torch.float16,
    say: Callable[[str], object] = warnings.warn,
) -> Cache:
    """The cache of the model in these files; reads headers and tokenizers, no weights.

    use: text encoders that take part, if they are there; the others give zeros.  t5_length: rows of
    T5's part, for every caption; "auto": CLIP's window.  A caption that is longer, or longer than
    one window of CLIP's, is cut after a word.  storage: see Cache.  say: is told when T5 does not
    fit on the device.  Raises CheckpointError.
    """
    parts = find_parts(files)
    sizes: dict[str, Any] = {kind: read_config(part) for kind, part in parts.items()}
    check_sizes(parts, sizes)
    on = [name for name in ENCODERS if name in use and name in parts]
    clips = {name: sizes[name] for name in on if name != "t5"}
    window = min((clip.window for clip in clips.values()), default=RELEASED_WINDOW)
    layout = sd3_layout(
        clips,
        sizes["t5"] if "t5" in on else None,
        context_dim=sizes["mmdit"].context_dim,
        pooled_dim=sizes["mmdit"].pooled_dim,
        window=window,
        t5_length=_rows_of_t5(t5_length, min(window, RELEASED_WINDOW)),
    )
    tokenizers = find_tokenizers(
        on,
        directory=files.tokenizers,
        checkpoint=stored_files(files.checkpoint),
        diffusers=files.checkpoint if files.checkpoint and files.checkpoint.is_dir() else None,
    )
    texts = {
        name: text_stage(name, parts[name], tokenizers, layout, window, machine, say) for name in on
    }
    return Cache(folder, vae_stage(parts["vae"], machine), texts, layout, storage)


def _rows_of_t5(t5_length: int | str, window: int) -> int:
    if t5_length == "auto":
        return window
    if not isinstance(t5_length, int) or t5_length < 1:
        raise ValueError(f"t5_length is {quoted(t5_length)}; expected auto or a number of tokens.")
    return t5_length


def vae_stage(part: Component, machine: Machine) -> PictureStage:
    config: Any = read_config(part)
    dtype = machine.wide_dtype

    def load() -> Callable[[Tensor], Posterior]:
        return picture_encoder(load_vae(part, dtype=dtype, device=machine.device), dtype)

    identity = f"{fingerprint_of(part)} {dtype}"
    return PictureStage(identity, config.factor, config.latent_channels, load)


def picture_encoder(vae: VAE, dtype: torch.dtype) -> Callable[[Tensor], Posterior]:
    """Images [B, 3, H, W] in -1..1 -> Posterior, float32.  Raises NumericalError."""
    device = next(vae.parameters()).device

    def encode(images: Tensor) -> Posterior:
        posterior = vae.encode(images.to(device, dtype))
        for tensor in (posterior.mean, posterior.logvar):
            check_finite(tensor, "the VAE's encoder", dtype)
        return Posterior(posterior.mean.float(), posterior.logvar.float())

    return encode


def text_stage(
    name: str,
    part: Component,
    tokenizers: Tokenizers,
    layout: Layout,
    window: int,
    machine: Machine,
    say: Callable[[str], object],
) -> TextStage:
    """The stage of one encoder, alone: the others need not be in memory beside it."""
    dtype = machine.wide_dtype if name == "t5" else CLIP_DTYPE
    tokenizer: Tokenizer = getattr(tokenizers, name)
    t5_length = layout.length - window

    def fitting_ids(prompt: str) -> tuple[int, ...] | None:
        pieces = parse_prompt(prompt)
        if name == "t5":
            ids = t5_sequence(tokenizer, pieces, t5_length).ids
            return tuple(ids) if len(ids) == t5_length else None
        windows = clip_windows(tokenizer, pieces, window)
        return tuple(windows[0].ids) if len(windows) == 1 else None

    def load() -> Callable[[Sequence[str]], Iterator[States]]:
        network: Any
        if name == "t5":
            network = load_t5_to_fit(part, dtype, machine.device, say)
        else:
            network = load_clip(part, name, dtype=dtype, device=machine.device)
        encoders = TextEncoders(
            tokenizers,
            context_dim=layout.width,
            pooled_dim=layout.pooled,
            **{name: network},
            window=window,
        )

        def encode(prompts: Sequence[str]) -> Iterator[States]:
            some = prompts_at_once(network)
            if some > 1:
                for start in range(0, len(prompts), some):
                    states = encoders.t5_states(prompts[start : start + some], t5_length)
                    yield from (States(each, each.new_zeros(0)) for each in states)
                return
            for prompt in prompts:
                encoded = encoders.encode(prompt, use=(name,), t5_length=t5_length)
                yield layout.take(encoded.conditioning, name)

        return encode

    identity = f"{fingerprint_of(part)} {dtype}"
    return TextStage(identity, lambda caption: read_caption(caption, fitting_ids), load)


def read_caption(caption: str, fitting_ids: Callable[[str], tuple[int, ...] | None]) -> Reading:
    """The caption as a prompt that fits: whole, or cut after a word.

    fitting_ids: a prompt's tokens, or None when they are too many.
    """
    ids = fitting_ids(literal(caption))
    if ids is not None:
        return Reading(literal(caption), ids)
    fits, too_long = 0, len(caption)  # characters
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if fitting_ids(literal(caption[:middle])) is None:
            too_long = middle
        else:
            fits = middle
    for text in (_whole_words(caption, fits), caption[:fits], ""):
        ids = fitting_ids(literal(text))
        if ids is not None:
            return Reading(literal(text), ids, cut=True)
    raise ValueError("not even the empty caption fits the text encoder's length.")


def _whole_words(caption: str, length: int) -> str:
    start, rest = caption[:length], caption[length:]
    if start[-1:].isspace() or rest[:1].isspace():
        return start
    words = start.rsplit(maxsplit=1)
    return words[0] if len(words) > 1 else start


def literal(caption: str) -> str:
    """A prompt that means the caption: its parentheses weigh nothing, escaped or not."""
    return _BARE_PARENTHESIS.sub(r"\\\g<0>", caption)


def fingerprint_of(component: Component) -> str:
    """Identity of one network's weights: 16 hex digits, whatever else its file holds.

    SHA-256 over names, shapes and evenly spread samples of each stored tensor.
    """
    digest = hashlib.sha256()
    for name, source in sorted(component.sources.items()):
        digest.update(repr((name, source.shape, source.swapped)).encode())
        for stored in (*source.parts, *source.scales):
            if stored is not None:
                _digest_samples(digest, stored)
    return digest.hexdigest()[:16]


def _digest_samples(digest: Any, part: Part) -> None:
    start, size = part.info.start, part.info.end - part.info.start
    digest.update(repr((str(part.info.dtype), size)).encode())
    with part.header.path.open("rb") as file:
        if size <= WHOLE_TENSOR:
            file.seek(start)
            digest.update(file.read(size))
            return
        for block in range(BLOCKS):
            file.seek(start + block * (size - BLOCK) // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
