"""That training teaches: small networks, measured by what they draw."""

import pytest
import torch
from sd3_pack.sd3_core.conditioning import Conditioning
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from sd3_pack.sd3_core.models.vae import to_vae_space
from sd3_pack.sd3_core.schedule import Schedule
from sd3_pack.sd3_core.training.batches import Batches
from sd3_pack.sd3_core.training.cache import CachedLatents, CachedPrompt
from sd3_pack.sd3_core.training.config import TrainConfig
from sd3_pack.sd3_core.training.dataset import tensor_dataset
from sd3_pack.sd3_core.training.distributed import ALONE
from sd3_pack.sd3_core.training.flow import FlowTask, Place
from sd3_pack.sd3_core.training.layout import Layout, Span
from sd3_pack.sd3_core.training.loop import fit
from sd3_pack.sd3_core.training.networks import initialise
from sd3_pack.sd3_core.training.objectives import RectifiedFlow
from sd3_pack.sd3_core.training.run import open_run

SIZE = MMDiTConfig(
    depth=2, in_channels=4, context_dim=16, pooled_dim=8, pos_embed_max_size=4, qk_norm=True
)
LAYOUT = Layout(3, 16, 8, {"t5": Span((0, 3), (0, 16))})
CAPTIONS = ("up", "down", "left", "right")


def picture(caption: str) -> torch.Tensor:
    """A latent of 4 x 8 x 8 in model space, one half bright: which, the caption says."""
    x0 = -torch.ones(4, 8, 8)
    half = {"up": x0[:, :4], "down": x0[:, 4:], "left": x0[..., :4], "right": x0[..., 4:]}
    half[caption].fill_(1.0)
    return x0


class World:
    """Four pictures and their words."""

    def latents(self, item) -> CachedLatents:
        return CachedLatents(to_vae_space(picture(item.captions[0][0])))

    def conditioning(self, caption: str) -> CachedPrompt:
        context, pooled = torch.zeros(1, 3, 16), torch.zeros(1, 8)
        if caption:
            context[:, :, CAPTIONS.index(caption)] = 1.0
            pooled[:, CAPTIONS.index(caption)] = 1.0
        return CachedPrompt(Conditioning(context, pooled), LAYOUT)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    config = TrainConfig(
        run_name="halves",
        method="full",
        steps=250,
        batch_size=16,
        learning_rate=2e-3,
        warmup=20,
        validate_every=250,
        checkpoint_every=250,
        save_dtype="fp32",
    )
    model = MMDiT(SIZE)
    initialise(model, base=4, seed=0)
    images = [torch.zeros(3, 64, 64)] * 4
    dataset = tensor_dataset(images, CAPTIONS)
    task = FlowTask(
        model,
        None,
        RectifiedFlow(schedule=Schedule(1.0)),
        Batches(dataset, World(), config),
        dataset.items,
        config,
        Place(torch.device("cpu"), torch.float32, ALONE),
        lambda step: {},
    )
    with open_run(tmp_path_factory.mktemp("learning"), "halves") as run:
        fit(task, run, config)
        lines = run.lines
    return task, lines


def test_the_validation_loss_falls_to_a_fraction(taught):
    _, lines = taught
    measured = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert measured[0] == pytest.approx(2.0, abs=0.1)  # E |eps - x0|^2 of data of unit power
    assert measured[-1] < 0.3 * measured[0]


def test_it_draws_what_the_words_say(taught):
    task, _ = taught
    torch.manual_seed(0)
    for caption in CAPTIONS:
        prompt = World().conditioning(caption).conditioning.repeat(4)
        with torch.no_grad():
            drawn = task.objective.sample(task.network(prompt), torch.randn(4, 4, 8, 8), 12)
        distances = {other: float((drawn - picture(other)).pow(2).mean()) for other in CAPTIONS}
        assert min(distances, key=distances.__getitem__) == caption
        assert distances[caption] < 0.3
