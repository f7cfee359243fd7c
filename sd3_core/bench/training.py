"""LoRA training, done by each implementation through its own trainer: what an arm's work is then.

Everywhere the same: the file, the layers and the rank, one batch of latents, prompts, noise and
noise levels, AdamW and its numbers, no dropout, float32.  Ours and diffusers begin with the same
adapters and have the same loss, so their curves must agree.  ComfyUI's trainer has a loss (of x0),
adapters and draws of its own: there only the work is the same, and that the loss is finite.

A call trains `case.steps` steps, on from where the last call stopped, and returns their losses.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.load import component_of
from ..conditioning import Conditioning
from ..lora import TrainableLoRA, mmdit_targets
from ..models.mmdit import MMDiTConfig
from ..models.vae import to_vae_space
from ..schedule import Schedule, add_noise
from ..training.batches import Batch, Batches
from ..training.config import TrainConfig
from ..training.densities import Uniform
from ..training.distributed import ALONE
from ..training.flow import FlowTask, Place
from ..training.learner import Learner
from ..training.loop import Session, any_state, ignore
from ..training.objectives import RectifiedFlow
from ..training.run import Run, run_folder
from ..training.trainer import network_to_train
from .cases import Case, empty_network

RANK = 16
RATE = 1e-4
ADAMW: dict[str, Any] = {"lr": RATE, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
LARGEST_NORM = 1.0  # of the gradient

# Our path inside a joint block -> diffusers' inside a transformer block, q, k and v fused.
DIFFUSERS_LAYERS = {
    "x_block.attn.qkv": "attn.to_qkv",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.attn2.qkv": "attn2.to_qkv",
    "x_block.attn2.proj": "attn2.to_out.0",
    "context_block.attn.qkv": "attn.to_added_qkv",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}


class Ours:
    """The learner and the loop of a training run; nothing is validated, drawn or saved."""

    def __init__(self, case: Case, file: Path, device: torch.device):
        config = run_settings(case, file.parent)
        place = Place(device, torch.float32, ALONE)
        model, adapters = network_to_train(component_of(file, "mmdit"), config, place)
        assert adapters is not None
        begin_with(adapters, first_halves(case))
        self.trained = sum(parameter.numel() for parameter in adapters.parameters())
        self.steps, self.batches = case.steps, GivenBatches()
        objective = RectifiedFlow(Uniform(), Schedule(1.0))
        task = FlowTask(
            model, adapters, objective, self.batches, [], config, place, lambda step: {}
        )
        folder = run_folder(config.output, config.run_name)
        folder.mkdir(parents=True, exist_ok=True)
        learner = Learner(task.parameters, config)
        self.session = Session(task, Run(folder), config, ALONE, learner, ignore, any_state)

    @torch.enable_grad()
    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        self.batches.given = given
        return torch.tensor([self.session.advance(stop=False)[0].loss for _ in range(self.steps)])


class GivenBatches(Batches):
    """The same samples in every step."""

    def __init__(self) -> None:
        self.given: Mapping[str, Tensor] = {}

    def parts(self, step: int, rows: range, size: int) -> list[range]:
        return [rows]

    def samples(self, step: int, rows: range, size: int) -> Batch:
        given = self.given
        return Batch(
            x0=given["x"],
            noise=given["noise"],
            u=given["timestep"] / 1000,  # which the uniform density makes the noise level
            conditioning=Conditioning(given["context"], given["pooled"]),
            mask=None,
            weights=torch.ones(len(rows)),
            prior=torch.zeros(len(rows), dtype=torch.bool),
        )


def run_settings(case: Case, output: Path) -> TrainConfig:
    return TrainConfig(
        run_name=case.name,
        output=output,
        steps=10**6,
        batch_size=case.batch,
        rank=RANK,
        learning_rate=ADAMW["lr"],
        betas=ADAMW["betas"],
        eps=ADAMW["eps"],
        weight_decay=ADAMW["weight_decay"],
        warmup=0,
        clip=LARGEST_NORM,
        validate_every=0,
        gradient_checkpointing=case.recompute,
    )


def first_halves(case: Case) -> dict[str, Tensor]:
    """Path of a layer -> the random half of its adapter, [rank, in]."""
    layers = empty_network(case)
    draw = torch.Generator().manual_seed(3)
    halves = {}
    for path in mmdit_targets(layers):
        inputs = layers.get_parameter(f"{path}.weight").shape[1]
        halves[path] = torch.empty(RANK, inputs).uniform_(-1, 1, generator=draw) * inputs**-0.5
    return halves


@torch.no_grad()
def begin_with(adapters: TrainableLoRA, halves: Mapping[str, Tensor]) -> None:
    for name, parameter in adapters.named_parameters():
        path, _, half = name.removeprefix("adapters.").replace("/", ".").rpartition(".")
        if half == "down":
            parameter.copy_(halves[path])


class Diffusers:
    """diffusers' network under peft, with the loss of its script at precondition_outputs=0.

    q, k and v are fused as in the file, so that peft trains as many parameters as we do; this makes
    diffusers faster than its script, which leaves them apart.
    """

    def __init__(self, case: Case, model: Any):
        if isinstance(case.network, MMDiTConfig) and case.network.qk_norm:
            raise NotImplementedError("its fused attention leaves out the norms of q and k")
        halves = {diffusers_path(path): half for path, half in first_halves(case).items()}
        model.fuse_qkv_projections()
        config = import_module("peft").LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=list(halves)
        )
        model.requires_grad_(False)
        model.add_adapter(config)
        for path, half in halves.items():
            model.get_submodule(path).lora_A["default"].weight.data.copy_(half)
        if case.recompute:
            model.enable_gradient_checkpointing()
        self.model, self.steps = model.train(), case.steps
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.trained = sum(parameter.numel() for parameter in self.parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, **ADAMW)

    @torch.enable_grad()
    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        return torch.tensor([self._step(given) for _ in range(self.steps)])

    def _step(self, given: Mapping[str, Tensor]) -> float:
        x0, noise, timestep = given["x"], given["noise"], given["timestep"]
        velocity = self.model(
            add_noise(x0, noise, timestep / 1000),
            given["context"],
            given["pooled"],
            timestep,
            return_dict=False,
        )[0]
        loss = ((velocity.float() - (noise - x0)) ** 2).flatten(1).mean(dim=1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, LARGEST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def diffusers_path(path: str) -> str:
    """E.g. joint_blocks.0.x_block.attn.qkv -> transformer_blocks.0.attn.to_qkv."""
    _, block, layer = path.split(".", 2)
    return f"transformer_blocks.{block}.{DIFFUSERS_LAYERS[layer]}"


class ComfyUI:
    """The pieces of its node TrainLoraNode in their order, with adapters on our layers only.

    By itself the node adapts every weight and bias.  A call begins its sampler anew, as the node
    does once for all steps.
    """

    def __init__(self, case: Case, patcher: Any):
        self.nodes = nodes = import_module("comfy_extras.nodes_train")
        self.management: Any = import_module("comfy.model_management")
        self.case = case
        with torch.inference_mode(False):
            self.patcher = patcher.clone(force_deepcopy=True)
            self.patcher.set_model_compute_dtype(torch.float32)
            self.patcher.model.requires_grad_(False).train()
            parameters = [p for path in first_halves(case) for p in self._adapt(path)]
            self.trained = sum(parameter.numel() for parameter in parameters)
            self.optimizer = torch.optim.AdamW(parameters, **ADAMW)
            if case.recompute:
                # at the node's own depth of 1 the whole network is one piece; its blocks lie at 2
                for module in nodes.find_modules_at_depth(
                    self.patcher.model.diffusion_model, depth=2
                ):
                    nodes.patch(module)
            self.management.load_models_gpu(
                [self.patcher], memory_required=1e20, force_full_load=True
            )

    def _adapt(self, path: str) -> list[Tensor]:
        name = f"diffusion_model.{path}"
        layer = self.patcher.model.get_submodule(name)
        adapter, parameters = self.nodes._create_weight_adapter(
            layer, name, {}, "LoRA", torch.float32, RANK
        )
        self.patcher.add_weight_wrapper(f"{name}.weight", adapter)
        return list(parameters.values())

    @torch.enable_grad()
    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        losses: list[float] = []
        sampler = self.nodes.TrainSampler(
            torch.nn.MSELoss(),
            self.optimizer,
            loss_callback=losses.append,
            batch_size=self.case.batch,
            total_steps=self.case.steps,
            training_dtype=torch.float32,
        )
        guider = self.nodes.TrainGuider(self.patcher)
        guider.set_conds(
            [
                [given["context"][row : row + 1], {"pooled_output": given["pooled"][row : row + 1]}]
                for row in range(self.case.batch)
            ]
        )
        latents = to_vae_space(given["x"])
        self.management.in_training = True
        try:
            self.nodes._run_training_loop(
                guider, sampler, latents, self.case.batch, 0, False, False
            )
        finally:
            self.management.in_training = False
        return torch.tensor(losses)
