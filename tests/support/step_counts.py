"""One guided step at 1024 x 1024 in bf16, counted on a pretended card: launches, bytes, memory.

python dev.py counts            count every arm and write docs/performance.md and counts.json
python tests/support/step_counts.py ARM MODEL      count one arm; prints JSON, and on stderr why
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import load_pack
import torch
from pretend_card import Card, CardTensor, Counts, on_card, pretend_card
from released import DENOISERS, write_denoiser

PACK = load_pack.PACK
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI").expanduser()
RECORDED = PACK / "tests" / "card" / "counts.json"
DOCUMENT = PACK / "docs" / "performance.md"
TABLE = ("<!-- counts -->\n", "<!-- end of counts -->\n")

ARMS = {
    "core": "`sd3_core`",
    "ours": "SD3 Workbench in ComfyUI",
    "native": "ComfyUI's own",
    "diffusers": "diffusers",
}
LATENT = (1, 16, 128, 128)
TEXT = 154  # CLIP's 77 tokens and T5's
STEPS = 4  # the third is counted: the first computes tables and measures
ROOM = 140.0  # GiB, so that nothing is offloaded
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Step:
    """launches of one step; the rest in GiB."""

    launches: int
    moved: float
    resident: float  # weights on the card while it samples
    peak: float  # above the resident weights
    waits: int


class Watch:
    """Called after each step."""

    def __init__(self, card: Card):
        self.card = card
        self.seen: list[tuple[Counts, int]] = []

    def __call__(self, *_: object) -> None:
        self.seen.append((self.card.counts.copy(), self.card.high))
        self.card.reset_high()

    def step(self, resident: int) -> Step:
        (before, _), (after, peak) = self.seen[1:3]
        part = after.since(before)
        sys.stderr.write(part.table() + "\n")
        return Step(
            part.launches,
            round(part.moved / 2**30, 2),
            round(resident / 2**30, 2),
            round((peak - resident) / 2**30, 2),
            part.waited,
        )


def in_core(file: Path) -> Step:
    from sd3_pack.sd3_core.checkpoints.load import load_mmdit
    from sd3_pack.sd3_core.conditioning import Conditioning
    from sd3_pack.sd3_core.guidance import classifier_free
    from sd3_pack.sd3_core.samplers import euler
    from sd3_pack.sd3_core.schedule import Schedule
    from sd3_pack.sd3_core.speed.attention import measured_attention
    from sd3_pack.sd3_core.speed.modulation import PreparedMMDiT, is_seldom_used

    device = torch.device("cuda")
    with opened() as card, torch.inference_mode():
        model = load_mmdit(
            file, dtype=BF16, device=device, attention=measured_attention, left=is_seldom_used
        )
        resident = card.live
        sigmas = Schedule(3.0).sigmas(28)[: STEPS + 1]
        prepared = PreparedMMDiT(model, Schedule.timestep(sigmas[:-1]), device, BF16)
        prompts = [
            prepared.prepare(Conditioning(on_card((1, TEXT, 4096), BF16), on_card((1, 2048), BF16)))
            for _ in range(2)
        ]
        watch = Watch(card)
        euler(classifier_free(prepared, *prompts, 4.5), on_card(LATENT), sigmas, watch)
        return watch.step(resident)


def in_diffusers(name: str) -> Step:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    config = DENOISERS[name]
    with opened() as card, torch.no_grad():
        with torch.device("meta"):
            model = SD3Transformer2DModel(
                sample_size=128,
                num_layers=config.depth,
                attention_head_dim=64,
                num_attention_heads=config.depth,
                joint_attention_dim=4096,
                caption_projection_dim=config.hidden_size,
                pooled_projection_dim=2048,
                pos_embed_max_size=config.pos_embed_max_size,
                dual_attention_layers=config.dual_attention_layers,
                qk_norm="rms_norm" if config.qk_norm else None,
            )
        put_on_card(model)
        resident = card.live
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(28, device="cuda")
        scheduler.set_begin_index(0)
        latents = on_card(LATENT, BF16)
        context, pooled = on_card((2, TEXT, 4096), BF16), on_card((2, 2048), BF16)
        watch = Watch(card)
        for t in scheduler.timesteps[:STEPS]:  # as its pipeline does
            x = torch.cat([latents] * 2)
            out = model(
                hidden_states=x,
                timestep=t.expand(x.shape[0]),
                encoder_hidden_states=context,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
            negative, positive = out.chunk(2)
            out = negative + 4.5 * (positive - negative)
            latents = scheduler.step(out, t, latents, return_dict=False)[0]
            watch()
        return watch.step(resident)


def put_on_card(network: torch.nn.Module) -> None:
    """Its parameters as shapes in bf16."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.nn.Parameter(on_card(parameter.shape, BF16), requires_grad=False)
                module._parameters[name] = made
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = on_card(buffer.shape, buffer.dtype)


def in_comfyui(file: Path, ours: bool) -> Step:
    with opened() as card, torch.inference_mode():
        start_comfyui()
        model = load_ours(file) if ours else load_native(file)
        watch = Watch(card)
        sample(model, watch)
        network = model.model.diffusion_model
        tensors = chain(network.parameters(), network.buffers())
        resident = sum(t.nbytes for t in tensors if isinstance(t, CardTensor))
        return watch.step(resident)


def start_comfyui(*flags: str) -> None:
    sys.path.insert(0, str(COMFYUI))
    import comfy.options

    comfy.options.enable_args_parsing()
    given, sys.argv = sys.argv, ["main.py", *flags]
    import utils.install_util  # noqa: F401  first, as in main.py
    from comfy import cli_args, model_management  # noqa: F401  read the arguments once

    sys.argv = given


def load_ours(file: Path):
    from sd3_pack.nodes.comfy_model import make_model
    from sd3_pack.sd3_core.checkpoints.load import component_of

    return make_model(component_of(file, "mmdit"))


def load_native(file: Path):
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(file))


def sample(model, on_step: Callable[..., None], latent: tuple[int, ...] = LATENT) -> None:
    """Guided Euler steps, as KSampler does them."""
    import comfy.samplers

    def prompt():
        return [[torch.zeros(1, TEXT, 4096), {"pooled_output": torch.zeros(1, 2048)}]]

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt(), prompt())
    guider.set_cfg(4.5)
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 28)[: STEPS + 1]
    sampler = comfy.samplers.sampler_object("euler")
    zeros = torch.zeros(latent)
    guider.sample(zeros, zeros, sampler, sigmas, callback=on_step, disable_pbar=True, seed=1)


@contextlib.contextmanager
def opened(gigabytes: float = ROOM) -> Iterator[Card]:
    with pretend_card(gigabytes, numbers=False, kernels=True) as card:
        yield card


def count(arm: str, name: str) -> Step:
    if arm == "diffusers":
        return in_diffusers(name)
    with tempfile.TemporaryDirectory() as folder:
        file = write_denoiser(Path(folder), name)
        return in_core(file) if arm == "core" else in_comfyui(file, arm == "ours")


def count_elsewhere(arm: str, name: str) -> Step:
    """In a process of its own: ComfyUI decides once which card there is."""
    command = [sys.executable, __file__, arm, name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arm}, {name}: {done.stderr[-2000:]}")
    return Step(**json.loads(done.stdout.splitlines()[-1]))


# The record and the document


def recorded() -> dict[str, dict[str, Step]]:
    """Model -> arm -> what was counted last."""
    found = json.loads(RECORDED.read_text(encoding="utf-8"))
    return {name: {arm: Step(**step) for arm, step in arms.items()} for name, arms in found.items()}


def table(counts: dict[str, dict[str, Step]]) -> str:
    lines = [
        "| one guided step, 1024 x 1024, bf16 | launches | GiB moved | GiB of weights | "
        "GiB beside them | host waits |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, arms in counts.items():
        for arm, step in arms.items():
            numbers = f"{step.launches:,} | {step.moved:.1f} | {step.resident:.2f}"
            lines.append(f"| {name}, {ARMS[arm]} | {numbers} | {step.peak:.2f} | {step.waits} |")
    return "\n".join(lines) + "\n"


def write_document(counts: dict[str, dict[str, Step]]) -> None:
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(TABLE[0])
    after = rest.partition(TABLE[1])[2]
    text = before + TABLE[0] + "\n" + table(counts) + "\n" + TABLE[1] + after
    DOCUMENT.write_text(text, encoding="utf-8")


def main(arguments: list[str]) -> None:
    if arguments:
        sys.stdout.write(json.dumps(asdict(count(*arguments))) + "\n")
        return
    counts = {name: {arm: count_elsewhere(arm, name) for arm in ARMS} for name in DENOISERS}
    as_json = {name: {arm: asdict(s) for arm, s in arms.items()} for name, arms in counts.items()}
    RECORDED.write_text(json.dumps(as_json, indent=1) + "\n", encoding="utf-8")
    write_document(counts)
    sys.stdout.write(table(counts))


if __name__ == "__main__":
    main(sys.argv[1:])
