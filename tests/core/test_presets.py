"""Presets: the table is sound, and a network finds its line in it."""

import pytest
from sd3_pack.sd3_core.checkpoints.header import read_header
from sd3_pack.sd3_core.embedded.model import FILE
from sd3_pack.sd3_core.models.mmdit import MMDiTConfig
from sd3_pack.sd3_core.presets import PRESETS, family
from sd3_pack.sd3_core.samplers import SAMPLERS
from sd3_pack.sd3_core.schedule import SCHEDULERS, Schedule

SD3_MEDIUM = MMDiTConfig(depth=24)
SD35_MEDIUM = MMDiTConfig(
    depth=24, pos_embed_max_size=384, qk_norm=True, dual_attention_layers=tuple(range(13))
)
SD35_LARGE = MMDiTConfig(depth=38, qk_norm=True)


@pytest.mark.parametrize(
    ("config", "hints", "expected"),
    [
        (SD3_MEDIUM, [], "sd3_medium"),
        (SD35_MEDIUM, [], "sd3.5_medium"),
        (SD35_LARGE, [], "sd3.5_large"),
        (SD35_LARGE, ["sd3.5_large.safetensors", "SD3.5-Large"], "sd3.5_large"),
        (SD35_LARGE, ["sd3.5_large_turbo.safetensors"], "sd3.5_large_turbo"),
        (
            SD35_LARGE,
            ["model.safetensors", "Stable Diffusion 3.5 Large TURBO"],
            "sd3.5_large_turbo",
        ),
        (SD35_MEDIUM, ["sd3.5m_turbo.safetensors"], "sd3.5_medium_turbo"),
        (SD3_MEDIUM, ["turbo.safetensors"], "sd3_medium"),
        (MMDiTConfig(depth=2, context_dim=32, pooled_dim=16), [], "other"),
        (MMDiTConfig(depth=38), [], "other"),
        (MMDiTConfig(depth=24, qk_norm=True), [], "other"),
    ],
)
def test_a_network_finds_its_family(config, hints, expected):
    assert family(config, hints) == expected


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_every_preset_is_something_the_core_can_run(preset):
    assert preset.sampler in SAMPLERS
    assert preset.scheduler in SCHEDULERS
    assert len(Schedule(preset.shift).sigmas(preset.steps, preset.scheduler)) == preset.steps + 1


def test_turbo_takes_four_steps_and_one_branch():
    turbo = PRESETS["sd3.5_large_turbo"]
    assert (turbo.steps, turbo.cfg) == (4, 1.0)


def test_medium_turbo_takes_eight_steps_and_little_guidance():
    turbo = PRESETS["sd3.5_medium_turbo"]
    assert (turbo.steps, turbo.cfg, turbo.shift) == (8, 1.5, 5.0)


def test_shift_is_three_for_all_models_but_one():
    """The released ones, and the embedded one, whose file says the same."""
    others = {name: preset.shift for name, preset in PRESETS.items() if "medium_turbo" not in name}
    assert set(others.values()) == {3.0}
    assert float(read_header(FILE).metadata["sd3_workbench.shift"]) == PRESETS["sd3_tiny"].shift


def test_skip_layers_exist_in_their_network():
    skip = PRESETS["sd3.5_medium"].skip_layers
    assert skip is not None
    assert max(skip.layers) < SD35_MEDIUM.depth
    window = Schedule(3.0).window(skip.start, skip.end)
    assert window.low < window.high < 1
