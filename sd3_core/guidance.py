"""Guidance: velocities for the samplers, built from a network and what the prompts became.

A builder (`plain`, `classifier_free`) takes a network and returns a `Velocity`, a function of x and
sigma; `inpaint` wraps another.  Which branches run at a step is decided by the noise level alone;
nothing counts steps.

The formulas are usually written for the denoised latent x0 = x - sigma v.  Their weights sum to
one, so they hold for the velocity as they stand.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .conditioning import Conditioning
from .models.mmdit import MMDiT, Tokens
from .samplers import Velocity, on_host
from .schedule import ALWAYS, Schedule, Window, add_noise, per_image


def classifier_free_guidance(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Away from the negative prompt.  Ho and Salimans 2022 (arXiv:2207.12598)."""
    return negative + (positive - negative) * scale


def skip_layer_guidance(guided: Tensor, positive: Tensor, skipped: Tensor, scale: float) -> Tensor:
    """Away from what the network says with some of its blocks left out.

    Stability AI's guidance for SD3.5 Medium, in the manner of perturbed-attention guidance
    (Ahn et al. 2024, arXiv:2403.17377).
    """
    return guided + (positive - skipped) * scale


@dataclass(frozen=True)
class SkipLayers:
    """Which blocks skip-layer guidance leaves out, how strongly and when."""

    layers: tuple[int, ...]
    scale: float
    window: Window = ALWAYS

    def active(self, sigma: float) -> bool:
        return bool(self.layers) and self.scale != 0 and sigma in self.window


@dataclass(frozen=True)
class Branches:
    """Velocities of one x under different conditions; those that did not run are None."""

    positive: Tensor
    negative: Tensor | None = None
    skipped: Tensor | None = None


def plain(model: MMDiT, conditioning: Conditioning) -> Velocity:
    """One prompt, no guidance."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return predict(model, x, on_host(sigma), for_batch(conditioning, x))

    return velocity


def classifier_free(
    model: MMDiT,
    positive: Conditioning,
    negative: Conditioning,
    cfg: float,
    *,
    window: Window = ALWAYS,
    skip: SkipLayers | None = None,
) -> Velocity:
    """Classifier-free guidance, and skip-layer guidance on top of it where asked for.

    positive, negative: of batch 1, or of the batch of x; of any two lengths.
    cfg: guidance scale; at 1 the negative branch does not run.
    window: where cfg holds; elsewhere the positive branch runs alone.
    skip: the positive branch is run again without these blocks, inside skip.window.
    Raises ValueError for a block that the network does not have.
    """
    if skip is not None:
        check_layers(skip.layers, model.config.depth)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = on_host(sigma)
        level = float(sigma[0])
        guide = not math.isclose(cfg, 1.0) and level in window
        run = run_branches(
            model,
            x,
            sigma,
            for_batch(positive, x),
            for_batch(negative, x) if guide else None,
            skip.layers if skip is not None and skip.active(level) else (),
        )
        guided = run.positive
        if run.negative is not None:
            guided = classifier_free_guidance(run.positive, run.negative, cfg)
        if run.skipped is not None and skip is not None:
            guided = skip_layer_guidance(guided, run.positive, run.skipped, skip.scale)
        return guided

    return velocity


def note_on_cfg(cfg: float) -> str:
    """What a guidance scale below 1 means, in a sentence; empty for any other.

    The negative branch then has a say of its own, here and in ComfyUI, where diffusers takes every
    scale up to 1 for no guidance.
    """
    if cfg >= 1 or math.isclose(cfg, 1.0):
        return ""
    meaning = "the prompt does not count, the negative prompt (empty or not) alone is drawn"
    if cfg > 0:
        meaning = "the picture is drawn towards the negative prompt"
    elif cfg < 0:
        meaning = "the picture is drawn away from the prompt"
    return f"cfg is {cfg:g}: {meaning}, as with KSampler. No guidance, diffusers' 0, is cfg 1 here."


def run_branches(
    model: MMDiT,
    x: Tensor,
    sigma: Tensor,
    positive: Conditioning,
    negative: Conditioning | None,
    skip_layers: Sequence[int],
) -> Branches:
    """All branches in as few passes as their lengths allow.

    Prompts of different lengths run one after the other: the network has no mask, so padding would
    be read as words.
    """
    joined = negative is not None and negative.context.shape[1] == positive.context.shape[1]
    conditions = [positive, negative] if joined else [positive]
    outputs = predict_together(model, x, sigma, conditions, skip_layers)
    alone = predict(model, x, sigma, negative) if negative is not None and not joined else None
    return Branches(
        positive=outputs[0],
        negative=outputs[1] if joined else alone,
        skipped=outputs[-1] if skip_layers else None,
    )


def predict_together(
    model: MMDiT,
    x: Tensor,
    sigma: Tensor,
    conditions: Sequence[Conditioning],
    skip_layers: Sequence[int],
) -> tuple[Tensor, ...]:
    """One batch for several conditions of one length.

    Returns a velocity [B, C, H, W] each and, with skip_layers, behind them the first condition's
    without these blocks.
    """
    batch, copies = x.shape[0], len(conditions)
    many = (x.repeat(copies, 1, 1, 1), sigma.repeat(copies), Conditioning.cat(conditions))
    if not skip_layers:
        return predict(model, *many).split(batch)
    return predict_with_skip(model, *many, skip_layers, batch).split(batch)


def predict(model: MMDiT, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
    """The network's velocity, computed in the conditioning's dtype, returned in float32."""
    return model(*network_inputs(x, sigma, conditioning)).float()


def predict_with_skip(
    model: MMDiT,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    skip_layers: Sequence[int],
    batch: int,
) -> Tensor:
    """As `predict`; the first `batch` rows once more, without some blocks, at the end.

    What lies before the first of these blocks is the same in both and computed once; what lies
    behind the last runs as one batch.
    """
    first, last = min(skip_layers), max(skip_layers)
    blocks = range(first, last + 1)
    shared = model.embed(*network_inputs(x, sigma, conditioning))
    shared = model.run_blocks(shared, range(first))
    whole = model.run_blocks(shared, blocks)
    skipped = model.run_blocks(shared.rows(0, batch), (i for i in blocks if i not in skip_layers))
    tokens = model.run_blocks(Tokens.cat([whole, skipped]), range(last + 1, model.config.depth))
    return model.unembed(tokens).float()


def network_inputs(
    x: Tensor, sigma: Tensor, conditioning: Conditioning
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x in the network's dtype, which the conditioning carries; the timestep stays float32."""
    context = conditioning.context
    return x.to(context.dtype), Schedule.timestep(sigma), context, conditioning.pooled


def for_batch(conditioning: Conditioning, x: Tensor) -> Conditioning:
    """One prompt serves every picture of the batch."""
    prompts, pictures = conditioning.context.shape[0], x.shape[0]
    if prompts == pictures:
        return conditioning
    if prompts != 1:
        raise ValueError(
            f"{prompts} prompts for a batch of {pictures} latents; "
            "give one prompt, or one for each latent."
        )
    return conditioning.repeat(pictures)


def check_layers(layers: Sequence[int], depth: int) -> None:
    missing = [layer for layer in layers if not 0 <= layer < depth]
    if missing:
        raise ValueError(
            f"skip layers {missing}: this network has the blocks 0 to {depth - 1}. "
            "Name some of these, or turn skip-layer guidance off."
        )


def inpaint(velocity: Velocity, latents: Tensor, noise: Tensor, mask: Tensor) -> Velocity:
    """Paint where the mask is 1 and keep `latents` where it is 0, as ComfyUI does.

    Before each evaluation the kept part is put back at its noise level, after it the estimate of x0
    is put right there, so a run ends on the kept latents (to float32 rounding).
    latents, noise: [B, C, H, W] in model space, noise the one the run starts from;
    mask: [B or 1, 1, H, W] at latent resolution, see `latent_mask`; values between mix.
    """

    def masked(x: Tensor, sigma: Tensor) -> Tensor:
        level = per_image(sigma, x)
        x_in = mix(x, add_noise(latents, noise, sigma), mask)
        x0 = mix(x_in - level * velocity(x_in, sigma), latents, mask)
        return (x - x0) / level

    return masked


def mix(painted: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
    return painted * mask + kept * (1 - mask)


def latent_mask(mask: Tensor, latents: Tensor) -> Tensor:
    """A mask drawn on pixels [B or 1, H, W], in 0..1, at the resolution of the latents.

    latents: [B, C, H/8, W/8].  Returns [B, 1, H/8, W/8] float32 on the latents' device; bilinear,
    surplus masks dropped and missing ones repeated in turn, as in ComfyUI.
    """
    small = F.interpolate(mask[:, None].float(), size=latents.shape[-2:], mode="bilinear")
    turns = [index % mask.shape[0] for index in range(latents.shape[0])]
    return small[turns].to(latents.device)
