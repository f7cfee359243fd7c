"""Run by a test in a process of its own: ComfyUI's reading of denoiser files, one forward each.

python comfy_mmdit.py CHECKOUT INPUTS.safetensors OUT.safetensors FILE...
INPUTS holds x, timestep, context and pooled; OUT gets the velocity of each FILE under its name.
A FILE written as MODEL=LORA is the model with the LoRA at strength 1; its name is then the LoRA's.
"""

import sys
from pathlib import Path


def main(checkout: str, inputs: str, out: str, *files: str) -> None:
    sys.path.insert(0, checkout)
    sys.argv = sys.argv[:1]
    from comfy.cli_args import args

    args.cpu = True
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    import torch
    from safetensors.torch import load_file, save_file

    given = load_file(inputs)
    velocities = {}
    for file in files:
        file, _, lora = file.partition("=")
        state, metadata = comfy.utils.load_torch_file(file, return_metadata=True)
        patcher = comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata)
        if lora:
            tensors = comfy.utils.load_torch_file(lora)
            patcher, _ = comfy.sd.load_lora_for_models(patcher, None, tensors, 1.0, 0.0)
        comfy.model_management.load_models_gpu([patcher])
        model = patcher.model.diffusion_model
        dtype = patcher.model.get_dtype_inference()
        with torch.no_grad():
            velocity = model(
                given["x"].to(dtype),
                given["timestep"],
                context=given["context"].to(dtype),
                y=given["pooled"].to(dtype),
            )
        velocities[Path(lora or file).name] = velocity.float().contiguous()
    save_file(velocities, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
