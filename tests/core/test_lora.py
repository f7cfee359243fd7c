"""LoRA on a network: laws of attaching, merging, training; peft as oracle."""

import copy

import pytest
import torch
from build import with_recipe_weights
from sd3_pack.sd3_core import lora
from sd3_pack.sd3_core.adapters.changes import Adapter, Difference, LoHa, LoKr, LowRank
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.models import cast
from sd3_pack.sd3_core.models.clip import CLIPConfig, CLIPTextModel
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from sd3_pack.sd3_core.models.t5 import T5Config, T5Encoder
from torch import nn

CONFIG = MMDiTConfig(
    depth=2,
    context_dim=24,
    pooled_dim=16,
    pos_embed_max_size=8,
    qk_norm=True,
    dual_attention_layers=(0,),
)
QKV = "joint_blocks.0.x_block.attn.qkv"  # [384, 128]
PROJ = "joint_blocks.0.x_block.attn.proj"  # [128, 128]
FC1 = "joint_blocks.1.x_block.mlp.fc1"  # [512, 128]
LN_Q = "joint_blocks.0.x_block.attn.ln_q"  # [64]
CONV = "x_embedder.proj"  # [128, 16, 2, 2]
ROUNDING = {"rtol": 0, "atol": 2e-5}  # float32: the sum is taken before or after the product


@pytest.fixture
def model():
    return with_recipe_weights(MMDiT, CONFIG, seed=3)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return normal(2, 16, 6, 8), torch.tensor([700.0, 20.0]), normal(2, 5, 24), normal(2, 16)


def random(*shape, seed=1, scale=0.1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def low_rank(module, outputs, inputs, rank=4, alpha=2.0, **kind):
    up, down = random(outputs, rank, seed=5, scale=0.3), random(rank, inputs, seed=6)
    return Adapter(module, LowRank(down, up, alpha), **kind)


KRON = LoKr(w1=random(4, 8), w2_a=random(32, 3), w2_b=random(3, 16, seed=2), alpha=2.0)
HADA = LoHa(random(384, 3), random(3, 128), random(384, 3, seed=4), random(3, 128, seed=5))
ADAPTERS = {
    "linear": (low_rank(QKV, 384, 128),),
    "alpha missing": (low_rank(QKV, 384, 128, alpha=None),),
    "q, k and v apart": tuple(
        low_rank(QKV, 128, 128, alpha=alpha, rows=(128 * part, 128))
        for part, alpha in enumerate((1.0, 2.0, 3.0))
    ),
    "convolution": (
        Adapter(CONV, LowRank(random(3, 16, 2, 2), random(128, 3, 1, 1, seed=2), 2.0)),
    ),
    "convolution with a core": (
        Adapter(CONV, LowRank(random(3, 16, 1, 1), random(128, 3), 2.0, random(3, 3, 2, 2))),
    ),
    "hadamard": (Adapter(QKV, HADA),),
    "kronecker": (Adapter(PROJ, KRON),),
    "kronecker on rows": (Adapter(QKV, KRON, rows=(128, 128)),),
    "difference": (Adapter(PROJ, Difference(random(128, 128))),),
    "bias": (Adapter(QKV, Difference(random(384)), "bias"),),
    "bias of v": (Adapter(QKV, Difference(random(128)), "bias", rows=(256, 128)),),
    "bias of the convolution": (Adapter(CONV, Difference(random(128)), "bias"),),
    "norm": (Adapter(LN_Q, Difference(random(64))),),
    "dora per output": (low_rank(PROJ, 128, 128, magnitude=1 + random(128, 1)),),
    "dora per input": (low_rank(FC1, 512, 128, magnitude=1 + random(1, 128)),),
    "dora on k": (low_rank(QKV, 128, 128, rows=(128, 128), magnitude=1 + random(1, 128)),),
    "lora, then dora, then a bias": (
        low_rank(PROJ, 128, 128),
        low_rank(PROJ, 128, 128, magnitude=1 + random(128, 1)),
        Adapter(PROJ, Difference(random(128)), "bias"),
    ),
}
every_adapter = pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)


def same_bits(one, other):
    return torch.equal(one, other)


# To use


@every_adapter
@pytest.mark.parametrize("strength", [0.7, -1.2])
def test_merged_equals_attached(model, inputs, adapters, strength):
    base = model(*inputs)
    with lora.attached(model, [(adapters, strength)]):
        attached = model(*inputs)
    lora.merge(model, adapters, strength)
    assert (attached - base).abs().max() > 1e-4
    torch.testing.assert_close(attached, model(*inputs), **ROUNDING)


@every_adapter
def test_leaving_the_block_gives_the_base_back_bit_for_bit(model, inputs, adapters):
    base, keys = model(*inputs), list(model.state_dict())
    weights = copy.deepcopy(model.state_dict())
    with lora.attached(model, [(adapters, 1.0)]):
        assert list(model.state_dict()) == keys
        model(*inputs)
    assert same_bits(model(*inputs), base)
    assert all(same_bits(weights[key], value) for key, value in model.state_dict().items())
    assert not any(layer._forward_hooks for layer in model.modules())


@every_adapter
def test_strength_zero_changes_nothing(model, inputs, adapters):
    base = model(*inputs)
    with lora.attached(model, [(adapters, 0.0)]):
        assert same_bits(model(*inputs), base)
    lora.merge(model, adapters, 0.0)
    assert same_bits(model(*inputs), base)


def test_strength_zero_attaches_nothing(model):
    """Not even what could not be attached, and so no layer pays for it."""
    table = Adapter("", Difference(random(1, 64, 128)), "pos_embed")
    with lora.attached(model, [((table, *ADAPTERS["linear"]), 0.0)]):
        assert not any(layer._forward_hooks for layer in model.modules())


@every_adapter
def test_disabled_is_the_base_bit_for_bit(model, inputs, adapters):
    base = model(*inputs)
    with lora.attached(model, [(adapters, 1.0)]):
        with lora.disabled(model):
            assert same_bits(model(*inputs), base)
            with lora.disabled(model):
                pass
            assert same_bits(model(*inputs), base)
        assert not same_bits(model(*inputs), base)


def test_low_rank_is_up_down_times_alpha_over_rank(model):
    (adapter,) = ADAPTERS["linear"]
    before = model.get_submodule(QKV).weight.clone()
    lora.merge(model, (adapter,), 0.5)
    change = 0.5 * (2.0 / 4) * adapter.change.up @ adapter.change.down
    torch.testing.assert_close(model.get_submodule(QKV).weight, before + change)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=["per output", "per input"])
def test_dora_adds_the_eps_of_float32_to_a_norm_of_zero(shape):
    """As ComfyUI does."""
    eps = torch.finfo(torch.float32).eps
    weight = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    change = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    change[0, 0] = eps if shape == (2, 1) else 0.0  # its norm per output is the weight's, 0
    adapter = Adapter("layer", Difference(change), magnitude=torch.full(shape, 3.0))
    changed = adapter.apply(weight, 1.0)
    expected = torch.tensor([[3.0 if shape == (2, 1) else 0.0, 0.0], [0.0, 3.0]])
    torch.testing.assert_close(changed, expected)


def test_two_loras_add_up_and_are_independent(model, inputs):
    first, second = ADAPTERS["linear"], ADAPTERS["hadamard"]
    with lora.attached(model, [(first, 0.5)]):
        alone = model(*inputs)
        with lora.attached(model, [(second, 0.8)]):
            nested = model(*inputs)
        assert same_bits(model(*inputs), alone)
    with lora.attached(model, [(first, 0.5), (second, 0.8)]):
        assert same_bits(model(*inputs), nested)
    lora.merge(model, first, 0.5)
    lora.merge(model, second, 0.8)
    torch.testing.assert_close(model(*inputs), nested, **ROUNDING)


def test_gradients_flow_through_slices_as_through_the_whole(model, inputs):
    x, *others = inputs

    def gradient():
        leaf = x.clone().requires_grad_()
        model(leaf, *others).square().mean().backward()
        return leaf.grad

    with lora.attached(model, [(ADAPTERS["q, k and v apart"], 1.0)]):
        attached = gradient()
        with torch.no_grad():
            without_graph = model(*inputs)
        with torch.inference_mode():
            assert same_bits(model(*inputs), without_graph)
    lora.merge(model, ADAPTERS["q, k and v apart"], 1.0)
    torch.testing.assert_close(attached, gradient(), **ROUNDING)


def test_an_error_inside_the_block_detaches_too(model, inputs):
    base = model(*inputs)
    with pytest.raises(KeyboardInterrupt), lora.attached(model, [(ADAPTERS["linear"], 1.0)]):
        raise KeyboardInterrupt
    assert same_bits(model(*inputs), base)


def test_a_copy_of_an_adapted_model_is_adapted_and_independent(model, inputs):
    with lora.attached(model, [(ADAPTERS["linear"], 1.0)]):
        twin = copy.deepcopy(model)
        changed = model(*inputs)
        with lora.disabled(twin):
            assert same_bits(model(*inputs), changed)
    assert same_bits(twin(*inputs), changed)


def test_half_precision_follows_float32(model, inputs):
    adapters = (*ADAPTERS["linear"], *ADAPTERS["hadamard"], *ADAPTERS["convolution"])
    with lora.attached(model, [(adapters, 1.0)]):
        exact = model(*inputs)
        model.bfloat16()
        rough = model(*(tensor.bfloat16() for tensor in inputs))
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_the_position_table_merges_but_does_not_attach(model, inputs):
    table = (Adapter("", Difference(random(1, 64, 128)), "pos_embed"),)
    with (
        pytest.raises(CheckpointError, match="merge it"),
        lora.attached(model, [(table, 1.0)]),
    ):
        pass
    before = model.pos_embed.clone()
    lora.merge(model, table, 2.0)
    torch.testing.assert_close(model.pos_embed, before + 2 * table[0].change.value)


# Wrong network


def test_a_lora_of_another_size_is_refused_and_nothing_stays_attached(model, inputs):
    base = model(*inputs)
    wrong = (*ADAPTERS["linear"], low_rank(PROJ, 192, 192))
    with (
        pytest.raises(CheckpointError, match=r"attn\.proj.*192 x 192.*\[128, 128\]"),
        lora.attached(model, [(ADAPTERS["bias"], 1.0), (wrong, 1.0)]),
    ):
        pass
    with pytest.raises(CheckpointError):
        lora.merge(model, wrong, 1.0)
    assert same_bits(model(*inputs), base)


def test_a_lora_without_one_layer_here_is_refused(model):
    with pytest.raises(CheckpointError, match="none of its 1 adapters"):
        lora.merge(model, (low_rank("joint_blocks.9.x_block.attn.qkv", 384, 128),), 1.0)


def test_fit_is_told_from_names_and_shapes_alone():
    here, elsewhere = (
        low_rank(PROJ, 128, 128),
        low_rank("joint_blocks.9.x_block.attn.qkv", 384, 128),
    )
    shapes = {here.name: (128, 128)}
    assert lora.check_fit((here, elsewhere), shapes) == (here,)
    assert lora.check_fit((), {}) == ()
    with pytest.raises(CheckpointError, match=r"none of its 1 adapters.*blocks\.9.* Use a LoRA"):
        lora.check_fit((elsewhere,), shapes)
    with pytest.raises(CheckpointError, match=r"128 x 128.*\[64, 128\].* Use a LoRA"):
        lora.check_fit((here, elsewhere), {here.name: (64, 128)})


@pytest.mark.parametrize(
    ("outputs", "fits"), [(384, True), (400, True), (383, False), (300, False)]
)
def test_a_slice_of_rows_must_end_inside_the_parameter(outputs, fits):
    v = low_rank(QKV, 128, 128, rows=(256, 128))
    assert v.fits((outputs, 128)) is fits


def test_a_partial_fit_is_a_warning_with_counts(model, inputs):
    partly = (*ADAPTERS["linear"], low_rank("joint_blocks.9.x_block.attn.qkv", 384, 128))
    with (
        pytest.warns(UserWarning, match="1 of 2 adapters .*1 do not .*joint_blocks.9"),
        lora.attached(model, [(partly, 1.0)]),
    ):
        changed = model(*inputs)
    with lora.attached(model, [(ADAPTERS["linear"], 1.0)]):
        assert same_bits(changed, model(*inputs))


# Other layers


def cast_model(model, dtype):
    """The same network with layers that keep `dtype` and compute in float32."""
    twin = MMDiT(CONFIG, ops=cast.CastOps())
    twin.load_state_dict(model.state_dict())
    for layer in twin.modules():
        if isinstance(layer, cast.Linear):
            layer.weight.data = layer.weight.data.to(dtype)
    return twin.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", ["linear", "q, k and v apart", "dora per output", "bias"])
def test_casting_layers_are_adapted_as_their_weights_in_float32(model, inputs, dtype, kind):
    twin = cast_model(model, dtype)
    rounded = MMDiT(CONFIG)
    rounded.load_state_dict(twin.state_dict())
    lora.merge(rounded, ADAPTERS[kind], 0.9)
    with lora.attached(twin, [(ADAPTERS[kind], 0.9)]):
        torch.testing.assert_close(twin(*inputs), rounded(*inputs), **ROUNDING)


def test_dora_norms_a_scaled_fp8_weight_with_its_scale(model, inputs):
    twin = cast_model(model, torch.float8_e4m3fn)
    scale = torch.tensor(0.25)
    twin.get_submodule(PROJ).set_scale(scale)
    plain = MMDiT(CONFIG)
    plain.load_state_dict(twin.state_dict())
    plain.get_submodule(PROJ).weight.data *= scale
    adapters = ADAPTERS["dora per output"]
    lora.merge(plain, adapters, 0.9)
    with lora.attached(twin, [(adapters, 0.9)]):
        torch.testing.assert_close(twin(*inputs), plain(*inputs), **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.01)])
def test_merging_into_fp8_keeps_small_changes_on_average(dtype, scale):
    """A change of a 30th of a step would vanish by rounding to nearest."""
    layer = cast.Linear(400, 400, bias=False)
    layer.weight.data = torch.full((400, 400), 1.0).to(dtype)
    if scale is not None:
        layer.set_scale(scale)
    factor = 1.0 if scale is None else scale.item()
    step = torch.finfo(dtype).eps * factor
    model = nn.ModuleDict({"layer": layer})
    change = torch.full((400, 400), step / 30)
    lora.merge(model, (Adapter("layer", Difference(change)),), 1.0)
    merged = layer.weight.float() * factor
    assert layer.weight.dtype == dtype
    assert set(((merged - factor) / step).round(decimals=4).unique().tolist()) <= {0.0, 1.0}
    # 160,000 draws of probability 1/30: the mean has a standard deviation of 0.0135 of the change
    assert abs((merged - factor).mean() / change.mean() - 1) < 0.07


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_merging_into_fp8_keeps_changes_below_its_least_number_on_average(dtype):
    """Subnormals have the step of the smallest normal numbers, whatever their exponent."""
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    model = nn.ModuleDict({"layer": cast.Linear(400, 400, bias=False)})
    model["layer"].weight.data = torch.zeros(400, 400).to(dtype)
    change = torch.full((400, 400), step * 0.3)
    lora.merge(model, (Adapter("layer", Difference(change)),), 1.0)
    merged = model["layer"].weight.float()
    assert set(merged.unique().tolist()) == {0.0, step}
    # 160,000 draws of probability 0.3: the mean has a standard deviation of 0.0038 of the change
    assert abs(merged.mean() / change.mean() - 1) < 0.02


def test_merging_into_fp8_leaves_unchanged_values_alone():
    kinds = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
    for dtype, largest in kinds.items():
        bits = torch.arange(256, dtype=torch.uint8).view(dtype)
        values = bits[torch.isfinite(bits.float())]
        model = nn.ModuleDict({"layer": cast.Linear(1, len(values), bias=False)})
        model["layer"].weight.data = values[:, None].clone()
        change = torch.zeros(len(values), 1)
        change[values.float() == largest] = largest  # past the end: stays the largest
        lora.merge(model, (Adapter("layer", Difference(change)),), 1.0)
        torch.testing.assert_close(model["layer"].weight[:, 0].float(), values.float())


def merged_error(dtype, changes, scale=None):
    """RMS distance of a layer's weight from what it should be, after all the changes."""
    layer = cast.Linear(256, 256, bias=False)
    layer.weight.data = random(256, 256, seed=9, scale=0.05).to(dtype)
    if scale is not None:
        layer.set_scale(scale)
    factor = 1.0 if scale is None else scale
    right = layer.weight.double() * factor + sum(change.double() for change in changes)
    loras = [((Adapter("layer", Difference(change)),), 1.0) for change in changes]
    lora.merge_all(nn.ModuleDict({"layer": layer}), loras)
    return (layer.weight.double() * factor - right).pow(2).mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.3)])
def test_several_loras_are_rounded_once(dtype, scale):
    """The error of five is that of their sum as one; it was 2.8 times as large."""
    changes = [random(256, 256, seed=seed, scale=0.002) for seed in range(5)]
    total = torch.stack(changes).double().sum(0).float()
    one, five = merged_error(dtype, [total], scale), merged_error(dtype, changes, scale)
    torch.testing.assert_close(five, one, rtol=1e-3, atol=0)


def test_small_loras_in_bf16_keep_their_effect():
    """Each alone is a fifth of the least step near 1; rounded one by one all would be lost."""
    layer = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    layer.weight.data.fill_(1.0)
    step = torch.full((4, 4), torch.finfo(torch.bfloat16).eps / 5)
    loras = [((Adapter("layer", Difference(step)),), 1.0)] * 5
    lora.merge_all(nn.ModuleDict({"layer": layer}), loras)
    assert (layer.weight == 1 + torch.finfo(torch.bfloat16).eps).all()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("scale", [None, torch.tensor(0.3)])
@pytest.mark.parametrize("strengths", [(1, -1), (1, 0.3, -1, -0.3), (0.7, -0.7)])
def test_what_cancels_changes_no_weight(dtype, scale, strengths):
    layer = cast.Linear(512, 512, bias=False)
    layer.weight.data = random(512, 512, seed=9, scale=0.05).to(dtype)
    if scale is not None:
        layer.set_scale(scale)
    before = layer.weight.detach().clone()
    adapters = (low_rank("layer", 512, 512),)
    lora.merge_all(
        nn.ModuleDict({"layer": layer}), [(adapters, strength) for strength in strengths]
    )
    assert torch.equal(layer.weight.float(), before.float())


@pytest.mark.parametrize(
    ("module", "shape", "parameter"),
    [
        ("text_model.encoder.layers.1.self_attn.q_proj", (64, 64), "weight"),
        ("text_model.encoder.layers.0.mlp.fc2", (64, 96), "weight"),
        ("text_model.encoder.layers.0.layer_norm1", (64,), "weight"),
        ("text_model.encoder.layers.0.layer_norm1", (64,), "bias"),
        ("text_model.embeddings.token_embedding", (50, 64), "weight"),
        ("text_projection", (64, 64), "weight"),
    ],
)
def test_clip_is_adapted(module, shape, parameter):
    config = CLIPConfig(64, 3, 1, 96, 50, 7, "gelu", 64)
    model = with_recipe_weights(CLIPTextModel, config, seed=2)
    ids = torch.tensor([[1, 5, 9, 49, 0, 0, 0]])
    adapters = (Adapter(module, Difference(random(*shape)), parameter),)
    with lora.attached(model, [(adapters, 1.0)]):
        attached = model(ids, 49)
    lora.merge(model, adapters, 1.0)
    merged = model(ids, 49)
    torch.testing.assert_close(attached.hidden, merged.hidden, **ROUNDING)
    torch.testing.assert_close(attached.pooled, merged.pooled, **ROUNDING)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        ("encoder.block.1.layer.0.SelfAttention.q", (48, 32)),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", (32, 3)),
        ("encoder.block.0.layer.1.DenseReluDense.wi_1", (40, 32)),
        ("encoder.block.0.layer.1.layer_norm", (32,)),
        ("shared", (50, 32)),
    ],
)
def test_t5_is_adapted(module, shape):
    config = T5Config(32, 40, 16, 3, 2, 50, 32)
    model = with_recipe_weights(T5Encoder, config, seed=2)
    ids = torch.tensor([[4, 5, 6, 1, 0]])
    adapters = (Adapter(module, Difference(random(*shape))),)
    if len(shape) == 2:
        adapters = (low_rank(module, *shape),)
    with lora.attached(model, [(adapters, 1.0)]):
        attached = model(ids)
    lora.merge(model, adapters, 1.0)
    torch.testing.assert_close(attached, model(ids), **ROUNDING)


# To train


def test_a_fresh_lora_changes_nothing_bit_for_bit(model, inputs):
    base, keys = model(*inputs), list(model.state_dict())
    trained = lora.add(model, rank=4)
    assert same_bits(model(*inputs), base)
    assert list(model.state_dict()) == keys
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in trained.parameters())


def test_only_the_lora_gets_gradients_and_training_changes_the_output(model, inputs):
    base = model(*inputs)
    trained = lora.add(model, rank=4, alpha=8.0)
    optimiser = torch.optim.SGD(trained.parameters(), lr=0.5)
    for _ in range(2):  # up is zero at first: down gets its first gradient in the second step
        optimiser.zero_grad()
        model(*inputs).square().mean().backward()
        optimiser.step()
    assert all(parameter.grad is not None for parameter in trained.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    changed = model(*inputs)
    assert (changed - base).abs().max() > 1e-3
    with lora.disabled(model):
        assert same_bits(model(*inputs), base)
    adapters = trained.lora()
    trained.remove()
    assert same_bits(model(*inputs), base)
    with lora.attached(model, [(adapters, 1.0)]):
        torch.testing.assert_close(model(*inputs), changed, **ROUNDING)


def test_the_state_dict_of_the_adapters_resumes_them(model, inputs):
    trained = lora.add(model, rank=2)
    for parameter in trained.parameters():
        parameter.data = random(*parameter.shape)
    changed, state = model(*inputs), copy.deepcopy(trained.state_dict())
    trained.remove()
    resumed = lora.add(model, rank=2)
    resumed.load_state_dict(state)
    assert same_bits(model(*inputs), changed)


def test_the_generator_decides_the_start(model):
    def downs(seed):
        trained = lora.add(model, rank=4, generator=torch.Generator().manual_seed(seed))
        trained.remove()
        return [adapter.change.down for adapter in trained.lora()]

    first, again, other = downs(1), downs(1), downs(2)
    assert all(map(same_bits, first, again))
    assert not any(map(same_bits, first, other))
    reference = nn.init.kaiming_uniform_(torch.empty(4000, 128), a=5**0.5)
    assert abs(first[0].std() / reference.std() - 1) < 0.15
    assert first[0].abs().max() <= 1 / 128**0.5


def test_dropout_acts_in_training_mode_alone(model, inputs):
    trained = lora.add(model, rank=4, dropout=0.5)
    for parameter in trained.parameters():
        parameter.data = random(*parameter.shape)
    model.eval()
    assert same_bits(model(*inputs), model(*inputs))
    model.train()
    assert not same_bits(model(*inputs), model(*inputs))


def test_casting_layers_train_in_float32(model, inputs):
    twin = cast_model(model, torch.float8_e4m3fn)
    trained = lora.add(twin, rank=2)
    twin(*inputs).square().mean().backward()
    ups = [p for name, p in trained.named_parameters() if name.endswith("up")]
    assert all(up.grad is not None and up.grad.dtype == torch.float32 for up in ups)
    assert any(up.grad.abs().max() > 0 for up in ups)


def test_the_convolution_and_text_encoders_train_when_named(model, inputs):
    trained = lora.add(model, ["x_embedder.proj", "context_embedder"], rank=2)
    trained.adapters["x_embedder/proj"].up.data.fill_(0.1)
    changed = model(*inputs)
    adapters = trained.lora()
    trained.remove()
    with lora.attached(model, [(adapters, 1.0)]):
        torch.testing.assert_close(model(*inputs), changed, **ROUNDING)
    clip = CLIPTextModel(CLIPConfig(64, 3, 1, 96, 50, 7, "gelu", 64))
    lora.add(clip, ["text_model.encoder.layers.1.self_attn.q_proj"], rank=2)


def test_default_targets_are_attention_and_mlp_of_both_streams(model):
    own = ["attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2"]
    expected = {f"joint_blocks.0.{s}_block.{name}" for s in ("x", "context") for name in own}
    expected |= {f"joint_blocks.1.x_block.{name}" for name in own}
    expected |= {"joint_blocks.1.context_block.attn.qkv"}  # the last text stream ends there
    expected |= {f"joint_blocks.0.x_block.attn2.{name}" for name in ("qkv", "proj")}
    assert set(lora.mmdit_targets(model)) == expected


def test_targets_by_kind_stream_and_block(model):
    chosen = lora.mmdit_targets(model, kinds=["adaLN", "attn"], streams=["context"], blocks=[1])
    assert chosen == [
        "joint_blocks.1.context_block.attn.qkv",
        "joint_blocks.1.context_block.adaLN_modulation.1",
    ]


@pytest.mark.parametrize(
    "choice", [{"kinds": ["atn"]}, {"streams": ["text"]}, {"blocks": [7]}, {"kinds": []}]
)
def test_a_choice_without_layers_is_an_error(model, choice):
    with pytest.raises(ValueError, match="unknown|no layer"):
        lora.mmdit_targets(model, **choice)


@pytest.mark.parametrize("path", ["joint_blocks.0", "nowhere", LN_Q])
def test_only_linear_layers_can_be_trained(model, path):
    with pytest.raises(ValueError, match=path):
        lora.add(model, [path], rank=2)
    with pytest.raises(ValueError, match="rank"):
        lora.add(model, rank=0)


# Oracle


def test_peft_with_the_same_factors_gives_the_same_output(model, inputs):
    peft = pytest.importorskip("peft", reason="peft is the oracle of this test")
    rank, alpha = 4, 6.0
    trained = lora.add(model, rank=rank, alpha=alpha)
    for parameter in trained.parameters():
        parameter.data = random(*parameter.shape)
    ours = model(*inputs)
    adapters = trained.lora()
    trained.remove()
    targets = [adapter.module for adapter in adapters]
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    theirs = peft.inject_adapter_in_model(config, model)
    for adapter in adapters:
        layer = theirs.get_submodule(adapter.module)
        layer.lora_A["default"].weight.data = adapter.change.down
        layer.lora_B["default"].weight.data = adapter.change.up
    torch.testing.assert_close(ours, theirs(*inputs), rtol=0, atol=1e-6)
