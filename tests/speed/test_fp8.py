"""float8 products: the arithmetic on a CPU by its definition, the kernel where a GPU has it."""

import pytest
import torch
from build import with_recipe_weights
from sd3_pack.sd3_core import lora
from sd3_pack.sd3_core.adapters.changes import Adapter, LowRank
from sd3_pack.sd3_core.embedded.model import FILE
from sd3_pack.sd3_core.generate import generate
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from sd3_pack.sd3_core.settings import Files, Settings
from sd3_pack.sd3_core.speed import fp8
from sd3_pack.sd3_core.speed.fp8 import Float8Linear, in_float8, multiply, quantise
from torch.testing import assert_close

CONFIG = MMDiTConfig(
    depth=2, context_dim=32, pooled_dim=16, pos_embed_max_size=8, dual_attention_layers=(0,)
)


def by_definition(x, x_scale, weight, weight_scale, bias, dtype):
    """What the kernel computes."""
    product = (x.float() * x_scale) @ (weight.float() * weight_scale).t()
    product = product.to(torch.bfloat16).to(dtype)
    return product if bias is None else product + bias.to(product)


@pytest.fixture
def on_cpu(monkeypatch):
    """This machine's CPU stands in for a GPU that multiplies float8 rows."""
    monkeypatch.setattr(fp8, "multiply", by_definition)
    monkeypatch.setattr(fp8, "obstacle", lambda device: "")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_each_row_uses_all_of_float8():
    x = random(6, 32) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6, 0.0])[:, None]
    rows, scale = quantise(x)
    assert rows.dtype == torch.float8_e4m3fn
    assert_close(rows.float().abs().amax(dim=1)[:5], torch.full((5,), 448.0))
    again = rows.float() * scale
    assert (again - x).abs().amax(dim=1).le(x.abs().amax(dim=1) / 16).all()
    assert torch.equal(again[5], x[5])


def test_a_layer_is_near_to_the_one_it_stands_in_for(on_cpu):
    weight, bias, x = random(48, 64), random(48, seed=1), random(2, 5, 64, seed=2)
    exact = torch.nn.functional.linear(x, weight, bias)
    product = Float8Linear(weight, bias)(x)
    assert product.shape == exact.shape
    error = (product - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-3 < error < 0.05


def test_the_image_streams_large_layers_change_and_nothing_else():
    model = with_recipe_weights(MMDiT, CONFIG, 7)
    blocks = in_float8(model.joint_blocks)
    changed = {n for n, layer in blocks.named_modules() if isinstance(layer, Float8Linear)}
    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"{i}.x_block.{name}" for i in range(2) for name in names}
    assert changed == expected | {"0.x_block.attn2.qkv", "0.x_block.attn2.proj"}
    assert not any(isinstance(layer, Float8Linear) for layer in model.modules())
    assert blocks[0].context_block is model.joint_blocks[0].context_block


def test_a_layer_with_an_attached_lora_runs_as_it_stands():
    model = with_recipe_weights(MMDiT, CONFIG, 7)
    path = "joint_blocks.1.x_block.attn.proj"
    change = LowRank(random(2, 128), random(128, 2), 2.0)
    with lora.attached(model, [((Adapter(path, change),), 0.5)]):
        attn = in_float8(model.joint_blocks)[1].x_block.attn
        assert attn.proj is model.joint_blocks[1].x_block.attn.proj
        assert isinstance(attn.qkv, Float8Linear)


def test_the_embedded_model_draws_in_float8_at_a_measured_distance(on_cpu):
    # Over more steps the slightest change may put a whole thing somewhere else.
    wanted = Settings("a red circle", seed=1, device="cpu", steps=2, fp8=True)
    result = generate(Files(checkpoint=FILE), wanted, measure=True)
    assert 1e-3 < result.distance < 0.2
    assert {gain.name: gain.active for gain in result.gains}["fp8"]


def test_a_device_without_it_is_refused_in_one_sentence_before_the_run():
    wanted = Settings("a red circle", device="cpu", fp8=True)
    with pytest.raises(ValueError, match="fp8 needs an NVIDIA GPU .* computes on cpu. Leave fp8"):
        generate(Files(checkpoint=FILE), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_computes_the_definition():
    if why := fp8.obstacle("cuda"):
        pytest.skip(why)
    x, weight = random(37, 64).cuda(), random(48, 64, seed=1).cuda()
    given = (*quantise(x), *quantise(weight), random(48, seed=2).cuda(), torch.float32)
    assert_close(multiply(*given), by_definition(*given), atol=2e-2, rtol=1e-2)
