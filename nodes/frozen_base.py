"""The MODEL that arrives at a training node -> the frozen network under the LoRA.

The network is read anew from the MODEL's file, so that nothing of ComfyUI's inference mode sticks
to it, and ComfyUI's own patcher puts the MODEL's weight patches on it: they belong to the base, and
for DPO to the reference.  ComfyUI's memory manager loads, counts and unloads it.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import torch
from torch import Tensor, nn

from ..sd3_core.checkpoints.layouts import Component
from ..sd3_core.checkpoints.load import load_mmdit
from ..sd3_core.models.mmdit import MMDiT
from ..sd3_core.training.flow import Place
from ..sd3_core.training.report import some_names
from ..sd3_core.training.trainer import Base
from .comfy_speed import KEY as SPEED
from .errors import NodeError
from .wires import loras_on, origin_of

PREFIX = "diffusion_model."
MULTIPLIER = 1000  # sigma -> the timestep that the network is told
# Options of a MODEL that act in sampling only: training has no use for them.
SAMPLING_ONLY = (
    *("sampler_", "denoise_mask_function", "disable_cfg1_optimization"),
    "transformer_options",  # looked into by itself
)


class FrozenBase:
    """A MODEL as the base of a LoRA; `release` when the run is over."""

    def __init__(self, model: Any):
        """Raises NodeError, naming it, for what a training run cannot carry."""
        origin = origin_of(model)
        if "mmdit" not in origin.paths:
            raise NodeError(
                "wrong_model",
                f"this MODEL ({type(model.model).__name__}) comes from another loader, so its file "
                "is not known: training reads the file again. Load it with SD3 Load Checkpoint or "
                "SD3 Load MMDiT.",
            )
        if names := uncarried(model):
            raise NodeError(
                "wrong_model",
                f"this MODEL carries {some_names(names)}, which training cannot carry: the LoRA "
                "would be taught on another network than it is used with. Connect the MODEL from "
                "before that node.",
            )
        self.path: Path = origin.paths["mmdit"]
        self.patches: Mapping[str, Any] = model.patches
        self.loras = loras_on(model)
        self.shift = shift_of_sampling(model.get_model_object("model_sampling"))
        self.patcher: Any = None

    @property
    def base(self) -> Base:
        changes = ()
        if self.patches:
            changes = (*self.loras, f"{len(self.patches)} patches {patches_digest(self.patches)}")
        return Base(self.load, changes)

    def load(self, part: Component, place: Place) -> MMDiT:
        """Raises NodeError for a patch without its layer."""
        network = load_mmdit(part, dtype=place.dtype)
        check_patches(self.patches, network)
        holder = Holder(network)
        cpu = torch.device("cpu")
        self.patcher = comfy.model_patcher.ModelPatcher(holder, place.device, cpu)
        self.patcher.patches = {name: list(patches) for name, patches in self.patches.items()}
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        return network

    def release(self) -> None:
        """Give the memory back."""
        if self.patcher is not None:
            self.patcher.detach()
            self.patcher = None
        comfy.model_management.cleanup_models()
        comfy.model_management.soft_empty_cache()


def shift_of_sampling(sampling: Any) -> float:
    """The shift of a rectified flow.  Raises NodeError for another way to sample."""
    flow = isinstance(sampling, comfy.model_sampling.ModelSamplingDiscreteFlow)
    if not flow or sampling.multiplier != MULTIPLIER:
        what = " and ".join(base.__name__ for base in type(sampling).__bases__)
        if flow:
            what += f" with multiplier {sampling.multiplier:g}"
        raise NodeError(
            "wrong_model",
            f"this MODEL is set to be sampled by {what}, and training follows SD3's rectified "
            "flow, whose shift ModelSamplingSD3 sets. Connect the MODEL from before that node.",
        )
    return float(sampling.shift)


class Holder(nn.Module):
    """The network under the name that ComfyUI's patches know it by."""

    def __init__(self, network: MMDiT):
        super().__init__()
        self.diffusion_model = network


def uncarried(model: Any) -> list[str]:
    """What changes the network's answer beside patches of its weights, by name.

    Not what SD3 Speed sets: it is about how one samples, and training does not.
    """
    names = [f"object patch {name}" for name in model.object_patches if name != "model_sampling"]
    options = model.model_options
    names += [f"option {name}" for name in options if not name.startswith(SAMPLING_ONLY)]
    inner = options.get("transformer_options", {})
    names += [f"attention patch {name}" for name in inner.get("patches", {})]
    for place, blocks in inner.get("patches_replace", {}).items():
        names += [f"block patch {place} {key}" for key in blocks]
    known = ("patches", "patches_replace", SPEED)
    names += [f"transformer option {name}" for name in inner if name not in known]
    for kind, by_key in getattr(model, "wrappers", {}).items():
        names += [
            f"wrapper {kind} {k}" for k, functions in by_key.items() if functions and k != SPEED
        ]
    names += [f"injection {name}" for name in getattr(model, "injections", {})]
    names += [f"wrapped weight {name}" for name in getattr(model, "weight_wrapper_patches", {})]
    names += ["weight hooks"] if getattr(model, "hook_patches", {}) else []
    return names


def check_patches(patches: Mapping[str, Any], network: MMDiT) -> None:
    """Raises NodeError for a patch whose weight is not there, or is kept with a scale."""
    known = dict(network.named_parameters()) | dict(network.named_buffers())
    for name in patches:
        inner = name.removeprefix(PREFIX)
        if inner not in known:
            raise NodeError(
                "wrong_lora",
                f"a LoRA on this MODEL changes {name}, which the network does not have, so it "
                "cannot be carried into training. Connect the MODEL without it.",
            )
        owner = network.get_submodule(inner.rpartition(".")[0])
        if getattr(owner, "scale", None) is not None:
            raise NodeError(
                "wrong_lora",
                f"a LoRA on this MODEL changes {name}, which the file keeps as scaled fp8: such a "
                "change cannot be carried into training. Use the bf16 file, or train without it.",
            )


def patches_digest(patches: Mapping[str, Any]) -> str:
    """Identity of weight patches: 16 hex digits over names, strengths and tensors."""
    digest = hashlib.sha256()
    for name in sorted(patches):
        for part in flat(patches[name]):
            if isinstance(part, Tensor):
                digest.update(repr((part.shape, str(part.dtype))).encode())
                flattened = part.detach().cpu().contiguous().reshape(-1)
                digest.update(flattened.view(torch.uint8).numpy().data)
            else:
                digest.update(repr((name, part)).encode())
    return digest.hexdigest()[:16]


def flat(value: Any) -> Iterator[Any]:
    """Tensors, numbers and words inside a patch, in order."""
    if isinstance(value, list | tuple):
        for one in value:
            yield from flat(one)
    elif hasattr(value, "weights"):  # comfy.weight_adapter's
        yield type(value).__name__
        yield from flat(value.weights)
    elif isinstance(value, Tensor | int | float | str) or value is None:
        yield value
