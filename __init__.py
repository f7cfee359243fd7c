"""SD3 Workbench: Stable Diffusion 3 and 3.5 as a library (`sd3_core`) and as ComfyUI nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls; nothing of it is imported before, so the pack is harmless elsewhere."""
    from .nodes import SD3Extension

    return SD3Extension()
