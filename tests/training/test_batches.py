"""The samples of a step: a pure function of it, however processes and passes share them."""

from dataclasses import replace

import pytest
import torch
from sd3_pack.sd3_core.conditioning import Conditioning
from sd3_pack.sd3_core.training.batches import Batches, generator
from sd3_pack.sd3_core.training.cache import CachedLatents, CachedPrompt
from sd3_pack.sd3_core.training.config import TrainConfig
from sd3_pack.sd3_core.training.dataset import tensor_dataset
from sd3_pack.sd3_core.training.layout import Layout, Span

LAYOUT = Layout(6, 8, 4, {"clip_l": Span((0, 3), (0, 4), (0, 2)), "t5": Span((3, 6), (0, 8))})
CONFIG = TrainConfig(run_name="x", caption_dropout=0.0, seed=5)


class Entries:
    """Latents that are the picture's mean, prompts that are the caption's length."""

    def latents(self, item):
        mean = item.picture.image.mean() * torch.ones(2, 4, 4)
        mask = torch.zeros(1, 4, 4) if item.captions[0][0] == "masked" else None
        return CachedLatents(mean, torch.zeros(2, 4, 4), mask)

    def conditioning(self, caption):
        value = float(len(caption))
        return CachedPrompt(
            Conditioning(torch.full((1, 6, 8), value), torch.full((1, 4), value)), LAYOUT
        )


def batches(config: TrainConfig = CONFIG, captions=("a", "bb", "ccc", "dddd", "eeeee")) -> Batches:
    images = [torch.full((3, 32, 32), float(index)) for index in range(len(captions))]
    return Batches(tensor_dataset(images, captions), Entries(), config)


def test_slices_of_a_batch_are_the_batch():
    whole = batches().samples(3, range(6), 6)
    given = batches()
    parts = [given.samples(3, range(start, start + 2), 6) for start in (4, 0, 2)]
    order = torch.cat([parts[1].noise, parts[2].noise, parts[0].noise])
    assert torch.equal(order, whole.noise)
    assert torch.equal(torch.cat([parts[i].x0 for i in (1, 2, 0)]), whole.x0)
    assert torch.equal(torch.cat([parts[i].u for i in (1, 2, 0)]), whole.u)


def test_parts_of_a_batch_are_of_one_size_each_however_it_is_shared():
    images = [torch.zeros(3, side, 32) for side in (32, 32, 32, 16, 16, 8)]
    dataset = tensor_dataset(images, [str(n) for n in range(6)])
    given = Batches(dataset, Entries(), CONFIG)
    for step in range(6):
        for shared in ([range(4)], [range(2), range(2, 4)], [range(1), range(1, 4)]):
            parts = [part for rows in shared for part in given.parts(step, rows, 4)]
            assert [row for part in parts for row in part] == list(range(4))
            for part in parts:
                draws = dataset.batch(step, 4, CONFIG.seed, part.start, len(part))
                assert len({dataset.items[draw.item].bucket for draw in draws}) == 1
    rows = range(2, 6)
    assert batches().parts(0, rows, 6) == [rows]


def test_every_sample_has_its_own_noise_and_time():
    first, second = batches().samples(0, range(4), 4), batches().samples(1, range(4), 4)
    noise = torch.cat([first.noise, second.noise]).flatten(1)
    assert len({tuple(row.tolist()) for row in noise}) == 8
    assert len(set(torch.cat([first.u, second.u]).tolist())) == 8


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches().samples(0, range(4), 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_standard_normal_and_times_are_uniform():
    given = batches()
    many = [given.samples(step, range(8), 8) for step in range(150)]
    noise, u = torch.cat([b.noise for b in many]), torch.cat([b.u for b in many])
    assert noise.mean().abs() < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    counts = torch.histc(u.float(), bins=4, min=0, max=1) / len(u)
    torch.testing.assert_close(counts, torch.full((4,), 0.25), rtol=0, atol=0.05)


def test_stratified_times_fall_into_a_part_each():
    u = batches(replace(CONFIG, stratified=True)).samples(2, range(8), 8).u
    assert (u * 8).floor().tolist() == list(range(8))


def test_captions_are_dropped_as_often_as_asked():
    given = batches(replace(CONFIG, caption_dropout=0.3))
    pooled = torch.cat(
        [given.samples(step, range(8), 8).conditioning.pooled for step in range(100)]
    )
    assert float((pooled[:, 0] == 0).float().mean()) == pytest.approx(0.3, abs=0.05)


def test_encoders_are_dropped_each_alone():
    given = batches(replace(CONFIG, encoder_dropout=0.464))
    many = [given.samples(step, range(8), 8).conditioning for step in range(100)]
    context = torch.cat([one.context for one in many])
    clip, t5 = (context[:, 0, 0] == 0).float(), (context[:, 4, 0] == 0).float()
    assert float(clip.mean()) == pytest.approx(0.464, abs=0.06)
    assert float(t5.mean()) == pytest.approx(0.464, abs=0.06)
    assert float((clip * t5).mean()) == pytest.approx(0.464**2, abs=0.06)


def test_the_posterior_is_sampled_unless_its_mean_is_asked_for():
    mean = batches(replace(CONFIG, posterior=False)).samples(0, range(3), 3).x0
    assert all(len(one.unique()) == 1 for one in mean)
    assert len(batches().samples(0, range(3), 3).x0[0].unique()) > 10


def test_masks_are_ones_where_a_picture_has_none():
    assert batches().samples(0, range(3), 3).mask is None
    mixed = batches(captions=("masked", "bb")).samples(0, range(2), 2)
    assert mixed.mask is not None
    assert sorted(mixed.mask.flatten(1).mean(1).tolist()) == [0.0, 1.0]


def test_a_generator_belongs_to_its_counters():
    assert generator(1, 2, "a").initial_seed() == generator(1, 2, "a").initial_seed()
    assert generator(1, 2, "a").initial_seed() != generator(1, 2, "b").initial_seed()
