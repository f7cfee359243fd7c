"""Three text encoders -> one Conditioning.

Esser et al. 2024 (arXiv:2403.03206), section 4: the states of CLIP-L and CLIP-G side by side on
the channels, filled up with zeros to T5's width, and T5's after them on the sequence; the pooled
vectors of CLIP-L and CLIP-G one after the other.  An encoder that is off or missing leaves zeros
in its place: so the MMDiT met it in training, where each encoder was dropped now and then.
"""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..errors import CheckpointError, quoted
from ..models.clip import CLIPTextModel
from ..models.t5 import T5Encoder
from ..precision import check_finite
from .prompt import Piece, parse_prompt
from .tokenizers import Tokenizer, Tokens, clip_windows, t5_sequence
from .vocabularies import Tokenizers

ENCODERS = ("clip_l", "clip_g", "t5")
RELEASED_WINDOW = 77  # of CLIP, where no CLIP is there to tell
TITLES = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}
EMBEDDING_SYNTAX = "embedding:"  # ComfyUI's textual inversion; its files are read by the nodes


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt for the MMDiT, and what became of its words."""

    conditioning: Conditioning  # batch of one, float32
    # clip_l, clip_g, t5: tokens of the text that each saw; clip_windows: windows in the context;
    # t5_length: T5's rows in the context, end and padding included.
    tokens: dict[str, int]
    notes: tuple[str, ...]  # a sentence for each thing that a user may not expect


@dataclass(frozen=True)
class Rows:
    """What one encoder reads: CLIP's windows or T5's sequence, and the empty prompt, as long."""

    texts: list[Tokens]
    empty: Tokens

    def with_windows(self, count: int) -> "Rows":
        """Filled up with empty windows."""
        return replace(self, texts=self.texts + [self.empty] * (count - len(self.texts)))

    @property
    def real(self) -> int:
        return sum(row.real for row in self.texts)

    @property
    def length(self) -> int:
        """Rows of the context that the encoder fills."""
        return sum(len(row.ids) for row in self.texts)


@dataclass(frozen=True)
class States:
    """What one encoder makes of a prompt."""

    context: Tensor  # [1, L, D] float32
    pooled: Tensor  # [1, Dp] float32; T5 has none, Dp = 0


class TextEncoders:
    """The encoders of one model: each a network, a function that loads one, or absent.

    A function is called when its encoder is first needed, and its network kept.
    context_dim, pooled_dim: the widths that the MMDiT takes.  window: CLIP's tokens per pass, each
    one's or one number for both, for the time when no CLIP network is there to tell.
    known: prompts encoded before, by a hash of all that decides what becomes of them; identity:
    what the hash should know of the networks.  A known prompt needs no network; `window` must then
    be right.
    Raises CheckpointError when a tokenizer is missing, or when a network does not fit its
    tokenizer, the widths or the other networks.
    """

    def __init__(
        self,
        tokenizers: Tokenizers,
        *,
        context_dim: int,
        pooled_dim: int,
        clip_l: CLIPTextModel | Callable[[], CLIPTextModel] | None = None,
        clip_g: CLIPTextModel | Callable[[], CLIPTextModel] | None = None,
        t5: T5Encoder | Callable[[], T5Encoder] | None = None,
        window: int | Mapping[str, int] = RELEASED_WINDOW,
        known: MutableMapping[str, Conditioning] | None = None,
        identity: str = "",
    ):
        self.known, self.identity = known, identity
        self.context_dim = context_dim
        self.pooled_dim = pooled_dim
        clips = ("clip_l", "clip_g")
        self.windows = dict(window if isinstance(window, Mapping) else dict.fromkeys(clips, window))
        sources = {"clip_l": clip_l, "clip_g": clip_g, "t5": t5}
        self.sources = {name: source for name, source in sources.items() if source is not None}
        self.tokenizers = tokenizers
        self.networks: dict[str, Any] = {}
        for name, source in self.sources.items():
            if isinstance(source, nn.Module):
                self._keep(name, source)

    @torch.no_grad()
    def encode(
        self,
        prompt: str,
        *,
        prompt_clip_g: str | None = None,
        prompt_t5: str | None = None,
        use: Collection[str] = ENCODERS,
        t5_length: int | str = "auto",
    ) -> EncodedPrompt:
        """One prompt, weights and all; CLIP-G and T5 may get another text than CLIP-L.

        use: the encoders that are on.  With none the conditioning is all zeros, which the MMDiT
        knows as "no prompt at all".
        t5_length: T5's least number of tokens, end and padding included; "auto" is CLIP's window,
        but never more than the released 77.
        A longer text makes a longer sequence; nothing is cut.
        Returns float32 whatever the networks run in: a prompt's weights and guidance both multiply
        small differences between two results of this.
        Raises ValueError for an unknown encoder, a length below 1 and a weight that is infinite;
        NumericalError when an encoder gives NaN or infinity.
        """
        on = self._on(use)
        for name in on if self.known is None else ():
            self._network(name)
        least = least_length(t5_length, min(self.clip_rows(self.sources), RELEASED_WINDOW))
        prompts = {
            "clip_l": prompt,
            "clip_g": prompt if prompt_clip_g is None else prompt_clip_g,
            "t5": prompt if prompt_t5 is None else prompt_t5,
        }
        rows = {name: self._rows(name, prompts[name], least) for name in on}
        windows = max((len(rows[name].texts) for name in on if name != "t5"), default=1)
        t5_rows = rows["t5"].length if "t5" in rows else least
        return EncodedPrompt(
            conditioning=self._recalled(rows, windows, t5_rows),
            tokens={
                **{name: rows[name].real if name in rows else 0 for name in ENCODERS},
                "clip_windows": windows,
                "t5_length": t5_rows,
            },
            notes=(*self._notes_on_encoders(on), *self._notes_on_words(prompts, rows, least)),
        )

    def clip_rows(self, on: Collection[str]) -> int:
        """Rows of the context that one window of the CLIPs fills: those of the shorter one, as in
        ComfyUI, where a Long-CLIP stands beside another.  None on: of those that are off."""
        for names in (on, self.sources, self.windows):
            windows = [window for name, window in self.windows.items() if name in names]
            if windows:
                return min(windows)
        return RELEASED_WINDOW

    @torch.no_grad()
    def t5_states(self, prompts: Sequence[str], length: int) -> Tensor:
        """T5's states of several prompts in one pass: [B, length, D], float32.

        prompts: without weights, each of `length` tokens with its padding.  Raises NumericalError.
        """
        network = self._network("t5")
        parameter = next(network.parameters())
        ids = [self._rows("t5", prompt, length).texts[0].ids for prompt in prompts]
        states = network(torch.tensor(ids, device=parameter.device)).float()
        return check_finite(states, TITLES["t5"], parameter.dtype)

    def _on(self, use: Collection[str]) -> list[str]:
        if isinstance(use, str) or not set(use) <= set(ENCODERS):
            raise ValueError(
                f"use={quoted(use)}: expected a tuple of some of {', '.join(ENCODERS)}"
            )
        return [name for name in ENCODERS if name in use and name in self.sources]

    def _network(self, name: str) -> Any:
        if name not in self.networks:
            self._keep(name, self.sources[name]())
        return self.networks[name]

    def _tokenizer(self, name: str) -> Tokenizer:
        tokenizer: Tokenizer | None = getattr(self.tokenizers, name)
        if tokenizer is None:
            raise CheckpointError(f"{TITLES[name]} has no tokenizer: ask find_tokenizers for it.")
        return tokenizer

    def _keep(self, name: str, network: Any) -> None:
        """Checks a network against its tokenizer and the others, then trusts it."""
        size, rows = self._tokenizer(name).size, network.config.vocab_size
        if size > rows:
            raise CheckpointError(
                f"{TITLES[name]}: the tokenizer has {size} entries, the network only {rows} rows"
                " for them: the tokenizer belongs to another model."
            )
        networks = {**self.networks, name: network}
        _check_widths(networks, self.context_dim, self.pooled_dim)
        if name != "t5":
            self.windows[name] = network.config.window
        self.networks = networks

    def _recalled(self, rows: Mapping[str, Rows], windows: int, t5_rows: int) -> Conditioning:
        """What the rows become, looked up or computed."""
        key = self._hash(rows, windows, t5_rows)
        recalled = None if self.known is None else self.known.get(key)
        if recalled is not None:
            return recalled
        states = {
            name: self._run(name, read if name == "t5" else read.with_windows(windows))
            for name, read in rows.items()
        }
        conditioning = self._assemble(states, windows * self.clip_rows(rows), t5_rows)
        if self.known is not None:
            self.known[key] = conditioning
        return conditioning

    def _hash(self, rows: Mapping[str, Rows], windows: int, t5_rows: int) -> str:
        """Of the tokens and weights of each encoder that is on, and of the encoders."""
        read = {name: [(row.ids, row.weights) for row in rows[name].texts] for name in rows}
        sizes = (self.context_dim, self.pooled_dim, self.clip_rows(rows), windows, t5_rows)
        return hashlib.sha256(json.dumps([self.identity, sizes, read]).encode()).hexdigest()

    def _rows(self, name: str, prompt: str, least: int) -> Rows:
        pieces = parse_prompt(prompt)
        check_weights(pieces)
        tokenizer = self._tokenizer(name)
        if name == "t5":
            text = t5_sequence(tokenizer, pieces, least)
            return Rows([text], empty=t5_sequence(tokenizer, [], len(text.ids)))
        texts = clip_windows(tokenizer, pieces, self.windows[name])
        return Rows(texts, empty=clip_windows(tokenizer, [], self.windows[name])[0])

    def _run(self, name: str, rows: Rows) -> States:
        network = self._network(name)
        parameter = next(network.parameters())
        weights = torch.tensor([row.weights for row in rows.texts], device=parameter.device)
        weighted = bool((weights != 1).any())
        # The empty prompt goes through in the same batch, and only when something is weighted.
        read = [*rows.texts, rows.empty] if weighted else rows.texts
        ids = torch.tensor([row.ids for row in read], device=parameter.device)
        if name == "t5":
            hidden = network(ids).float()
            pooled = hidden.new_zeros(1, 0)
        else:
            output = network(ids, self._tokenizer(name).end)
            hidden, pooled = output.hidden.float(), output.pooled[:1].float()
        if weighted:
            hidden = weigh(hidden[:-1], hidden[-1:], weights)
        for result in (hidden, pooled):
            check_finite(result, TITLES[name], parameter.dtype)
        return States(hidden.flatten(0, 1)[None], pooled)

    def _assemble(self, states: Mapping[str, States], clip_rows: int, t5_rows: int) -> Conditioning:
        """Each encoder's states written into zeros, at its place."""
        device = next((s.context.device for s in states.values()), torch.device("cpu"))
        context = torch.zeros(1, clip_rows + t5_rows, self.context_dim, device=device)
        pooled = torch.zeros(1, self.pooled_dim, device=device)
        if clip_l := states.get("clip_l"):
            context[:, :clip_rows, : clip_l.context.shape[2]] = clip_l.context[:, :clip_rows]
            pooled[:, : clip_l.pooled.shape[1]] = clip_l.pooled
        if clip_g := states.get("clip_g"):
            # CLIP-L's pooled vector is as wide as its states, so this holds without CLIP-L too.
            left = self.pooled_dim - clip_g.pooled.shape[1]
            right = left + clip_g.context.shape[2]
            context[:, :clip_rows, left:right] = clip_g.context[:, :clip_rows]
            pooled[:, left:] = clip_g.pooled
        if t5 := states.get("t5"):
            context[:, clip_rows:] = t5.context
        return Conditioning(context, pooled)

    def _notes_on_encoders(self, on: Collection[str]) -> list[str]:
        notes = [
            f"{TITLES[name]} is {'off' if name in self.sources else 'not loaded'}:"
            " zeros stand in its place."
            for name in ENCODERS
            if name not in on
        ]
        return notes if on else [*notes, "No encoder is on: this is the picture of no prompt."]

    def _notes_on_words(
        self, prompts: Mapping[str, str], rows: Mapping[str, Rows], least: int
    ) -> list[str]:
        windows = {name: self.windows[name] for name in rows if name != "t5"}
        notes = note_on_windows(windows)
        for name, read in rows.items():
            title, windows = TITLES[name], len(read.texts)
            if windows > 1:
                notes.append(
                    f"{title} read {read.real} tokens in {windows} windows of {self.windows[name]};"
                    " its pooled vector comes from the first."
                )
            if name == "t5" and read.length > least:
                notes.append(
                    f"{title} read {read.real} tokens: its part grew from {least} to"
                    f" {read.length} rows."
                )
            unknown = self._tokenizer(name).unknown
            if lost := sum(token == unknown for row in read.texts for token in row.ids):
                notes.append(f"{title} does not know {lost} of the {read.real} tokens it read.")
            if EMBEDDING_SYNTAX in prompts[name]:
                notes.append(f"{title} read `{EMBEDDING_SYNTAX}` as plain words; no file is read.")
        return notes


def weigh(hidden: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Each token moved away from (or towards) the empty prompt's token at the same place.

    hidden: [B, L, D]; empty: [1, L, D]; weights: [B, L], 1 leaves the token bit for bit.
    The rule is ComfyUI's.
    """
    weights = weights[..., None]
    return torch.where(weights == 1, hidden, (hidden - empty) * weights + empty)


def check_weights(pieces: list[Piece]) -> None:
    for piece in pieces:
        if not math.isfinite(piece.weight):
            raise ValueError(
                f"weight {piece.weight} of {quoted(piece.text)}: expected a finite number"
            )


def _check_widths(networks: Mapping[str, Any], context_dim: int, pooled_dim: int) -> None:
    """CLIP's pooled vectors fill the MMDiT's exactly, its states at most; T5's states exactly."""
    clips = [networks[name].config for name in ("clip_l", "clip_g") if name in networks]
    pooled = sum(config.pooled_dim for config in clips)
    width = sum(config.hidden_size for config in clips)
    t5 = networks["t5"].config.d_model if "t5" in networks else context_dim
    pooled_fits = pooled == pooled_dim if len(clips) == 2 else pooled <= pooled_dim
    if not (pooled_fits and width <= context_dim and t5 == context_dim):
        raise CheckpointError(
            f"{', '.join(TITLES[name] for name in networks)} do not fit the MMDiT: CLIP is {width}"
            f" wide (pooled {pooled}), T5 {t5}, but the MMDiT takes {context_dim} (pooled"
            f" {pooled_dim}): they belong to another model."
        )


def note_on_windows(windows: Mapping[str, int]) -> list[str]:
    """Of CLIPs whose windows differ, as Long-CLIP's from CLIP-G's.  windows: by encoder."""
    if len(set(windows.values())) < 2:
        return []
    told = " and ".join(f"{TITLES[name]} {window}" for name, window in windows.items())
    return [
        f"The windows of the CLIPs differ ({told} tokens): their rows lie side by side as far as "
        "the shorter ones go, as in ComfyUI."
    ]


def least_length(t5_length: int | str, window: int) -> int:
    if t5_length == "auto":
        return window
    if isinstance(t5_length, bool) or not isinstance(t5_length, int) or t5_length < 1:
        raise ValueError(f"t5_length={quoted(t5_length)}: expected 'auto' or a whole number from 1")
    return t5_length
