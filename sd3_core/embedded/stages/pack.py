"""The stages' networks and the tokenizers as one file: the released models' layout, fp16."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ...checkpoints.load import load_clip, load_mmdit, load_t5, load_vae
from ...checkpoints.save import export_checkpoint
from ...text.vocabularies import pack_tokenizers
from ..model import MODEL_KEY, NAME

LARGEST = 15_000_000  # bytes


def pack(
    path: Path,
    *,
    mmdit: Path,
    vae: Path,
    clips: Path,
    t5: Path,
    tokenizers: Path,
    settings: Mapping[str, str],
) -> Path:
    """Write the model; settings go into its metadata.  Raises ValueError when it gets too large."""
    half = torch.float16
    parts = {
        "mmdit": load_mmdit(mmdit, dtype=half),
        "vae": load_vae(vae, dtype=half),
        "clip_l": load_clip(clips, "clip_l", dtype=half),
        "clip_g": load_clip(clips, "clip_g", dtype=half),
        "t5": load_t5(t5, dtype=half),
    }
    metadata = {MODEL_KEY: NAME, **settings}
    written = export_checkpoint(path, parts, metadata, pack_tokenizers(tokenizers))
    if written.stat().st_size > LARGEST:
        raise ValueError(f"{path}: is {written.stat().st_size} bytes, more than {LARGEST}.")
    return written
