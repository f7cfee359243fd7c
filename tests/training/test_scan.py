"""Files are decoded once and remembered, as long as they stay what they were."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image
from sample_pictures import save_texture, with_hole
from sd3_pack.sd3_core.training import scan
from sd3_pack.sd3_core.training.scan import look_at, look_at_all

PACK = Path(__file__).parent.parent.parent


@pytest.fixture
def looks(monkeypatch):
    """The names of the files that are really decoded."""
    seen = []
    original = scan.look_at

    def counted(path):
        seen.append(path.name)
        return original(path)

    monkeypatch.setattr(scan, "look_at", counted)
    return seen


def settle(path):
    """As if the file had been written a minute ago."""
    time = path.stat().st_mtime_ns - 60 * 10**9
    os.utime(path, ns=(time, time))


def test_facts_are_those_of_the_picture(tmp_path):
    save_texture(tmp_path / "a.png", 30, 20)
    facts = look_at(tmp_path / "a.png")
    assert (facts.width, facts.height, facts.transparent, facts.fault) == (30, 20, False, None)
    with_hole(8, 8).save(tmp_path / "b.png")
    assert look_at(tmp_path / "b.png").transparent


def test_what_is_wrong_is_told_and_never_raised(tmp_path):
    (tmp_path / "a.png").write_bytes(b"broken")
    assert look_at(tmp_path / "a.png").fault
    assert "cannot be read" in (look_at(tmp_path / "gone.png").fault or "")
    assert look_at(tmp_path).fault


def test_a_file_is_decoded_again_only_when_it_changes(tmp_path, looks):
    paths = [
        save_texture(tmp_path / name, seed=seed) for seed, name in enumerate(["a.png", "b.png"])
    ]
    memory = tmp_path / "cache" / "scan.json"
    for path in paths:
        settle(path)
    first = look_at_all(paths, memory)
    assert look_at_all(paths, memory) == first
    assert sorted(looks) == ["a.png", "b.png"]
    save_texture(paths[0], seed=7)
    settle(paths[0])
    assert look_at_all(paths, memory)[0].digest != first[0].digest
    assert sorted(looks) == ["a.png", "a.png", "b.png"]


def test_setting_the_time_back_does_not_hide_a_change(tmp_path):
    if os.name == "nt":
        pytest.skip("Windows keeps no time of the last change to a file's record")
    path = tmp_path / "a.bmp"  # same size, other content
    save_texture(path, seed=1)
    settle(path)
    time = path.stat().st_mtime_ns
    memory = tmp_path / "scan.json"
    before = look_at_all([path], memory)
    save_texture(path, seed=2)
    os.utime(path, ns=(time, time))
    assert look_at_all([path], memory) != before


def test_a_file_written_just_now_is_not_trusted(tmp_path, looks):
    path = save_texture(tmp_path / "a.png")
    for _ in range(2):
        look_at_all([path], tmp_path / "scan.json")
    assert looks == ["a.png", "a.png"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": {"unknown": 1}}', '{"x": 3}'])
def test_a_damaged_memory_is_begun_anew(tmp_path, content):
    path = save_texture(tmp_path / "a.png")
    settle(path)
    memory = tmp_path / "scan.json"
    memory.write_text(content, encoding="utf-8")
    assert look_at_all([path], memory) == [look_at(path)]
    assert "a.png" not in memory.read_text(encoding="utf-8")


def test_progress_counts_up(tmp_path):
    paths = [save_texture(tmp_path / f"{n}.png", 8, 8, n) for n in range(4)]
    seen = []
    look_at_all(paths, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_interrupt_keeps_what_is_known_by_then(tmp_path, looks):
    paths = [save_texture(tmp_path / f"{n}.png", 8, 8, n) for n in range(3)]
    for path in paths:
        settle(path)

    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    memory = tmp_path / "scan.json"
    with pytest.raises(KeyboardInterrupt):
        look_at_all(paths, memory, interrupt)
    looks.clear()
    look_at_all(paths, memory)
    assert looks == ["2.png"]


def test_a_memory_that_cannot_be_written_costs_nothing_else(tmp_path):
    path = save_texture(tmp_path / "a.png")
    settle(path)
    (tmp_path / "file").write_text("not a folder")
    assert look_at_all([path], tmp_path / "file" / "scan.json") == [look_at(path)]


@pytest.mark.parametrize("free", ["little", "much"])
def test_pictures_in_flight_fit_into_the_free_memory(tmp_path, monkeypatch, free):
    for number in range(6):
        save_texture(tmp_path / f"{number}.png", 100, 100)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(scan, "free_memory", lambda device: 2.0 * 100 * 100 * 16 * 3.5)
    if free == "little":  # not even one: then one after the other
        monkeypatch.setattr(scan, "free_memory", lambda device: 1000.0)
    at_once, most, lock = 0, 0, threading.Lock()
    three = threading.Barrier(3)
    original = scan.look_at

    def look(path):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        if free == "much":
            three.wait(60)  # so many are there together, or this fails
        facts = original(path)
        with lock:
            at_once -= 1
        return facts

    monkeypatch.setattr(scan, "look_at", look)
    facts = look_at_all([tmp_path / f"{number}.png" for number in range(6)])
    assert [one.width for one in facts] == [100] * 6
    assert most == (1 if free == "little" else 3)


@pytest.mark.long
def test_a_folder_of_vast_pictures_takes_no_more_than_its_share(tmp_path):
    """13,000 x 13,000 pixels of one bit are 20 kB of file and 0.7 GB of RGB."""
    vast = Image.new("1", (13000, 13000))
    for number in range(6):
        vast.save(tmp_path / f"{number}.png")
    code = f"""
import resource, sys, types
from pathlib import Path
pack = types.ModuleType("sd3_pack"); pack.__path__ = [{str(PACK)!r}]; sys.modules["sd3_pack"] = pack
from sd3_pack.sd3_core.training import scan
scan.free_memory = lambda device: 2 * 1.5e9
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
facts = scan.look_at_all(sorted(Path({str(tmp_path)!r}).glob("*.png")))
assert all(one.width == 13000 for one in facts), facts
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 1.0e9
