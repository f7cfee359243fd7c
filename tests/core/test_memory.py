"""What is free on a device, and what is said when it is full."""

import weakref

import pytest
import torch
from sd3_pack.sd3_core import memory
from sd3_pack.sd3_core.errors import OutOfMemory
from sd3_pack.sd3_core.memory import explained, free_memory, is_out_of_memory

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    MemoryError(),
]


def test_of_this_machine_it_is_a_number_of_bytes():
    free = free_memory(torch.device("cpu"))
    assert free is None or free > 2**20


def test_a_card_also_gives_what_torch_holds_in_stock(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3000, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500)
    assert free_memory(torch.device("cuda", 1)) == 4500


def test_an_apple_gpu_gives_what_the_system_recommends(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 9000)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 2000)
    assert free_memory(torch.device("mps")) == 7000


def test_a_containers_limit_counts_and_its_file_cache_does_not(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_available_memory", lambda: 10_000)
    cpu = torch.device("cpu")
    if free_memory(cpu) is None:
        pytest.skip("this system does not tell")
    assert free_memory(cpu) == 10_000
    (tmp_path / "memory.current").write_text("7000\n")
    (tmp_path / "memory.stat").write_text("active_file 10\ninactive_file 1500\n")
    for limit, free in (("max", 10_000), ("9000", 3500), ("90000", 10_000)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert free_memory(cpu) == free


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_every_devices_words_for_full_memory_are_known(error):
    assert is_out_of_memory(error)
    with (
        pytest.raises(OutOfMemory, match=r"the memory is full while drawing. Try fp8, a smaller"),
        explained("drawing", "fp8", "a smaller width and height"),
    ):
        raise error


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shapes"), OSError(1)])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, explained("drawing", "fp8"):
        raise error
    assert caught.value is error


def test_the_innermost_explanation_counts():
    with (
        pytest.raises(OutOfMemory, match="while decoding. Try a"),
        explained("training", "b"),
        explained("decoding", "a"),
    ):
        raise MemoryError


def test_what_the_stage_held_is_given_back_though_the_error_lives():
    held = []

    def work():
        tensor = torch.zeros(1000)
        held.append(weakref.ref(tensor))
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(OutOfMemory) as caught, explained("drawing", "fp8"):
        work()
    assert held[0]() is None
    assert caught.value.__suppress_context__
