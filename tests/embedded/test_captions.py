import pytest
from sd3_pack.sd3_core.embedded.captions import full_caption, short_caption
from sd3_pack.sd3_core.embedded.requests import advice, parse, unknown_words
from sd3_pack.sd3_core.embedded.scenes import KINDS, scenes
from sd3_pack.sd3_core.embedded.world import WORD, Group, Request


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unseen", [False, True])
def test_captions_read_back_exactly(kind, unseen):
    if (kind, unseen) == ("word", True):
        return  # words are never held out
    for index, made in enumerate(scenes(8, range(400), kinds={kind: 1.0}, unseen=unseen)):
        for variant in (index, index + 10_000):
            assert parse(short_caption(made, variant)) == made.short
            assert parse(full_caption(made, variant)) == made.full


def test_captions_say_only_words_of_the_world():
    for index, made in enumerate(scenes(9, range(500))):
        assert unknown_words(short_caption(made, index) + " " + full_caption(made, index)) == ()


def test_a_scene_is_told_in_several_ways():
    (made,) = scenes(1, [0], kinds={"relation": 1.0})
    assert len({full_caption(made, variant) for variant in range(50)}) > 15
    assert full_caption(made, 3) == full_caption(made, 3)


def test_the_full_caption_says_more_than_the_short_one():
    made = scenes(1, range(200), kinds={"pair": 1.0})
    assert all(one.full.relation and one.full.ground for one in made)
    assert all(one.short.relation is None for one in made)


@pytest.mark.parametrize(
    ("prompt", "groups", "relation", "ground"),
    [
        (
            "two red circles left of a blue square",
            [Group(2, "circle", "red"), Group(1, "square", "blue")],
            "left of",
            None,
        ),
        (
            "a red circle and a blue square",
            [Group(1, "circle", "red"), Group(1, "square", "blue")],
            None,
            None,
        ),
        ("Three small green stars!", [Group(3, "star", "green", "small")], None, None),
        (
            "a big yellow ring at the top left",
            [Group(1, "ring", "yellow", "large", "top left")],
            None,
            None,
        ),
        ("a circle that is red", [Group(1, "circle", "red")], None, None),
        ("a (red:1.3) circle", [Group(1, "circle", "red")], None, None),
        ("one star on a gray background", [Group(1, "star")], None, "grey"),
        ("2 pink crosses on black", [Group(2, "cross", "pink")], None, "black"),
        (
            "the word cat in small red letters",
            [Group(1, WORD, "red", "small", text="CAT")],
            None,
            None,
        ),
        ("a red ring on the right", [Group(1, "ring", "red", None, "right")], None, None),
    ],
)
def test_prompts_of_people_are_understood(prompt, groups, relation, ground):
    assert parse(prompt) == Request(tuple(groups), relation, ground)


def test_words_outside_the_world_are_named_once():
    assert unknown_words("an elephant, a red circle and an Elephant riding") == (
        "elephant",
        "riding",
    )
    assert unknown_words("a black circle on black") == ("black",)
    line = advice("five red dogs")
    assert line is not None
    assert line.startswith('"five", "dogs": outside of the embedded model\'s world. It knows')
    assert "\n" not in line


def test_a_prompt_inside_the_world_needs_no_advice():
    assert advice("a red circle") is None


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "names no shape"),
        ("red circles", "how many circles"),
        ("a red blue circle", "red or blue"),
        ("three red circles and two blue squares", "more than 4"),
        ("a red circle, a blue star left of a pink ring", "between two kinds"),
        ("a red circle and blue", "of what"),
    ],
)
def test_a_prompt_that_cannot_be_followed_says_why(prompt, reason):
    with pytest.raises(ValueError, match=reason):
        parse(prompt)
