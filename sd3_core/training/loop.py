"""The loop under every kind of training: batches, gradients, steps; saved, resumed, shown.

It knows nothing of pictures: a `Task` says what is trained and what a sample costs.  All that a
step depends on is in the saved state: what is trained, the optimiser's memory, the averaged
weights and the number of the step.  Every random number belongs to the step and the sample that it
serves (see batches.py), so a resumed run is the unbroken one, bit for bit on the same machine.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError, NumericalError
from .config import LoopConfig
from .curve import draw_curve
from .distributed import ALONE, World
from .learner import Best, Learner, diverged
from .optimizers import Parameters, learning_rate, swapped
from .run import Run

TIMED_STEPS = 2  # the first one also warms up; after which the remaining time is told
FORETOLD = 50  # passes; of a shorter run nobody asks how long it takes
STOPPED = "-stopped"  # name of the product of a run that has not come to its end


@dataclass(frozen=True)
class Losses:
    """What some samples of a batch cost, and what else is worth a line in the log; [n] each."""

    each: Tensor  # float32, with gradient
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class Task(Protocol):
    """Something that can be learnt."""

    parameters: Parameters  # what is trained: float32, by name
    product: str  # the folder of what comes out: "lora", "model"

    def loss(self, step: int, rows: range, size: int) -> Losses:
        """The samples `rows` of the batch of `size` of this step (from 0), over all processes."""
        ...

    def validate(self) -> Mapping[str, float]:
        """Measurements on fixed data with fixed noise; the lowest "loss" that fit's `acceptable`
        lets pass decides which weights are best."""
        ...

    def sample(self, folder: Path, step: int) -> None:
        """Draw what shows how far it has come, into this folder; called in one process."""
        ...

    def export(self, path: Path, step: int) -> Path:
        """Write the product; returns where it lies.  Called in one process."""
        ...


@dataclass(frozen=True)
class Progress:
    """A step that is done."""

    step: int  # 1 ... total
    total: int
    loss: float  # mean over the batch
    learning_rate: float
    gradient_norm: float  # before clipping
    seconds_left: float | None  # None in the first steps
    logs: Mapping[str, float] = field(default_factory=dict)  # the log's line, without the rest


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    product: Path
    best: Path | None  # the product of the best measurement; None: nothing beat the beginning
    step: int
    folder: Path
    stopped: str = ""  # why it ended before its last step, where it did


OnStep = Callable[[Progress], None]  # what it raises stops the run, after it is saved
OnNote = Callable[[str], None]  # receives sentences for the user
# Asked before each pass of the network, between sampling steps and pictures looked at; what it
# raises stops the run as on_step does.
Poll = Callable[[], None]
# By the lines of the log: why training should end before its last step; empty: it goes on.
Verdict = Callable[[Sequence[Mapping[str, Any]]], str]
# By what `Task.validate` returned: whether this state may become the best one.
Acceptable = Callable[[Mapping[str, float]], bool]


def ignore(_: object) -> None:
    """The listener that is used when there is none."""


def never() -> None:
    """The poll that never stops a run."""


def go_on(lines: Sequence[Mapping[str, Any]]) -> str:
    """The verdict that never ends a run early."""
    return ""


def any_state(measured: Mapping[str, float]) -> bool:
    """Where the loss alone says which state is best."""
    return True


def fit(
    task: Task,
    run: Run,
    config: LoopConfig,
    world: World = ALONE,
    on_step: OnStep = ignore,
    on_note: OnNote = ignore,
    verdict: Verdict = go_on,
    acceptable: Acceptable = any_state,
) -> Outcome:
    """Train to the last step, or to the verdict, from wherever the run stands.

    The batch of a step is batch_size * accumulation * processes samples.  In several processes all
    of them call this; the first one writes, draws, and calls on_step and on_note.
    What on_step raises, SIGINT and SIGTERM (then as KeyboardInterrupt) leave after the state is
    saved; so does every other error, as long as the weights are those of a whole step.  What was
    learnt until then is left as a product too, named NAME-stopped.
    Raises NumericalError when the loss is no longer a number.
    """
    say = on_note if world.first else ignore
    learner = Learner(task.parameters, config)
    _resume(learner, run, world, say)
    session = Session(task, run, config, world, learner, say, acceptable)
    with session.saved_at_the_end(), stop_signals() as asked_to_stop:
        if not learner.looked:
            session.look()
        session.foretell()
        while not session.ended(verdict) and learner.step < config.steps:
            progress, stop = session.advance(asked_to_stop())
            if world.first:
                on_step(progress)
            session.look()
            if stop:
                raise KeyboardInterrupt
        return session.finish()


def _resume(learner: Learner, run: Run, world: World, say: OnNote) -> None:
    state = run.newest()
    for told in run.damaged.values():
        say(f"{run.name}: a saved state is passed over: {told}")
    step = world.share(-1 if state is None else state.step)
    if state is not None and state.step != step:
        raise CheckpointError(
            f"{run.folder}: this process sees the state of step {state.step}, the first one that "
            f"of step {step}: all processes need the same folder."
        )
    if state is not None:
        learner.restore(state)
        say(f"{run.name}: goes on from step {state.step}")
    if world.first:
        run.put_aside()
        run.rewind(step, learner.looked)
    world.wait()


class Session:
    """A run while it is being trained; see fit."""

    def __init__(
        self,
        task: Task,
        run: Run,
        config: LoopConfig,
        world: World,
        learner: Learner,
        say: OnNote,
        acceptable: Acceptable,
    ):
        self.task, self.run, self.config = task, run, config
        self.world, self.learner, self.say = world, learner, say
        self.acceptable = acceptable
        # of the newest saved state: its step, and whether that step was looked at
        self.saved = (learner.step, learner.looked) if run.states() else (-1, False)
        self.durations: list[float] = []  # seconds, of this session's steps
        self.measuring = 0.0  # seconds that the last measurement took
        self.stopped = ""  # the verdict that ended it

    def advance(self, stop: bool) -> tuple[Progress, bool]:
        """One step; also whether any process was asked to stop."""
        learner, world = self.learner, self.world
        begin = time.perf_counter()
        step = learner.step
        sums = self._accumulate()
        gradients = [_gradient(parameter) for parameter in learner.parameters.values()]
        names = list(sums)
        flag = torch.tensor(float(stop), device=gradients[0].device)
        numbers = torch.stack([*sums.values(), flag])
        world.add([*gradients, numbers])
        values = numbers.tolist()
        logs = dict(zip(names, values, strict=False))
        if not math.isfinite(logs["loss"]):
            raise diverged(step, "loss")
        norm = learner.update()
        rate = learning_rate(self.config, step)
        if world.first:
            line = {"step": learner.step, **logs, "learning_rate": rate, "gradient_norm": norm}
            self.run.write(line)
        self.durations.append(time.perf_counter() - begin)
        progress = Progress(
            learner.step, self.config.steps, logs["loss"], rate, norm, self._seconds_left(), logs
        )
        self._tell_time(progress)
        return progress, values[-1] > 0

    def _accumulate(self) -> dict[str, Tensor]:
        """The gradients of this process's samples; means over the batch of what is logged."""
        config, world = self.config, self.world
        count = config.batch_size
        size = count * config.accumulation * world.size
        self.learner.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for part in range(config.accumulation):
            start = (part * world.size + world.rank) * count
            losses = self.task.loss(self.learner.step, range(start, start + count), size)
            (losses.each.sum() / size).backward()
            for name, values in {"loss": losses.each, **losses.logs}.items():
                total = values.detach().float().sum() / size
                sums[name] = sums[name] + total if name in sums else total
        return sums

    def _seconds_left(self) -> float | None:
        if len(self.durations) < TIMED_STEPS:
            return None
        recent = self.durations[1:][-50:]
        return self._seconds(sum(recent) / len(recent))

    def _seconds(self, step: float) -> float:
        """Of the rest of the run, by those of a step; what is measured on the way included."""
        steps, every = self.config.steps, self.config.validate_every
        done = self.learner.step
        # A step is told before it is looked at.
        looks = -(-steps // every) - max(done - 1, 0) // every if every else 0
        return step * (steps - done) + self.measuring * looks

    def foretell(self) -> None:
        """Say before the first step how long it will take, by two passes that change nothing."""
        config, learner = self.config, self.learner
        left = config.steps - learner.step
        if left * config.accumulation < FORETOLD:
            return
        seconds = 0.0
        for _ in range(TIMED_STEPS):  # the first one warms up
            begin = time.perf_counter()
            losses = self.task.loss(learner.step, range(config.batch_size), config.batch_size)
            losses.each.sum().backward()
            gradients = [_gradient(parameter) for parameter in learner.parameters.values()]
            float(gradients[-1].sum())  # waits for the device
            seconds = time.perf_counter() - begin
        learner.optimizer.zero_grad(set_to_none=True)
        about = spoken_time(self._seconds(seconds * config.accumulation))
        self.say(f"time: about {about} for {left} steps")

    def _tell_time(self, progress: Progress) -> None:
        if len(self.durations) == TIMED_STEPS and progress.seconds_left:
            left = progress.total - progress.step
            self.say(f"{left} steps left, about {spoken_time(progress.seconds_left)}")

    def ended(self, verdict: Verdict) -> bool:
        """Whether to end now; asked at the start, and where something was measured.

        After the last step, too: it says which product is good.
        """
        if self.durations and not self._due(self.config.validate_every):
            return False
        if self.world.first:
            self.stopped = verdict(self.run.lines)
        return bool(self.world.share(int(bool(self.stopped))))

    def look(self) -> None:
        """What is due at this step: measure, draw, export, save; in this order, so that whatever
        a killed process lost comes again."""
        step, config, begin = self.learner.step, self.config, time.perf_counter()
        improved = self._validate() if self._due(config.validate_every) else False
        if self.world.first and self._due(config.sample_every):
            with swapped(self.learner.parameters, self.learner.average):
                folder = self.run.folder / "samples"
                folder.mkdir(exist_ok=True)
                self.task.sample(folder, step)
        if step and step < config.steps and self._due(config.export_every):
            self._export(f"-step{step:06}")
        self.learner.looked = True
        if step and (improved or self._due(config.checkpoint_every)):
            self.save()
        if self._due(config.validate_every):
            self.measuring = time.perf_counter() - begin

    def _due(self, every: int) -> bool:
        step = self.learner.step
        return every > 0 and (step % every == 0 or step == self.config.steps)

    def _validate(self) -> bool:
        """Measure; whether it is the best so far."""
        learner = self.learner
        with swapped(learner.parameters, learner.average), torch.no_grad():
            measured = dict(self.task.validate())
        if not measured:
            return False
        if self.world.first:
            named = {f"validation_{name}": value for name, value in measured.items()}
            self.run.write({"step": learner.step, **named})
        known = learner.best
        again = known is not None and known.step == learner.step  # stopped before it was saved
        if known is not None and not again and measured["loss"] >= known.loss:
            return False
        if not self.acceptable(measured):
            return False
        learner.best = Best(learner.step, measured["loss"])
        if learner.step:
            self._export("-best")
        return True

    def _export(self, suffix: str = "") -> Path:
        path = self.product(suffix)
        if self.world.first:
            with swapped(self.learner.parameters, self.learner.average):
                path = self.task.export(path, self.learner.step)
        return path

    def product(self, suffix: str = "") -> Path:
        return product_path(self.run, self.task.product, suffix)

    def save(self) -> None:
        """Write the state and draw the curve."""
        if not self.world.first:
            return
        best = self.learner.best.step if self.learner.best else None
        now = (self.learner.step, self.learner.looked)
        if now != self.saved:
            self.run.save(self.learner.state(), self.config.keep, best)
            self.saved = now
        draw_curve(self.run.lines, self.run.folder / "curve.png")

    def finish(self) -> Outcome:
        """The last state and the product."""
        self.save()
        product = self._export()
        if self.world.first:
            with suppress(OSError):  # Windows, while a program has it open
                self.product(STOPPED).unlink(missing_ok=True)
        best = self.product("-best")
        self.world.wait()
        there = best if best.exists() else None
        if self.stopped:
            self.say(f"{self.run.name}: {self.stopped}")
        return Outcome(product, there, self.learner.step, self.run.folder, self.stopped)

    @contextmanager
    def saved_at_the_end(self) -> Iterator[None]:
        """Save what there is when something ends the run, export it, and say so."""
        try:
            yield
        except BaseException as error:
            if self.world.first:
                self._rescue(hopeless=isinstance(error, NumericalError))
            raise

    def _rescue(self, *, hopeless: bool) -> None:
        """hopeless: the same steps would end in the same way."""
        learner, (saved, _) = self.learner, self.saved
        failed = ""
        if learner.whole and learner.step > max(saved, 0):
            try:
                self.save()
                saved = learner.step
            except (CheckpointError, OSError) as error:
                failed = f"it could not be saved ({error}); "
        kept = "saved" if saved == learner.step else f"the saved state is that of step {saved}"
        again = "Start it again with the same settings and it goes on from there."
        self.say(
            f"{self.run.name}: stopped after step {learner.step} of {self.config.steps}; {failed}"
            f"{'nothing is saved yet' if saved < 0 else kept}.{'' if hopeless else ' ' + again}"
        )
        if learner.whole and learner.step:
            self._leave_product()

    def _leave_product(self) -> None:
        """What was learnt so far, to be used meanwhile; `finish` takes it away."""
        try:
            path = self._export(STOPPED)
        except Exception as error:  # whatever it is, what stopped the run matters more
            self.say(f"what was learnt so far could not be exported ({error}).")
        else:
            self.say(f"what was learnt in these {self.learner.step} steps: {path}")


def product_path(run: Run, kind: str, suffix: str = "") -> Path:
    """Where a run's product lies."""
    return run.folder / kind / f"{run.name}{suffix}.safetensors"


def _gradient(parameter: Tensor) -> Tensor:
    """Zeros where nothing depends on a parameter: it counts as trained in every process alike."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def spoken_time(seconds: float) -> str:
    """ "40 s", "12 min", "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come, instead of dying of it; a second one interrupts at once.

    Outside the main thread signals cannot be caught: there on_step is the way to stop.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def remember(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
