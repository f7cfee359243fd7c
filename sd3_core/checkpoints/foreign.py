"""Files that are something else: told from their first bytes, or from the names in them."""

_PICKLE = (
    "it is a PyTorch pickle (.ckpt, .pt, .pth, .bin), whatever its name says. A pickle can run "
    "code when it is opened, so none is read here. Get the .safetensors version of the model."
)

# First bytes -> what the file is and what to do.
_MAGIC: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), _PICKLE),
    (
        (b"GGUF",),
        "it is a GGUF file. Get the .safetensors version of the model, or use a GGUF loader.",
    ),
    (
        (b"version https://git-lfs", b"version https://hawser"),
        "it is a Git LFS pointer, a note about the model instead of the model. Run `git lfs pull` "
        "in its repository, or download the file itself.",
    ),
    (
        (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"<"),
        "it is a web page saved under the model's name. Download the file itself (the model may "
        "ask you to log in and accept its licence first).",
    ),
    (
        (b"access to model", b"entry not found", b"invalid username", b"repository not found"),
        "it is a website's refusal saved under the model's name. Log in, accept the model's "
        "licence, and download it again.",
    ),
    ((b"{", b"["), "it is JSON text. Name the .safetensors file itself."),
    ((b"\x89png", b"\xff\xd8\xff", b"riff", b"gif8"), "it is a picture or sound file."),
    ((b"\x89hdf",), "it is an HDF5 file. Get the .safetensors version of the model."),
    ((b"\x1f\x8b", b"7z\xbc\xaf", b"rar!"), "it is a packed archive. Unpack it first."),
    (
        (b"\0" * 16,),
        "it begins with zeros, like a download that was never finished. Download it again.",
    ),
)


def describe_bytes(beginning: bytes) -> str:
    """What a file that is no safetensors file seems to be, and what to do, as half a sentence."""
    text = beginning.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for starts, meaning in _MAGIC:
        if beginning.startswith(starts) or text.startswith(tuple(s.lower() for s in starts)):
            return meaning
    return "its first bytes are none that such a file begins with. Download it again."
