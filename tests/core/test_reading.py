"""Only regular files are opened, and no more bytes are read than such a file can have."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image
from sd3_pack.sd3_core.checkpoints.stored import read_stored
from sd3_pack.sd3_core.pictures import read_image, read_png
from sd3_pack.sd3_core.reading import open_regular, read_regular
from sd3_pack.sd3_core.text.vocabularies import find_tokenizers
from sd3_pack.sd3_core.training.config import read_settings
from sd3_pack.sd3_core.training.contents import read_contents
from sd3_pack.sd3_core.training.folders import Source, list_pictures
from sd3_pack.sd3_core.training.picks import Picks
from sd3_pack.sd3_core.training.preferences import list_pairs
from sd3_pack.sd3_core.training.scan import look_at, look_at_all
from special_files import CAN_BE_MADE, KINDS, make_special

pytestmark = pytest.mark.skipif(not CAN_BE_MADE, reason="this system makes no pipes")


def test_a_regular_file_is_read_whole_and_a_larger_one_is_not(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with open_regular(path) as file:
        assert file.read() == b"12345"
    with pytest.raises(OSError, match="5 bytes; at most 4 are read"):
        read_regular(path, 4)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "gone", 4)
    with pytest.raises(OSError, match="at most 100 are read"):  # it says that it has no bytes
        read_regular("/proc/self/maps", 100)


def test_what_becomes_a_pipe_between_the_looks_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"1")
    regular = os.stat(tmp_path / "file")
    monkeypatch.setattr(os, "stat", lambda path: regular)
    with pytest.raises(OSError, match="no regular file"):
        read_regular(tmp_path / "pipe", 4)


def caption(path: Path) -> None:
    """The text beside a picture."""
    picture = path.with_suffix(".png")
    Image.new("RGB", (8, 8)).save(picture)
    listing = list_pictures(Source(path.parent))
    if listing.skipped:
        raise ValueError(listing.skipped[0].reason)
    assert listing.found[0].captions == ()


def scanned(path: Path) -> None:
    fault = look_at(path).fault
    assert fault
    raise ValueError(fault)


READERS = {
    "init.png": read_image,
    "drawn.png": read_png,
    "scanned.png": scanned,
    "one.txt": caption,
    "metadata.jsonl": lambda path: list_pictures(Source(path.parent)),
    "preferences.jsonl": lambda path: list_pairs(Source(path.parent)),
    "run.toml": read_settings,
    "model.safetensors": read_stored,
    "model.safetensors.index.json": read_stored,
    "tokenizer.json": lambda path: find_tokenizers(["t5"], directory=path.parent),
    "candidates.jsonl": lambda path: Picks(path.parent).groups(),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_reader_waits_for_what_is_no_file(tmp_path, name, kind):
    make_special(tmp_path / name, kind)
    may_be_absent = name in ("one.txt", "candidates.jsonl", "preferences.jsonl", "metadata.jsonl")
    if may_be_absent and kind in ("link to nowhere", "circle", "folder"):
        with suppress(ValueError, OSError):
            READERS[name](tmp_path / name)
        return
    with pytest.raises((ValueError, OSError)) as raised:
        READERS[name](tmp_path / name)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_remembered_is_begun_anew(tmp_path, kind):
    make_special(tmp_path / "memory.json", kind)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.utime(tmp_path / "a.png", (1, 1))
    assert look_at_all([tmp_path / "a.png"], tmp_path / "memory.json")[0].width == 8
    assert read_contents(tmp_path / "memory.json", {}) == {}
    if kind != "folder":
        assert json.loads((tmp_path / "memory.json").read_text())
