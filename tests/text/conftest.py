"""Tokenizers for this folder: tiny ones made here, and CLIP's and T5's own where ComfyUI is."""

import pytest
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.text.vocabularies import find_tokenizers
from tiny_tokenizers import write_tiny_tokenizers

ENCODERS = ("clip_l", "clip_g", "t5")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    write_tiny_tokenizers(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizers(tiny_folder):
    return find_tokenizers(ENCODERS, directory=tiny_folder)


@pytest.fixture(scope="session")
def released_tokenizers():
    """The vocabularies that SD3 was trained with, read where ComfyUI keeps them."""
    try:
        return find_tokenizers(ENCODERS)
    except CheckpointError:
        pytest.skip("NO VOCABULARIES: set COMFYUI_PATH to a ComfyUI folder to test ids exactly")
