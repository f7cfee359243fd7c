"""Files -> networks: checked against the header first, then mapped, never half loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..models.attention import Attention, attention
from ..models.cast import CastOps, Scaled, cast
from ..models.clip import CLIPConfig, CLIPTextModel
from ..models.mmdit import HEAD_DIM, MMDiT, MMDiTConfig
from ..models.onednn import Ops
from ..models.t5 import T5Config, T5Encoder
from ..models.vae import VAE, VAEConfig
from .layouts import SUPPLIERS, TITLES, Component, find_components
from .sources import read_sources
from .stored import name_list, what_to_do

Config = MMDiTConfig | VAEConfig | CLIPConfig | T5Config

CONVERTED_AT_MOST = 2**30  # bytes a conversion may cost when it enlarges the weights
# More would only be a header made to keep the program busy: each block is built to be checked.
MAX_BLOCKS = 256
MAX_LEVELS = 8


def nothing(name: str) -> bool:
    return False


def load_mmdit(
    where: str | Path | Component,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    ops: Any = None,
    attention: Attention = attention,
    left: Callable[[str], bool] = nothing,
) -> MMDiT:
    """The denoiser of a file, folder or component, frozen, ready to compute in `dtype`.

    dtype: of the computation; None takes the file's own.  Weights are converted when that does not
    enlarge them or stays below 1 GiB; otherwise they stay as stored (on the CPU: in the mapped
    file) and are cast layer by layer in each call.  ops, attention: as the network takes them; with
    `ops` of the caller's, scaled weights are unscaled.  left: the parameters it is true for stay on
    the CPU as they are stored, for a caller that brings them where they are needed (speed/).
    Raises CheckpointError.
    """
    network = _load("mmdit", where, dtype, device, ops, attention, left)
    assert isinstance(network, MMDiT)
    return network


def load_vae(
    where: str | Path | Component,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    ops: Any = None,
    attention: Attention = attention,
    left: Callable[[str], bool] = nothing,
) -> VAE:
    """The autoencoder; arguments as for load_mmdit."""
    network = _load("vae", where, dtype, device, ops, attention, left)
    assert isinstance(network, VAE)
    return network


def load_clip(
    where: str | Path | Component,
    kind: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    ops: Any = None,
    attention: Attention = attention,
) -> CLIPTextModel:
    """A CLIP text encoder; kind: "clip_l" or "clip_g"; other arguments as for load_mmdit."""
    network = _load(kind, where, dtype, device, ops, attention)
    assert isinstance(network, CLIPTextModel)
    return network


def load_t5(
    where: str | Path | Component,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    ops: Any = None,
    attention: Attention = attention,
    left: Callable[[str], bool] = nothing,
) -> T5Encoder:
    """The T5 encoder; arguments as for load_mmdit."""
    network = _load("t5", where, dtype, device, ops, attention, left)
    assert isinstance(network, T5Encoder)
    return network


def component_of(where: str | Path | Component, kind: str) -> Component:
    """The component of this kind; CheckpointError that says what is there instead."""
    if isinstance(where, Component):
        found = {where.kind: where}
        file = where.file
    else:
        file, found = Path(where), find_components(where, clip=kind)
    if kind in found:
        return found[kind]
    there = " and ".join(TITLES[name] for name in found)
    raise CheckpointError(
        f"{file.name}: holds {there}, not {TITLES[kind]}. Give that as a file of its own, for "
        f"example {SUPPLIERS[kind]}, or give this file where {there} belongs."
    )


def read_config(component: Component) -> Config:
    """The size of the network, read off the component's shapes and checked against its names.

    Raises CheckpointError naming missing, surplus and misshapen parameters.
    """
    config = _config(component)
    _check(component, _build(component, config, nn, attention))
    return config


@torch.inference_mode(False)  # tensors made inside ComfyUI's inference mode could not be trained on
def read_state_dict(component: Component) -> dict[str, Tensor]:
    """The checked parameters under the released names, mapped from the file, as stored.

    Scaled fp8 weights have their scale beside them as `<module>.weight_scale`, float32.
    """
    read_config(component)
    state, scales = read_sources(component.sources)
    for key, scale in scales.items():
        state[f"{key.removesuffix('.weight')}.weight_scale"] = scale
    return state


@torch.inference_mode(False)
def _load(
    kind: str,
    where: str | Path | Component,
    dtype: torch.dtype | None,
    device: str | torch.device,
    ops: Any,
    attend: Attention,
    left: Callable[[str], bool] = nothing,
) -> nn.Module:
    component = component_of(where, kind)
    config = _config(component)
    converted = dtype if dtype is not None and _may_convert(component, dtype) else None
    layers = ops or _layers(component, dtype, converted)
    network = _build(component, config, layers, attend)
    _check(component, network if ops is None else _build(component, config, nn, attend))
    state, scales = read_sources(component.sources)
    for key in state:
        state[key] = state[key].to("cpu" if left(key) else device)
        module = network.get_submodule(key.rpartition(".")[0])
        if key in scales and (converted or not isinstance(module, Scaled)):
            scale = scales.pop(key).to(state[key].device)
            state[key] = cast(state[key], scale, converted or dtype or torch.float32)
        elif converted and not left(key):
            state[key] = state[key].to(converted)
    network.load_state_dict(state, strict=True, assign=True)
    for key, scale in scales.items():
        module = network.get_submodule(key.rpartition(".")[0])
        assert isinstance(module, Scaled)
        module.set_scale(scale.to(state[key].device))
    return network.requires_grad_(False).eval()


def _may_convert(component: Component, dtype: torch.dtype) -> bool:
    """Whether all weights may take this dtype: they do not grow, or stay small."""
    size = sum(source.elements for source in component.sources.values()) * dtype.itemsize
    stored = sum(source.bytes for source in component.sources.values())
    return size <= stored or size < CONVERTED_AT_MOST


def _layers(component: Component, dtype: torch.dtype | None, converted: torch.dtype | None) -> Any:
    """torch.nn's layers where every weight is of the computation's dtype, else layers that cast."""
    dtypes = {source.dtype for source in component.sources.values()}
    scaled = any(source.scales for source in component.sources.values())
    uniform = len(dtypes) == 1 and not scaled and next(iter(dtypes)).itemsize > 1
    if converted or (uniform and dtype in (None, *dtypes)):
        return Ops
    return CastOps(dtype or torch.float32)


def _config(component: Component) -> Config:
    empty = [key for key, source in component.sources.items() if not source.elements]
    try:
        if empty:
            raise ValueError(f"nothing is in {name_list(empty)}")
        return _config_from_shapes(component.kind, component.shapes)
    except (ValueError, LookupError, ArithmeticError, TypeError) as error:
        cause = error.__cause__ or error
        fault = f"its sizes make no sense ({cause})"
        if isinstance(cause, KeyError):
            fault = f"it lacks {cause.args[0]}, which tells its size"
        raise CheckpointError(
            f"{component.file.name}: looks like {TITLES[component.kind]}, but {fault}. "
            f"{what_to_do(component.file)}"
        ) from error


def _config_from_shapes(kind: str, shapes: dict[str, tuple[int, ...]]) -> Config:
    if kind == "vae":
        vae = VAEConfig.from_shapes(shapes)
        if not vae.channels:
            raise KeyError("encoder.down.0.block.0.conv1.weight")
        _check_count(len(vae.channels), "levels", MAX_LEVELS)
        _check_count(len(vae.channels) * vae.blocks_per_level, "blocks", MAX_BLOCKS)
        return vae
    if kind == "t5":
        t5 = T5Config.from_shapes(shapes)
        _check_count(t5.num_layers, "layers", MAX_BLOCKS)
        return t5
    if kind == "mmdit":
        depth = shapes["x_embedder.proj.weight"][0] // HEAD_DIM
        blocks = {key.split(".")[1] for key in shapes if key.startswith("joint_blocks.")}
        _check_count(len(blocks), "blocks", MAX_BLOCKS)
        if depth != len(blocks):
            raise ValueError(
                f"it has {len(blocks)} blocks, and its width asks for {depth} (64 a block)"
            )
        return MMDiTConfig.from_shapes(shapes)
    clip = CLIPConfig.from_shapes(shapes, kind)
    _check_count(clip.num_layers, "layers", MAX_BLOCKS)
    if clip.hidden_size % 64:
        raise ValueError(f"it is {clip.hidden_size} wide, no multiple of a head's 64")
    return clip


def _check_count(number: int, what: str, most: int) -> None:
    if number > most:
        raise ValueError(f"it has {number} {what}, and at most {most} are read")


_NETWORKS: dict[type, Any] = {
    MMDiTConfig: MMDiT,
    VAEConfig: VAE,
    CLIPConfig: CLIPTextModel,
    T5Config: T5Encoder,
}


def _build(component: Component, config: Config, ops: Any, attend: Attention) -> nn.Module:
    """The network without weights; CheckpointError when no network can have these sizes."""
    try:
        with torch.device("meta"):
            return _NETWORKS[type(config)](config, ops, attend)
    except (ValueError, RuntimeError, ArithmeticError, TypeError) as error:
        raise CheckpointError(
            f"{component.file.name}: looks like {TITLES[component.kind]}, but no network has its "
            f"sizes ({error}). Download the file again."
        ) from error


def _check(component: Component, network: nn.Module) -> None:
    """Names and shapes in the file against the network's own."""
    wanted = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    there = component.shapes
    missing = [key for key in wanted if key not in there]
    surplus = [key for key in there if key not in wanted]
    misshapen = [key for key in wanted if key in there and wanted[key] != there[key]]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(wanted)} tensors missing ({name_list(missing)})")
    if surplus:
        faults.append(f"{len(surplus)} surplus ({name_list(surplus)})")
    if misshapen:
        key = misshapen[0]
        faults.append(
            f"{len(misshapen)} of wrong shape ({key} is {list(there[key])} instead of "
            f"{list(wanted[key])})"
        )
    if faults:
        raise CheckpointError(
            f"{component.file.name}: {'; '.join(faults)}. It looks like {TITLES[component.kind]}, "
            f"damaged or made for another program. {what_to_do(component.file)}"
        )
