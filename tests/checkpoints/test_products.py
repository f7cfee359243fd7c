"""How the products of scaled fp8 layers are meant: read from every spelling, kept by an export."""

import json

import pytest
import torch
from safetensors.torch import save_file
from sd3_pack.sd3_core.checkpoints.layouts import find_components
from sd3_pack.sd3_core.checkpoints.products import Product, read_products
from sd3_pack.sd3_core.checkpoints.save import export_checkpoint
from sd3_pack.sd3_core.errors import CheckpointError
from tiny import quantised, tiny_state_dicts

LAYER = "joint_blocks.0.x_block.attn.qkv"
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def state():
    return tiny_state_dicts(["mmdit"])["mmdit"]


def component(folder, tensors, prefix="", metadata=None):
    path = folder / "scaled.safetensors"
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path, metadata)
    return find_components(path)["mmdit"]


def noted(tensors, **more):
    text = json.dumps({"format": "float8_e4m3fn", **more}).encode()
    return {**tensors, f"{LAYER}.comfy_quant": torch.tensor(list(text), dtype=torch.uint8)}


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_note_speaks_for_its_layer(tmp_path, state, prefix):
    stored = noted(quantised(state, "comfy_quant")[0], full_precision_matrix_mult=True)
    found = read_products(component(tmp_path, stored, prefix))
    assert [name for name, product in found.items() if product.full_precision] == [LAYER]
    assert len(found) == sum(name.endswith("weight_scale") for name in stored)


@pytest.mark.parametrize(("elements", "full"), [(2, True), (1, False), (0, False)])
def test_a_marker_of_two_elements_speaks_for_all(tmp_path, state, elements, full):
    stored, _ = quantised(state, "scale_weight")
    stored["scaled_fp8"] = torch.zeros(elements).to(torch.float8_e4m3fn)
    found = read_products(component(tmp_path, stored, PREFIX))
    assert {product.full_precision for product in found.values()} == {full}


def test_the_files_metadata_goes_before_both(tmp_path, state):
    stored, _ = quantised(state, "comfy_quant")
    stored["scaled_fp8"] = torch.zeros(2)
    layers = {PREFIX + LAYER: {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    found = read_products(component(tmp_path, stored, PREFIX, metadata))
    assert [name for name, product in found.items() if product.full_precision] == [LAYER]


@pytest.mark.parametrize("name", ["input_scale", "scale_input"])
def test_an_inputs_scale_is_read_and_exported(tmp_path, state, name):
    stored = noted(quantised(state, "comfy_quant")[0], full_precision_matrix_mult=True)
    stored[f"{LAYER}.{name}"] = torch.tensor([0.25], dtype=torch.bfloat16)
    part = component(tmp_path, stored)
    again = find_components(export_checkpoint(tmp_path / "out.safetensors", {"mmdit": part}))
    for found in (read_products(part), read_products(again["mmdit"])):
        assert found[LAYER] == Product(True, torch.tensor(0.25))
        assert sum(product.input_scale is not None for product in found.values()) == 1


def test_what_makes_no_sense_is_refused(tmp_path, state):
    stored, _ = quantised(state, "comfy_quant")
    for changed, message in (
        ({f"{LAYER}.comfy_quant": torch.ones(3, dtype=torch.uint8)}, "is no JSON"),
        ({f"{LAYER}.input_scale": torch.ones(3)}, r"is \[3\] of torch.float32, where one number"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_products(component(tmp_path, {**stored, **changed}))
    for text, message in (("{", "is no JSON"), ("[]", "names no layers")):
        with pytest.raises(CheckpointError, match=message):
            read_products(component(tmp_path, stored, "", {"_quantization_metadata": text}))
