"""Pictures and captions of the world, encoded once and kept: what the MMDiT learns from.

A shelf is one file: latents in model space, what lies in each of their pixels (render.truth), and
what each encoder makes of each caption, in fp16.  Encoders stay apart in it, so that each may be
dropped by itself.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoints.header import read_header
from ...checkpoints.save import save_tensors
from ...checkpoints.tensors import read_tensors
from ...conditioning import Conditioning
from ...models.clip import CLIPTextModel
from ...models.t5 import T5Encoder
from ...text.vocabularies import Tokenizers
from ..captions import full_caption, short_caption
from ..render import draw, truth
from ..scenes import KINDS
from ..world import Scene
from .basis import Basis
from .samples import Size, scenes_of
from .text import WINDOW, clip_ids, t5_ids

CHUNK = 64  # captions and pictures encoded at once


@dataclass(frozen=True)
class Encoders:
    """What is behind a shelf, none of it learning any more."""

    tokenizers: Tokenizers
    basis: Basis
    clip_l: CLIPTextModel
    clip_g: CLIPTextModel
    t5: T5Encoder

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What each encoder makes of these captions; one window each."""
        words = self.tokenizers
        assert words.clip_l
        assert words.clip_g
        assert words.t5
        place = next(self.t5.parameters()).device
        left = self.clip_l(clip_ids(words.clip_l, captions).to(place), words.clip_l.end)
        right = self.clip_g(clip_ids(words.clip_g, captions).to(place), words.clip_g.end)
        return {
            "clip_l": left.hidden,
            "clip_l.pooled": left.pooled,
            "clip_g": right.hidden,
            "clip_g.pooled": right.pooled,
            "t5": self.t5(t5_ids(words.t5, captions).to(place)),
        }

    def see(self, scenes: Sequence[Scene]) -> Tensor:
        """The scenes' latents, in model space: those that the VAE was taught."""
        return self.basis(draw(scenes, next(self.t5.parameters()).device))


def caption(scene: Scene, number: int, tokenizers: Tokenizers) -> str:
    """Every other caption is a full sentence; what no window holds is told in short."""
    assert tokenizers.clip_l
    assert tokenizers.t5
    text = (short_caption if number % 2 else full_caption)(scene, number)
    longest = max(len(tokenizers.clip_l.ids(text)) + 2, len(tokenizers.t5.ids(text)) + 1)
    return text if longest <= WINDOW else short_caption(scene, number)


def write_shelf(
    path: Path,
    encoders: Encoders,
    seed: int,
    numbers: range,
    size: Size,
    kinds: Mapping[str, float] = KINDS,
) -> Path:
    """Encode these scenes of a seed; nothing is done where that file is there already."""
    if path.exists():
        return path
    chunks: list[dict[str, Tensor]] = []
    for start in range(0, len(numbers), CHUNK):
        some = numbers[start : start + CHUNK]
        scenes = scenes_of(seed, some, size, kinds)
        captions = [
            caption(one, number, encoders.tokenizers)
            for one, number in zip(scenes, some, strict=True)
        ]
        chunk = {"latents": encoders.see(scenes), **encoders.read(captions)}
        labels, chunk["middles"] = truth(scenes)
        halves = {name: tensor.half().cpu() for name, tensor in chunk.items()}
        chunks.append({"labels": labels, **halves})
    tensors = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    empty = {f"empty.{name}": tensor.half().cpu() for name, tensor in encoders.read([""]).items()}
    return save_tensors(path, tensors | empty, {})


class Shelf:
    """An open shelf; its tensors stay in the file until they are taken."""

    def __init__(self, path: Path):
        self.tensors = read_tensors(read_header(path))

    def __len__(self) -> int:
        return len(self.tensors["latents"])

    def latents(self, places: Tensor) -> Tensor:
        """[B, C, h, w] in model space."""
        return self.tensors["latents"][places].float()

    def truth(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Labels [B, 2, h, w] and middles [B, 3, h, w], see render.truth."""
        return self.tensors["labels"][places].long(), self.tensors["middles"][places].float()

    def conditioning(
        self, places: Tensor, untold: Tensor, dropped: Mapping[str, Tensor]
    ) -> Conditioning:
        """Captions for the MMDiT.

        untold: [B] bool, where the empty prompt stands instead; dropped: encoder -> [B] bool, where
        it gives zeros.
        """
        parts = {name: self._part(name, places, untold) for name in PARTS}
        for name, where in dropped.items():
            for part in (name, f"{name}.pooled"):
                if part in parts:
                    parts[part] = parts[part].clone()
                    parts[part][where] = 0
        return assemble(parts)

    def _part(self, name: str, places: Tensor, untold: Tensor) -> Tensor:
        told = self.tensors[name][places].float()
        told[untold] = self.tensors[f"empty.{name}"].float()
        return told


PARTS: Collection[str] = ("clip_l", "clip_l.pooled", "clip_g", "clip_g.pooled", "t5")


def assemble(parts: Mapping[str, Tensor]) -> Conditioning:
    """CLIP-L and CLIP-G side by side in zeros, T5 behind them; as text.encoders does it."""
    t5 = parts["t5"]
    both = torch.cat((parts["clip_l"], parts["clip_g"]), dim=2)
    clips = t5.new_zeros(len(t5), both.shape[1], t5.shape[2])
    clips[:, :, : both.shape[2]] = both
    pooled = torch.cat((parts["clip_l.pooled"], parts["clip_g.pooled"]), dim=1)
    return Conditioning(torch.cat((clips, t5), dim=1), pooled)
