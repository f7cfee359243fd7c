"""A tiny model and a few pictures with captions on disk, and a run on them."""

from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw
from sd3_pack.sd3_core.training.config import TrainConfig
from sd3_pack.sd3_core.training.folders import Source
from tiny import write_tiny_checkpoint
from tiny_tokenizers import write_tiny_tokenizers

COLOURS = ("red", "blue", "green", "red")
SIZES = ((64, 64), (64, 64), (64, 48), (48, 64), (64, 64), (64, 48), (64, 64))


def write_pictures(folder: Path, count: int = len(SIZES)) -> Path:
    """Coloured circles and squares in several aspects, each with a caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        width, height = SIZES[index % len(SIZES)]
        colour, shape = COLOURS[index % 4], ("circle", "square")[index % 2]
        picture = Image.new("RGB", (width, height), (200, 200, 40 * (index % 6)))
        draw = ImageDraw.Draw(picture)
        box = (8 + index % 5, 8, width - 12, height - 8)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
        picture.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {colour} {shape}", encoding="utf-8")
    return folder


def write_training_set(folder: Path) -> TrainConfig:
    """Model, tokenizers and pictures in this folder; returns a LoRA run of four steps on them."""
    write_tiny_tokenizers(folder / "tokenizers")
    metadata = {"sd3_workbench.shift": "1.0", "sd3_workbench.native_pixels": str(64 * 64)}
    write_tiny_checkpoint(
        folder / "tiny.safetensors", tokenizers=folder / "tokenizers", metadata=metadata
    )
    write_pictures(folder / "pictures")
    return TrainConfig(
        run_name="tiny",
        output=folder / "output",
        checkpoint=folder / "tiny.safetensors",
        data=(Source(folder / "pictures"),),
        resolution=64,
        bucket_step=16,
        steps=4,
        batch_size=2,
        learning_rate=1e-2,
        warmup=2,
        rank=2,
        checkpoint_every=2,
        validate_every=0,
        save_dtype="fp32",
        dtype="fp32",  # what the tests hold it to, where a card would choose bf16
        device="auto",
    )


def scratch(config: TrainConfig) -> TrainConfig:
    """The same run for a new MMDiT."""
    return replace(config, method="scratch", depth=2, position_size=8, learning_rate=1e-3)
