"""A run in parts: what one SD3 Sample leaves to the next, and what it takes up.

ComfyUI hands a latent that still holds noise on as x / (1 - sigma), in VAE space; there and back
rounds.  So the samples also carry, unseen by other nodes, where the run stopped to the last bit: a
run in parts is then the run in one.  Whatever changes the samples makes a new tensor, without it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from comfy.k_diffusion.sampling import default_noise_sampler
from torch import Tensor
from tqdm.auto import tqdm

from ..sd3_core.noise import FreshNoise
from ..sd3_core.samplers import SAMPLERS, Fresh, OnStep, Step
from ..sd3_core.schedule import per_image
from .progress import Callback, step_reporter

MOST_LEVELS = 10_001  # of a schedule, by the node's most steps
PURE_NOISE = 1 - 1e-5  # levels from here on hold nothing of a picture
ATTRIBUTE = "sd3_leftover"


@dataclass(frozen=True)
class Leftover:
    """A run that stopped above level 0; tensors are [B, C, H, W] float32 on the CPU."""

    x: Tensor  # where it stopped, in model space
    sigma: float
    sampler: str
    last: Step | None  # the step that led there, for samplers that look back
    draws: int  # how often noise was added on the way
    noise: Tensor  # what the run began with: a mask puts both back in every step
    image: Tensor


def leave(samples: Tensor, leftover: Leftover | None) -> Tensor:
    if leftover is not None:
        setattr(samples, ATTRIBUTE, leftover)
    return samples


def left_on(samples: Tensor) -> Leftover | None:
    return getattr(samples, ATTRIBUTE, None)


@dataclass
class Passage:
    """One part: where it begins and, once it is walked, where it ended."""

    sampler: str
    begin: Leftover | None = None
    levels: Tensor | None = None  # of all parts
    x: Tensor | None = None
    last: Step | None = None
    draws: int = 0

    def start(self, x: Tensor) -> Tensor:
        """The latent to begin at, instead of the one that ComfyUI has scaled."""
        self.last = None
        return x if self.begin is None else self.begin.x.to(x.device)

    def before(self) -> Step | None:
        """The step before this part, for the same sampler."""
        same = self.begin is not None and self.begin.sampler == self.sampler
        return self.begin.last if self.begin is not None and same else None

    def counted(self, fresh: Fresh, like: Tensor) -> Fresh:
        """The noise that is added on the way, from where the part before stopped."""
        self.draws = 0 if self.begin is None else self.begin.draws
        for _ in range(self.draws):
            fresh(like)

        def draw(x: Tensor) -> Tensor:
            self.draws += 1
            return fresh(x)

        return draw

    def watched(self, on_step: OnStep) -> OnStep:
        def watch(step: Step) -> None:
            self.last = step
            on_step(step)

        return watch

    def leftover(self, sigma: float, noise: Tensor, image: Tensor) -> Leftover | None:
        """What the next part takes up; nothing where the picture is clean or no step was taken.

        noise, image: what this part was started with.
        """
        if self.x is None or self.last is None or not 0 < sigma < 1:
            return None
        last = replace(self.last, x=kept(self.last.x), x0=kept(self.last.x0))
        return Leftover(
            kept(self.x), sigma, self.sampler, last, self.draws, kept(noise), kept(image)
        )


def walk(
    passage: Passage,
    dtype: torch.dtype,
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """One of sd3_core's samplers by the call that comfy.samplers.KSAMPLER makes.

    passage: names the sampler, knows where to begin, and notes where it ended.  disable: no bar in
    the console.
    """
    x = passage.start(x)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - model(x, sigma, **extra_args)) / per_image(sigma, x)

    fresh = passage.counted(fresh_noise(x, extra_args["seed"]), x)
    sampler = SAMPLERS[passage.sampler]
    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:
        on_step = passage.watched(step_reporter(callback, dtype, bar))
        passage.x = sampler(velocity, x, sigmas, on_step, fresh, passage.before())
    return passage.x


def fresh_noise(x: Tensor, seed: int) -> Fresh:
    """The noise that KSampler's samplers add on the way, which on a GPU is drawn there."""
    if x.device.type == "cpu":
        return FreshNoise([seed])  # theirs knows none after the largest seed
    draw_noise = default_noise_sampler(x, seed=seed)
    return lambda x: draw_noise(None, None)


def kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


@dataclass(frozen=True)
class Start:
    """What a part begins with, for ComfyUI's guider, and what is said of it."""

    noise: Tensor
    image: Tensor
    begin: Leftover | None
    how: str  # for the report
    notes: list[str] = field(default_factory=list)


def begun(
    samples: Tensor, sigmas: Tensor, add_noise: bool, draw_noise: Callable[[], Tensor]
) -> Start:
    """samples: of the latent, [B, C, H, W].  Raises ValueError where nothing would be left."""
    first = float(sigmas[0]) if len(sigmas) else 0.0
    found = left_on(samples)
    if add_noise:
        return Start(draw_noise(), samples, None, "noise added", notes_on_added(first, found))
    if first >= PURE_NOISE and len(sigmas) > 1:
        raise ValueError(
            f"add_noise is off and the sigmas start at {first:g}, pure noise, where nothing of the "
            "latent is left. Turn it on, or connect sigmas that start where another sampler "
            "stopped (the second output of SplitSigmas)."
        )
    if found is not None and found.sigma == first:
        return Start(found.noise, found.image, found, "continued exactly")
    notes = []
    if found is not None:
        notes.append(
            f"The latent was left at noise level {found.sigma:.4g}, and the sigmas start at "
            f"{first:.4g}: it was taken as if it had been left there."
        )
    return Start(torch.zeros_like(samples), samples, None, "continued", notes)


def notes_on_added(first: float, found: Leftover | None) -> list[str]:
    if not 0 < first < PURE_NOISE:
        return []
    if found is not None:
        return [
            f"The latent still holds the noise of a run that stopped at {found.sigma:.4g}, and "
            f"fresh noise was mixed in up to {first:.4g}. To go on with that run, turn add_noise "
            "off."
        ]
    return [
        f"The sigmas start at {first:.4g}, below 1: fresh noise was mixed into the latent up to "
        "there, as for image to image. To go on with a latent that another sampler left noisy, "
        "turn add_noise off."
    ]


def ended(sigmas: Tensor, keep_noise: bool) -> tuple[Tensor, list[str]]:
    """The levels that are walked, the last one 0 unless noise is to be left; and what is said."""
    last = float(sigmas[-1]) if len(sigmas) else 0.0
    if last <= 0 or len(sigmas) < 2:
        return sigmas, []
    if keep_noise:
        return sigmas, [
            f"The sigmas end at {last:.4g}: the latent keeps that much noise, for another SD3 "
            "Sample with add_noise off."
        ]
    clean: Any = torch.cat([sigmas[:-1], sigmas.new_zeros(1)])
    return clean, [f"The sigmas end at {last:.4g}: the last step went on to 0."]


def levels_of_all(sigmas: Tensor, add_noise: bool) -> Tensor | None:
    """The noise levels of all parts of a run, where these are one part's; else None.

    SplitSigmas hands out views, behind which all levels still lie.  The modulation table of each
    part has to be that of the whole run: a product's bits depend on how many rows it has.
    """
    if sigmas.ndim != 1 or not len(sigmas) or not sigmas.is_contiguous():
        return None
    if add_noise and float(sigmas[-1]) == 0:  # a whole run, or the end of one that is drawn anew
        return None
    stored = sigmas.untyped_storage().nbytes() // sigmas.element_size()
    if not len(sigmas) < stored <= MOST_LEVELS:
        return None
    whole = sigmas.as_strided((stored,), (1,), 0)
    falls = bool((whole.diff() <= 0).all()) and float(whole[-1]) >= 0
    return whole if falls and float(whole[0]) <= 1.001 else None


def check_levels(sigmas: Tensor, sampler: str) -> list[str]:
    """Notes on levels that are unusual.  Raises ValueError for those that cannot be walked."""
    if sigmas.ndim != 1:
        raise ValueError(f"the sigmas are {list(sigmas.shape)}; expected one row of noise levels.")
    levels = sigmas.tolist()
    if len(levels) < 2:
        return []
    told = ", ".join(f"{level:.4g}" for level in (*levels[:2], levels[-1]))
    if not sigmas.isfinite().all() or min(levels) < 0:
        raise ValueError(f"the sigmas ({told}) hold what is no noise level; expected 1 down to 0.")
    if min(levels[:-1]) == 0:
        where = "start at 0" if levels[0] == 0 else "hold a 0 before their end"
        raise ValueError(
            f"the sigmas {where} ({told}), and from a clean picture no step leads on. FlipSigmas "
            "turns them round: connect them as SD3 Shift Schedule gives them, from noise down to 0."
        )
    if levels[-1] >= 1:
        raise ValueError(
            f"the sigmas end at {levels[-1]:g} ({told}), pure noise, which no LATENT can hold: "
            "ComfyUI divides it by 1 - sigma. FlipSigmas turns them round: connect them as SD3 "
            "Shift Schedule gives them, or let them end below 1 (denoise below 1 before "
            "FlipSigmas)."
        )
    notes = []
    if max(levels) > 1.001:
        notes.append(
            f"The sigmas ({told}) go beyond 1, where the noise of SD3 ends: were they made for "
            "another model?"
        )
    if any(later > earlier for earlier, later in zip(levels[:-1], levels[1:], strict=True)):
        if sampler == "euler_ancestral":
            raise ValueError(
                f"the sigmas rise ({told}), and euler_ancestral walks down only. Take euler, or "
                "leave FlipSigmas out."
            )
        notes.append(f"The sigmas rise ({told}): the run goes from the picture towards noise.")
    return notes
