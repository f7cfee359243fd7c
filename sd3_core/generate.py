"""Prompt -> picture, from the files on disk to the pixels.  Read this first.

`generate(files, settings)` is the whole of text-to-image, image-to-image and inpainting; each line
of it is a module of this package.  What a stage takes from disk leaves memory before the next one
begins: text encoders, then MMDiT, then VAE.
"""

import hashlib
import json
import platform
import warnings
from collections.abc import Callable, MutableMapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .checkpoints.header import fingerprint, read_header
from .checkpoints.load import load_clip, load_mmdit, load_vae
from .checkpoints.lora_files import lora_path
from .checkpoints.tensors import read_bytes
from .conditioning import Conditioning
from .guidance import classifier_free, inpaint, latent_mask
from .lora import merge_all
from .memory import explained, free_memory
from .models.clip import CLIPTextModel
from .models.mmdit import MMDiT
from .models.t5 import T5Encoder
from .models.vae import VAE, to_model_space, to_vae_space
from .noise import FreshNoise, noise, noise_per_image
from .pictures import read_image, read_mask, to_levels, to_uint8
from .precision import CLIP_DTYPE, check_finite, dtype_name, processor_name
from .reading import LARGEST_PICTURE, read_regular
from .samplers import SAMPLERS, OnStep, Step
from .schedule import ALWAYS, Schedule, add_noise
from .settings import Files, Plan, Settings, chosen_paths, make_plan
from .speed import launch, stripes
from .speed.attention import measured_attention
from .speed.fp8 import in_float8
from .speed.gains import Gain, asked, fused_kernels
from .speed.modulation import PreparedMMDiT, is_seldom_used
from .speed.step_cache import StepCache, cached, relative_rms
from .speed.streaming import load_t5_to_fit
from .text.encoders import ENCODERS, RELEASED_WINDOW, EncodedPrompt, TextEncoders
from .text.vocabularies import find_tokenizers, pack_tokenizers

FORMAT = 1  # of the record in a PNG; another number says that older programs cannot read it

Network = TypeVar("Network", bound=nn.Module)
KnownPrompts = MutableMapping[str, Conditioning]  # by a hash; see TextEncoders


@dataclass(frozen=True)
class Result:
    pixels: Tensor  # uint8 [B, H, W, 3]
    record: dict[str, Any]  # settings, files and surroundings, as stored in the PNG
    tokens: dict[str, int]  # how much of the prompt each encoder saw
    notes: tuple[str, ...]  # what a user may not expect, in sentences
    gains: tuple[Gain, ...]  # what made the run faster or smaller, and what did not
    distance: float | None = None  # of the latents from those of a run without approximations


def generate(
    files: Files,
    settings: Settings,
    on_step: OnStep | None = None,
    known: KnownPrompts | None = None,
    way: str = "plain",
    measure: bool = False,
) -> Result:
    """Draw a batch of pictures.

    on_step is called after each sampling step; what it raises stops the run.  known: prompts
    encoded before, to look up and add to; see speed/prompts.py.  way: how the joint blocks are
    started, see speed/launch.py.  measure: sample once more without what only approximates (step
    cache, fp8, a part of the run without cfg), for the distance.
    Raises CheckpointError for files and ValueError for settings, both before any weight is read,
    and NumericalError when a stage overflows.
    """
    with torch.inference_mode(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        plan = make_plan(files, settings)
        launch.check(way, plan.device)
        record = make_record(files, plan)
        with explained("encoding the prompts", *advice(plan, "fewer text encoders")):
            positive, negative = encode_prompts(files, plan, known)
        with explained("reading the picture to start from", *advice(plan)):
            start = start_latents(plan)
        cache = step_cache(plan)
        distance = None
        with explained("sampling", *advice(plan, "fp8")):
            x0 = sample(plan, positive, negative, start, on_step, way, cache)
            if measure:
                plain = sample(without_approximations(plan), positive, negative, start, on_step)
                distance = relative_rms(x0, plain)
        with explained("decoding", *advice(plan)):
            images, how = decoded(plan, x0)
        pixels = keep_masked(to_uint8(images), plan)
    said = (str(warning.message) for warning in warned if warning.category is UserWarning)
    about_negative = (
        f"negative prompt: {note}" for note in negative.notes if note not in positive.notes
    )
    notes = dict.fromkeys((*said, *positive.notes, *about_negative))
    gains = gains_of(plan, cache, known, way, how)
    return Result(pixels, record, positive.tokens, tuple(notes), gains, distance)


def advice(plan: Plan, *first: str) -> list[str]:
    """What may help where the memory is full, by the settings' names."""
    fp8_serves = plan.device.type == "cuda" and not plan.settings.fp8
    return [
        *(setting for setting in first if setting != "fp8" or fp8_serves),
        *(["a smaller batch"] if plan.settings.batch > 1 else []),
        "a smaller width and height",
        *(["device cpu"] if plan.device.type != "cpu" else []),
        "closing other programs",
    ]


def encode_prompts(
    files: Files, plan: Plan, known: KnownPrompts | None = None
) -> tuple[EncodedPrompt, EncodedPrompt]:
    """The prompt and the negative prompt; the encoders are gone when this returns."""
    return encode_with(text_encoders(files, plan, known), plan.settings)


def encode_with(encoders: TextEncoders, wanted: Settings) -> tuple[EncodedPrompt, EncodedPrompt]:
    """The prompt and the negative prompt, with encoders that are there already."""
    positive = encoders.encode(
        wanted.prompt,
        prompt_clip_g=wanted.prompt_clip_g,
        prompt_t5=wanted.prompt_t5,
        use=wanted.use,
        t5_length=wanted.t5_length,
    )
    negative = encoders.encode(wanted.negative, use=wanted.use, t5_length=wanted.t5_length)
    return positive, negative


def text_encoders(
    files: Files,
    plan: Plan,
    known: KnownPrompts | None = None,
    say: Callable[[str], object] = warnings.warn,
) -> TextEncoders:
    """The encoders there are, each read from disk when it is first needed.

    say: receives what a user may not expect of how they are loaded.
    """
    changed = any(kind in lora.parts for lora, _ in plan.loras for kind in ENCODERS)
    parts = plan.parts
    folder = files.checkpoint if files.checkpoint and files.checkpoint.is_dir() else None
    tokenizers = find_tokenizers(
        [name for name in ENCODERS if name in parts and name in plan.settings.use],
        directory=files.tokenizers,
        checkpoint=stored_files(files.checkpoint),
        diffusers=folder,
    )

    def clip(kind: str) -> Callable[[], CLIPTextModel] | None:
        if kind not in parts:
            return None
        return lambda: with_loras(
            load_clip(parts[kind], kind, dtype=CLIP_DTYPE, device=plan.device), kind, plan
        )

    def t5() -> T5Encoder:
        return load_t5_to_fit(
            parts["t5"], plan.wide_dtype, plan.device, say, lambda t5: with_loras(t5, "t5", plan)
        )

    return TextEncoders(
        tokenizers,
        context_dim=plan.mmdit.context_dim,
        pooled_dim=plan.mmdit.pooled_dim,
        clip_l=clip("clip_l"),
        clip_g=clip("clip_g"),
        t5=t5 if "t5" in parts else None,
        window=plan.clip_windows or RELEASED_WINDOW,
        known=None if changed else known,
        identity="" if changed or known is None else encoder_identity(plan),
    )


def encoder_identity(plan: Plan) -> str:
    """What decides, beside the tokens, what the text encoders make of them."""
    files = {kind: fingerprint(plan.parts[kind].file) for kind in ENCODERS if kind in plan.parts}
    dtypes = [dtype_name(CLIP_DTYPE), dtype_name(plan.wide_dtype)]
    return json.dumps([files, dtypes, plan.device.type])


def with_loras(network: Network, kind: str, plan: Plan) -> Network:
    """The network itself, with the plan's LoRAs merged into its weights (never into the file)."""
    merge_all(network, [(x.parts[kind], strength) for x, strength in plan.loras if kind in x.parts])
    return network


def stored_files(checkpoint: Path | None) -> dict[str, Callable[[], bytes]] | None:
    """The files that a checkpoint carries as bytes (tokenizers): name -> reader."""
    if checkpoint is None or checkpoint.suffix != ".safetensors":
        return None
    header = read_header(checkpoint)
    return {
        name: lambda name=name: read_bytes(header, name)
        for name, info in header.tensors.items()
        if info.dtype == torch.uint8
    }


def stored_tokenizers(files: Files) -> dict[str, Tensor]:
    """The tokenizers of these files, as tensors for a checkpoint; see pack_tokenizers."""
    if files.tokenizers is not None:
        return pack_tokenizers(files.tokenizers)
    return {
        name: torch.frombuffer(bytearray(read()), dtype=torch.uint8)
        for name, read in (stored_files(files.checkpoint) or {}).items()
        if ".tokenizer." in name
    }


def start_latents(plan: Plan) -> Tensor:
    """The picture to start from, [B, C, H/8, W/8] in model space; zeros for text-to-image."""
    if plan.settings.init is None:
        return torch.zeros(plan.latent_shape, device=plan.device)
    image = read_image(plan.settings.init, plan.fit)
    vae = half_of_vae(plan, "encoder")
    mean = vae.encode(image.to(plan.device, plan.wide_dtype)).mean.float()
    check_finite(mean, "the VAE's encoder", plan.wide_dtype)
    return to_model_space(mean).expand(plan.latent_shape)


def sample(
    plan: Plan,
    positive: EncodedPrompt,
    negative: EncodedPrompt,
    start: Tensor,
    on_step: OnStep | None = None,
    way: str = "plain",
    cache: StepCache | None = None,
) -> Tensor:
    """From noise to the clean latents, in model space; the MMDiT is gone when this returns.

    cache: see step_cache.
    """
    prompts = positive.conditioning, negative.conditioning
    return sample_with(denoiser(plan), plan, *prompts, start, on_step, way, cache)


def denoiser(plan: Plan) -> MMDiT:
    """The MMDiT with the plan's LoRAs, in the precision that was asked for."""
    model = load_mmdit(
        plan.parts["mmdit"],
        dtype=plan.dtype,
        device=plan.device,
        attention=measured_attention,
        left=is_seldom_used,
    )
    model = with_loras(model, "mmdit", plan)
    if plan.settings.fp8:
        model.joint_blocks = in_float8(model.joint_blocks)
    return model


def sample_with(
    model: MMDiT,
    plan: Plan,
    positive: Conditioning,
    negative: Conditioning,
    start: Tensor,
    on_step: OnStep | None = None,
    way: str = "plain",
    cache: StepCache | None = None,
) -> Tensor:
    """As `sample`, with a network that is loaded already, in the precision that it has."""
    wanted = plan.settings
    model = PreparedMMDiT(model, Schedule.timestep(plan.sigmas[:-1]), plan.device, plan.dtype)
    launch.launch(model, way, plan.device)
    velocity = classifier_free(
        model,
        model.prepare(positive.to(plan.device, plan.dtype)),
        model.prepare(negative.to(plan.device, plan.dtype)),
        plan.cfg,
        window=plan.cfg_window,
        skip=plan.skip,
    )
    if cache is not None:
        velocity = cached(velocity, cache)
    start_noise = starting_noise(plan).to(plan.device)
    if wanted.mask is not None and plan.fit is not None:
        mask = latent_mask(read_mask(wanted.mask, plan.fit), start)
        velocity = inpaint(velocity, start, start_noise, mask)
    x = add_noise(start, start_noise, plan.sigmas[:1])
    fresh = FreshNoise(seeds_of(plan))
    x0 = SAMPLERS[plan.sampler](velocity, x, plan.sigmas, watched(on_step, plan.dtype), fresh)
    return check_finite(x0, "the MMDiT", plan.dtype)


def half_of_vae(plan: Plan, half: str) -> VAE:
    """The VAE whose encoder or decoder will do; the other half stays in its file, unread."""
    return load_vae(
        plan.parts["vae"],
        dtype=plan.wide_dtype,
        device=plan.device,
        left=lambda name: not name.startswith(f"{half}."),
    )


def step_cache(plan: Plan) -> StepCache | None:
    """For one run; None where none is asked for."""
    if not plan.settings.step_cache:
        return None
    windows = [plan.cfg_window] + ([plan.skip.window] if plan.skip else [])
    return StepCache(plan.settings.step_cache, windows)


def without_approximations(plan: Plan) -> Plan:
    """The same run with what is lossless alone."""
    return replace(
        plan,
        settings=replace(plan.settings, step_cache=0.0, fp8=False),
        cfg_window=ALWAYS,
    )


def gains_of(
    plan: Plan,
    cache: StepCache | None,
    known: KnownPrompts | None,
    way: str,
    how: stripes.Cut | None,
) -> tuple[Gain, ...]:
    """What acted in a run that is done.  how: its pictures were decoded."""
    guided = [float(sigma) in plan.cfg_window for sigma in plan.sigmas[:-1]]
    encoders_changed = any(kind in lora.parts for lora, _ in plan.loras for kind in ENCODERS)
    prompts = "off" if known is None else "a LoRA changes the encoders" if encoders_changed else ""
    return (
        Gain("modulation table", True),
        Gain("prompt cache", prompts == "", prompts),
        fused_kernels(plan.device),
        Gain("decoding in stripes", how is not None, "" if how else "the memory holds the whole"),
        asked(
            "guidance interval",
            not all(guided),
            f"cfg in {sum(guided)} of {len(guided)} steps",
        ),
        asked("step cache", cache is not None, cache.sentence() if cache else ""),
        asked("fp8", plan.settings.fp8),
        asked("launch", way != "plain", way),
    )


def starting_noise(plan: Plan) -> Tensor:
    if not plan.settings.seed_each:
        return noise(plan.latent_shape, plan.settings.seed)
    return noise_per_image(plan.latent_shape, seeds_of(plan))


def seeds_of(plan: Plan) -> list[int]:
    """One for each picture that has its own, else one for the batch."""
    pictures = plan.latent_shape[0] if plan.settings.seed_each else 1
    return [plan.settings.seed + index for index in range(pictures)]


def watched(on_step: OnStep | None, dtype: torch.dtype) -> OnStep:
    """on_step after a look at the first step: an overflow shows there, not only after the last."""

    def watch(step: Step) -> None:
        if step.index == 0:
            check_finite(step.x0, "the MMDiT's first step", dtype)
        if on_step is not None:
            on_step(step)

    return watch


def decode(plan: Plan, x0: Tensor) -> Tensor:
    """Latents in model space -> images [B, 3, H, W] in -1..1; one at a time, to save memory."""
    return decoded(plan, x0)[0]


def decoded(plan: Plan, x0: Tensor) -> tuple[Tensor, stripes.Cut | None]:
    """As `decode`, and how the last picture was cut; None: it was decoded whole."""
    vae = half_of_vae(plan, "decoder")
    images, how = [], None
    for latent in to_vae_space(x0).to(plan.wide_dtype):
        image, how = stripes.decode(vae, latent[None], free_memory(plan.device))
        images.append(image.float())
    return check_finite(torch.cat(images), "the VAE's decoder", plan.wide_dtype), how


def keep_masked(pixels: Tensor, plan: Plan) -> Tensor:
    """uint8 [B, H, W, 3] with the picture's own pixels where the mask keeps them."""
    if plan.settings.init is None or plan.settings.mask is None or plan.fit is None:
        return pixels
    original = to_levels(read_image(plan.settings.init, plan.fit))
    mask = read_mask(plan.settings.mask, plan.fit)[..., None]
    return (pixels * mask + original * (1 - mask)).round().to(torch.uint8)


def make_record(files: Files, plan: Plan) -> dict[str, Any]:
    """All it takes to draw the same pictures again, as JSON; see verify.py."""
    fingerprints = {kind: fingerprint(part.file) for kind, part in plan.parts.items()}
    for index, ((path, _), (lora, _)) in enumerate(zip(files.loras, plan.loras, strict=True)):
        fingerprints[f"lora {index + 1}"] = fingerprint(lora_path(path))
        if lora.settings is not None:
            fingerprints[f"lora {index + 1} {lora.settings.name}"] = _digest(lora.settings)
    for name in ("init", "mask"):
        path = getattr(plan.settings, name)
        if path is not None:
            fingerprints[name] = _digest(path)
    return {
        "format": FORMAT,
        "settings": _as_json(asdict(replace(plan.settings, dtype=dtype_name(plan.dtype)))),
        "files": _as_json(chosen_paths(files)),
        "loras": [[path.as_posix(), strength] for path, strength in files.loras],
        "fingerprints": fingerprints,
        "surroundings": {
            "torch": str(torch.__version__),
            "device": plan.device.type,
            "processor": processor_name(plan.device),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        },
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(read_regular(path, LARGEST_PICTURE)).hexdigest()[:16]


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.as_posix() if isinstance(value, Path) else value for key, value in values.items()
    }
