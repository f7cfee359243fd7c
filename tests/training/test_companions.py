"""What lies beside pictures and is none of them: left out, told, and had in where it is meant."""

import pytest
from sample_pictures import save_texture
from sd3_pack.sd3_core.training.companions import BESIDE, HIDDEN, LABELS, SYSTEM
from sd3_pack.sd3_core.training.dataset import read_dataset
from sd3_pack.sd3_core.training.folders import Source, list_pictures
from sd3_pack.sd3_core.training.preferences import list_pairs


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def used(folder):
    return [one.name for one in list_pictures(Source(folder)).found]


def left_out(folder):
    return {k: list(names) for k, names in list_pictures(Source(folder)).left_out.items()}


def test_masks_and_control_pictures_beside_their_pictures_are_left_out(tmp_path):
    """As OneTrainer names them, and as people do."""
    labels = ["0-condlabel.png", "0-masklabel.png", "1_mask.png", "mask-1.png", "x-masklabel.png"]
    touch(tmp_path, "0.jpg", "0.txt", "1.png", *labels)
    (tmp_path / "0-masklabel.txt").write_text("monochrome")  # of a tagger that saw it, too
    assert used(tmp_path) == ["0.jpg", "1.png"]
    assert left_out(tmp_path) == {LABELS: labels}


@pytest.mark.parametrize(
    ("pictures", "companions"),
    [
        (["a.jpg", "b.png"], ["masks/a.png", "masks/b.png"]),
        (["images/a.jpg", "images/b.png"], ["Mask/a.png", "Mask/b_mask.png"]),
        (["images/sub/a.jpg"], ["conditioning_images/sub/a.png"]),
        (["a.png", "deep/a.png"], ["_control/a.png", "deep/canny/a.png"]),
        (["10_cat/a.png", "10_cat/b.png"], ["10_cat/thumbnails/a.jpg"]),
        (["a.png"], ["control/a.png", "masks/a.png"]),
        (["a.png", "b.png"], ["masks/a.png", "masks/b.png", "masks/of-a-third.png"]),
    ],
)
def test_folders_of_companions_have_the_names_of_the_pictures(tmp_path, pictures, companions):
    touch(tmp_path, *pictures, *companions)
    assert sorted(used(tmp_path)) == sorted(pictures)
    assert {k: sorted(names) for k, names in left_out(tmp_path).items()} == {
        BESIDE: sorted(companions)
    }


def test_pictures_of_masks_are_pictures(tmp_path):
    """A folder's name says nothing by itself; a caption says that a picture is meant."""
    touch(tmp_path, "carnival/1.png", "masks/2.png", "masks/3.png", "a.png", "depth/a.png")
    touch(tmp_path, "10_masks/1.png", "cat.png", "cat_mask.png", "theatre_mask.png")
    (tmp_path / "depth" / "a.txt").write_text("a deep canyon")
    (tmp_path / "cat_mask.txt").write_text("a mask that shows a cat")
    assert len(used(tmp_path)) == 9
    assert left_out(tmp_path) == {}
    listing = list_pictures(Source(tmp_path / "masks"))
    assert [one.name for one in listing.found] == ["2.png", "3.png"]


def test_metadata_has_a_companion_in(tmp_path):
    touch(tmp_path, "a.png", "a-masklabel.png", "masks/a.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "masks/a.png"}\n{"file_name": "a-masklabel.png"}'
    )
    assert used(tmp_path) == ["a-masklabel.png", "a.png", "masks/a.png"]


def test_what_systems_keep_is_left_out_and_counted(tmp_path):
    system = [
        "$RECYCLE.BIN/S-1/a.png",
        ".ipynb_checkpoints/a-checkpoint.png",
        ".thumbnails/large/a.png",
        "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg",
        "__MACOSX/._a.png",
        "sub/@eaDir/a.jpg",
    ]
    touch(tmp_path, "a.png", "sub/b.png", "._a.png", ".DS_Store", ".thumbnails/x.txt", *system)
    assert used(tmp_path) == ["a.png", "sub/b.png"]
    assert left_out(tmp_path) == {SYSTEM: system, HIDDEN: ["._a.png"]}
    inside = list_pictures(Source(tmp_path / ".thumbnails")).found  # as it was asked for
    assert [one.name for one in inside] == ["large/a.png"]


def test_the_report_says_what_is_left_out_why_and_what_to_do(tmp_path):
    for name in ("a.png", "a-masklabel.png", "masks/a.png"):
        save_texture(tmp_path / name, 64, 64)
    report = read_dataset([Source(tmp_path)], resolution=64, bucket_step=16).report
    lines = "\n".join(report.lines())
    assert report.pictures == 1
    assert f"1 picture left out, {LABELS}: a-masklabel.png" in lines
    assert f"1 picture left out, {BESIDE}: masks/a.png" in lines
    assert report.as_json()["left_out"][LABELS] == ("a-masklabel.png",)
    (tmp_path / "a.png").unlink()
    (tmp_path / "masks" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"no picture to learn from in it; 1 picture left out"):
        read_dataset([Source(tmp_path)], resolution=64, bucket_step=16)


def test_pairs_leave_out_the_same(tmp_path):
    for side in ("chosen", "rejected"):
        touch(tmp_path, f"{side}/a.png", f"{side}/a-masklabel.png", f"{side}/._a.png")
    listing = list_pairs(Source(tmp_path))
    assert [one.name for one in listing.pairs] == ["a"]
    assert listing.skipped == ()
    assert listing.left_out[LABELS] == ("chosen/a-masklabel.png", "rejected/a-masklabel.png")
    assert listing.left_out[HIDDEN] == ("chosen/._a.png", "rejected/._a.png")
