"""Which number format on which card, and the look for NaN."""

from types import SimpleNamespace

import pytest
import torch
from sd3_pack.sd3_core.errors import NumericalError
from sd3_pack.sd3_core.precision import check_finite, pick_device, pick_dtype, wide_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[(7, 5), (8, 0), (9, 0)])
def capability(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: request.param)
    return request.param


def test_auto_is_bf16_exactly_where_the_card_computes_in_it(capability):
    expected = torch.bfloat16 if capability >= (8, 0) else torch.float32
    assert pick_dtype("auto", CUDA) == expected
    assert pick_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize(
    ("target", "computes"),
    [
        ("gfx803", False),  # Polaris
        ("gfx906:sramecc+:xnack-", False),  # Radeon VII
        ("gfx1012", False),  # RDNA
        ("gfx1030", False),  # RDNA 2
        ("gfx1032", False),
        ("gfx908:sramecc+:xnack-", True),  # MI100
        ("gfx90a", True),  # MI200
        ("gfx942", True),  # MI300
        ("gfx1100", True),  # RDNA 3
        ("gfx1201", True),  # RDNA 4
    ],
)
def test_amds_older_gpus_compute_in_float32(monkeypatch, target, computes):
    """Their capability, (10, 3) for gfx1030, says nothing of bfloat16."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    card = SimpleNamespace(gcnArchName=target)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert pick_dtype("auto", CUDA) == (torch.bfloat16 if computes else torch.float32)


def test_t5_and_vae_never_run_in_fp16(capability):
    assert wide_dtype(torch.float16, CUDA) == pick_dtype("auto", CUDA)
    assert wide_dtype(torch.float16, CPU) == torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        assert wide_dtype(dtype, CUDA) == dtype


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_names_its_stage(bad):
    values = torch.tensor([0.0, bad])
    with pytest.raises(NumericalError, match=r"the VAE gave NaN or infinity in float16.*--dtype"):
        check_finite(values, "the VAE", torch.float16)
    assert check_finite(torch.ones(2), "the VAE", torch.float16).tolist() == [1, 1]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="dtype is 'int8'; choose auto, bf16, fp16, fp32"):
        pick_dtype("int8", CPU)
    for name in ("abacus", "meta"):
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used"):
            pick_device(name)
