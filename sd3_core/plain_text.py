"""Text in files: read as editors write it, written whatever names and words it holds."""

import codecs
import json
import re
from dataclasses import dataclass
from typing import Any

_MARKS = (  # UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HALF = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")  # all but white space
# Of UTF-8 more than one byte: where some of it is sound, the rest is damaged, not another encoding.
_MANY_BYTES = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
)
_MOSTLY_ASCII = 0.25  # of a western text, at most this part is not


@dataclass(frozen=True)
class Decoded:
    """A file's text.  note: how it was read, where that was a guess; follows on the file's name."""

    text: str
    note: str = ""


def decode_text(data: bytes) -> Decoded:
    """UTF-8, or what a byte order mark says; without either UTF-16 and Windows-1252, as a guess.

    Raises ValueError, with a reason that follows on the file's name, for everything else.
    """
    try:
        for mark, encoding in _MARKS:
            if data.startswith(mark):
                return Decoded(_of_letters(data.decode(encoding)))
        if b"\0" in data:
            return _unmarked_utf16(data)
        return Decoded(data.decode())
    except UnicodeDecodeError:
        return _windows_text(data)


def _of_letters(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds NUL bytes, which no text does: save it anew as UTF-8")
    return text


def _unmarked_utf16(data: bytes) -> Decoded:
    """Of each ASCII letter in UTF-16 one byte is NUL, always the first or always the second."""
    order, high, low = "le", data[1::2], data[::2]
    if 0 in low:
        order, high, low = "be", low, high
    try:
        text = data.decode(f"utf-16-{order}")
    except UnicodeDecodeError:
        text = ""
    if 0 in low or 2 * high.count(0) < len(high) or not text or _CONTROL.search(text):
        raise ValueError("holds NUL bytes, which no text does: save it anew as UTF-8")
    return Decoded(text, "is read as UTF-16, which it does not say; better save it as UTF-8")


def _windows_text(data: bytes) -> Decoded:
    wrong = "is not UTF-8 text: save it as such"
    if data.startswith(tuple(mark for mark, _ in _MARKS)) or _MANY_BYTES.search(data):
        raise ValueError(wrong)
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError as error:
        raise ValueError(wrong) from error
    if sum(letter > "\x7f" for letter in text) > _MOSTLY_ASCII * len(text) or _CONTROL.search(text):
        raise ValueError(wrong)
    return Decoded(text, "is not UTF-8, and read as Windows-1252; better save it as UTF-8")


def as_json(value: Any, indent: int | None = None, separators: Any = None) -> str:
    """Readable JSON that UTF-8 can always hold: half a character is escaped, as JSON may.

    Names of files hold such halves where their bytes are not UTF-8; read back they are the same.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators)
    return text.encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    r"""For people, and for programs that take whole characters only: caf\xe9.png."""
    return _HALF.sub(lambda half: _escaped(ord(half[0])), text)


def _escaped(half: int) -> str:
    byte = half - 0xDC00  # what Python makes of a name's byte that is not UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else f"\\u{half:04x}"


def check_whole(text: str, what: str) -> str:
    """The text itself.  Raises ValueError for half a character, which JSON and shells let pass.

    what: begins the sentence, such as "the prompt".
    """
    half = _HALF.search(text)
    if half is None:
        return text
    raise ValueError(
        f"{what} holds half a character (U+{ord(half[0]):04X}), as a badly copied emoji leaves "
        "behind: delete it or type it anew."
    )
