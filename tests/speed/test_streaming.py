"""T5 with its blocks in main memory: the same numbers, and only what runs is on the device."""

import weakref

import pytest
import torch
from sd3_pack.sd3_core.checkpoints.layouts import find_components
from sd3_pack.sd3_core.checkpoints.load import load_t5
from sd3_pack.sd3_core.models.cast import CastOps
from sd3_pack.sd3_core.speed import streaming
from sd3_pack.sd3_core.speed.streaming import Streamed, left, load_t5_to_fit, prompts_at_once
from tiny import write_tiny_checkpoint

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5") / "tiny.safetensors"
    return find_components(write_tiny_checkpoint(path)["t5"])["t5"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_states_are_those_of_the_whole(part, dtype):
    ids = torch.tensor([[3, 5, 1, 0], [7, 1, 0, 0]])
    whole = load_t5(part, dtype=dtype)
    streamed = streaming.streamed(load_t5(part, dtype=dtype, ops=CastOps(dtype), left=left))
    with torch.no_grad():
        expected = torch.cat([whole(one) for one in ids.split(1)])
        assert torch.equal(streamed(ids), expected)


def test_only_the_block_that_runs_is_there(part):
    network = streaming.streamed(load_t5(part, ops=CastOps(), left=left))
    blocks = [module for module in network.modules() if isinstance(module, Streamed)]
    assert len(blocks) == len(network.encoder.block) - 1
    there = []

    class Elsewhere(torch.nn.Module):  # copies are made, as for another device
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *arguments):
            there.extend(weakref.ref(tensor) for tensor in self.parameters())
            assert len([one for one in there if one() is not None]) == len(list(self.parameters()))
            return self.inner(*arguments)

    class Copied(torch.Tensor):
        def to(self, device):
            return self.detach().clone()

    for block in blocks:
        for module in block.block.modules():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    copied = torch.nn.Parameter(tensor.as_subclass(Copied), requires_grad=False)
                    module._parameters[name] = copied
        block.block = Elsewhere(block.block)
    with torch.no_grad():
        network(torch.tensor([[3, 5, 1]]))
    assert there
    assert not [one for one in there if one() is not None]


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False), (None, True)])
def test_free_memory_decides(part, monkeypatch, spare, fits):
    size = streaming.size_of(part, torch.float32) + streaming.WORK
    free = None if spare is None else size + spare
    monkeypatch.setattr(streaming, "free_memory", lambda device: free)
    assert streaming.fits(part, torch.float32, CUDA) == fits
    assert streaming.fits(part, torch.float32, CPU)
    assert streaming.size_of(part, torch.bfloat16) <= streaming.size_of(part, torch.float32)


@pytest.mark.parametrize("fits", [True, False])
def test_what_happens_is_said_and_a_change_reaches_every_weight(part, monkeypatch, fits):
    monkeypatch.setattr(streaming, "fits", lambda *_: fits)
    said = []

    def change(network):
        assert not any(isinstance(module, Streamed) for module in network.modules())
        for parameter in network.parameters():
            parameter.data = parameter * 0.5
        return network

    ids = torch.tensor([[3, 5, 1]])
    network = load_t5_to_fit(part, torch.float32, CPU, said.append, change)
    assert torch.equal(network(ids), change(load_t5(part, dtype=torch.float32))(ids))
    assert len(said) == (not fits)
    assert prompts_at_once(network) == (1 if fits else streaming.AT_ONCE)
