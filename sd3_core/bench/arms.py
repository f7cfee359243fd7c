"""How our implementation does the work of a case, and the arm that a worker is started for.

An arm lives in a process of its own (see worker.py).
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoints.load import load_mmdit, load_vae, nothing
from ..conditioning import Conditioning
from ..guidance import classifier_free
from ..memory import free_memory
from ..models.attention import attention
from ..models.mmdit import MMDiT, MMDiTConfig
from ..models.onednn import Ops
from ..samplers import Velocity, euler
from ..schedule import Schedule
from ..speed import launch, stripes
from ..speed.attention import measured_attention
from ..speed.modulation import ModulationTable, PreparedMMDiT, is_seldom_used, modulators
from . import training
from .arm import MMDIT_PREFIX, Arm, Inputs, Work, conditions, stored
from .cases import CFG, Case, cut_blocks
from .others import ComfyUI, Diffusers, OursInComfyUI, Reference

COMMON = ("kind", "device", "threads", "memory_gb")  # of every worker's options


class Approximation(Protocol):
    """What makes sampling quicker and the picture another one: each is an arm of its own."""

    def __call__(
        self,
        model: MMDiT,
        positive: Conditioning,
        negative: Conditioning,
        sigmas: Tensor,
    ) -> Velocity:
        """The guided velocity of a run, in the place of `classifier_free(..., CFG)`."""
        ...


# Name -> approximation; "cache" becomes the arm ours-cache, whose distance is shown, not judged.
APPROXIMATIONS: dict[str, Approximation] = {}


def exactly(
    model: MMDiT, positive: Conditioning, negative: Conditioning, sigmas: Tensor
) -> Velocity:
    return classifier_free(model, positive, negative, CFG)


class Ours:
    """plain: without the modulation table.  way: of starting the blocks, see speed/launch.py.

    backend: of torch.compile.  approximation: a name in APPROXIMATIONS.
    """

    def __init__(
        self,
        device: torch.device,
        plain: bool = False,
        way: str = "plain",
        backend: str = "inductor",
        approximation: str = "",
    ):
        self.device, self.plain, self.way, self.backend = device, plain, way, backend
        self.guided = APPROXIMATIONS[approximation] if approximation else exactly
        self.started: PreparedMMDiT | None = None

    def release(self) -> None:
        self.started = None

    def load(self, case: Case, file: Path) -> Mapping[str, Tensor]:
        return load_mmdit(file, device=self.device).state_dict()

    def prepare(self, case: Case, file: Path) -> Work:
        if case.work == "decode":
            dtype, device = getattr(torch, case.dtype), self.device
            vae = load_vae(file, dtype=dtype, device=device)
            return lambda given: stripes.decode(vae, given["x"].to(dtype), free_memory(device))[0]
        if case.work == "train":
            return training.Ours(case, file, self.device)
        self.started = None
        model = self._denoiser(case, file)
        if case.work == "sample":
            return partial(self._sample, model, getattr(torch, case.dtype))
        if case.work == "modulate":
            return partial(self._modulate, model)
        left_out = range(case.blocks, model.config.depth) if case.blocks else ()
        return lambda given: model(
            given["x"], given["timestep"], given["context"], given["pooled"], left_out
        )

    def _denoiser(self, case: Case, file: Path) -> MMDiT:
        if not case.blocks:
            tabled = case.work in ("sample", "modulate") and not self.plain
            return load_mmdit(
                file,
                dtype=getattr(torch, case.dtype),
                device=self.device,
                attention=attention if self.plain else measured_attention,
                left=is_seldom_used if tabled else nothing,
            )
        assert isinstance(case.network, MMDiTConfig)
        with torch.device("meta"):
            model = MMDiT(case.network, Ops)
        cut_blocks(model, case)
        model.load_state_dict(stored(file, MMDIT_PREFIX, self.device), assign=True)
        return model.requires_grad_(False).eval()

    def _sample(self, model: MMDiT, dtype: torch.dtype, given: Inputs) -> Tensor:
        positive, negative = (part.to(self.device, dtype) for part in conditions(given))
        if not self.plain:
            levels = Schedule.timestep(given["sigmas"][:-1])
            model = PreparedMMDiT(model, levels, self.device, dtype)
            self._launch(model)
            positive, negative = model.prepare(positive), model.prepare(negative)
        velocity = self.guided(model, positive, negative, given["sigmas"])
        return euler(velocity, given["x"], given["sigmas"])

    def _launch(self, network: PreparedMMDiT) -> None:
        """What a run recorded or compiled serves the next one, as in a program that stays."""
        if self.started is None:
            launch.launch(network, self.way, self.device, self.backend)
            self.started = network
        network.joint_blocks, network.starter = self.started.joint_blocks, self.started.starter

    def _modulate(self, model: MMDiT, given: Inputs) -> Tensor:
        """Every adaLN's output for both prompts, step after step: [steps * 2, width]."""
        levels, pooled = Schedule.timestep(given["sigmas"][:-1]), given["pooled"]
        if not self.plain:
            table = ModulationTable(model, levels.tolist(), self.device)
            prompts = table.number(pooled)
            rows = [(level, prompt) for level in levels.tolist() for prompt in prompts]
            return table.look_up(rows, torch.float32)
        steps = []
        for level in levels:
            c = model.time_and_text(level.expand(len(pooled)), pooled, torch.float32)
            steps.append(torch.cat([layer(c) for _, layer in modulators(model)], dim=1))
        return torch.cat(steps)


def make_arm(options: Mapping[str, Any], device: torch.device) -> Arm:
    """The arm a worker is started for; options: see run.py's `arms_here`."""
    own = {name: value for name, value in options.items() if name not in COMMON}
    within = options.get("memory_gb", 0.0)
    kind = options["kind"]
    if kind == "ours":
        return Ours(device, **own)
    if kind == "diffusers":
        return Diffusers(device, offload=bool(within), **own)
    if kind in ("comfyui", "ours-in-comfyui"):
        arm = ComfyUI if kind == "comfyui" else OursInComfyUI
        return arm(Path(own.pop("folder")), device, memory_gb=within, **own)
    if kind == "reference":
        return Reference(Path(own["folder"]), device)
    raise ValueError(f"no arm {json.dumps(dict(options))}")
