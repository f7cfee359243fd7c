"""A sweep from files on disk: models and prompts are read once, then every cell is drawn.

The pictures of a cell are those that `generate` draws with its settings, bit for bit.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..generate import (
    KnownPrompts,
    decode,
    denoiser,
    encode_with,
    keep_masked,
    sample_with,
    start_latents,
    step_cache,
    text_encoders,
)
from ..measures import Meter, Trail
from ..pictures import to_uint8
from ..samplers import Step
from ..settings import Files, Plan, Settings, make_plan
from ..text.encoders import ENCODERS, EncodedPrompt, TextEncoders
from .axes import Cell, Layout, by_strength, check_axes
from .sheet import labelled
from .table import Run, Table, judged, make_table

OnStep = Callable[[Cell, Step], None]
SETTING = {"encoders": "use"}  # axis -> field of Settings, where they differ


Words = tuple[EncodedPrompt, EncodedPrompt]  # prompt and negative prompt


@dataclass(frozen=True)
class Drawn:
    x0: Tensor  # [B, C, H, W] in model space
    run: Run


@dataclass(frozen=True)
class Sweep:
    pictures: tuple[Tensor, ...]  # of each cell, uint8 [B, H, W, 3]
    sheet: Tensor  # uint8 [H, W, 3]
    table: Table
    notes: tuple[str, ...]


def sweep(
    files: Files,
    settings: Settings,
    layout: Layout,
    on_step: OnStep | None = None,
    known: KnownPrompts | None = None,
) -> Sweep:
    """Draw every cell; files and settings hold what does not vary.

    lora_strength multiplies the strengths of all LoRAs.  on_step, known: as for `generate`.
    Raises CheckpointError and ValueError, for whichever cell, before any weight is read;
    NumericalError when a stage overflows.
    """
    with torch.inference_mode(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        plans = make_plans(files, settings, layout)
        first = plans[layout.cells[0].number]
        prompts = encode_all(files, layout, plans, known)
        start = start_latents(first)
        drawn: dict[int, Drawn] = {}
        for cells in by_strength(layout.cells):
            drawn |= draw_cells(cells, plans, prompts, start, on_step)
        inside = [drawn[cell.number] for cell in layout.cells]
        images = decode(first, torch.cat([one.x0 for one in inside])).split(first.latent_shape[0])
        pictures = tuple(keep_masked(to_uint8(some), first) for some in images)
        prompt, notes = judged(first.parts["mmdit"].metadata, settings.prompt)
        table = make_table(layout, [one.run for one in inside], pictures, prompt)
    if not layout.values_of("encoders"):  # else each cell says which of them are off
        said = [str(warning.message) for warning in warned if warning.category is UserWarning]
        both = prompts[layout.cells[0].number]
        notes = (*notes, *dict.fromkeys([*said, *(note for one in both for note in one.notes)]))
    return Sweep(pictures, labelled(layout, pictures), table, notes)


def make_plans(files: Files, settings: Settings, layout: Layout) -> dict[int, Plan]:
    """Each cell's, by its number; what is open is the same for all.

    Raises CheckpointError and ValueError.
    """
    settings = make_plan(files, settings).settings  # skip-layer guidance has a cfg of its own
    plans = {cell.number: make_plan(*with_choice(files, settings, cell)) for cell in layout.cells}
    first = plans[layout.cells[0].number]
    check_axes(
        layout,
        depth=first.mmdit.depth,
        encoders=[name for name in ENCODERS if name in first.parts],
        loras=bool(files.loras),
        skip_scale=first.settings.skip_scale,
        skip_layers=first.settings.skip_layers or (),
    )
    return plans


def with_choice(files: Files, settings: Settings, cell: Cell) -> tuple[Files, Settings]:
    """What draws this cell alone."""
    choice = dict(cell.choice)
    factor = choice.pop("lora_strength", None)
    if factor is not None:
        loras = tuple((path, strength * factor) for path, strength in files.loras)
        files = replace(files, loras=loras)
    changes = {SETTING.get(name, name): value for name, value in choice.items()}
    return files, replace(settings, **changes)


def encode_all(
    files: Files, layout: Layout, plans: Mapping[int, Plan], known: KnownPrompts | None
) -> dict[int, Words]:
    """Prompt and negative prompt for every cell, each set of encoders run once.

    A network is read once, and again only where a LoRA changes it; all are gone at the end.
    """
    used = tuple(name for name in ENCODERS if any(name in p.settings.use for p in plans.values()))
    readers: dict[object, TextEncoders] = {}
    encoded: dict[object, Words] = {}
    found = {}
    for cell in layout.cells:
        plan = plans[cell.number]
        loras = tuple(
            strength
            for lora, strength in plan.loras
            if any(kind in lora.parts for kind in ENCODERS)
        )
        if loras not in readers:
            every = replace(plan, settings=replace(plan.settings, use=used))
            readers[loras] = text_encoders(files, every, known)
        key = loras, plan.settings.use
        if key not in encoded:
            encoded[key] = encode_with(readers[loras], plan.settings)
        found[cell.number] = encoded[key]
    return found


def draw_cells(
    cells: Sequence[Cell],
    plans: Mapping[int, Plan],
    prompts: Mapping[int, Words],
    start: Tensor,
    on_step: OnStep | None,
) -> dict[int, Drawn]:
    """Those of one state of the weights; the MMDiT is gone when this returns."""
    plan = plans[cells[0].number]
    model = denoiser(plan)
    drawn: dict[int, Drawn] = {}
    for cell in cells:
        plan, (positive, negative) = plans[cell.number], prompts[cell.number]
        words = positive.conditioning, negative.conditioning
        if not drawn:  # one step for nothing, so that the first cell is not slower than the others
            sample_with(model, replace(plan, sigmas=plan.sigmas[-2:]), *words, start)
        trail, meter = Trail(), Meter(plan.device)

        def watch(step: Step, cell: Cell = cell, trail: Trail = trail) -> None:
            trail.on_step(step)
            if on_step is not None:
                on_step(cell, step)

        x0 = sample_with(model, plan, *words, start, watch, cache=step_cache(plan))
        seconds, memory = meter.spent()
        trail.end(x0)
        drawn[cell.number] = Drawn(x0, Run.of(trail.points, seconds, memory))
    return drawn
