"""A training run -> ComfyUI's progress bar, preview, text on the node, log; its interruption."""

import logging
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..sd3_core.plain_text import printable
from ..sd3_core.reading import LARGEST_PICTURE, read_regular
from ..sd3_core.training.cache import Progress as Encoded
from ..sd3_core.training.curve import curve_image
from ..sd3_core.training.dpo import NUMBERS, spoken
from ..sd3_core.training.loop import Progress, spoken_time

PREVIEW_EVERY = 2.0  # seconds
TEXT_EVERY = 0.5
PREVIEW_SIZE = 512  # pixels
BUSY = "The queue is busy until this run ends; interrupting saves it."


class Listener:
    """What a run tells: shown while it lasts, kept for the report.  Stops it when the user does."""

    def __init__(self, node_id: str, steps: int, samples: Path):
        """samples: the folder that sample pictures come into."""
        self.node_id, self.samples = node_id, samples
        self.bar = comfy.utils.ProgressBar(steps)
        self.notes: list[str] = []
        self.lines: list[dict[str, Any]] = []  # of this session
        self.last_preview = self.last_text = 0.0

    def on_note(self, note: str) -> None:
        logging.info(note)
        self.notes.append(note)
        self.tell("\n".join(self.notes[-4:]))

    def on_encoded(self, progress: Encoded) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.tell(f"encoding {progress.what}: {progress.done} of {progress.total}", TEXT_EVERY)

    def on_step(self, progress: Progress) -> None:
        self.lines.append({"step": progress.step, "loss": progress.loss})
        self.bar.update_absolute(progress.step, progress.total, self.preview())
        left = progress.seconds_left
        about = "" if left is None else f", about {spoken_time(left)} left"
        told = f"step {progress.step} of {progress.total}, loss {progress.loss:.4f}{about}"
        if NUMBERS[0] in progress.logs:
            told += f"\n{spoken(progress.logs)}"
        self.tell(told, TEXT_EVERY)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def tell(self, text: str, every: float = 0.0) -> None:
        """Show text on the node, over BUSY, at most once in so many seconds."""
        now = time.monotonic()
        if now - self.last_text < every:
            return
        self.last_text = now
        from server import PromptServer  # ComfyUI's library alone has no server

        server = getattr(PromptServer, "instance", None)
        if server is not None and self.node_id:
            server.send_progress_text(printable(f"{text}\n{BUSY}"), self.node_id)

    def preview(self) -> tuple[str, Image.Image, int] | None:
        """The loss so far over the newest sample pictures, now and then."""
        now = time.monotonic()
        if now - self.last_preview < PREVIEW_EVERY:
            return None
        curve = curve_image(self.lines)
        if curve is None:
            return None
        self.last_preview = now
        paths = sample_files(self.samples)
        newest = [path for path in paths if path.name.split("-")[1] == paths[-1].name.split("-")[1]]
        return "JPEG", stacked(curve, [opened(path) for path in newest]), PREVIEW_SIZE


def sample_files(folder: Path) -> list[Path]:
    """step-000100-1.png, ... in order."""
    return sorted(folder.glob("step-*.png")) if folder.is_dir() else []


def opened(path: Path) -> Image.Image:
    data = BytesIO(read_regular(path, LARGEST_PICTURE))
    with Image.open(data, formats=["PNG"]) as picture:
        return picture.convert("RGB")


def stacked(top: Image.Image, below: Sequence[Image.Image]) -> Image.Image:
    """One picture over a row of others, which share its width."""
    if not below:
        return top
    side = min(top.width // len(below), top.width // 2)
    whole = Image.new("RGB", (top.width, top.height + side), "white")
    whole.paste(top, (0, 0))
    for index, picture in enumerate(below):
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        whole.paste(picture.resize(size), (index * side, top.height))
    return whole


def as_images(pictures: Sequence[Image.Image]) -> Tensor:
    """IMAGE [B, H, W, 3] of pictures of one size."""
    arrays = [np.asarray(picture.convert("RGB"), dtype=np.float32) / 255 for picture in pictures]
    return torch.from_numpy(np.stack(arrays))
