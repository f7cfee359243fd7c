"""Pieces of a prompt -> token ids and weights, in CLIP's windows and as T5's one sequence.

The ids are those of transformers 5 and hence of ComfyUI.  They are made with the `tokenizers`
library that transformers itself stands on: its own tokenizer classes changed between versions 4
and 5, and with them the ids of some prompts.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, cut
from ..plain_text import check_whole
from .prompt import Piece

CLIP_START = "<|startoftext|>"
CLIP_END = "<|endoftext|>"
T5_PAD = "<pad>"
T5_END = "</s>"
T5_UNKNOWN = "<unk>"

# ComfyUI's rule: a piece of fewer tokens moves to the next window rather than being cut.
CUT_FROM = 8

# Steps of a tokenizer.json before a text is cut into tokens; T5's has 3.  Many that each make the
# text longer would fill the memory.
MOST_STEPS = 8

# What CLIP takes for a word; its special tokens count as words wherever they are typed.
CLIP_WORD = (
    r"<\|startoftext\|>|<\|endoftext\|>"
    r"|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of one tokenizer, read when asked for; `place` says where, for messages."""

    place: str
    read: Mapping[str, Callable[[], bytes]]


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary, and the ids that SD3 puts around a text."""

    ids: Callable[[str], list[int]]  # of the text alone
    start: int | None  # T5 has none
    end: int
    pad: int
    unknown: int | None  # what the vocabulary cannot spell; CLIP spells every byte
    size: int  # rows that the network's embedding must have at least


@dataclass(frozen=True)
class Tokens:
    """One row for an encoder."""

    ids: list[int]
    weights: list[float]  # 1.0 at start, end and padding
    real: int  # how many are of the text, not start, end or padding


def clip_tokenizer(files: TokenizerFiles, which: str) -> Tokenizer:
    """CLIP's tokenizer from vocab.json and merges.txt, or from tokenizer.json.

    which: "clip_l" pads with the end token, "clip_g" with id 0: so SD3 was trained.
    Raises CheckpointError when the files cannot be read or are of another tokenizer.
    """
    from_pairs = {"vocab.json", "merges.txt"} <= set(files.read)
    with _guarded(files):
        backend = (_clip_from_pairs if from_pairs else _from_json)(files)
        start, end = (_special(backend, name, files) for name in (CLIP_START, CLIP_END))
        pad = end if which == "clip_l" else 0
        return Tokenizer(_encode(backend, files), start, end, pad, None, _size(backend))


def t5_tokenizer(files: TokenizerFiles) -> Tokenizer:
    """T5's tokenizer from tokenizer.json, or from spiece.model.

    Raises CheckpointError when the files cannot be read or are of another tokenizer.
    """
    with _guarded(files):
        if "tokenizer.json" not in files.read:
            return _t5_from_spiece(files)
        backend = _t5_from_json(files)
        special = (T5_END, T5_PAD, T5_UNKNOWN)
        end, pad, unknown = (_special(backend, name, files) for name in special)
        return Tokenizer(_encode(backend, files), None, end, pad, unknown, _size(backend))


def clip_windows(tokenizer: Tokenizer, pieces: Sequence[Piece], window: int) -> list[Tokens]:
    """As many full windows as the pieces need: start, up to window - 2 tokens, end, padding.

    Cut as ComfyUI cuts: a piece that does not fit into the rest of a window moves to the next one;
    from 8 tokens on (or when no window could hold it) it is cut at the border instead.
    """
    room = window - 2
    if room < 1:
        raise ValueError(f"CLIP window of {window} tokens: needs start, end and room for text (3)")
    filled: list[list[tuple[int, float]]] = [[]]
    for piece in pieces:
        rest = [(token, piece.weight) for token in tokenizer.ids(piece.text)]
        may_be_cut = len(rest) >= min(CUT_FROM, room + 1)
        while len(filled[-1]) + len(rest) > room:
            if may_be_cut:
                free = room - len(filled[-1])
                filled[-1] += rest[:free]
                rest = rest[free:]
            filled.append([])
        filled[-1] += rest
    return [_framed(tokenizer, text, window) for text in filled]


def t5_sequence(tokenizer: Tokenizer, pieces: Sequence[Piece], minimum: int) -> Tokens:
    """All tokens and the end token, padded to `minimum` tokens; longer texts are never cut."""
    text = [(token, piece.weight) for piece in pieces for token in tokenizer.ids(piece.text)]
    return _framed(tokenizer, text, minimum)


def _framed(tokenizer: Tokenizer, text: list[tuple[int, float]], length: int) -> Tokens:
    start = [] if tokenizer.start is None else [tokenizer.start]
    ids = [*start, *(token for token, _ in text), tokenizer.end]
    weights = [*(1.0 for _ in start), *(weight for _, weight in text), 1.0]
    padding = max(length - len(ids), 0)
    return Tokens(ids + [tokenizer.pad] * padding, weights + [1.0] * padding, real=len(text))


@contextmanager
def _guarded(files: TokenizerFiles, what: str = "be read") -> Iterator[None]:
    """Whatever the libraries raise becomes a CheckpointError.

    Both raise bare Exceptions of many kinds.  Where `tokenizers` panics, its binding raises a
    BaseException, which would pass every `except Exception` above and end the program.
    """
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        panicked = type(error).__name__ == "PanicException"  # of no module that can be imported
        if not (panicked or isinstance(error, Exception)):
            raise
        names, reason = ", ".join(sorted(files.read)), cut(str(error) or type(error).__name__)
        raise CheckpointError(f"{files.place}: {names} cannot {what}: {reason}") from error


def _clip_from_pairs(files: TokenizerFiles) -> Any:
    import tokenizers
    from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

    lines = files.read["merges.txt"]().decode("utf-8").replace("\r\n", "\n").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=json.loads(files.read["vocab.json"]()),
            merges=[(left, right) for left, right in merges],
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
            unk_token=CLIP_END,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for name in (CLIP_START, CLIP_END):  # else the library would add them at new ids
        _special(backend, name, files)
    backend.add_special_tokens(
        [AddedToken(CLIP_START, normalized=True), AddedToken(CLIP_END, normalized=False)]
    )
    return backend


def _from_json(files: TokenizerFiles) -> Any:
    import tokenizers

    text = files.read["tokenizer.json"]().decode("utf-8")
    _check_steps(json.loads(text))
    backend = tokenizers.Tokenizer.from_str(text)
    # A file may carry both from its last use; nothing is cut or padded but by us.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _check_steps(described: Any) -> None:
    """Raises ValueError for steps that could make a text longer again and again."""
    steps = [*_steps(described.get("normalizer")), *_steps(described.get("pre_tokenizer"))]
    if len(steps) > MOST_STEPS:
        raise ValueError(f"it changes a text in {len(steps)} steps; expected up to {MOST_STEPS}")
    if any(len(step.get("content", "")) > 1 for step in steps if step.get("type") == "Replace"):
        raise ValueError("it replaces a part of a text by more than one character")
    if [step.get("type") for step in steps].count("Precompiled") > 1:
        raise ValueError("it has more than one Precompiled normalizer")


def _steps(described: Any) -> list[dict[str, Any]]:
    """The single steps of a normalizer or pre-tokenizer."""
    if described is None:
        return []
    inner = described.get("normalizers", described.get("pretokenizers"))
    if described.get("type") != "Sequence" or inner is None:
        return [described]
    return [step for one in inner for step in _steps(one)]


def _t5_from_json(files: TokenizerFiles) -> Any:
    from tokenizers import pre_tokenizers

    backend = _from_json(files)
    # The files mark a word's start once per text, transformers 5 also after a typed `</s>`.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    return backend


def _t5_from_spiece(files: TokenizerFiles) -> Tokenizer:
    """Typed special tokens count, as with tokenizer.json; `<extra_id_0>` and so on are text here,
    because a spiece.model does not tell whether the network has rows for them."""
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor()
    processor.LoadFromSerializedProto(files.read["spiece.model"]())
    special = {name: processor.piece_to_id(name) for name in (T5_PAD, T5_END, T5_UNKNOWN)}
    between = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    def ids(text: str) -> list[int]:
        found: list[int] = []
        parts = between.split(check_whole(text, "the prompt"))
        with _guarded(files, "encode a text"):
            for part in parts:
                found += [special[part]] if part in special else processor.encode(part)
        return found

    if processor.pad_id() < 0 or processor.eos_id() < 0:
        raise CheckpointError(f"{files.place}: spiece.model has no {T5_PAD} or {T5_END}: not T5's")
    return Tokenizer(
        ids,
        start=None,
        end=processor.eos_id(),
        pad=processor.pad_id(),
        unknown=processor.unk_id(),
        size=processor.get_piece_size(),
    )


def _encode(backend: Any, files: TokenizerFiles) -> Callable[[str], list[int]]:
    def ids(text: str) -> list[int]:
        whole = check_whole(text, "the prompt")
        with _guarded(files, "encode a text"):
            return backend.encode(whole, add_special_tokens=False).ids

    return ids


def _size(backend: Any) -> int:
    return max(backend.get_vocab().values()) + 1


def _special(backend: Any, name: str, files: TokenizerFiles) -> int:
    index = backend.token_to_id(name)
    if index is None:
        family = "CLIP" if name in (CLIP_START, CLIP_END) else "T5"
        raise CheckpointError(f"{files.place}: no {name} in the vocabulary: not {family}'s")
    return index
