"""The embedded model's file, and what is said about a prompt that is too much for it."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .checker import read
from .requests import advice, parse
from .verdict import sentence

NAME = "sd3-tiny-6"  # never given to other weights
FILE = Path(__file__).with_name(f"{NAME}.safetensors")
MODEL_KEY = "sd3_workbench.model"  # in the metadata of the file


def is_embedded(metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata are those of an embedded model of any version."""
    return metadata.get(MODEL_KEY, "").startswith("sd3-tiny-")


def note(metadata: Mapping[str, str], prompt: str) -> str | None:
    """A line for a prompt with words that the embedded model was never taught; for no other one."""
    found = advice(prompt) if is_embedded(metadata) else None
    return found and f"the embedded model draws coloured shapes: {found}"


def check(picture: Tensor, prompt: str) -> str:
    """A line on what a picture [1, 3, H, W] in -1..1 shows of what was asked for.

    Raises ValueError for a prompt outside of the model's world.
    """
    if said := advice(prompt):
        raise ValueError(said)
    return sentence(read(picture)[0], parse(prompt))
