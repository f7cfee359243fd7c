"""A budget of seconds, a lab that all rows share, and a checkpoint that draws in no time."""

import pytest
import torch
from sd3_pack.sd3_core.checkpoints.layouts import find_components
from sd3_pack.sd3_core.checkpoints.save import export_checkpoint
from sd3_pack.sd3_core.embedded.model import FILE
from sd3_pack.sd3_core.generate import stored_tokenizers
from sd3_pack.sd3_core.settings import Files
from sd3_pack.sd3_core.study.arms import new_arm
from sd3_pack.sd3_core.study.budgets import Budget
from sd3_pack.sd3_core.study.lab import Lab
from sd3_pack.sd3_core.study.rows.claims import arm

TINY = Budget(
    what="seconds",
    scenes=48,
    large_scenes=16,
    steps=2,
    batch_size=4,
    depths=(1, 2, 3),
    sampling_steps=(1, 2, 3),
    pictures=3,
    prompts=1,
    large_steps=2,
    vae_steps=2,
    vae_batch_size=2,
    dpo_pairs=6,
    dpo_steps=2,
)


@pytest.fixture(scope="session")
def tiny():
    return TINY


@pytest.fixture(scope="session")
def blank(tmp_path_factory):
    """A whole model whose MMDiT, of depth 1, has learnt nothing: it leaves the noise as it is."""
    path = tmp_path_factory.mktemp("blank") / "blank.safetensors"
    parts = find_components(FILE) | {"mmdit": new_arm(arm(TINY, depth=1), 0)}
    metadata = {"sd3_workbench.shift": "1.0", "sd3_workbench.native_pixels": str(64 * 64)}
    return export_checkpoint(path, parts, metadata, stored_tokenizers(Files(checkpoint=FILE)))


@pytest.fixture(scope="session")
def lab(tmp_path_factory, blank):
    folder = tmp_path_factory.mktemp("study")
    return Lab(folder, torch.device("cpu"), torch.float32, Files(checkpoint=blank))
