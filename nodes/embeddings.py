"""`embedding:name` in a prompt: which encoders read it, and which leave it out.

ComfyUI's tokenizer looks the file up once for each encoder.  One that is missing, or whose vectors
are of another width, is left out there with a line in the log alone; here the user is told.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.sd1_clip
import torch

from ..sd3_core.text.encoders import EMBEDDING_SYNTAX, TITLES
from ..sd3_core.text.prompt import parse_prompt

# Where ComfyUI looks for one: at the start of a weighted part or after a blank; a bracket ends it.
NAMED = re.compile(rf"(?:^|(?<=\s)){EMBEDDING_SYNTAX}\s*([^\s<\[]+)")


@dataclass(frozen=True)
class Reader:
    """One encoder's tokenizer, which looks for files."""

    kind: str
    tokenizer: Any  # ComfyUI's SDTokenizer

    def fits(self, token: Any) -> bool:
        """Whether the encoder reads this token: one of its own, or a vector as wide as it is."""
        return not torch.is_tensor(token) or token.shape[-1] == self.tokenizer.embedding_size

    def width(self, name: str) -> int | None:
        """Of the vectors that an embedding has for this encoder; None where there are none."""
        for asked in dict.fromkeys((name, name.strip(","))):
            vectors = comfy.sd1_clip.load_embed(
                asked,
                self.tokenizer.embedding_directory,
                self.tokenizer.embedding_size,
                self.tokenizer.embedding_key,
            )
            if vectors is not None:
                return vectors.shape[-1]
        return None


def names_in(text: str) -> list[str]:
    """The embeddings that a prompt names, each once."""
    found = (name for piece in parse_prompt(text) for name in NAMED.findall(piece.text))
    return list(dict.fromkeys(found))


def notes_on_embeddings(readers: Iterable[Reader], texts: Mapping[str, str]) -> list[str]:
    """A sentence for each embedding that not every encoder reads.  texts: by encoder."""
    asked: dict[str, list[Reader]] = {}
    for reader in readers:
        if reader.tokenizer.embedding_directory is not None:
            for name in names_in(texts[reader.kind]):
                asked.setdefault(name, []).append(reader)
    notes = []
    for name, every in asked.items():
        widths = {reader.kind: reader.width(name) for reader in every}
        left = [
            reader.kind
            for reader in every
            if widths[reader.kind] != reader.tokenizer.embedding_size
        ]
        shown = f"{EMBEDDING_SYNTAX}{name.strip(',')}"
        titles = " and ".join(TITLES[kind] for kind in left)
        if all(width is None for width in widths.values()):
            notes.append(
                f"{shown} is not in models/embeddings, or cannot be read: it is left out of the "
                "prompt. Check the name, or put the file there."
            )
        elif len(left) == len(every):
            wide = ", ".join(sorted({str(width) for width in widths.values() if width}))
            notes.append(
                f"{shown} has vectors {wide} wide, which no encoder here takes: it is left out of "
                "the prompt. It was made for another model."
            )
        elif left:
            notes.append(f"{shown} has no vectors for {titles}, which read the prompt without it.")
    return notes
