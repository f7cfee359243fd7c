"""The embedded model itself: what is in its file, and that it still draws as well as is claimed."""

import json
from pathlib import Path

import pytest
import torch
from sd3_pack.sd3_core.checkpoints.header import read_header
from sd3_pack.sd3_core.checkpoints.layouts import COMPONENTS, find_components
from sd3_pack.sd3_core.checkpoints.load import load_vae, read_config
from sd3_pack.sd3_core.embedded.checker import agreement
from sd3_pack.sd3_core.embedded.drawing import Painter
from sd3_pack.sd3_core.embedded.model import FILE, MODEL_KEY, NAME, check, is_embedded, note
from sd3_pack.sd3_core.embedded.render import draw
from sd3_pack.sd3_core.embedded.scenes import scene, scenes
from sd3_pack.sd3_core.embedded.score import score
from sd3_pack.sd3_core.embedded.stages.samples import HELD
from sd3_pack.sd3_core.embedded.stages.vae import psnr
from sd3_pack.sd3_core.models.vae import to_model_space
from sd3_pack.sd3_core.settings import Files, Settings

README = Path(__file__).parent.parent.parent / "README.md"
SETTINGS = Settings(prompt="", device="cpu", dtype="fp32")


def counts(name: str) -> dict[str, dict]:
    """What `score --dtype fp32 --json` wrote, by category."""
    rows = json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    return {row["category"]: row for row in rows}


CLAIMED = counts("score.json")
FEW = counts("score-few.json")  # the same with --prompts 8 --seeds 1
PROMPTS = 8  # of each category
STRAY = 1  # pictures that another processor's rounding may turn over, of the eight
MOST_STRAY = 3  # and of all


def test_the_file_is_a_whole_sd3_in_miniature():
    assert FILE.stat().st_size < 15_000_000
    header = read_header(FILE)
    assert header.metadata[MODEL_KEY] == NAME
    assert is_embedded(header.metadata)
    parts = find_components(FILE)
    assert set(parts) == set(COMPONENTS)
    mmdit = read_config(parts["mmdit"])
    assert (mmdit.depth, mmdit.qk_norm, mmdit.dual_attention_layers) == (3, True, (0,))
    vae = read_config(parts["vae"])
    assert (vae.factor, vae.latent_channels) == (8, 16)
    stored = {str(info.dtype) for info in header.tensors.values()}
    assert stored == {"torch.float16", "torch.uint8"}  # uint8: the tokenizers' files


@pytest.fixture(scope="module")
def table():
    return score(Painter(Files(checkpoint=FILE), SETTINGS), seeds=(0,), per_category=PROMPTS)


@pytest.mark.parametrize("category", [name for name in FEW if name != "overall"])
def test_it_draws_a_few_pictures_as_recorded(table, category):
    """The first prompts of each category with one seed: no chance is left but rounding."""
    (row,) = [row for row in table.rows if row.name == category]
    assert row.total == FEW[category]["total"] == PROMPTS
    assert abs(row.right - FEW[category]["right"]) <= STRAY


def test_all_of_the_few_come_as_recorded(table):
    assert table.overall.total == FEW["overall"]["total"]
    assert abs(table.overall.right - FEW["overall"]["right"]) <= MOST_STRAY


@pytest.mark.long
def test_the_whole_score_lies_in_the_claimed_intervals():
    table = score(Painter(Files(checkpoint=FILE), SETTINGS))
    for row in (*table.rows, table.overall):
        low, high = CLAIMED[row.name]["interval"]
        assert row.total == CLAIMED[row.name]["total"]
        assert low <= row.share <= high, row


def test_the_readme_tells_the_same_numbers():
    text = README.read_text(encoding="utf-8")
    for name, row in CLAIMED.items():
        assert f"| {name} | {row['right']} of {row['total']} | {row['share']:.1%} |" in text


@torch.inference_mode()
def test_its_vae_keeps_what_a_picture_shows():
    some = scenes(HELD, range(48), (128, 128))
    vae, pictures = load_vae(FILE, dtype=torch.float32), draw(some)
    latents = torch.cat([vae.encode(part).mean for part in pictures.split(8)])
    drawn = torch.cat([vae.decode(part) for part in latents.split(8)]).clamp(-1, 1)
    assert psnr(drawn, pictures) > 33  # as the README says
    assert agreement(pictures, some) == 1
    assert agreement(drawn, some) >= 0.99  # what stages.make asks before it trains an MMDiT
    model_space = to_model_space(latents)
    assert abs(float(model_space.mean())) < 0.1
    assert float(model_space.std()) == pytest.approx(1, abs=0.1)


def test_strange_words_get_one_line_from_it_and_from_no_other_model():
    own = read_header(FILE).metadata
    said = note(own, "a red circle and a zebra in a forest")
    assert said is not None
    assert "zebra" in said
    assert "forest" in said
    assert "circle" in said  # among what it knows
    assert note(own, "a red circle") is None
    assert note({}, "a zebra") is None


def test_a_picture_is_judged_in_a_line():
    one = scene(5, 0, kinds={"count": 1.0})
    picture = draw([one])
    thing = one.things[0]
    prompt = f"{len(one.things)} {thing.colour} {thing.shape}" + (
        "es" if "ss" in thing.shape else "s"
    )
    assert check(picture, prompt).endswith("; as asked.")
    other = "red" if thing.colour != "red" else "blue"
    assert "not as asked: colour" in check(picture, prompt.replace(thing.colour, other))
    with pytest.raises(ValueError, match="zebra"):
        check(picture, "a zebra")
