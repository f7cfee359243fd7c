"""Folders of pictures: names, captions, repeats, weights, before any picture is opened."""

import json
import os

import pytest
from sd3_pack.sd3_core.training.folders import Source, list_pictures


def touch(path, content: str | bytes = b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def captions_of(folder, **options):
    return {one.name: one.captions for one in list_pictures(Source(folder), **options).found}


def write_rows(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    touch(folder / "metadata.jsonl", "\n".join(lines))


def test_pictures_are_found_in_all_folders_in_the_order_of_their_names(tmp_path):
    for name in ("b.PNG", "a.jpg", "sub/deep/c.webp", "sub/a.tiff", "readme.md", ".hidden.png"):
        touch(tmp_path / name)
    touch(tmp_path / "__MACOSX" / "._a.png")
    assert list(captions_of(tmp_path)) == ["a.jpg", "b.PNG", "sub/a.tiff", "sub/deep/c.webp"]
    assert next(iter(captions_of(tmp_path, prefix="set/"))) == "set/a.jpg"


def test_each_line_of_a_text_file_is_an_alternative(tmp_path):
    touch(tmp_path / "a.png")
    touch(tmp_path / "a.txt", "\ufeff a cat \r\n\r\nthe cat, asleep\n")
    touch(tmp_path / "b.c.png")
    touch(tmp_path / "b.c.caption", "a dog")
    touch(tmp_path / "d.png")
    touch(tmp_path / "d.txt", "ein Vögelchen".encode("utf-16"))
    touch(tmp_path / "e.png")
    touch(tmp_path / "e.png.txt", "a fish")
    assert captions_of(tmp_path) == {
        "a.png": (("a cat", "the cat, asleep"),),
        "b.c.png": (("a dog",),),
        "d.png": (("ein Vögelchen",),),
        "e.png": (("a fish",),),
    }


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "cp1252"])
def test_a_guessed_encoding_of_a_caption_or_metadata_is_told(tmp_path, encoding):
    touch(tmp_path / "in" / "a.png")
    touch(tmp_path / "in" / "a.txt", "ein kleines Vögelchen\r\n".encode(encoding))
    touch(tmp_path / "b" / "b.png")
    row = json.dumps({"file_name": "b.png", "text": "zwei kleine Vögel"}, ensure_ascii=False)
    touch(tmp_path / "b" / "metadata.jsonl", (row + "\r\n").encode(encoding))
    listing = list_pictures(Source(tmp_path), "set/")
    assert [one.captions for one in listing.found] == [
        (("zwei kleine Vögel",),),
        (("ein kleines Vögelchen",),),
    ]
    told = {note.partition(" ")[0] for note in listing.notes}
    assert told == {"set/in/a.txt", "set/b/metadata.jsonl"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_metadata_with_a_mark_needs_no_word(tmp_path, encoding):
    touch(tmp_path / "b.png")
    row = json.dumps({"file_name": "b.png", "text": "Vögel"}, ensure_ascii=False)
    touch(tmp_path / "metadata.jsonl", row.encode(encoding))
    listing = list_pictures(Source(tmp_path))
    assert (listing.found[0].captions, listing.notes) == ((("Vögel",),), ())


def test_text_with_nul_bytes_costs_the_picture(tmp_path):
    touch(tmp_path / "a.png")
    touch(tmp_path / "a.txt", b"a cat\0\0\0")
    listing = list_pictures(Source(tmp_path))
    assert listing.found == ()
    assert "a.txt holds NUL bytes" in listing.skipped[0].reason


@pytest.mark.parametrize("name", ["text", "captions", "synthetic", "file_name"])
def test_half_a_character_in_metadata_is_named_with_its_line(tmp_path, name):
    touch(tmp_path / "a.png")
    row = {"file_name": "a.png", name: "\ud83d"}
    write_rows(tmp_path, {"file_name": "a.png"} if name != "file_name" else "", row)
    with pytest.raises(ValueError, match=rf"metadata.jsonl:2: {name} holds half a character"):
        list_pictures(Source(tmp_path))


@pytest.mark.parametrize("inside", ["\u2028", "\u0085", "\x0b", "\x0c", "\x1c", "\r"])
def test_only_a_line_feed_ends_a_line(tmp_path, inside):
    """str.splitlines() ends it at each of these, which captions may hold."""
    touch(tmp_path / "a.png")
    touch(tmp_path / "a.txt", f"a cat{inside}asleep\r\na dog\n")
    touch(tmp_path / "a.synthetic.txt", f"on{inside}it")
    assert captions_of(tmp_path) == {
        "a.png": ((f"a cat{inside}asleep", "a dog"), (f"on{inside}it",))
    }


def test_several_lines_are_alternatives_or_one_caption_or_the_first_alone(tmp_path):
    touch(tmp_path / "a.png")
    touch(tmp_path / "a.txt", "A cat sits.\r\n\r\n  The light is soft.\n")
    touch(tmp_path / "a.synthetic.txt", "one line")
    touch(tmp_path / "b.png")
    touch(tmp_path / "b.txt", "a dog\n")
    touch(tmp_path / "c.png")
    write_rows(tmp_path, {"file_name": "c.png", "captions": ["a\nb", "c"]})
    for rule, read in (
        ("alternatives", ("A cat sits.", "The light is soft.")),
        ("whole", ("A cat sits.\nThe light is soft.",)),
        ("first", ("A cat sits.",)),
    ):
        found = list_pictures(Source(tmp_path, lines=rule)).found
        assert [one.captions for one in found] == [
            (read, ("one line",)),
            (("a dog",),),
            (("a\nb", "c"),),  # metadata says itself what is one caption
        ]
        assert [one.lines for one in found] == [rule, "", ""]


def test_synthetic_captions_are_a_source_of_their_own(tmp_path):
    touch(tmp_path / "a.png")
    touch(tmp_path / "a.txt", "cat")
    touch(tmp_path / "a.synthetic.txt", "A cat sits on a red cushion.")
    touch(tmp_path / "b.png")
    touch(tmp_path / "b.synthetic.txt", "Only this.")
    assert captions_of(tmp_path) == {
        "a.png": (("cat",), ("A cat sits on a red cushion.",)),
        "b.png": (("Only this.",),),
    }


def test_a_picture_without_caption_has_none(tmp_path):
    touch(tmp_path / "a.png")
    touch(tmp_path / "b.png")
    touch(tmp_path / "b.txt", " \n\n")
    assert captions_of(tmp_path) == {"a.png": (), "b.png": ()}


def test_pictures_of_kinds_that_are_not_read_are_reported(tmp_path):
    touch(tmp_path / "a.HEIC")
    (skipped,) = list_pictures(Source(tmp_path)).skipped
    assert (skipped.name, "convert it" in skipped.reason) == ("a.HEIC", True)


def test_captions_that_are_no_text_cost_the_picture_not_the_run(tmp_path):
    touch(tmp_path / "a.png")
    touch(tmp_path / "a.txt", b"caf\xe9 \xff")
    touch(tmp_path / "b.png")
    touch(tmp_path / "b.txt", b"x" * (2**20 + 1))
    listing = list_pictures(Source(tmp_path))
    assert listing.found == ()
    reasons = {one.name: one.reason for one in listing.skipped}
    assert "a.txt is not UTF-8" in reasons["a.png"]
    assert "b.txt is no caption" in reasons["b.png"]


def test_metadata_tells_captions_weight_and_bucket(tmp_path):
    for name in ("a.png", "sub/b.png", "c.png"):
        touch(tmp_path / name)
    touch(tmp_path / "a.txt", "not this one")
    touch(tmp_path / "c.txt", "from the text file")
    write_rows(
        tmp_path,
        {"file_name": "a.png", "text": "one", "captions": ["two", "three"], "synthetic": "long"},
        "",
        {"file_name": "sub/b.png", "captions": ["b"], "weight": 2, "bucket": [64, 32]},
        {"file_name": "c.png", "author": {"ignored": True}},
    )
    found = {one.name: one for one in list_pictures(Source(tmp_path, weight=3.0)).found}
    assert found["a.png"].captions == (("one", "two", "three"), ("long",))
    assert found["sub/b.png"].captions == (("b",),)
    assert found["sub/b.png"].weight == 6.0
    assert found["sub/b.png"].row.bucket == (64, 32)
    assert found["c.png"].captions == (("from the text file",),)


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
@pytest.mark.parametrize("nothing", ["null", "NaN"])
def test_a_table_saved_by_pandas_is_read_whatever_its_caption_is_called(tmp_path, column, nothing):
    """In such a file each line has every column, and numbers have turned into floats."""
    columns = ("text", "caption", "prompt", "captions", "synthetic", "weight", "bucket")
    gaps = {name: None for name in columns if name != column}
    touch(tmp_path / "a.png")
    touch(tmp_path / "b.png")
    rows = (
        {"file_name": "a.png", column: "a cat", **gaps, "bucket": [64.0, 32.0]},
        {"file_name": "b.png", column: None, **gaps, "captions": ["a dog", None], "weight": 2.0},
    )
    touch(tmp_path / "metadata.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, rows)))
    file = tmp_path / "metadata.jsonl"
    file.write_bytes(file.read_bytes().replace(b"null", nothing.encode()))
    listing = list_pictures(Source(tmp_path))
    found = {one.name: (one.captions, one.weight, one.row.bucket) for one in listing.found}
    assert found == {
        "a.png": ((("a cat",),), 1.0, (64, 32)),
        "b.png": ((("a dog",),), 2.0, None),
    }
    assert listing.notes == listing.skipped == ()


def test_captions_that_contradict_each_other_are_told(tmp_path):
    for name in "abcd":
        touch(tmp_path / f"{name}.png")
    write_rows(
        tmp_path,
        {"file_name": "a.png", "text": "a cat", "prompt": "masterpiece, cat"},
        {"file_name": "b.png", "prompt": "a dog, 4k", "text": "a dog"},
        {"file_name": "c.png", "text": " ", "prompt": "a fish", "caption": "a fish "},
        {"file_name": "d.png", "text": "a bird", "caption": "a hen", "prompt": "bird"},
    )
    listing = list_pictures(Source(tmp_path), "set/")
    assert [one.captions[0][0] for one in listing.found] == ["a cat", "a dog", "a fish", "a bird"]
    assert listing.notes == (
        "set/metadata.jsonl: 2 lines with something else in prompt: text is read",
        "set/metadata.jsonl: 1 line with something else in caption and prompt: text is read",
    )


def test_metadata_of_a_folder_below_speaks_for_that_folder(tmp_path):
    touch(tmp_path / "sub" / "a.png")
    write_rows(tmp_path / "sub", {"file_name": "a.png", "text": "near"})
    assert captions_of(tmp_path) == {"sub/a.png": (("near",),)}


def test_a_picture_that_only_metadata_knows_is_reported(tmp_path):
    touch(tmp_path / "a.png")
    write_rows(tmp_path, {"file_name": "gone.png", "text": "x"}, {"file_name": "notes.md"})
    skipped = list_pictures(Source(tmp_path)).skipped
    assert [one.name for one in skipped] == ["gone.png", "notes.md"]
    assert skipped[0].reason == "metadata.jsonl:1 names it, but no such picture is used"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "sub/../../secret.png",
        "/etc/secret.png",
        "C:\\secret.png",
        "C:secret.png",
        "..\\secret.png",
        "\\\\server\\share\\secret.png",
    ],
)
def test_names_never_leave_the_folder(tmp_path, name):
    touch(tmp_path / "secret.png")
    touch(tmp_path / "set" / "a.png")
    write_rows(tmp_path / "set", {"file_name": "a.png"}, {"file_name": name, "text": "x"})
    with pytest.raises(
        ValueError, match=r"metadata\.jsonl:2: file_name .* leads out of its folder"
    ):
        list_pictures(Source(tmp_path / "set"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "no JSON"),
        ("[1]", "expected an object"),
        ("{}", "file_name is missing"),
        ({"file_name": 3}, "file_name is missing"),
        ({"file_name": "a.png", "text": 3}, "text is 3"),
        ({"file_name": "a.png", "captions": ["x", 3]}, "captions is"),
        ({"file_name": "a.png", "weight": 0}, "weight is 0"),
        ({"file_name": "a.png", "weight": True}, "weight is True"),
        ('{"file_name": "a.png", "weight": Infinity}', "weight is inf"),
        ({"file_name": "a.png", "caption": 3}, "caption is 3"),
        ('{"file_name": "a.png", "weight": 1e999}', "weight is inf"),
        ({"file_name": "a.png", "bucket": [64]}, "bucket is"),
        ({"file_name": "a.png", "bucket": [64, 64.5]}, "bucket is"),
        ({"file_name": "a.png", "bucket": [64, True]}, "bucket is"),
        ({"file_name": "a.png", "bucket": "64x64"}, "bucket is"),
        ("[" * 100_000, "metadata.jsonl:2"),
        ({"file_name": "first.png"}, "metadata.jsonl:1 has this file_name already"),
    ],
)
def test_a_line_that_cannot_be_followed_is_named(tmp_path, row, message):
    touch(tmp_path / "a.png")
    write_rows(tmp_path, {"file_name": "first.png"}, row)
    with pytest.raises(ValueError, match=r"metadata\.jsonl:2: ") as refused:
        list_pictures(Source(tmp_path))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_kohyas_folders_give_repeats_and_a_caption_where_there_is_none(tmp_path):
    touch(tmp_path / "10_sks dog" / "a.png")
    touch(tmp_path / "10_sks dog" / "b.png")
    touch(tmp_path / "10_sks dog" / "b.txt", "its own")
    touch(tmp_path / "10_sks dog" / "deeper" / "c.png")
    touch(tmp_path / "2024_trip" / "d.png")
    touch(tmp_path / "0_off" / "e.png")
    touch(tmp_path / "f.png")
    listing = list_pictures(Source(tmp_path, repeats=2))
    found = {one.name: (one.repeats, one.captions) for one in listing.found}
    assert found == {
        "10_sks dog/a.png": (20, (("sks dog",),)),
        "10_sks dog/b.png": (20, (("its own",),)),
        "10_sks dog/deeper/c.png": (20, (("sks dog",),)),
        "2024_trip/d.png": (2, ()),
        "f.png": (2, ()),
    }
    assert listing.repeated_folders == {"10_sks dog": 10, "0_off": 0}


def test_links_are_followed_and_circles_are_not(tmp_path):
    touch(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "set").mkdir()
    try:
        os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "link")
        os.symlink(tmp_path / "set", tmp_path / "set" / "circle")
    except OSError:
        pytest.skip("this system makes no links")
    assert list(captions_of(tmp_path / "set")) == ["link/a.png"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda path: Source(path / "nowhere"), "is not there"),
        (lambda path: Source(touch(path / "a.png")), "is a file"),
        (lambda path: Source(path, repeats=0), "repeats is 0"),
        (lambda path: Source(path, weight=float("nan")), "weight is nan"),
        (lambda path: Source(path, lines="all"), "lines is 'all'; expected one of alternatives,"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        list_pictures(source(tmp_path))
