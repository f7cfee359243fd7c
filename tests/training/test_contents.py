"""What changed in a run's pictures and captions, told by name."""

import json

import pytest
from PIL import Image
from sd3_pack.sd3_core.training.contents import changes, read_contents, write_contents
from sd3_pack.sd3_core.training.dataset import read_dataset
from sd3_pack.sd3_core.training.folders import Source
from sd3_pack.sd3_core.training.framing import Framing
from sd3_pack.sd3_core.training.preferences import read_preferences
from sd3_pack.sd3_core.training.run import RunRefused, open_run
from training_set import write_pictures


def contents(folder, **options):
    source = Source(folder, **options)
    return read_dataset([source], resolution=64, bucket_step=16).contents


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "pictures")


def paint(path, colour="purple", size=(64, 64)):
    Image.new("RGB", size, colour).save(path)


CHANGES = {
    "a new picture": (lambda at: paint(at / "new.png"), ["added: new.png"]),
    "one less": (lambda at: (at / "3.png").unlink(), ["removed: 3.png"]),
    "another caption": (
        lambda at: (at / "2.txt").write_text("a square"),
        ["captions changed: 2.png"],
    ),
    "no caption": (lambda at: (at / "2.txt").unlink(), ["captions changed: 2.png"]),
    "another picture": (lambda at: paint(at / "1.png"), ["picture changed: 1.png"]),
    "of another size": (lambda at: paint(at / "1.png", size=(48, 64)), ["picture changed: 1.png"]),
    "another name": (
        lambda at: [(at / f"0.{end}").rename(at / f"z.{end}") for end in ("png", "txt")],
        ["renamed: 0.png -> z.png"],
    ),
    "another bucket": (
        lambda at: (at / "metadata.jsonl").write_text('{"file_name": "4.png", "bucket": [32, 64]}'),
        ["size, crop, repeats, weight or prior changed: 4.png"],
    ),
    "a broken picture": (lambda at: (at / "5.png").write_bytes(b"half"), ["removed: 5.png"]),
    "many": (
        lambda at: [paint(at / f"{n}.png", (n, 0, 0)) for n in range(10, 20)],
        ["added: 10.png, 11.png, 12.png, 13.png, 14.png and 5 more"],
    ),
}


@pytest.mark.parametrize(("change", "lines"), CHANGES.values(), ids=CHANGES)
def test_a_change_is_told_by_the_names_of_the_files(folder, change, lines):
    before = contents(folder)
    change(folder)
    assert changes(before, contents(folder)) == lines


def test_several_changes_are_a_line_each(folder):
    before = contents(folder)
    for change, _ in list(CHANGES.values())[:3]:
        change(folder)
    assert changes(before, contents(folder)) == [
        "added: new.png",
        "removed: 3.png",
        "captions changed: 2.png",
    ]


def test_another_loser_of_a_pair_is_another_picture(tmp_path):
    framing = Framing(64, bucket_step=16)
    for side, colour in (("chosen", "red"), ("rejected", "blue")):
        (tmp_path / side).mkdir()
        for name in ("1", "2"):
            paint(tmp_path / side / f"{name}.png", colour)
    before = read_preferences([Source(tmp_path)], framing=framing).contents
    paint(tmp_path / "rejected" / "2.png", "orange")
    after = read_preferences([Source(tmp_path)], framing=framing).contents
    (line,) = changes(before, after)
    assert line.startswith("picture changed: ")
    assert "2" in line
    assert "1" not in line


def test_repeats_are_told(folder):
    (line,) = changes(contents(folder), contents(folder, repeats=2))
    assert line.startswith("size, crop, repeats, weight or prior changed: 0.png, 1.png, ")


def test_a_mere_change_of_order_is_told(folder):
    known = contents(folder)
    other = dict(reversed(known.items()))
    assert changes(known, other) == ["the same ones, drawn in another order or share"]


def test_contents_are_read_back_for_the_identity_they_were_kept_with(tmp_path, folder):
    path, known = tmp_path / "data.json", contents(folder)
    write_contents(path, {"data": known, "held": {}}, {"data": "1234", "held": None})
    identity = {"data": "1234", "held": None}
    assert read_contents(path, identity) == {"data": known, "held": {}}
    assert read_contents(path, identity | {"data": "5678"}) == {"held": {}}
    assert path.stat().st_size < 100 * len(known)
    for text in ("", "[]", '{"data": 1}', '{"data": {"identity": "1234", "items": {"x": ["1"]}}}'):
        path.write_text(text)
        assert read_contents(path, identity) == {}
    path.unlink()
    assert read_contents(path, identity) == {}


def settle(run, digest, items):
    run.settle({"rank": 4, "data": digest}, 5, {}, {"data": items})


def test_a_run_names_what_changed_and_falls_back_to_its_hashes(tmp_path, folder):
    known = contents(folder)
    now = {name: hashes for name, hashes in known.items() if name != "6.png"}
    with open_run(tmp_path, "run") as run:
        settle(run, "old", known)
        (run.folder / "state" / "step-00000003.safetensors").touch()
        settle(run, "old", known)
        with pytest.raises(RunRefused, match="data: removed: 6.png"):
            settle(run, "new", now)
        kept = run.folder / "data.json"
        assert json.loads(kept.read_text())["data"]["identity"] == "old"  # a refusal writes nothing
        kept.unlink()  # as in a run of an older version
        with pytest.raises(RunRefused, match='data: "old" -> "new"'):
            settle(run, "new", now)
        settle(run, "old", known)
        assert kept.exists()


def test_a_run_that_learnt_nothing_forgets_its_contents_with_its_settings(tmp_path, folder):
    known = contents(folder)
    now = {name: hashes for name, hashes in known.items() if name != "6.png"}
    with open_run(tmp_path, "run") as run:
        settle(run, "old", known)
        settle(run, "new", now)
        assert read_contents(run.folder / "data.json", {"data": "new"}) == {"data": now}
