"""A run in parts on split sigmas: as the run in one, and as ComfyUI's own nodes make it."""

import comfy.samplers
import pytest
import torch
from comfy_call import call
from comfy_extras.nodes_custom_sampler import FlipSigmas, SamplerCustom, SplitSigmas
from sd3_pack.nodes.errors import NodeError
from sd3_pack.nodes.passage import left_on, levels_of_all
from sd3_pack.nodes.sampling import SD3Sample, SD3ShiftSchedule

import nodes

TOLERANCE = {"atol": 1e-4, "rtol": 0}  # golden README: sampling, final latent
STEPS, SPLIT = 6, 2
SAMPLERS = ("euler", "heun", "dpmpp_2m", "euler_ancestral")


@pytest.fixture
def prompts(conditioning):
    return conditioning(1), conditioning(2)


@pytest.fixture
def empty():
    return {"samples": torch.zeros(2, 16, 8, 6)}


@pytest.fixture
def picture():
    """A latent with a mask over its left half."""
    mask = torch.zeros(1, 1, 64, 48)
    mask[..., :24] = 1
    samples = torch.randn(2, 16, 8, 6, generator=torch.Generator().manual_seed(9))
    return {"samples": samples, "noise_mask": mask}


def schedule(denoise=1.0):
    return SD3ShiftSchedule.execute(STEPS, 3.0, "normal", denoise).args[0]


def sample(model, prompts, latent, sigmas, sampler="euler", seed=5, **more):
    """(LATENT, report)"""
    out = SD3Sample.execute(model, *prompts, latent, sigmas, seed, 3.0, sampler, **more)
    return out.args[0], out.ui["sd3_report"][0]


def theirs(model, prompts, latent, sigmas, sampler="euler", add_noise=True):
    sampler = comfy.samplers.sampler_object(sampler)
    return call(SamplerCustom, model, add_noise, 5, 3.0, *prompts, sampler, sigmas, latent)[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_in_parts_is_the_run_in_one(our_model, prompts, empty, sampler):
    """To the bit; three parts."""
    whole, _ = sample(our_model, prompts, empty, schedule(), sampler)
    high, rest = call(SplitSigmas, schedule(), SPLIT)
    middle, low = call(SplitSigmas, rest, 1)
    latent, told = sample(our_model, prompts, empty, high, sampler)
    assert told["start"] == "noise added"
    assert told["leftover_noise"] == pytest.approx(float(high[-1]))
    assert any("keeps that much noise" in note for note in told["notes"])
    for part in (middle, low):
        latent, told = sample(our_model, prompts, latent, part, sampler, add_noise=False)
        assert told["start"] == "continued exactly"
    assert told["leftover_noise"] == 0
    assert told["notes"] == []
    assert torch.equal(latent["samples"], whole["samples"])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_so_is_a_masked_run_that_starts_from_a_picture(our_model, prompts, picture, sampler):
    sigmas = schedule(denoise=0.7)
    whole, _ = sample(our_model, prompts, picture, sigmas, sampler)
    high, low = call(SplitSigmas, sigmas, SPLIT)
    latent, _ = sample(our_model, prompts, picture, high, sampler)
    latent, _ = sample(our_model, prompts, latent, low, sampler, add_noise=False)
    assert torch.equal(latent["samples"], whole["samples"])
    kept = latent["samples"][..., 4:] - picture["samples"][..., 4:]
    assert kept.abs().max() < 1e-5


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("second", ["ours", "theirs"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_halves_of_ours_and_comfyuis_go_together(our_model, prompts, empty, first, second, sampler):
    high, low = call(SplitSigmas, schedule(), SPLIT)
    expected = theirs(our_model, prompts, empty, schedule(), sampler)["samples"]
    if first == "ours":
        latent, _ = sample(our_model, prompts, empty, high, sampler)
    else:
        latent = theirs(our_model, prompts, empty, high, sampler)
    if second == "ours":
        latent, told = sample(our_model, prompts, latent, low, sampler, add_noise=False)
        assert told["start"] == ("continued exactly" if first == "ours" else "continued")
    else:
        latent = theirs(our_model, prompts, latent, low, sampler, add_noise=False)
    torch.testing.assert_close(latent["samples"], expected, **TOLERANCE)


def test_what_is_left_is_what_comfyui_leaves(our_model, prompts, empty):
    high, _ = call(SplitSigmas, schedule(), SPLIT)
    ours, _ = sample(our_model, prompts, empty, high)
    left = theirs(our_model, prompts, empty, high)["samples"]
    torch.testing.assert_close(ours["samples"], left, **TOLERANCE)


def test_the_parts_are_those_of_ksampler_advanced(our_model, prompts, empty):
    """Its start_at_step and end_at_step, and a first part without noise left."""

    def advanced(latent, add_noise, start, end, leave):
        arguments = (our_model, add_noise, 5, STEPS, 3.0, "euler", "normal", *prompts, latent)
        return nodes.KSamplerAdvanced().sample(*arguments, start, end, leave)[0]

    high, low = call(SplitSigmas, schedule(), SPLIT)
    left = advanced(empty, "enable", 0, SPLIT, "enable")
    done = advanced(left, "disable", SPLIT, STEPS, "disable")
    ours, _ = sample(our_model, prompts, empty, high)
    torch.testing.assert_close(ours["samples"], left["samples"], **TOLERANCE)
    ours, _ = sample(our_model, prompts, ours, low, add_noise=False)
    torch.testing.assert_close(ours["samples"], done["samples"], **TOLERANCE)
    clean = advanced(empty, "enable", 0, SPLIT, "disable")["samples"]
    ours, told = sample(our_model, prompts, empty, high, return_with_leftover_noise=False)
    torch.testing.assert_close(ours["samples"], clean, **TOLERANCE)
    assert told["sigmas"][-1] == told["leftover_noise"] == 0
    assert any("the last step went on to 0" in note for note in told["notes"])
    assert left_on(ours["samples"]) is None


def test_without_a_choice_noise_is_added_and_told(our_model, prompts, empty, picture):
    """As ever, with what was done in the report."""
    high, low = call(SplitSigmas, schedule(), SPLIT)
    first, _ = sample(our_model, prompts, empty, high)
    latent, told = sample(our_model, prompts, first, low)
    assert told["start"] == "noise added"
    assert any("fresh noise was mixed in" in note for note in told["notes"])
    expected = theirs(our_model, prompts, first, low)["samples"]
    torch.testing.assert_close(latent["samples"], expected, **TOLERANCE)
    _, told = sample(our_model, prompts, picture, schedule(denoise=0.5))
    assert any("as for image to image" in note for note in told["notes"])
    assert sample(our_model, prompts, empty, schedule())[1]["notes"] == []


def test_samples_that_were_changed_are_taken_as_they_are(our_model, prompts, empty):
    high, low = call(SplitSigmas, schedule(), SPLIT)
    first, _ = sample(our_model, prompts, empty, high)
    changed = {**first, "samples": first["samples"] * 1.01}
    latent, told = sample(our_model, prompts, changed, low, add_noise=False)
    assert told["start"] == "continued"
    expected = theirs(our_model, prompts, changed, low, add_noise=False)["samples"]
    torch.testing.assert_close(latent["samples"], expected, **TOLERANCE)


def test_a_part_can_be_run_again(our_model, prompts, empty):
    """What was left is cached by ComfyUI and taken up as often as it likes."""
    high, low = call(SplitSigmas, schedule(), SPLIT)
    first, _ = sample(our_model, prompts, empty, high, "euler_ancestral")
    again = [
        sample(our_model, prompts, first, low, "euler_ancestral", add_noise=False)[0]["samples"]
        for _ in range(2)
    ]
    assert torch.equal(*again)


def test_a_gap_between_the_parts_is_told(our_model, prompts, empty):
    high, _ = call(SplitSigmas, schedule(), SPLIT)
    _, low = call(SplitSigmas, schedule(), SPLIT + 1)
    first, _ = sample(our_model, prompts, empty, high)
    _, told = sample(our_model, prompts, first, low, add_noise=False)
    assert told["start"] == "continued"
    assert any("as if it had been left there" in note for note in told["notes"])


def test_no_noise_at_pure_noise_is_refused(our_model, prompts, empty):
    with pytest.raises(NodeError, match=r"^SD3:bad_setting: add_noise is off and the sigmas start"):
        sample(our_model, prompts, empty, schedule(), add_noise=False)


def test_the_whole_schedule_is_found_behind_a_part():
    sigmas = schedule(denoise=0.7)
    assert levels_of_all(sigmas, add_noise=True) is None
    high, low = call(SplitSigmas, sigmas, SPLIT)
    for part, add_noise in ((high, True), (low, False)):
        found = levels_of_all(part, add_noise)
        assert found is not None
        assert torch.equal(found, sigmas)
    assert levels_of_all(low, add_noise=True) is None  # as it always was
    assert levels_of_all(torch.arange(9.0)[2:5], add_noise=True) is None  # not a schedule


# Levels that cannot be walked


@pytest.mark.parametrize(
    ("sigmas", "sampler", "words"),
    [
        ([0.0, 0.5, 0.8], "euler", "start at 0 .*FlipSigmas"),
        ([1.0, 0.0, 0.5, 0.0], "euler", "hold a 0 before their end"),
        ([0.0001, 0.5, 1.0], "euler", "end at 1 .*FlipSigmas"),
        ([0.0001, 0.5, 0.8], "euler_ancestral", "rise .*euler_ancestral walks down only"),
        ([1.0, float("nan"), 0.0], "euler", "hold what is no noise level"),
        ([1.0, -0.5, 0.0], "euler", "hold what is no noise level"),
    ],
)
def test_the_message_names_the_sigmas(our_model, prompts, empty, sigmas, sampler, words):
    with pytest.raises(NodeError, match=rf"^SD3:bad_setting: the sigmas .*{words}"):
        sample(our_model, prompts, empty, torch.tensor(sigmas), sampler)


def test_flipped_sigmas_are_named(our_model, prompts, picture):
    """FlipSigmas lifts a 0 at the start to 0.0001; the end then is the fault."""
    (flipped,) = call(FlipSigmas, schedule())
    with pytest.raises(NodeError, match=r"^SD3:bad_setting: the sigmas end at 1 .*FlipSigmas"):
        sample(our_model, prompts, picture, flipped, add_noise=False)


def test_a_run_towards_noise_is_walked_and_told(our_model, prompts, picture):
    """As with ComfyUI's own nodes."""
    (flipped,) = call(FlipSigmas, schedule(denoise=0.5))
    latent, told = sample(our_model, prompts, picture, flipped, add_noise=False)
    assert any("towards noise" in note for note in told["notes"])
    expected = theirs(our_model, prompts, picture, flipped, add_noise=False)["samples"]
    torch.testing.assert_close(latent["samples"], expected, **TOLERANCE)


def test_levels_of_another_kind_of_model_are_told(our_model, prompts, empty):
    _, told = sample(our_model, prompts, empty, torch.tensor([14.6, 3.0, 0.0]))
    assert any("made for another model" in note for note in told["notes"])


@pytest.mark.parametrize("levels", [[], [0.5]])
def test_sigmas_without_a_step_change_nothing(our_model, prompts, picture, levels):
    latent = {"samples": picture["samples"]}
    out, _ = sample(our_model, prompts, latent, torch.tensor(levels), add_noise=False)
    torch.testing.assert_close(out["samples"], latent["samples"], atol=1e-5, rtol=0)
