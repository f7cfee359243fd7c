"""The pretended card itself: does it raise, end, wait and count where a card does?"""

import gc

import pytest
import torch
from pretend_card import Mixed, backend, on_card, pretend_card
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

MIB = 2**20


@pytest.fixture
def card():
    with pretend_card(gigabytes=1) as card:
        yield card


@pytest.fixture
def hollow():
    with pretend_card(gigabytes=1, numbers=False) as card, torch.no_grad():
        yield card


# --- devices ----------------------------------------------------------------------------------


def test_its_tensors_say_that_they_are_on_it(card):
    x = torch.zeros(2, 3, device="cuda")
    assert x.device == torch.device("cuda", 0)
    assert x.is_cuda
    assert x.get_device() == 0
    assert [t.device.type for t in (x + 1, x[0], x.cpu(), x.to("cpu", torch.float16))] == [
        "cuda",
        "cuda",
        "cpu",
        "cpu",
    ]


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", "mps", "xpu"])
def test_it_has_the_kind_and_number_that_were_asked_for(device):
    with pretend_card(1, device=device):
        x = torch.zeros(2).to(device)
        assert x.device.type == device.split(":")[0]
        assert getattr(torch, x.device.type).is_available()
        assert (x * 2).device == x.device


@pytest.mark.parametrize(
    "work",
    [
        lambda ours, cpu: ours + cpu,
        lambda ours, cpu: cpu @ ours,
        lambda ours, cpu: torch.cat([ours, cpu]),
        lambda ours, cpu: ours.lerp_(cpu, 0.5),
        lambda ours, cpu: cpu.add_(ours.sum()),
        lambda ours, cpu: F.linear(ours, cpu),
        lambda ours, cpu: F.layer_norm(ours, (4,), cpu[0]),
        lambda ours, cpu: F.embedding(torch.zeros(2, dtype=torch.long), ours),
        lambda ours, cpu: torch.where(cpu > 0, ours, ours),
        lambda ours, cpu: cpu[ours.long()],
        lambda ours, cpu: torch.stack([ours.sum(), cpu.sum()]),
        lambda ours, cpu: F.scaled_dot_product_attention(
            *[t[None, None] for t in (ours, ours, cpu)]
        ),
    ],
)
def test_two_devices_in_one_operation_raise(card, work):
    with pytest.raises(Mixed):
        work(torch.zeros(4, 4, device="cuda"), torch.zeros(4, 4))


def test_a_number_of_the_cpu_and_an_index_from_it_are_taken(card):
    x = torch.arange(4.0, device="cuda")
    assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
    assert x[torch.tensor([1, 3])].tolist() == [1, 3]
    x.copy_(torch.ones(4))
    assert x.tolist() == [1, 1, 1, 1]


def test_a_generator_draws_on_its_own_device_only(card):
    ours, cpu = torch.Generator("cuda"), torch.Generator()
    assert ours.device == torch.device("cuda", 0)
    torch.randn(2, device="cuda", generator=ours)
    torch.randn(2, generator=cpu)
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.randn(2, device="cuda", generator=cpu)
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator"):
        torch.randn(2, generator=ours)


def test_of_two_cards_the_current_one_is_the_first():
    with pretend_card(1, device="cuda:1"):
        x = torch.zeros(2, device="cuda:1")
        assert torch.cuda.device_count() == 2
        assert torch.cuda.current_device() == 0
        with pytest.raises(RuntimeError, match="meant for cuda:1"):
            torch.zeros(2, device="cuda")
        with torch.cuda.device_of(x):
            assert torch.zeros(2, device="cuda").device == x.device
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            x.to("cuda:2")


def test_a_dtype_that_it_lacks_is_refused():
    with pretend_card(1, device="mps", lacks=[torch.float64]):
        x = torch.zeros(2, device="mps")
        with pytest.raises(TypeError, match="float64"):
            x.double()
        assert x.cpu().double().dtype == torch.float64


def test_numpy_wants_a_tensor_of_the_cpu(card):
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\)"):
        torch.zeros(2, device="cuda").numpy()


def test_when_it_is_closed_nothing_is_left_of_it():
    before = torch.cuda.is_available, torch.Generator, F.scaled_dot_product_attention
    with pretend_card(1):
        assert torch.cuda.is_available is not before[0]
    assert (torch.cuda.is_available, torch.Generator, F.scaled_dot_product_attention) == before
    assert torch.zeros(2).device.type == "cpu"


# --- numbers ----------------------------------------------------------------------------------


def test_a_network_gives_what_the_cpu_gives_and_learns_the_same(card):
    def trained(device):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten())
        network = network.append(nn.Linear(8 * 36, 4)).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
        x = torch.randn(2, 3, 8, 8).to(device)
        for _ in range(3):
            loss = network(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        return loss.cpu(), network[0].weight.detach().cpu()

    assert_close(trained("cuda"), trained("cpu"), rtol=0, atol=0)


def test_attention_gives_what_the_cpu_gives_in_both_directions(card):
    def attended(device):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, 5, 8).to(device).requires_grad_() for _ in range(3))
        out = F.scaled_dot_product_attention(q, k, v)
        out.square().sum().backward()
        return [t.detach().cpu() for t in (out, q.grad, k.grad, v.grad)]

    assert_close(attended("cuda"), attended("cpu"))


def test_a_view_and_its_base_share_their_numbers(card):
    x = torch.zeros(2, 3, device="cuda")
    x[1] = 5
    x.T[0].add_(1)
    assert x.tolist() == [[1, 0, 0], [6, 5, 5]]


# --- memory -----------------------------------------------------------------------------------


def test_memory_is_held_once_for_all_views_and_given_back(card):
    x = torch.zeros(1024, 256, device="cuda")
    views = [x.T, x[3:], x.view(-1), x.detach()]
    assert card.live == MIB
    del x
    assert card.live == MIB
    del views
    assert card.live == 0
    assert card.peak == MIB


def test_the_peak_of_a_step_is_what_is_counted_by_hand(hollow):
    """Weights, and in a training step of three layers each activation that is kept."""
    width, rows = 1024, 4096
    with torch.enable_grad():
        layers = [on_card((width, width)).requires_grad_() for _ in range(3)]
        x = on_card((rows, width))
        assert hollow.live == 4 * (3 * width * width + rows * width)
        for layer in layers:
            x = (x @ layer).relu()  # of each layer: the product, gone, and what relu made, kept
        x.sum().backward()
    weights = 3 * 4 * width * width
    activation = 4 * rows * width
    # Going back through the last layer: four kept, the gradients of its product and of its input,
    # and that of its weight.
    by_hand = weights + 4 * activation + 2 * activation + 4 * width * width
    assert by_hand * 0.98 <= hollow.peak <= by_hand * 1.02


def test_a_forward_peaks_at_what_is_counted_by_hand(hollow):
    weight = on_card((1024, 4096))
    x = on_card((4096, 1024))
    y = F.gelu(x @ weight)
    del y
    assert hollow.peak == 4 * (1024 * 4096 + 4096 * 1024 + 2 * 4096 * 4096)
    assert hollow.live == 4 * 2 * 1024 * 4096


def test_memory_ends_at_the_limit():
    with pretend_card(gigabytes=4 / 1024) as card:
        kept = torch.zeros(3 * MIB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2\.00 MiB"):
            torch.zeros(2 * MIB, dtype=torch.uint8, device="cuda")
        assert card.live == 3 * MIB
        assert torch.cuda.mem_get_info() == (MIB, 4 * MIB)
        del kept
        torch.zeros(4 * MIB, dtype=torch.uint8, device="cuda")


def test_a_reference_cycle_keeps_its_memory_until_it_is_collected(card):
    gc.collect()
    x = torch.zeros(MIB, dtype=torch.uint8, device="cuda")
    cycle = [x]
    cycle.append(cycle)
    del x, cycle
    assert card.live == MIB
    gc.collect()
    assert card.live == 0


# --- waits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda x: x + 1, 0),
        (lambda x: x.item(), 1),
        (lambda x: bool(x > 0), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x[torch.tensor([0])], 1),
        (lambda x: torch.zeros(1).to(x.device), 1),
        (lambda x: x.copy_(torch.zeros(1)), 1),
        (lambda x: torch.zeros(1).to(x.device, non_blocking=True), 0),
        (lambda x: torch.zeros(10**5).to(x.device, non_blocking=True), 1),
        (lambda x: torch.zeros(10**5).pin_memory().to(x.device, non_blocking=True), 0),
        (lambda x: torch.empty(10**5, pin_memory=True).to(x.device, non_blocking=True), 0),
        (lambda x: torch.tensor(1.0, device=x.device), 1),
        (lambda x: torch.full((2,), 1.0, device=x.device), 0),
        (lambda x: torch.cuda.synchronize(), 1),
    ],
)
def test_the_host_waits_where_it_needs_something_of_the_card(card, work, waits):
    x = torch.ones(1, device="cuda")
    before = card.counts.waited
    work(x)
    assert card.counts.waited - before == waits


def test_a_copy_that_nobody_waits_for_is_a_hazard(card):
    torch.ones(1, device="cuda").to("cpu", non_blocking=True)
    assert len(card.counts.hazards) == 1


def test_a_wait_names_its_place(card):
    from sd3_pack.sd3_core.precision import check_finite

    check_finite(torch.ones(1, device="cuda"), "the test", torch.float32)
    assert [place.split(":")[0].split("/")[-1] for place in card.counts.waits] == ["precision.py"]


# --- launches and bytes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "launches", "mebibytes"),
    [
        (lambda x: x[3:].view(-1, 8).T.detach(), 0, 0),
        (lambda x: torch.empty_like(x), 0, 0),
        (lambda x: x + 1, 1, 2),
        (lambda x: x.add_(1), 1, 2),
        (lambda x: x.zero_(), 1, 1),
        (lambda x: torch.add(x, x, out=torch.empty_like(x)), 1, 3),
        (lambda x: x.half(), 1, 1.5),
        (lambda x: x.copy_(x.clone()), 2, 4),
        (lambda x: x[:1].expand(1024, 256) * 1, 1, 1 + 1 / 1024),
        (lambda x: F.embedding(torch.zeros(1, dtype=torch.long).cuda(), x), 2, 2 / 1024),
        (lambda x: F.layer_norm(x, (256,)), 1, 2),
        (lambda x: F.rms_norm(x, (256,)), 1, 2),
        (lambda x: F.scaled_dot_product_attention(*[x.view(1, 4, 1024, 64)] * 3), 1, 4),
        (lambda x: F.linear(x, x[:256], x[0]), 1, 2.25),
    ],
)
def test_kernels_and_their_bytes_are_counted_where_they_happen(hollow, work, launches, mebibytes):
    x = on_card((1024, 256))  # 1 MiB
    work(x)
    assert hollow.counts.launches == launches
    assert hollow.counts.moved / MIB == pytest.approx(mebibytes, rel=0.01, abs=1e-3)


def test_arithmetic_is_counted_in_products(hollow):
    x = on_card((4, 64, 32))
    x @ on_card((32, 16))
    F.scaled_dot_product_attention(*[x[None]] * 3)
    F.conv2d(on_card((1, 8, 10, 10)), on_card((4, 8, 3, 3)))
    assert hollow.counts.flops == (
        2 * 4 * 64 * 32 * 16 + 2 * 2 * 4 * 64 * 64 * 32 + 2 * 4 * 64 * 8 * 9
    )


def test_what_was_carried_to_the_card_is_counted(card):
    torch.zeros(256).cuda()
    assert card.counts.carried == 1024


def test_counts_of_a_part_are_those_since(card):
    x = torch.ones(2, device="cuda")
    before = card.counts.copy()
    (x * 2).tolist()
    part = card.counts.since(before)
    assert set(part.kernels) == {"mul"}
    assert (part.launches, part.waited) == (1, 1)


def test_an_optimizer_takes_all_parameters_at_once(card):
    parameters = [nn.Parameter(torch.ones(2, device="cuda")) for _ in range(20)]
    for parameter in parameters:
        parameter.grad = torch.ones(2, device="cuda")
    before = card.counts.launches
    torch.optim.AdamW(parameters).step()
    assert card.counts.launches - before < 60


# --- Triton -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_tritons_kernels_run_on_it_and_only_on_the_current_card(device):
    pytest.importorskip("triton")
    from sd3_pack.sd3_core.models import fused, kernels

    with pretend_card(1, device=device, kernels=True) as card:
        if device == "cuda:1":
            x = torch.ones(2, 5, 192, device=device)
            with pytest.raises(RuntimeError, match="illegal memory access"):
                kernels._norm_modulate[(10,)](
                    *(x, x, x, x, x, x, x, 5, 192, 960, 192, 0, 0, 0, 1e-6),
                    GATED=False,
                    BLOCK=256,
                )
        assert fused.largest_difference(device) < 1e-5
        assert card.counts.kernels["_norm_heads"].launches == 1


# --- older PyTorch ------------------------------------------------------------------------------


def test_an_older_torch_is_told_of(monkeypatch):
    monkeypatch.delattr(backend.backend_registration, "_setup_privateuseone_for_python_backend")
    assert "needs torch 2.10 or newer" in backend.why_not()
    with pytest.raises(RuntimeError, match=r"needs torch 2\.10"), pretend_card(1):
        pass
