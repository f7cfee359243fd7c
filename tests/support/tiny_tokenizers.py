"""Tokenizer files made from nothing, small enough for a test model and the same on every machine.

They read any text: CLIP falls back to single bytes, T5 to single ASCII characters and `<unk>`.
"""

import json
import string
from pathlib import Path

WORDS = ("a", "cat", "car", "dog", "photo", "of", "the", "red", "blue", "green", "circle", "square")

CLIP_START = "<|startoftext|>"
CLIP_END = "<|endoftext|>"


def clip_merges(words: tuple[str, ...] = WORDS) -> list[tuple[str, str]]:
    """Byte-pair merges that spell each word from the left, first seen first."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        left = symbols[0]
        for right in symbols[1:]:
            merges[left, right] = None
            left += right
    return list(merges)


def clip_vocabulary(words: tuple[str, ...] = WORDS) -> dict[str, int]:
    """256 bytes, the same 256 at a word's end, the merged pieces, start and end."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    pieces += [left + right for left, right in clip_merges(words)]
    return {piece: index for index, piece in enumerate([*pieces, CLIP_START, CLIP_END])}


def t5_vocabulary(words: tuple[str, ...] = WORDS) -> list[tuple[str, float]]:
    """Unigram pieces with log probabilities: pad 0, end 1, unknown 2, words, then characters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    whole = [("▁" + word, -3.0 - 0.01 * index) for index, word in enumerate(words)]
    letters = string.ascii_letters + string.digits + string.punctuation
    characters = [(letter, -8.0 - 0.01 * index) for index, letter in enumerate("▁" + letters)]
    return [*special, *whole, *characters]


def write_tiny_clip(folder: Path, words: tuple[str, ...] = WORDS) -> None:
    """vocab.json and merges.txt in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.dumps(clip_vocabulary(words), ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in clip_merges(words)), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8", newline="\n")


def write_tiny_t5(folder: Path, words: tuple[str, ...] = WORDS) -> None:
    """tokenizer.json in `folder`."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.Unigram(t5_vocabulary(words), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = ("<pad>", "</s>", "<unk>")
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_tiny_spiece(folder: Path) -> None:
    """spiece.model in `folder`, trained by sentencepiece on sentences of the tiny words."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentences = [f"{one} {two} {three}" for one in WORDS for two in WORDS for three in WORDS]
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            vocab_size=64,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )


def write_tiny_tokenizers(folder: Path) -> None:
    """clip_l/vocab.json, clip_l/merges.txt and t5/tokenizer.json; CLIP-G shares CLIP-L's."""
    write_tiny_clip(folder / "clip_l")
    write_tiny_t5(folder / "t5")
