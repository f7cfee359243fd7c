"""Where each text encoder stands in a Conditioning, so that one of them can be taken out.

The places are those of text.encoders: CLIP-L and CLIP-G side by side, T5 after them.  In training
they are the same for every caption: one window of CLIP's, and a fixed number of T5's tokens.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..conditioning import Conditioning
from ..models.clip import CLIPConfig
from ..models.t5 import T5Config


@dataclass(frozen=True)
class Span:
    """One encoder's place: rows and columns of the context, columns of the pooled vector."""

    rows: tuple[int, int]  # start, stop
    columns: tuple[int, int]
    pooled: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class States:
    """What one encoder makes of one caption."""

    context: Tensor  # [L, D]
    pooled: Tensor  # [Dp]; T5 has none, Dp = 0


@dataclass(frozen=True)
class Layout:
    """The shape of a Conditioning, and who fills which part; the rest is zeros."""

    length: int  # rows of the context
    width: int  # columns of the context
    pooled: int  # columns of the pooled vector
    spans: Mapping[str, Span]

    def place(self, states: Mapping[str, States]) -> Conditioning:
        """One caption's Conditioning, float32, batch of one."""
        whole = Conditioning(torch.zeros(1, self.length, self.width), torch.zeros(1, self.pooled))
        for name, state in states.items():
            context, pooled = self._parts(whole, name)
            context.copy_(state.context)
            pooled.copy_(state.pooled)
        return whole

    def take(self, conditioning: Conditioning, name: str) -> States:
        """One encoder's part of one caption's Conditioning."""
        context, pooled = self._parts(conditioning, name)
        return States(context[0], pooled[0])

    def _parts(self, conditioning: Conditioning, name: str) -> tuple[Tensor, Tensor]:
        span = self.spans[name]
        context = conditioning.context[:, slice(*span.rows), slice(*span.columns)]
        return context, conditioning.pooled[:, slice(*span.pooled)]


def sd3_layout(
    clips: Mapping[str, CLIPConfig],
    t5: T5Config | None,
    *,
    context_dim: int,
    pooled_dim: int,
    window: int,
    t5_length: int,
) -> Layout:
    """The layout of these encoders; one that is off or missing leaves zeros and has no span.

    context_dim, pooled_dim: the widths that the MMDiT takes.  window: CLIP's tokens.  t5_length:
    rows of T5's part, with T5 or without.
    """
    spans: dict[str, Span] = {}
    rows = (0, window)
    if clip_l := clips.get("clip_l"):
        spans["clip_l"] = Span(rows, (0, clip_l.hidden_size), (0, clip_l.pooled_dim))
    if clip_g := clips.get("clip_g"):
        left = pooled_dim - clip_g.pooled_dim
        spans["clip_g"] = Span(rows, (left, left + clip_g.hidden_size), (left, pooled_dim))
    if t5 is not None:
        spans["t5"] = Span((window, window + t5_length), (0, context_dim))
    return Layout(window + t5_length, context_dim, pooled_dim, spans)


def without(conditioning: Conditioning, layout: Layout, dropped: Collection[str]) -> Conditioning:
    """The conditioning with zeros where the dropped encoders stand; any batch.

    Esser et al. 2024 (arXiv:2403.03206) drop each encoder with 46.4 % in pre-training.
    An encoder that the layout does not have is zeros already.
    """
    kept = replace(
        conditioning, context=conditioning.context.clone(), pooled=conditioning.pooled.clone()
    )
    for name in dropped:
        if name in layout.spans:
            for part in layout._parts(kept, name):
                part.zero_()
    return kept
