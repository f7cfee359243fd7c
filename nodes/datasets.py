"""What a LoRA is taught from: folders of pictures, pictures of the graph, preferences.

A workflow is not trusted with the whole disk: folders lie in ComfyUI's input or output folder, or
in one that is registered as `datasets`.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..sd3_core.checkpoints.save import sweep, temporary_name
from ..sd3_core.errors import cut, quoted
from ..sd3_core.plain_text import check_whole
from ..sd3_core.training.folders import LINES, Listing, Source, lines_of, list_pictures
from ..sd3_core.training.preferences import CHOSEN, REJECTED, PairListing, list_pairs
from ..sd3_core.training.report import by_value, first_lines, left_out_told, lines_told, some_names
from ._compat import advanced, schema
from .comfy_text import tokenizer_files
from .errors import NodeError, coded
from .text import is_changed
from .wires import CATEGORY, checked_images, describe_file, origin_of, report

DATASET, PREFERENCES = "SD3_DATASET", "SD3_PREFERENCES"
SHOWN = 5  # captions in a report


@dataclass(frozen=True)
class TrainingData:
    """SD3_DATASET and SD3_PREFERENCES: what to learn from, and the files that encode it.

    It holds names only: pictures and captions are read, encoded and cached when a run begins.
    """

    source: Source
    files: dict[str, Path]  # "vae", "clip_l", ...: the networks that encode it


# Folders


def data_roots() -> list[Path]:
    registered = folder_paths.folder_names_and_paths.get("datasets", ([], set()))[0]
    own = (folder_paths.get_input_directory(), folder_paths.get_output_directory())
    return [Path(root).absolute() for root in (*own, *registered)]


def is_inside(path: Path) -> bool:
    """Whether it lies below one of the roots, which may be links themselves."""
    roots = data_roots()
    places = {*roots, *(root.resolve() for root in roots)}
    return path not in places and not places.isdisjoint(path.parents)


def find_data(name: str) -> Path:
    """The folder (or .jsonl file) of this name below one of the roots.  Raises NodeError, also for
    a folder in which a link leads out of them."""
    wanted = name.strip().replace("\\", "/")
    roots = data_roots()
    found = None
    for root in roots if wanted else ():
        # An absolute name stays what it is.  As text first: to look at //host/share asks that host.
        path = Path(os.path.normpath(root / wanted))
        with suppress(OSError, ValueError):  # a name that no file can have
            if is_inside(path) and is_inside(path := path.resolve()) and is_data(path):
                found = path
                break
    if found is not None:
        check_links(found, files_in(found) if found.is_dir() else ())
        return found
    known = ", ".join(str(root) for root in roots)
    raise NodeError(
        "missing_file",
        f"folder is {quoted(name)}; there is no such folder in {known}. Copy the pictures there, "
        "or register their place as `datasets` in extra_model_paths.yaml.",
    )


def is_data(path: Path) -> bool:
    return path.is_dir() or (path.suffix == ".jsonl" and path.is_file())


def files_in(folder: Path) -> Iterator[Path]:
    """Every folder and every link below, links followed, circles not."""
    seen = set()
    for place, inner, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            inner.clear()
            continue
        seen.add(real)
        paths = (Path(place, name) for name in names)
        yield from (path for path in paths if path.is_symlink())
        yield Path(place)  # a folder may be a junction, which is_symlink does not tell


def check_links(folder: Path, paths: Iterable[Path]) -> None:
    """Raises NodeError where one of these paths leads out of the roots."""
    for path in paths:
        if not is_inside(path.resolve()):
            shown = path.relative_to(folder).as_posix()
            raise NodeError(
                "missing_file",
                f"{folder.name}: {cut(shown)} in it is a link to a place outside of ComfyUI's "
                "input and output folders. Copy what it names, or register its place as `datasets` "
                "in extra_model_paths.yaml.",
            )


def data_fingerprint(name: str) -> str:
    """Changes when a file in the folder does."""
    path = find_data(name)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256(os.fsencode(path))
    for file in files:
        state = file.stat()
        digest.update(repr((str(file), state.st_size, state.st_mtime_ns)).encode())
    return digest.hexdigest()


def folder_fault(name: str) -> bool | str:
    """For validate_inputs."""
    try:
        find_data(name)
    except NodeError as error:
        return str(error)
    return True


# Files


def encoder_files(clip: Any, vae: Any) -> dict[str, Path]:
    """The files behind CLIP and VAE, which training reads by itself.

    Raises NodeError for what our loaders did not make, and for a CLIP that was changed since.
    """
    files: dict[str, Path] = {}
    given = {"CLIP": (clip, "SD3 Load Text Encoders"), "VAE": (vae, "SD3 Load VAE")}
    for title, (owner, loader) in given.items():
        if owner is None:
            raise NodeError("missing_part", f"no {title} arrived: load one with {loader}.")
        origin = origin_of(owner.patcher)
        if not origin.paths:
            raise NodeError(
                "wrong_encoders",
                f"this {title} comes from another loader, so its file is not known: training reads "
                f"the file again. Load it with {loader} or SD3 Load Checkpoint.",
            )
        if owner.patcher.patches:
            layers = some_names(sorted(map(str, owner.patcher.patches)))
            raise NodeError(
                "wrong_encoders",
                f"this {title} is changed by a LoRA ({layers}), which training cannot carry: it "
                f"would learn from other words. Connect the {title} as it was loaded.",
            )
        files |= origin.paths
    if is_changed(clip):
        raise NodeError(
            "wrong_encoders",
            "this CLIP is changed (CLIP Set Last Layer, a hook or a schedule), which training "
            "cannot carry: it would learn from other words. Connect the CLIP as it was loaded.",
        )
    return files


def tokenizer_file(files: dict[str, Path]) -> Path | None:
    """The file among these that brings its own tokenizers."""
    return next((path for path in files.values() if tokenizer_files([path])), None)


# Pictures from the graph


def keep_pictures(images: Mapping[str, Tensor], captions: Sequence[str]) -> Path:
    """Write IMAGEs [B, H, W, 3] with their captions as a folder beside the runs.

    images: by the folder inside it that they go to; "": the folder itself.  8 bits, as SaveImage
    keeps them; the folder is named by its content.  Not in ComfyUI's temporary folder, which is
    emptied when it starts: a run must be able to go on.
    """
    for caption in captions:
        with coded("bad_setting"):
            check_whole(caption, "captions")
    levels = {side: as_levels(side or "images", batch) for side, batch in images.items()}
    content = hashlib.sha256(repr(list(captions)).encode())
    for side, batch in levels.items():
        content.update(repr((side, batch.shape)).encode() + batch.tobytes())
    digest = content.hexdigest()[:16]
    home = Path(folder_paths.get_output_directory()) / "sd3" / ".pictures"
    folder = home / digest
    if folder.exists():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    sweep(home)
    whole = home / temporary_name(digest)
    try:
        for side, batch in levels.items():
            place = whole / side
            place.mkdir(parents=True)
            for number, (pixels, caption) in enumerate(zip(batch, captions, strict=True), 1):
                Image.fromarray(pixels).save(place / f"{number:05}.png", compress_level=1)
                (place / f"{number:05}.txt").write_text(caption, encoding="utf-8")
        whole.rename(folder)
    finally:
        shutil.rmtree(whole, ignore_errors=True)
    return folder


def as_levels(name: str, images: Tensor) -> np.ndarray:
    images = checked_images(name, images)
    return (images.detach().float().cpu().numpy() * 255).round().clip(0, 255).astype(np.uint8)


def caption_of_each(captions: str, count: int) -> list[str]:
    """A line for each picture, or one line for all.  Raises NodeError."""
    lines = [line.strip() for line in lines_of(captions) if line.strip()]
    if len(lines) <= 1:
        return (lines or [""]) * count
    if len(lines) != count:
        raise NodeError(
            "bad_setting",
            f"captions has {len(lines)} lines for {count} pictures; write a line for each, or one "
            "line for all.",
        )
    return lines


def keep_pairs(chosen: Tensor | None, rejected: Tensor | None, captions: str) -> Path:
    """Raises NodeError unless there are as many of each."""
    if chosen is None or rejected is None or len(chosen) != len(rejected):
        counts = ["no" if side is None else str(len(side)) for side in (chosen, rejected)]
        raise NodeError(
            "bad_setting",
            f"{counts[0]} chosen and {counts[1]} rejected pictures are connected and folder is "
            "empty: name a folder of pairs, or connect as many of each.",
        )
    sides = {CHOSEN: chosen, REJECTED: rejected}
    with coded("bad_file"):
        return keep_pictures(sides, caption_of_each(captions, len(chosen)))


# Nodes


def encoder_inputs() -> list[Any]:
    return [
        io.Clip.Input("clip", tooltip="The text encoders that read the captions; ours, plain."),
        io.Vae.Input("vae", tooltip="The VAE that encodes the pictures; ours."),
    ]


def notes_on(listing: Listing | PairListing) -> list[str]:
    """Pictures left out, how captions of several lines are read, and notes on files of text."""
    listed = listing.found if isinstance(listing, Listing) else listing.pairs
    several = by_value({one.name: one.lines for one in listed})
    return [
        *left_out_told(listing.left_out),
        *lines_told(several),
        *first_lines([*listing.notes]),
    ]


def lines_input() -> Any:
    return io.Combo.Input(
        "lines",
        options=list(LINES),
        default=LINES[0],
        optional=True,
        tooltip="What several lines of a NAME.txt are: alternatives, one of which is drawn each "
        "time; whole: one caption, such as a captioner's paragraphs; first: the first line alone.",
    )


class SD3TrainingImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3TrainingImages",
                "display_name": "SD3 Training Images",
                "category": f"{CATEGORY}/training",
                "description": "Pictures with captions, for SD3 Train LoRA: a folder with NAME.txt "
                "beside NAME.png (or metadata.jsonl), or pictures of the graph.",
                "search_aliases": ["dataset", "training data", "load images", "captions", "folder"],
                "inputs": [
                    *encoder_inputs(),
                    io.String.Input(
                        "folder",
                        default="",
                        tooltip="A folder in ComfyUI's input or output folder, with all folders in "
                        "it. Empty: the pictures connected below.",
                    ),
                    io.Int.Input(
                        "repeats",
                        default=1,
                        min=1,
                        max=1000,
                        tooltip="How often an epoch shows each picture.",
                    ),
                    *advanced(
                        [
                            io.Image.Input(
                                "images",
                                optional=True,
                                tooltip="Pictures of the graph, instead of a folder.",
                            ),
                            io.String.Input(
                                "captions",
                                multiline=True,
                                default="",
                                optional=True,
                                tooltip="For the pictures of the graph: a line for each, or one "
                                "line for all.",
                            ),
                            lines_input(),
                        ]
                    ),
                ],
                "outputs": [
                    io.Custom(DATASET).Output(display_name="dataset", tooltip="For SD3 Train LoRA.")
                ],
            }
        )

    @classmethod
    def validate_inputs(cls, folder: str) -> bool | str:
        return folder_fault(folder) if folder and folder.strip() else True

    @classmethod
    def fingerprint_inputs(cls, folder: str, **others: Any) -> str:
        return data_fingerprint(folder) if folder and folder.strip() else ""

    @classmethod
    def execute(
        cls,
        clip: Any,
        vae: Any,
        folder: str,
        repeats: int = 1,
        images: Tensor | None = None,
        captions: str = "",
        lines: str = LINES[0],
    ) -> io.NodeOutput:
        files = encoder_files(clip, vae)
        if bool(folder.strip()) == (images is not None):
            raise NodeError(
                "bad_setting",
                "give either a folder or pictures of the graph: name a folder, or connect images "
                "and leave folder empty.",
            )
        if images is None:
            path = find_data(folder)
        else:
            with coded("bad_file"):
                path = keep_pictures({"": images}, caption_of_each(captions, len(images)))
        with coded("bad_setting"):
            source = Source(path, repeats, lines=lines)
            listing = list_pictures(source)
        if not listing.found:
            told = "".join(f"; {line}" for line in left_out_told(listing.left_out))
            raise NodeError("missing_file", f"{path.name}: there is no picture in it{told}.")
        texts = [one.captions[0][0] if one.captions else "" for one in listing.found]
        contents = {
            "folder": path.name,
            "pictures": len(listing.found),
            "without_caption": sum(not text for text in texts),
            "skipped": [f"{one.name}: {one.reason}" for one in listing.skipped[:SHOWN]],
            "notes": notes_on(listing),
            "captions": list(dict.fromkeys(texts))[:SHOWN],
            "files": {kind: describe_file(file) for kind, file in files.items()},
        }
        return io.NodeOutput(TrainingData(source, files), ui=report(contents))


class SD3Preferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            {
                "node_id": "SD3Preferences",
                "display_name": "SD3 Preferences",
                "category": f"{CATEGORY}/training",
                "description": "Pairs of pictures of which one is preferred, for SD3 Train DPO: "
                "chosen/ and rejected/ with NAME.txt beside either, or preferences.jsonl, as SD3 "
                "Pick writes it.",
                "search_aliases": ["dpo", "pairs", "pick-a-pic", "chosen rejected", "preference"],
                "inputs": [
                    *encoder_inputs(),
                    io.String.Input(
                        "folder",
                        default="",
                        tooltip="A folder (or .jsonl file) in ComfyUI's input or output folder; "
                        "SD3 Pick writes to sd3_picks/NAME. Empty: the pictures connected below.",
                    ),
                    *advanced(
                        [
                            io.Image.Input(
                                CHOSEN,
                                optional=True,
                                tooltip="Pictures of the graph that are preferred, instead of a "
                                "folder.",
                            ),
                            io.Image.Input(
                                REJECTED,
                                optional=True,
                                tooltip="What each of them is preferred to, in the same order.",
                            ),
                            io.String.Input(
                                "captions",
                                multiline=True,
                                default="",
                                optional=True,
                                tooltip="For the pictures of the graph: a line for each pair, or "
                                "one line for all.",
                            ),
                            lines_input(),
                        ]
                    ),
                ],
                "outputs": [
                    io.Custom(PREFERENCES).Output(
                        display_name="preferences", tooltip="For SD3 Train DPO."
                    )
                ],
            }
        )

    @classmethod
    def validate_inputs(cls, folder: str) -> bool | str:
        return folder_fault(folder) if folder and folder.strip() else True

    @classmethod
    def fingerprint_inputs(cls, folder: str, **others: Any) -> str:
        return data_fingerprint(folder) if folder and folder.strip() else ""

    @classmethod
    def execute(
        cls,
        clip: Any,
        vae: Any,
        folder: str,
        chosen: Tensor | None = None,
        rejected: Tensor | None = None,
        captions: str = "",
        lines: str = LINES[0],
    ) -> io.NodeOutput:
        files = encoder_files(clip, vae)
        if folder.strip() and (chosen is not None or rejected is not None):
            raise NodeError(
                "bad_setting",
                f"folder is {quoted(folder)} and pictures are connected, too: leave folder empty "
                "to take them, or remove the links of chosen and rejected.",
            )
        path = find_data(folder) if folder.strip() else keep_pairs(chosen, rejected, captions)
        with coded("bad_setting"):
            source = Source(path, lines=lines)
            listing = list_pairs(source)
        if path.is_file():  # what it names lies beside it, in a folder of anything
            check_links(
                path.parent, (one for pair in listing.pairs for one in (pair.chosen, pair.rejected))
            )
        if not listing.pairs:
            raise NodeError(
                "missing_file",
                f"{path.name}: holds no pairs ({listing.ties} ties). Expected chosen/ and "
                "rejected/, or preferences.jsonl; SD3 Pick writes one.",
            )
        contents = {
            "folder": path.name,
            "pairs": len(listing.pairs),
            "ties": listing.ties,
            "skipped": [f"{one.name}: {one.reason}" for one in listing.skipped[:SHOWN]],
            "notes": notes_on(listing),
            "captions": list(
                dict.fromkeys(text for pair in listing.pairs for text in pair.captions[:1])
            )[:SHOWN],
            "files": {kind: describe_file(file) for kind, file in files.items()},
        }
        return io.NodeOutput(TrainingData(source, files), ui=report(contents))
