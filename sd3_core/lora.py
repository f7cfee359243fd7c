"""LoRA on a network that keeps its own parameters and names: train, attach, switch off, merge.

Hu et al. 2021 (arXiv:2106.09685): W x becomes W x + strength * (alpha / rank) * up(down(x)).

Adapters act in a forward hook of the layer: its output plus the change.  So every layer that is
called serves (torch.nn, casting, fp8, ComfyUI's), no state-dict key is renamed, the base is never
written to, and switching off gives back the base bit for bit.
"""

import math
import re
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters.changes import Adapter, LoRA, LowRank
from .adapters.hooks import (
    Attached,
    detach,
    existing_hook,
    hook_of,
    is_embedding,
    low_rank,
)
from .errors import CheckpointError

KINDS = ("attn", "attn2", "mlp", "adaLN")
STREAMS = ("x", "context")
_BLOCK_LAYER = re.compile(
    r"joint_blocks\.(\d+)\.(x|context)_block\.(attn2?|mlp|adaLN)(_modulation)?\.\w+"
)


# Which layers


def mmdit_targets(
    model: nn.Module,
    *,
    kinds: Collection[str] = ("attn", "attn2", "mlp"),
    streams: Collection[str] = STREAMS,
    blocks: Collection[int] | None = None,
) -> list[str]:
    """Paths of an MMDiT's linear layers: attention (qkv, proj) and MLP of both streams.

    kinds: of KINDS; streams: of STREAMS; blocks: indices of joint blocks, None is all.
    """
    for given, known in ((kinds, KINDS), (streams, STREAMS)):
        if unknown := set(given) - set(known):
            raise ValueError(f"unknown {sorted(unknown)}; choose from {', '.join(known)}")
    targets = []
    for path, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        match = _BLOCK_LAYER.fullmatch(path)
        if match is None or not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        block, stream, kind = int(match[1]), match[2], match[3]
        if kind in kinds and stream in streams and (blocks is None or block in blocks):
            targets.append(path)
    if not targets:
        raise ValueError(f"no layer of {kinds} in streams {streams}, blocks {blocks}")
    return targets


# To use


_FOR_SIZE = "Use a LoRA that was trained on a model of this family and size."


def check_fit(adapters: LoRA, shapes: Mapping[str, tuple[int, ...]]) -> LoRA:
    """Those adapters whose parameter a network of these parameters has.

    shapes: by the parameter's name.  Raises CheckpointError when the network has none of them, or
    one of another shape: then the LoRA is for another network.
    """
    found = tuple(adapter for adapter in adapters if adapter.name in shapes)
    for adapter in found:
        if not adapter.fits(shapes[adapter.name]):
            rows, columns = adapter.change.shape
            raise CheckpointError(
                f"this LoRA is for another network: its change of {adapter.name} is {rows} x "
                f"{columns}, the network's parameter {list(shapes[adapter.name])}. {_FOR_SIZE}"
            )
    if adapters and not found:
        first = ", ".join(adapter.name for adapter in adapters[:3])
        raise CheckpointError(
            f"this LoRA is for another network: none of its {len(adapters)} adapters has a layer "
            f"here (first: {first}). {_FOR_SIZE}"
        )
    return found


def fitting(model: nn.Module, adapters: LoRA) -> LoRA:
    """Those adapters whose parameter the network has.

    Warns, with counts, when it lacks some.  Errors as `check_fit`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in _parameters(model)}
    found = check_fit(adapters, shapes)
    if missing := [adapter.name for adapter in adapters if adapter.name not in shapes]:
        warnings.warn(
            f"LoRA applied in part: {len(found)} of {len(adapters)} adapters have a layer in this "
            f"network, {len(missing)} do not (first: {', '.join(missing[:3])})",
            stacklevel=3,
        )
    return found


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@contextmanager
def attached(model: nn.Module, loras: Iterable[tuple[LoRA, float]]) -> Iterator[None]:
    """Let adapters act at their strengths inside the `with` block; the model itself stays as it is.

    Adapters of the same layer act in the given order.  A strength of 0 attaches nothing.  Errors
    and warnings as `fitting`.
    """
    added: list[tuple[nn.Module, Attached]] = []
    try:
        for adapters, strength in loras:
            for adapter in fitting(model, adapters):
                if strength == 0:
                    continue
                layer = _layer(model, adapter)
                entry = Attached(adapter.to(_device(layer)), strength)
                hook_of(layer).entries.append(entry)
                added.append((layer, entry))
        yield
    finally:
        for layer, entry in added:
            detach(layer, entry)


def _layer(model: nn.Module, adapter: Adapter) -> nn.Module:
    if not adapter.module:
        raise CheckpointError(
            f"this LoRA changes {adapter.name}, which no layer owns: merge it instead of attaching."
        )
    return model.get_submodule(adapter.module)


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The bare model inside the `with` block, whatever is attached or being trained."""
    hooks = [hook for layer in model.modules() if (hook := existing_hook(layer)) is not None]
    for hook in hooks:
        hook.muted += 1
    try:
        yield
    finally:
        for hook in hooks:
            hook.muted -= 1


def merge(model: nn.Module, adapters: LoRA, strength: float) -> None:
    """One LoRA for good; see `merge_all`."""
    merge_all(model, [(adapters, strength)])


def merge_all(model: nn.Module, loras: Iterable[tuple[LoRA, float]]) -> None:
    """Add the changes of all LoRAs to the model's own parameters, for good.

    They are summed and rounded once, so that several cost no more accuracy than one, and what
    cancels leaves a parameter as it was.  fp8 parameters are rounded at random, up as often as the
    value is nearer to the upper neighbour: most changes are smaller than half a step of fp8 and
    would be lost by rounding to the nearest.  The rounding follows from the parameter's name.
    A strength of 0 merges nothing.  Errors and warnings as `fitting`.
    """
    wanted: dict[str, list[tuple[Adapter, float]]] = {}
    for adapters, strength in loras:
        for adapter in fitting(model, adapters) if strength else ():
            wanted.setdefault(adapter.name, []).append((adapter, strength))
    for name, changes in wanted.items():
        first, _ = changes[0]
        owner = model.get_submodule(first.module)
        parameter = getattr(owner, first.parameter)
        scale = getattr(owner, "weight_scale", None) if first.parameter == "weight" else None
        value = parameter.detach().to(_wide(parameter, changes))
        value = value if scale is None else value * scale.to(value)
        for adapter, strength in changes:
            value = adapter.apply(value, strength)
        value = value if scale is None else value / scale.to(value)
        parameter.data = _stored(value.float(), parameter.dtype, name)


def _wide(parameter: Tensor, changes: Sequence[object]) -> torch.dtype:
    """What changes are added in: several in float64, where none disturbs what another leaves."""
    alone = len(changes) == 1 or parameter.device.type == "mps"  # which has no float64
    return torch.float32 if alone else torch.float64


def _stored(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """float32 as `dtype`; fp8 by stochastic rounding."""
    if dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return value.to(dtype)
    kind = torch.finfo(dtype)
    magnitude = value.abs().clamp(min=kind.smallest_normal)
    exponent = torch.frexp(magnitude).exponent - 1
    step = torch.ldexp(torch.full_like(value, kind.eps), exponent)
    generator = torch.Generator(value.device).manual_seed(zlib.crc32(name.encode()))
    random = torch.rand(value.shape, generator=generator, device=value.device)
    rounded = torch.floor(value / step + random) * step
    return rounded.clamp(-kind.max, kind.max).to(dtype)


# To train


class TrainableAdapter(nn.Module):
    """One layer's low-rank change, float32: down at random, up zero, so it begins as no change."""

    def __init__(
        self,
        layer: Any,
        path: str,
        rank: int,
        alpha: float,
        dropout: float,
        generator: torch.Generator | None,
    ):
        super().__init__()
        outputs, *inputs = layer.weight.shape
        down = torch.empty(rank, *inputs)
        bound = 1 / math.sqrt(math.prod(inputs))  # Kaiming, uniform, with slope sqrt(5)
        down.uniform_(-bound, bound, generator=generator)
        device = layer.weight.device
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, *[1] * (len(inputs) - 1), device=device))
        self.path, self.alpha, self.dropout = path, alpha, dropout

    def add_to(self, out: Tensor, layer: Any, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, layer.training)
        added = low_rank(layer, x, self.down.to(out.dtype), self.up.to(out.dtype))
        scale = self.alpha / self.down.shape[0]
        return out + (added if scale == 1 else added * scale)  # a copy as wide as `out`, saved

    def adapter(self) -> Adapter:
        """A copy of its values, on the CPU."""
        down, up = (tensor.detach().to("cpu", copy=True) for tensor in (self.down, self.up))
        return Adapter(self.path, LowRank(down, up, self.alpha))


class TrainableLoRA(nn.Module):
    """The adapters that `add` put on a model: what an optimiser trains and a checkpoint keeps.

    Not part of the model: the model's parameters and state dict stay those of the base.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[TrainableAdapter]):
        super().__init__()
        # state-dict keys may not hold the path's dots
        self.adapters = nn.ModuleDict({a.path.replace(".", "/"): a for a in adapters})
        self._layers = [(model.get_submodule(a.path), a) for a in adapters]
        for layer, adapter in self._layers:
            hook_of(layer).entries.append(adapter)

    def lora(self) -> LoRA:
        """The present values under the network's own names, to save, attach or merge."""
        return tuple(adapter.adapter() for _, adapter in self._layers)

    def remove(self) -> None:
        """Take the adapters off the model."""
        for layer, adapter in self._layers:
            detach(layer, adapter)


def add(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> TrainableLoRA:
    """Put fresh adapters on linear (or convolutional) layers and freeze the base.

    targets: module paths; None: `mmdit_targets(model)`.  alpha: None is rank, a scale of 1.
    dropout: share of the adapters' inputs dropped where the layer is in training mode.
    generator: CPU generator of the random halves.  Raises ValueError for a path that has no such
    layer.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    targets = mmdit_targets(model) if targets is None else list(targets)
    layers = dict(model.named_modules())
    for path in targets:
        weight = getattr(layers.get(path), "weight", None)
        if weight is None or weight.dim() not in (2, 4) or is_embedding(layers[path]):
            raise ValueError(f"{path!r} is no linear or convolutional layer of this network")
    model.requires_grad_(False)
    alpha = float(rank if alpha is None else alpha)
    return TrainableLoRA(
        model,
        [TrainableAdapter(layers[p], p, rank, alpha, dropout, generator) for p in targets],
    )
