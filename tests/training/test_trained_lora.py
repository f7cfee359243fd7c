"""A LoRA from a real run, in the programs it is for: diffusers' and ComfyUI's own loaders."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipe import recipe_state_dict
from safetensors.torch import load_file, save_file
from sd3_pack.sd3_core import lora
from sd3_pack.sd3_core.checkpoints.diffusers import to_diffusers
from sd3_pack.sd3_core.checkpoints.load import load_mmdit
from sd3_pack.sd3_core.checkpoints.lora_files import read_lora
from sd3_pack.sd3_core.lora import KINDS
from sd3_pack.sd3_core.models.mmdit import MMDiT
from sd3_pack.sd3_core.training.trainer import train
from tiny import MMDIT_X, shapes_of, with_prefixes
from training_set import write_training_set

DIALECTS = ("comfy", "kohya", "diffusers")
SCRIPT = Path(__file__).parent.parent / "support" / "comfy_mmdit.py"

# Measured: 3e-6, where the change itself reaches 0.3.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The base of a run, with dual attention as in SD3.5 Medium, and its product by dialect."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_training_set(folder)
    base = folder / "base.safetensors"
    state = recipe_state_dict(shapes_of(MMDiT, MMDIT_X), seed=0)
    save_file(with_prefixes({"mmdit": state}), base)
    products = {}
    for dialect in DIALECTS:
        run = replace(
            config,
            run_name=dialect,
            mmdit=base,
            dialect=dialect,
            lora_kinds=KINDS,
            rank=3,
            lora_alpha=1.0,  # a scale of 1/3, which each dialect writes in its own way
            save_dtype="fp16",
        )
        products[dialect] = train(run).product
    return base, products


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(2, 16, 10, 8, generator=draw),
        "timestep": torch.tensor([20.0, 900.0]),
        "context": torch.randn(2, 11, MMDIT_X.context_dim, generator=draw),
        "pooled": torch.randn(2, MMDIT_X.pooled_dim, generator=draw),
    }


@pytest.fixture(scope="module")
def ours(trained, inputs) -> dict[str, torch.Tensor]:
    """Velocities by the file's name: of the base, and with each LoRA."""
    base, products = trained
    model = load_mmdit(base)
    with torch.no_grad():
        found = {base.name: model(*inputs.values())}
        for path in products.values():
            with lora.attached(model, [(read_lora(path).parts["mmdit"], 1.0)]):
                found[path.name] = model(*inputs.values())
    return found


def change(velocities: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return velocities[name] - velocities["base.safetensors"]


def test_every_dialect_changes_the_model_alike(trained, ours):
    first, *others = (change(ours, path.name) for path in trained[1].values())
    assert first.abs().max() > 0.05  # it has learnt something
    for other in others:  # diffusers multiplies the scale in, and fp16 then rounds otherwise
        torch.testing.assert_close(other, first, rtol=0, atol=2e-3 * first.abs().max().item())


def test_comfyui_loads_the_trained_lora_and_changes_as_much(tmp_path, trained, inputs, ours):
    checkout = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
    if not (checkout / "comfy" / "sd.py").is_file():
        pytest.skip("NO COMFYUI: set COMFYUI_PATH to its folder to load trained LoRAs with it")
    base, products = trained
    save_file(inputs, tmp_path / "inputs")
    models = [base, *(f"{base}={path}" for path in products.values())]
    ran = subprocess.run(
        [sys.executable, SCRIPT, checkout, tmp_path / "inputs", tmp_path / "out", *models],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "not loaded" not in (ran.stdout + ran.stderr).lower()  # as it warns of unknown keys
    theirs = load_file(tmp_path / "out")
    for path in products.values():
        expected = change(ours, path.name)
        torch.testing.assert_close(change(theirs, path.name), expected, rtol=0, atol=TOLERANCE)


def test_diffusers_loads_the_trained_lora_and_changes_as_much(trained, inputs, ours):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle of this test")
    pytest.importorskip("peft", reason="diffusers needs peft to load a LoRA")
    base, products = trained
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=16,
        num_layers=MMDIT_X.depth,
        attention_head_dim=64,
        num_attention_heads=MMDIT_X.depth,
        joint_attention_dim=MMDIT_X.context_dim,
        caption_projection_dim=MMDIT_X.hidden_size,
        pooled_projection_dim=MMDIT_X.pooled_dim,
        pos_embed_max_size=MMDIT_X.pos_embed_max_size,
        qk_norm="rms_norm",
        dual_attention_layers=MMDIT_X.dual_attention_layers,
    ).eval()
    theirs.load_state_dict(to_diffusers("mmdit", load_mmdit(base).state_dict()), strict=True)

    def velocity() -> torch.Tensor:
        x, timestep, context, pooled = inputs.values()
        with torch.no_grad():
            return theirs(x, context, pooled, timestep).sample

    path = products["diffusers"]
    velocities = {base.name: velocity()}
    pipeline = diffusers.StableDiffusion3Pipeline
    state = pipeline.lora_state_dict(path.parent, weight_name=path.name)
    pipeline.load_lora_into_transformer(state, theirs)
    velocities[path.name] = velocity()
    adapted = [name for name, module in theirs.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == sum(key.endswith("lora_A.weight") for key in state)
    expected = change(ours, path.name)
    torch.testing.assert_close(change(velocities, path.name), expected, rtol=0, atol=TOLERANCE)
