"""The validation loss: fixed pictures and noise, eight levels, a mean that leaves out the last."""

from dataclasses import dataclass, field

import pytest
import torch
from sd3_pack.sd3_core.conditioning import Conditioning
from sd3_pack.sd3_core.training.cache import CachedLatents, CachedPrompt
from sd3_pack.sd3_core.training.dataset import tensor_dataset
from sd3_pack.sd3_core.training.distributed import ALONE, World
from sd3_pack.sd3_core.training.layout import Layout
from sd3_pack.sd3_core.training.objectives import RectifiedFlow
from sd3_pack.sd3_core.training.validation import chosen, validation_loss

CAPTIONS = ["plain", ["first", "second"], "masked", "also plain", "last"]
DATASET = tensor_dataset([torch.full((3, 32, 32), float(n)) for n in range(5)], CAPTIONS)


class Entries:
    """Latents whose posterior is wide, one of them masked; prompts that name their caption."""

    def __init__(self):
        self.asked: list[str] = []

    def latents(self, item):
        caption = item.captions[0][0]
        self.asked.append(caption)
        mean = item.picture.image.mean() * torch.ones(2, 4, 4)
        mask = None
        if caption == "masked":
            mask = torch.zeros(1, 4, 4)
            mask[:, :2] = 1.0
        return CachedLatents(mean, torch.full((2, 4, 4), 5.0), mask)

    def conditioning(self, caption):
        letters = torch.full((1, 1, 1), float(ord(caption[0])))
        return CachedPrompt(Conditioning(letters, letters[0]), Layout(1, 1, 1, {}))


class Network:
    """Answers `velocity(x, timestep)` and remembers what it was asked."""

    def __init__(self, velocity=lambda x, timestep: torch.zeros_like(x)):
        self.velocity = velocity
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.letters: list[str] = []

    def __call__(self, conditioning):
        self.letters += [chr(int(value)) for value in conditioning.context[:, 0, 0]]

        def predict(x, timestep):
            assert not torch.is_grad_enabled()
            self.seen.append((x, timestep))
            return self.velocity(x, timestep)

        return predict

    @property
    def timesteps(self) -> list[float]:
        return torch.cat([timestep for _, timestep in self.seen]).tolist()

    @property
    def inputs(self) -> torch.Tensor:
        return torch.cat([x for x, _ in self.seen])


def measure(network=None, entries=None, *, seed=3, batch_size=8, world=ALONE, items=DATASET.items):
    network, entries = network or Network(), entries or Entries()
    given = {"seed": seed, "batch_size": batch_size, "world": world}
    cpu = torch.device("cpu")
    return validation_loss(network, RectifiedFlow(), items, entries, device=cpu, **given)


def test_the_levels_are_equidistant_and_end_at_pure_noise():
    network = Network()
    measured = measure(network)
    levels = [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]
    assert list(measured) == ["loss", *(f"t{level:g}" for level in levels)]
    assert network.timesteps == [1000 * level for level in levels] * len(DATASET.items)


def test_the_mean_leaves_out_pure_noise():
    wrong_at_the_end = Network(lambda x, t: 100.0 * (t == 1000)[:, None, None, None].expand_as(x))
    measured, usual = measure(wrong_at_the_end), measure()
    assert measured["t1"] > 1000
    assert measured["loss"] == usual["loss"]
    levels = [value for name, value in usual.items() if name not in ("loss", "t1")]
    assert len(levels) == 7
    assert usual["loss"] == pytest.approx(sum(levels) / 7)


def test_noise_belongs_to_seed_and_picture_alone():
    first, again, other = Network(), Network(), Network()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    loss = measure(first)["loss"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert measure(again)["loss"] == loss
    assert torch.equal(first.inputs, again.inputs)
    measure(other, seed=4)
    assert not torch.equal(first.inputs, other.inputs)
    at_pure_noise = first.inputs[7::8]  # one for each picture: nothing of the picture is left
    assert len({tuple(x.flatten().tolist()) for x in at_pure_noise}) == len(DATASET.items)


def test_one_picture_has_the_same_noise_at_every_level():
    network = Network()
    measure(network, items=DATASET.items[:1])  # its latent is constant
    deviations = network.inputs.flatten(1) - network.inputs.flatten(1).mean(1, keepdim=True)
    for deviation in deviations:
        directions = torch.stack([deviation, deviations[-1]])
        assert torch.corrcoef(directions)[0, 1] > 0.9999


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_size_of_a_batch_changes_nothing(batch_size):
    assert measure(batch_size=batch_size) == pytest.approx(measure(), rel=1e-6)


def test_pictures_are_taken_by_their_mean_with_their_first_caption():
    network = Network()
    measure(network)
    assert network.letters == [letter for letter in "pfmal" for _ in range(8)]
    wide = measure()

    class Certain(Entries):
        def latents(self, item):
            found = super().latents(item)
            return CachedLatents(found.mean, None, found.mask)

    assert measure(entries=Certain()) == wide


def test_what_a_mask_hides_costs_nothing():
    """A velocity that is wild where the mask is 0."""

    def loss(caption, amount):
        def velocity(x, timestep):
            answer = torch.zeros_like(x)
            answer[:, :, 2:] = amount
            return answer

        items = [item for item in DATASET.items if item.captions[0][0] == caption]
        return measure(Network(velocity), items=items)["loss"]

    assert loss("masked", 1e3) == loss("masked", 0.0)
    assert loss("plain", 1e3) > 1e3 * loss("plain", 0.0)


@dataclass(frozen=True)
class OneOfTwo(World):
    """A process whose sums wait for the other's."""

    size: int = 2
    sums: list[torch.Tensor] = field(default_factory=list)

    def add(self, tensors):
        (totals,) = tensors
        self.sums.append(totals.clone())
        totals.copy_(sum(self.sums))


def test_processes_share_the_work_and_measure_what_one_measures():
    sums: list[torch.Tensor] = []
    entries = [Entries(), Entries()]
    for rank in (0, 1):
        shared = measure(entries=entries[rank], world=OneOfTwo(rank=rank, sums=sums))
    assert shared == pytest.approx(measure(), rel=1e-6)
    names = [item.captions[0][0] for item in DATASET.items]
    assert sorted(entries[0].asked + entries[1].asked) == sorted(names)  # disjoint and complete
    assert abs(len(entries[0].asked) - len(entries[1].asked)) <= 1


@pytest.mark.parametrize(("most", "picked"), [(2, [0, 2]), (3, [0, 1, 3]), (99, [0, 1, 2, 3, 4])])
def test_the_chosen_pictures_are_spread_evenly(most, picked):
    assert chosen(DATASET, most) == [DATASET.items[index] for index in picked]
