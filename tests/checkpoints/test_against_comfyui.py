"""The same denoiser files through ComfyUI's own loader: the same velocity."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sd3_pack.sd3_core.checkpoints.layouts import find_components
from sd3_pack.sd3_core.checkpoints.load import load_mmdit
from sd3_pack.sd3_core.checkpoints.save import export_checkpoint
from tiny import quantised, tiny_state_dicts, with_prefixes, write_tiny_checkpoint

SCRIPT = Path(__file__).parent.parent / "support" / "comfy_mmdit.py"
STATE = tiny_state_dicts(("mmdit",))["mmdit"]


def comfyui() -> Path:
    place = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
    if not (place / "comfy" / "sd.py").is_file():
        pytest.skip("NO COMFYUI: set COMFYUI_PATH to its folder to hold the loaders against it")
    return place


def write_files(folder: Path) -> list[Path]:
    """A file for each way in which a denoiser may be stored."""
    written = []

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        written.append(folder / f"{name}.safetensors")
        save_file(tensors, written[-1])

    write("bare", STATE)
    write("prefixed", with_prefixes({"mmdit": STATE}))
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        write(str(dtype), {key: tensor.to(dtype) for key, tensor in STATE.items()})
    write("scale_weight", quantised(STATE, "scale_weight")[0])
    write("comfy_quant", quantised(STATE, "comfy_quant")[0])
    write("comfy_quant_e5m2", quantised(STATE, "comfy_quant", torch.float8_e5m2)[0])
    source = find_components(folder / "scale_weight.safetensors")
    written.append(export_checkpoint(folder / "exported_scaled.safetensors", source))
    write_tiny_checkpoint(folder / "diffusers", layout="diffusers", parts=("mmdit",))
    source = find_components(folder / "diffusers")
    written.append(export_checkpoint(folder / "exported_diffusers.safetensors", source))
    twin = folder / "diffusers_file.safetensors"
    (folder / "diffusers" / "transformer" / "diffusion_pytorch_model.safetensors").rename(twin)
    return [*written, twin]


def test_comfyui_computes_the_same_velocity_from_every_file(tmp_path):
    checkout = comfyui()
    files = write_files(tmp_path)
    draw = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(2, 16, 10, 8, generator=draw),
        "timestep": torch.tensor([20.0, 900.0]),
        "context": torch.randn(2, 11, 224, generator=draw),
        "pooled": torch.randn(2, 160, generator=draw),
    }
    save_file(inputs, tmp_path / "inputs")
    subprocess.run(
        [sys.executable, SCRIPT, checkout, tmp_path / "inputs", tmp_path / "out", *files],
        check=True,
        capture_output=True,
        timeout=300,
    )
    theirs = load_file(tmp_path / "out")
    for file in files:
        with torch.no_grad():
            ours = load_mmdit(file, dtype=torch.float32)(*inputs.values())
        # Measured: 2.3e-6 at most; the golden tolerance of the MMDiT.
        torch.testing.assert_close(ours, theirs[file.name], rtol=0, atol=2e-5, msg=file.name)
