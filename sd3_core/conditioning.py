"""What a prompt becomes for the MMDiT."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    context: Tensor  # [B, L, Dc] one vector per token: CLIP's windows, then T5
    pooled: Tensor  # [B, Dp] one vector per prompt: CLIP-L, then CLIP-G

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Conditioning":
        return Conditioning(
            self.context.to(device=device, dtype=dtype), self.pooled.to(device=device, dtype=dtype)
        )

    def rows(self, rows: Tensor) -> "Conditioning":
        """Some of the prompts: rows are their places, or a mask [B]."""
        return Conditioning(self.context[rows], self.pooled[rows])

    def repeat(self, batch: int) -> "Conditioning":
        """The same prompts for a batch this many times as large."""
        return Conditioning(self.context.repeat(batch, 1, 1), self.pooled.repeat(batch, 1))

    @staticmethod
    def cat(parts: "Sequence[Conditioning]") -> "Conditioning":
        """One batch from several; their lengths agree."""
        return Conditioning(
            torch.cat([part.context for part in parts]), torch.cat([part.pooled for part in parts])
        )
