import pytest
import torch
from sd3_pack.sd3_core.embedded.checker import agreement, read, reads_back
from sd3_pack.sd3_core.embedded.components import find_pieces
from sd3_pack.sd3_core.embedded.render import draw
from sd3_pack.sd3_core.embedded.requests import parse
from sd3_pack.sd3_core.embedded.scenes import KINDS, scenes
from sd3_pack.sd3_core.embedded.verdict import judge, satisfies
from sd3_pack.sd3_core.embedded.world import COLOURS, PICTURE_SIZES
from torch.nn.functional import conv2d, pad


def behind_a_vae(pictures, seed):
    """Blur, noise and a shift of colours: 28 dB, worse than the VAE may be."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.exp(-(torch.arange(-3, 4.0) ** 2) / (2 * 0.6**2))
    kernel = kernel / kernel.sum()
    kernel = (kernel[:, None] * kernel).expand(3, 1, 7, 7)
    blurred = conv2d(pad((pictures + 1) / 2, (3,) * 4, mode="replicate"), kernel, groups=3)
    gain, offset = torch.rand(2, len(pictures), 3, 1, 1, generator=generator) * 0.06 - 0.03
    noise = 0.03 * torch.randn(blurred.shape, generator=generator)
    return (blurred * (1 + gain) + offset + noise).clamp(0, 1) * 2 - 1


@pytest.mark.parametrize("size", PICTURE_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_reads_back_and_nearly_all_behind_a_vae(kind, size):
    made = scenes(21, range(100 if min(size) == 64 else 40), size, kinds={kind: 1.0})
    pictures = draw(made)
    readings = read(pictures)
    assert all(map(reads_back, readings, made))
    assert all(
        satisfies(reading, request)
        for reading, one in zip(readings, made, strict=True)
        for request in (one.short, one.full)
    )
    assert agreement(behind_a_vae(pictures, 1), made) >= 0.99


def test_unseen_pictures_read_back_too():
    kinds = {kind: share for kind, share in KINDS.items() if kind != "word"}
    made = scenes(3, range(200), kinds=kinds, unseen=True)
    assert agreement(draw(made), made) == 1


def test_pictures_have_the_values_they_should():
    made = scenes(1, range(50))
    pictures = draw(made)
    assert pictures.shape == (50, 3, 64, 64)
    assert pictures.abs().max() <= 1
    torch.testing.assert_close(draw(made[7:8])[0], pictures[7])


def test_scenes_of_two_sizes_are_not_drawn_together():
    with pytest.raises(ValueError, match="2 sizes"):
        draw([*scenes(0, [0]), *scenes(0, [0], (96, 64))])


def reading_of(things):
    """A picture painted by hand: boxes of colour on white."""
    picture = torch.full((1, 3, 64, 64), 0.9)
    for colour, (left, top, right, bottom) in things:
        value = torch.tensor(COLOURS[colour])[:, None, None] * 2 - 1
        picture[0, :, top:bottom, left:right] = value
    return read(picture)[0]


RED_LEFT_OF_BLUE = [("red", (5, 20, 18, 33)), ("blue", (40, 22, 53, 35))]


def test_an_empty_picture_shows_nothing():
    reading = reading_of([])
    assert reading.things == ()
    assert reading.ground == "white"
    assert judge(reading, parse("a red circle")).wrong() == ("count", "shape", "colour")


def test_noise_satisfies_nothing():
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert not any(satisfies(reading, parse("a red circle")) for reading in read(pictures))


def test_a_thing_of_two_colours_has_none():
    reading = reading_of([("red", (20, 20, 33, 26)), ("blue", (20, 26, 33, 33))])
    assert [(one.shape, one.colour) for one in reading.things] == [("square", None)]


def test_a_smear_is_no_shape():
    reading = reading_of([("red", (5, 20, 60, 24))])
    assert [one.shape for one in reading.things] == [None]


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [
        ("a red square and a blue square", ()),
        ("a blue square and a red square", ()),
        ("a red square left of a blue square", ()),
        ("a blue square right of a red square", ()),
        ("a blue square left of a red square", ("relation",)),
        ("a red square above a blue square", ("relation",)),
        ("a small red square and a blue square", ()),
        ("a large red square and a blue square", ("size",)),
        ("two red squares", ("colour",)),
        ("a red square", ("count",)),
        ("two squares on black", ("ground",)),
        ("a red circle and a blue square", ("shape", "binding")),
        ("a red square on the left and a blue square", ()),
        ("a red square on the right and a blue square", ("position",)),
    ],
)
def test_the_verdict_names_what_is_wrong(prompt, wrong):
    assert judge(reading_of(RED_LEFT_OF_BLUE), parse(prompt)).wrong() == wrong


def test_swapped_colours_are_a_matter_of_binding_alone():
    made = scenes(0, range(300), kinds={"pair": 1.0})
    swap = {"circle": "square", "square": "circle"}
    one = next(s for s in made if {t.shape for t in s.things} == set(swap) and len(s.things) == 2)
    (first, second) = one.short.groups
    prompt = f"a {first.colour} {swap[first.shape]} and a {second.colour} {swap[second.shape]}"
    if first.colour and first.colour != second.colour:
        assert judge(read(draw([one]))[0], parse(prompt)).wrong() == ("binding",)


def test_pieces_are_told_apart_and_small_ones_dropped():
    mask = torch.zeros(2, 8, 10, dtype=torch.bool)
    mask[0, 1:3, 1:4] = True
    mask[0, 3, 4] = True  # touches at a corner
    mask[0, 6:8, 6:10] = True
    mask[1, 0, 0] = True  # a speck
    pieces = find_pieces(mask, smallest=2)
    assert sorted(pieces.area.tolist()) == [7, 8]
    assert pieces.picture.tolist() == [0, 0]
    assert sorted(pieces.box.tolist()) == [[1, 1, 5, 4], [6, 6, 10, 8]]
    assert (pieces.labels[1] == -1).all()


def test_a_spiral_is_one_piece():
    mask = torch.tensor([[c == "#" for c in row] for row in SPIRAL.split()])
    assert find_pieces(mask[None], 1).area.tolist() == [int(mask.sum())]


SPIRAL = """
#########
........#
#######.#
#.....#.#
#.###.#.#
#.#...#.#
#.#####.#
#.......#
#########
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_and_reads_the_same():
    made = scenes(2, range(300), (128, 96))
    pictures = draw(made, "cuda")
    torch.testing.assert_close(pictures.cpu(), draw(made), atol=1e-3, rtol=0)
    assert agreement(pictures, made) == 1
