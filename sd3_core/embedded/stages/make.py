"""The embedded model, stage by stage: each one a named, resumable run of the trainer.

    words     the tokenizers' files
    basis     what the latents are
    vae       the autoencoder
    clip, t5  the text encoders
    shelves   pictures and captions, encoded once
    flow-64   the MMDiT on small pictures
    flow-128  the MMDiT on large ones
    pack      all of it as one file

    unpack    instead of all before shelves, and flow-64: the shipped model's, to go on from

Everything lies in <output>/sd3/tiny-*; a stage whose product is there does nothing, but that a
larger number of steps extends what was trained there.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.header import fingerprint, read_header
from ...checkpoints.load import load_clip, load_t5, load_vae
from ...precision import pick_device, pick_dtype
from ...text.vocabularies import Tokenizers, find_tokenizers
from ...training.config import LoopConfig, plain_settings
from ...training.loop import OnNote, OnStep, Task, fit, ignore, product_path
from ...training.run import open_run
from ..checker import agreement
from ..model import FILE, NAME
from ..render import draw
from ..scenes import KINDS
from .basis import Basis, fit_basis
from .flow import MADE_FOR, FlowStage, ShelfTask, compile_blocks, load_mmdit_to_train, new_mmdit
from .pack import pack, unpack
from .samples import HELD, TRAINING, Size, scenes_of
from .shelf import Encoders, Shelf, write_shelf
from .text import CLIPStage, CLIPTask, T5Stage, T5Task
from .vae import VAEStage, VAETask, new_vae

LOCAL = "sd3-tiny-local"
_NAMES = re.compile(r"sd3-tiny-[\w.-]+")  # embedded.model knows its versions by the beginning

# What a run may change between two starts.
FREE = ("steps", "checkpoint_every", "keep", "validate_every", "sample_every", "export_every")
HELD_PICTURES = 128  # of each size, for the validation loss
LARGE = (128, 128)
PART = 10_000  # scenes in one file of a shelf: what an interrupt loses, and what memory must hold


@dataclass(frozen=True)
class Numbers:
    """Scenes that are put on a shelf, and how often a step takes one of them."""

    size: Size
    scenes: range
    share: float
    kinds: Mapping[str, float] = field(default_factory=lambda: KINDS)  # of scenes, see scenes.KINDS


@dataclass(frozen=True)
class Budget:
    """How long each stage learns, and from how much."""

    vae: VAEStage
    clip: CLIPStage
    t5: T5Stage
    small: tuple[Numbers, ...]  # shelves of flow-64
    flow_64: FlowStage
    large: tuple[Numbers, ...]  # shelves of flow-128
    flow_128: FlowStage
    readable: float = 0.99  # of large pictures, through the VAE, before the MMDiT learns anything


def small_pictures(count: int) -> tuple[Numbers, ...]:
    return (Numbers((64, 64), range(count), 1.0),)


def large_pictures(count: int) -> tuple[Numbers, ...]:
    """Mostly squares, some of them with one thing only; a tenth of each of two other aspects."""
    wide, tall = 7 * count // 5, 3 * count // 2  # where these two begin
    return (
        Numbers(LARGE, range(count), 0.5),
        Numbers(LARGE, range(count, wide), 0.3, {"single": 1.0}),
        Numbers((128, 96), range(wide, tall), 0.1),
        Numbers((96, 128), range(tall, 8 * count // 5), 0.1),
    )


BUDGETS = {
    # Two to three hours of two cores.
    "laptop": Budget(
        vae=VAEStage(steps=6000, batch_size=8, learning_rate=1e-3),
        clip=CLIPStage(steps=1500),
        t5=T5Stage(steps=1000),
        small=small_pictures(24_000),
        flow_64=FlowStage(steps=2000, batch_size=64, ema=0.998, encoder_dropout=0.0),
        large=large_pictures(100_000),
        flow_128=FlowStage(
            steps=12_000,
            batch_size=64,
            optimizer="muon",
            shift=3.0,
            encoder_dropout_from=0.55,
            encoder_dropout_until=0.75,
            lr_schedule="cosine",
            checkpoint_every=1000,
            validate_every=1000,
        ),
    ),
    # About an hour of one large GPU, by the guide's estimates; not yet run.
    "gpu": Budget(
        vae=VAEStage(steps=20_000, batch_size=64),
        clip=CLIPStage(steps=1500, batch_size=512),
        t5=T5Stage(steps=1500, batch_size=512),
        small=small_pictures(400_000),
        flow_64=FlowStage(steps=14_000, batch_size=1024, ema=0.9995, encoder_dropout_from=0.2),
        large=large_pictures(200_000),
        flow_128=FlowStage(
            steps=10_000,
            batch_size=512,
            optimizer="muon",
            ema=0.9995,
            shift=3.0,
            encoder_dropout_from=0.55,
            encoder_dropout_until=0.75,
            lr_schedule="cosine",
        ),
    ),
}


@dataclass(frozen=True)
class Maker:
    """The stages under one budget; each method runs one and returns its file.

    Raises ValueError when a stage before it has not been run.
    """

    output: Path
    budget: Budget
    device: str = "auto"
    dtype: str = "auto"  # of the products; what is trained stays float32
    compiled: bool = False  # see flow.compile_blocks
    name: str = LOCAL  # of the model that is packed
    first_scene: int = 0  # added to the budget's scenes: pictures that no run has seen yet
    on_step: OnStep = ignore
    on_note: OnNote = ignore

    @property
    def machine(self) -> tuple[torch.device, torch.dtype]:
        place = pick_device(self.device)
        return place, pick_dtype(self.dtype, place)

    def words(self) -> Path:
        from .words import write_tokenizers

        return self._words if self._words.exists() else write_tokenizers(self._words)

    def basis(self) -> Path:
        if not self._basis.exists():
            fit_basis(self.budget.vae.latent_channels).save(self._basis)
        return self._basis

    def vae(self) -> Path:
        config, basis = self.budget.vae, Basis.load(self.basis())
        return self._run(
            "vae",
            lambda: VAETask(new_vae(config), config, *self.machine, basis),
            config,
            {"basis": fingerprint(self.basis())},
        )

    def clip(self) -> Path:
        config, words = self.budget.clip, self.tokenizers()
        return self._run("clip", lambda: CLIPTask(words, config, *self.machine), config, {})

    def t5(self) -> Path:
        config, words = self.budget.t5, self.tokenizers()
        return self._run("t5", lambda: T5Task(words, config, *self.machine), config, {})

    def shelves(self) -> Path:
        """All shelves of both sizes; returns their folder."""
        encoders = self.encoders()
        small = () if self._product("flow-64").exists() else self.budget.small
        for numbers in (*small, *self.budget.large):
            held = self._held(numbers.size)
            write_shelf(held, encoders, HELD, range(HELD_PICTURES), numbers.size)
            for path, scenes in self._parts(numbers).items():
                self.on_note(f"{path.name}: {len(scenes)} pictures")
                write_shelf(path, encoders, TRAINING, scenes, numbers.size, numbers.kinds)
        return self._shelf_folder

    def flow_64(self) -> Path:
        return self._flow("flow-64", self.budget.flow_64, self.budget.small, None)

    def flow_128(self) -> Path:
        before = self.product("flow-64")
        return self._flow("flow-128", self.budget.flow_128, self.budget.large, before)

    def pack(self) -> Path:
        if self.name == NAME or not _NAMES.fullmatch(self.name):
            raise ValueError(
                f"name is {self.name!r}; give another one that begins with sd3-tiny-, such as "
                f"{LOCAL}. {NAME} is what the pack ships."
            )
        mmdit = self.product("flow-128")
        made_for = read_header(mmdit).metadata.get(MADE_FOR)
        if made_for and made_for != self._made_for():
            raise ValueError(
                f"{mmdit} was trained with other text encoders or another basis than those in "
                f"{self.output / 'sd3'}: run shelves, flow-64 and flow-128 again, in another "
                "--output."
            )
        return pack(
            self.output / "sd3" / f"{self.name}.safetensors",
            self.name,
            mmdit=mmdit,
            vae=self.product("vae"),
            clips=self.product("clip"),
            t5=self.product("t5"),
            tokenizers=self.words(),
            settings={
                "sd3_workbench.shift": str(self.budget.flow_128.shift),
                "sd3_workbench.native_pixels": str(128 * 128),
            },
        )

    def unpack(self) -> Path:
        """The shipped model as the stages' products; returns their folder."""
        unpack(
            FILE,
            mmdit=self._product("flow-64"),
            vae=self._product("vae"),
            clips=self._product("clip"),
            t5=self._product("t5"),
            tokenizers=self._words,
            basis=self._basis,
        )
        return self.output / "sd3"

    def tokenizers(self) -> Tokenizers:
        return find_tokenizers(("clip_l", "clip_g", "t5"), directory=self.words())

    def encoders(self) -> Encoders:
        device, dtype = self.machine
        how = {"dtype": dtype, "device": device}
        clips = self.product("clip")
        return Encoders(
            self.tokenizers(),
            Basis.load(self.basis()),
            load_clip(clips, "clip_l", **how),
            load_clip(clips, "clip_g", **how),
            load_t5(self.product("t5"), **how),
        )

    def product(self, stage: str) -> Path:
        """The file that a stage has made.  Raises ValueError when it has not."""
        path = self._product(stage)
        if not path.exists():
            raise ValueError(f"{path} is not there: run the stage {stage} first.")
        return path

    def _product(self, stage: str) -> Path:
        return self.output / "sd3" / f"tiny-{stage}" / "model" / f"tiny-{stage}.safetensors"

    def _flow(
        self, stage: str, config: FlowStage, shelves: tuple[Numbers, ...], start: Path | None
    ) -> Path:
        def task() -> ShelfTask:
            self._check_vae()
            place, _ = self.machine
            model = (
                new_mmdit(config.seed, place)
                if start is None
                else load_mmdit_to_train(start, place)
            )
            if self.compiled:
                compile_blocks(model)
            opened = [
                (self._open(path), numbers.share / len(paths))
                for numbers, paths in zip(shelves, files, strict=True)
                for path in paths
            ]
            held = self._open(self._held(shelves[0].size))
            return ShelfTask(model, opened, held, config, *self.machine, self._made_for())

        files = [self._parts(numbers) for numbers in shelves]
        named = [
            [numbers.share, *(path.name for path in paths)]
            for numbers, paths in zip(shelves, files, strict=True)
        ]
        origin = {} if start is None else {"start": fingerprint(start)}
        return self._run(stage, task, config, {"shelves": named, **origin})

    def _made_for(self) -> str:
        """One value for all that turns pictures and captions into what the MMDiT sees."""
        files = (self.basis(), self.product("clip"), self.product("t5"))
        return "/".join(map(fingerprint, files))

    def _open(self, path: Path) -> Shelf:
        if not path.exists():
            raise ValueError(f"{path} is not there: run the stage shelves first.")
        return Shelf(path)

    @torch.inference_mode()
    def _check_vae(self) -> None:
        """What the VAE loses no MMDiT can draw.  Raises ValueError when that is too much."""
        place, _ = self.machine
        scenes = scenes_of(HELD, range(HELD_PICTURES), LARGE)
        vae = load_vae(self.product("vae"), dtype=torch.float32, device=place)
        drawn = [vae.decode(vae.encode(some).mean) for some in draw(scenes, place).split(16)]
        share = agreement(torch.cat(drawn).clamp(-1, 1), scenes)
        self.on_note(f"vae: {share:.1%} of pictures are read right through it")
        if share < self.budget.readable:
            raise ValueError(
                f"the VAE keeps {share:.1%} of pictures readable, {self.budget.readable:.0%} are "
                "wanted before the MMDiT is trained: give the stage vae more steps."
            )

    def _run(
        self,
        stage: str,
        make_task: Callable[[], Task],
        config: LoopConfig,
        identity: Mapping[str, Any],
    ) -> Path:
        """Train a task as the run <output>/sd3/tiny-<stage>, go on, or find it finished.

        identity: what it depends on besides its settings.
        """
        settings = plain_settings(config)
        fixed = {key: value for key, value in settings.items() if key not in FREE}
        with open_run(self.output, f"tiny-{stage}") as run:
            product = product_path(run, "model")
            if product.exists() and not run.states():
                self.on_note(f"{stage}: is there, from elsewhere")
                return product
            dtype = str(self.machine[1])
            run.settle({**fixed, "dtype": dtype, **identity}, config.steps, settings)
            if config.steps in run.states() and product.exists():
                self.on_note(f"{stage}: is finished")
            else:
                fit(make_task(), run, config, on_step=self.on_step, on_note=self.on_note)
            return product

    @property
    def _words(self) -> Path:
        return self.output / "sd3" / "tiny-words"

    @property
    def _basis(self) -> Path:
        return self.output / "sd3" / "tiny-basis.safetensors"

    @property
    def _shelf_folder(self) -> Path:
        return self.output / "sd3" / "tiny-shelves"

    def _parts(self, numbers: Numbers) -> dict[Path, range]:
        """The files of a shelf and the scenes in each."""
        first, last = (
            self.first_scene + end for end in (numbers.scenes.start, numbers.scenes.stop)
        )
        parts = [range(start, min(start + PART, last)) for start in range(first, last, PART)]
        return {
            self._shelf(numbers.size, f"{part.start}-{part.stop}", numbers.kinds): part
            for part in parts
        }

    def _held(self, size: Size) -> Path:
        return self._shelf(size, "held", KINDS)

    def _shelf(self, size: Size, which: str, kinds: Mapping[str, float]) -> Path:
        """Its name tells all that decides what is in it, so that it is never another's."""
        behind = json.dumps([self._made_for(), dict(kinds), HELD_PICTURES])
        value = hashlib.sha256(behind.encode()).hexdigest()[:8]
        return self._shelf_folder / f"{size[0]}x{size[1]}-{which}-{value}.safetensors"


IN_ORDER: dict[str, Callable[[Maker], Path]] = {  # the stages of a model from nothing
    "words": Maker.words,
    "basis": Maker.basis,
    "vae": Maker.vae,
    "clip": Maker.clip,
    "t5": Maker.t5,
    "shelves": Maker.shelves,
    "flow-64": Maker.flow_64,
    "flow-128": Maker.flow_128,
    "pack": Maker.pack,
}
STAGES = {**IN_ORDER, "unpack": Maker.unpack}
