"""The nodes: thin wrappers that let ComfyUI use sd3_core on its own sockets."""

import os
from typing import Any

from comfy_api.latest import ComfyExtension

from . import pick, routes
from .datasets import SD3Preferences, SD3TrainingImages
from .latents import SD3EmptyLatent, SD3VAEDecode, SD3VAEEncode
from .loaders import SD3LoadCheckpoint, SD3LoadMMDiT, SD3LoadTextEncoders, SD3LoadVAE
from .lora import SD3LoadLoRA
from .pick import SD3Pick
from .sampling import SD3Sample, SD3ShiftSchedule
from .speed import SD3MemoryPlan, SD3Speed
from .sweep import SD3Sweep
from .text import SD3EncodePrompt
from .training import SD3SaveLoRA, SD3TimestepDensity, SD3TrainDPO, SD3TrainLoRA

NODES: list[Any] = [
    SD3LoadCheckpoint,
    SD3LoadMMDiT,
    SD3LoadTextEncoders,
    SD3LoadVAE,
    SD3LoadLoRA,
    SD3EncodePrompt,
    SD3EmptyLatent,
    SD3ShiftSchedule,
    SD3Sample,
    SD3VAEDecode,
    SD3VAEEncode,
    SD3Sweep,
    SD3MemoryPlan,
    SD3Speed,
]
# Those that train or write files, and what serves them alone: left out where that is forbidden.
TRAINING_NODES: list[Any] = [
    SD3TrainingImages,
    SD3Preferences,
    SD3TimestepDensity,
    SD3TrainLoRA,
    SD3TrainDPO,
    SD3SaveLoRA,
    SD3Pick,
]


def training_allowed() -> bool:
    """SD3_WORKBENCH_NO_TRAINING set to anything but 0 forbids it, say on a shared server."""
    return os.environ.get("SD3_WORKBENCH_NO_TRAINING", "") in ("", "0")


class SD3Extension(ComfyExtension):
    async def get_node_list(self) -> list[Any]:
        routes.register()
        if not training_allowed():
            return NODES
        pick.register()
        return [*NODES, *TRAINING_NODES]
