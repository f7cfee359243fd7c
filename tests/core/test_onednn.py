"""The linear layer through oneDNN: the same numbers, never past a hook or a trained weight."""

import pytest
import torch
import torch.nn.functional as F
from sd3_pack.sd3_core.models import onednn
from torch import nn

needs_onednn = pytest.mark.skipif(not onednn.AVAILABLE, reason="this torch has no oneDNN")


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return onednn.Linear(96, 40)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "x",
    [drawn(96), drawn(5, 96), drawn(2, 7, 96), drawn(2, 96, 7).mT, drawn(2, 9, 96)[:, 2:5]],
    ids=["vector", "rows", "tokens", "transposed", "slice"],
)
def test_it_multiplies_as_torch_does(x, bias):
    weight, added = drawn(40, 96), drawn(40) if bias else None
    with torch.no_grad():
        out = onednn.linear(x, weight, added)
    torch.testing.assert_close(out, F.linear(x, weight, added), rtol=1e-5, atol=1e-4)


def test_gelu_inside_the_multiplication_is_gelu_behind_it(layer):
    x = drawn(2, 7, 96)
    with torch.no_grad():
        fused = onednn.linear_gelu(layer, x)
    torch.testing.assert_close(fused, F.gelu(layer(x), approximate="tanh"), rtol=0, atol=2e-6)


def test_gradients_pass_through_torchs_own_layer(layer):
    x = drawn(2, 96).requires_grad_()
    assert not onednn.serves(x, layer.weight)
    (onednn.linear_gelu(layer, x).sum() + layer(x).sum()).backward()
    assert x.grad is not None
    assert layer.weight.grad is not None


@needs_onednn
def test_it_serves_float32_without_gradients(layer):
    with torch.inference_mode():
        assert onednn.serves(drawn(2, 96), layer.weight)
        assert not onednn.serves(drawn(2, 96, dtype=torch.bfloat16), layer.weight.bfloat16())


@torch.no_grad()
def test_a_hook_on_the_layer_acts_before_gelu(layer):
    """So does an attached LoRA, which is one."""
    x = drawn(3, 96)
    layer.register_forward_hook(lambda layer, inputs, out: out + 1)
    expected = F.gelu(F.linear(x, layer.weight, layer.bias) + 1, approximate="tanh")
    torch.testing.assert_close(onednn.linear_gelu(layer, x), expected, rtol=0, atol=2e-6)


@torch.no_grad()
def test_any_other_layer_runs_as_it_stands():
    layer = nn.Sequential(nn.Linear(96, 8))
    x = drawn(3, 96)
    expected = F.gelu(layer(x), approximate="tanh")
    torch.testing.assert_close(onednn.linear_gelu(layer, x), expected, rtol=0, atol=0)


def test_the_namespace_has_the_layers_of_torch():
    for name in ("Conv2d", "Embedding", "LayerNorm", "GroupNorm", "RMSNorm"):
        assert getattr(onednn.Ops, name) is getattr(nn, name)


@needs_onednn
@pytest.mark.parametrize("shape", [(5, 96), (2, 7, 96)], ids=["rows", "tokens"])
def test_a_frozen_layer_passes_on_the_gradient_of_its_input(layer, shape):
    layer.requires_grad_(False)
    ours, theirs = (drawn(*shape).requires_grad_() for _ in range(2))
    assert onednn.serves(ours, layer.weight, layer.bias)
    out, expected = layer(ours), F.linear(theirs, layer.weight, layer.bias)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weights = drawn(*out.shape)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_a_layer_whose_bias_is_trained_is_torchs(layer):
    layer.weight.requires_grad_(False)
    x = drawn(2, 96)
    assert not onednn.serves(x, layer.weight, layer.bias)
    layer(x).sum().backward()
    assert layer.bias.grad is not None


def test_gelu_behind_a_frozen_layer_has_a_gradient(layer):
    layer.requires_grad_(False)
    x = drawn(2, 96).requires_grad_()
    onednn.linear_gelu(layer, x).sum().backward()
    assert x.grad is not None
