"""Files are written whole or not at all, and read back to the bit."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sd3_pack.sd3_core.checkpoints import load
from sd3_pack.sd3_core.checkpoints.header import DTYPES, read_header
from sd3_pack.sd3_core.checkpoints.layouts import find_components
from sd3_pack.sd3_core.checkpoints.load import load_mmdit, load_t5, read_state_dict
from sd3_pack.sd3_core.checkpoints.save import (
    ABANDONED,
    export_checkpoint,
    save_bytes,
    save_tensors,
    sweep,
    temporary_name,
)
from sd3_pack.sd3_core.checkpoints.tensors import map_tensors, read_bytes
from sd3_pack.sd3_core.errors import CheckpointError
from tiny import (
    NETWORKS,
    quantised,
    tiny_state_dicts,
    tokenizer_tensors,
    with_prefixes,
    write_tiny_checkpoint,
)
from tiny_tokenizers import write_tiny_tokenizers

WRITE = """
import sys, types
pack = types.ModuleType("sd3_pack"); pack.__path__ = [sys.argv[1]]; sys.modules["sd3_pack"] = pack
from sd3_pack.sd3_core.checkpoints import save
import os
os.replace = lambda *paths: print("written", flush=True) or sys.stdin.read()
save.save_bytes(sys.argv[2], b"half")
"""
PACK = Path(__file__).parent.parent.parent

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.uint8)}


def test_the_format_s_own_library_reads_what_we_write(tmp_path):
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, (3, 5), generator=draw, dtype=torch.uint8)
        .repeat(1, dtype.itemsize)
        .view(dtype)
        for name, dtype in DTYPES.items()
        if name not in ("BOOL", "C64")
    }
    tensors |= {"bool": torch.tensor([True, False]), "empty": torch.zeros(0, 3)}
    tensors |= {"scalar": torch.tensor(2.5), "turned": torch.arange(6.0).reshape(2, 3).T}
    path = save_tensors(tmp_path / "x.safetensors", tensors, {"who": "we", "was": "ü"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        theirs, ours = found[name].contiguous(), tensor.contiguous()
        assert theirs.flatten().view(torch.uint8).equal(ours.flatten().view(torch.uint8)), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "we", "was": "ü"}


def test_tensors_begin_where_vector_loads_like_them(tmp_path):
    header = read_header(save_tensors(tmp_path / "x.safetensors", TENSORS))
    assert header.tensors["a"].start % 64 == 0


def test_a_file_is_replaced_whole_and_nothing_else_stays(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    assert save_tensors(path, TENSORS) == path
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert load_file(path)["a"].equal(TENSORS["a"])


def test_a_mapped_file_keeps_its_old_weights_when_replaced(tmp_path):
    path = save_tensors(tmp_path / "x.safetensors", TENSORS)
    mapped = map_tensors(read_header(path))["a"]
    save_tensors(path, {"a": TENSORS["a"] + 1})
    assert mapped.equal(TENSORS["a"])


def test_a_folder_that_is_not_there_is_made(tmp_path):
    assert save_tensors(tmp_path / "new" / "folder" / "x.safetensors", TENSORS).is_file()


def test_a_broken_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_tensors(tmp_path / "x.safetensors", TENSORS)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot be written: No space left"):
        save_tensors(path, {"other": torch.ones(1)})
    assert load_file(path)["a"].equal(TENSORS["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_over_a_file_in_use_the_new_one_gets_a_name_beside_it(tmp_path, monkeypatch):
    path = save_tensors(tmp_path / "x.safetensors", TENSORS)
    (tmp_path / "x-1.safetensors").write_bytes(b"taken")
    replace = os.replace

    def in_use(source, target):  # what Windows answers
        if target == path:
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", in_use)
    with pytest.warns(UserWarning, match="is in use by a program and could not be replaced"):
        written = save_tensors(path, {"new": torch.ones(1)})
    assert written == tmp_path / "x-2.safetensors"
    assert set(load_file(written)) == {"new"}
    assert set(load_file(path)) == set(TENSORS)


def test_a_file_that_is_read_back_by_its_name_gets_no_name_beside_it(tmp_path, monkeypatch):
    path = save_bytes(tmp_path / "log.jsonl", b"old")

    def in_use(*_):
        raise PermissionError(errno.EACCES, "Access is denied")

    monkeypatch.setattr(os, "replace", in_use)
    with pytest.raises(CheckpointError, match="cannot be written: Access is denied"):
        save_bytes(path, b"new", aside=False)
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("layout", ["single", "split", "bare", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_an_export_of_any_layout_is_the_released_layout(tmp_path, layout, dtype):
    written = write_tiny_checkpoint(tmp_path / "model.safetensors", layout=layout, dtype=dtype)
    parts = {part: find_components(path)[part] for part, path in written.items()}
    found = load_file(export_checkpoint(tmp_path / "out.safetensors", parts))
    wanted = with_prefixes(tiny_state_dicts(dtype=dtype))
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == dtype
        assert found[key].float().equal(tensor.float())


def test_loaded_networks_tokenizers_and_metadata_are_exported(tmp_path):
    write_tiny_tokenizers(tmp_path / "tokenizers")
    tokenizers = tokenizer_tensors(tmp_path / "tokenizers")
    network = NETWORKS["mmdit"][0](NETWORKS["mmdit"][1])
    network.load_state_dict(tiny_state_dicts(("mmdit",))["mmdit"])
    metadata = {"sd3_workbench.shift": "1.5", "sd3_workbench.native_pixels": "4096"}
    path = export_checkpoint(tmp_path / "x.safetensors", {"mmdit": network}, metadata, tokenizers)
    header = read_header(path)
    assert metadata.items() <= header.metadata.items()
    for name, tensor in tokenizers.items():
        assert read_bytes(header, name) == tensor.numpy().tobytes()
    assert all(
        value.equal(network.state_dict()[key])
        for key, value in load_mmdit(path).state_dict().items()
    )


@pytest.mark.parametrize("spelling", ["scale_weight", "comfy_quant", "rows"])
@pytest.mark.parametrize("loaded", [True, False], ids=["network", "component"])
def test_scaled_fp8_is_exported_with_its_scales(tmp_path, spelling, loaded, monkeypatch):
    monkeypatch.setattr(load, "CONVERTED_AT_MOST", 0)
    stored, _ = quantised(tiny_state_dicts(("t5",))["t5"], spelling)
    save_file(stored, tmp_path / "t5xxl.safetensors")
    component = find_components(tmp_path / "t5xxl.safetensors")["t5"]
    part = load_t5(component, dtype=torch.float32) if loaded else component
    path = export_checkpoint(tmp_path / "out.safetensors", {"t5": part})
    before, after = read_state_dict(component), read_state_dict(find_components(path)["t5"])
    assert before.keys() == after.keys()
    assert all(after[key].float().equal(before[key].float()) for key in before)
    notes = [key for key in load_file(path) if key.endswith(".comfy_quant")]
    assert len(notes) == sum(key.endswith("weight_scale") for key in before)


def test_an_unknown_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown network 'unet'"):
        export_checkpoint(tmp_path / "x.safetensors", {"unet": torch.nn.Linear(1, 1)})


@pytest.mark.skipif(os.name == "nt", reason="there no process can be asked whether it lives")
def test_what_a_killed_process_was_writing_is_swept_at_the_next_start(tmp_path):
    command = [sys.executable, "-c", WRITE, str(PACK), str(tmp_path / "one")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        (part,) = tmp_path.iterdir()
        sweep(tmp_path)
        assert part.exists()  # it is being written
        writer.kill()
        writer.wait()
    assert part.exists()
    save_bytes(tmp_path / "two", b"whole")  # the first that this process writes there
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_only_what_is_ours_and_abandoned_is_swept(tmp_path):
    other = ".x.safetensors.00000000-1.part"  # of another machine
    names = (
        temporary_name("mine"),
        other,
        ".x.png.4000000.part",
        ".x.part",
        "x.1.part",
        ".x.y.part",
    )
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".folder.00000000-1.part").mkdir()
    (tmp_path / ".folder.00000000-1.part" / "inside").write_bytes(b"")
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 7
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - ABANDONED - 60,) * 2)
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".x.part", "x.1.part", ".x.y.part"}
    sweep(tmp_path / "gone")
