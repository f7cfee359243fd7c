"""The tokenizers of the embedded model: files in CLIP's and T5's own formats, of the world's words.

Both libraries learn from the same frozen corpus: what captions say, and every word that `requests`
understands.  The files they give are stored in the model, so another version of a library changes
nothing that is shipped.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

from ...checkpoints.save import save_bytes
from ...text.tokenizers import CLIP_END, CLIP_START
from ..captions import full_caption, short_caption
from ..requests import known_words
from ..scenes import scene
from .samples import TRAINING

CAPTIONS = 4000  # scenes whose captions are read
PIECES = 400  # of T5's vocabulary


def write_tokenizers(folder: Path) -> Path:
    """clip_l/vocab.json, clip_l/merges.txt and t5/spiece.model; CLIP-G shares CLIP-L's."""
    merges = clip_merges()
    vocabulary = {piece: index for index, piece in enumerate(clip_pieces(merges))}
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
    text = json.dumps(vocabulary, ensure_ascii=False)
    save_bytes(folder / "clip_l" / "vocab.json", text.encode())
    save_bytes(folder / "clip_l" / "merges.txt", "\n".join(lines).encode())
    save_bytes(folder / "t5" / "spiece.model", spiece_model())
    return folder


def corpus() -> Iterator[str]:
    """Captions of both kinds, and each word that a prompt may use."""
    for number in range(CAPTIONS):
        one = scene(TRAINING, number)
        yield short_caption(one, number)
        yield full_caption(one, number)
    for _ in range(8):
        yield from known_words()


def clip_merges() -> list[tuple[str, str]]:
    """Byte pairs in the order they are merged, until every word of the corpus is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    # A word drawn as a picture ("the word ABC") is any letters: those stay single.
    words = {word for text in corpus() for word in re.findall(r"\b[a-z]+\b", text.lower())}
    words &= {part for word in known_words() for part in word.split()}
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(sorted(words), trainer)
    return [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]


def clip_pieces(merges: list[tuple[str, str]]) -> list[str]:
    """CLIP's order: 256 bytes, the same at a word's end, what is merged, start and end."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    ends = [byte + "</w>" for byte in alphabet]
    return [*alphabet, *ends, *(left + right for left, right in merges), CLIP_START, CLIP_END]


def spiece_model() -> bytes:
    """A unigram model (Kudo 2018, arXiv:1804.10959) with T5's special tokens at T5's places."""
    import sentencepiece

    file = io.BytesIO()
    letters = "abcdefghijklmnopqrstuvwxyz"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(),
        model_writer=file,
        vocab_size=PIECES,
        hard_vocab_limit=False,
        required_chars=letters + letters.upper() + "0123456789.,!?'\"-:;()",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return file.getvalue()
