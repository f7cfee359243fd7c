"""Workflows in API form for tests of a running server."""

from typing import Any

EMBEDDED = "SD3 Tiny (built-in: draws coloured shapes)"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def text_to_image(
    checkpoint: str = EMBEDDED,
    prompt: str = "a red circle",
    steps: int = 4,
    seed: int = 1,
    pixels: int = 64,
    batch_size: int = 1,
    output: str = "test",
) -> dict[str, Any]:
    """Our nodes from loader to saved picture; change it at will, it is made anew each time."""
    nodes = {
        "load": ("SD3LoadCheckpoint", {"ckpt_name": checkpoint}),
        "prompt": ("SD3EncodePrompt", {"clip": ["load", 1], "prompt": prompt, "negative": ""}),
        "empty": (
            "SD3EmptyLatent",
            {
                "aspect": "custom",
                "width": pixels,
                "height": pixels,
                "batch_size": batch_size,
                "model": ["load", 0],
            },
        ),
        "schedule": (
            "SD3ShiftSchedule",
            {"steps": steps, "shift": 3.0, "scheduler": "normal", "denoise": 1.0},
        ),
        "sample": (
            "SD3Sample",
            {
                "model": ["load", 0],
                "positive": ["prompt", 0],
                "negative": ["prompt", 1],
                "latent_image": ["empty", 0],
                "sigmas": ["schedule", 0],
                "seed": seed,
                "cfg": 4.5,
                "sampler_name": "dpmpp_2m",
            },
        ),
        "decode": ("SD3VAEDecode", {"samples": ["sample", 0], "vae": ["load", 2]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": output}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
