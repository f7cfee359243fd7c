"""A training run from its settings to its product.  Read this first.

`train(config)` is the recipe: find the model and the pictures, open the run, encode everything once
(the encoders then leave), load the network, and give it to the loop.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import lora
from ..checkpoints.header import read_header
from ..checkpoints.layouts import Component
from ..checkpoints.load import component_of, load_mmdit
from ..checkpoints.save import check_room
from ..lora import TrainableLoRA
from ..memory import explained, free_memory
from ..models.mmdit import MMDiT
from ..precision import pick_device, pick_dtype, wide_dtype
from ..settings import FLAGS
from .batches import Batches
from .cache import Cache
from .cache import Progress as CacheProgress
from .config import TrainConfig, plain_settings
from .contents import Contents
from .distributed import World, find_world, joined
from .dpo import ON_TRAINED_PAIRS, DPOTask, spoilt
from .flow import FlowTask, Place
from .loop import OnNote, OnStep, Outcome, Poll, fit, ignore, never, product_path
from .metadata import metadata
from .networks import add_qk_norm, load_to_train, recompute_blocks, write_new_mmdit
from .optimizers import optimizer_package
from .plan import TrainPlan, check_fits, estimate_memory, savings
from .run import Run, open_run, read_log, run_folder
from .samples import SamplePictures, encode_samples
from .stages import Machine, fingerprint_of, model_cache
from .subject import (
    Subject,
    cache_folder,
    find_subject,
    lora_targets,
    patch_pixels,
    small_model,
    zero_encoders,
)
from .validation import chosen

# Settings that a run may change between two starts: where things lie, how a batch is divided, what
# saves memory without changing a number, how a product is written.  The content of files and
# folders is compared instead, and the size of the whole batch.
FREE = (
    *("run_name", "output", "steps", "batch_size", "accumulation", "check_memory"),
    *("gradient_checkpointing", "save_dtype"),
    "prior_weight",  # it stands in the pictures' weights
    *("data", "validation_data", "checkpoint", "tokenizers", *FLAGS),
)

# Entries of a run's identity that have contents.
DATA, HELD = "pictures and captions", "pictures of validation"

# An entry only of runs where it applies: one that an earlier version began is refused if its
# pictures would come in another order now, and goes on if not.
ORDER, MIXED = "order of the pictures", "mixed buckets; earlier versions filled each one up"
# What helps where pictures and captions do not fit; what is encoded already stays.
ENCODING_SAVINGS = ("a smaller resolution", "closing other programs")

OnProgress = Callable[[CacheProgress], None]


def load_base(part: Component, place: Place) -> MMDiT:
    """The network as its file has it."""
    return load_mmdit(part, dtype=place.dtype, device=place.device)


@dataclass(frozen=True)
class Base:
    """The frozen network under a LoRA: as its file has it, or as a host program has changed it.

    changes: what distinguishes it from the file, a line for each; part of the run's identity.
    """

    load: Callable[[Component, Place], MMDiT] = load_base
    changes: tuple[str, ...] = ()


AS_STORED = Base()


def train(
    config: TrainConfig,
    on_step: OnStep = ignore,
    on_note: OnNote = ignore,
    on_progress: OnProgress = ignore,
    base: Base = AS_STORED,
    poll: Poll = never,
) -> Outcome:
    """Train, or go on, or return what is finished.

    on_step: after each step; what it raises stops the run, saved.  on_note: receives sentences.
    on_progress: while pictures and captions are encoded.  base: where another program holds the
    network that a LoRA is trained on.  poll: how a host interrupts, see loop.Poll.  Under torchrun
    each process calls this.
    Raises ValueError for settings, CheckpointError for files, RunRefused when the run of this name
    is another one or is being trained, NumericalError when the loss is no longer a number, and
    OutOfMemory, saved, when a step does not fit.
    """
    world = find_world()
    say = on_note if world.first else ignore
    place = pick_place(config, world)
    run_folder(config.output, config.run_name)
    optimizer_package(config)
    subject = find_subject(config, poll)
    for line in subject.dataset.report.lines():
        say(line)
    if config.method == "dpo" and config.validate_every and subject.held is None:
        say(ON_TRAINED_PAIRS)
    if config.validation_data and not config.validate_every:
        say("nothing is measured on the pictures of validation: validate_every is 0")
    for name in zero_encoders(config, subject.parts):
        say(f"{name} is not among the files: zeros stand for it, here and wherever this is used")
    with joined(world, place.device), opened(config, world) as run:
        if world.first:
            asked = identity(config, subject, world, base)
            run.settle(asked, config.steps, plain_settings(config), contents(subject))
        if (outcome := finished(config, run, world)) is not None:
            say(f"{run.name}: is finished; nothing was computed")
            if outcome.stopped:
                say(f"{run.name}: {outcome.stopped}")
            return outcome
        config = with_new_mmdit(config, subject, run, world)
        cache = model_cache_of(config, place, say)
        check_memory(config, subject, cache.layout.length, place)
        pictures = None
        with explained("encoding pictures and captions", *ENCODING_SAVINGS):
            if world.first and config.sample_every:
                schedule, resolution = subject.schedule, subject.resolution
                pictures = encode_samples(config, schedule, resolution, poll, say)
            encode_all(cache, subject, place, say, on_progress)
        with explained("training", *savings(config)):
            task = make_task(config, subject, cache, place, pictures, base, poll)
            tell_plan(config, subject, task, cache.layout.length, run, say)
            return fit(task, run, config, world, on_step, on_note, task.verdict, task.acceptable)


def pick_place(config: TrainConfig, world: World) -> Place:
    """The device of this process, and the dtype it computes in."""
    device = pick_device(config.device)
    if device.type == "cuda" and world.size > 1:
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    return Place(device, pick_dtype(config.dtype, device), world)


@contextmanager
def opened(config: TrainConfig, world: World) -> Iterator[Run]:
    """The run's folder: locked by the first process, looked at by the others."""
    if world.first:
        with open_run(config.output, config.run_name) as run:
            world.wait()
            yield run
    else:
        world.wait()
        yield Run(run_folder(config.output, config.run_name))


def identity(
    config: TrainConfig, subject: Subject, world: World, base: Base = AS_STORED
) -> dict[str, Any]:
    """What makes this run the one it is, as JSON holds it."""
    settings = {k: v for k, v in plain_settings(config).items() if k not in FREE}
    size = global_batch(config, world)
    return {
        **settings,
        "samples of a step": size,
        **({ORDER: MIXED} if subject.dataset.mixes(size) else {}),
        DATA: subject.dataset.digest,
        HELD: subject.held.digest if subject.held else None,
        **{f"weights of {kind}": fingerprint_of(part) for kind, part in subject.parts.items()},
        "changes of the network": list(base.changes),
    }


def contents(subject: Subject) -> dict[str, Contents]:
    """What stands behind the hashes of an identity."""
    return {
        DATA: subject.dataset.contents,
        HELD: subject.held.contents if subject.held else {},
    }


def global_batch(config: TrainConfig, world: World) -> int:
    return config.batch_size * config.accumulation * world.size


def finished(config: TrainConfig, run: Run, world: World) -> Outcome | None:
    """The outcome of a run that has nothing left to do."""
    product = product_path(run, "lora" if config.trains_lora else "model")
    best = product_path(run, product.parent.name, "-best")
    done = config.steps in run.states() and product.exists() and stored_as(config, product)
    if not world.share(int(done)):
        return None
    stopped = spoilt(read_log(run.folder), config) if config.method == "dpo" else ""
    return Outcome(product, best if best.exists() else None, config.steps, run.folder, stopped)


def stored_as(config: TrainConfig, product: Path) -> bool:
    """Whether a product has the precision that is asked for; else it is written again."""
    told = json.loads(read_header(product).metadata.get("sd3_workbench.training", "{}"))
    return told.get("save_dtype") == config.save_dtype


def with_new_mmdit(config: TrainConfig, subject: Subject, run: Run, world: World) -> TrainConfig:
    """The configuration with the new network, not yet trained, as a file of the run."""
    if config.method != "scratch":
        return config
    path = run.folder / "state" / "untrained.safetensors"
    if world.first and not path.exists():
        base = max(1, round(subject.resolution / patch_pixels(subject)))
        write_new_mmdit(
            path, subject.mmdit, base=base, seed=config.seed, metadata=small_model(subject)
        )
    world.wait()
    return replace(config, mmdit=path)


def model_cache_of(config: TrainConfig, place: Place, say: OnNote = ignore) -> Cache:
    """Where latents and text embeddings of this run are, or will be."""
    machine = Machine(place.device, wide_dtype(place.dtype, place.device))
    return model_cache(
        cache_folder(config),
        config.files,
        machine,
        use=config.use,
        t5_length=config.t5_length,
        say=say,
    )


def check_memory(config: TrainConfig, subject: Subject, text_tokens: int, place: Place) -> None:
    """Before the encoders work: refuse a run that would not fit without its frozen weights either.

    Those may lie on another device, or in their mapped file, until the network is loaded; tell_plan
    counts what there is then.  Raises ValueError.
    """
    with torch.device("meta"):
        model = MMDiT(subject.mmdit)
    trained = add_lora(model, config) if config.trains_lora else model
    parameters = dict(trained.named_parameters())
    tokens = most_tokens(subject, text_tokens)
    estimate = estimate_memory(model, parameters, config, tokens=tokens, dtype=place.dtype)
    frozen = estimate.weights if config.trains_lora else 0.0
    check_fits(estimate, frozen, free_memory(place.device), config)


def most_tokens(subject: Subject, text_tokens: int) -> int:
    """Of the largest sample: text and image."""
    largest = max(width * height for width, height in subject.dataset.report.buckets)
    return largest // patch_pixels(subject) ** 2 + text_tokens


def encode_all(
    cache: Cache, subject: Subject, place: Place, say: OnNote, on_progress: OnProgress
) -> None:
    """Latents and text embeddings of everything; the encoders and the VAE are gone afterwards."""
    if place.world.first:
        for dataset in (subject.dataset, subject.held):
            if dataset is not None:
                for line in cache.prepare(dataset, on_progress=on_progress).lines():
                    say(line)
    place.world.wait()


def make_task(
    config: TrainConfig,
    subject: Subject,
    cache: Cache,
    place: Place,
    pictures: SamplePictures | None,
    base: Base = AS_STORED,
    poll: Poll = never,
) -> FlowTask:
    """What the loop is given: the network, its samples and its loss."""
    part = component_of(config.mmdit or subject.parts["mmdit"], "mmdit")
    model, adapters = network_to_train(part, config, place, base)
    kind = DPOTask if config.method == "dpo" else FlowTask
    return kind(
        model,
        adapters,
        subject.objective,
        Batches(subject.dataset, cache, config),
        chosen(subject.held or subject.dataset, config.validation_items),
        config,
        place,
        lambda step: metadata(config, subject, cache, step, base.changes),
        **({} if pictures is None else {"draw_samples": pictures.draw}),
        poll=poll,
    )


def network_to_train(
    part: Component, config: TrainConfig, place: Place, base: Base = AS_STORED
) -> tuple[MMDiT, TrainableLoRA | None]:
    """The network on its device; the LoRA on it, unless the network itself is trained."""
    adapters = None
    if config.trains_lora:
        model = base.load(part, place)
        adapters = add_lora(model, config)
    else:
        model = load_to_train(part, place.device)
        _settle_qk_norm(model, config)
    if config.gradient_checkpointing:
        recompute_blocks(model, random=config.lora_dropout > 0)
    return model, adapters


def add_lora(model: MMDiT, config: TrainConfig) -> TrainableLoRA:
    return lora.add(
        model,
        lora_targets(model, config),
        rank=config.rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        generator=torch.Generator().manual_seed(config.seed),
    )


def _settle_qk_norm(model: MMDiT, config: TrainConfig) -> None:
    if config.qk_norm and not model.config.qk_norm:
        add_qk_norm(model)
        model.requires_grad_(True)


def tell_plan(
    config: TrainConfig,
    subject: Subject,
    task: FlowTask,
    text_tokens: int,
    run: Run,
    say: OnNote,
) -> None:
    """Say what the run will take.  Raises ValueError when it cannot fit."""
    world, device = task.place.world, task.place.device
    tokens = most_tokens(subject, text_tokens)
    parameters = task.parameters
    estimate = estimate_memory(
        task.model, parameters, config, tokens=tokens, dtype=task.place.dtype
    )
    size, free = global_batch(config, world), free_memory(device)
    plan = TrainPlan(
        trained=sum(parameter.numel() for parameter in parameters.values()),
        steps=config.steps,
        done=max(run.states(), default=0),
        global_batch=size,
        pictures=len(subject.dataset.items),
        pairs=config.method == "dpo",
        epochs=config.steps / subject.dataset.epoch(size),
        filled=subject.dataset.filled(size),
        estimate=estimate,
        free=free,
    )
    for line in plan.lines():
        say(line)
    loaded = estimate.weights + sum(parameter.nbytes for parameter in parameters.values())
    check_fits(estimate, min(loaded, estimate.total), free, config)
    if world.first:
        saves = 1 + (config.steps - plan.done) // config.checkpoint_every
        # Those kept, the best one, and one that is written before the oldest is dropped.
        states = min(saves, max(config.keep + 2 - len(run.states()), 1))
        check_room(run.folder, states * estimate.trained)
