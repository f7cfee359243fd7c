"""Muon against PyTorch's own, where PyTorch has one, and its AdamW against AdamW."""

import pytest
import torch
from sd3_pack.sd3_core.training import muon
from sd3_pack.sd3_core.training.config import LoopConfig
from sd3_pack.sd3_core.training.muon import Muon, orthogonalised
from sd3_pack.sd3_core.training.optimizers import (
    make_optimizer,
    matrices_in,
    optimizer_state,
    restore_optimizer,
)
from torch import nn

CONFIG = LoopConfig(optimizer="muon", learning_rate=0.01, betas=(0.9, 0.99), weight_decay=0.1)
NAMES = {"blocks.0.qkv.weight": (24, 8), "blocks.0.fc.weight": (8, 12), "last.weight": (5, 8)}


def network(seed=0) -> dict[str, nn.Parameter]:
    draws = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(size, generator=draws)) for name, size in NAMES.items()}


def teach(parameters, optimizer, steps: range) -> None:
    for step in steps:
        draws = torch.Generator().manual_seed(100 + step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=draws)
        optimizer.step()


@pytest.mark.parametrize("size", [(3, 64, 64), (2, 96, 32), (1, 32, 96)])
def test_every_direction_of_an_update_is_about_as_long(size):
    matrices = torch.randn(size, generator=torch.Generator().manual_seed(0))
    lengths = torch.linalg.svdvals(orthogonalised(matrices))
    assert lengths.flatten().quantile(0.05) > 0.6  # a square one's smallest are still on their way
    assert lengths.max() < 1.3


def test_the_size_of_a_gradient_does_not_matter():
    matrices = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        orthogonalised(matrices * 1e-4), orthogonalised(matrices), rtol=0.02, atol=0.02
    )


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch before 2.9 has no Muon")
@pytest.mark.parametrize("quick", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["blocks.0.fc.weight", "blocks.0.qkv.weight"])
def test_matrices_learn_as_with_pytorchs_muon(name, quick, monkeypatch):
    """PyTorch's rounds are always bfloat16; ours only where the processor is quick at it."""
    monkeypatch.setattr(muon, "processor_multiplies_bf16", lambda device: quick)
    ours, theirs = network(), network()
    parts = NAMES[name][0] // 8 if "qkv" in name else 1
    pieces = [nn.Parameter(one.detach().clone()) for one in theirs[name].chunk(parts)]
    reference = torch.optim.Muon(pieces, 0.01, 0.1, adjust_lr_fn="match_rms_adamw")
    optimizer = make_optimizer(ours, CONFIG)
    for step in range(5):
        teach(ours, optimizer, range(step, step + 1))
        gradient = ours[name].grad
        for piece, part in zip(pieces, gradient.chunk(parts), strict=True):
            piece.grad = part.clone()
        reference.step()
    moved = (ours[name] - network()[name]).norm()
    apart = (ours[name] - torch.cat(pieces)).norm() / moved
    assert apart < muon.ROUNDS * torch.finfo(torch.bfloat16).eps / 2  # a rounding in each round


def test_what_is_no_matrix_of_a_block_learns_as_with_adamw():
    ours, theirs = network(), network()
    teach(ours, make_optimizer(ours, CONFIG), range(20))
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "eps": CONFIG.eps, "weight_decay": 0.1}
    teach(theirs, torch.optim.AdamW(theirs.values(), **settings), range(20))
    torch.testing.assert_close(ours["last.weight"], theirs["last.weight"], rtol=1e-5, atol=1e-6)


def test_a_restored_optimizer_goes_on_bit_for_bit():
    unbroken = network()
    teach(unbroken, make_optimizer(unbroken, CONFIG), range(6))
    first = network()
    optimizer = make_optimizer(first, CONFIG)
    teach(first, optimizer, range(3))
    memory, numbers = optimizer_state(optimizer, list(first))
    again = {name: nn.Parameter(one.detach().clone()) for name, one in first.items()}
    resumed = make_optimizer(again, CONFIG)
    restore_optimizer(resumed, list(again), memory, numbers)
    teach(again, resumed, range(3, 6))
    assert all(torch.equal(again[name], unbroken[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("joint_blocks.0.x_block.attn.qkv.weight", (576, 192), 3),
        ("joint_blocks.0.x_block.adaLN_modulation.1.weight", (1728, 192), 9),
        ("joint_blocks.0.x_block.mlp.fc1.weight", (768, 192), 1),
        ("joint_blocks.0.x_block.attn.qkv.bias", (576,), 0),
        ("final_layer.adaLN_modulation.1.weight", (384, 192), 0),
        ("context_embedder.weight", (192, 256), 0),
    ],
)
def test_which_matrices_a_parameter_stacks(name, size, count):
    assert matrices_in(name, torch.empty(size)) == count


def test_a_handful_at_a_time_is_the_same_update(monkeypatch):
    names = [f"blocks.{number}.fc.weight" for number in range(5)]

    def learned(at_once):
        monkeypatch.setattr(muon, "AT_ONCE", at_once)
        draws = torch.Generator().manual_seed(3)
        ours = {name: nn.Parameter(torch.randn(8, 12, generator=draws)) for name in names}
        teach(ours, make_optimizer(ours, CONFIG), range(3))
        return ours

    whole, parts = learned(2**26), learned(2 * 8 * 12)
    for name in names:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-3)


def test_without_quick_bfloat16_the_rounds_are_float32(monkeypatch):
    matrices = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(muon, "processor_multiplies_bf16", lambda device: True)
    rounded = orthogonalised(matrices)
    monkeypatch.setattr(muon, "processor_multiplies_bf16", lambda device: False)
    exact = orthogonalised(matrices)
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.02, atol=0.02)


def test_parameters_without_a_gradient_stay():
    parameters = network()
    before = {name: one.detach().clone() for name, one in parameters.items()}
    optimizer = Muon(
        list(parameters.values()), [3, 1, 0], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=1.0
    )
    optimizer.step()
    assert all(torch.equal(before[name], parameters[name]) for name in NAMES)
