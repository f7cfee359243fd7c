"""How the output of a layer in use changes with its adapters: a forward hook adds the change.

The layers are linear in their weight, so a change of the weight adds the layer's response to that
change.  Low-rank changes are never multiplied out; the others are, anew in each call, which costs
little beside the layer itself and keeps no second copy of it in memory.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .changes import Adapter, LowRank


def _response(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """What the layer would give with `weight` in place of its own, and without bias."""
    if weight.dim() == 4:
        return F.conv2d(x, weight, None, layer.stride, layer.padding)
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, weight)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, None, layer.eps)
    if weight.dim() == 1:
        return F.rms_norm(x, weight.shape, weight, layer.eps)
    return F.linear(x, weight)


def low_rank(layer: Any, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """up(down(x)) for a linear or convolutional layer."""
    if layer.weight.dim() == 4:
        hidden = F.conv2d(
            x, down.reshape(-1, *layer.weight.shape[1:]), None, layer.stride, layer.padding
        )
        return F.conv2d(hidden, up.flatten(1)[:, :, None, None])
    return F.linear(F.linear(x, down.flatten(1)), up.flatten(1))


def full_weight(layer: Any) -> Tensor:
    """The layer's weight in float32, with the scale of scaled fp8."""
    weight = layer.weight.detach().float()
    scale = getattr(layer, "weight_scale", None)
    return weight if scale is None else weight * scale.to(weight)


class Entry(Protocol):
    """What a hook holds: an attached or a trainable adapter."""

    def add_to(self, out: Tensor, layer: Any, x: Tensor) -> Tensor: ...


class Attached:
    """An adapter from a file, at a strength."""

    def __init__(self, adapter: Adapter, strength: float):
        self.adapter = adapter
        self.strength = strength

    def add_to(self, out: Tensor, layer: Any, x: Tensor) -> Tensor:
        change = self.adapter.change
        if self.adapter.parameter == "bias":
            bias = change.delta().to(out) * self.strength
            added = bias[:, None, None] if layer.weight.dim() == 4 else bias
        elif isinstance(change, LowRank) and change.mid is None and not is_embedding(layer):
            added = low_rank(layer, x, change.down.to(out), change.up.to(out))
            added = added * (self.strength * change.scale)
        else:
            weight = (change.delta() * self.strength).to(out)
            if self.adapter.rows is None:
                weight = weight.reshape(layer.weight.shape)
            added = _response(layer, x, weight)
        return _add_rows(out, added, self.adapter.rows)


def is_embedding(layer: Any) -> bool:
    return isinstance(layer, nn.Embedding)


def _add_rows(out: Tensor, added: Tensor, rows: tuple[int, int] | None) -> Tensor:
    """out [..., D] plus `added` on its features (start, length)."""
    if rows is None:
        return out + added
    start, length = rows
    if torch.is_grad_enabled() and (out.requires_grad or added.requires_grad):
        return out + F.pad(added, (start, out.shape[-1] - start - length))
    out.narrow(-1, start, length).add_(added)  # `out` is new: the layer has just made it
    return out


class Hook:
    """The adapters of one layer, in the order they were attached; its forward hook."""

    def __init__(self, layer: nn.Module) -> None:
        self.entries: list[Entry] = []
        self.muted = 0  # how many `lora.disabled` contexts are open
        self.handle = layer.register_forward_hook(self)

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if self.muted:
            return out
        if any(_norms_weight(entry) for entry in self.entries):
            return self._through_weight(layer, inputs[0], out)
        for entry in self.entries:
            out = entry.add_to(out, layer, inputs[0])
        return out

    def _through_weight(self, layer: Any, x: Tensor, out: Tensor) -> Tensor:
        """DoRA norms the weight it meets, so the changes are applied to it one after the other."""
        base = full_weight(layer)
        weight = base
        for entry in self.entries:
            if isinstance(entry, Attached) and entry.adapter.parameter == "weight":
                weight = entry.adapter.apply(weight, entry.strength)
            else:
                out = entry.add_to(out, layer, x)
        return out + _response(layer, x, (weight - base).to(out))


def _norms_weight(entry: Entry) -> bool:
    return isinstance(entry, Attached) and entry.adapter.magnitude is not None


def hook_of(layer: nn.Module) -> Hook:
    """The layer's hook, made on first use."""
    return existing_hook(layer) or Hook(layer)


def existing_hook(layer: nn.Module) -> Hook | None:
    return next((hook for hook in layer._forward_hooks.values() if isinstance(hook, Hook)), None)


def detach(layer: nn.Module, entry: Entry) -> None:
    """Take one entry out, and the hook with the last one."""
    hook = existing_hook(layer)
    if hook is not None and entry in hook.entries:
        hook.entries.remove(entry)
        if not hook.entries:
            hook.handle.remove()
