"""The other implementations, imported by name and only here, from where the user has them.

Nothing of this package depends on them.
"""

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..models.mmdit import MMDiTConfig
from ..models.vae import VAEConfig, to_model_space
from . import training
from .arm import MMDIT_PREFIX, VAE_PREFIX, Inputs, Work, conditions, stored
from .cases import CFG, Case, cut_blocks

PACK = Path(__file__).resolve().parent.parent.parent
PACK_NAME = "sd3_workbench_in_bench"
SPARE_GIB = 0.6  # of a capped device, for what CUDA itself holds in the process


class Diffusers:
    """backend: of torch.compile, for each block; empty: eager.  offload: layer by layer."""

    def __init__(self, device: torch.device, backend: str = "", offload: bool = False):
        self.backend, self.offload = backend, offload
        self.diffusers: Any = import_module("diffusers")
        self.diffusers.utils.logging.disable_progress_bar()
        self.device = device

    def load(self, case: Case, file: Path) -> Mapping[str, Tensor]:
        return self._denoiser(file, getattr(torch, case.dtype)).state_dict()

    def prepare(self, case: Case, file: Path) -> Work:
        if case.work == "decode":
            vae = self.diffusers.AutoencoderKL.from_single_file(
                str(file), config=str(file.with_suffix(".config")), subfolder="vae"
            )
            vae = vae.to(self.device, getattr(torch, case.dtype)).eval()
            return lambda given: vae.decode(given["x"].to(vae.dtype)).sample
        model = self._denoiser(file, getattr(torch, case.dtype))
        if case.work == "train":
            return training.Diffusers(case, model)
        if case.work == "sample":
            return self._sampling(model)
        return lambda given: model(
            given["x"], given["context"], given["pooled"], given["timestep"], return_dict=False
        )[0]

    def _denoiser(self, file: Path, dtype: torch.dtype) -> Any:
        model = self.diffusers.SD3Transformer2DModel.from_single_file(
            str(file),
            config=str(file.with_suffix(".config")),
            subfolder="transformer",
            torch_dtype=dtype,
        )
        if self.backend:
            for block in model.transformer_blocks:
                block.compile(backend=self.backend, dynamic=False)
        return model.to("cpu" if self._carries() else self.device).eval()

    def _carries(self) -> bool:
        return self.offload and self.device.type == "cuda"

    def release(self) -> None:
        pass

    def _sampling(self, model: Any) -> Work:
        encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
        tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
        pipeline = self.diffusers.StableDiffusion3Pipeline(
            transformer=model,
            scheduler=self.diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=None,
            **dict.fromkeys((*encoders, *tokenizers)),
        )
        pipeline.set_progress_bar_config(disable=True)
        if self._carries():
            pipeline.enable_sequential_cpu_offload(device=self.device)

        def sample(given: Inputs) -> Tensor:
            x = given["x"]
            positive, negative = (part.to(x.device, model.dtype) for part in conditions(given))
            batch = x.shape[0]
            return pipeline(
                height=x.shape[2] * 8,
                width=x.shape[3] * 8,
                sigmas=given["sigmas"][:-1].tolist(),
                num_inference_steps=len(given["sigmas"]) - 1,
                guidance_scale=CFG,
                latents=x,
                prompt_embeds=positive.repeat(batch).context,
                pooled_prompt_embeds=positive.repeat(batch).pooled,
                negative_prompt_embeds=negative.repeat(batch).context,
                negative_pooled_prompt_embeds=negative.repeat(batch).pooled,
                output_type="latent",
                return_dict=False,
            )[0]

        return sample


class ComfyUI:
    """sdpa: with --use-pytorch-cross-attention, instead of the attention it takes by itself.

    memory_gb: of the device, the rest is reserved as by --reserve-vram; 0: all of it.
    """

    def __init__(
        self, checkout: Path, device: torch.device, sdpa: bool = False, memory_gb: float = 0.0
    ):
        sys.path.insert(0, str(checkout))
        sys.argv = sys.argv[:1]
        arguments = import_module("comfy.cli_args").args
        arguments.cpu = device.type == "cpu"  # all of these before anything else of ComfyUI loads
        arguments.use_pytorch_cross_attention = sdpa
        if memory_gb and device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            arguments.reserve_vram = max(0.0, (total - memory_gb * 1e9) / 2**30) + SPARE_GIB
        self.comfy = {
            name: import_module(f"comfy.{name}")
            for name in ("model_management", "ops", "sample", "samplers", "sd", "utils")
        }
        self.device = device

    def load(self, case: Case, file: Path) -> Mapping[str, Tensor]:
        return self._patcher(file, getattr(torch, case.dtype)).model.diffusion_model.state_dict()

    def prepare(self, case: Case, file: Path) -> Work:
        if case.work == "decode":
            state = self.comfy["utils"].load_torch_file(str(file))
            prefixed = {key.removeprefix(VAE_PREFIX): value for key, value in state.items()}
            dtype = getattr(torch, case.dtype)
            vae = self.comfy["sd"].VAE(sd=prefixed, dtype=dtype)
            self.comfy["model_management"].load_models_gpu([vae.patcher])
            return lambda given: vae.first_stage_model.decode(given["x"].to(dtype))
        if case.blocks:
            return self._forward(self._cut(case, file))
        patcher = self._patcher(file, getattr(torch, case.dtype))
        if case.work == "train":
            return training.ComfyUI(case, patcher)
        if case.work == "sample":
            return lambda given: self._sample(patcher, given)
        return self._forward(patcher.model.diffusion_model)

    def release(self) -> None:
        self.comfy["model_management"].unload_all_models()
        self.comfy["model_management"].soft_empty_cache()

    def _patcher(self, file: Path, dtype: torch.dtype) -> Any:
        patcher = self._model(file, dtype)
        self.comfy["model_management"].load_models_gpu([patcher])
        return patcher

    def _model(self, file: Path, dtype: torch.dtype) -> Any:
        return self.comfy["sd"].load_diffusion_model(str(file), model_options={"dtype": dtype})

    def _cut(self, case: Case, file: Path) -> Any:
        """A network of some blocks only: ComfyUI's loader takes their number from the width."""
        assert isinstance(case.network, MMDiTConfig)
        size = case.network
        module = import_module("comfy.ldm.modules.diffusionmodules.mmdit")
        model = module.OpenAISignatureMMDITWrapper(
            input_size=None,
            patch_size=size.patch_size,
            in_channels=size.in_channels,
            depth=size.depth,
            num_blocks=case.blocks,
            **reference_sizes(size),
            dtype=torch.float32,
            device=self.device,
            operations=self.comfy["ops"].disable_weight_init,
        )
        model.load_state_dict(stored(file, MMDIT_PREFIX, self.device))
        return model.eval()

    def _forward(self, model: Any) -> Work:
        return lambda given: model(
            given["x"], given["timestep"], context=given["context"], y=given["pooled"]
        )

    def _sample(self, patcher: Any, given: Inputs) -> Tensor:
        positive, negative = (
            [[part.context, {"pooled_output": part.pooled}]] for part in conditions(given)
        )
        latents = self.comfy["sample"].sample_custom(
            patcher,
            given["x"],
            CFG,
            self.comfy["samplers"].sampler_object("euler"),
            given["sigmas"],
            positive,
            negative,
            torch.zeros_like(given["x"]),
            disable_pbar=True,
            seed=0,
        )
        return to_model_space(latents)


class OursInComfyUI(ComfyUI):
    """The MODEL of our loaders under ComfyUI's sampler and memory manager."""

    def __init__(
        self, checkout: Path, device: torch.device, sdpa: bool = False, memory_gb: float = 0.0
    ):
        super().__init__(checkout, device, sdpa, memory_gb)
        for name, folder in ((PACK_NAME, PACK), (f"{PACK_NAME}.nodes", PACK / "nodes")):
            package = ModuleType(name)  # the modules of the pack without the nodes themselves
            package.__path__ = [str(folder)]
            sys.modules[name] = package
        self.adapter = import_module(f"{PACK_NAME}.nodes.comfy_model")
        self.loading = import_module(f"{PACK_NAME}.sd3_core.checkpoints.load")

    def prepare(self, case: Case, file: Path) -> Work:
        if case.work != "sample":
            raise NotImplementedError("it is measured by sampling")
        return super().prepare(case, file)

    def _model(self, file: Path, dtype: torch.dtype) -> Any:
        wanted = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        return self.adapter.make_model(self.loading.component_of(file, "mmdit"), wanted)


class Reference:
    """Stability's sd3.5 code."""

    def __init__(self, folder: Path, device: torch.device):
        sys.path.insert(0, str(folder))
        self.mmditx = import_module("mmditx")
        self.impls = import_module("sd3_impls")
        self.device = device

    def release(self) -> None:
        pass

    def load(self, case: Case, file: Path) -> Mapping[str, Tensor]:
        raise NotImplementedError("its loader is part of its command line")

    def prepare(self, case: Case, file: Path) -> Work:
        if case.work == "decode":
            assert isinstance(case.network, VAEConfig)
            narrow = case.network.channels[0]
            decoder = self.impls.VAEDecoder(
                ch=narrow,
                ch_mult=tuple(width // narrow for width in case.network.channels),
                num_res_blocks=case.network.blocks_per_level,
                z_channels=case.network.latent_channels,
            )
            decoder.load_state_dict(stored(file, f"{VAE_PREFIX}decoder.", self.device))
            decoder = decoder.to(self.device).eval()
            return lambda given: decoder(given["x"])
        if case.work == "train":
            raise NotImplementedError("it has no trainer")
        model = self._denoiser(case, file)
        if case.work == "sample":
            return lambda given: self._sample(model, given)
        return lambda given: model(
            given["x"], given["timestep"], y=given["pooled"], context=given["context"]
        )

    def _denoiser(self, case: Case, file: Path) -> Any:
        assert isinstance(case.network, MMDiTConfig)
        size = case.network
        with torch.device("meta"):
            model = self.mmditx.MMDiTX(
                input_size=None,
                patch_size=size.patch_size,
                in_channels=size.in_channels,
                depth=size.depth,
                **reference_sizes(size),
                dtype=torch.float32,
            )
        cut_blocks(model, case)
        model.load_state_dict(stored(file, MMDIT_PREFIX, self.device), assign=True)
        return model.eval()

    def _sample(self, model: Any, given: Inputs) -> Tensor:
        flow = self.impls.ModelSamplingDiscreteFlow(shift=1.0)

        def denoised(x: Tensor, sigma: Tensor, c_crossattn: Tensor, y: Tensor) -> Tensor:
            velocity = model(x, flow.timestep(sigma), context=c_crossattn, y=y)
            return flow.calculate_denoised(sigma, velocity, x)

        positive, negative = (
            {"c_crossattn": part.context, "y": part.pooled}
            for part in (condition.repeat(given["x"].shape[0]) for condition in conditions(given))
        )
        return self.impls.sample_euler(
            self.impls.CFGDenoiser(SimpleNamespace(apply_model=denoised)),
            given["x"],
            given["sigmas"].to(self.device),
            {"cond": positive, "uncond": negative, "cond_scale": CFG},
        )


def reference_sizes(size: MMDiTConfig) -> dict[str, Any]:
    """The sizes of a network as Stability's class and ComfyUI's descendant of it are told them."""
    return {
        "num_patches": size.pos_embed_max_size**2,
        "pos_embed_max_size": size.pos_embed_max_size,
        "adm_in_channels": size.pooled_dim,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": size.context_dim, "out_features": size.hidden_size},
        },
        "qk_norm": "rms" if size.qk_norm else None,
        "x_block_self_attn_layers": list(size.dual_attention_layers),
    }
