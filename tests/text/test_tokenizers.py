"""Ids and weights against ComfyUI's, and the laws of windows and padding."""

import json
import math

import pytest
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.text.prompt import Piece, parse_prompt
from sd3_pack.sd3_core.text.tokenizers import (
    TokenizerFiles,
    clip_tokenizer,
    clip_windows,
    t5_sequence,
    t5_tokenizer,
)
from tiny_tokenizers import clip_vocabulary, t5_vocabulary, write_tiny_spiece

CAT = [Piece("a photo of a cat")]


def files(folder, *names: str) -> TokenizerFiles:
    return TokenizerFiles(str(folder), {name: (folder / name).read_bytes for name in names})


def recorded(rows, pad: int):
    """(ids, weights) of each row, padding put back."""
    return [
        (
            row["ids"] + [pad] * (row["length"] - len(row["ids"])),
            row.get("weights", [1.0] * len(row["ids"])) + [1.0] * (row["length"] - len(row["ids"])),
        )
        for row in rows
    ]


def as_recorded(rows):
    return [(row.ids, row.weights) for row in rows]


@pytest.mark.parametrize("encoder", ["l", "g"])
def test_clip_windows_equal_comfyui_for_every_prompt(golden, released_tokenizers, encoder):
    _, tokens = golden("tokens")
    tokenizer = getattr(released_tokenizers, f"clip_{encoder}")
    assert len(tokens["prompts"]) == 91
    for case in tokens["prompts"]:
        windows = clip_windows(tokenizer, parse_prompt(case["prompt"]), 77)
        expected = recorded(case[encoder], tokens["pads"][encoder])
        assert as_recorded(windows) == expected, case["prompt"]


def test_t5_sequences_equal_comfyui_for_every_prompt(golden, released_tokenizers):
    _, tokens = golden("tokens")
    for case in tokens["prompts"]:
        sequence = t5_sequence(released_tokenizers.t5, parse_prompt(case["prompt"]), 77)
        assert as_recorded([sequence]) == recorded(case["t5"], 0), case["prompt"]


def test_special_ids_come_from_the_vocabulary(tiny_tokenizers):
    vocabulary = clip_vocabulary()
    clip_l, clip_g, t5 = tiny_tokenizers.clip_l, tiny_tokenizers.clip_g, tiny_tokenizers.t5
    assert (clip_l.start, clip_l.end) == (
        vocabulary["<|startoftext|>"],
        vocabulary["<|endoftext|>"],
    )
    assert (clip_l.pad, clip_g.pad) == (clip_l.end, 0)
    assert (t5.start, t5.end, t5.pad, t5.unknown) == (None, 1, 0, 2)
    assert (clip_l.size, t5.size) == (len(vocabulary), len(t5_vocabulary()))


def test_empty_prompt_is_start_end_and_padding(tiny_tokenizers):
    clip, t5 = tiny_tokenizers.clip_g, tiny_tokenizers.t5
    (window,) = clip_windows(clip, [], 6)
    assert window.ids == [clip.start, clip.end, 0, 0, 0, 0]
    assert t5_sequence(t5, [], 4).ids == [1, 0, 0, 0]
    assert window.real == t5_sequence(t5, [], 4).real == 0


def test_blanks_are_the_empty_prompt(tiny_tokenizers):
    blanks = parse_prompt(" \n ")
    assert clip_windows(tiny_tokenizers.clip_l, blanks, 8) == clip_windows(
        tiny_tokenizers.clip_l, [], 8
    )
    assert t5_sequence(tiny_tokenizers.t5, blanks, 8) == t5_sequence(tiny_tokenizers.t5, [], 8)


@pytest.mark.parametrize("window", [3, 4, 9, 10, 11, 77])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 40])
def test_windows_hold_every_token_once_and_in_order(tiny_tokenizers, window, count):
    clip = tiny_tokenizers.clip_l
    pieces = [Piece("cat " * count, 1.2), Piece("dog " * 3), Piece("x " * count, 0.5)]
    text = [token for piece in pieces for token in clip.ids(piece.text)]
    windows = clip_windows(clip, pieces, window)
    inside = [row.ids[1 : row.real + 1] for row in windows]
    assert [token for part in inside for token in part] == text
    assert all(row.ids[row.real + 1] == clip.end for row in windows)
    assert all(len(row.ids) == len(row.weights) == window for row in windows)


def test_a_short_piece_moves_to_the_next_window_and_a_long_one_is_cut(tiny_tokenizers):
    clip = tiny_tokenizers.clip_l
    filling = Piece("cat " * 10)
    moved = clip_windows(clip, [filling, Piece("dog " * 7)], 16)
    cut = clip_windows(clip, [filling, Piece("dog " * 8)], 16)
    assert [row.real for row in moved] == [10, 7]
    assert [row.real for row in cut] == [14, 4]


def test_a_piece_longer_than_a_small_window_is_cut(tiny_tokenizers):
    assert [row.real for row in clip_windows(tiny_tokenizers.clip_l, CAT, 5)] == [3, 2]


def test_weights_stay_with_their_tokens(tiny_tokenizers):
    pieces = parse_prompt("a (cat:1.5) dog")
    (window,) = clip_windows(tiny_tokenizers.clip_l, pieces, 7)
    assert window.weights == [1.0, 1.0, 1.5, 1.0, 1.0, 1.0, 1.0]
    assert t5_sequence(tiny_tokenizers.t5, pieces, 6).weights == [1.0, 1.5, 1.0, 1.0, 1.0, 1.0]


def test_an_infinite_weight_is_kept_as_comfyui_keeps_it(tiny_tokenizers):
    (window,) = clip_windows(tiny_tokenizers.clip_l, parse_prompt("(cat:inf)"), 5)
    assert math.isinf(window.weights[1])


@pytest.mark.parametrize("minimum", [1, 6, 77, 256])
def test_t5_is_padded_to_the_minimum_and_never_cut(tiny_tokenizers, minimum):
    t5 = tiny_tokenizers.t5
    sequence = t5_sequence(t5, CAT, minimum)
    assert sequence.real == 5
    assert len(sequence.ids) == max(6, minimum)
    assert sequence.ids[:6] == [*t5.ids(CAT[0].text), t5.end]
    assert set(sequence.ids[6:]) <= {t5.pad}


def test_truncation_saved_in_a_file_does_not_cut(tiny_folder, tmp_path):
    from tokenizers import Tokenizer

    saved = Tokenizer.from_file(str(tiny_folder / "t5" / "tokenizer.json"))
    saved.enable_truncation(3)
    saved.enable_padding(length=9)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert t5_tokenizer(files(tmp_path, "tokenizer.json")).ids("a cat a cat a cat") == [3, 4] * 3


def test_clip_reads_a_tokenizer_json_too(tiny_folder, tiny_tokenizers, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(str(tiny_folder / "clip_l"))
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = clip_tokenizer(files(tmp_path, "tokenizer.json"), "clip_g")
    for text in ("A photo of\na cat's 猫 🐱", "", "it's 1,234 cats"):
        assert ours.ids(text) == tiny_tokenizers.clip_g.ids(text)
    assert (ours.end, ours.pad) == (tiny_tokenizers.clip_g.end, 0)


@pytest.mark.parametrize(
    "text",
    [
        "A photo of\ta CAT's  tail",
        "猫🐱 <|startoftext|>x <|endoftext|> <|ENDOFTEXT|>/",
        "I'LL  e\u0301 \u00bd \u200d 3.14",
    ],
)
def test_clip_ids_equal_transformers(tiny_folder, tiny_tokenizers, text):
    transformers = pytest.importorskip("transformers", minversion="5")
    oracle = transformers.CLIPTokenizer.from_pretrained(str(tiny_folder / "clip_l"))
    assert tiny_tokenizers.clip_l.ids(text) == oracle(text)["input_ids"][1:-1]


@pytest.mark.parametrize("text", ["a cat", "cat</s>dog <pad> <unk>x", " a  photo\nof 猫"])
def test_t5_ids_equal_transformers(tiny_folder, tiny_tokenizers, text):
    transformers = pytest.importorskip("transformers", minversion="5")
    oracle = transformers.T5TokenizerFast.from_pretrained(str(tiny_folder / "t5"))
    assert tiny_tokenizers.t5.ids(text) == oracle(text)["input_ids"][:-1]


def test_t5_reads_a_sentencepiece_model(tmp_path):
    from sentencepiece import SentencePieceProcessor

    write_tiny_spiece(tmp_path)
    t5 = t5_tokenizer(files(tmp_path, "spiece.model"))
    processor = SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert (t5.end, t5.pad, t5.unknown, t5.start) == (1, 0, 2, None)
    assert t5.ids("a red cat 猫") == processor.encode("a red cat 猫")
    assert t5.ids("a</s> cat<pad>") == [*processor.encode("a"), 1, *processor.encode("cat"), 0]
    assert t5.size == processor.get_piece_size()


@pytest.mark.parametrize("load", [lambda f: clip_tokenizer(f, "clip_l"), t5_tokenizer])
def test_broken_file_is_named_in_the_error(load):
    broken = TokenizerFiles("folder/of/tokenizer", {"tokenizer.json": lambda: b"{no json"})
    with pytest.raises(CheckpointError, match=r"folder/of/tokenizer: tokenizer.json cannot be rea"):
        load(broken)


def described(tiny_folder, which: str, **changes) -> TokenizerFiles:
    """The tiny T5's tokenizer.json, or a CLIP one of the same words, with entries changed."""
    content = json.loads((tiny_folder / "t5" / "tokenizer.json").read_bytes())
    if which == "clip":
        content |= {
            "model": {"type": "BPE", "vocab": clip_vocabulary(), "merges": []},
            "added_tokens": [],
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None,
            "normalizer": None,
        }
    model = content["model"] | changes.pop("model", {})
    data = json.dumps(content | {"model": model} | changes).encode()
    return TokenizerFiles("inside the checkpoint", {"tokenizer.json": lambda: data})


LOAD = {"clip": lambda files: clip_tokenizer(files, "clip_l"), "t5": t5_tokenizer}
DOUBLED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize("which", LOAD)
@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},  # the library panics
        {"type": "Sequence", "normalizers": [DOUBLED] * 40},  # 2**40 characters
        {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 9},
        {"type": "Nothing"},
        7,
    ],
)
def test_a_normalizer_that_cannot_be_is_one_error(tiny_folder, which, normalizer):
    with pytest.raises(CheckpointError, match=r"checkpoint: tokenizer.json cannot be read: "):
        LOAD[which](described(tiny_folder, which, normalizer=normalizer))


def test_a_text_that_the_file_cannot_encode_is_one_error(tiny_folder):
    vocab = clip_vocabulary()
    del vocab["q</w>"], vocab["q"]
    clip = LOAD["clip"](
        described(tiny_folder, "clip", model={"vocab": vocab, "unk_token": "no such token"})
    )
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot encode a text: .*no such to"):
        clip.ids("q")
    endless = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}
    clip = LOAD["clip"](described(tiny_folder, "clip", normalizer=endless))
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot encode a text: "):
        clip.ids("a" * 40 + "b")


def test_an_interrupt_passes_a_tokenizer_unchanged():
    def stop() -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        t5_tokenizer(TokenizerFiles("here", {"tokenizer.json": stop}))


def test_the_wrong_tokenizer_is_refused(tiny_folder, tmp_path):
    with pytest.raises(CheckpointError, match="startoftext.*not CLIP's"):
        clip_tokenizer(files(tiny_folder / "t5", "tokenizer.json"), "clip_l")
    for name, text in {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\n"}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match="startoftext|endoftext"):
        clip_tokenizer(files(tmp_path, "vocab.json", "merges.txt"), "clip_l")


def test_a_window_without_room_for_text_is_refused(tiny_tokenizers):
    with pytest.raises(ValueError, match="window of 2 tokens"):
        clip_windows(tiny_tokenizers.clip_l, CAT, 2)


@pytest.mark.parametrize("which", ["clip_l", "t5"])
def test_half_a_character_is_refused_with_a_sentence(tiny_tokenizers, which):
    with pytest.raises(ValueError, match=r"half a character \(U\+D83D\)"):
        getattr(tiny_tokenizers, which).ids("a red circle \ud83d")
