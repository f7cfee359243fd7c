"""What was measured in each cell, as rows for people and for programs."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..embedded.model import is_embedded
from ..embedded.requests import parse
from ..embedded.score import judge_pictures
from ..measures import path_length, path_ratio, pixel_distance
from .axes import Cell, Layout, written


@dataclass(frozen=True)
class Run:
    """How a cell was drawn.

    peak_memory_mib: of the sampling, None where it cannot be told.  points: see measures.Trail.
    """

    seconds: float
    peak_memory_mib: int | None
    length: float  # of the path, mean over the batch
    ratio: float  # to the straight distance

    @staticmethod
    def of(points: Sequence[Tensor], seconds: float, peak_memory_mib: int | None) -> "Run":
        length, ratio = (float(measure(points).mean()) for measure in (path_length, path_ratio))
        return Run(seconds, peak_memory_mib, length, ratio)


@dataclass(frozen=True)
class Score:
    """What the checker of the embedded model's world says of a cell's pictures."""

    right: int
    total: int
    wrong: tuple[tuple[str, int], ...]  # attribute, pictures in which it is wrong; most first

    @staticmethod
    def of(pictures: Tensor, prompt: str) -> "Score":
        """pictures: uint8 [B, H, W, 3].  Raises ValueError for a prompt outside of the world."""
        shown = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
        verdicts = judge_pictures(shown, [prompt] * len(pictures))
        wrong = Counter(attribute for verdict in verdicts for attribute in verdict.wrong())
        right = sum(verdict.right for verdict in verdicts)
        return Score(right, len(verdicts), tuple(wrong.most_common()))


@dataclass(frozen=True)
class Row:
    cell: Cell
    run: Run
    distance: float  # from the reference cell, see pixel_distance; mean over the batch
    score: Score | None

    def values(self) -> dict[str, Any]:
        """By column, as JSON has it; a set of a choice as its text."""
        score = self.score and {
            "right": self.score.right,
            "pictures": self.score.total,
            "wrong": " ".join(f"{name}:{count}" for name, count in self.score.wrong),
        }
        return {
            "cell": self.cell.number,
            **{name: as_json(value) for name, value in self.cell.choice.items()},
            "seconds": round(self.run.seconds, 3),
            "peak_memory_mib": self.run.peak_memory_mib,
            "path_length": round(self.run.length, 3),
            "path_ratio": round(self.run.ratio, 4),
            "distance": round(self.distance, 3),
            **(score or {}),
        }


def as_json(value: Any) -> Any:
    return written(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Table:
    layout: Layout
    rows: tuple[Row, ...]

    def values(self) -> list[dict[str, Any]]:
        return [row.values() for row in self.rows]

    def csv(self) -> str:
        """A line of names, then a line for each cell; what is not known is empty."""
        lines, out = self.values(), io.StringIO()
        writer = csv.DictWriter(out, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return out.getvalue()

    def text(self) -> str:
        """For people: a Markdown table and a line on its columns."""
        lines = self.values()
        heads = [name.replace("_", " ") for name in lines[0]]
        table = [heads, ["---:"] * len(heads), *(map(shown, line.values()) for line in lines)]
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
        return f"{body}\n\n{self.legend()}"

    def legend(self) -> str:
        sentences = [
            "seconds, peak memory: of the sampling.",
            "path length: of the latents' way from noise to picture; path ratio: that over the "
            "straight distance, 1 is straight.",
            f"distance: of the pixels (0 to 255, root mean square) from cell "
            f"{self.layout.reference}.",
        ]
        return " ".join(sentences)


def shown(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def judged(metadata: Mapping[str, str], prompt: str) -> tuple[str | None, tuple[str, ...]]:
    """The prompt, where the checker knows what it asks for, else None; a note where that is odd.

    metadata: of the MMDiT's file.
    """
    if not is_embedded(metadata):
        return None, ()
    try:
        parse(prompt)
    except ValueError as error:
        return None, (f"No score: {error}",)
    return prompt, ()


def make_table(
    layout: Layout, runs: Sequence[Run], pictures: Sequence[Tensor], prompt: str | None
) -> Table:
    """runs, pictures (uint8 [B, H, W, 3]): of each cell.  prompt: None where no checker can judge.

    Raises ValueError for a prompt outside of the embedded model's world.
    """
    reference = pictures[layout.reference - 1]
    return Table(
        layout,
        tuple(
            Row(
                cell,
                run,
                float(pixel_distance(own, reference).mean()),
                None if prompt is None else Score.of(own, prompt),
            )
            for cell, run, own in zip(layout.cells, runs, pictures, strict=True)
        ),
    )
