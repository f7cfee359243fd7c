"""The embedded model's file, and what is said about a prompt that is too much for it."""

from collections.abc import Mapping
from pathlib import Path

from .requests import advice

NAME = "sd3-tiny-1"  # never given to other weights
FILE = Path(__file__).with_name(f"{NAME}.safetensors")
MODEL_KEY = "sd3_workbench.model"  # in the metadata of the file


def is_embedded(metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata are those of an embedded model of any version."""
    return metadata.get(MODEL_KEY, "").startswith("sd3-tiny-")


def note(metadata: Mapping[str, str], prompt: str) -> str | None:
    """A line for a prompt with words that the embedded model was never taught; for no other one."""
    found = advice(prompt) if is_embedded(metadata) else None
    return found and f"the embedded model draws coloured shapes: {found}"
