"""The stages that make the embedded model: laws of their parts, and all at a tiny budget."""

import dataclasses
import math
import re

import pytest
import torch
from sd3_pack.sd3_core.checkpoints.header import read_header
from sd3_pack.sd3_core.checkpoints.load import load_vae
from sd3_pack.sd3_core.checkpoints.save import save_tensors
from sd3_pack.sd3_core.checkpoints.tensors import read_tensors
from sd3_pack.sd3_core.conditioning import Conditioning
from sd3_pack.sd3_core.embedded.captions import full_caption, short_caption
from sd3_pack.sd3_core.embedded.drawing import Painter
from sd3_pack.sd3_core.embedded.model import FILE, MODEL_KEY, NAME, is_embedded
from sd3_pack.sd3_core.embedded.render import REACH, SHAPE_LABELS, draw, truth
from sd3_pack.sd3_core.embedded.requests import known_words
from sd3_pack.sd3_core.embedded.scenes import scenes
from sd3_pack.sd3_core.embedded.stages import make
from sd3_pack.sd3_core.embedded.stages.basis import Basis, basis_of, fit_basis
from sd3_pack.sd3_core.embedded.stages.flow import (
    Asked,
    FlowStage,
    ShelfTask,
    explicit_attention,
    new_mmdit,
)
from sd3_pack.sd3_core.embedded.stages.make import (
    BUDGETS,
    IN_ORDER,
    Budget,
    Maker,
    Numbers,
    large_pictures,
    small_pictures,
)
from sd3_pack.sd3_core.embedded.stages.pack import unpack
from sd3_pack.sd3_core.embedded.stages.samples import crops
from sd3_pack.sd3_core.embedded.stages.shelf import PARTS, Encoders, Shelf, assemble, caption
from sd3_pack.sd3_core.embedded.stages.text import (
    WINDOW,
    CLIPStage,
    T5Stage,
    T5Task,
    clip_configs,
    same_elsewhere,
    t5_config,
)
from sd3_pack.sd3_core.embedded.stages.vae import (
    VAEStage,
    VAETask,
    divergence,
    new_vae,
    psnr,
    surprise,
)
from sd3_pack.sd3_core.embedded.stages.words import write_tokenizers
from sd3_pack.sd3_core.embedded.world import COLOURS
from sd3_pack.sd3_core.models.attention import attention
from sd3_pack.sd3_core.models.clip import CLIPTextModel
from sd3_pack.sd3_core.models.t5 import T5Encoder
from sd3_pack.sd3_core.models.vae import Posterior, to_model_space
from sd3_pack.sd3_core.settings import Files, Settings
from sd3_pack.sd3_core.text.encoders import TextEncoders
from sd3_pack.sd3_core.text.vocabularies import find_tokenizers

CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = write_tokenizers(tmp_path_factory.mktemp("words"))
    return find_tokenizers(("clip_l", "clip_g", "t5"), directory=folder)


@pytest.fixture(scope="module")
def networks(words):
    """Text encoders with random weights."""
    torch.manual_seed(0)
    clips = {name: CLIPTextModel(config) for name, config in clip_configs(words).items()}
    return {**clips, "t5": T5Encoder(t5_config(words))}


# --- words -------------------------------------------------------------------------------------


def test_every_word_of_the_world_is_one_token_of_clip(words):
    single = [word for word in known_words() if re.fullmatch("[a-z]+", word)]
    assert len(single) > 50
    assert [word for word in single if len(words.clip_l.ids(word)) != 1] == []


def test_any_other_text_is_spelled(words):
    """CLIP by bytes; T5 by characters where it knows them."""
    ids = words.clip_l.ids("Zebra übermorgen 7")
    assert len(ids) > 10
    assert max(ids) < words.clip_l.size
    assert words.t5.unknown not in words.t5.ids("Zebra XYZ 7!")
    assert words.t5.unknown in words.t5.ids("ü")


def test_specials_stand_where_the_released_tokenizers_have_them(words):
    assert (words.t5.pad, words.t5.end, words.t5.unknown) == (0, 1, 2)
    assert (words.clip_l.start, words.clip_l.end) == (words.clip_l.size - 2, words.clip_l.size - 1)
    assert words.clip_l.pad == words.clip_l.end
    assert words.clip_g.pad == 0


def test_captions_fit_into_a_window(words):
    some = scenes(3, range(300))
    longest = [caption(one, number, words) for number, one in enumerate(some)]
    assert max(len(words.clip_l.ids(text)) for text in longest) <= WINDOW - 2
    assert max(len(words.t5.ids(text)) for text in longest) <= WINDOW - 1
    full = [full_caption(one, number) for number, one in enumerate(some)]
    told_in_full = sum(text in full for text in longest[0::2])
    assert told_in_full > 120  # of 150: few are too long


# --- the autoencoder ---------------------------------------------------------------------------


def test_squares_hold_the_thing_they_are_cut_around():
    some = scenes(1, range(40), (128, 128), kinds={"single": 1.0})
    squares = crops(some, 32, 0, 5)
    assert squares.shape == (40, 3, 32, 32)
    assert ((squares - squares[:, :, :1, :1]).abs().amax((1, 2, 3)) > 0.1).all()
    assert torch.equal(squares, crops(some, 32, 0, 5))
    assert not torch.equal(squares, crops(some, 32, 0, 6))


@pytest.fixture(scope="module")
def basis():
    return fit_basis(16, pictures=400)


def test_the_basis_gives_latents_as_sd3_has_them(basis):
    pictures = draw(scenes(1, range(60), (128, 128)))
    latents = basis(pictures)
    assert latents.shape == (60, 16, 16, 16)
    every = torch.cat(
        [latents.transpose(0, 1).flatten(1)]
        + [basis(draw(scenes(1, range(60)))).transpose(0, 1).flatten(1)],
        dim=1,
    )
    assert abs(float(every.mean())) < 0.05
    assert float(every.square().mean()) == pytest.approx(1, abs=0.1)
    spread = every.std(1)
    assert (spread[:-1] > 0.75 * spread[1:]).all()  # falling, but for chance


def test_the_basis_draws_what_it_saw_but_for_detail(basis):
    pictures = draw(scenes(1, range(30), (128, 128)))
    latents = basis(pictures)
    drawn = basis.draw(latents)
    torch.testing.assert_close(basis(drawn), latents, rtol=0, atol=1e-4)
    assert psnr(drawn, pictures) > 28
    # No other sixteen numbers per square could do better on the squares it was measured on.
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert psnr(basis.draw(latents + 0.1 * noise), pictures) < psnr(drawn, pictures)


def test_a_basis_comes_back_from_its_file(basis, tmp_path):
    again = Basis.load(basis.save(tmp_path / "basis.safetensors"))
    assert torch.equal(again.weight, basis.weight)
    assert torch.equal(again.bias, basis.bias)


def test_the_shipped_vae_tells_its_basis():
    vae = load_vae(FILE, dtype=torch.float32)
    read = basis_of(vae, pictures=100)
    pictures = draw(scenes(0, range(1000, 1032), (128, 128)))
    with torch.no_grad():
        expected = to_model_space(vae.encode(pictures).mean)
    missed = (read(pictures) - expected).var() / expected.var()
    assert missed < 0.01
    assert (fit_basis(16, pictures=100)(pictures) - expected).var() / expected.var() > 0.1


def test_both_halves_learn_from_the_basis_and_neither_from_the_other(basis):
    config = VAEStage(batch_size=2)
    task = VAETask(new_vae(config), config, CPU, FLOAT, basis)
    task.loss(0, range(2), 2).logs["error"].sum().backward()
    assert task.vae.decoder.conv_in.weight.grad.abs().sum() > 0
    assert task.vae.encoder.conv_in.weight.grad is None
    task.vae.zero_grad()
    task.loss(0, range(2), 2).logs["miss"].sum().backward()
    assert task.vae.encoder.conv_in.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in task.vae.decoder.parameters())


def test_without_a_basis_it_is_reconstruction_and_kl():
    config = VAEStage(batch_size=2, kl=0.5)
    task = VAETask(new_vae(config), config, CPU, FLOAT)
    losses = task.loss(0, range(2), 2)
    expected = losses.logs["error"] + 0.5 * losses.logs["kl"]
    torch.testing.assert_close(losses.each, expected)
    standard = Posterior(torch.zeros(1, 16, 4, 4), torch.zeros(1, 16, 4, 4))
    assert float(divergence(standard)) == 0
    losses.each.sum().backward()
    assert task.vae.encoder.conv_in.weight.grad.abs().sum() > 0


def test_surprise_is_least_where_the_variance_is_the_error():
    logvars = torch.linspace(-6, 2, 81)
    for miss in (0.01, 0.3, 2.0):
        best = logvars[surprise(torch.tensor(miss), logvars).argmin()]
        assert float(best) == pytest.approx(math.log(miss), abs=0.1)


# --- words and pictures ------------------------------------------------------------------------


def test_equal_captions_are_no_wrong_answers():
    expected = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
    assert torch.equal(same_elsewhere(["a", "b", "a"]), expected)


def test_gaps_can_be_filled_back(words):
    task = T5Task(words, T5Stage(), CPU, FLOAT)
    sentinels = range(words.t5.size, t5_config(words).vocab_size)
    for number, one in enumerate(scenes(2, range(60))):
        ids = words.t5.ids(short_caption(one, number))
        left, taken = task._gaps(ids, number)
        fillings, filled = {}, []
        for token in taken:
            if token in sentinels:
                fillings[token] = filling = []
            else:
                filling.append(token)
        for token in left:
            filled += fillings.get(token, [token])
        assert filled == ids
        assert set(fillings) <= set(sentinels)


def test_batches_of_captions_become_what_single_prompts_do(words, networks):
    encoders = Encoders(words, Basis(torch.zeros(16, 3, 8, 8), torch.zeros(16)), **networks)
    single = TextEncoders(
        words,
        context_dim=256,
        pooled_dim=192,
        **{name: (lambda network=network: network) for name, network in networks.items()},
        window=WINDOW,
    )
    texts = ["a red circle", "The picture shows two small blue stars on grey.", ""]
    many = assemble(encoders.read(texts))
    with torch.no_grad():
        each = Conditioning.cat([single.encode(text).conditioning for text in texts])
    torch.testing.assert_close(many.context, each.context, rtol=0, atol=2e-5)
    torch.testing.assert_close(many.pooled, each.pooled, rtol=0, atol=2e-5)


# --- rectified flow ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf():
    """Fifty made-up pictures."""
    made = Shelf.__new__(Shelf)
    draws = torch.Generator().manual_seed(0)
    shapes = {
        "latents": (16, 8, 8),
        "clip_l": (WINDOW, 64),
        "clip_l.pooled": (64,),
        "clip_g": (WINDOW, 128),
        "clip_g.pooled": (128,),
        "t5": (WINDOW, 256),
    }
    made.tensors = {
        name: torch.randn(50, *shape, generator=draws).half() for name, shape in shapes.items()
    }
    made.tensors |= {
        f"empty.{name}": torch.randn(1, *shapes[name], generator=draws).half() for name in PARTS
    }
    made.tensors["labels"] = torch.randint(8, (50, 2, 8, 8), generator=draws, dtype=torch.uint8)
    made.tensors["middles"] = torch.randn(50, 3, 8, 8, generator=draws).half()
    return made


def test_the_first_loss_is_that_of_saying_nothing(shelf):
    task = ShelfTask(new_mmdit(0, CPU), [(shelf, 1.0)], shelf, FlowStage(), CPU, FLOAT)
    with torch.no_grad():
        losses = task.loss(0, range(64), 64)
    first, asked, missed = (losses.logs[name] for name in ("velocity", "labels", "middles"))
    torch.testing.assert_close(losses.each, first + 0.1 * asked + 0.5 * missed)
    # who has learnt nothing finds all eight shapes and all nine colours equally likely
    torch.testing.assert_close(asked, torch.full_like(asked, math.log(8) + math.log(9)))
    with torch.no_grad():
        measured = task.validate()
    assert 1.9 < float(first.mean()) < 2.1  # E|noise - x0|² of unit variances
    assert measured["loss"] == pytest.approx(2.0, abs=0.1)


def test_without_its_weight_the_question_is_not_asked(shelf):
    asking, silent = (
        ShelfTask(new_mmdit(0, CPU), [(shelf, 1.0)], shelf, config, CPU, FLOAT)
        for config in (FlowStage(), FlowStage(label_weight=0.0, middle_weight=0.0))
    )
    assert set(asking.parameters) - set(silent.parameters) == {
        "asked.linear.weight",
        "asked.linear.bias",
    }
    losses = silent.loss(0, range(8), 8)
    torch.testing.assert_close(losses.each, asking.loss(0, range(8), 8).logs["velocity"])
    assert not losses.logs


def test_each_pixel_of_the_latents_is_asked_for_its_own_truth():
    """Tokens that say the truth about each of their four pixels cost nothing."""
    head = Asked(hidden=4 * 20, patch=2)
    draws = torch.Generator().manual_seed(0)
    shapes, colours = (
        torch.randint(count, (3, 6, 8), generator=draws) for count in head.counts[:2]
    )
    places = torch.rand(3, 6, 8, 3, generator=draws)
    one_hot = torch.nn.functional.one_hot
    said = torch.cat((10 * one_hot(shapes, 8), 10 * one_hot(colours, 9), places), dim=3)
    tokens = said.reshape(3, 3, 2, 4, 2, 20).transpose(2, 3).flatten(3).flatten(1, 2)
    # the head sees normalised tokens: give it the inverse of that
    mean, std = tokens.mean(2, keepdim=True), tokens.std(2, unbiased=False, keepdim=True)
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(4 * 20))
    head.linear.forward = lambda normed: normed * std + mean
    labels, where = torch.stack((shapes, colours), dim=1), places.movedim(3, 1)
    wrong, missed = head(tokens, labels, where)
    assert wrong.max() < 1e-2
    assert missed.max() < 1e-4
    wrong, missed = head(tokens, labels.flip(3), where.flip(3))
    assert wrong.min() > 1
    assert missed.min() > 0.1


def test_the_truth_is_what_the_picture_shows():
    made = scenes(5, range(64), (128, 96))
    (found, places), pictures = truth(made), draw(made) / 2 + 0.5
    assert found.shape == (64, 2, 12, 16)
    assert found.dtype == torch.uint8
    assert places.shape == (64, 3, 12, 16)
    x, y = (torch.arange(16) + 0.5) * 8, ((torch.arange(12) + 0.5) * 8)[:, None]
    for scene, label, place, picture in zip(made, found, places, pictures, strict=True):
        told = {
            (1 + SHAPE_LABELS.index(t.shape), 1 + list(COLOURS).index(t.colour))
            for t in scene.things
        }
        seen = set(map(tuple, label.flatten(1).T.tolist())) - {(0, 0)}
        assert seen == told
        for number, name in enumerate(COLOURS, 1):
            near = (picture - torch.tensor(COLOURS[name])[:, None, None]).norm(dim=0) < 0.05
            whole = near.reshape(12, 8, 16, 8).float().mean((1, 3)) == 1
            assert bool((label[1][whole] == number).all())
        there = label[0] > 0
        assert not place[:, ~there].any()
        pointed = (x + place[0] * REACH, y + place[1] * REACH, place[2] * REACH)
        middles = torch.stack([one[there] for one in pointed], dim=1)
        known = torch.tensor([(t.x, t.y, t.radius) for t in scene.things])
        assert (middles[:, None] - known).norm(dim=2).min(1).values.max() < 1e-3


def test_a_dropped_encoder_is_zero_and_the_others_stay(shelf):
    places = torch.arange(4)
    told = torch.tensor([False, False, False, False])
    whole = shelf.conditioning(places, told, {})
    where = torch.tensor([True, False, False, True])
    for name, rows, columns, pooled in (
        ("clip_l", slice(0, WINDOW), slice(0, 64), slice(0, 64)),
        ("clip_g", slice(0, WINDOW), slice(64, 192), slice(64, 192)),
        ("t5", slice(WINDOW, None), slice(None), slice(0, 0)),
    ):
        less = shelf.conditioning(places, told, {name: where})
        expected = whole.context.clone()
        expected[where, rows, columns] = 0
        assert torch.equal(less.context, expected)
        vectors = whole.pooled.clone()
        vectors[where, pooled] = 0
        assert torch.equal(less.pooled, vectors)
    assert whole.context[:, :WINDOW, 192:].abs().sum() == 0


def test_an_untold_picture_has_the_empty_prompt(shelf):
    untold = torch.tensor([False, True])
    given = shelf.conditioning(torch.tensor([3, 4]), untold, {})
    empty = assemble({name: shelf.tensors[f"empty.{name}"].float() for name in PARTS})
    assert torch.equal(given.context[1], empty.context[0])
    assert torch.equal(given.pooled[1], empty.pooled[0])
    assert not torch.equal(given.context[0], empty.context[0])


@pytest.mark.parametrize(("until", "last"), [(1.0, 0.5), (0.8, 0)])
def test_encoders_are_dropped_in_a_part_only(until, last):
    config = FlowStage(
        steps=10, encoder_dropout=0.5, encoder_dropout_from=0.6, encoder_dropout_until=until
    )
    task = ShelfTask.__new__(ShelfTask)
    task.config = config
    assert [task._encoder_dropout(step) for step in (0, 5, 6, 7, 9)] == [0, 0, 0.5, 0.5, last]


def test_explicit_attention_is_attention():
    q, k, v = torch.randn(3, 2, 3, 7, 64, generator=torch.Generator().manual_seed(0)).unbind()
    torch.testing.assert_close(explicit_attention(q, k, v), attention(q, k, v))


# --- all of it ---------------------------------------------------------------------------------

SMALLEST = Budget(
    vae=VAEStage(steps=4, batch_size=2, warmup=1, sample_every=4),
    clip=CLIPStage(steps=3, batch_size=8, warmup=1),
    t5=T5Stage(steps=3, batch_size=8, warmup=1),
    small=small_pictures(16),
    flow_64=FlowStage(steps=3, batch_size=4, warmup=1),
    large=large_pictures(16),
    flow_128=FlowStage(steps=3, batch_size=4, warmup=1, shift=1.5),
    readable=0.0,
)


@pytest.mark.long
def test_all_stages_make_a_model_that_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "HELD_PICTURES", 8)  # the budget is small in everything
    monkeypatch.setattr(make, "PART", 12)
    notes = []
    maker = Maker(tmp_path, SMALLEST, "cpu", "fp32", on_note=notes.append)
    with pytest.raises(ValueError, match="run the stage clip first"):
        maker.shelves()
    for stage in IN_ORDER.values():
        made = stage(maker)
    assert made.stat().st_size < 15_000_000
    pictures = Painter(Files(checkpoint=made), Settings(prompt="", steps=2))(["a red star"] * 2, 1)
    assert pictures.shape == (2, 3, 128, 128)
    assert not torch.equal(pictures[0], pictures[1])
    notes.clear()
    for stage in IN_ORDER.values():
        stage(maker)
    finished = [note for note in notes if note.endswith("is finished")]
    assert len(finished) == 5  # every stage that learns: nothing is done twice
    strict = dataclasses.replace(
        SMALLEST, flow_64=dataclasses.replace(SMALLEST.flow_64, steps=5), readable=0.99
    )
    with pytest.raises(ValueError, match=r"% of pictures readable.*give the stage vae more steps"):
        Maker(tmp_path, strict, "cpu", "fp32").flow_64()
    longer = dataclasses.replace(SMALLEST.t5, steps=5)
    again = Maker(tmp_path, dataclasses.replace(SMALLEST, t5=longer), "cpu", "fp32")
    again.t5()
    assert (tmp_path / "sd3" / "tiny-t5" / "state" / "step-00000005.safetensors").exists()
    with pytest.raises(ValueError, match="trained with other text encoders"):
        again.pack()  # that MMDiT knows the T5 of before


def test_the_shipped_model_comes_apart_and_together(tmp_path):
    maker = Maker(tmp_path, BUDGETS["laptop"], "cpu", "fp32")
    maker.unpack()
    for stage in ("vae", "clip", "t5", "flow-64"):
        assert maker.product(stage).exists()
    flow = tmp_path / "sd3" / "tiny-flow-128" / "model" / "tiny-flow-128.safetensors"
    flow.parent.mkdir(parents=True)
    flow.write_bytes(maker.product("flow-64").read_bytes())
    before, after = (read_header(path) for path in (FILE, maker.pack()))
    first, second = read_tensors(before), read_tensors(after)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert before.metadata[MODEL_KEY] == NAME
    assert after.metadata == before.metadata | {MODEL_KEY: "sd3-tiny-local"}
    assert is_embedded(after.metadata)
    for name in (NAME, "mine", "sd3-tiny-/../x"):  # the shipped one's belongs to its weights
        with pytest.raises(ValueError, match="begins with sd3-tiny-"):
            dataclasses.replace(maker, name=name).pack()
    for stage in (Maker.vae, Maker.clip, Maker.t5, Maker.flow_64):  # nothing is trained anew
        found = (maker.output / "sd3").rglob("*.safetensors")
        before = {path: path.stat().st_mtime_ns for path in found}
        stage(maker)
        assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(ValueError, match="is there already: name another --output"):
        maker.unpack()


def test_shelves_come_in_parts_whose_names_tell_what_is_in_them(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "HELD_PICTURES", 4)
    monkeypatch.setattr(make, "PART", 6)
    few = dataclasses.replace(SMALLEST, large=(Numbers((128, 128), range(8), 1.0),))
    maker = Maker(tmp_path, few, "cpu", "fp32")
    maker.unpack()
    folder = maker.shelves()
    first = {path.name.rpartition("-")[0]: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(first) == {"128x128-held", "128x128-0-6", "128x128-6-8"}  # none of 64 pixels
    next(folder.glob("*-6-8-*")).unlink()  # as if it had been stopped there
    maker.shelves()
    again = {path.name.rpartition("-")[0]: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert [name for name in first if first[name] != again[name]] == ["128x128-6-8"]
    dataclasses.replace(maker, first_scene=100).shelves()
    fresh = {path.name.rpartition("-")[0] for path in folder.iterdir()} - set(first)
    assert fresh == {"128x128-100-106", "128x128-106-108"}
    with pytest.raises(ValueError, match="run the stage shelves first"):
        dataclasses.replace(maker, first_scene=200).flow_128()
    single = dataclasses.replace(few.large[0], kinds={"single": 1.0})
    other = dataclasses.replace(maker, budget=dataclasses.replace(few, large=(single,)))
    assert not any(path.exists() for path in other._parts(single))


def test_only_an_embedded_model_comes_apart(tmp_path):
    strange = save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)})
    paths = dict.fromkeys(("mmdit", "vae", "clips", "t5", "tokenizers", "basis"), tmp_path / "x")
    with pytest.raises(ValueError, match="no embedded model"):
        unpack(strange, **paths)


def test_budgets_name_every_scene_once():
    """Shelves of a budget do not share scenes, so that shares mean what they say."""
    for budget in BUDGETS.values():
        for shelves in (budget.small, budget.large):
            numbers = [number for one in shelves for number in (one.scenes.start, one.scenes.stop)]
            assert numbers == sorted(numbers)
            assert sum(one.share for one in shelves) == pytest.approx(1)
