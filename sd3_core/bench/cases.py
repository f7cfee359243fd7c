"""What is measured: cases, the weights they run on and the inputs they are given."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.mmdit import MMDiT, MMDiTConfig, position_table
from ..models.vae import VAE, VAEConfig
from ..noise import noise
from ..schedule import Schedule

CFG = 4.5
WORK = ("load", "forward", "sample", "modulate", "decode", "train")
# Two orders of the same float32 sums part by less than this part of the largest value: five to ten
# times what was seen between the four implementations.  A sampler carries its differences along.
# A training's losses are compared step by step.
TOLERANCE = {
    "load": 1e-6,
    "forward": 2e-5,
    "sample": 2e-4,
    "modulate": 2e-5,
    "decode": 5e-5,
    "train": 1e-4,
}
HALF_PRECISION = 500  # times as far may results lie apart in bfloat16, which keeps 8 bits


@dataclass(frozen=True)
class Case:
    """One thing that every arm does, on generated weights.

    study, at: a case may be one point of a study of growth, e.g. "resolution" at 1357 tokens.
    memory_gb: what each arm may take of the device; 0: all of it.
    arms: those that take part; empty: all that can.
    """

    name: str
    work: str  # one of WORK
    network: MMDiTConfig | VAEConfig
    pixels: int = 512  # side of the picture
    text: int = 333  # tokens of text
    batch: int = 2
    steps: int = 1
    blocks: int | None = None  # so many of the network's blocks, the last one among them
    dtype: str = "float32"
    recompute: bool = False  # gradient checkpointing
    study: str = ""
    at: float = 0.0
    memory_gb: float = 0.0
    arms: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        size = self.network
        if isinstance(size, VAEConfig):
            return f"VAE decode, {self.pixels} x {self.pixels}, batch {self.batch}, {self.dtype}"
        what = f"depth {size.depth}, {size.hidden_size} wide"
        if self.blocks:
            what += f", {self.blocks} blocks"
        if size.qk_norm:
            what += ", q and k normed"
        if size.dual_attention_layers:
            what += f", {len(size.dual_attention_layers)} dual blocks"
        if self.work == "load":
            return f"load {what}, {self.dtype}"
        tokens = (self.pixels // 16) ** 2
        what += f", {tokens} + {self.text} tokens, batch {self.batch}, {self.dtype}"
        if self.work == "sample":
            within = f", in {self.memory_gb:g} GB" if self.memory_gb else ""
            return f"{self.steps} Euler steps with guidance, {what}{within}"
        if self.work == "modulate":
            return f"all modulations of {self.steps} steps for 2 prompts, {what}"
        if self.work == "train":
            again = ", gradient checkpointing" if self.recompute else ""
            return f"{self.steps} LoRA training steps, {what}{again}"
        return f"forward, {what}"


def as_json(case: Case) -> dict[str, Any]:
    return asdict(case) | {"kind": "vae" if isinstance(case.network, VAEConfig) else "mmdit"}


def from_json(values: Mapping[str, Any]) -> Case:
    sizes: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values["network"].items()
    }
    network = VAEConfig(**sizes) if values["kind"] == "vae" else MMDiTConfig(**sizes)
    rest: dict[str, Any] = {k: v for k, v in values.items() if k not in ("kind", "network")}
    rest["arms"] = tuple(rest["arms"])
    return Case(network=network, **rest)


def tolerance(case: Case) -> float:
    """Largest difference, as a part of our largest value."""
    half = case.work != "load" and case.dtype == "bfloat16"
    return TOLERANCE[case.work] * (HALF_PRECISION if half else 1)


# --- the tables ---------------------------------------------------------------------------------

D8 = MMDiTConfig(depth=8, pos_embed_max_size=96)
D4 = MMDiTConfig(depth=4, pos_embed_max_size=64, qk_norm=True)
WIDE = MMDiTConfig(depth=24, pos_embed_max_size=96)
MEDIUM = MMDiTConfig(depth=24)  # SD3 Medium
LARGE = MMDiTConfig(depth=38, qk_norm=True)  # SD3.5 Large
SIZES = {"100mb": 6, "1gb": 15, "4gb": 24, "16gb": 38}  # bf16 file of a denoiser -> its depth
# 4gb is SD3 Medium, 16gb has the size of SD3.5 Large


def growth_cases(network: MMDiTConfig, text: int) -> tuple[Case, ...]:
    """Points of the three studies, small enough to repeat."""
    point = Case("", "forward", network, pixels=256, text=text, batch=1)
    return (
        *(
            replace(point, name=f"resolution-{side}", pixels=side, study="resolution", at=tokens)
            for side in (256, 384, 512)
            for tokens in [(side // 16) ** 2 + text]
        ),
        *(
            replace(point, name=f"batch-{batch}", batch=batch, study="batch", at=batch)
            for batch in (1, 2, 4)
        ),
        *(
            replace(
                point, name=f"steps-{steps}", work="sample", steps=steps, study="steps", at=steps
            )
            for steps in (1, 2, 4)
        ),
    )


def train_cases(network: MMDiTConfig, text: int) -> tuple[Case, ...]:
    """Without and with gradient checkpointing.

    Batch 1: ComfyUI's trainer computes each sample of a larger batch under every prompt of it.
    """
    plain = Case("train", "train", network, pixels=256, text=text, batch=1, steps=4)
    return plain, replace(plain, name="train-recompute", recompute=True)


def load_case(size: str) -> Case:
    network = MMDiTConfig(depth=SIZES[size])
    return Case("load", "load", network, dtype="bfloat16")


def warm_up_case(case: Case) -> Case:
    """The same load, small."""
    assert isinstance(case.network, MMDiTConfig)
    return replace(case, network=replace(case.network, depth=2, pos_embed_max_size=16))


def all_cases(size: str) -> tuple[Case, ...]:
    return (
        load_case(size),
        Case("forward", "forward", D8),
        Case("forward-qknorm", "forward", replace(D8, qk_norm=True)),
        Case(
            "forward-dual",
            "forward",
            replace(D8, qk_norm=True, dual_attention_layers=(0, 1, 2, 3)),
        ),
        Case("forward-wide", "forward", WIDE, blocks=2),
        Case("step", "sample", D8, pixels=256, batch=1, steps=1),
        Case("sample", "sample", D8, pixels=256, batch=1, steps=8),
        Case("modulate", "modulate", WIDE, steps=28, blocks=2),
        Case("decode-256", "decode", VAEConfig(), pixels=256, batch=1),
        Case("decode-512", "decode", VAEConfig(), pixels=512, batch=1),
        Case("decode-1024", "decode", VAEConfig(), pixels=1024, batch=1),
        *train_cases(D8, text=77),
        *growth_cases(D4, text=77),
    )


def quick_cases(size: str) -> tuple[Case, ...]:
    """The same kinds of work, small."""
    return (
        load_case(size),
        Case("forward", "forward", D4, pixels=256, text=154),
        Case("step", "sample", D4, pixels=256, text=154, batch=1, steps=1),
        Case("sample", "sample", D4, pixels=256, text=154, batch=1, steps=4),
        Case("modulate", "modulate", D4, steps=28),
        Case("decode-64", "decode", VAEConfig(), pixels=64, batch=1),
        *train_cases(replace(D4, qk_norm=False), text=154),
    )


def gpu_cases(tiny: bool = False) -> tuple[Case, ...]:
    """The released sizes in bf16; what the claims rest on first, should the time run out.

    tiny: the same plan on small networks and pictures, to try it on any device.
    """
    step = Case("", "sample", MEDIUM, text=154, batch=1, steps=8, dtype="bfloat16")
    study = [
        replace(step, name=f"medium-{side}", pixels=side, study="resolution", at=tokens)
        for side in (1024, 512, 1440)
        for tokens in [(side // 16) ** 2 + step.text]
    ]
    large = replace(step, name="large-1024", network=LARGE, pixels=1024)
    decode = Case("decode-1024", "decode", VAEConfig(), pixels=1024, batch=1, dtype="bfloat16")
    few = ("comfyui", "ours", "diffusers")
    plan = (
        study[0],
        large,
        study[1],
        decode,
        replace(large, name="large-1024-12gb", steps=4, memory_gb=12.0),
        replace(study[2], arms=few),
    )
    return tuple(made_tiny(case) for case in plan) if tiny else plan


def made_tiny(case: Case) -> Case:
    """A case of the same kind that takes a second."""
    size = case.network
    pixels = case.pixels // 256 * 16  # a multiple of 16, as diffusers wants it
    if isinstance(size, MMDiTConfig):
        small = replace(size, depth=2, pos_embed_max_size=16, context_dim=64, pooled_dim=32)
        tokens = (pixels // 16) ** 2 + 7
        case = replace(case, network=small, text=7, steps=2, at=tokens if case.study else 0.0)
    return replace(case, pixels=pixels, dtype="float32")


def choose(names: Sequence[str] = (), quick: bool = False, size: str = "100mb") -> list[Case]:
    """The cases of these names, or all; a name also stands for all that begin with it.

    size: of the file that is loaded, see SIZES.  Raises ValueError for an unknown name or size.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; choose one of {', '.join(SIZES)}.")
    cases = quick_cases(size) if quick else all_cases(size)
    for name in names:
        if not any(stands_for(name, case) for case in cases):
            known = ", ".join(dict.fromkeys(case.study or case.name for case in cases))
            raise ValueError(f"there is no case {name!r}; choose from {known}.")
    return [c for c in cases if not names or any(stands_for(name, c) for name in names)]


def stands_for(name: str, case: Case) -> bool:
    return name == case.name or case.name.startswith(f"{name}-")


# --- weights and inputs -------------------------------------------------------------------------


def write_weights(case: Case, folder: Path, device: str = "cpu") -> Path:
    """The case's network with random weights, in the released single-file layout, written once.

    device: where they are drawn; billions take minutes on a CPU.
    Beside it `<name>.config` holds what diffusers calls the network's configuration.
    """
    file = folder / f"{weights_name(case)}.safetensors"
    if file.exists():
        return file
    prefix = (
        "first_stage_model." if isinstance(case.network, VAEConfig) else ("model.diffusion_model.")
    )
    weights = random_weights(case, device)
    save_file({prefix + name: weight for name, weight in weights.items()}, file)
    for name, config in diffusers_configs(case).items():
        place = file.with_suffix(".config") / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return file


def weights_name(case: Case) -> str:
    """Cases of one name here share a file."""
    size = "-".join(str(value) for value in asdict(case.network).values())
    kept = "".join(letter for letter in size if letter.isalnum() or letter in "-,")
    return f"{type(case.network).__name__}-{kept}-{case.blocks or 'all'}-{case.dtype}"


def empty_network(case: Case) -> nn.Module:
    """The network on the meta device, cut to the case's blocks."""
    with torch.device("meta"):
        if isinstance(case.network, VAEConfig):
            return VAE(case.network)
        network = MMDiT(case.network)
    cut_blocks(network, case)
    return network


def cut_blocks(network: Any, case: Case) -> None:
    """Keep the first blocks and the last one: `case.blocks` in all."""
    if case.blocks:
        kept = [*range(case.blocks - 1), len(network.joint_blocks) - 1]
        network.joint_blocks = nn.ModuleList(network.joint_blocks[index] for index in kept)


def random_weights(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    """Released name without prefix -> weight; scaled so that activations stay near one."""
    draw = torch.Generator(device).manual_seed(0)
    state = {}
    for name, tensor in empty_network(case).state_dict().items():
        normal = torch.empty(tensor.shape, device=device).normal_(generator=draw)
        if name == "pos_embed":
            side = round(tensor.shape[1] ** 0.5)
            normal = position_table(tensor.shape[2], side, base=64)
        elif tensor.ndim > 1:
            normal *= tensor[0].numel() ** -0.5
        elif name.endswith(".weight"):  # of a norm
            normal = 1 + 0.1 * normal
        else:
            normal *= 0.1
        state[name] = normal.to("cpu", getattr(torch, case.dtype))
    return state


def make_inputs(case: Case) -> dict[str, Tensor]:
    """What every arm is given; a sampler's context and pooled are [positive, negative].

    x: [B, 16, H, W] in model space; decode: latents in VAE space.
    """
    if case.work == "load":
        return {}
    size = case.network
    channels = size.latent_channels if isinstance(size, VAEConfig) else size.in_channels
    inputs = {"x": noise((case.batch, channels, case.pixels // 8, case.pixels // 8), seed=1)}
    if isinstance(size, VAEConfig):
        return inputs
    if case.work == "train":
        inputs["noise"] = noise(inputs["x"].shape, seed=4)
    draw = torch.Generator().manual_seed(2)
    prompts = 2 if case.work in ("sample", "modulate") else case.batch
    return inputs | {
        "timestep": torch.linspace(900.0, 300.0, case.batch),
        "context": torch.randn(prompts, case.text, size.context_dim, generator=draw),
        "pooled": torch.randn(prompts, size.pooled_dim, generator=draw),
        "sigmas": Schedule(3.0).sigmas(case.steps),
    }


def diffusers_configs(case: Case) -> dict[str, dict[str, Any]]:
    """Folder -> the configuration of diffusers' network of the same size."""
    size = case.network
    if isinstance(size, VAEConfig):
        levels = len(size.channels)
        return {
            "vae": {
                "_class_name": "AutoencoderKL",
                "down_block_types": ["DownEncoderBlock2D"] * levels,
                "up_block_types": ["UpDecoderBlock2D"] * levels,
                "block_out_channels": list(size.channels),
                "layers_per_block": size.blocks_per_level,
                "latent_channels": size.latent_channels,
                "use_quant_conv": False,
                "use_post_quant_conv": False,
            }
        }
    return {
        "transformer": {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "num_layers": case.blocks or size.depth,
            "attention_head_dim": 64,
            "num_attention_heads": size.num_heads,
            "joint_attention_dim": size.context_dim,
            "caption_projection_dim": size.hidden_size,
            "pooled_projection_dim": size.pooled_dim,
            "pos_embed_max_size": size.pos_embed_max_size,
            "qk_norm": "rms_norm" if size.qk_norm else None,
            "dual_attention_layers": list(size.dual_attention_layers),
        }
    }
