import json

import pytest
import torch
from sd3_pack.sd3_core.embedded.evaluation import UNSEEN, prompts
from sd3_pack.sd3_core.embedded.render import draw
from sd3_pack.sd3_core.embedded.requests import parse
from sd3_pack.sd3_core.embedded.scenes import scenes
from sd3_pack.sd3_core.embedded.score import run_score, score, wilson
from sd3_pack.sd3_core.embedded.world import pair_is_held_out, relation_is_held_out

CATEGORIES = [
    "single object",
    "two objects",
    "counting",
    "colours",
    "position",
    "attribute binding",
    UNSEEN,
]


def perfect(texts, seed):
    """A painter who searches the world until a scene is what was asked for."""
    return torch.cat([draw([SCENES[parse(text)]]) for text in texts])


SCENES = {made.short: made for made in scenes(0, range(3000), kinds={"single": 0.5, "count": 0.5})}
DRAWABLE = {"per_category": 4, "categories": ["counting"]}


def test_there_are_64_prompts_in_each_category():
    assert list(prompts()) == CATEGORIES
    for texts in prompts().values():
        assert len(texts) == len(set(texts)) == len({parse(text) for text in texts}) == 64


def test_only_the_unseen_prompts_hold_held_out_combinations():
    for category, texts in prompts().items():
        for request in map(parse, texts):
            groups = request.groups
            held = any(pair_is_held_out(group.colour, group.shape) for group in groups)
            if request.relation:
                first, second = groups
                held |= relation_is_held_out(first.colour, request.relation, second.colour)
            assert held == (category == UNSEEN)


def test_the_prompts_never_change():
    assert prompts()["counting"][:2] == ("two yellow circles", "three purple squares")
    assert prompts()[UNSEEN][0] == "a large blue ring"


def test_a_perfect_painter_is_always_right():
    table = score(perfect, seeds=(0, 1), batch=3, **DRAWABLE)
    (row,) = table.rows
    assert (row.right, row.total, row.wrong) == (8, 8, ())
    assert table.overall.share == 1


def test_a_painter_of_one_picture_is_nearly_always_wrong():
    (made,) = scenes(0, [0], kinds={"count": 1.0})
    calls = []
    table = run_score(
        lambda texts, seed: draw([made] * len(texts)),
        seeds=1,
        per_category=4,
        on_batch=lambda done, total: calls.append((done, total)),
    )
    assert [row.name for row in table.rows] == CATEGORIES
    assert table.overall.total == 24  # without the unseen ones
    assert table.overall.share < 0.1
    assert dict(table.overall.wrong)["count"] > 10
    assert calls[-1] == (28, 28)


def test_the_table_is_text_and_json(tmp_path):
    output = tmp_path / "score.json"
    table = run_score(
        lambda texts, seed: torch.ones(len(texts), 3, 64, 64),
        seeds=1,
        per_category=2,
        output=output,
    )
    assert "| overall | 0 of 12 | 0.0% | 0.0% to 24.2% |" in table.text()
    rows = json.loads(output.read_text())
    assert rows[0]["category"] == "single object"
    assert rows[-1]["category"] == UNSEEN


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_those_of_the_literature(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    "settings",
    [{"seeds": ()}, {"batch": 0}, {"per_category": 0}, {"categories": ["dogs"]}],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="at least|choose of"):
        score(perfect, **settings)


def test_too_few_pictures_are_noticed():
    with pytest.raises(ValueError, match="1 pictures for 4 prompts"):
        score(lambda texts, seed: torch.ones(1, 3, 64, 64), **DRAWABLE)
