"""One code for ComfyUI 0.3.64 and 0.33: what differs is asked for by name, never by version."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import torch
from comfy_api.latest import io
from torch import Tensor, nn


def schema(fields: Mapping[str, Any]) -> Any:
    """io.Schema of these fields, without those that this ComfyUI does not know (search words).

    Every node of ours reports; so that /history and a page loaded anew have the report also where
    the node's result comes from the cache, all have the mark that ComfyUI asks for.
    """
    known = {field.name for field in dataclasses.fields(io.Schema)}
    fields = {"has_intermediate_output": True, **fields}
    return io.Schema(**{name: value for name, value in fields.items() if name in known})


def advanced(inputs: Sequence[Any]) -> list[Any]:
    """The same inputs, folded away where this ComfyUI folds inputs away."""
    for socket in inputs:
        if hasattr(socket, "advanced"):
            socket.advanced = True
    return list(inputs)


def make_patcher(
    model: nn.Module,
    load_device: Any,
    offload_device: Any,
    plain: bool,
    static: Any = comfy.model_patcher.ModelPatcher,
) -> Any:
    """A ModelPatcher; with dynamic VRAM (0.16 and later) that kind, unless `plain` is asked for.

    static: the class where it is not that kind, as on every CPU.
    """
    own = comfy.model_patcher.ModelPatcher
    dynamic = getattr(comfy.model_patcher, "CoreModelPatcher", own)
    on_cpu = comfy.model_management.is_device_cpu(load_device)
    chosen = static if plain or on_cpu or dynamic is own else dynamic
    return chosen(model, load_device=load_device, offload_device=offload_device)


def archive_dtypes(model: nn.Module) -> None:
    """Note every parameter's dtype on its module, which dynamic VRAM reads."""
    archive = getattr(comfy.model_management, "archive_model_dtypes", None)
    if archive is not None:
        archive(model)


def set_reload(patcher: Any, factory: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """How ComfyUI gets the same weights anew from disk: for training, hooks, several GPUs."""
    if hasattr(patcher, "cached_patcher_init"):
        patcher.cached_patcher_init = (factory, arguments)


def quantised_layers() -> bool:
    """Whether comfy.ops computes with scaled fp8 weights as they are stored."""
    return hasattr(comfy.ops, "mixed_precision_ops")


@functools.cache
def wants_back(cast: Callable[..., Any]) -> bool:
    """Whether this ComfyUI's cast_bias_weight lends buffers that it wants to have back."""
    return "offloadable" in inspect.signature(cast).parameters


@contextmanager
def lent(layer: nn.Module, like: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weight and bias of one of ComfyUI's layers, patches and all, as a call with `like` has them.

    They lie in buffers that ComfyUI fills anew for the next layer.
    """
    cast = comfy.ops.cast_bias_weight
    if not wants_back(cast):
        weight, bias = cast(layer, like)[:2]
        yield weight, bias
        return
    weight, bias, loan = cast(layer, like, offloadable=True)
    try:
        yield weight, bias
    finally:
        comfy.ops.uncast_bias_weight(layer, weight, bias, loan)


def weights_of(layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """A copy of what is lent."""
    with lent(layer, like) as (weight, bias):
        return weight.clone(), None if bias is None else bias.clone()


def lending_layers() -> tuple[type, ...]:
    """The layers of comfy.ops that do nothing but use the weights that they are lent."""
    kinds = (comfy.ops.disable_weight_init, comfy.ops.manual_cast)
    return tuple(getattr(kind, name) for kind in kinds for name in ("Linear", "RMSNorm"))


def free_memory(patcher: Any, device: torch.device) -> int:
    """Bytes that ComfyUI would give to work on a device, those of weights it may page out too."""
    asked = getattr(patcher, "get_free_memory", comfy.model_management.get_free_memory)
    return asked(device)


def intermediate_dtype() -> torch.dtype:
    chosen = getattr(comfy.model_management, "intermediate_dtype", None)
    return torch.float32 if chosen is None else chosen()


def inference_dtype(model: Any) -> torch.dtype:
    """Of the computation.  model: a BaseModel."""
    given = getattr(model, "get_dtype_inference", None)
    return given() if given is not None else model.manual_cast_dtype or model.get_dtype()


def fix_empty_latent(model: Any, latent: Mapping[str, Any]) -> Tensor:
    """The samples; an empty latent made for another model gets this one's channels and size."""
    fix = comfy.sample.fix_empty_latent_channels
    names = list(inspect.signature(fix).parameters)[2:]  # downscale_ratio_spacial and its like
    return fix(model, latent["samples"], *[latent.get(name) for name in names])
