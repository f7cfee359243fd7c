"""Cache entries are whole, exact where they can be, and know when they are damaged."""

import errno
import shutil

import pytest
import torch
from sd3_pack.sd3_core.checkpoints import save
from sd3_pack.sd3_core.checkpoints.header import read_header
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.training.entries import (
    check_space,
    read_entry,
    take_inventory,
    write_entry,
)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "ab" / "x.safetensors"
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(1, 2, 2)}
    write_entry(path, tensors, torch.float32)
    read = read_entry(path)
    assert set(read) == {"a", "b"}
    for name, tensor in tensors.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)
    assert read_header(path).metadata == {"format": "pt"}


def test_half_precision_rounds_and_never_overflows(tmp_path):
    path = tmp_path / "x.safetensors"
    small, large = torch.randn(100), torch.tensor([1.0, 1e6])
    write_entry(path, {"small": small, "large": large}, torch.float16)
    read = read_entry(path)
    torch.testing.assert_close(read["small"], small, rtol=2**-11, atol=1e-7)
    torch.testing.assert_close(read["large"], large, rtol=0, atol=0)


def damage(path, kind: str):
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        data = data[:-3]
    elif kind == "empty":
        data = bytearray()
    elif kind == "garbage":
        data = bytearray(b"garbage" * 40)
    elif kind == "header":
        data[20] ^= 1
    elif kind == "value":
        data[-1] ^= 0x40
    elif kind == "grown":
        data += b"\0"
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["truncated", "empty", "garbage", "header", "value", "grown"])
def test_damage_of_every_kind_is_found(tmp_path, kind):
    paths = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for path in paths[:2]:
        write_entry(path, {"a": torch.randn(8)}, torch.float32)
    damage(paths[1], kind)
    with pytest.raises(CheckpointError, match=r"1\.safetensors"):
        read_entry(paths[1])
    there = take_inventory(paths)
    assert (there.missing, there.sound, there.damaged) == (frozenset(paths[1:]), 1, 1)


def test_a_missing_entry_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not in the cache"):
        read_entry(tmp_path / "x.safetensors")


@pytest.mark.parametrize("stage", ["write", "folder"])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path, monkeypatch, stage):
    path = tmp_path / "cache" / "ab" / "x.safetensors"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if stage == "write":
        monkeypatch.setattr(save.os, "fsync", full)
    else:
        monkeypatch.setattr(type(path), "mkdir", lambda *_, **__: full())
    with pytest.raises(OSError, match=r"cache.*disk is full: [\d,]+ bytes are needed") as refused:
        write_entry(path, {"a": torch.zeros(1000)}, torch.float16)
    assert refused.value.errno == errno.ENOSPC
    assert not [entry for entry in tmp_path.rglob("*") if entry.is_file()]


def test_another_failure_to_write_is_not_called_a_full_disk(tmp_path):
    (tmp_path / "ab").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_entry(tmp_path / "ab" / "x.safetensors", {"a": torch.zeros(1)}, torch.float16)


def test_room_is_asked_for_before_the_work(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path / "new", 1000)
    with pytest.raises(OSError, match=r"new: the disk is full: .*let output name a folder"):
        check_space(tmp_path / "new", free + 10**12)
