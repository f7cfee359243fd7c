"""SD3 Workbench: Stable Diffusion 3 and 3.5 as a library (`sd3_core`) and as ComfyUI nodes."""
