"""The network that is trained: its first weights, qk norm, float32 copies."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import save_file
from sd3_pack.sd3_core.checkpoints.layouts import find_components
from sd3_pack.sd3_core.checkpoints.load import load_mmdit
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig, position_table
from sd3_pack.sd3_core.training.networks import (
    add_qk_norm,
    initialise,
    load_to_train,
    recompute_blocks,
)
from sd3_pack.sd3_core.training.objectives import RectifiedFlow
from tiny import quantised, tiny_state_dicts, with_prefixes, write_tiny_checkpoint

SIZE = MMDiTConfig(
    depth=2,
    context_dim=48,
    pooled_dim=32,
    pos_embed_max_size=12,
    qk_norm=True,
    dual_attention_layers=(0,),
)


@pytest.fixture
def new():
    model = MMDiT(SIZE)
    initialise(model, base=8, seed=3)
    return model


def given(size: MMDiTConfig):
    torch.manual_seed(1)
    context, pooled = torch.randn(4, 7, size.context_dim), torch.randn(4, size.pooled_dim)
    return torch.randn(4, 16, 8, 8), torch.tensor([1.0, 300.0, 600.0, 999.0]), context, pooled


def test_a_new_network_says_zero(new):
    assert new(*given(SIZE)).abs().max() == 0


def test_its_first_loss_is_the_power_of_the_velocity(new):
    x0, timestep, context, pooled = given(SIZE)
    noise = torch.randn_like(x0)
    loss = RectifiedFlow().loss(lambda x, t: new(x, t, context, pooled), x0, noise, timestep / 1000)
    torch.testing.assert_close(loss, (noise - x0).pow(2).flatten(1).mean(1))
    assert 1.7 < loss.mean() < 2.3  # 2 for latents of unit variance


def test_every_block_of_a_new_network_is_the_identity(new):
    tokens = new.embed(*given(SIZE))
    after = new.run_blocks(tokens, range(SIZE.depth))
    assert torch.equal(after.x, tokens.x)


def test_its_position_table_is_the_canonical_one(new):
    assert torch.equal(new.pos_embed, position_table(128, 12, 8))


def test_first_weights_follow_from_the_seed(new):
    same, other = MMDiT(SIZE), MMDiT(SIZE)
    initialise(same, base=8, seed=3)
    initialise(other, base=8, seed=4)
    state = new.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in same.state_dict().items())
    name = "joint_blocks.0.x_block.attn.qkv.weight"
    assert not torch.equal(state[name], other.state_dict()[name])


def test_a_new_network_learns_every_weight_but_what_nothing_depends_on(new):
    """adaLN and the last layer are zero, so gradients reach the rest step by step."""
    optimizer = torch.optim.AdamW(new.parameters(), lr=1e-2)
    x0, timestep, context, pooled = given(SIZE)
    for _ in range(6):
        optimizer.zero_grad()
        (new(x0, timestep, context, pooled) - x0).pow(2).mean().backward()
        optimizer.step()
    still = [n for n, p in new.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == ["joint_blocks.1.context_block.attn.ln_q.weight"]


def test_added_qk_norm_has_weights_of_one_and_is_trained():
    model = MMDiT(MMDiTConfig(depth=2, context_dim=48, pooled_dim=32, pos_embed_max_size=12))
    initialise(model, base=8, seed=0)
    add_qk_norm(model)
    assert model.config.qk_norm
    norms = [p for name, p in model.named_parameters() if ".ln_" in name]
    assert len(norms) == 8
    assert all(torch.equal(norm, torch.ones(64)) for norm in norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_to_train_is_float32_and_computes_in_its_input_s_dtype(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    write_tiny_checkpoint(path, ["mmdit"], dtype=torch.bfloat16)
    model = load_to_train(find_components(path)["mmdit"], torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    x, timestep, context, pooled = given(model.config)
    out = model(x.to(dtype), timestep, context.to(dtype), pooled.to(dtype))
    assert out.dtype == dtype
    out.float().pow(2).mean().backward()
    assert model.final_layer.linear.weight.grad.dtype == torch.float32
    expected = load_mmdit(path, dtype=torch.float32)(x, timestep, context, pooled)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1 * float(expected.abs().max())
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=tolerance)


def test_scaled_fp8_weights_are_not_trained_on(tmp_path):
    state, _ = quantised(tiny_state_dicts(["mmdit"])["mmdit"], "comfy_quant")
    save_file(with_prefixes({"mmdit": state}), tmp_path / "fp8.safetensors")
    with pytest.raises(ValueError, match="too coarse to be trained on"):
        load_to_train(find_components(tmp_path / "fp8.safetensors")["mmdit"], torch.device("cpu"))


@pytest.mark.parametrize("random", [False, True])
def test_a_recomputed_network_gives_the_same_and_leaves_when_nobody_holds_it(new, random):
    def gradients(model):
        model.zero_grad()
        model(*given(SIZE)).square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model = MMDiT(SIZE)
    model.load_state_dict(new.state_dict())
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    before = gradients(model)
    recompute_blocks(model, random=random)
    after = gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    seen, enabled = weakref.ref(model.joint_blocks[0]), gc.isenabled()
    gc.disable()  # a circle would wait for the collector, and memory with it
    try:
        del model
        assert seen() is None
    finally:
        if enabled:
            gc.enable()
