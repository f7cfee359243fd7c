import hashlib
from itertools import combinations, product

import pytest
from sd3_pack.sd3_core.embedded.captions import full_caption, short_caption
from sd3_pack.sd3_core.embedded.scenes import KINDS, scene, scenes
from sd3_pack.sd3_core.embedded.shapes import FORMS
from sd3_pack.sd3_core.embedded.world import (
    COLOURS,
    GROUNDS,
    PICTURE_SIZES,
    POSITIONS,
    RELATIONS,
    SHAPES,
    WORD,
    is_at,
    is_held_out,
    pair_is_held_out,
    position_of,
    relation_between,
    relation_is_held_out,
    stands,
)

FIRST_HUNDRED = "c506f3fe4623fe88"  # of scenes and captions, to a ten-thousandth of a pixel


def boxes(made):
    for thing in made.things:
        if thing.shape != WORD:
            form, r = FORMS[thing.shape], thing.radius
            yield (
                thing.x + form.left * r,
                thing.y + form.top * r,
                thing.x + form.right * r,
                thing.y + form.bottom * r,
            )


def test_colours_lie_far_apart_from_each_other_and_from_the_grounds():
    pairs = [*combinations(COLOURS.values(), 2), *product(COLOURS.values(), GROUNDS.values())]
    for one, other in pairs:
        assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5 > 0.3


def test_a_fixed_batch_is_the_same_everywhere():
    made = scenes(2024, range(100), (96, 64))
    told = [(short_caption(one, i), full_caption(one, i)) for i, one in enumerate(made)]
    shown = [
        (
            one.ground,
            [(t.shape, t.colour, t.size, t.text, f"{t.x:.4f} {t.y:.4f}") for t in one.things],
        )
        for one in made
    ]
    assert hashlib.sha256(repr((shown, told)).encode()).hexdigest()[:16] == FIRST_HUNDRED


def test_a_sample_does_not_depend_on_its_neighbours():
    assert scenes(5, range(20))[13] == scene(5, 13) == scenes(5, [13])[0]
    assert scene(5, 13) != scene(6, 13)


@pytest.mark.parametrize("size", PICTURE_SIZES)
def test_things_stay_inside_the_frame_and_never_touch(size):
    for made in scenes(1, range(300), size):
        for left, top, right, bottom in boxes(made):
            assert min(left, top, size[0] - right, size[1] - bottom) >= 1
        for one, other in combinations(boxes(made), 2):
            across = max(one[0], other[0]) - min(one[2], other[2])
            down = max(one[1], other[1]) - min(one[3], other[3])
            assert max(across, down) >= 2


def test_training_never_sees_a_held_out_combination():
    for made in scenes(0, range(4000)):
        assert not any(pair_is_held_out(thing.colour, thing.shape) for thing in made.things)
        assert not is_held_out(made)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "word"])
def test_every_unseen_scene_holds_a_held_out_combination(kind):
    assert all(is_held_out(made) for made in scenes(0, range(100), kinds={kind: 1}, unseen=True))


def test_every_shape_and_colour_is_still_seen_in_training():
    pairs = [pair for pair in product(COLOURS, SHAPES) if pair_is_held_out(*pair)]
    assert len(pairs) == 6
    assert len({colour for colour, _ in pairs}) == len({shape for _, shape in pairs}) == 6
    seen = {(t.colour, t.shape) for made in scenes(0, range(3000)) for t in made.things}
    assert {pair for pair in seen if pair[1] != WORD} == set(product(COLOURS, SHAPES)) - set(pairs)


def test_a_held_out_relation_is_held_out_from_both_ends():
    for one, other in product(COLOURS, COLOURS):
        assert relation_is_held_out(one, "left of", other) == relation_is_held_out(
            other, "right of", one
        )
    held = [c for c in product(COLOURS, RELATIONS[::2], COLOURS) if relation_is_held_out(*c)]
    assert len(held) == 14


def test_a_point_has_at_most_one_named_position():
    for x, y in product(range(0, 64, 3), range(0, 96, 3)):
        names = [name for name in POSITIONS if is_at(name, x, y, 64, 96)]
        assert names in ([], [position_of(x, y, 64, 96)])


def test_a_relation_follows_the_larger_distance_and_needs_all_things_apart():
    assert relation_between([(10, 10)], [(30, 20)]) == "left of"
    assert relation_between([(10, 40)], [(20, 10)]) == "below"
    assert not stands("left of", [(10, 10), (32, 10)], [(30, 20)])


def test_scenes_keep_what_their_captions_say():
    for made in scenes(4, range(500)):
        groups = made.full.groups
        assert sum(group.count for group in groups) == len(made.things)
        assert made.full.ground == made.ground


@pytest.mark.parametrize("kinds", [{}, {"dog": 1.0}])
def test_unknown_kinds_are_refused(kinds):
    with pytest.raises(ValueError, match="choose of single"):
        scene(0, 0, kinds=kinds)


def test_words_cannot_be_unseen():
    with pytest.raises(ValueError, match="choose of"):
        scene(0, 0, kinds={"word": 1.0}, unseen=True)
