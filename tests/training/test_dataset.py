"""Datasets: what is used, what is reported, and who is drawn when."""

import json
from collections import Counter

import pytest
import torch
from PIL import Image
from sample_pictures import save_texture, texture, with_hole
from sd3_pack.sd3_core.training.dataset import Dataset, Source, read_dataset, tensor_dataset


def read(folder, **options) -> Dataset:
    return read_dataset([Source(folder)], **{"resolution": 64, "bucket_step": 16, **options})


def caption(path, text: str):
    path.with_suffix(".txt").write_text(text, encoding="utf-8")


@pytest.fixture
def mixed(tmp_path):
    """Five squares, three wide, one tall; two sources of captions on the first."""
    for n in range(5):
        caption(save_texture(tmp_path / f"square{n}.png", 70, 70, n), f"square {n}")
    for n in range(3):
        caption(save_texture(tmp_path / f"wide{n}.jpg", 160, 80, 10 + n), f"wide {n}")
    caption(save_texture(tmp_path / "tall.webp", 80, 160, 20), "tall")
    caption(tmp_path / "square0.png", "square 0\nthe first square")
    (tmp_path / "square0.synthetic.txt").write_text("A square, at length.", encoding="utf-8")
    return read(tmp_path)


# --- what is read -------------------------------------------------------------------------------


def test_pictures_are_sorted_into_buckets_and_read_in_their_size(mixed):
    assert mixed.report.buckets == {(48, 80): 1, (64, 64): 5, (80, 48): 3}
    for item in mixed.items:
        width, height = item.bucket
        pixels = item.picture.read()
        assert pixels.image.shape == (3, height, width)
        assert -1 <= pixels.image.min() < pixels.image.max() <= 1


def test_broken_files_are_skipped_with_a_line_each(tmp_path):
    save_texture(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("hello")
    whole = save_texture(tmp_path / "cut.jpg", 100, 100).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:400])
    dataset = read(tmp_path)
    assert [item.name for item in dataset.items] == ["good.png"]
    skipped = {one.name: one.reason for one in dataset.report.skipped}
    assert set(skipped) == {"empty.png", "text.jpg", "cut.jpg"}
    lines = dataset.report.lines()
    assert "skipped empty.png: the file is empty" in lines


def test_odd_pictures_are_used_and_reported(tmp_path):
    caption(save_texture(tmp_path / "good.png", 64, 64), "x")
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    save_texture(tmp_path / "strip.png", 600, 20)
    dataset = read(tmp_path)
    report = dataset.report
    assert report.small == ("dot.png", "strip.png")
    assert report.cropped == ("strip.png",)
    assert report.without_caption == ("dot.png", "strip.png")
    assert {item.name: item.captions for item in dataset.items}["dot.png"] == (("",),)
    for item in dataset.items:
        assert item.picture.read().image.isfinite().all()


def test_transparency_is_a_mask_or_nothing(tmp_path):
    with_hole(64, 64).save(tmp_path / "hole.png")
    save_texture(tmp_path / "solid.png", 64, 64)
    masks = {item.name: item.picture.read().mask for item in read(tmp_path).items}
    assert masks["solid.png"] is None
    assert masks["hole.png"] is not None
    composite = read(tmp_path, alpha="composite", background="blue")
    hole = composite.items[0].picture.read()
    assert hole.mask is None
    assert hole.image[:, 0, 0].tolist() == [-1, -1, 1]


def test_alpha_settings_leave_opaque_pictures_alone(tmp_path):
    with_hole(64, 64).save(tmp_path / "hole.png")
    save_texture(tmp_path / "solid.png", 64, 64)
    mask = [item.picture.key for item in read(tmp_path).items]
    composite = [item.picture.key for item in read(tmp_path, alpha="composite").items]
    assert mask[0] != composite[0]
    assert mask[1] == composite[1]


def test_a_random_crop_belongs_to_the_file_and_the_seed(tmp_path):
    for n in range(6):
        save_texture(tmp_path / f"{n}.png", 300, 64, n)

    def boxes(seed):
        return [item.picture.box for item in read(tmp_path, crop="random", crop_seed=seed).items]

    assert boxes(0) == boxes(0) != boxes(1)
    assert len(set(boxes(0))) == 6
    assert all(0 <= left < right <= 300 for left, _, right, _ in boxes(0))


def test_duplicates_are_reported_and_kept(tmp_path):
    first = save_texture(tmp_path / "a.png", 64, 64, 1)
    (tmp_path / "b.png").write_bytes(first.read_bytes())
    texture(64, 64, 1).resize((50, 50)).save(tmp_path / "c.jpg")
    save_texture(tmp_path / "d.png", 64, 64, 2)
    dataset = read(tmp_path)
    assert len(dataset.items) == 4
    assert dataset.report.exact_duplicates == (("a.png", "b.png"),)
    assert dataset.report.near_duplicates == (("a.png", "b.png", "c.jpg"),)


def test_a_bucket_chosen_by_hand_is_taken_or_refused(tmp_path):
    save_texture(tmp_path / "a.png", 64, 64)
    rows = tmp_path / "metadata.jsonl"
    rows.write_text(json.dumps({"file_name": "a.png", "bucket": [32, 16]}))
    assert read(tmp_path).items[0].bucket == (32, 16)
    for bucket, fault in (
        ([30, 16], "multiples of 16"),
        ([0, 0], "multiples"),
        ([128, 64], "larger"),
    ):
        rows.write_text(json.dumps({"file_name": "a.png", "bucket": bucket}))
        with pytest.raises(ValueError, match=rf"a\.png: metadata\.jsonl:1: bucket .*{fault}"):
            read(tmp_path)


def test_several_sources_keep_their_repeats_and_weights(tmp_path):
    for name in ("cats", "dogs"):
        save_texture(tmp_path / name / "a.png", 64, 64)
    sources = [Source(tmp_path / "cats", repeats=3), Source(tmp_path / "dogs", weight=0.5)]
    dataset = read_dataset(sources, resolution=64, bucket_step=16)
    assert [(item.repeats, item.weight) for item in dataset.items] == [(3, 1.0), (1, 0.5)]
    assert dataset.items[0].name == f"{(tmp_path / 'cats').as_posix()}/a.png"
    assert dataset.report.draws == 4
    with pytest.raises(ValueError, match="listed twice"):
        read_dataset([*sources, sources[0]], resolution=64, bucket_step=16)


def test_an_empty_dataset_says_what_it_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"no picture in it; \.png"):
        read(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"none of 1 pictures can be used; a\.png: it is no picture"
    ):
        read(tmp_path)


def test_the_report_is_text_and_json(tmp_path):
    for n in range(8):
        save_texture(tmp_path / "5_cat" / f"{n}.png", 64, 64, n)
        save_texture(tmp_path / f"{n}.png", 64, 64, 50 + n)
    report = read(tmp_path).report
    assert report.lines() == [
        "16 pictures, 48 draws an epoch; 64x64: 16",
        "5_cat: 5 repeats, from the folder's name",
        "8 pictures without a caption (trained with the empty prompt): "
        "0.png, 1.png, 2.png, 3.png, 4.png and 3 more",
    ]
    stored = json.loads(json.dumps(report.as_json()))
    assert stored["buckets"] == {"64x64": 16}
    assert stored["without_caption"] == [f"{n}.png" for n in range(8)]


def test_the_report_says_what_is_made_of_several_lines_and_of_wildcards(tmp_path):
    caption(save_texture(tmp_path / "one" / "a.png", 64, 64, 1), "A cat sits.\n\nIt is soft.")
    caption(save_texture(tmp_path / "one" / "b.png", 64, 64, 2), "a {red|blue} dog {")
    caption(save_texture(tmp_path / "two" / "c.png", 64, 64, 3), "a cow\nin a field")
    sources = [Source(tmp_path / "one"), Source(tmp_path / "two", lines="whole")]
    dataset = read_dataset(sources, resolution=64, bucket_step=16)
    one, two = (folder.path.as_posix() for folder in sources)
    assert dataset.report.lines()[1:] == [
        '1 caption of several lines, each an alternative caption (lines = "whole" makes one of '
        f'them, "first" takes the first): {one}/a.png',
        f"1 caption of several lines, read as one caption: {two}/c.png",
        f"{{a|b}} in captions is learnt as written: {one}/b.png",
    ]
    assert dataset.captions()[-1] == "a cow\nin a field"


# --- who is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_each_picture_comes_once_an_epoch_but_for_what_fills_the_last_batch(mixed, size):
    drawn = Counter()
    for step in range(mixed.epoch(size)):
        batch = mixed.batch(step, size, seed=1)
        assert len(batch) == size
        drawn.update(draw.item for draw in batch)
    assert set(drawn) == set(range(9))
    assert sum(drawn.values()) - 9 == mixed.filled(size) == -9 % size


def test_repeats_are_drawn_so_often(tmp_path):
    save_texture(tmp_path / "4_cat" / "a.png", 64, 64, 0)
    save_texture(tmp_path / "b.png", 64, 64, 1)
    dataset = read(tmp_path)
    drawn = Counter(dataset.batch(step, 1, 0)[0].item for step in range(dataset.epoch(1)))
    assert sorted(drawn.values()) == [1, 4]


@pytest.mark.parametrize("parts", [(1, 1, 1, 1), (2, 2), (3, 1), (4,)])
def test_slices_of_a_batch_make_the_batch(mixed, parts):
    """However processes and accumulation share a batch, it is the same pictures and captions."""
    for step in range(6):
        whole = mixed.batch(step, 4, seed=5)
        offset, pieces = 0, []
        for count in parts:
            pieces += mixed.batch(step, 4, seed=5, offset=offset, count=count)
            offset += count
        assert pieces == whole


def test_a_batch_does_not_depend_on_what_was_asked_before(mixed, tmp_path):
    forward = [mixed.batch(step, 2, 7) for step in range(40)]
    again = read(tmp_path)
    backward = [again.batch(step, 2, 7) for step in reversed(range(40))]
    assert forward == backward[::-1]
    assert forward != [mixed.batch(step, 2, 8) for step in range(40)]


def test_epochs_differ_in_order(mixed):
    epoch = mixed.epoch(1)
    first = [mixed.batch(step, 1, 0)[0].item for step in range(epoch)]
    second = [mixed.batch(epoch + step, 1, 0)[0].item for step in range(epoch)]
    assert sorted(first) == sorted(second)
    assert first != second


def test_captions_are_drawn_from_both_sources_and_all_alternatives(mixed):
    items = (next(item for item in mixed.items if item.name == "square0.png"),)
    dataset = Dataset(items, mixed.report, original_share=0.5)
    drawn = Counter(dataset.batch(step, 1, 0)[0].caption for step in range(2000))
    assert drawn["A square, at length."] / 2000 == pytest.approx(0.5, abs=0.04)
    assert drawn["square 0"] / 2000 == pytest.approx(0.25, abs=0.04)
    assert set(drawn) == set(dataset.captions())
    only = Dataset(items, mixed.report, original_share=0.0)
    assert {only.batch(step, 1, 0)[0].caption for step in range(50)} == {"A square, at length."}


def test_impossible_batches_and_shares_are_refused(mixed):
    for arguments in ((-1, 2, 0), (0, 0, 0), (0, 2, 0, 2, 1), (0, 2, 0, -1), (0, 2, 0, 0, 3)):
        with pytest.raises(ValueError, match="of batch"):
            mixed.batch(*arguments)
    with pytest.raises(ValueError, match="original_share is 2"):
        Dataset(mixed.items, mixed.report, original_share=2)


def test_the_digest_follows_pixels_and_captions(mixed, tmp_path):
    assert read(tmp_path).digest == mixed.digest
    caption(tmp_path / "tall.webp", "very tall")
    assert read(tmp_path).digest != mixed.digest


# --- pictures in memory -------------------------------------------------------------------------


def test_tensors_make_a_dataset_of_the_same_kind():
    images = [torch.zeros(3, 16, 16), torch.ones(3, 16, 16), torch.zeros(3, 8, 16)]
    masks = [None, torch.ones(1, 16, 16), None]
    dataset = tensor_dataset(images, ["a", ["b", "c"], ""], masks)
    assert [item.bucket for item in dataset.items] == [(16, 16), (16, 16), (16, 8)]
    assert dataset.captions() == ["a", "b", "c", ""]
    assert dataset.items[1].picture.read().mask is masks[1]
    assert dataset.items[1].picture.read().image is images[1]
    assert {draw.item for step in range(3) for draw in dataset.batch(step, 1, 0)} == {0, 1, 2}
    assert dataset.report.buckets == {(16, 8): 1, (16, 16): 2}


def test_tensors_of_wrong_shape_or_number_are_refused():
    image = torch.zeros(3, 8, 8)
    with pytest.raises(ValueError, match=r"image 0 is \[8, 8, 3\]"):
        tensor_dataset([image.permute(1, 2, 0)], ["a"])
    with pytest.raises(ValueError, match="mask 0 is"):
        tensor_dataset([image], ["a"], [torch.ones(8, 8)])
    with pytest.raises(ValueError, match="1 images, 2 captions"):
        tensor_dataset([image], ["a", "b"])
    with pytest.raises(ValueError, match="is empty"):
        tensor_dataset([], [])
