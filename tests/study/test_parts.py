"""What the rows are built from: features, paths, arms, cells."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from sd3_pack.sd3_core.embedded.model import FILE
from sd3_pack.sd3_core.embedded.render import draw
from sd3_pack.sd3_core.embedded.scenes import scenes
from sd3_pack.sd3_core.schedule import Schedule
from sd3_pack.sd3_core.settings import Files, Settings
from sd3_pack.sd3_core.study import lab as lab_module
from sd3_pack.sd3_core.study.arms import (
    ArmTask,
    Network,
    largest_logit,
    new_arm,
    validation_loss,
)
from sd3_pack.sd3_core.study.autoencoder import linear
from sd3_pack.sd3_core.study.budgets import BUDGETS, find_budget
from sd3_pack.sd3_core.study.cells import Cell, Ledger, key_of
from sd3_pack.sd3_core.study.drawing import PathPainter, scores, walk
from sd3_pack.sd3_core.study.features import features, frechet, ssim
from sd3_pack.sd3_core.study.lab import Lab, TimeIsUp
from sd3_pack.sd3_core.study.measurements import ArmScore, Drawn
from sd3_pack.sd3_core.study.rows.claims import arm
from sd3_pack.sd3_core.training.objectives import RectifiedFlow

SCENES = 700
CPU, FLOAT = torch.device("cpu"), torch.float32


def blurred(pictures):
    return torch.nn.functional.avg_pool2d(pictures, 5, stride=1, padding=2, count_include_pad=False)


@pytest.fixture(scope="module")
def pictures():
    return draw(scenes(3, range(SCENES), kinds={"single": 1.0}))


# --- features ------------------------------------------------------------------------------------


def test_the_distance_of_two_normal_clouds():
    """Means 1.5 deviations apart along one axis, deviations half: 1.5^2 + 2 * 0.5^2, of 2."""
    draws = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0)).double()
    other = 2 * draws.flip(0)
    moved = draws + torch.tensor([3.0, 0.0])
    assert frechet(moved, other) == pytest.approx(100 * (2.25 + 0.5) / 2, rel=0.02)
    assert frechet(draws, draws) == pytest.approx(0, abs=1e-6)


def test_the_features_tell_blur_colour_and_noise_from_other_pictures(pictures):
    first, second = pictures[:600], pictures[600:]
    truth = features(first)
    near = frechet(features(second), truth)
    assert frechet(features(blurred(second)), truth) > 2 * near
    assert frechet(features(second * torch.tensor([1, 0.6, 1])[:, None, None]), truth) > 2 * near
    assert frechet(features(second + 0.1 * torch.randn_like(second)), truth) > 10 * near


def test_ssim_is_one_for_equal_pictures_and_falls_with_blur(pictures):
    some = pictures[:4]
    assert ssim(some, some) == pytest.approx(1)
    assert ssim(blurred(some), some) < 0.95
    assert ssim(-some, some) < 0


def test_more_linear_channels_lose_less(lab, pictures):
    errors = [
        float((linear(lab.world.basis(channels), pictures) - pictures).square().mean())
        for channels in (4, 8, 16)
    ]
    assert errors[0] > 1.3 * errors[1] > 1.3 * 1.3 * errors[2]


def test_true_pictures_score_nearly_all(pictures):
    from sd3_pack.sd3_core.embedded.captions import short_caption

    some = scenes(3, range(SCENES), kinds={"single": 1.0})
    found = scores(pictures, [short_caption(scene, 0) for scene in some])
    assert found == {"right": 100, "attributes": 100}
    wrong = scores(pictures.roll(1, 0), [short_caption(scene, 0) for scene in some])
    assert wrong["right"] < 10
    assert 20 < wrong["attributes"] < 70


# --- paths ----------------------------------------------------------------------------------------


def test_a_constant_velocity_walks_straight():
    objective = RectifiedFlow(schedule=Schedule(1.0))
    noise = torch.randn(3, 2, 4, 4)
    velocity = torch.randn(3, 2, 4, 4)
    walked = walk(objective, lambda x, timestep: velocity, noise, 7)
    length = velocity.flatten(1).norm(dim=1)
    torch.testing.assert_close(walked.length, length, rtol=1e-5, atol=0)
    torch.testing.assert_close(walked.chord, length, rtol=1e-5, atol=0)


def test_a_bent_path_is_longer_than_its_chord():
    """A velocity that turns: first along one axis, then along another."""
    objective = RectifiedFlow(schedule=Schedule(1.0))
    one, other = torch.zeros(2, 1, 1, 2), torch.zeros(2, 1, 1, 2)
    one[..., 0], other[..., 1] = 1.0, 1.0

    def predict(x, timestep):
        return one if float(timestep[0]) > 500.5 else other

    levels = objective.schedule.sigmas(10).tolist()
    first = sum(high - low for high, low in pairwise(levels) if high > 0.5005)
    walked = walk(objective, predict, torch.zeros(2, 1, 1, 2), 10)
    assert walked.length.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert walked.chord.tolist() == pytest.approx(
        [(first**2 + (1 - first) ** 2) ** 0.5] * 2, rel=1e-4
    )


def test_a_painter_tells_how_far_it_went():
    """The pictures are the Painter's; the steps in latent space lead from the noise to x0."""
    settings = Settings(
        prompt="",
        width=64,
        height=64,
        steps=3,
        cfg=2.0,
        sampler="euler",
        dtype="fp32",
        device="cpu",
    )
    painter = PathPainter(Files(checkpoint=FILE), settings)
    prompts = ["a red circle", "two blue squares"]
    pictures, walked = painter.walk(prompts, 5)
    torch.testing.assert_close(pictures, painter(prompts, 5), rtol=0, atol=0)
    assert (walked.length > walked.chord).all()
    assert (walked.chord > 1).all()
    painter.settings = replace(settings, steps=1)
    _, straight = painter.walk(prompts, 5)
    torch.testing.assert_close(straight.length, straight.chord, rtol=1e-4, atol=0)


# --- arms -----------------------------------------------------------------------------------------


def network(made, seed=0):
    return Network(new_arm(made, seed), CPU, FLOAT)


def test_arms_of_one_seed_see_the_same_pictures_and_noise(lab, tiny):
    """A network that says 0 is wrong by noise - x0, whatever the time."""
    shelves = lab.world.training(64, tiny.scenes)
    losses = [
        ArmTask(arm(tiny, density=density), seed, network(arm(tiny)), shelves)
        .loss(3, range(0, 4), 4)
        .each
        for density, seed in (("uniform", 0), ("logit_normal(0, 1)", 0), ("uniform", 1))
    ]
    torch.testing.assert_close(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
    assert float(losses[0].detach().mean()) == pytest.approx(2, abs=0.5)


def test_both_captions_are_of_the_same_picture(lab, tiny):
    shelves = lab.world.training(64, tiny.scenes)
    torch.testing.assert_close(shelves.short.tensors["latents"], shelves.full.tensors["latents"])
    places, nowhere = torch.arange(4), torch.zeros(4, dtype=torch.bool)
    mixed = shelves.conditioning(places, nowhere, {}, torch.tensor([True, False, True, False]))
    long = shelves.conditioning(places, nowhere, {}, ~nowhere)
    short = shelves.conditioning(places, nowhere, {}, nowhere)
    for row, source in enumerate((long, short, long, short)):
        assert torch.equal(mixed.context[row], source.context[row])
        assert torch.equal(mixed.pooled[row], source.pooled[row])
    assert not torch.equal(long.context, short.context)


def test_encoders_that_are_not_used_give_zeros(lab):
    whole = lab.world.read(["a red circle"])
    alone = lab.world.read(["a red circle"], ("t5",))
    window = whole.context.shape[1] // 2
    assert not alone.context[:, :window].any()
    assert not alone.pooled.any()
    assert torch.equal(alone.context[:, window:], whole.context[:, window:])


def test_the_validation_loss_of_a_network_that_says_nothing(lab, tiny):
    held = lab.world.held(64)
    found = validation_loss(network(arm(tiny)), arm(tiny).make_objective(), held)
    assert found == pytest.approx(2, abs=0.3)


def test_the_largest_logit_grows_with_the_weights_unless_they_are_normed(lab, tiny):
    held = lab.world.held(64)
    for norm in (True, False):
        found = network(arm(tiny, qk_norm=norm))
        usual, before = found.model.attention, largest_logit(found, held)
        with torch.no_grad():
            for block in found.model.joint_blocks:
                block.x_block.attn.qkv.weight *= 4
                block.context_block.attn.qkv.weight *= 4
        # with adaLN at zero the blocks see normed tokens, so without a norm it is 4 * 4
        assert largest_logit(found, held) / before == pytest.approx(1 if norm else 16, rel=0.02)
        assert found.model.attention is usual


# --- cells ----------------------------------------------------------------------------------------


def test_the_ledger_gives_back_what_it_keeps(tmp_path):
    ledger, settings = Ledger(tmp_path), {"kind": "Arm", "a": 1, "b": [1, 2]}
    cell = Cell({"loss": 0.1, "right@5": 12.5}, 1.25, "here")
    assert ledger.find(settings, 0) is None
    path = ledger.keep("an arm, 5", settings, 0, cell)
    assert ledger.find(settings, 0) == cell
    assert ledger.find(settings, 1) is None
    assert ledger.find(settings | {"a": 2}, 0) is None
    path.write_text(path.read_text()[:40])
    assert ledger.find(settings, 0) is None


def test_every_field_of_an_arm_is_in_its_key(lab, tiny):
    base = arm(tiny)
    others = [
        replace(base, **{name: value})
        for name, value in {
            "depth": 3,
            "steps": 9,
            "batch_size": 9,
            "learning_rate": 0.5,
            "scenes": 9,
            "objective": "edm",
            "density": "uniform",
            "shift": 3.0,
            "full_captions": 0.0,
            "encoder_dropout": 0.464,
            "qk_norm": False,
            "side": 128,
            "start": base,
        }.items()
    ]
    assert set(base.settings()) == set(base.__dataclass_fields__)
    keys = {key_of(lab.of_an_arm(one), 0) for one in (base, *others)}
    assert len(keys) == len(others) + 1 == len(base.__dataclass_fields__) + 1


def test_a_label_is_no_part_of_the_key_and_the_model_is(lab, tiny):
    one, other = (ArmScore(label, arm(tiny), (1,), 2) for label in ("a", "b"))
    assert one.settings(lab) == other.settings(lab)
    drawn = Drawn("a", 1)
    assert drawn.settings(lab) != drawn.settings(replace(lab, files=Files(checkpoint=FILE)))


def test_an_arm_that_was_stopped_goes_on_as_if_it_had_not(lab, tiny, tmp_path, monkeypatch):
    made = arm(replace(tiny, steps=6))
    whole = Lab(tmp_path / "whole", CPU, FLOAT)
    object.__setattr__(whole, "world", lab.world)
    expected = whole.trained(made, 1).read_bytes()

    clock = iter(range(1000))
    monkeypatch.setattr(lab_module.time, "monotonic", lambda: next(clock))
    broken = Lab(tmp_path / "broken", CPU, FLOAT, deadline=3)
    object.__setattr__(broken, "world", lab.world)
    with pytest.raises(TimeIsUp):
        broken.trained(made, 1)
    assert not list((tmp_path / "broken").rglob("study-????????????.safetensors"))
    monkeypatch.undo()
    again = Lab(tmp_path / "broken", CPU, FLOAT)
    object.__setattr__(again, "world", lab.world)
    assert again.trained(made, 1).read_bytes() == expected


def test_an_unknown_budget_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"budget is 'huge'; .*half-hour.*night.*gpu"):
        find_budget("huge")
    assert find_budget("gpu") is BUDGETS["gpu"]
    with pytest.raises(ValueError, match="seeds is 2"):
        replace(BUDGETS["gpu"], seeds=2)
