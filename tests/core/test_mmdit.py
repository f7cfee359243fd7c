"""MMDiT against Stability's recordings, and the laws that hold for any weights."""

import pytest
import torch
from build import recipe_tensor, with_recipe_weights
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.models import onednn
from sd3_pack.sd3_core.models.mmdit import (
    MMDiT,
    MMDiTConfig,
    Tokens,
    position_table,
    sincos_grid,
    timestep_embedding,
)

RECORDINGS = [
    "mmdit_sd3medium_d2_sq16_b1",
    "mmdit_sd3medium_d2_16x24_b3",
    "mmdit_sd3medium_d2_odd15x17",
    "mmdit_sd3medium_d3_pos13_12x26_b2",
    "mmdit_sd35medium_d4_14x22_b2",
    "mmdit_sd35large_d3_20x12_b2",
    "mmdit_sd35large_d3_16x16_ctx154",
]


def golden_config(recorded: dict) -> MMDiTConfig:
    config = recorded["config"]
    return MMDiTConfig(
        depth=config["depth"],
        pos_embed_max_size=config["pos_embed_max_size"],
        qk_norm=config["qk_norm"] == "rms",
        dual_attention_layers=tuple(config["x_block_self_attn_layers"]),
    )


def golden_mmdit(recorded: dict, ops=torch.nn) -> MMDiT:
    config = golden_config(recorded)
    model = with_recipe_weights(MMDiT, config, recorded["config"]["SEED"], ops)
    if recorded["config"]["pos_embed"] == "sincos":
        size = config.pos_embed_max_size
        model.pos_embed = position_table(config.hidden_size, size, base=64)
    else:
        seed = recorded["config"]["SEED"]
        model.pos_embed = recipe_tensor("pos_embed", model.pos_embed.shape, seed)
    return model


def golden_inputs(expected: dict, recorded: dict) -> dict[str, torch.Tensor]:
    seed = recorded["recipe_inputs"]["seed"]
    x, context, pooled = (
        recipe_tensor(f"input.{name}", recorded["input_shapes"][name], seed)
        for name in ("x", "context", "y")
    )
    return {"x": x, "timestep": expected["timestep"], "context": context, "pooled": pooled}


@pytest.fixture(scope="module")
def tiny():
    config = MMDiTConfig(
        depth=3,
        context_dim=24,
        pooled_dim=40,
        pos_embed_max_size=10,
        qk_norm=True,
        dual_attention_layers=(0,),
    )
    return with_recipe_weights(MMDiT, config, seed=5)


def inputs_for(model: MMDiT, batch: int = 2, rows: int = 8, columns: int = 6, seed: int = 1):
    config = model.config
    return {
        "x": recipe_tensor("x", (batch, config.in_channels, rows, columns), seed),
        "timestep": torch.linspace(900.0, 100.0, batch),
        "context": recipe_tensor("context", (batch, 7, config.context_dim), seed),
        "pooled": recipe_tensor("pooled", (batch, config.pooled_dim), seed),
    }


@pytest.mark.parametrize("name", RECORDINGS)
def test_output_equals_the_recording(golden, name):
    expected, recorded = golden(name)
    model = golden_mmdit(recorded)
    out = model(**golden_inputs(expected, recorded))
    reference = expected["comfyui.out"] if "odd" in name else expected["out"]
    torch.testing.assert_close(out, reference, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", RECORDINGS)
def test_output_of_the_loaders_layers_equals_the_recording(golden, name):
    """Without gradients, when these layers compute their own way."""
    expected, recorded = golden(name)
    model = golden_mmdit(recorded, onednn.Ops)
    with torch.no_grad():
        out = model(**golden_inputs(expected, recorded))
    reference = expected["comfyui.out"] if "odd" in name else expected["out"]
    torch.testing.assert_close(out, reference, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", RECORDINGS)
def test_skipped_blocks_equal_the_recording(golden, name):
    expected, recorded = golden(name)
    skips = recorded.get("skip_layer_outputs", {})
    model = golden_mmdit(recorded)
    for key, layers in skips.items():
        out = model(**golden_inputs(expected, recorded), skip_layers=layers)
        torch.testing.assert_close(out, expected[key], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_stage_equals_the_recording(golden, name):
    """Taps hold every 16th channel, the embeddings every 8th."""
    expected, recorded = golden(name)
    model = golden_mmdit(recorded)
    tokens = model.embed(**golden_inputs(expected, recorded))
    stages = {"tap.x_plus_pos": tokens.x, "tap.context_embedded": tokens.context}
    if "tap.c" in expected:
        torch.testing.assert_close(tokens.c[..., ::8], expected["tap.c"], atol=5e-5, rtol=0)
        height, width = recorded["run"]["h"], recorded["run"]["w"]
        torch.testing.assert_close(
            model.crop_positions(height, width)[..., ::8],
            expected["tap.pos_embed_crop"],
            atol=1e-6,
            rtol=0,
        )
    for index in range(model.config.depth):
        tokens = model.run_blocks(tokens, [index])
        stages[f"tap.block{index}.x"] = tokens.x
        if index < model.config.depth - 1:
            stages[f"tap.block{index}.context"] = tokens.context
    stages["tap.final_tokens"] = model.final_layer(tokens.x, tokens.c)
    checked = [key for key in stages if key in expected]
    assert checked
    for key in checked:
        torch.testing.assert_close(stages[key][..., ::16], expected[key], atol=5e-5, rtol=0)


def test_position_grid_equals_the_recording(golden):
    expected, _ = golden("units")
    positions = torch.arange(6) / 4.0 - 1.25
    torch.testing.assert_close(
        sincos_grid(24, positions), expected["sincos.dim24_M6_sf4.0_off1.25"], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        sincos_grid(32, torch.arange(5)),
        expected["sincos.dim32_M5_sfNone_offNone"],
        atol=1e-6,
        rtol=0,
    )


def test_timestep_embedding_equals_the_recording(golden):
    """One unit in the last place of a frequency, 6e-8, is 6e-5 in the angle at t = 1000."""
    expected, _ = golden("units")
    torch.testing.assert_close(
        timestep_embedding(expected["timestep.t"]),
        expected["timestep.embedding256"],
        atol=6e-5,
        rtol=0,
    )


def test_position_table_keeps_its_centre_when_it_grows():
    small, large = position_table(64, 8, base=4), position_table(64, 12, base=4)
    centre = large.unflatten(1, (12, 12))[:, 2:10, 2:10].flatten(1, 2)
    torch.testing.assert_close(small, centre)


@pytest.mark.parametrize(
    ("size", "counts"),
    [
        (MMDiTConfig(depth=24), (491, 2_028_328_000)),
        (MMDiTConfig(depth=38, qk_norm=True), (923, 8_056_627_520)),
        (
            MMDiTConfig(
                depth=24,
                pos_embed_max_size=384,
                qk_norm=True,
                dual_attention_layers=tuple(range(13)),
            ),
            (665, 2_243_171_520),
        ),
    ],
)
def test_released_sizes_have_their_parameters(size, counts):
    """Tensors of the file and parameters without the position table, as counted in the releases."""
    with torch.device("meta"):
        state = MMDiT(size).state_dict()
    parameters = sum(t.numel() for name, t in state.items() if name != "pos_embed")
    assert (len(state), parameters) == counts


@pytest.mark.parametrize("depth", [15, 18, 21, 24, 30, 38])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_papers_family_is_read_back_from_its_shapes(depth, qk_norm):
    config = MMDiTConfig(depth=depth, qk_norm=qk_norm)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in MMDiT(config).state_dict().items()}
    assert MMDiTConfig.from_shapes(shapes) == config


def test_small_sizes_are_read_back_from_their_shapes(tiny):
    shapes = {name: tuple(t.shape) for name, t in tiny.state_dict().items()}
    assert MMDiTConfig.from_shapes(shapes) == tiny.config


def test_shapes_of_another_network_are_refused():
    with pytest.raises(CheckpointError, match="x_embedder"):
        MMDiTConfig.from_shapes({"encoder.conv_in.weight": (128, 3, 3, 3)})


def test_batch_of_two_equals_two_batches_of_one(tiny):
    both = inputs_for(tiny)
    apart = torch.cat([tiny(**{k: v[i : i + 1] for k, v in both.items()}) for i in range(2)])
    torch.testing.assert_close(tiny(**both), apart, atol=1e-5, rtol=0)


def test_a_shared_prefix_changes_nothing(tiny):
    given = inputs_for(tiny)
    prefix = tiny.run_blocks(tiny.embed(**given), [0])
    parted = tiny.unembed(tiny.run_blocks(prefix, [2]))
    torch.testing.assert_close(parted, tiny(**given, skip_layers=[1]), atol=0, rtol=0)


def test_tokens_lie_in_memory_in_their_order(tiny):
    """Or each norm of each block would copy them first."""
    tokens = tiny.embed(**inputs_for(tiny))
    assert tokens.x.is_contiguous()
    assert tokens.context.is_contiguous()


def test_tokens_split_and_join(tiny):
    tokens = tiny.embed(**inputs_for(tiny))
    joined = Tokens.cat([tokens.rows(0, 1), tokens.rows(1, 2)])
    torch.testing.assert_close(joined.x, tokens.x, atol=0, rtol=0)
    torch.testing.assert_close(joined.context, tokens.context, atol=0, rtol=0)
    torch.testing.assert_close(joined.c, tokens.c, atol=0, rtol=0)


@pytest.mark.parametrize(("rows", "columns"), [(7, 6), (8, 5), (3, 1), (20, 2), (2, 20)])
def test_any_side_the_table_allows_comes_back_as_it_went_in(tiny, rows, columns):
    given = inputs_for(tiny, rows=rows, columns=columns)
    assert tiny(**given).shape == given["x"].shape


def test_a_latent_larger_than_the_table_is_refused(tiny):
    with pytest.raises(ValueError, match=r"22 x 4.*ends at 20 latent pixels"):
        tiny(**inputs_for(tiny, rows=22, columns=4))


def test_the_order_of_text_tokens_does_not_matter(tiny):
    """Text has no positions of its own in the MMDiT: attention sees a set."""
    given = inputs_for(tiny)
    turned = given | {"context": given["context"].flip(1)}
    torch.testing.assert_close(tiny(**turned), tiny(**given), atol=1e-5, rtol=0)


def test_every_layer_comes_from_ops_and_attention_is_injected():
    made, attended = [], []

    class Ops:
        def __getattr__(self, name):
            layer = getattr(torch.nn, name)

            def build(*args, **options):
                made.append(layer(*args, **options))
                return made[-1]

            return build

    def attend(q, k, v, mask=None):
        attended.append(q.shape)
        return q.transpose(1, 2).flatten(2)

    config = MMDiTConfig(
        depth=2,
        context_dim=8,
        pooled_dim=8,
        qk_norm=True,
        dual_attention_layers=(0,),
        pos_embed_max_size=4,
    )
    model = MMDiT(config, ops=Ops(), attention=attend)
    owned = {id(module) for module in model.modules() if list(module.parameters(recurse=False))}
    assert owned <= {id(module) for module in made}
    model(**inputs_for(model, rows=4, columns=4))
    assert len(attended) == 3  # two joint ones and the second attention of block 0
