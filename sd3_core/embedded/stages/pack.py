"""The stages' networks and the tokenizers as one file in the released layout, fp16; and back."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ...checkpoints.header import read_header
from ...checkpoints.layouts import PREFIXES
from ...checkpoints.load import load_clip, load_mmdit, load_t5, load_vae
from ...checkpoints.save import export_checkpoint, save_bytes, save_tensors
from ...checkpoints.tensors import read_tensors
from ...text.vocabularies import CHECKPOINT_PREFIXES, FOLDERS, pack_tokenizers
from ..model import MODEL_KEY
from .basis import basis_of

LARGEST = 15_000_000  # bytes


def pack(
    path: Path,
    name: str,
    *,
    mmdit: Path,
    vae: Path,
    clips: Path,
    t5: Path,
    tokenizers: Path,
    settings: Mapping[str, str],
) -> Path:
    """Write the model; its name and the settings go into its metadata.

    Raises ValueError when it gets too large.

    The MMDiT is rounded to what bf16 and fp16 both hold: it is the same in either, and a third
    smaller where the file is compressed.
    """
    half = torch.float16
    parts = {
        "mmdit": load_mmdit(mmdit, dtype=torch.bfloat16).half(),
        "vae": load_vae(vae, dtype=half),
        "clip_l": load_clip(clips, "clip_l", dtype=half),
        "clip_g": load_clip(clips, "clip_g", dtype=half),
        "t5": load_t5(t5, dtype=half),
    }
    metadata = {MODEL_KEY: name, **settings}
    written = export_checkpoint(path, parts, metadata, pack_tokenizers(tokenizers))
    if written.stat().st_size > LARGEST:
        raise ValueError(f"{path}: is {written.stat().st_size} bytes, more than {LARGEST}.")
    return written


def unpack(
    model: Path, *, mmdit: Path, vae: Path, clips: Path, t5: Path, tokenizers: Path, basis: Path
) -> None:
    """The opposite of `pack`: what each stage would have left, so that one may go on from there.

    Raises ValueError when one of the files is there already, and when this is no embedded model.
    """
    header = read_header(model)
    if MODEL_KEY not in header.metadata:
        raise ValueError(
            f"{model} is no embedded model: there are no stages to take it apart into."
        )
    for path in (mmdit, vae, clips, t5, tokenizers, basis):
        if path.exists():
            raise ValueError(f"{path} is there already: name another --output.")
    tensors = read_tensors(header)
    for name, prefix in CHECKPOINT_PREFIXES.items():
        for key in [key for key in tensors if key.startswith(prefix)]:
            data = bytes(tensors.pop(key).numpy())
            save_bytes(tokenizers / FOLDERS[name][0] / key.removeprefix(prefix), data)
    destinations = {"mmdit": mmdit, "vae": vae, "clip_l": clips, "clip_g": clips, "t5": t5}
    for path in set(destinations.values()):
        prefixes = tuple(PREFIXES[name] for name, one in destinations.items() if one == path)
        part = {key: tensor for key, tensor in tensors.items() if key.startswith(prefixes)}
        save_tensors(path, part, {MODEL_KEY: header.metadata[MODEL_KEY]})
    basis_of(load_vae(vae, dtype=torch.float32)).save(basis)
