"""Run by a test in a process of its own: ComfyUI's arithmetic on a LoRA file.

python comfy_lora.py CHECKOUT FOLDER
Each FOLDER/*.job holds `base.<module>.<parameter>` and a LoRA's tensors as `lora.<key>`, under
ComfyUI's own names, `diffusion_model.<module>`; its metadata has the strength.  The patched weights
go to a file that ends in `.out`.
"""

import sys
from pathlib import Path


def main(checkout: str, folder: str) -> None:
    sys.path.insert(0, checkout)
    sys.argv = sys.argv[:1]
    from comfy.cli_args import args

    args.cpu = True
    import comfy.lora
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for job in Path(folder).glob("*.job"):
        with safe_open(job, "pt") as file:
            strength = float(file.metadata()["strength"])
        tensors = load_file(job)
        base = {key[5:]: value for key, value in tensors.items() if key.startswith("base.")}
        file_keys = {key[5:]: value for key, value in tensors.items() if key.startswith("lora.")}
        weights = [key for key in base if key.endswith(".weight")]
        names = {f"diffusion_model.{key.removesuffix('.weight')}": key for key in weights}
        patched = {
            key: comfy.lora.calculate_weight([(strength, patch, 1.0, None, None)], base[key], key)
            for key, patch in comfy.lora.load_lora(file_keys, names).items()
        }
        out = {key: value.contiguous() for key, value in patched.items()}
        save_file(out, job.with_suffix(".out"))


if __name__ == "__main__":
    main(*sys.argv[1:])
