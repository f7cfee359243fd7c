"""The released sizes in ComfyUI on cards that are too small for them: python comfy_on_card.py CASES

CASES: a JSON list of {model, arm, gigabytes, vram, dynamic, side}.  Prints a JSON list of outcomes.
A process of its own: ComfyUI decides once which card there is.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import load_pack  # noqa: F401
import torch
from pretend_card import Card, pretend_card
from pretend_card.vram import dynamic_vram
from released import write_denoiser, write_other
from step_counts import COMFYUI, Watch, load_native, load_ours, sample, start_comfyui

GIB = 2**30
VRAM = {"normal": "NORMAL_VRAM", "low": "LOW_VRAM", "no": "NO_VRAM"}


def run(card: Card, folder: Path, case: dict) -> dict:
    """Load, sample four guided steps, decode; what was carried in the third step, and the rest."""
    import comfy.model_management as manager

    card.capacity = int(case["gigabytes"] * GIB)
    manager.total_vram = case["gigabytes"] * 1024
    manager.vram_state = manager.VRAMState[VRAM[case.get("vram", "normal")]]
    dynamic, side = case.get("dynamic"), case.get("side", 1024)
    outcome = dict(case)
    managed = contextlib.nullcontext() if dynamic is None else dynamic_vram(dynamic)
    try:
        with managed as ranges:
            load = load_native if case.get("arm") == "native" else load_ours
            model = load(write_denoiser(folder, case["model"]))
            watch = Watch(card)
            sample(model, watch, (1, 16, side // 8, side // 8))
            part = watch.seen[2][0].since(watch.seen[1][0])
            outcome |= {
                "carried": round(part.carried / GIB, 3),
                "launches": part.launches,
                "waits": dict(part.waits),
                "peak": round(max(high for _, high in watch.seen) / GIB, 2),
            }
            if ranges is not None:
                outcome["idle"] = round(idle(model, ranges.newest) / GIB, 3)
            del model, watch, ranges
        if dynamic is None:
            decode(folder, side)
        outcome["fits"] = True
    except torch.OutOfMemoryError as error:
        outcome |= {"fits": False, "error": str(error)}
    manager.reset_cast_buffers()  # as its executor does behind each node
    manager.unload_all_models()
    manager.cleanup_models_gc()
    gc.collect()
    return outcome | {"left": card.live}


def idle(model, addresses) -> int:
    """Bytes of weights on the card that the modulation table stands in for."""
    from sd3_pack.sd3_core.speed.modulation import is_tabled

    modules = model.model.diffusion_model.named_modules()
    places = [m._v for name, m in modules if hasattr(m, "_v") and is_tabled(f"{name}.weight")]
    return sum(size for _, place, size in places if addresses.holds(place, size))


def decode(folder: Path, side: int) -> None:
    from sd3_pack.nodes.comfy_model import SD3VAE
    from sd3_pack.sd3_core.checkpoints.load import component_of

    vae = SD3VAE(component_of(write_other(folder, "vae"), "vae"))
    vae.decode(torch.zeros(1, 16, side // 8, side // 8))


def outcomes(cases: list[dict]) -> list[dict]:
    """From a process of its own."""
    command = [sys.executable, __file__, json.dumps(cases)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main(cases: list[dict]) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        pretend_card(24, numbers=False, kernels=True) as card,
        torch.inference_mode(),
    ):
        start_comfyui()
        found = [run(card, Path(folder), case) for case in cases]
        sys.stdout.write("\n" + json.dumps(found) + "\n")


__all__ = ["COMFYUI", "outcomes"]

if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
