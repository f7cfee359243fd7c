"""What a LoRA file says about one weight: low-rank, Hadamard, Kronecker or plain change, and DoRA.

A weight W [out, in] (or [out, C, kh, kw]) becomes W + strength * change.delta(), in float32.
Hu et al. 2021 (arXiv:2106.09685) for LoRA; Yeh et al. 2023 (arXiv:2309.14859, LyCORIS) for LoHa,
LoKr and the Tucker cores of convolutions; Liu et al. 2024 (arXiv:2402.09353) for DoRA.  Scales and
edge cases follow ComfyUI 0.33, so that a file acts here as it does there.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

AnyChange = TypeVar("AnyChange", bound="Change")


def _tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """core: [i, j, kh, kw]; left: [out, i]; right: [j, C].  Returns [out, C, kh, kw]."""
    return torch.einsum("i j h w, o i, j c -> o c h w", core, left, right)


@dataclass(frozen=True, eq=False)
class Change:
    """A change made of tensors; they are kept as stored and computed with in float32."""

    def to(self: AnyChange, device: torch.device) -> AnyChange:
        """The same change with its tensors on `device`."""
        moved = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    @property
    def rank(self) -> int | None:
        return None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs, a kernel counted among the inputs; ValueError: parts do not fit."""
        try:
            rows, *columns = self.to(torch.device("meta")).delta().shape  # computes no numbers
        except (RuntimeError, IndexError, ZeroDivisionError) as error:
            raise ValueError(str(error)) from error
        return rows, math.prod(columns)

    def delta(self) -> Tensor:
        """The change at strength 1, float32, [out, in] or [out, C, kh, kw]."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class LowRank(Change):
    """scale * up @ down, scale = alpha / rank, or 1 when the file has no alpha."""

    down: Tensor  # [r, in] or [r, C, kh, kw]
    up: Tensor  # [out, r] or [out, r, 1, 1]
    alpha: float | None = None
    mid: Tensor | None = None  # [r, r, kh, kw]: Tucker core of a convolution

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def delta(self) -> Tensor:
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        product = up @ down if self.mid is None else _tucker(self.mid.float(), up, down)
        return product * self.scale


@dataclass(frozen=True, eq=False)
class LoHa(Change):
    """scale * (w1_a @ w1_b) * (w2_a @ w2_b), element by element."""

    w1_a: Tensor  # [out, r], with cores [r, out]
    w1_b: Tensor  # [r, in]
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None  # [r, r, kh, kw]: Tucker cores of a convolution
    t2: Tensor | None = None
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def delta(self) -> Tensor:
        first = self._factor(self.w1_a, self.w1_b, self.t1)
        second = self._factor(self.w2_a, self.w2_b, self.t2)
        return first * second * (1.0 if self.alpha is None else self.alpha / self.rank)

    @staticmethod
    def _factor(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
        if core is None:
            return a.float() @ b.float()
        return _tucker(core.float(), a.float().T, b.float())


@dataclass(frozen=True, eq=False)
class LoKr(Change):
    """scale * kron(w1, w2); each factor whole, or as a product w_a @ w_b, which alone is scaled."""

    w1: Tensor | None = None
    w2: Tensor | None = None  # [s, t] or [s, t, kh, kw]
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2_a: Tensor | None = None  # with core [r, s]
    w2_b: Tensor | None = None
    t2: Tensor | None = None  # [r, r, kh, kw]
    alpha: float | None = None

    @property
    def rank(self) -> int | None:
        """Inner size of the factored part; None when both factors are whole."""
        inner = self.w2_b if self.w2 is None else self.w1_b if self.w1 is None else None
        return None if inner is None else inner.shape[0]

    def delta(self) -> Tensor:
        first = _product(self.w1, self.w1_a, self.w1_b)
        if self.t2 is None or self.w2_a is None or self.w2_b is None:
            second = _product(self.w2, self.w2_a, self.w2_b)
        else:
            second = _tucker(self.t2.float(), self.w2_a.float().T, self.w2_b.float())
        if second.dim() == 4:
            first = first[:, :, None, None]
        scale = 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank
        return torch.kron(first, second.contiguous()) * scale


def _product(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    """A factor; ValueError when the file has neither the whole nor both halves."""
    if whole is not None:
        return whole.float()
    if a is None or b is None:
        raise ValueError("a factor is missing")
    return a.float() @ b.float()


@dataclass(frozen=True, eq=False)
class Difference(Change):
    """A whole change, added with the strength alone."""

    value: Tensor

    def delta(self) -> Tensor:
        return self.value.float()


@dataclass(frozen=True, eq=False)
class Adapter:
    """One change and the parameter it belongs to."""

    module: str  # path in the network; "" names a parameter of the network itself
    change: Change
    parameter: str = "weight"
    rows: tuple[int, int] | None = None  # (start, length): a slice of the outputs; None is all
    magnitude: Tensor | None = None  # DoRA: [out, 1] or [1, in]
    norms_changed: bool = False  # the magnitude is over the norms of the changed weight, as PEFT's

    @property
    def name(self) -> str:
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    def to(self, device: torch.device) -> "Adapter":
        magnitude = None if self.magnitude is None else self.magnitude.to(device)
        return replace(self, change=self.change.to(device), magnitude=magnitude)

    def fits(self, shape: Iterable[int]) -> bool:
        """Whether a parameter of this shape can be changed so."""
        outputs, *inputs = shape
        rows, columns = self.change.shape
        if columns != math.prod(inputs):
            return False
        if self.magnitude is not None:
            per_output = self.magnitude.shape[0] == rows
            if self.magnitude.numel() != (rows if per_output else math.prod(inputs[:1])):
                return False
        if self.rows is None:
            return rows == outputs
        start, length = self.rows
        return rows == length and start + length <= outputs

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """weight: float32.  Returns the changed weight; the given one stays as it is."""
        changed = weight.clone()
        part = changed if self.rows is None else changed.narrow(0, *self.rows)
        delta = self.change.delta().to(weight.device).reshape(part.shape)
        if self.magnitude is not None:
            delta = _decomposed(part, delta, self.magnitude.to(part), self.norms_changed) - part
        part.add_(delta, alpha=strength)
        return changed


LoRA = tuple[Adapter, ...]  # the adapters of one network


def _decomposed(weight: Tensor, delta: Tensor, magnitude: Tensor, norms_changed: bool) -> Tensor:
    """The DoRA weight: direction times magnitude.

    The paper norms the changed weight, and so does PEFT.  ComfyUI does it for a magnitude per input
    alone; one per output is divided by the norms of the unchanged weight, unless `norms_changed`.
    """
    changed = weight + delta
    axis = 0 if magnitude.shape[0] == weight.shape[0] else 1
    normed = changed if axis == 1 or norms_changed else weight
    others = [dim for dim in range(weight.dim()) if dim != axis]
    norm = torch.linalg.vector_norm(normed, dim=others, keepdim=True)
    magnitude = magnitude.reshape(norm.shape)
    return changed * (magnitude / (norm + torch.finfo(torch.float32).eps))
