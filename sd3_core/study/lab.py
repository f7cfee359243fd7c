"""Makes what a study needs and does not have yet: trained arms, cells; within the time there is."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..bench.run import processor
from ..checkpoints.header import fingerprint
from ..embedded.model import FILE
from ..models.mmdit import MMDiT
from ..precision import dtype_name, processor_name
from ..settings import Files, chosen_paths
from ..training.config import LoopConfig, plain_settings
from ..training.loop import OnNote, Progress, Task, fit, ignore, product_path
from ..training.run import open_run
from .arms import Arm, ArmTask, Network, load_arm, new_arm
from .cells import Cell, Ledger, Numbers, key_of
from .world import World


class Measurement(Protocol):
    """Something that can be measured, once for each seed; a frozen dataclass."""

    @property
    def name(self) -> str:
        """Short, for people; one row's measurements have different names."""
        ...

    def settings(self, lab: "Lab") -> Mapping[str, Any]:
        """All that decides the outcome but the seed, as JSON holds it; "kind" is its class."""
        ...

    def measure(self, lab: "Lab", seed: int) -> Numbers:
        """The numbers.  Raises TimeIsUp when the study's time ends on the way."""
        ...


class TimeIsUp(Exception):
    """The study's time is over; what was done is kept."""


@dataclass(frozen=True)
class Lab:
    """Where a study works.

    output: arms become runs in <output>/sd3/study-*, cells files in <output>/study/cells.
    files: the model that rows without arms draw with.  deadline: time.monotonic().
    """

    output: Path
    device: torch.device
    dtype: torch.dtype
    files: Files = Files(checkpoint=FILE)
    deadline: float = float("inf")
    on_note: OnNote = ignore
    on_progress: Callable[[str, Progress], None] = lambda name, progress: None
    world: World = field(init=False)
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        folder = self.output / "study"
        object.__setattr__(self, "world", World(folder / "world", self.device))
        object.__setattr__(self, "ledger", Ledger(folder / "cells"))

    @property
    def where(self) -> str:
        """The machine, in words."""
        name = processor_name(self.device) if self.device.type == "cuda" else processor()
        threads = "" if self.device.type == "cuda" else f", {torch.get_num_threads()} of "
        cores = "" if self.device.type == "cuda" else f"{os.cpu_count()} cores"
        return f"{name}{threads}{cores}, {dtype_name(self.dtype)}, torch {torch.__version__}"

    @property
    def drawn_by(self) -> str:
        """Fingerprints of the model that rows without arms draw with."""
        return "/".join(fingerprint(path) for path in chosen_paths(self.files).values())

    def known(self, what: Measurement, seed: int) -> Cell | None:
        return self.ledger.find(what.settings(self), seed)

    def cell(self, what: Measurement, seed: int) -> Cell:
        """A cell, measured unless it was before.

        Raises TimeIsUp; then a part of it may be done, and is not done again next time.
        """
        settings = what.settings(self)
        if (known := self.ledger.find(settings, seed)) is not None:
            return known
        self.check_time()
        begin = time.perf_counter()
        numbers = what.measure(self, seed)
        cell = Cell(numbers, time.perf_counter() - begin, self.where)
        self.ledger.keep(what.name, settings, seed, cell)
        return cell

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise TimeIsUp

    # Arms

    def of_an_arm(self, arm: Arm) -> dict[str, Any]:
        """All that decides what an arm becomes, but its seed."""
        dtype = dtype_name(self.dtype)
        return {"arm": arm.settings(), "world": self.world.identity, "dtype": dtype}

    def network(self, arm: Arm, seed: int, *, half: bool = False) -> Network:
        """A trained arm, after all its steps or half of them."""
        return self._network(load_arm(self.trained(arm, seed, half=half), self.device))

    def trained(self, arm: Arm, seed: int, *, half: bool = False) -> Path:
        """The file of an arm; trained, or taken up again, where it is not there."""

        def task(config: LoopConfig) -> Task:
            if arm.start is None:
                model = new_arm(arm, seed)
            else:
                model = load_arm(self.trained(arm.start, seed), self.device)
            shelves = self.world.training(arm.side, arm.scenes)
            return ArmTask(arm, seed, self._network(model), shelves)

        suffix = f"-step{max(1, arm.steps // 2):06}" if half else ""
        what = f"{arm.objective}, depth {arm.depth}, {arm.side} px, seed {seed}"
        return self.fitted(self.of_an_arm(arm), arm.loop(seed), task, "model", what, suffix)

    def fitted(
        self,
        identity: Mapping[str, Any],
        config: LoopConfig,
        make_task: Callable[[LoopConfig], Task],
        product: str,
        what: str,
        suffix: str = "",
    ) -> Path:
        """The product of a run of the trainer, named by its identity and its seed."""
        name = f"study-{key_of(identity, config.seed)}"
        with open_run(self.output, name) as run:
            path = product_path(run, product)
            if not path.exists():
                settings = {**identity, "seed": config.seed}
                run.settle(settings, config.steps, plain_settings(config))
                fit(make_task(config), run, config, on_step=self._watched(what))
                for state in run.states().values():  # three times the weights, of no use any more
                    state.unlink(missing_ok=True)
            return product_path(run, product, suffix)

    def _watched(self, what: str) -> Callable[[Progress], None]:
        def on_step(progress: Progress) -> None:
            self.on_progress(what, progress)
            if progress.step < progress.total:
                self.check_time()

        return on_step

    def _network(self, model: MMDiT) -> Network:
        return Network(model.to(self.device), self.device, self.dtype)


def as_json(what: Any) -> dict[str, Any]:
    """A measurement's own fields, but for the name that people read."""
    fields = asdict(what)
    fields.pop("label", None)
    return {"kind": type(what).__name__, **fields}


def budgeted(lab: Lab, minutes: float | None) -> Lab:
    """The lab with a deadline from now on."""
    if minutes is None:
        return lab
    return replace(lab, deadline=time.monotonic() + 60 * minutes)
