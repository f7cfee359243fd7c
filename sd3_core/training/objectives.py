"""Objectives: what the network is asked for at a random time, and how its answers make a picture.

The paper's rectified flow, and the diffusion baselines it was compared with, on one protocol:
    draw(u)      uniform numbers -> times t: 0 is data, 1 is noise
    ask(...)     data and noise -> what the network is shown, and what it should answer
    loss(...)    its squared error: one number per sample, to be averaged by the caller
    sample(...)  noise -> x0, deterministic
All of it is float32 and knows of a network only `predict(x, timestep) -> output`.  No random
numbers, no gradient switches: both are the caller's.

The losses of different objectives cannot be compared with each other, only their pictures.

Esser et al. 2024 (arXiv:2403.03206), sections 2 and 3.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import quoted
from ..samplers import OnStep, euler, report
from ..schedule import ALWAYS, Schedule, Window, add_noise, per_image, shifted
from .densities import Density, LogitNormal, Truncated, Uniform, read_call
from .paths import CosinePath, LinearPath, Path, karras_levels

# (x [B, C, H, W], timestep [B] in 0 ... 1000) -> what the objective asks for, like x.  Guidance
# goes in here: each output is affine in x0, so branches may be mixed with weights that sum to 1.
Predict = Callable[[Tensor, Tensor], Tensor]

LossSpace = Literal["velocity", "x0", "eps"]


@dataclass(frozen=True)
class Question:
    """What the network is shown, and what it should answer."""

    x: Tensor  # [B, C, H, W], float32
    timestep: Tensor  # [B] in 0 ... 1000
    target: Tensor  # like x
    weight: Tensor | float = 1.0  # [B], of the squared error

    def loss(self, predict: Predict, mask: Tensor | None = None) -> Tensor:
        """Squared error of the network's answer, per sample: [B], float32."""
        answer = predict(self.x, self.timestep).float()
        return self.weight * masked_mean((answer - self.target) ** 2, mask)


class Objective(ABC):
    """What can be trained and sampled from."""

    @abstractmethod
    def draw(self, u: Tensor) -> Tensor:
        """The times of a batch: u [B] uniform in [0, 1] -> t [B] in [0, 1], float32."""

    @abstractmethod
    def ask(self, x0: Tensor, noise: Tensor, t: Tensor) -> Question:
        """x0, noise: [B, C, H, W]; t: [B] in [0, 1], ends included."""

    def loss(
        self, predict: Predict, x0: Tensor, noise: Tensor, t: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Squared error of the network's answer, per sample: [B], float32.

        As `ask`; mask: [B or 1, 1, H, W], see `masked_mean`.
        """
        return self.ask(x0, noise, t).loss(predict, mask)

    @abstractmethod
    def sample(
        self, predict: Predict, noise: Tensor, steps: int, on_step: OnStep | None = None
    ) -> Tensor:
        """The picture that this noise becomes: [B, C, H, W] -> x0 [B, C, H, W], float32.

        noise: standard normal, not scaled.  Raises ValueError for steps below 1.
        """


def masked_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over channels and pixels, weighted by the mask: [B, C, H, W] -> [B].

    mask: [B or 1, 1, H, W], not negative.  It is divided by its own sum, so a small object weighs
    as much as a large one and a constant mask changes nothing; an empty mask gives 0.
    """
    per_pixel = error.mean(dim=1, keepdim=True)
    if mask is None:
        return per_pixel.flatten(1).mean(dim=1)
    weights = mask.to(error.device, torch.float32).expand_as(per_pixel)
    total = weights.flatten(1).sum(dim=1)
    weighted = (weights * per_pixel).flatten(1).sum(dim=1)
    return weighted / torch.where(total > 0, total, 1.0)


@dataclass(frozen=True)
class RectifiedFlow(Objective):
    """The straight path from data to noise, and its constant velocity: SD3's own objective.

    z_t = (1 - t) x0 + t noise, of which the network predicts the velocity, noise - x0.
    Esser et al. 2024, section 3, "Rectified Flow".

    schedule: the shift, the same as in sampling.  The times that `draw` returns are shifted: they
        are noise levels (sigma).
    loss_space: what the squared error is taken of.  The network predicts the velocity in any case;
        x0 and eps weigh its error with t^2 and (1 - t)^2.  velocity is the paper's.
    window: noise levels that are trained, after the shift; what lies outside is never drawn.
    """

    density: Density = field(default_factory=LogitNormal)
    schedule: Schedule = field(default_factory=Schedule)
    loss_space: LossSpace = "velocity"
    window: Window = ALWAYS

    def __post_init__(self):
        if self.loss_space not in get_args(LossSpace):
            raise ValueError(
                f"loss_space is {quoted(self.loss_space)}; choose velocity (the paper's), x0 or "
                "eps."
            )
        if not (
            self.window.low < self.window.high and self.window.low < 1 and self.window.high > 0
        ):
            raise ValueError(
                f"noise levels from {self.window.low} to {self.window.high}: the range must rise "
                "and lie between 0 (data) and 1 (noise)."
            )
        self.visited()  # a window that is hardly ever drawn is refused here, not at the first batch

    def draw(self, u: Tensor) -> Tensor:
        """Noise levels [B]; float32 rounds the very last ones to 1, where nothing breaks."""
        return self.schedule.sigma(self.visited().sample(u))

    def visited(self) -> Density:
        """The density, held to the window."""
        if self.window == ALWAYS:
            return self.density
        unshift = 1 / self.schedule.shift
        low = shifted(max(self.window.low, 0.0), unshift)
        high = shifted(min(self.window.high, 1.0), unshift)
        return Truncated(self.density, low, min(high, 1.0))  # rounding may put it a hair above

    def pdf(self, sigma: Tensor) -> Tensor:
        """Probability density of the noise levels that `draw` gives: float64, sigma in [0, 1]."""
        shift = self.schedule.shift
        t = shifted(sigma.double(), 1 / shift)
        slope = shift / (1 + (shift - 1) * t) ** 2  # d sigma / d t
        return self.visited().pdf(t) / slope

    def ask(self, x0: Tensor, noise: Tensor, t: Tensor) -> Question:
        """w_t = t / (1 - t) in the paper's terms, which is weight 1 on the velocity."""
        t = t.to(x0.device, torch.float32)
        velocity = noise.float() - x0.float()
        return Question(
            add_noise(x0, noise, t), self.schedule.timestep(t), velocity, self.weight(t)
        )

    def weight(self, t: Tensor) -> Tensor:
        """Of the velocity's squared error: x0 = z - t v and eps = z + (1 - t) v."""
        if self.loss_space == "x0":
            return t**2
        return (1 - t) ** 2 if self.loss_space == "eps" else torch.ones_like(t)

    def sample(
        self, predict: Predict, noise: Tensor, steps: int, on_step: OnStep | None = None
    ) -> Tensor:
        """Euler on the schedule of the released models."""

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return predict(x, self.schedule.timestep(sigma))

        return euler(velocity, noise, self.schedule.sigmas(steps), on_step)


@dataclass(frozen=True)
class Ends:
    """The two ends of a path, as they look from a point on it: [B, C, H, W] each."""

    x0: Tensor
    noise: Tensor


@dataclass(frozen=True)
class VariancePreserving(Objective):
    """Diffusion on a variance-preserving path, uniform in time: the baselines eps and v.

    predicts: "eps", the noise (Ho et al. 2020, arXiv:2006.11239, equation 14), or "v", which is
        a noise - b x0 (Salimans and Ho 2022, arXiv:2202.00512, appendix D).  Weight 1 on either.
    """

    path: Path
    predicts: Literal["eps", "v"]

    def draw(self, u: Tensor) -> Tensor:
        return Uniform().sample(u)

    def ask(self, x0: Tensor, noise: Tensor, t: Tensor) -> Question:
        x0, noise = x0.float(), noise.float()
        a, b = (per_image(level, x0) for level in self.path.coefficients(t))
        target = noise if self.predicts == "eps" else a * noise - b * x0
        return Question(a * x0 + b * noise, self.path.timestep(t).to(x0.device), target)

    def sample(
        self, predict: Predict, noise: Tensor, steps: int, on_step: OnStep | None = None
    ) -> Tensor:
        """DDIM: to each next level along the estimated ends.

        Song et al. 2021 (arXiv:2010.02502), equation 12 with sigma 0.  `Step.sigma` is b.
        """
        times = self.path.times(steps)
        a, b = (level.tolist() for level in self.path.coefficients(times))
        a, b = [*a, 1.0], [*b, 0.0]  # behind the last time lies the data itself
        levels, timesteps = torch.tensor(b), self.path.timestep(times).tolist()
        z = noise.float()
        for index, timestep in enumerate(timesteps):
            output = predict(z, z.new_full((z.shape[0],), timestep)).float()
            ends = self.ends(z, output, a[index], b[index])
            report(on_step, index, levels, float(levels[index]), z, ends.x0)
            z = a[index + 1] * ends.x0 + b[index + 1] * ends.noise
        return z

    def ends(self, z: Tensor, output: Tensor, a: float, b: float) -> Ends:
        """x0 and noise, from the network's answer to z = a x0 + b noise."""
        if self.predicts == "eps":
            return Ends(x0=(z - b * output) / a, noise=output)
        return Ends(x0=a * z - b * output, noise=b * z + a * output)


@dataclass(frozen=True)
class EDM(Objective):
    """Karras et al. 2022 (arXiv:2206.00364): z = x0 + b noise, ln b ~ N(mean, std^2).

    Time is t = b / (1 + b), the noise level at which the rectified flow has the same
    signal-to-noise ratio; it makes the density logit-normal, and 1000 t a clock like the one that
    the network knows.  (EDM's own network is told ln(b) / 4.)

    The network sees z scaled to unit variance and predicts F, from which x0 = c_skip z + c_out F
    (equation 7, table 1); the loss has weight 1 on F (equation 8).  With sin and cos of the angle
    arctan(b / data_std), and the data divided by its standard deviation, these are
        input = cos x0 + sin noise,   F = sin x0 - cos noise,
    minus the v of a cosine path.  So written it holds at both ends of time.

    mean, std: the paper's grid is -1.2 ... 1.2 and 0.6 ... 1.8.
    data_std: of the data; 0.5 in both papers, about 1 for latents of a VAE scaled as SD3's.
    """

    mean: float = -1.2
    std: float = 1.2
    data_std: float = 0.5

    def __post_init__(self):
        if not 0 < self.data_std < float("inf"):
            raise ValueError(f"data_std is {self.data_std}; it must be a number above 0, say 0.5.")
        LogitNormal(self.mean, self.std)  # refuses what is no distribution

    def draw(self, u: Tensor) -> Tensor:
        return LogitNormal(self.mean, self.std).sample(u)

    def ask(self, x0: Tensor, noise: Tensor, t: Tensor) -> Question:
        data, noise = x0.float() / self.data_std, noise.float()
        t = t.to(data.device, torch.float32)
        cos, sin = self.angle(per_image(t, data))
        return Question(cos * data + sin * noise, Schedule.timestep(t), sin * data - cos * noise)

    def angle(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of arctan(b / data_std), b = t / (1 - t)."""
        along, across = self.data_std * (1 - t), t
        length = torch.hypot(along, across)
        return along / length, across / length

    def sample(
        self, predict: Predict, noise: Tensor, steps: int, on_step: OnStep | None = None
    ) -> Tensor:
        """Euler in b from 80 to 0.002, then 0: dz/db = (z - x0) / b.

        EDM's algorithm 1 without its second order.  `Step.sigma` is b.
        """
        levels = karras_levels(steps, low=0.002, high=80.0)

        def slope(z: Tensor, b: Tensor) -> Tensor:
            return (z - self.denoise(predict, z, b)) / per_image(b, z)

        return euler(slope, levels[0] * noise.float(), levels, on_step)

    def denoise(self, predict: Predict, z: Tensor, b: Tensor) -> Tensor:
        """x0 as the network sees it in z at noise-to-data ratio b [B]: EDM's D, equation 7."""
        t = b / (1 + b)
        cos, sin = self.angle(per_image(t, z))
        scaled = cos * z / self.data_std  # c_in z
        output = predict(scaled, Schedule.timestep(t)).float()
        return self.data_std * (cos * scaled + sin * output)


BASELINES: dict[str, Callable[..., Objective]] = {
    "eps_linear": lambda: VariancePreserving(LinearPath(), "eps"),
    "v_linear": lambda: VariancePreserving(LinearPath(), "v"),
    "eps_cosine": lambda: VariancePreserving(CosinePath(), "eps"),
    "v_cosine": lambda: VariancePreserving(CosinePath(), "v"),
    "edm": EDM,
}


def find_objective(text: str, flow: RectifiedFlow) -> Objective:
    """The objective that a configuration names: "flow_matching", "v_cosine", "edm(0, 0.6)".

    flow: the rectified flow as configured; density, shift, loss space and window belong to it, and
    the baselines have none of them.
    Raises ValueError for an unknown name, surplus parameters and those outside their range.
    """
    return read_call(text, {"flow_matching": lambda: flow, **BASELINES}, "objective")
