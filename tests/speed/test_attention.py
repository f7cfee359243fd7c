"""The measured choice of an attention back end: on the CPU, with a clock of the test's own."""

import pytest
import torch
from sd3_pack.sd3_core.models.attention import attention
from sd3_pack.sd3_core.speed import attention as measured
from sd3_pack.sd3_core.speed.attention import MeasuredAttention
from torch.nn.attention import SDPBackend
from torch.testing import assert_close

FLASH, MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH


class Times:
    """A clock that runs the work and then tells these times, one after the other."""

    def __init__(self, *seconds: float):
        self.seconds, self.calls = list(seconds), 0

    def __call__(self, work):
        work()
        self.calls += 1
        return self.seconds.pop(0)


@pytest.fixture(autouse=True)
def backends_of_a_cpu(monkeypatch):
    monkeypatch.setattr(measured, "CANDIDATES", {"cpu": (FLASH, MATH)})


def heads(length: int = 7):
    return [torch.randn(2, 3, length, 64) for _ in range(3)]


@pytest.mark.parametrize(
    ("times", "chosen"),
    [((1.0, 0.5, 0.7), FLASH), ((1.0, 0.9, 0.4), MATH), ((1.0, 0.99, 1.2), None)],
)
def test_the_quickest_is_taken_if_it_is_worth_it(times, chosen):
    attend = MeasuredAttention(Times(*times))
    q, k, v = heads()
    with torch.no_grad():
        assert_close(attend(q, k, v), attention(q, k, v), atol=1e-5, rtol=0)
    assert list(attend.chosen.values()) == [chosen]


def test_each_shape_is_measured_once():
    clock = Times(*[1.0] * 6)
    attend = MeasuredAttention(clock)
    with torch.no_grad():
        for length in (7, 7, 9, 7, 9):
            attend(*heads(length))
    assert clock.calls == 6
    assert len(attend.chosen) == 2


def test_a_back_end_that_refuses_is_left_out(monkeypatch):
    monkeypatch.setattr(measured, "CANDIDATES", {"cpu": (SDPBackend.EFFICIENT_ATTENTION, MATH)})
    attend = MeasuredAttention(Times(1.0, 0.5))
    with torch.no_grad():
        attend(*heads())
    assert list(attend.chosen.values()) == [MATH]


def test_a_quick_back_end_that_is_wrong_is_left_out(monkeypatch):
    monkeypatch.setattr(
        measured, "by", lambda backend, q, k, v: attention(q, k, v) * (1 + (backend == FLASH))
    )
    attend = MeasuredAttention(Times(1.0, 0.1, 0.5))
    with torch.no_grad():
        attend(*heads())
    assert list(attend.chosen.values()) == [MATH]


@pytest.mark.parametrize("case", ["gradients", "mask", "device", "switched off"])
def test_nothing_is_measured(monkeypatch, case):
    attend, mask = MeasuredAttention(Times()), None
    if case == "mask":
        mask = torch.zeros(7, 7)
    if case == "device":
        monkeypatch.setattr(measured, "CANDIDATES", {})
    if case == "switched off":
        monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    q, k, v = heads()
    with torch.set_grad_enabled(case == "gradients"):
        assert torch.equal(attend(q, k, v, mask), attention(q, k, v, mask))
    assert not attend.chosen
