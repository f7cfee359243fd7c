"""python -m sd3_core generate | verify | inspect | export | train | score | check | tiny | study |
bench"""

import argparse
import io
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import NumericalError, OutOfMemory, quoted

if TYPE_CHECKING:
    from .settings import Files
    from .training.cache import Progress as CacheProgress
    from .training.loop import Progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.  Exit status: 0, 1 (verify: not equal), 2 (refused) or 130 (stopped)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a narrow code page must not end a command
            stream.reconfigure(errors="backslashreplace")
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, NumericalError, OutOfMemory, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        from .memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(
            "error: the memory is full. Draw smaller or fewer pictures (--width, --height, "
            "--batch), close other programs, or compute on another device (--device cpu).",
            file=sys.stderr,
        )
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m sd3_core", description="Stable Diffusion 3")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add_generate(commands.add_parser("generate", help="draw a prompt"))
    add_verify(commands.add_parser("verify", help="draw a picture again from its own settings"))
    add_inspect(commands.add_parser("inspect", help="say what a model file is"))
    add_export(commands.add_parser("export", help="write networks as one file, as released"))
    add_train(commands.add_parser("train", help="teach a LoRA or a small model"))
    add_score(commands.add_parser("score", help="count what a model of the small world gets right"))
    add_check(commands.add_parser("check", help="read a picture of the small world"))
    add_tiny(commands.add_parser("tiny", help="make the embedded model again, stage by stage"))
    add_study(commands.add_parser("study", help="the SD3 paper's claims in miniature, measured"))
    add_bench(commands.add_parser("bench", help="measure against other implementations"))
    return top


def add_files(command: argparse.ArgumentParser, loras: bool = True) -> None:
    group = command.add_argument_group("files", "a file named for one network wins")
    for flag, meaning in (
        (
            "--checkpoint",
            "single file, or diffusers folder, with all or some of the networks; "
            "default: the embedded model, which draws coloured shapes",
        ),
        ("--mmdit", "the denoiser"),
        ("--vae", "the VAE"),
        ("--clip-l", "text encoder CLIP-L"),
        ("--clip-g", "text encoder CLIP-G"),
        ("--t5", "text encoder T5"),
        ("--tokenizers", "folder of tokenizers, if neither the checkpoint nor ComfyUI has them"),
    ):
        group.add_argument(flag, type=Path, metavar="PATH", help=meaning)
    command.set_defaults(lora=[])
    if not loras:
        return
    group.add_argument(
        "--lora",
        type=lora_strength,
        action="append",
        metavar="PATH[=0.8]",
        help="merge a LoRA (a file, or a folder of PEFT or diffusers) at this strength (1 if none "
        "is given); may be given several times",
    )


def add_generate(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_generate)
    command.add_argument("prompt", help="what to draw; (word:1.3) weighs a word")
    command.add_argument("-o", "--output", type=Path, metavar="OUT.png")
    add_files(command)
    add = command.add_argument_group("picture").add_argument
    add("--negative", default="", metavar="TEXT", help="what not to draw")
    add("--prompt-clip-g", metavar="TEXT", help="another prompt for CLIP-G")
    add("--prompt-t5", metavar="TEXT", help="another prompt for T5")
    add("--width", type=int, help="pixels; default: those of --init, or the model's own")
    add("--height", type=int)
    add("--batch", type=int, default=1, help="pictures at once")
    add("--seed", type=int, help="default: drawn by chance, and stored in the picture")
    add("--seed-each", action="store_true", help="picture i of a batch as if alone with seed + i")
    add("--init", type=Path, metavar="PICTURE", help="start from this picture (see --denoise)")
    add("--mask", type=Path, metavar="PICTURE", help="white is drawn anew, black is kept")
    add("--denoise", type=float, default=1.0, help="how much of --init is redrawn, 0 to 1")
    add = command.add_argument_group("sampling", "defaults: the model's preset").add_argument
    add("--steps", type=int)
    add("--cfg", type=float, help="guidance scale; 1 turns guidance off, 0 the prompt")
    add("--cfg-start", type=float, default=0.0, help="guide from this part of the run, 0 to 1")
    add("--cfg-end", type=float, default=1.0)
    add("--shift", help="a number, or auto: the model's own, scaled to the picture's size")
    add("--scheduler", metavar="NAME", help="such as normal; a wrong name lists them all")
    add("--sampler", metavar="NAME", help="such as dpmpp_2m; a wrong name lists them all")
    add("--skip-scale", type=float, default=0.0, help="skip-layer guidance (SD3.5 Medium: 2.5)")
    add("--skip-layers", type=block_list, metavar="7,8,9")
    add("--skip-start", type=float)
    add("--skip-end", type=float)
    add = command.add_argument_group(
        "approximations", "faster, not the same picture; --cfg-end is another"
    ).add_argument
    add(
        "--step-cache",
        type=float,
        default=0.0,
        metavar="CHANGE",
        help="leave steps out while the velocity changes less than this in all; try 0.05",
    )
    add("--fp8", action="store_true", help="multiply in float8; needs a GPU that can")
    add("--measure", action="store_true", help="sample without them too, and tell the distance")
    add = command.add_argument_group("words").add_argument
    add("--no-clip-l", action="store_true", help="this encoder gives zeros")
    add("--no-clip-g", action="store_true")
    add("--no-t5", action="store_true")
    add("--t5-length", default="auto", help="least T5 tokens: auto, 154, 256, 512")
    add("--no-prompt-cache", action="store_true", help="encode again, and keep nothing on disk")
    add = command.add_argument_group("machine").add_argument
    add("--dtype", default="auto", help="auto, bf16, fp16, fp32")
    add("--device", default="auto", help="auto, cuda, mps, cpu")
    add(
        "--launch",
        default="plain",
        metavar="WAY",
        help="how blocks are started: plain; graph (CUDA); compile (needs a compiler)",
    )


def add_verify(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_verify)
    command.add_argument("picture", type=Path)
    command.add_argument(
        "--allow",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="also open what the picture names in this folder; may be given several times; without "
        "it only files in the picture's own folder and in those of the files given below",
    )
    add_files(command)


def add_inspect(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_inspect)
    command.add_argument("file", type=Path)
    command.add_argument("--json", action="store_true")


def add_export(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_export)
    command.add_argument("output", type=Path, metavar="OUT.safetensors")
    add_files(command, loras=False)


def add_train(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_train)
    command.add_argument("config", type=Path, nargs="?", metavar="CONFIG.toml")
    add = command.add_argument
    add(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change one setting; VALUE as in TOML; may be given several times",
    )
    add(
        "--from-kohya",
        type=Path,
        metavar="FILE.toml",
        help="print a sd-scripts configuration as ours, and what of it is not used",
    )


def add_score(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_score)
    add_files(command)
    add = command.add_argument
    add("--seeds", type=int, default=4, help="pictures of each prompt; default 4")
    add("--prompts", type=int, metavar="N", help="only the first N prompts of each category")
    add("--steps", type=int)
    add("--cfg", type=float)
    add("--shift", type=float)
    add("--sampler", metavar="NAME")
    add("--size", type=int, metavar="PIXELS", help="width and height; default: the model's own")
    add("--no-clip-l", action="store_true", help="this encoder gives zeros")
    add("--no-clip-g", action="store_true")
    add("--no-t5", action="store_true")
    add("--dtype", default="auto")
    add("--device", default="auto")
    add("--json", type=Path, metavar="FILE", help="write the counts")


def add_check(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_check)
    command.add_argument("picture", type=Path)
    command.add_argument("prompt", help="what it should show")


TINY_STAGES = (
    "words, basis, vae, clip, t5, shelves, flow-64, flow-128, pack; all of them: all; "
    "the shipped model's own, to go on from: unpack"
)


def add_tiny(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_tiny)
    add = command.add_argument
    add("stage", help=TINY_STAGES)
    add("--budget", default="laptop", help="laptop (two to three hours of two cores) or gpu")
    add("--output", type=Path, default=Path("output"), metavar="FOLDER")
    add("--dtype", default="auto", help="auto, bf16, fp32; bf16 is faster on many CPUs, too")
    add("--device", default="auto")
    add("--compile", action="store_true", help="compile the MMDiT's blocks; needs a C++ compiler")
    add("--name", metavar="NAME", help="of what pack makes; default: sd3-tiny-local")
    add(
        "--scenes-from",
        type=int,
        default=0,
        metavar="N",
        help="shelves and flow-*: pictures that begin at this number, not at 0",
    )


def add_study(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_study)
    add = command.add_argument
    add("rows", nargs="*", metavar="ROW", help="densities, objectives, ...: all; list shows them")
    add("--budget", default="half-hour", help="half-hour (of one core), night (two cores) or gpu")
    add("--minutes", type=float, help="stop then; the next start goes on from there")
    add("--seeds", type=int, help="at least 3; default: the budget's")
    add("--output", type=Path, default=Path("output"), metavar="FOLDER", help="for what is learnt")
    add(
        "--report",
        type=Path,
        default=Path("output/study"),
        metavar="FOLDER",
        help="for paper.md, paper.csv and the figures",
    )
    add("--dtype", default="auto", help="auto, bf16, fp32; bf16 is faster on many CPUs, too")
    add("--device", default="auto")
    add_files(command, loras=False)


def add_bench(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_bench)
    add = command.add_argument
    add("cases", nargs="*", metavar="CASE", help="load, forward, step, sample, decode, ...: all")
    add(
        "--gpu-plan",
        action="store_true",
        help="a GPU's limits, then the released sizes on it, in ten minutes; with --quick the same "
        "on small networks, to try it on any device",
    )
    add("--compiled", action="store_true", help="also ours and diffusers compiled block by block")
    add("--quick", action="store_true", help="small cases, in a minute or two")
    add("--reference", type=Path, metavar="PATH", help="Stability's sd3.5 code, to compare with")
    add("--size", default="100mb", help="file of the load case: 100mb, 1gb, 4gb, 16gb")
    add("--rounds", type=int, help="how often each is timed; default 5, with --quick 3 (load: 1)")
    add("--threads", type=int)
    add("--device", default="cpu")
    add("--json", type=Path, metavar="FILE", help="write all numbers")
    add("--plot", type=Path, metavar="FILE", help="draw them; needs matplotlib")


def run_generate(options: argparse.Namespace) -> int:
    from .generate import generate
    from .pictures import save_png
    from .settings import Settings
    from .speed.gains import sentence
    from .speed.prompts import users_cache

    settings = Settings(
        prompt=options.prompt,
        negative=options.negative,
        prompt_clip_g=options.prompt_clip_g,
        prompt_t5=options.prompt_t5,
        use=chosen_encoders(options),
        t5_length=int(options.t5_length) if options.t5_length.isdecimal() else options.t5_length,
        width=options.width,
        height=options.height,
        batch=options.batch,
        seed_each=options.seed_each,
        seed=secrets.randbelow(2**32) if options.seed is None else options.seed,
        steps=options.steps,
        cfg=options.cfg,
        cfg_start=options.cfg_start,
        cfg_end=options.cfg_end,
        shift=options.shift,
        scheduler=options.scheduler,
        sampler=options.sampler,
        skip_scale=options.skip_scale,
        skip_layers=options.skip_layers,
        skip_start=options.skip_start,
        skip_end=options.skip_end,
        init=options.init,
        mask=options.mask,
        denoise=options.denoise,
        dtype=options.dtype,
        device=options.device,
        step_cache=options.step_cache,
        fp8=options.fp8,
    )
    outputs = output_files(options.output, options.batch)
    known = None if options.no_prompt_cache else users_cache()
    files = drawing_files(options)
    result = generate(files, settings, progress(), known, options.launch, options.measure)
    outputs = [
        save_png(pixels, path, result.record | {"index": index})
        for index, (pixels, path) in enumerate(zip(result.pixels, outputs, strict=True))
    ]
    for note in (*result.notes, *world_notes(files, settings.prompt)):
        print(f"note: {note}")
    print("tokens: " + ", ".join(f"{name} {count}" for name, count in result.tokens.items()))
    print(f"seed: {settings.seed}")
    print(sentence(result.gains))
    if result.distance is not None:
        print(f"distance: {result.distance:.4f} of the latents' size without approximations")
    for path in outputs:
        print(path)
    return 0


def run_verify(options: argparse.Namespace) -> int:
    from .verify import verify

    def on_files(files: list[Path]) -> None:
        print("".join(f"opens {path}\n" for path in files), end="", file=sys.stderr)

    comparison = verify(options.picture, chosen_files(options), progress(), options.allow, on_files)
    print(comparison.sentence())
    return 0 if comparison.equal else 1


LARGEST_PICTURE = 4 * 2**20  # bytes of a PNG of a megapixel that cannot be pressed
LARGEST_TABLE = 2**20
GPU_PLAN = 570.0  # seconds, start and end of processes included


def run_bench(options: argparse.Namespace) -> int:
    import json

    from .bench import cases, ceilings, report, run
    from .checkpoints.save import check_room, save_bytes
    from .precision import pick_device

    for path in filter(None, (options.json, options.plot)):
        check_room(path, LARGEST_TABLE)
    if options.plot:
        report.check_plot()
    chosen = cases.choose(options.cases, options.quick, options.size)
    compiled = "inductor" if options.compiled else ""
    limits: dict[str, float] = {}
    if options.gpu_plan:
        chosen = list(cases.gpu_cases(tiny=options.quick))
        compiled = "eager" if options.quick else "inductor"
        if not options.quick and options.device == "cpu":
            options.device = "cuda"
        device = pick_device(options.device)
        small = options.quick
        limits = ceilings.measure(device, 256, 64) if small else ceilings.measure(device)
    elif options.device == "cpu":
        limits = ceilings.of_cpu()
    how = run.Options(
        in_turn=options.gpu_plan,
        compiled=compiled,
        limit=GPU_PLAN if options.gpu_plan else None,
        ceilings=limits,
        reference=options.reference,
        device=options.device,
        threads=options.threads,
        rounds=options.rounds or (3 if options.quick else 5),
        load_rounds=options.rounds or (1 if options.quick else 5),
    )
    where = run.surroundings(how)
    print(", ".join(f"{name} {value}" for name, value in where.items()), flush=True)
    print("\n".join(ceilings.lines(limits)))
    print(report.legend(where), flush=True)
    outcomes: list[run.Outcome] = []
    for outcome in run.run_cases(chosen, how):
        outcomes.append(outcome)
        print("\n".join(report.lines(outcome)), flush=True)
    print("\n".join(report.growth_lines(report.growths(outcomes))))
    if options.json:
        values = report.as_json_report(where, outcomes, limits)
        save_bytes(options.json, (json.dumps(values, indent=1) + "\n").encode())
    if options.plot:
        report.plot(options.plot, outcomes)
    behind = [sentence for outcome in outcomes for sentence in report.slower(outcome)]
    print("\n".join(behind))
    return 1 if behind or any(outcome.failed for outcome in outcomes) else 0


def run_inspect(options: argparse.Namespace) -> int:
    from .checkpoints.inspect import inspect

    report = inspect(options.file)
    print(report.to_json() if options.json else "\n".join(report.lines()))
    return 0


def run_export(options: argparse.Namespace) -> int:
    from .checkpoints.save import export_checkpoint
    from .settings import find_networks

    if options.output.suffix != ".safetensors":
        raise ValueError(f"{options.output}: name it {options.output.stem}.safetensors.")
    if options.output.exists():
        raise ValueError(f"{options.output}: is there already; name another file, or remove it.")
    files = chosen_files(options)
    parts = find_networks(files)
    if not parts:
        raise ValueError("nothing to write: name the networks, e.g. --checkpoint FOLDER.")
    from .checkpoints.family import told_to_a_single_file
    from .checkpoints.load import read_config
    from .generate import stored_tokenizers
    from .models.mmdit import MMDiTConfig

    metadata: dict[str, str] = {}
    if "mmdit" in parts and isinstance(config := read_config(parts["mmdit"]), MMDiTConfig):
        metadata = told_to_a_single_file(parts["mmdit"], config, options.output.name)
    path = export_checkpoint(options.output, parts, metadata, stored_tokenizers(files))
    print(f"{path}: {', '.join(parts)}")
    return 0


def run_train(options: argparse.Namespace) -> int:
    from .training.config import make_config, read_settings
    from .training.trainer import train

    if options.from_kohya is not None:
        return print_from_kohya(options.from_kohya)
    if options.config is None:
        raise ValueError("name the settings of the run: train CONFIG.toml")
    config = make_config(read_settings(options.config) | dict(options.set))
    bar = TrainingBar()
    try:
        outcome = train(config, bar.on_step, bar.on_note, bar.on_progress)
    except KeyboardInterrupt:
        return 130
    finally:
        bar.close()
    print(outcome.product)
    return 0


def run_score(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .checkpoints.save import check_room
    from .embedded.drawing import Painter
    from .embedded.score import run_score as score
    from .settings import Settings

    settings = Settings(
        prompt="",
        use=chosen_encoders(options),
        width=options.size,
        height=options.size,
        steps=options.steps,
        cfg=options.cfg,
        shift=options.shift,
        sampler=options.sampler,
        dtype=options.dtype,
        device=options.device,
    )
    if options.json:
        check_room(options.json, LARGEST_TABLE)
    painter = Painter(drawing_files(options), settings)
    with tqdm(unit="picture") as bar:

        def on_batch(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        table = score(
            painter,
            seeds=options.seeds,
            per_category=options.prompts,
            output=options.json,
            on_batch=on_batch,
        )
    print(table.text())
    return 0


def run_check(options: argparse.Namespace) -> int:
    from .embedded.model import check
    from .pictures import read_image

    print(check(read_image(options.picture), options.prompt))
    return 0


def run_tiny(options: argparse.Namespace) -> int:
    from .embedded.stages.make import BUDGETS, IN_ORDER, LOCAL, STAGES, Maker

    if options.budget not in BUDGETS:
        raise ValueError(f"budget is {quoted(options.budget)}; choose {' or '.join(BUDGETS)}.")
    stages = list(IN_ORDER) if options.stage == "all" else [options.stage]
    if not set(stages) <= set(STAGES):
        raise ValueError(f"stage is {quoted(options.stage)}; choose {', '.join(STAGES)} or all.")
    if options.scenes_from < 0:
        raise ValueError(f"scenes-from is {options.scenes_from}; give a number from 0.")
    bar = TrainingBar()
    maker = Maker(
        options.output,
        BUDGETS[options.budget],
        options.device,
        options.dtype,
        options.compile,
        options.name or LOCAL,
        options.scenes_from,
        on_step=bar.on_step,
        on_note=bar.on_note,
    )
    try:
        for stage in stages:
            path = STAGES[stage](maker)
            bar.close()
            print(path)
    finally:
        bar.close()
    return 0


def run_study(options: argparse.Namespace) -> int:
    from .precision import pick_device, pick_dtype
    from .study.budgets import find_budget
    from .study.lab import Lab, budgeted
    from .study.report import text_table
    from .study.rows import ROWS, find_rows
    from .study.run import run_study as study
    from .study.run import with_seeds

    if options.rows == ["list"]:
        print("\n".join(f"{row.name:<16} {row.title}" for row in ROWS.values()))
        return 0
    rows, budget = find_rows(options.rows), with_seeds(find_budget(options.budget), options.seeds)
    if options.minutes is not None and not options.minutes > 0:
        raise ValueError(f"minutes is {options.minutes}; give a number above 0, such as 30.")
    device = pick_device(options.device)
    bar = TrainingBar()
    lab = Lab(
        options.output,
        device,
        pick_dtype(options.dtype, device),
        drawing_files(options),
        on_progress=bar.on_named_step,
    )

    def on_cell(row: str, what: str, done: int, total: int) -> None:
        if what:
            bar.on_note(f"{row} {done + 1} of {total}: {what}")

    try:
        done = study(
            rows, options.budget, budget, budgeted(lab, options.minutes), options.report, on_cell
        )
    finally:
        bar.close()
    chosen = [outcome for outcome in done.outcomes if outcome.row in rows]
    print(text_table(chosen))
    for note in done.notes:
        print(f"note: {note}")
    for path in done.files:
        print(path)
    return 0


def print_from_kohya(path: Path) -> int:
    from .training.kohya import translate

    translated = translate(path)
    print(translated.toml(ascii_only=not is_utf8(sys.stdout)))
    for line in translated.ignored:
        print(f"not used: {line}", file=sys.stderr)
    for line in translated.notes:
        print(f"note: {line}", file=sys.stderr)
    for line in translated.defaults:
        print(f"by default there: {line}", file=sys.stderr)
    return 0


def is_utf8(stream: Any) -> bool:
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "") == "utf8"


def chosen_files(options: argparse.Namespace) -> "Files":
    from .settings import Files

    return Files(
        checkpoint=options.checkpoint,
        mmdit=options.mmdit,
        vae=options.vae,
        clip_l=options.clip_l,
        clip_g=options.clip_g,
        t5=options.t5,
        tokenizers=options.tokenizers,
        loras=tuple(options.lora),
    )


def drawing_files(options: argparse.Namespace) -> "Files":
    """The files that were named; the embedded model where no network was."""
    from .embedded.model import FILE
    from .settings import FLAGS

    files = chosen_files(options)
    if files.checkpoint or any(getattr(files, kind) for kind in FLAGS):
        return files
    return replace(files, checkpoint=FILE)


def world_notes(files: "Files", prompt: str) -> list[str]:
    """What the embedded model has to say of a prompt."""
    from .embedded.model import note
    from .settings import find_networks

    said = note(find_networks(files)["mmdit"].metadata, prompt)
    return [said] if said else []


def chosen_encoders(options: argparse.Namespace) -> tuple[str, ...]:
    return tuple(n for n in ("clip_l", "clip_g", "t5") if not getattr(options, f"no_{n}"))


def output_files(asked: Path | None, batch: int) -> list[Path]:
    """Where the pictures will lie.  Raises ValueError now when nothing could be written there."""
    from .checkpoints.save import check_room

    if asked is None:
        taken = (re.fullmatch(r"sd3_(\d+)(-\d+)?\.png", path.name) for path in Path().iterdir())
        number = 1 + max((int(name[1]) for name in taken if name), default=0)
        asked = Path(f"sd3_{number:04}.png")
    if asked.is_dir():
        raise ValueError(f"{asked}: is a folder; name a picture in it.")
    if asked.suffix.lower() != ".png":
        raise ValueError(f"{asked}: pictures are written as PNG; give a name that ends in .png.")
    if not asked.parent.is_dir():
        raise ValueError(f"{asked.parent}: there is no such folder to write {asked.name} into.")
    check_room(asked, batch * LARGEST_PICTURE)
    if batch <= 1:
        return [asked]
    return [asked.with_stem(f"{asked.stem}-{index}") for index in range(1, batch + 1)]


def lora_strength(text: str) -> tuple[Path, float]:
    """ "style.safetensors=0.8" -> (path, strength)."""
    path, equals, strength = text.rpartition("=")
    try:
        return (Path(path), float(strength)) if equals else (Path(text), 1.0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{quoted(text)}: give PATH or PATH=0.8") from error


def setting(text: str) -> tuple[str, object]:
    """ "steps=100" -> ("steps", 100)."""
    import json

    from .training.config import read_toml

    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{quoted(text)}: give NAME=VALUE, such as steps=2000")
    for read in (json.loads, lambda plain: read_toml(f"value = {plain}")["value"]):
        try:
            return name.strip(), read(value)
        except (ValueError, RecursionError):
            continue
    return name.strip(), value  # text without its quotes


def block_list(text: str) -> tuple[int, ...]:
    """ "7,8,9" -> (7, 8, 9)."""
    try:
        return tuple(int(part) for part in text.replace(" ", "").split(",") if part)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{quoted(text)}: give block numbers such as 7,8,9"
        ) from error


def progress():
    """A progress bar as on_step."""
    from tqdm import tqdm

    from .samplers import Step

    bar: tqdm | None = None

    def on_step(step: Step) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=step.total, unit="step")
        bar.update()
        if step.index + 1 == step.total:
            bar.close()

    return on_step


class TrainingBar:
    """What a run tells, on the terminal."""

    def __init__(self):
        self.bar: Any = None
        self.what = ""

    def on_step(self, progress: "Progress") -> None:
        self._show("train", progress.step, progress.total)
        self.bar.set_postfix_str(f"loss {progress.loss:.4f}", refresh=False)

    def on_named_step(self, name: str, progress: "Progress") -> None:
        self._show(name, progress.step, progress.total)

    def on_progress(self, progress: "CacheProgress") -> None:
        self._show(progress.what, progress.done, progress.total)

    def on_note(self, note: str) -> None:
        self.close()
        print(note, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _show(self, what: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if self.bar is None or self.what != what:
            self.close()
            self.bar, self.what = tqdm(total=total, initial=done - 1, desc=what), what
        self.bar.update(done - self.bar.n)


if __name__ == "__main__":
    sys.exit(main())
