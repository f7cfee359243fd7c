"""The MMDiT and the VAE as ComfyUI's MODEL and VAE, under its memory manager.

The networks are the core's own; only their layers (comfy.ops) and their attention are ComfyUI's.
So they are offloaded, paged, kept in fp8, patched by LoRAs and interrupted like ComfyUI's models.
"""

import json
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.ldm.modules.diffusionmodules.model
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import comfy.sd
import comfy.supported_models
import torch
from torch import Tensor

from ..sd3_core.checkpoints.family import model_preset
from ..sd3_core.checkpoints.layouts import Component
from ..sd3_core.checkpoints.load import CONVERTED_AT_MOST, read_config, read_state_dict
from ..sd3_core.checkpoints.products import Product, read_products
from ..sd3_core.models.cast import cast
from ..sd3_core.models.mmdit import MMDiT, MMDiTConfig, Tokens
from ..sd3_core.models.vae import VAE, VAEConfig
from ..sd3_core.speed import stripes
from ..sd3_core.speed.modulation import tabled_layers
from ._compat import (
    archive_dtypes,
    free_memory,
    inference_dtype,
    lending_layers,
    lent,
    make_patcher,
    quantised_layers,
    weights_of,
)
from .comfy_speed import watch_runs
from .comfy_table import (
    LOOKED_UP,
    WEIGHTS,
    Tabled,
    TabledPatcher,
    forget_table,
    looked_up,
    weights_in_force,
)

WEIGHT_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
AUTO = "auto"
# fp16 is never chosen for the user: SD3.5's activations leave its range and the picture is black.
SAFE_DTYPES = [torch.bfloat16, torch.float32]
FP8_NOTES = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}


# Layers


@dataclass(frozen=True)
class TypedOps:
    """comfy.ops with a dtype filled in: the core's networks name none when they make a layer."""

    operations: Any
    dtype: torch.dtype | None
    embedding_dtype: torch.dtype = torch.float32  # token ids do not tell that of the computation

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(make_layer, getattr(self.operations, name), dtype=self.dtype)

    def Embedding(self, rows: int, width: int) -> Any:  # noqa: N802
        layer = self.operations.Embedding(rows, width, dtype=self.dtype)
        layer.forward = partial(layer.forward, out_dtype=self.embedding_dtype)
        return layer


def make_layer(kind: Any, *sizes: int, **named: Any) -> Any:
    """A layer of comfy.ops; its weights are at hand for the blocks' fast ways (models/fused.py)."""
    layer = kind(*sizes, **named)
    if kind in lending_layers():
        layer.lend = lent
    return layer


# Weights


@dataclass(frozen=True)
class Precision:
    weights: torch.dtype  # as they are kept
    compute: torch.dtype | None  # None: as they are kept


def dtype_of(component: Component) -> torch.dtype:
    """The dtype of most of its bytes."""
    sizes: dict[torch.dtype, int] = {}
    for source in component.sources.values():
        sizes[source.dtype] = sizes.get(source.dtype, 0) + source.bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def is_scaled(component: Component) -> bool:
    return any(source.scales for source in component.sources.values())


def elements(component: Component) -> int:
    return sum(source.elements for source in component.sources.values())


def kept_dtype(component: Component, computed: torch.dtype) -> torch.dtype:
    """As stored where that is smaller than what is computed in: large weights stay mapped."""
    stored = dtype_of(component)
    small = elements(component) * computed.itemsize < CONVERTED_AT_MOST
    return stored if stored.itemsize < computed.itemsize and not small else computed


def mmdit_precision(component: Component, wanted: str, device: Any) -> Precision:
    """wanted: "auto" or a key of WEIGHT_DTYPES; ComfyUI's own --bf16-unet and so on still count."""
    manager = comfy.model_management
    if wanted != AUTO:
        weights = WEIGHT_DTYPES[wanted]
        allowed = [weights, torch.float32] if weights == torch.float16 else SAFE_DTYPES
        return Precision(weights, manager.unet_manual_cast(weights, device, allowed))
    stored = dtype_of(component)
    chosen = manager.unet_dtype(
        model_params=elements(component),
        supported_dtypes=SAFE_DTYPES,
        weight_dtype=stored if stored.itemsize == 1 and not is_scaled(component) else None,
    )
    if is_scaled(component):
        return Precision(chosen, manager.unet_manual_cast(None, device, SAFE_DTYPES))
    weights = kept_dtype(component, chosen)
    return Precision(weights, manager.unet_manual_cast(weights, device, SAFE_DTYPES))


@torch.inference_mode(False)  # what is made inside ComfyUI's inference mode could not be trained on
def read_weights(component: Component, dtype: torch.dtype, keep_scaled: bool) -> dict[str, Tensor]:
    """The checked parameters in this dtype, mapped from the file where it is the stored one.

    keep_scaled: scaled fp8 layers stay as they are, with the notes by which comfy.ops knows them.
    """
    stored = read_state_dict(component)
    products = read_products(component) if keep_scaled else {}
    state: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        module, _, end = name.rpartition(".")
        if end == "weight_scale":
            continue
        scale = stored.get(f"{module}.weight_scale") if end == "weight" else None
        if scale is None:
            state[name] = tensor if name == "pos_embed" else tensor.to(dtype)
        elif keep_scaled and scale.numel() == 1 and tensor.ndim == 2:
            product = products.get(module, Product())
            note = json.dumps(product.note(FP8_NOTES[tensor.dtype]))
            state[name] = tensor
            state[f"{module}.weight_scale"] = scale.reshape(())
            if product.input_scale is not None:
                state[f"{module}.input_scale"] = product.input_scale
            state[f"{module}.comfy_quant"] = torch.tensor(list(note.encode()), dtype=torch.uint8)
        else:
            state[name] = cast(tensor, scale, dtype)
    return state


def assign_weights(network: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Give a network its parameters, uncopied; names and shapes were checked against the file."""
    missing, _ = network.load_state_dict(state, strict=False, assign=True)
    if any(not name.endswith("logit_scale") for name in missing):
        raise RuntimeError(f"layers of comfy.ops did not take {missing[:3]}")


# MODEL


class ComfyMMDiT(MMDiT):
    """The core's MMDiT, called and patched the way ComfyUI calls and patches a denoiser."""

    def __init__(
        self,
        config: MMDiTConfig,
        depth: int,
        in_channels: int,
        dtype: torch.dtype,
        device: Any,
        operations: Any,
    ):
        """depth, in_channels: the config's; ComfyUI reads them where these arguments come from."""
        with torch.device("meta"):  # weights are assigned
            super().__init__(config, ops=TypedOps(operations, dtype))
        self.dtype = dtype
        self.tabled: Tabled | None = None

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor,
        control: Mapping[str, Any] | None = None,
        transformer_options: Mapping[str, Any] | None = None,
        **ignored: Any,
    ) -> Tensor:
        """x: [B, C, H, W]; timesteps: [B], 1000 * sigma; context: [B, L, Dc]; y: pooled [B, Dp].

        ignored: what other models of ComfyUI are told as well.  Returns the velocity, like x.
        """
        options = transformer_options or {}
        network, pooled = options.get(LOOKED_UP) or (self, y)
        tokens = network.embed(x, timesteps, context, pooled)
        return network.unembed(run_patched(network, tokens, control or {}, options))


def run_patched(
    network: MMDiT, tokens: Tokens, control: Mapping[str, Any], options: Mapping[str, Any]
) -> Tokens:
    """All blocks; patches may replace them, a ControlNet adds to the image after them."""
    x, context = tokens.x, tokens.context
    replacements = options.get("patches_replace", {}).get("dit", {})
    added = control.get("output") or []
    for index in range(network.config.depth):
        arguments = {"img": x, "txt": context, "vec": tokens.c, "transformer_options": options}
        block = partial(run_block, network.joint_blocks[index])
        replace = replacements.get(("double_block", index))
        out = replace(arguments, {"original_block": block}) if replace else block(arguments)
        x, context = out["img"], out["txt"]
        if index < len(added) and added[index] is not None:
            x = x + added[index]
    return Tokens(x, context, tokens.c, tokens.size)


def run_block(block: torch.nn.Module, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """One block by the names that ComfyUI's patches use."""
    attend = partial(attention, arguments.get("transformer_options", {}))
    x, context = block(arguments["img"], arguments["txt"], arguments["vec"], attend)
    return {"img": x, "txt": context}


def attention(
    options: Mapping[str, Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """The attention that ComfyUI was started with; shapes as in models/attention.py."""
    return comfy.ldm.modules.attention.optimized_attention(
        q, k, v, q.shape[1], mask=mask, skip_reshape=True, transformer_options=options
    )


class SD3Config(comfy.supported_models.SD3):
    """ComfyUI's own settings of SD3 (latents, memory estimate), around our network."""

    def get_model(self, state_dict: object, prefix: str = "", device: Any = None) -> "SD3Model":
        return SD3Model(self, device)


class SD3Model(comfy.model_base.SD3):
    """What ComfyUI samples with: conditioning in, x0 out."""

    def __init__(self, model_config: SD3Config, device: Any = None):
        # Not SD3's own constructor, which would build ComfyUI's network.
        comfy.model_base.BaseModel.__init__(
            self,
            model_config,
            comfy.model_base.ModelType.FLOW,
            device=device,
            unet_model=ComfyMMDiT,
        )

    def get_dynamic_vram__units(self) -> tuple[list[Any], list[Any]]:
        """What dynamic VRAM keeps on the card longest and shortest; the name is ComfyUI's.

        By itself it ranks layers by size: the adaLN layers, the largest, would stay although a
        table stands in for them, and others would be carried to the card in every step.
        """
        return [], tabled_layers(self.diffusion_model)

    def _apply_model(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **conditions: Any,
    ) -> Tensor:
        """The network is given its modulations, where a table has them."""
        options = {**(transformer_options or {}), WEIGHTS: weights_in_force(self.current_patcher)}
        dtype, pooled = inference_dtype(self), conditions.get("y")
        options[LOOKED_UP] = looked_up(self, x, t, pooled, dtype, options)
        return super()._apply_model(x, t, c_concat, c_crossattn, control, options, **conditions)


def make_model(component: Component, weight_dtype: str = AUTO, plain: bool = False) -> Any:
    """The MODEL of a checked component.

    plain: a ModelPatcher without dynamic VRAM.  Raises CheckpointError.
    """
    config = read_config(component)
    assert isinstance(config, MMDiTConfig)
    load_device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    precision = mmdit_precision(component, weight_dtype, load_device)
    keep_scaled = is_scaled(component) and weight_dtype == AUTO and quantised_layers()
    settings = SD3Config(
        {"config": config, "depth": config.depth, "in_channels": config.in_channels}
    )
    settings.set_inference_dtype(precision.weights, precision.compute)
    settings.sampling_settings["shift"] = model_preset(component, config).shift
    if keep_scaled:
        settings.quant_config = {"mixed_ops": True}
    model = settings.get_model(None, device=offload_device)
    assign_weights(model.diffusion_model, read_weights(component, precision.weights, keep_scaled))
    model.diffusion_model.requires_grad_(False)
    archive_dtypes(model.diffusion_model)
    patcher = make_patcher(model, load_device, offload_device, plain, static=TabledPatcher)
    patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_DETACH, forget_table)
    watch_runs(patcher)
    return patcher


# VAE


class ComfyVAE(VAE):
    """The core's VAE by the two calls that comfy.sd.VAE makes."""

    owner: Callable[[], Any] = staticmethod(lambda: None)  # weak: the patcher that has this network

    def encode(self, images: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The mean, as ComfyUI takes it; VAE space."""
        return super().encode(images).mean

    def decode(self, latents: Tensor, **ignored: Any) -> Tensor:
        free = free_memory(self.owner(), latents.device)
        return stripes.decode(self, latents, free, cast_norm)[0]


def cast_norm(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of one of ComfyUI's layers, wherever it keeps them."""
    weight, bias = weights_of(norm, like)
    assert bias is not None
    return weight, bias


def vae_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """ComfyUI's attention for VAEs, which cuts itself in slices when memory is short.

    q, k, v: [B, 1, L, C].  Returns [B, L, C].
    """
    attend = comfy.ldm.modules.diffusionmodules.model.vae_attention()
    columns = [t[:, 0].transpose(1, 2)[..., None].contiguous() for t in (q, k, v)]  # [B, C, L, 1]
    return attend(*columns)[..., 0].transpose(1, 2)


class SD3VAE(comfy.sd.VAE):
    """ComfyUI's VAE (batches, tiles, memory estimates) around our network."""

    def __init__(self, component: Component, plain: bool = False):
        """Raises CheckpointError."""
        with without_log("No VAE weights detected"):
            super().__init__(sd={})  # sets what this version of ComfyUI expects
        config = read_config(component)
        assert isinstance(config, VAEConfig)
        self.vae_config = config
        manager = comfy.model_management
        self.device = manager.vae_device()
        self.vae_dtype = manager.vae_dtype(self.device, self.working_dtypes)
        self.output_device = manager.intermediate_device()
        self.latent_channels = config.latent_channels
        self.downscale_ratio = self.upscale_ratio = config.factor
        self.size = None
        del self.memory_used_decode  # ours is the method below
        operations = comfy.ops.pick_operations(self.vae_dtype, self.vae_dtype)
        with torch.device("meta"):
            network = ComfyVAE(config, TypedOps(operations, self.vae_dtype), vae_attention)
        assign_weights(network, read_weights(component, self.vae_dtype, keep_scaled=False))
        self.first_stage_model = network.eval().requires_grad_(False)
        archive_dtypes(self.first_stage_model)
        self.patcher = make_patcher(
            self.first_stage_model, self.device, manager.vae_offload_device(), plain
        )
        network.owner = weakref.ref(self.patcher)

    def memory_used_decode(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, shape: Sequence[int], dtype: torch.dtype
    ) -> int:
        """Bytes beside the weights for one picture, cut as the memory that is free now allows."""
        unloaded = max(0, self.patcher.model_size() - self.patcher.loaded_size())
        free = free_memory(self.patcher, self.device) - unloaded
        how = stripes.cut(self.vae_config, (1, *shape[1:]), dtype, free)
        return stripes.memory_needed(self.vae_config, shape, dtype, how)


@contextmanager
def without_log(text: str) -> Iterator[None]:
    """Keep one line of ComfyUI's out of the log, where it would be read as an error."""

    def passes(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logging.getLogger().addFilter(passes)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(passes)
