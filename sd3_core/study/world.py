"""What the arms see: single things, their linear latents, and two captions each, encoded once.

One thing to a picture is what a minute of training can teach.  Latents are the embedded model's
(principal components of 8 x 8 pixels), captions go through its three frozen text encoders, as
the paper's pre-encoding has it.  "Original" captions are the short ones, which leave out size and
ground as people do; "synthetic" ones are the full sentences.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.header import read_header
from ..checkpoints.layouts import PREFIXES
from ..checkpoints.load import load_clip, load_t5
from ..checkpoints.save import save_tensors
from ..checkpoints.tensors import read_bytes
from ..conditioning import Conditioning
from ..embedded.captions import full_caption, short_caption
from ..embedded.model import FILE
from ..embedded.render import draw
from ..embedded.stages.basis import Basis, fit_basis
from ..embedded.stages.samples import HELD, TRAINING, scenes_of
from ..embedded.stages.shelf import PARTS, Encoders, Shelf, assemble
from ..embedded.world import Scene
from ..generate import stored_files
from ..text.encoders import ENCODERS
from ..text.vocabularies import find_tokenizers
from .features import features

KINDS = {"single": 1.0}
CHANNELS = 16
MEASURED = 600  # pictures behind a basis
CHUNK = 64  # captions and pictures encoded at once
TRUE = 1024  # pictures that FID compares with
VALIDATED = 128  # held-out pictures behind a validation loss
PROMPTS = 10_000  # the first held-out scene whose caption is drawn


@dataclass(frozen=True)
class Shelves:
    """The same pictures with each of their two captions."""

    short: Shelf
    full: Shelf

    def __len__(self) -> int:
        return len(self.short)

    def conditioning(
        self, places: Tensor, untold: Tensor, dropped: Mapping[str, Tensor], full: Tensor
    ) -> Conditioning:
        """As Shelf.conditioning; full: [B] bool, where the full caption stands."""
        if not full.any():
            return self.short.conditioning(places, untold, dropped)
        long = self.full.conditioning(places, untold, dropped)
        if full.all():
            return long
        short = self.short.conditioning(places, untold, dropped)
        return Conditioning(
            torch.where(full[:, None, None], long.context, short.context),
            torch.where(full[:, None], long.pooled, short.pooled),
        )


class World:
    """The study's data in a folder; each file is made when it is first needed."""

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device
        self._encoders: Encoders | None = None
        self._opened: dict[str, Shelf] = {}
        self._truth: dict[int, Tensor] = {}

    @cached_property
    def identity(self) -> str:
        """What decides on everything an arm sees: text encoders and tokenizers, not the rest."""
        header, digest = read_header(FILE), hashlib.sha256()
        for name in sorted(header.tensors):
            if not name.startswith((PREFIXES["mmdit"], PREFIXES["vae"])):
                digest.update(name.encode() + read_bytes(header, name))
        return f"{digest.hexdigest()[:16]}-{CHANNELS}-{MEASURED}"

    @property
    def encoders(self) -> Encoders:
        """The embedded model's, in float32."""
        if self._encoders is None:
            how = {"dtype": torch.float32, "device": self.device}
            self._encoders = Encoders(
                find_tokenizers(ENCODERS, checkpoint=stored_files(FILE)),
                self.basis(CHANNELS),
                load_clip(FILE, "clip_l", **how),
                load_clip(FILE, "clip_g", **how),
                load_t5(FILE, **how),
            )
        return self._encoders

    def basis(self, channels: int) -> Basis:
        path = self.folder / f"basis-{channels}.safetensors"
        if not path.exists():
            fit_basis(channels, MEASURED).save(path)
        return Basis.load(path)

    def training(self, side: int, count: int) -> Shelves:
        return self._shelves("training", TRAINING, range(count), side)

    def held(self, side: int) -> Shelves:
        return self._shelves("held", HELD, range(VALIDATED), side)

    def prompted(self, count: int, side: int = 64) -> list[Scene]:
        """Held-out scenes whose captions are asked for."""
        return scenes_of(HELD, range(PROMPTS, PROMPTS + count), (side, side), KINDS)

    def truth(self, side: int) -> Tensor:
        """Features of true pictures behind the linear latents, which FID compares with."""
        if side not in self._truth:
            basis = self.basis(CHANNELS)
            behind = basis.draw(basis(draw(self.prompted(TRUE, side))))
            self._truth[side] = features(behind.clamp(-1, 1))
        return self._truth[side]

    @torch.no_grad()
    def read(self, captions: Sequence[str], use: Sequence[str] = ENCODERS) -> Conditioning:
        """Captions for an arm; the encoders that are not used give zeros."""
        parts: dict[str, Tensor] = {}
        for start in range(0, len(captions), CHUNK):
            for name, tensor in self.encoders.read(captions[start : start + CHUNK]).items():
                known = [parts[name]] if name in parts else []
                parts[name] = torch.cat([*known, tensor.float().cpu()])
        for name in PARTS:
            if name.partition(".")[0] not in use:
                parts[name] = torch.zeros_like(parts[name])
        return assemble(parts)

    def _shelves(self, name: str, seed: int, numbers: range, side: int) -> Shelves:
        opened = []
        for kind, write in (("short", short_caption), ("full", full_caption)):
            path = self.folder / f"{name}-{side}-{len(numbers)}-{kind}.safetensors"
            if path.name not in self._opened:
                self._fill(path, seed, numbers, side, write)
                self._opened[path.name] = Shelf(path)
            opened.append(self._opened[path.name])
        return Shelves(*opened)

    @torch.no_grad()
    def _fill(self, path: Path, seed: int, numbers: range, side: int, write) -> None:
        if path.exists() and read_header(path).metadata.get("sd3_workbench.shelf") == self.identity:
            return
        chunks: list[dict[str, Tensor]] = []
        for start in range(0, len(numbers), CHUNK):
            some = numbers[start : start + CHUNK]
            scenes = scenes_of(seed, some, (side, side), KINDS)
            captions = [write(scene, number) for scene, number in zip(scenes, some, strict=True)]
            chunk = {
                "latents": self.encoders.basis(draw(scenes, self.device)),
                **self.encoders.read(captions),
            }
            chunks.append({name: tensor.half().cpu() for name, tensor in chunk.items()})
        tensors = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        empty = self.encoders.read([""])
        tensors |= {f"empty.{name}": tensor.half().cpu() for name, tensor in empty.items()}
        save_tensors(path, tensors, {"sd3_workbench.shelf": self.identity})
