"""Muon: momentum, orthogonalised, for the matrices of a network's blocks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..precision import computes_bf16

AT_ONCE = 2**26  # elements in one round: about 1 GB beside what is kept
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024
ROUNDS = 5
SCALE = 0.2  # root mean square of an update, as AdamW's: both take the same learning rate


class Muon(torch.optim.Optimizer):
    """Every direction of a matrix learns as fast as its largest; AdamW where `parts` says 0.

    parts: of each parameter [n k, m], how many matrices [n, m] it stacks (query, key, value: 3),
    each orthogonalised by itself; 0: AdamW.  betas, eps: of AdamW; Muon's momentum is 0.95, with
    Nesterov's look ahead.
    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the scale, Liu et al. 2025,
    arXiv:2502.16982.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        parts: Sequence[int],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        momentum: float = 0.95,
    ):
        numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(parameters, numbers)
        self.betas = betas
        self.parts = dict(zip(parameters, parts, strict=True))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            learning = [one for one in group["params"] if one.grad is not None]
            for one in learning:
                one.mul_(1 - group["lr"] * group["weight_decay"])
            self._adamw([one for one in learning if not self.parts[one]], group)
            self._muon([one for one in learning if self.parts[one]], group)

    def _adamw(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        first, second = self.betas
        for one in parameters:
            state, gradient = self.state[one], one.grad
            assert gradient is not None
            if not state:
                state["step"] = torch.tensor(0.0)
                state["mean"], state["square"] = torch.zeros_like(one), torch.zeros_like(one)
            state["step"] += 1
            step = float(state["step"])
            mean = state["mean"].lerp_(gradient, 1 - first) / (1 - first**step)
            square = state["square"].lerp_(gradient * gradient, 1 - second) / (1 - second**step)
            one.addcdiv_(mean, square.sqrt_().add_(group["eps"]), value=-group["lr"])

    def _muon(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Matrices of one shape go through the rounds together, a handful at a time."""
        alike: dict[tuple[int, int], list[nn.Parameter]] = {}
        for one in parameters:
            shape = (one.shape[0] // self.parts[one], one.shape[1])
            alike.setdefault(shape, []).append(one)
        for shape, every in alike.items():
            size = max(1, AT_ONCE // max(one.numel() for one in every))
            length = group["lr"] * SCALE * max(shape) ** 0.5
            for start in range(0, len(every), size):
                some = every[start : start + size]
                aheads = [self._ahead(one, group["momentum"]) for one in some]
                updates = orthogonalised(torch.cat(aheads)).split([len(a) for a in aheads])
                for one, update in zip(some, updates, strict=True):
                    one.add_(update.flatten(0, 1), alpha=-length)

    def _ahead(self, one: nn.Parameter, momentum: float) -> Tensor:
        """Where the momentum leads, its matrices apart: [parts, n, m]."""
        state, gradient = self.state[one], one.grad
        assert gradient is not None
        if not state:
            state["mean"] = torch.zeros_like(one)
        mean = state["mean"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum).unflatten(0, (self.parts[one], -1))


def orthogonalised(matrices: Tensor) -> Tensor:
    """[B, n, m] with singular values of about 1 (0.7 to 1.2) in the place of theirs.

    Rounds of Newton and Schulz's iteration with a quintic polynomial, in bfloat16 where that is
    quick: no more precision is needed.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    quick = computes_bf16(matrices.device) or processor_multiplies_bf16(matrices.device)
    x = (matrices.mT if tall else matrices).to(torch.bfloat16 if quick else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def processor_multiplies_bf16(device: torch.device) -> bool:
    """Elsewhere a processor's bfloat16 products take some twenty times as long as float32's."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return device.type == "cpu" and asked is not None and bool(asked())
