"""Preference pairs from folders and from lines: what is a pair, what says nothing, what is cut."""

import json
from pathlib import Path

import pytest
from PIL import Image
from sd3_pack.sd3_core.training.folders import Source
from sd3_pack.sd3_core.training.framing import Framing
from sd3_pack.sd3_core.training.preferences import list_pairs, read_preferences

FRAMING = Framing(64, 16)


def paint(path: Path, colour, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write_lines(folder: Path, *lines) -> Path:
    file = folder / "preferences.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture
def pictures(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        paint(tmp_path / f"{name}.png", colour)
    return tmp_path


def read(folder, **changes):
    return read_preferences([Source(folder)], framing=FRAMING, **changes)


def names(dataset):
    return [(item.picture.path.name, item.loser.picture.path.name) for item in dataset.items]


def test_folders_of_chosen_and_rejected_pictures_pair_up_by_name(tmp_path):
    for name in ("1", "2"):
        paint(tmp_path / "chosen" / f"{name}.png", "red")
        paint(tmp_path / "rejected" / f"{name}.webp", "blue")
    paint(tmp_path / "chosen" / "alone.png", "red")
    (tmp_path / "chosen" / "1.txt").write_text("a red square")
    (tmp_path / "rejected" / "2.txt").write_text("two\ntwo again")
    dataset = read(tmp_path)
    assert names(dataset) == [("1.png", "1.webp"), ("2.png", "2.webp")]
    assert [item.captions for item in dataset.items] == [
        (("a red square",),),
        (("two", "two again"),),
    ]
    (skipped,) = dataset.report.skipped
    assert skipped.name == "chosen/alone"
    assert "no picture of this name in rejected/" in skipped.reason


def test_pictures_of_one_name_pair_up_by_their_kinds_or_are_told(tmp_path):
    for name in ("chosen/a.png", "chosen/b.png", "chosen/c.png", "chosen/c.jpg", "chosen/d.png"):
        paint(tmp_path / name, "red")
    paint(tmp_path / "chosen/a.jpg", "green")
    for name in ("rejected/a.png", "rejected/a.jpg", "rejected/b.webp", "rejected/c.png"):
        paint(tmp_path / name, "blue")
    for name in ("rejected/d.webp", "rejected/d.bmp"):
        paint(tmp_path / name, "blue")
    dataset = read(tmp_path)
    assert names(dataset) == [("a.jpg", "a.jpg"), ("a.png", "a.png"), ("b.png", "b.webp")] + [
        ("c.png", "c.png")
    ]
    assert len(dataset.contents) == 4
    told = {one.name: one.reason for one in dataset.report.skipped}
    assert set(told) == {"chosen/c.jpg", "chosen/d.png", "rejected/d.bmp", "rejected/d.webp"}
    assert "(chosen/c.jpg, chosen/c.png, rejected/c.png)" in told["chosen/c.jpg"]
    assert "(rejected/d.bmp, rejected/d.webp)" in told["chosen/d.png"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_lines_as_windows_editors_save_them(pictures, encoding):
    line = json.dumps({"prompt": "ein Vögelchen", "chosen": "a.png", "rejected": "b.png"})
    text = f"{line}\r\n".replace("\\u00f6", "ö")
    (pictures / "preferences.jsonl").write_bytes(text.encode(encoding))
    dataset = read(pictures)
    assert dataset.captions() == ["ein Vögelchen"]
    assert bool(dataset.report.notes) == (encoding == "cp1252")


def test_half_a_character_in_a_prompt_is_named_with_its_line(pictures):
    write_lines(pictures, {"prompt": "a \ud83d", "chosen": "a.png", "rejected": "b.png"})
    with pytest.raises(ValueError, match="preferences.jsonl:1: the prompt holds half a character"):
        read(pictures)


def test_a_prompt_of_several_lines_is_read_as_its_source_says(tmp_path):
    for side, colour in (("chosen", "red"), ("rejected", "blue")):
        paint(tmp_path / side / "a.png", colour)
    (tmp_path / "rejected" / "a.txt").write_text("a cat\n\nasleep")
    dataset = read_preferences([Source(tmp_path, lines="whole")], framing=FRAMING)
    assert dataset.captions() == ["a cat\nasleep"]
    assert "1 caption of several lines, read as one caption: a" in dataset.report.lines()


def test_lines_name_prompt_chosen_and_rejected(pictures):
    write_lines(
        pictures,
        {"prompt": "a square", "chosen": "a.png", "rejected": "b.png", "seed": 3, "weight": 0.5},
        {"prompt": "", "chosen": "c.png", "rejected": "b.png"},
    )
    dataset = read(pictures)
    assert names(dataset) == [("a.png", "b.png"), ("c.png", "b.png")]
    assert dataset.items[0].weight == dataset.items[0].loser.weight == 0.5
    assert dataset.captions() == ["a square", ""]
    assert dataset.report.without_caption == ("preferences.jsonl:2",)
    assert dataset.pictures[2:] == (dataset.items[0].loser, dataset.items[1].loser)


@pytest.mark.parametrize(("label", "won"), [(1, "a.png"), (0, "b.png"), (1.0, "a.png")])
def test_pick_a_pics_columns(pictures, label, won):
    row = {"caption": "x", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": label}
    write_lines(pictures, row)
    ((chosen, _),) = names(read(pictures))
    assert chosen == won


def test_a_file_may_be_named_itself(pictures):
    file = write_lines(pictures, {"prompt": "x", "chosen": "a.png", "rejected": "b.png"})
    assert len(read(file).items) == 1


def test_ties_skips_and_what_was_taken_back_teach_nothing(pictures):
    write_lines(
        pictures,
        {"id": "1", "prompt": "x", "chosen": "a.png", "rejected": "b.png"},
        {"id": "2", "prompt": "x", "chosen": "b.png", "rejected": "a.png"},
        {"id": "3", "prompt": "x", "tie": ["a.png", "b.png"]},
        {"caption": "x", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 0.5},
        {"id": "4", "skip": ["a.png", "b.png"]},
        {"id": "5", "prompt": "x", "tie": ["a.png", "c.png"]},
        {"undo": "2"},
        {"undo": "5"},
    )
    dataset = read(pictures)
    assert names(dataset) == [("a.png", "b.png")]
    assert (dataset.report.ties, dataset.report.passed) == (2, 1)
    assert "2 ties left out" in "\n".join(dataset.report.lines())


@pytest.mark.parametrize("nothing", ["null", "NaN", '""'])
def test_a_table_saved_by_pandas_keeps_every_pair(pictures, nothing):
    """In such a file each line has every column: a null says nothing, and 7.0 is 7."""
    columns = ("id", "prompt", "caption", "chosen", "rejected", "tie", "skip", "undo", "weight")
    columns += ("jpg_0", "jpg_1", "label_0", "has_label")
    lines = [
        {"prompt": "one", "chosen": "a.png", "rejected": "b.png"},
        {"prompt": "two", "chosen": "b.png", "rejected": "a.png", "tie": False, "skip": 0.0},
        {"caption": "three", "jpg_0": "a.png", "jpg_1": "c.png", "label_0": 0.0, "has_label": 1.0},
        {"chosen": "c.png", "rejected": "b.png", "id": 7},
        {"chosen": "a.png", "rejected": "c.png", "id": 8.0, "weight": 2},
        {"tie": ["a.png", "b.png"], "id": 9},
        {"tie": True},
        {"skip": 1.0},
        {"jpg_0": "a.png", "jpg_1": "c.png", "has_label": False},
        {"undo": 7.0},
        {"undo": 9},
    ]
    whole = [{name: line.get(name) for name in columns} for line in lines]
    file = write_lines(pictures, *whole)
    text = file.read_text()
    if nothing == '""':  # the numbers of a line have no empty text
        text = text.replace('"weight": null', '"weight": 1').replace('"label_0": null, ', "")
    file.write_text(text.replace("null", nothing))
    dataset = read(pictures)
    assert names(dataset) == [
        ("a.png", "b.png"),
        ("b.png", "a.png"),
        ("c.png", "a.png"),
        ("a.png", "c.png"),
    ]
    assert [item.captions[0][0] for item in dataset.items] == ["one", "two", "three", ""]
    assert [item.weight for item in dataset.items] == [1, 1, 1, 2]
    assert (dataset.report.ties, dataset.report.passed) == (1, 2)
    assert dataset.report.skipped == ()


def test_pairs_of_one_id_are_all_kept_and_all_taken_back(pictures):
    """As in a table whose ids are those of the prompts."""
    one = {"id": "p1", "prompt": "x", "chosen": "a.png", "rejected": "b.png"}
    lines = [one, {**one, "rejected": "c.png"}]
    write_lines(pictures, *lines)
    assert len(read(pictures).items) == 2
    write_lines(pictures, *lines, {"undo": "p1"}, {**one, "chosen": "c.png"}, {"undo": "p2"})
    dataset = read(pictures)
    assert names(dataset) == [("c.png", "b.png")]
    (skipped,) = dataset.report.skipped
    assert skipped.name == "preferences.jsonl:5"
    assert "takes back 'p2', which is the id of no line above" in skipped.reason


def test_prompts_that_contradict_each_other_are_told(pictures):
    line = {"prompt": "a cat", "chosen": "a.png", "rejected": "b.png"}
    write_lines(pictures, {**line, "caption": "a dog"}, {**line, "text": "a cat "})
    dataset = read(pictures)
    assert dataset.captions() == ["a cat"]
    note = "preferences.jsonl: 1 line with something else in caption: prompt is read"
    assert note in dataset.report.lines()


def test_both_pictures_of_a_pair_are_cut_alike(tmp_path):
    """Wide, tall and square: each pair in one bucket, the chosen one's, at one place."""
    paint(tmp_path / "wide.png", "red", (96, 48))
    paint(tmp_path / "tall.png", "blue", (48, 96))
    paint(tmp_path / "large.png", "green", (192, 96))
    write_lines(
        tmp_path,
        {"prompt": "x", "chosen": "wide.png", "rejected": "tall.png"},
        {"prompt": "x", "chosen": "wide.png", "rejected": "large.png"},
    )
    framing = Framing(64, 16, crop="random", crop_seed=3)
    dataset = read_preferences([Source(tmp_path)], framing=framing)
    for item in dataset.items:
        assert item.bucket == item.loser.bucket == item.picture.bucket == item.loser.picture.bucket
        assert item.picture.read().image.shape == item.loser.picture.read().image.shape
    small, large = (one.picture.box for one in (dataset.items[1], dataset.items[1].loser))
    assert [2 * edge for edge in small] == list(large)
    assert dataset.report.mixed == ("preferences.jsonl:1",)
    assert "of different aspects, both cut" in "\n".join(dataset.report.lines())


def test_a_pair_of_one_picture_is_no_preference(pictures):
    (pictures / "copy.png").write_bytes((pictures / "a.png").read_bytes())
    write_lines(
        pictures,
        {"prompt": "x", "chosen": "a.png", "rejected": "copy.png"},
        {"prompt": "x", "chosen": "a.png", "rejected": "b.png"},
    )
    (skipped,) = read(pictures).report.skipped
    assert skipped.reason == "both sides are the same picture"


def test_two_sides_from_different_sources_are_noticed(tmp_path):
    for name in "123":
        paint(tmp_path / "chosen" / f"{name}.jpg", "red", (128, 128))
        paint(tmp_path / "rejected" / f"{name}.png", "blue")
    assert "as if one side came from elsewhere" in "\n".join(read(tmp_path).report.lines())


def test_a_broken_picture_costs_its_pair_only(pictures):
    (pictures / "broken.png").write_bytes(b"\x89PNG no more")
    write_lines(
        pictures,
        {"prompt": "x", "chosen": "broken.png", "rejected": "b.png"},
        {"prompt": "x", "chosen": "missing.png", "rejected": "b.png"},
        {"prompt": "x", "chosen": "a.png", "rejected": "b.png"},
    )
    dataset = read(pictures)
    assert names(dataset) == [("a.png", "b.png")]
    assert [one.name for one in dataset.report.skipped] == [
        "preferences.jsonl:1",
        "preferences.jsonl:2",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x", "chosen": "../a.png", "rejected": "b.png"}', "leads out of its folder"),
        ('{"prompt": "x", "chosen": "/etc/a.png", "rejected": "b.png"}', "leads out"),
        ('{"prompt": "x", "chosen": "C:\\\\a.png", "rejected": "b.png"}', "leads out"),
        ('{"prompt": "x", "chosen": "a.png"}', "rejected is missing"),
        ('{"prompt": 7, "chosen": "a.png", "rejected": "b.png"}', "prompt is 7"),
        ('{"caption": "x", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 2}', "label_0 is 2"),
        ('{"prompt": "x", "chosen": "a.png", "rejected": "b.png", "weight": -1}', "weight is -1"),
        ("[1, 2]", "expected an object"),
        ("null", "expected an object"),
        ('{"id": ["x"], "prompt": "x", "chosen": "a.png", "rejected": "b.png"}', "id is"),
        ('{"undo": 1.5}', "undo is 1.5; expected a text or a whole number"),
        ('{"tie": "a.png"}', "tie is 'a.png'; expected true or false"),
        ('{"has_label": "no", "skip": null}', "has_label is 'no'"),
        ('{"caption": ["x"], "chosen": "a.png", "rejected": "b.png"}', r"caption is \['x'\]"),
        ('{"prompt": "x", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": "1"}', "label_0 is '1'"),
        ('{"prompt": "x", "chosen": "a.png", "rejected": "b.png", "weight": ""}', "weight is ''"),
    ],
)
def test_a_line_that_cannot_be_followed_is_named(pictures, line, message):
    (pictures / "preferences.jsonl").write_text("\n" + line)
    with pytest.raises(ValueError, match=rf"preferences.jsonl:2: .*{message}"):
        list_pairs(Source(pictures))


@pytest.mark.parametrize("torn", ["{", '{"prompt": "Gr\xfc', '{"prompt": "a c{"prompt": "x"}'])
def test_a_torn_line_costs_itself_only(pictures, torn):
    line = json.dumps({"prompt": "x", "chosen": "a.png", "rejected": "b.png"})
    text = "\n".join([line, torn, line, torn])
    (pictures / "preferences.jsonl").write_bytes(text.encode("latin-1"))
    dataset = read(pictures)
    assert names(dataset) == [("a.png", "b.png")] * 2
    assert [one.name for one in dataset.report.skipped] == [
        "preferences.jsonl:2",
        "preferences.jsonl:4",
    ]
    assert "skipped preferences.jsonl:2: the line is no JSON" in "\n".join(dataset.report.lines())


def test_a_folder_without_pairs_says_what_was_expected(pictures):
    with pytest.raises(ValueError, match="holds no pairs. Expected chosen/NAME.png"):
        read(pictures)
    write_lines(pictures, {"prompt": "x", "tie": ["a.png", "b.png"]})
    with pytest.raises(ValueError, match="holds 1 tie and no preference"):
        read(pictures)
    with pytest.raises(ValueError, match="is not there"):
        read(pictures / "missing")


def test_the_identity_of_preferences_counts_both_sides(pictures):
    line = {"prompt": "x", "chosen": "a.png", "rejected": "b.png"}
    write_lines(pictures, line)
    first = read(pictures).digest
    write_lines(pictures, {**line, "rejected": "c.png"})
    second = read(pictures).digest
    write_lines(pictures, {**line, "chosen": "b.png", "rejected": "a.png"})
    assert len({first, second, read(pictures).digest}) == 3
