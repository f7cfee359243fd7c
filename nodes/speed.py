"""What makes a MODEL faster on request; what it holds in memory and a run leaves out, in words."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..sd3_core.models.vae import VAEConfig
from ..sd3_core.schedule import Schedule
from ..sd3_core.speed import fp8, stripes
from ..sd3_core.speed.modulation import bytes_of, is_tabled
from ..sd3_core.speed.prompts import LOOKUPS, users_cache
from ..sd3_core.speed.step_cache import check_threshold
from ._compat import inference_dtype, schema
from .comfy_model import ComfyMMDiT
from .comfy_speed import FOREIGN, KEY, Speed, last_run, watch_runs
from .comfy_table import Tabled, obstacle
from .errors import coded
from .wires import CATEGORY, LATENT_FACTOR, report, widths_of

MIB = 2**20


class SD3Speed(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        percent = {"min": 0.0, "max": 1.0, "step": 0.001, "optional": True}
        return schema(
            {
                "node_id": "SD3Speed",
                "display_name": "SD3 Speed",
                "category": f"{CATEGORY}/speed",
                "description": "Faster for a picture that is a little different: each of these is "
                "off until you ask for it. Acts under KSampler as under SD3 Sample.",
                "search_aliases": ["easycache", "teacache", "step cache", "fp8", "faster", "cfg"],
                "inputs": [
                    io.Model.Input("model", tooltip="The denoiser: ours or ComfyUI's SD3."),
                    io.Float.Input(
                        "step_cache",
                        default=0.0,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="Steps are left out while the velocity changes by less than this "
                        "in all. 0 is off; try 0.05, and measure.",
                    ),
                    io.Float.Input(
                        "cfg_start_percent",
                        default=0.0,
                        tooltip="Part of the run after which cfg begins; before, the prompt counts "
                        "alone, in half the time. With a span in SD3 Sample, too, cfg holds where "
                        "both do.",
                        **percent,
                    ),
                    io.Float.Input(
                        "cfg_end_percent",
                        default=1.0,
                        tooltip="Part of the run after which cfg ends. With a span in SD3 Sample, "
                        "too, cfg holds where both do; measure leaves that one on.",
                        **percent,
                    ),
                    io.Boolean.Input(
                        "fp8",
                        default=False,
                        optional=True,
                        tooltip="Multiply in float8, on a GPU that can and with a MODEL of our "
                        "loaders; takes memory for a copy of the weights.",
                    ),
                    io.Boolean.Input(
                        "measure",
                        default=False,
                        optional=True,
                        tooltip="Sample without all this first, and tell how far the two latents "
                        "lie apart. Takes the time of both.",
                    ),
                ],
                "outputs": [io.Model.Output(tooltip="The same MODEL, to be sampled so.")],
            }
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        step_cache: float,
        cfg_start_percent: float = 0.0,
        cfg_end_percent: float = 1.0,
        fp8: bool = False,
        measure: bool = False,
    ) -> io.NodeOutput:
        widths_of(model)  # refuses other models
        speed = Speed(step_cache, cfg_start_percent, cfg_end_percent, fp8, measure)
        with coded("bad_setting"):
            check_speed(model, speed)
        model = model.clone()
        model.model_options["transformer_options"][KEY] = speed
        watch_runs(model)
        return io.NodeOutput(model, ui=report(asdict(speed)))


def check_speed(model: Any, speed: Speed) -> None:
    """Raises ValueError for what cannot be."""
    check_threshold(speed.step_cache)
    Schedule().window(speed.cfg_start, speed.cfg_end)
    if speed.fp8:
        if not isinstance(model.model.diffusion_model, ComfyMMDiT):
            raise ValueError(
                f"fp8: {FOREIGN}. Load the model with SD3 Load MMDiT or SD3 Load Checkpoint, or "
                "start ComfyUI with --fast fp8_matrix_mult on a file in fp8."
            )
        fp8.check(model.load_device)


class SD3MemoryPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3MemoryPlan",
                "display_name": "SD3 Memory Plan",
                "category": f"{CATEGORY}/speed",
                "description": "What a run takes in memory: the weights, the third of them that is "
                "used before the first step only, known prompts, and the decoding of the picture.",
                "search_aliases": ["vram", "memory", "speed", "cache", "modulation"],
                "inputs": [
                    io.Model.Input("model", tooltip="The denoiser: ours or ComfyUI's SD3."),
                    io.Int.Input("steps", default=28, min=1, max=10000, tooltip="Of the run."),
                    io.Int.Input("width", default=1024, min=16, max=16384, tooltip="Pixels."),
                    io.Int.Input("height", default=1024, min=16, max=16384, tooltip="Pixels."),
                ],
                "outputs": [io.String.Output(tooltip="A line for each part; see Preview as Text.")],
            }
        )

    @classmethod
    def execute(cls, model: Any, steps: int, width: int, height: int) -> io.NodeOutput:
        widths_of(model)  # refuses other models
        with coded("bad_setting"):
            plan = {
                **weights(model, steps),
                **prompts(),
                **decoding(width, height),
                **last(model),
            }
        return io.NodeOutput("\n".join(lines(plan)), ui=report(plan))

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        return float("nan")  # what is held changes from run to run


def weights(model: Any, steps: int) -> dict[str, Any]:
    network = model.model.diffusion_model
    state = dict(network.state_dict())
    ours = isinstance(network, ComfyMMDiT)
    dtype = inference_dtype(model.model)
    tabled = network.tabled if ours else None
    return {
        "weights_mib": mib(sum(tensor.nbytes for tensor in state.values())),
        "modulation_mib": mib(sum(state[name].nbytes for name in state if is_tabled(name))),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(model.load_device),
        "pages_weights": bool(getattr(model, "is_dynamic", bool)()),
        "loaded_mib": mib(model.loaded_size()),
        "float8_mib": mib(float8_bytes(tabled)),
        "without_table": obstacle(model) if ours else FOREIGN,
        "table_mib": mib(bytes_of(network, dtype, 2 * steps)) if ours else None,
        "rows_held": len(tabled.network.table.rows) if tabled else 0,
        "calls": tabled.calls if tabled else 0,
        "passes": tabled.network.table.passes if tabled else 0,
    }


def float8_bytes(tabled: Tabled | None) -> int:
    """Of the layers' second copy, where SD3 Speed asked for one."""
    if tabled is None or tabled.float8 is None:
        return 0
    layers = [layer for layer in tabled.float8.modules() if isinstance(layer, fp8.Float8Linear)]
    return sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())


def prompts() -> dict[str, Any]:
    cache = users_cache()
    return {
        "known_prompts": None if cache is None else len(cache),
        "prompts_hit": LOOKUPS["hit"],
        "prompts_missed": LOOKUPS["missed"],
    }


def last(model: Any) -> dict[str, Any]:
    told = last_run(model)
    return {
        "last_run": told.sentence() if told else None,
        "distance": told.distance if told else None,
    }


def decoding(width: int, height: int) -> dict[str, Any]:
    """With the released VAE, which is that of every SD3 model."""
    device = comfy.model_management.vae_device()
    dtype = comfy.model_management.vae_dtype(device)
    shape = (1, 16, height // LATENT_FACTOR, width // LATENT_FACTOR)
    config = VAEConfig()
    how = stripes.cut(config, shape, dtype, comfy.model_management.get_free_memory(device))
    return {
        "width": width,
        "height": height,
        "decode_mib": mib(stripes.memory_needed(config, shape, dtype, how)) if how else None,
    }


def mib(size: int) -> int:
    return round(size / MIB)


def lines(plan: dict[str, Any]) -> Iterator[str]:
    yield (
        f"MMDiT: {plan['weights_mib']} MiB of weights, computing in {plan['dtype']} on "
        f"{plan['device']}."
    )
    yield f"{plan['loaded_mib']} MiB of them are on the device now."
    if plan["float8_mib"]:
        yield f"{plan['float8_mib']} MiB beside them: the large layers in float8."
    share = f"{plan['modulation_mib']} MiB of them make the modulations"
    if plan["without_table"]:
        yield f"{share}, anew in every step: {plan['without_table']}."
    else:
        pages = plan["pages_weights"]
        paged = " with dynamic VRAM from ComfyUI 0.33 on" if pages else ""
        yield f"{share}, once before a run; then they are the first to make room{paged}."
        yield (
            f"Modulation table: {plan['table_mib']} MiB for this run's steps and two prompts; "
            f"{plan['rows_held']} rows held. So far {plan['calls']} calls of the network took "
            f"{plan['passes']} passes over these layers."
        )
    known = plan["known_prompts"]
    looked_up = f"{plan['prompts_hit']} found and {plan['prompts_missed']} missed so far"
    yield (
        "Prompt cache: off."
        if known is None
        else f"Prompt cache: {known} prompts on disk; {looked_up}."
    )
    size = f"Decoding {plan['width']} x {plan['height']}"
    yield (
        f"{size}: whole."
        if plan["decode_mib"] is None
        else f"{size}: in stripes, about {plan['decode_mib']} MiB of work."
    )
    yield f"Last run. {plan['last_run']}" if plan["last_run"] else "No run yet."
