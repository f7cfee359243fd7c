"""Text as editors write it, and names and words that are no text."""

import json
import os

import pytest
from sd3_pack.sd3_core.plain_text import as_json, check_whole, decode_text, printable

WORDS = "ein Vögelchen, a cat — naïve"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_what_says_its_encoding_is_read_without_a_word(encoding):
    assert decode_text(WORDS.encode(encoding)) == decode_text(WORDS.encode())
    assert decode_text(WORDS.encode(encoding)).text == WORDS
    assert decode_text(WORDS.encode(encoding)).note == ""


def test_big_endian_marks_are_read_too():
    assert decode_text(b"\xfe\xff" + WORDS.encode("utf-16-be")).text == WORDS
    assert decode_text(b"\0\0\xfe\xff" + WORDS.encode("utf-32-be")).text == WORDS


@pytest.mark.parametrize(
    ("encoding", "told"),
    [("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"), ("cp1252", "Windows-1252")],
)
def test_a_guess_is_told(encoding, told):
    read = decode_text(WORDS.encode(encoding))
    assert read.text == WORDS
    assert told in read.note


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"a cat\0", "NUL"),
        (b"a\0\0\0c", "NUL"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "NUL"),
        ("a\0cat".encode("utf-16"), "NUL"),
        (b"\xff\xfea", "not UTF-8"),  # half a letter of UTF-16
        ("ein Vögelchen".encode() + b"\xc3", "not UTF-8"),  # torn, not western
        ("猫が寝ている".encode("cp932"), "not UTF-8"),
        ("一只猫在睡觉".encode("gbk"), "not UTF-8"),
        (b"a cat\x81", "not UTF-8"),  # no letter there
    ],
)
def test_what_is_no_text_is_refused(data, why):
    with pytest.raises(ValueError, match=why):
        decode_text(data)


@pytest.mark.parametrize("text", [os.fsdecode(b"caf\xe9"), "half \ud83d", "whole 😀 Ä"])
def test_json_of_any_name_is_utf8_and_reads_back_the_same(text):
    written = as_json({"name": text}).encode()
    assert json.loads(written) == {"name": text}


def test_names_for_people_show_the_bytes_that_are_no_text():
    assert printable("café-😀") == "café-😀"
    assert printable(os.fsdecode(b"caf\xe9.png")) == "caf\\xe9.png"
    assert printable("half \ud83d") == "half \\ud83d"
    printable("\udc05 \udcff \udfff").encode()  # whatever it is, it can be written


def test_half_a_character_is_named():
    assert check_whole("whole 😀", "the prompt") == "whole 😀"
    with pytest.raises(ValueError, match=r"the prompt holds half a character \(U\+D83D\)"):
        check_whole("half \ud83d", "the prompt")
