"""The MMDiT of the embedded model: rectified flow on shelves of encoded pictures.

Two stages, as the paper's: small pictures first, then large ones with a shifted schedule.  Each
text encoder is dropped with 46.4 % (Esser et al. 2024, arXiv:2403.03206), but only in a part of the
run: from the start it costs two to three times the samples, and of the last steps, at a low rate,
it would take most from what pictures are drawn with, all three encoders (0.536^3 is 15 %).

Beside the velocity, a linear map of the image tokens between two blocks is asked which shape and
which colour lie where, and where the middle of each thing is.  Of the velocity's error outlines are
a small part, which comes late: things are drawn in parts that do not fit together.  Asked by name,
the first blocks learn early to bring the words to the pixels, and the pixels of a thing to agree.
The idea is representation alignment (Yu et al. 2024, arXiv:2410.06940), with the world's truth in
the place of a large encoder's features.  The map is scaffolding: not shipped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...checkpoints.layouts import PREFIXES
from ...checkpoints.load import load_mmdit
from ...checkpoints.save import save_tensors
from ...conditioning import Conditioning
from ...models.attention import Attention, attention
from ...models.cast import CastOps
from ...models.mmdit import MMDiT, MMDiTConfig
from ...schedule import Schedule
from ...text.encoders import ENCODERS
from ...training.batches import generator
from ...training.config import LoopConfig
from ...training.densities import LogitNormal
from ...training.loop import Losses, ignore
from ...training.networks import initialise
from ...training.objectives import Predict, RectifiedFlow
from ...training.optimizers import Parameters
from ...training.order import chance
from ...training.validation import LEVELS
from ..render import SHAPE_LABELS
from ..world import COLOURS
from .shelf import Shelf

SIZES = MMDiTConfig(
    depth=3,
    context_dim=256,
    pooled_dim=192,
    pos_embed_max_size=16,
    qk_norm=True,
    dual_attention_layers=(0,),
)
MADE_FOR = "sd3_workbench.made_for"  # in a product's metadata
ASKED_AFTER = 2  # blocks: where the tokens are asked what they show
BASE = 8  # patches per side of a 128 px picture, for which positions are spaced as in SD3


@dataclass(frozen=True, kw_only=True)
class FlowStage(LoopConfig):
    steps: int = 10_000
    batch_size: int = 96
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 200
    ema: float = 0.999
    checkpoint_every: int = 500
    validate_every: int = 500
    shift: float = 1.0
    caption_dropout: float = 0.1
    encoder_dropout: float = 0.464
    encoder_dropout_from: float = 0.5  # of the steps: where it begins
    encoder_dropout_until: float = 1.0  # and where it ends
    label_weight: float = 0.1  # of what the tokens are asked, beside the velocity: what lies there
    middle_weight: float = 0.5  # and where its middle is; both 0: nothing is asked


def quick_attention(device: torch.device) -> Attention:
    return explicit_attention if device.type == "cpu" else attention


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """As models.attention, in three steps.

    For a hundred tokens on a CPU its gradient is faster than the fused one's: a whole training step
    takes 0.75 of the time at 64 tokens, 0.9 at 112.
    """
    weights = (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(3)
    return (weights @ v).transpose(1, 2).flatten(2)


def new_mmdit(seed: int, device: torch.device) -> MMDiT:
    """One that has learnt nothing: it says 0."""
    model = MMDiT(SIZES, CastOps(), quick_attention(device))
    initialise(model, BASE, seed)
    return model


def load_mmdit_to_train(path: Path, device: torch.device) -> MMDiT:
    model = load_mmdit(path, ops=CastOps(), attention=quick_attention(device))
    return model.float().requires_grad_(True)


def compile_blocks(model: MMDiT) -> None:
    """Let torch's compiler fuse what lies between the products, where gradients are wanted.

    A CPU's step takes 0.7 of the time, after two minutes of compiling for each picture size (kept
    on disk by torch).  Measuring and drawing stay as they are: they are rare and of other shapes.
    """
    for block in model.joint_blocks:
        block.forward = _in_training(torch.compile(block.forward, dynamic=False), block.forward)


def _in_training(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*inputs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*inputs)

    return forward


class Asked(nn.Module):
    """What the image tokens say of each pixel of the latents: shape, colour, and the way to the
    middle of the thing that lies there, with its radius."""

    def __init__(self, hidden: int, patch: int):
        super().__init__()
        self.patch = patch
        self.counts = (1 + len(SHAPE_LABELS), 1 + len(COLOURS), 3)  # 0 is the ground
        self.linear = nn.Linear(hidden, patch**2 * sum(self.counts))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor, labels: Tensor, middles: Tensor) -> tuple[Tensor, Tensor]:
        """tokens: [B, L, D]; labels, middles: see render.truth.

        Returns, each [B], the cross-entropy of the labels and the absolute error of the middles
        (0 on the ground), means over the pixels.
        """
        said = rearrange(
            self.linear(F.layer_norm(tokens.float(), tokens.shape[2:])),
            "B (H W) (p q K) -> B K (H p) (W q)",
            H=labels.shape[2] // self.patch,
            p=self.patch,
            q=self.patch,
        )
        shapes, colours, ways = said.split(self.counts, dim=1)
        wrong = F.cross_entropy(shapes, labels[:, 0], reduction="none")
        wrong = wrong + F.cross_entropy(colours, labels[:, 1], reduction="none")
        missed = ((ways - middles).abs() * (labels[:, :1] > 0)).sum(1)
        return wrong.flatten(1).mean(1), missed.flatten(1).mean(1)


class ShelfTask:
    """Predict the velocity of latents from a shelf, given their captions.

    shelves: of a picture size each, with the share of the steps that take it.
    """

    product = "model"

    def __init__(
        self,
        model: MMDiT,
        shelves: Sequence[tuple[Shelf, float]],
        held: Shelf,
        config: FlowStage,
        device: torch.device,
        dtype: torch.dtype,
        made_for: str = "",
    ):
        """made_for: the encoders behind the shelves, told in the product."""
        self.model, self.shelves, self.held = model.to(device), shelves, held
        self.config, self.device, self.dtype, self.made_for = config, device, dtype, made_for
        self.objective = RectifiedFlow(LogitNormal(0, 1), Schedule(config.shift))
        self.asked = Asked(model.config.hidden_size, model.config.patch_size).to(device)
        asks = config.label_weight or config.middle_weight
        head = dict(self.asked.named_parameters(prefix="asked")) if asks else {}
        self.parameters: Parameters = {**dict(model.named_parameters()), **head}

    def loss(self, step: int, rows: range, size: int) -> Losses:
        shelf, draws = self._shelf(step), generator(self.config.seed, step, rows.start, "flow")
        count = len(rows)
        places = torch.randint(len(shelf), (count,), generator=draws)
        x0 = shelf.latents(places)
        untold = torch.rand(count, generator=draws) < self.config.caption_dropout
        rate = self._encoder_dropout(step)
        dropped = {name: torch.rand(count, generator=draws) < rate for name in ENCODERS}
        noise, u = torch.randn(x0.shape, generator=draws), torch.rand(count, generator=draws)
        conditioning = shelf.conditioning(places, untold, dropped)
        between: list[Tensor] = []
        each = self.objective.loss(
            self.network(conditioning, between.append),
            x0.to(self.device),
            noise.to(self.device),
            self.objective.draw(u),
        )
        label, middle = self.config.label_weight, self.config.middle_weight
        if not (label or middle):
            return Losses(each)
        wrong, missed = self.asked(
            between[0], *(one.to(self.device) for one in shelf.truth(places))
        )
        logs = {"velocity": each, "labels": wrong, "middles": missed}
        return Losses(each + label * wrong + middle * missed, logs)

    def _shelf(self, step: int) -> Shelf:
        left = chance(self.config.seed, step, "shelf") * sum(share for _, share in self.shelves)
        for shelf, share in self.shelves:
            left -= share
            if left < 0:
                return shelf
        return self.shelves[-1][0]

    def _encoder_dropout(self, step: int) -> float:
        done = step / self.config.steps
        within = self.config.encoder_dropout_from <= done < self.config.encoder_dropout_until
        return self.config.encoder_dropout if within else 0.0

    def network(
        self, conditioning: Conditioning, see: Callable[[Tensor], object] = ignore
    ) -> Predict:
        """The velocity, given this text; `see` is shown the image tokens that are asked."""
        given, model = conditioning.to(self.device, self.dtype), self.model

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            x, timestep = x.to(self.dtype), timestep.to(x.device)
            tokens = model.embed(x, timestep, given.context, given.pooled)
            tokens = model.run_blocks(tokens, range(ASKED_AFTER))
            see(tokens.x)
            tokens = model.run_blocks(tokens, range(ASKED_AFTER, model.config.depth))
            return model.unembed(tokens).float()

        return predict

    def validate(self) -> Mapping[str, float]:
        """The mean loss at eight equidistant times with fixed noise; t = 1 is not in the mean."""
        places = torch.arange(len(self.held))
        nowhere = torch.zeros(len(places), dtype=torch.bool)
        x0 = self.held.latents(places).to(self.device)
        noise = torch.randn(x0.shape, generator=generator(0, "validation")).to(self.device)
        predict = self.network(self.held.conditioning(places, nowhere, {}))
        means = [
            float(self.objective.loss(predict, x0, noise, torch.full((len(x0),), t)).mean())
            for t in LEVELS
        ]
        named = {f"t{level:g}": mean for level, mean in zip(LEVELS, means, strict=True)}
        return {"loss": sum(means[:-1]) / (len(means) - 1), **named}

    def sample(self, folder: Path, step: int) -> None:
        """Nothing to see: no stage knows how to decode."""

    def export(self, path: Path, step: int) -> Path:
        state = {PREFIXES["mmdit"] + name: value for name, value in self.model.state_dict().items()}
        told = {"sd3_workbench.step": str(step), MADE_FOR: self.made_for}
        return save_tensors(path, state, told)
