"""The header of a file: read when it is right, one sentence when it is not."""

import json
import os
import struct
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from sd3_pack.sd3_core.checkpoints import header as header_module
from sd3_pack.sd3_core.checkpoints import tensors
from sd3_pack.sd3_core.checkpoints.header import DTYPES, fingerprint, read_header
from sd3_pack.sd3_core.checkpoints.tensors import map_tensors, read_bytes, read_tensors
from sd3_pack.sd3_core.errors import CheckpointError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "fp8": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, {"title": "small"})
    return path


def raw_file(path, header: bytes, data: bytes = b"", length: int | None = None):
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def complaint(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    return str(caught.value)


def test_header_tells_names_shapes_types_and_metadata(file):
    header = read_header(file)
    assert {k: (i.dtype, i.shape) for k, i in header.tensors.items()} == {
        k: (t.dtype, tuple(t.shape)) for k, t in TENSORS.items()
    }
    assert header.metadata == {"title": "small"}
    assert header.size == file.stat().st_size


@pytest.mark.parametrize("reader", [map_tensors, read_tensors])
def test_tensors_come_back_as_the_format_s_own_library_reads_them(file, reader):
    ours, theirs = reader(read_header(file)), load_file(file)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].shape == tensor.shape
        assert ours[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


def test_every_dtype_of_the_format_that_torch_knows_is_read(tmp_path):
    for name, dtype in DTYPES.items():
        data = bytes(2 * dtype.itemsize)
        header = json.dumps({"x": entry(name, (2,), 0, len(data))}).encode()
        path = raw_file(tmp_path / "x.safetensors", header, data)
        assert map_tensors(read_header(path))["x"].dtype == dtype


def test_a_tensor_between_two_elements_is_read(tmp_path):
    values = torch.tensor([1.0, 2.0])
    entries = {"odd": entry("U8", (1,), 0, 1), "x": entry("F32", (2,), 1, 9)}
    data = b"\7" + values.numpy().tobytes()
    path = raw_file(tmp_path / "x.safetensors", json.dumps(entries).encode(), data)
    assert map_tensors(read_header(path))["x"].equal(values)


def test_a_file_is_mapped_in_pieces_and_only_where_it_is_wanted(file, monkeypatch):
    monkeypatch.setattr(tensors, "WINDOW", 8)
    header = read_header(file)
    mapped = map_tensors(header)
    assert list(mapped) == list(header.tensors)
    assert all(mapped[name].equal(value) for name, value in TENSORS.items() if name != "fp8")
    assert map_tensors(header, ["a"])["a"].untyped_storage().nbytes() < file.stat().st_size


def test_memory_that_the_system_refuses_is_one_sentence(file, monkeypatch):
    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(tensors.mmap, "mmap", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be mapped into memory .*Cannot allocate"):
        map_tensors(read_header(file))


def grow(path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def replace_by_another_of_the_same_size(path) -> None:
    state = path.stat()
    other = path.with_name("other")
    other.write_bytes(bytes(state.st_size))
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(other, path)


def write_over(path) -> None:
    state = path.stat()
    with path.open("r+b") as file:
        file.write(bytes(state.st_size))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))


@pytest.mark.parametrize("change", [grow, replace_by_another_of_the_same_size, write_over])
@pytest.mark.parametrize(
    "reader", [map_tensors, read_tensors, lambda header: read_bytes(header, "a")]
)
def test_a_file_that_changed_since_its_header_was_read_is_refused(file, change, reader):
    header = read_header(file)
    change(file)
    with pytest.raises(CheckpointError, match="has changed while it was being read"):
        reader(header)


def test_more_tensors_than_any_model_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(header_module, "MAX_TENSORS", 3)
    entries = {str(i): entry(shape=(0,), end=0) for i in range(4)}
    path = raw_file(tmp_path / "x.safetensors", json.dumps(entries).encode())
    assert "it names 4 tensors, more than any model has" in complaint(path)
    path = raw_file(
        tmp_path / "x.safetensors", json.dumps(dict(list(entries.items())[1:])).encode()
    )
    assert len(read_header(path).tensors) == 3


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(file):
    before = file.read_bytes()
    map_tensors(read_header(file))["b"].add_(1)
    assert file.read_bytes() == before


def test_read_tensors_own_their_memory_and_may_be_written_without_a_warning(file):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = read_tensors(read_header(file), ["b"])["b"]
    file.unlink()
    assert tensor.add(1).sum() == 21


def test_bytes_of_one_tensor(file):
    assert read_bytes(read_header(file), "bytes") == bytes(range(5))


def test_an_unknown_tensor_is_named(file):
    with pytest.raises(CheckpointError, match=r"model.safetensors: holds no tensor 'other'"):
        read_bytes(read_header(file), "other")


@pytest.mark.parametrize("reader", [map_tensors, read_tensors])
def test_a_file_that_shrinks_after_its_header_is_not_touched(file, reader):
    header = read_header(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="has changed"):
        reader(header)


def test_a_cut_file_says_how_many_bytes_are_missing(file):
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    assert f"7 of {len(whole)} bytes are missing. Download it again." in complaint(file)


def test_a_file_cut_inside_its_header_says_so(file):
    file.write_bytes(file.read_bytes()[:100])
    assert "cut off inside its header" in complaint(file)


def test_a_file_with_more_than_its_header_says_is_refused(file):
    file.write_bytes(file.read_bytes() + b"123")
    assert "3 bytes after its last tensor" in complaint(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"12345", "no safetensors file"),
        (b"PK\x03\x04" + bytes(100), "PyTorch pickle"),
        (b"\x80\x02}q\x00." + bytes(100), "PyTorch pickle"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"<html lang=en>", "web page"),
        (b"Access to model x is restricted and you must log in", "refusal"),
        (b'{"error": "not found", "more": "and more"}', "JSON text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "picture"),
        (bytes(5000), "never finished"),
        (b"\x1f\x8b\x08" + bytes(50), "archive"),
        (bytes(range(1, 200)), "Download it again"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    message = complaint(path)
    assert words in message
    assert "model.safetensors" in message


def test_a_good_file_that_begins_like_a_pickle_is_read(tmp_path):
    text = json.dumps({"x": entry()}).encode()
    text += b" " * (0x0280 - len(text))  # the length's first bytes are 80 02, as a pickle's
    path = raw_file(tmp_path / "x.safetensors", text, bytes(8))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert set(read_header(path).tensors) == {"x"}


def test_missing_files_folders_and_devices_are_refused(tmp_path):
    assert "No such file" in complaint(tmp_path / "none.safetensors")
    assert "is a folder" in complaint(tmp_path)
    assert "cannot be opened" in complaint("a\0b")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"x": entry(begin=4, end=12)}, "leaves a gap"),
        ({"x": entry(), "y": entry()}, "overlaps"),
        ({"x": entry(), "y": entry(begin=4, end=12)}, "overlaps"),
        ({"x": entry(shape=(3,))}, "should take 12 bytes"),
        ({"x": entry(shape=(-2,))}, "impossible shape"),
        ({"x": entry(shape=(2.0,))}, "impossible shape"),
        ({"x": entry(shape=(True, 2))}, "impossible shape"),
        ({"x": entry(shape=(0, 2**62, 4), end=0)}, "impossible shape"),
        ({"x": entry(shape=[1] * 40, end=4)}, "impossible shape"),
        ({"x": entry(shape=(2**80,))}, "impossible shape"),
        ({"x": entry(begin=8, end=0)}, "impossible data_offsets"),
        ({"x": entry(begin=-8, end=0)}, "impossible data_offsets"),
        ({"x": {**entry(), "data_offsets": [0]}}, "impossible data_offsets"),
        ({"x": {**entry(), "data_offsets": {"0": 8}}}, "impossible data_offsets"),
        ({"x": entry("F7")}, "a type unknown here"),
        ({"x": entry(["F32"])}, "a type unknown here"),
        ({"x": [1, 2]}, "is not dtype, shape and data_offsets"),
        ({"x": {"dtype": "F32"}}, "is not dtype, shape and data_offsets"),
        ({"x": {**entry(), "extra": 1}}, "is not dtype, shape and data_offsets"),
        ({"a\nb": entry()}, "cannot be printed"),
        ({"\ud800": entry()}, "cannot be printed"),
        ({"__metadata__": {"a": 1}, "x": entry()}, "not a table of strings"),
        ({"__metadata__": ["a"], "x": entry()}, "not a table of strings"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, entries, words):
    path = raw_file(tmp_path / "x.safetensors", json.dumps(entries).encode(), bytes(8))
    message = complaint(path)
    assert words in message
    assert message.startswith("x.safetensors: damaged safetensors header")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"x": 1, "x": 2}', "appears twice"),
        (b'{"__metadata__": {"a": "1", "a": "2"}}', "appears twice"),
        (b'{"x": NaN}', "NaN is not a JSON number"),
        (b'{"x": ', "not JSON"),
        (b'{"x": ' + b"9" * 9999 + b"}", "header"),
        (b'{"x": "\xff\xfe"}', "not UTF-8"),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested without end"),
        (b'{"x":' * 100_000 + b"1" + b"}" * 100_000, "nested without end"),
    ],
)
def test_json_that_is_wrong_or_hostile_is_refused(tmp_path, text, words):
    assert words in complaint(raw_file(tmp_path / "x.safetensors", text))


def test_a_length_beyond_the_format_s_limit_is_no_safetensors_file(tmp_path):
    path = raw_file(tmp_path / "x.safetensors", b"{}", length=2**40)
    assert "no safetensors file" in complaint(path)


def test_a_long_name_is_shortened_in_the_message(tmp_path):
    path = raw_file(tmp_path / "x.safetensors", json.dumps({"n" * 5000: 1}).encode())
    assert len(complaint(path)) < 300


def test_fingerprint_follows_the_content_not_the_name(file, tmp_path):
    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(file.read_bytes())
    assert fingerprint(file) == fingerprint(twin)
    save_file(TENSORS | {"scalar": torch.tensor(3.5, dtype=torch.float16)}, twin, {"title": "x"})
    assert fingerprint(file) != fingerprint(twin)


def test_fingerprint_of_a_changed_file_changes(file):
    before = fingerprint(file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert fingerprint(file) != before


def test_fingerprint_of_a_large_file_samples_it(tmp_path):
    path = tmp_path / "large.safetensors"
    size = 40 * 2**20
    header = json.dumps({"x": entry("U8", (size,), 0, size)}).encode()
    raw_file(path, header)
    with path.open("r+b") as file:
        file.truncate(8 + len(header) + size)
    before = fingerprint(path)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    assert fingerprint(path) != before


def test_fingerprint_of_a_folder_or_index_covers_its_files(file):
    before = fingerprint(file.parent)
    assert fingerprint(file.parent / "model.safetensors.index.json") == before
    save_file({"x": torch.ones(1)}, file.parent / "more.safetensors")
    assert fingerprint(file.parent) != before
