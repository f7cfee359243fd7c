"""What a MODEL holds in memory and what of it a run leaves out, in words."""

from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..sd3_core.models.vae import VAEConfig
from ..sd3_core.speed import stripes
from ..sd3_core.speed.modulation import bytes_of, is_tabled
from ..sd3_core.speed.prompts import users_cache
from ._compat import inference_dtype, schema
from .comfy_model import ComfyMMDiT
from .comfy_table import obstacle
from .errors import coded
from .wires import CATEGORY, LATENT_FACTOR, report, widths_of

MIB = 2**20


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
            plan = {**weights(model, steps), **prompts(), **decoding(width, height)}
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
        "without_table": obstacle(model) if ours else "it was not loaded by SD3 Workbench",
        "table_mib": mib(bytes_of(network, dtype, 2 * steps)) if ours else None,
        "rows_held": len(tabled.network.table.rows) if tabled else 0,
        "calls": tabled.calls if tabled else 0,
        "passes": tabled.network.table.passes if tabled else 0,
    }


def prompts() -> dict[str, Any]:
    cache = users_cache()
    return {"known_prompts": None if cache is None else len(cache)}


def decoding(width: int, height: int) -> dict[str, Any]:
    """With the released VAE, which is that of every SD3 model."""
    dtype = comfy.model_management.vae_dtype(comfy.model_management.vae_device())
    shape = (1, 16, height // LATENT_FACTOR, width // LATENT_FACTOR)
    config = VAEConfig()
    large = stripes.is_large(config, shape, dtype)
    return {
        "width": width,
        "height": height,
        "decode_mib": mib(stripes.memory_needed(config, shape, dtype)) if large else None,
    }


def mib(size: int) -> int:
    return round(size / MIB)


def lines(plan: dict[str, Any]) -> Iterator[str]:
    yield (
        f"MMDiT: {plan['weights_mib']} MiB of weights, computing in {plan['dtype']} on "
        f"{plan['device']}."
    )
    share = f"{plan['modulation_mib']} MiB of them make the modulations"
    if plan["without_table"]:
        yield f"{share}, anew in every step: {plan['without_table']}."
    else:
        leaves = "ComfyUI pages them out" if plan["pages_weights"] else "they stay loaded"
        yield f"{share}, once before a run; then {leaves}."
        yield (
            f"Modulation table: {plan['table_mib']} MiB for this run's steps and two prompts; "
            f"{plan['rows_held']} rows held. So far {plan['calls']} calls of the network took "
            f"{plan['passes']} passes over these layers."
        )
    known = plan["known_prompts"]
    yield "Prompt cache: off." if known is None else f"Prompt cache: {known} prompts on disk."
    size = f"Decoding {plan['width']} x {plan['height']}"
    yield (
        f"{size}: whole."
        if plan["decode_mib"] is None
        else f"{size}: in stripes, about {plan['decode_mib']} MiB of work."
    )
