"""Files become networks: strictly, in the precision asked for, without copies."""

import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from sd3_pack.sd3_core.checkpoints import load
from sd3_pack.sd3_core.checkpoints.diffusers import to_diffusers
from sd3_pack.sd3_core.checkpoints.layouts import find_components
from sd3_pack.sd3_core.checkpoints.load import (
    load_clip,
    load_mmdit,
    load_t5,
    load_vae,
    read_config,
    read_state_dict,
)
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.models import cast, onednn
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from sd3_pack.sd3_core.models.t5 import T5Config, T5Encoder
from tiny import (
    MMDIT_X,
    NETWORKS,
    quantised,
    shapes_of,
    tiny_state_dicts,
    with_prefixes,
    write_hollow,
    write_tiny_checkpoint,
)
from torch import nn

LOADERS = {
    "mmdit": load_mmdit,
    "vae": load_vae,
    "clip_l": lambda where, **settings: load_clip(where, "clip_l", **settings),
    "clip_g": lambda where, **settings: load_clip(where, "clip_g", **settings),
    "t5": load_t5,
}
STORED = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(scope="module")
def states():
    return tiny_state_dicts()


@pytest.fixture
def never_converted(monkeypatch):
    """As with a large model: weights that would grow stay as stored."""
    monkeypatch.setattr(load, "CONVERTED_AT_MOST", 0)


def outputs(part: str, network: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One forward pass on fixed input, flat."""
    device = next(network.parameters()).device
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype)

    ids = torch.arange(16, device=device)[None]
    with torch.no_grad():
        if part == "mmdit":
            timestep = torch.tensor([700.0, 30.0], device=device)
            return network(normal(2, 16, 6, 8), timestep, normal(2, 9, 224), normal(2, 160))
        if part == "vae":
            return network.decode(network.encode(normal(1, 3, 16, 16)).mean)
        if part == "t5":
            return network(ids)
        out = network(ids, 7)
        return torch.cat([out.hidden.flatten(), out.pooled.flatten()])


def expected(part: str, states, stored: torch.dtype, computed=torch.float32) -> torch.Tensor:
    """The network's own class filled by hand with weights rounded to `stored`."""
    network_class, config = NETWORKS[part]
    network = network_class(config)
    network.load_state_dict({k: v.to(stored).float() for k, v in states[part].items()})
    return outputs(part, network.to(computed), computed)


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("part", NETWORKS)
@pytest.mark.parametrize("converted", [True, False], ids=["converted", "cast in each call"])
def test_any_precision_computes_in_float32(tmp_path, states, part, stored, converted, monkeypatch):
    if not converted:
        monkeypatch.setattr(load, "CONVERTED_AT_MOST", 0)
    path = tmp_path / "model.safetensors"
    write_tiny_checkpoint(path, parts=(part,), dtype=stored)
    network = LOADERS[part](path, dtype=torch.float32)
    kept = torch.float32 if converted else stored
    assert {p.dtype for p in network.parameters()} == {kept}
    # Not bit for bit: a mapped weight may lie at another alignment than a fresh one.
    torch.testing.assert_close(
        outputs(part, network), expected(part, states, stored), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("part", NETWORKS)
def test_fp8_computes_in_bf16(tmp_path, states, part, never_converted):
    path = tmp_path / "model.safetensors"
    write_tiny_checkpoint(path, parts=(part,), dtype=torch.float8_e4m3fn)
    network = LOADERS[part](path, dtype=torch.bfloat16)
    out = outputs(part, network, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert {p.dtype for p in network.parameters()} == {torch.float8_e4m3fn}
    wanted = expected(part, states, torch.float8_e4m3fn, torch.bfloat16)  # every fp8 fits bf16
    assert (out - wanted).abs().mean() < 0.01 * wanted.abs().mean()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("part", NETWORKS)
def test_fp8_computes_on_a_gpu(tmp_path, states, part, never_converted):
    path = tmp_path / "model.safetensors"
    stored, _ = quantised(states[part], "comfy_quant")
    save_file(with_prefixes({part: stored}), path)
    network = LOADERS[part](path, dtype=torch.float32, device="cuda")
    wanted = outputs(part, LOADERS[part](path, dtype=torch.float32))
    found = outputs(part, network).cpu()
    assert (found - wanted).abs().mean() < 0.01 * wanted.abs().mean()


def test_weights_that_would_shrink_or_stay_small_are_converted(tmp_path, monkeypatch):
    write_tiny_checkpoint(tmp_path / "m.safetensors", parts=("mmdit",), dtype=torch.float16)
    for dtype, limit, kept in (
        (torch.bfloat16, 0, torch.bfloat16),
        (torch.float32, 2**30, torch.float32),
        (torch.float32, 0, torch.float16),
        (None, 2**30, torch.float16),
    ):
        monkeypatch.setattr(load, "CONVERTED_AT_MOST", limit)
        network = load_mmdit(tmp_path / "m.safetensors", dtype=dtype)
        assert {p.dtype for p in network.parameters()} == {kept}


def test_a_uniform_file_gets_plain_layers_a_mixed_one_layers_that_cast(tmp_path, states):
    path = tmp_path / "m.safetensors"
    save_file(states["mmdit"], path)
    assert type(load_mmdit(path).context_embedder) is onednn.Linear
    mixed = {k: v.half() if "mlp" in k else v for k, v in states["mmdit"].items()}
    save_file(mixed, path)
    network = load_mmdit(path)
    assert type(network.context_embedder) is cast.Linear
    wanted = {k: v.half().float() if "mlp" in k else v for k, v in states["mmdit"].items()}
    reference = MMDiT(NETWORKS["mmdit"][1])
    reference.load_state_dict(wanted)
    torch.testing.assert_close(
        outputs("mmdit", network), outputs("mmdit", reference), rtol=0, atol=1e-5
    )


def test_weights_are_mapped_not_copied(tmp_path, states):
    path = tmp_path / "m.safetensors"
    save_file(states["mmdit"], path)
    storages = {p.untyped_storage().data_ptr() for p in load_mmdit(path).parameters()}
    assert len(storages) == 1


def test_a_loaded_network_is_frozen_and_in_evaluation(tmp_path):
    write_tiny_checkpoint(tmp_path / "m.safetensors")
    for load_part in LOADERS.values():
        network = load_part(tmp_path / "m.safetensors")
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())


def test_a_network_loaded_in_inference_mode_can_be_trained_through(tmp_path, never_converted):
    write_tiny_checkpoint(tmp_path / "m.safetensors", parts=("mmdit",), dtype=torch.bfloat16)
    with torch.inference_mode():
        network = load_mmdit(tmp_path / "m.safetensors", dtype=torch.float32)
    x = torch.randn(1, 16, 4, 4, requires_grad=True)
    network(x, torch.tensor([5.0]), torch.randn(1, 3, 224), torch.randn(1, 160)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_ops_and_attention_of_the_caller_are_used(tmp_path):
    write_tiny_checkpoint(tmp_path / "m.safetensors", parts=("mmdit",))
    calls = []

    def counting(q, k, v, mask=None):
        calls.append(q.shape)
        return load.attention(q, k, v, mask)

    class Ops:
        class Linear(nn.Linear):
            pass

        Conv2d, LayerNorm, RMSNorm = nn.Conv2d, nn.LayerNorm, nn.RMSNorm

    network = load_mmdit(tmp_path / "m.safetensors", ops=Ops, attention=counting)
    outputs("mmdit", network)
    assert type(network.context_embedder) is Ops.Linear
    assert len(calls) == network.config.depth


def test_a_component_is_as_good_as_its_file(tmp_path):
    write_tiny_checkpoint(tmp_path / "m.safetensors")
    component = find_components(tmp_path / "m.safetensors")["vae"]
    assert outputs("vae", load_vae(component)).equal(
        outputs("vae", load_vae(tmp_path / "m.safetensors"))
    )
    with pytest.raises(CheckpointError, match="holds the VAE, not the denoiser"):
        load_mmdit(component)


def test_sizes_come_from_the_file(tmp_path):
    write_tiny_checkpoint(tmp_path / "m.safetensors")
    for kind, component in find_components(tmp_path / "m.safetensors").items():
        assert read_config(component) == NETWORKS[kind][1]


def test_second_attentions_are_found(tmp_path):
    shapes = shapes_of(MMDiT, MMDIT_X)
    save_file({k: torch.zeros(s) for k, s in shapes.items()}, tmp_path / "m.safetensors")
    assert load_mmdit(tmp_path / "m.safetensors").config == MMDIT_X


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"),
    [
        (MMDiTConfig(24), 491, 2_028_328_000),
        (MMDiTConfig(38, qk_norm=True), 923, 8_056_627_520),
        (
            MMDiTConfig(
                24, pos_embed_max_size=384, qk_norm=True, dual_attention_layers=tuple(range(13))
            ),
            665,
            2_243_171_520,
        ),
    ],
    ids=["SD3 Medium", "SD3.5 Large", "SD3.5 Medium"],
)
def test_released_sizes_have_the_released_counts(config, tensors, parameters):
    shapes = shapes_of(MMDiT, config)
    assert len(shapes) == tensors
    counted = sum(torch.Size(s).numel() for k, s in shapes.items() if k != "pos_embed")
    assert counted == parameters
    assert MMDiTConfig.from_shapes(shapes) == config


# Scaled fp8


@pytest.mark.parametrize("spelling", ["scale_weight", "comfy_quant", "rows"])
@pytest.mark.parametrize("part", ["mmdit", "t5", "clip_g"])
@pytest.mark.parametrize("converted", [True, False], ids=["converted", "cast in each call"])
def test_scaled_fp8_is_read_in_every_spelling(
    tmp_path, states, part, spelling, converted, monkeypatch
):
    if not converted:
        monkeypatch.setattr(load, "CONVERTED_AT_MOST", 0)
    stored, meant = quantised(states[part], spelling)
    path = tmp_path / f"{part}.safetensors"
    save_file(stored, path)
    network = LOADERS[part](path, dtype=torch.float32)
    network_class, config = NETWORKS[part]
    reference = network_class(config)
    reference.load_state_dict(meant)
    torch.testing.assert_close(outputs(part, network), outputs(part, reference), rtol=0, atol=1e-5)
    if not converted:
        assert torch.float8_e4m3fn in {p.dtype for p in network.parameters()}


@pytest.mark.parametrize("spelling", ["scale_weight", "comfy_quant"])
def test_scaled_fp8_behind_the_prefixes_of_a_single_file(tmp_path, states, spelling):
    stored, meant = quantised(states["t5"], spelling)
    prefix = "text_encoders.t5xxl.transformer."
    path = tmp_path / "m.safetensors"
    save_file({prefix + key: tensor for key, tensor in stored.items()}, path)
    reference = NETWORKS["t5"][0](NETWORKS["t5"][1])
    reference.load_state_dict(meant)
    torch.testing.assert_close(
        outputs("t5", load_t5(path, dtype=torch.float32)),
        outputs("t5", reference),
        rtol=0,
        atol=1e-5,
    )


def test_fused_parts_keep_a_scale_each(tmp_path, states):
    plain = {k: v.contiguous() for k, v in to_diffusers("mmdit", states["mmdit"]).items()}
    stored, meant = quantised(plain, "comfy_quant")
    for name, tensors in (("stored", stored), ("meant", meant)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    torch.testing.assert_close(
        outputs("mmdit", load_mmdit(tmp_path / "stored.safetensors", dtype=torch.float32)),
        outputs("mmdit", load_mmdit(tmp_path / "meant.safetensors")),
        rtol=0,
        atol=1e-5,
    )


def test_the_state_dict_for_other_layers_has_scales_beside_the_weights(tmp_path, states):
    stored, _ = quantised(states["t5"], "scale_weight")
    save_file(stored, tmp_path / "t5xxl.safetensors")
    state = read_state_dict(find_components(tmp_path / "t5xxl.safetensors")["t5"])
    scales = {key for key in state if key.endswith(".weight_scale")}
    assert set(state) - scales == set(states["t5"])
    assert len(scales) == sum("scale_weight" in key for key in stored)
    assert all(state[key].dtype == torch.float32 for key in scales)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_weights_in_whole_numbers_are_a_quantisation_that_is_refused(tmp_path, states, dtype):
    key = "joint_blocks.0.x_block.mlp.fc1.weight"
    save_file(states["mmdit"] | {key: torch.zeros(4, 4).to(dtype)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"a quantisation that is not\s+read here"):
        load_mmdit(tmp_path / "m.safetensors")


def test_scales_of_blocks_are_a_quantisation_that_is_refused(tmp_path, states):
    stored, _ = quantised(states["t5"], "comfy_quant")
    key = next(key for key in stored if key.endswith("weight_scale"))
    save_file(stored | {key: torch.ones(96, 7)}, tmp_path / "t5xxl.safetensors")
    with pytest.raises(CheckpointError, match="scales blocks"):
        load_t5(tmp_path / "t5xxl.safetensors")


@pytest.mark.parametrize("shape", [(1, 16), (16, 16), (4, 4), (16, 1, 2)])
def test_scales_that_are_not_one_for_each_row_are_refused(tmp_path, shape):
    """Also [1, 16] on a square weight, which scales the columns."""
    stored = scaled_square() | {"encoder.block.0.layer.0.SelfAttention.o.weight_scale": shape}
    save_file(
        {k: torch.ones(v) if isinstance(v, tuple) else v for k, v in stored.items()},
        tmp_path / "t5xxl.safetensors",
    )
    assert "scales blocks" in complaint(tmp_path / "t5xxl.safetensors", "t5")


def scaled_square() -> dict[str, torch.Tensor]:
    """A T5 whose attention output is a square fp8 weight of 16 rows, with a scale."""
    shapes = shapes_of(T5Encoder, T5Config(16, 12, 8, 2, 1, 9, 32))
    state = {key: torch.ones(shape) for key, shape in shapes.items()}
    module = "encoder.block.0.layer.0.SelfAttention.o"
    state[f"{module}.weight"] = torch.ones(16, 16).to(torch.float8_e4m3fn)
    return state | {f"{module}.weight_scale": torch.tensor(2.0)}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (16,), (16, 1)])
def test_one_scale_or_one_for_each_row_is_read(tmp_path, shape):
    key = "encoder.block.0.layer.0.SelfAttention.o.weight"
    scale = torch.full(shape, 3.0)
    save_file(scaled_square() | {f"{key}_scale": scale}, tmp_path / "t5xxl.safetensors")
    weight = load_t5(tmp_path / "t5xxl.safetensors", dtype=torch.float32).state_dict()[key]
    assert weight.equal(torch.full((16, 16), 3.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_scales_in_a_precision_that_scales_never_have_are_refused(tmp_path, dtype):
    key = "encoder.block.0.layer.0.SelfAttention.o.weight_scale"
    stored = scaled_square() | {key: torch.ones(16).to(dtype)}
    save_file(stored, tmp_path / "t5xxl.safetensors")
    assert "a quantisation that is not read here" in complaint(tmp_path / "t5xxl.safetensors", "t5")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scales_of_weights_that_are_not_fp8_are_refused(tmp_path, dtype):
    key = "encoder.block.0.layer.0.SelfAttention.o.weight"
    stored = scaled_square() | {key: torch.ones(16, 16, dtype=dtype)}
    save_file(stored, tmp_path / "t5xxl.safetensors")
    message = complaint(tmp_path / "t5xxl.safetensors", "t5")
    assert f"'{key}_scale' scales a weight that is stored as {dtype}" in message


@pytest.mark.parametrize("sign", ["comfy_quant", "input_scale", "scale_input"])
def test_a_scale_that_the_file_speaks_of_and_lacks_is_missing(tmp_path, sign):
    stored = scaled_square()
    key = "encoder.block.0.layer.0.SelfAttention.o.weight"
    del stored[f"{key}_scale"]
    save_file(stored, tmp_path / "t5xxl.safetensors")
    load_t5(tmp_path / "t5xxl.safetensors")  # plain fp8 needs none
    note = torch.zeros(2, dtype=torch.uint8) if sign == "comfy_quant" else torch.tensor(1.0)
    stored[f"{key.removesuffix('weight')}{sign}"] = note
    save_file(stored, tmp_path / "t5xxl.safetensors")
    message = complaint(tmp_path / "t5xxl.safetensors", "t5")
    assert f"its scale '{key}_scale' is missing" in message


@pytest.mark.parametrize("spelling", ["scale_weight", "comfy_quant", "rows"])
def test_a_scaled_table_under_its_other_name_keeps_its_scale(tmp_path, states, spelling):
    stored, meant = quantised(states["t5"], spelling)
    renamed = {
        f"encoder.embed_tokens.{k.removeprefix('shared.')}" if k.startswith("shared.") else k: v
        for k, v in stored.items()
    }
    assert renamed.keys() != stored.keys()
    save_file(renamed, tmp_path / "t5xxl.safetensors")
    table = load_t5(tmp_path / "t5xxl.safetensors", dtype=torch.float32).shared.weight
    torch.testing.assert_close(table, meant["shared.weight"], rtol=0, atol=1e-6)


def test_scales_of_rows_are_swapped_with_their_halves(tmp_path, states):
    """diffusers keeps the final modulation as (scale, shift), the released files the other way."""
    module = "norm_out.linear"
    stored = {k: v.contiguous() for k, v in to_diffusers("mmdit", states["mmdit"]).items()}
    rows = stored[f"{module}.weight"].shape[0]
    stored[f"{module}.weight"] = torch.ones(rows, 128).to(torch.float8_e4m3fn)
    stored[f"{module}.weight_scale"] = torch.arange(1.0, rows + 1)
    save_file(stored, tmp_path / "m.safetensors")
    key = "final_layer.adaLN_modulation.1.weight"
    found = load_mmdit(tmp_path / "m.safetensors", dtype=torch.float32).state_dict()[key]
    wanted = torch.arange(1.0, rows + 1).roll(rows // 2)
    assert found[:, 0].equal(wanted)


def test_layers_of_the_caller_get_weights_without_scale(tmp_path, states, never_converted):
    stored, meant = quantised(states["t5"], "rows")
    save_file(stored, tmp_path / "t5xxl.safetensors")
    network = load_t5(tmp_path / "t5xxl.safetensors", dtype=torch.float32, ops=nn)
    for key, weight in network.state_dict().items():
        torch.testing.assert_close(weight, meant[key], rtol=0, atol=1e-6)


# Files that are not whole


def complaint(path, part: str = "mmdit") -> str:
    with pytest.raises(CheckpointError) as caught:
        LOADERS[part](path)
    return str(caught.value)


@pytest.mark.parametrize("part", NETWORKS)
def test_every_missing_name_is_noticed(tmp_path, states, part):
    path = tmp_path / f"{part}.safetensors"
    names = list(states[part])
    for lost in names[:: max(1, len(names) // 12)]:
        save_file({k: v for k, v in states[part].items() if k != lost}, path)
        message = complaint(path, part)
        assert message.startswith(f"{part}.safetensors: ")
        assert lost in message or lost.partition(".")[0] in message


def test_missing_keys_are_counted_and_the_first_named(tmp_path, states):
    kept = {k: v for k, v in states["mmdit"].items() if "block.mlp." not in k}
    save_file(kept, tmp_path / "m.safetensors")
    message = complaint(tmp_path / "m.safetensors")
    assert "missing (joint_blocks.0.context_block.mlp.fc1.weight, " in message
    assert "It looks like the denoiser (MMDiT), damaged" in message


def test_a_missing_key_that_tells_a_size_is_named(tmp_path, states):
    kept = {k: v for k, v in states["mmdit"].items() if k != "y_embedder.mlp.0.weight"}
    save_file(kept, tmp_path / "m.safetensors")
    assert "lacks y_embedder.mlp.0.weight, which tells its size" in complaint(
        tmp_path / "m.safetensors"
    )


def test_surplus_keys_are_refused(tmp_path, states):
    save_file(states["mmdit"] | {"extra.weight": torch.ones(1)}, tmp_path / "m.safetensors")
    assert "1 surplus (extra.weight)" in complaint(tmp_path / "m.safetensors")


def test_misshapen_keys_tell_both_shapes(tmp_path, states):
    key = "joint_blocks.0.x_block.mlp.fc1.weight"
    save_file(states["mmdit"] | {key: torch.ones(3, 5)}, tmp_path / "m.safetensors")
    message = complaint(tmp_path / "m.safetensors")
    assert f"1 of wrong shape ({key} is [3, 5] instead of [512, 128])" in message


def test_a_depth_that_does_not_fit_the_width_is_told(tmp_path, states):
    kept = {k: v for k, v in states["mmdit"].items() if not k.startswith("joint_blocks.1.")}
    save_file(kept, tmp_path / "m.safetensors")
    assert "it has 1 blocks, and its width asks for 2" in complaint(tmp_path / "m.safetensors")


def hollow(path, part: str, config):
    """A file with the names and shapes of this network, and zeros in it."""
    return write_hollow(path, shapes_of(NETWORKS[part][0], config))


@pytest.mark.parametrize(
    ("part", "fields", "fault"),
    [
        ("vae", {"channels": (32,) * 9}, "9 levels, and at most 8"),
        ("vae", {"channels": (32,) * 2, "blocks_per_level": 129}, "258 blocks, and at most 256"),
        ("clip_l", {"num_layers": 257}, "257 layers, and at most 256"),
        ("t5", {"num_layers": 257}, "257 layers, and at most 256"),
    ],
)
def test_networks_of_absurd_depth_are_refused_before_they_are_built(
    tmp_path, monkeypatch, part, fields, fault
):
    path = hollow(tmp_path / f"{part}.safetensors", part, replace(NETWORKS[part][1], **fields))
    monkeypatch.setattr(load, "_build", None)
    assert fault in complaint(path, part)


def test_an_mmdit_of_absurd_depth_is_refused_before_its_table_is_made(tmp_path, states):
    shapes = {k: tuple(v.shape) for k, v in states["mmdit"].items()}
    shapes |= {f"joint_blocks.{i}.x_block.attn.qkv.weight": (1, 1) for i in range(257)}
    path = write_hollow(tmp_path / "m.safetensors", shapes)
    assert "257 blocks, and at most 256" in complaint(path)
    shapes = {k: tuple(v.shape) for k, v in states["mmdit"].items()}
    path = write_hollow(
        tmp_path / "m.safetensors", shapes | {"x_embedder.proj.weight": (2**32, 1, 1, 1)}
    )
    began = time.process_time()
    assert "its width asks for 67108864" in complaint(path)
    assert time.process_time() - began < 2


def resized(state, old: int, new: int) -> dict[str, torch.Tensor]:
    return {k: torch.zeros([new if n == old else n for n in v.shape]) for k, v in state.items()}


def test_a_clip_whose_width_is_no_multiple_of_a_head_is_refused(tmp_path, states):
    bad = {
        k: torch.zeros([100 if n == 64 else n for n in v.shape])
        for k, v in states["clip_l"].items()
    }
    save_file(bad, tmp_path / "clip_l.safetensors")
    assert "100 wide" in complaint(tmp_path / "clip_l.safetensors", "clip_l")


def test_a_vae_whose_widths_no_group_norm_takes_is_refused(tmp_path, states):
    bad = {
        k: torch.zeros([33 if n == 32 else n for n in v.shape]) for k, v in states["vae"].items()
    }
    save_file(bad, tmp_path / "vae.safetensors")
    assert "no network has its sizes" in complaint(tmp_path / "vae.safetensors", "vae")


def test_stacked_parts_that_do_not_fit_are_refused(tmp_path):
    written = write_tiny_checkpoint(tmp_path / "sd3", layout="diffusers")["mmdit"]
    from safetensors.torch import load_file

    file = written / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["transformer_blocks.0.attn.to_k.weight"] = torch.ones(128, 5)
    save_file(state, file)
    assert "do not fit on each other" in complaint(written)


def test_a_diffusers_file_that_lacks_a_third_of_qkv_names_it(tmp_path):
    written = write_tiny_checkpoint(tmp_path / "sd3", layout="diffusers")["mmdit"]
    from safetensors.torch import load_file

    file = written / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["transformer_blocks.1.attn.to_k.weight"]
    save_file(state, file)
    message = complaint(written)
    assert "missing (joint_blocks.1.x_block.attn.qkv.weight)" in message
    assert "transformer_blocks.1.attn.to_q.weight" in message


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_of_a_vae_may_stay_in_the_file(tmp_path, half):
    write_tiny_checkpoint(tmp_path / "v.safetensors", ("vae",), torch.float16)
    vae = load_vae(
        tmp_path / "v.safetensors",
        dtype=torch.float32,
        device="meta",
        left=lambda name: not name.startswith(half),
    )
    for name, tensor in vae.state_dict().items():
        wanted = ("meta", torch.float32) if name.startswith(half) else ("cpu", torch.float16)
        assert (tensor.device.type, tensor.dtype) == wanted, name
