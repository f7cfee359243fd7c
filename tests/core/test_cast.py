"""Layers that keep their weights as stored: the numbers of the converted layer, gradients too."""

import pytest
import torch
import torch.nn.functional as F
from sd3_pack.sd3_core.models.cast import CastOps, Embedding, cast
from sd3_pack.sd3_core.models.onednn import Ops, linear

STORED = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
COMPUTED = [torch.float32, torch.bfloat16, torch.float16]


def pair(name: str, *sizes: int, stored: torch.dtype, computed: torch.dtype):
    """The same layer twice: with stored weights that are cast, and converted once."""
    torch.manual_seed(0)
    layer = getattr(CastOps(computed), name)(*sizes)
    converted = getattr(Ops, name)(*sizes)
    state = {key: torch.randn(value.shape).to(stored) for key, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    converted.load_state_dict({k: v.to(computed) for k, v in state.items()}, assign=True)
    return layer.requires_grad_(False), converted.requires_grad_(False)


def sample(shape, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("computed", COMPUTED)
@pytest.mark.parametrize(
    ("name", "sizes", "shape"),
    [
        ("Linear", (6, 4), (2, 3, 6)),
        ("Conv2d", (4, 6, 3), (1, 4, 5, 5)),
        ("LayerNorm", (8,), (2, 3, 8)),
        ("RMSNorm", (8,), (2, 3, 8)),
        ("GroupNorm", (2, 8), (2, 8, 3, 3)),
    ],
)
def test_a_cast_layer_equals_the_converted_one(name, sizes, shape, stored, computed):
    layer, converted = pair(name, *sizes, stored=stored, computed=computed)
    x = sample(shape, computed)
    assert layer(x).dtype == computed
    assert layer(x).equal(converted(x))
    assert layer.weight.dtype == stored


@pytest.mark.parametrize("stored", STORED)
def test_embedding_gives_the_dtype_of_the_computation(stored):
    layer, converted = pair("Embedding", 7, 4, stored=stored, computed=torch.bfloat16)
    ids = torch.tensor([[0, 6, 3]])
    assert layer(ids).dtype == torch.bfloat16
    assert layer(ids).equal(converted(ids))


def test_a_norm_without_weights_is_left_alone():
    x = sample((2, 8), torch.float32)
    layer = CastOps().LayerNorm(8, elementwise_affine=False)
    assert layer(x).equal(F.layer_norm(x, (8,)))


@pytest.mark.parametrize("scale", [torch.tensor(0.37), torch.linspace(0.1, 2, 4)[:, None]])
@pytest.mark.parametrize("computed", COMPUTED)
def test_a_scale_multiplies_the_weight_before_it_is_rounded(scale, computed):
    layer, _ = pair("Linear", 6, 4, stored=torch.float8_e4m3fn, computed=computed)
    layer.set_scale(scale)
    x = sample((3, 6), computed)
    weight = (layer.weight.float() * scale).to(computed)
    assert layer(x).equal(linear(x, weight, layer.bias.to(computed)))


def test_an_embedding_s_rows_have_their_own_scales():
    layer, _ = pair("Embedding", 5, 4, stored=torch.float8_e4m3fn, computed=torch.float32)
    scale = torch.linspace(0.5, 2, 5)[:, None]
    layer.set_scale(scale)
    ids = torch.tensor([[4, 0], [1, 1]])
    assert layer(ids).equal((layer.weight.float() * scale)[ids])


def test_the_scale_is_no_part_of_the_state_dict_and_moves_with_the_layer():
    layer, _ = pair("Linear", 6, 4, stored=torch.float8_e4m3fn, computed=torch.float32)
    layer.set_scale(torch.tensor(2.0))
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert layer.to("meta").scale.device.type == "meta"


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("scaled", [False, True])
def test_gradient_flows_to_the_input_as_through_the_converted_layer(stored, scaled):
    layer, _ = pair("Linear", 6, 4, stored=stored, computed=torch.float32)
    weight = layer.weight.float()
    if scaled:
        layer.set_scale(torch.tensor(0.3))
        weight = weight * torch.tensor(0.3)
    x = sample((2, 3, 6), torch.float32).requires_grad_()
    y = x.detach().clone().requires_grad_()
    grad = sample((2, 3, 4), torch.float32)
    layer(x).backward(grad)
    F.linear(y, weight, layer.bias.float()).backward(grad)
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-6)


def test_the_backward_pass_keeps_no_cast_copy():
    layer, _ = pair("Linear", 6, 4, stored=torch.bfloat16, computed=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(sample((3, 6), torch.float32).requires_grad_())
    assert [tensor.dtype for tensor in kept] == [torch.bfloat16]


def test_a_weight_that_is_trained_gets_its_gradient():
    layer, _ = pair("Linear", 6, 4, stored=torch.bfloat16, computed=torch.float32)
    layer.requires_grad_(True)
    layer(sample((3, 6), torch.float32).requires_grad_()).sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None


def test_gradient_passes_norms_convolutions_and_checkpointing():
    for name, sizes, shape in (
        ("Conv2d", (4, 6, 3), (1, 4, 5, 5)),
        ("LayerNorm", (8,), (2, 8)),
        ("RMSNorm", (8,), (2, 8)),
        ("Linear", (6, 4), (2, 6)),
    ):
        layer, converted = pair(name, *sizes, stored=torch.float16, computed=torch.float32)
        x, y = (sample(shape, torch.float32).requires_grad_() for _ in range(2))
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum().backward()
        converted(y).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


def test_a_namespace_remembers_its_own_dtype():
    assert CastOps(torch.float16).Embedding(2, 2).dtype == torch.float16
    assert Embedding(2, 2).dtype == torch.float32


def test_casting_without_need_copies_nothing():
    weight = torch.ones(2, 2)
    assert cast(weight, None, torch.float32) is weight
