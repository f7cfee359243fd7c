"""Pictures that look alike are found; pictures that do not are left in peace."""

from io import BytesIO

import numpy as np
from PIL import Image, ImageEnhance
from sample_pictures import texture
from sd3_pack.sd3_core.training.duplicates import (
    exact_duplicates,
    near_duplicates,
    perceptual_hash,
)


def distance(a: Image.Image, b: Image.Image) -> int:
    first, second = perceptual_hash(a), perceptual_hash(b)
    assert first is not None
    assert second is not None
    return (first ^ second).bit_count()


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


def test_copies_keep_their_hash():
    picture = texture(200, 150)
    assert distance(picture, picture.copy()) == 0
    assert distance(picture, picture.resize((90, 70))) <= 4
    assert distance(picture, jpeg(picture, 40)) <= 4
    assert distance(picture, ImageEnhance.Brightness(picture).enhance(0.8)) <= 4


def test_different_pictures_are_far_apart():
    pictures = [texture(64, 64, seed) for seed in range(30)]
    pairs = [distance(a, b) for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(pairs) > 4
    assert 28 < np.mean(pairs) < 36  # independent bits: 32 of 64


def test_an_even_picture_has_no_hash_and_no_duplicates():
    assert perceptual_hash(Image.new("RGB", (32, 32), "red")) is None
    assert perceptual_hash(Image.new("RGB", (1, 1))) is None
    assert near_duplicates({"a": None, "b": None}) == ()


def test_pairs_up_to_four_bits_are_found_wherever_the_bits_lie():
    generator = np.random.Generator(np.random.PCG64(0))
    for _ in range(50):
        value = int(generator.integers(0, 2**63))
        bits = generator.permutation(64)
        four = value ^ sum(1 << int(bit) for bit in bits[:4])
        five = value ^ sum(1 << int(bit) for bit in bits[:5])
        assert near_duplicates({"a": value, "b": four}) == (("a", "b"),)
        assert near_duplicates({"a": value, "b": five}) == ()


def test_the_quick_search_finds_what_comparing_all_finds():
    generator = np.random.Generator(np.random.PCG64(1))
    values = [int(value) for value in generator.integers(0, 2**63, 60)]
    values += [value ^ (1 << int(generator.integers(64))) ^ 5 for value in values[:20]]
    hashes = {f"{index:03}": value for index, value in enumerate(values)}
    found = {pair for group in near_duplicates(hashes) for pair in [group]}
    expected = {
        (a, b) for a in hashes for b in hashes if a < b and (hashes[a] ^ hashes[b]).bit_count() <= 4
    }
    assert found == expected


def test_likeness_by_way_of_a_third_makes_one_group():
    assert near_duplicates({"a": 0, "b": 0b1111, "c": 0b11111111, "d": 1 << 40 | 0xFF00}) == (
        ("a", "b", "c"),
    )


def test_the_same_bytes_make_a_group():
    assert exact_duplicates({"a": "1", "b": "2", "c": "1"}) == (("a", "c"),)
