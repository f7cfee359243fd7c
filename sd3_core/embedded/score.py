"""The mini GenEval: draw the fixed prompts, read the pictures, count what is right."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..checkpoints.save import save_bytes
from .checker import read
from .evaluation import UNSEEN, prompts
from .requests import parse
from .verdict import Verdict, judge

Draw = Callable[[list[str], int], Tensor]  # prompts, seed -> pictures [B, 3, H, W] in -1..1
OnBatch = Callable[[int, int], None]  # pictures drawn so far, pictures in all

CONFIDENCE = 1.959964  # standard deviations of a two-sided 95 % interval


@dataclass(frozen=True)
class Row:
    """A category's count."""

    name: str
    right: int
    total: int
    wrong: tuple[tuple[str, int], ...]  # attribute, pictures in which it is wrong; most first

    @property
    def share(self) -> float:
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.total)


@dataclass(frozen=True)
class Table:
    """The score of one model; unseen combinations stand apart and do not enter the overall row."""

    rows: tuple[Row, ...]

    @property
    def overall(self) -> Row:
        seen = [row for row in self.rows if row.name != UNSEEN]
        wrong: Counter[str] = Counter()
        for row in seen:
            wrong.update(dict(row.wrong))
        right, total = sum(row.right for row in seen), sum(row.total for row in seen)
        return Row("overall", right, total, tuple(wrong.most_common()))

    def text(self) -> str:
        """For people, and for the README: a Markdown table."""
        lines = ["| category | right | score | 95 % interval |", "|---|---:|---:|---|"]
        for row in (*self._seen(), self.overall, *self._unseen()):
            low, high = row.interval
            lines.append(
                f"| {row.name} | {row.right} of {row.total} | {row.share:.1%} "
                f"| {low:.1%} to {high:.1%} |"
            )
        return "\n".join(lines)

    def json(self) -> str:
        return json.dumps(
            [
                {
                    "category": row.name,
                    "right": row.right,
                    "total": row.total,
                    "share": row.share,
                    "interval": row.interval,
                    "wrong": dict(row.wrong),
                }
                for row in (*self._seen(), self.overall, *self._unseen())
            ],
            indent=2,
        )

    def _seen(self) -> list[Row]:
        return [row for row in self.rows if row.name != UNSEEN]

    def _unseen(self) -> list[Row]:
        return [row for row in self.rows if row.name == UNSEEN]


def wilson(right: int, total: int, deviations: float = CONFIDENCE) -> tuple[float, float]:
    """Interval of a share, in 0..1; right at the ends too, where the usual one has no width.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    Raises ValueError for impossible counts.
    """
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"{right} right of {total}.")
    share, square = right / total, deviations**2
    middle = share + square / (2 * total)
    half = deviations * math.sqrt(share * (1 - share) / total + square / (4 * total**2))
    scale = 1 + square / total
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def score(
    draw: Draw,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3),
    per_category: int | None = None,
    categories: Iterable[str] | None = None,
    batch: int = 64,
    on_batch: OnBatch | None = None,
) -> Table:
    """Let a model draw the prompts, once for each seed, and count.

    draw: gets at most `batch` prompts and one seed for all of them; it should give each picture of
    a batch its own noise.  per_category: only the first so many prompts.  categories: only these.
    Raises ValueError for settings.
    """
    chosen = _chosen(per_category, categories)
    if batch < 1 or not seeds:
        raise ValueError(f"batch is {batch} and seeds are {list(seeds)}; give at least one.")
    total = len(seeds) * sum(map(len, chosen.values()))
    done, rows = 0, []
    for name, texts in chosen.items():
        verdicts: list[Verdict] = []
        for seed in seeds:
            for start in range(0, len(texts), batch):
                some = list(texts[start : start + batch])
                verdicts += judge_pictures(draw(some, seed), some)
                done += len(some)
                if on_batch is not None:
                    on_batch(done, total)
        rows.append(_row(name, verdicts))
    return Table(tuple(rows))


def run_score(
    draw: Draw,
    *,
    seeds: int = 4,
    first_seed: int = 0,
    per_category: int | None = None,
    batch: int = 64,
    output: Path | None = None,
    on_batch: OnBatch | None = None,
) -> Table:
    """The score with `seeds` seeds from first_seed on; written as JSON when there is an output."""
    numbers = range(first_seed, first_seed + seeds)
    table = score(draw, seeds=numbers, per_category=per_category, batch=batch, on_batch=on_batch)
    if output is not None:
        save_bytes(output, table.json().encode())
    return table


def judge_pictures(pictures: Tensor, texts: Sequence[str]) -> list[Verdict]:
    """A verdict for each picture [B, 3, H, W] in -1..1 and its prompt.

    Raises ValueError for a prompt outside of the world, and when the numbers differ.
    """
    if len(pictures) != len(texts):
        raise ValueError(f"{len(pictures)} pictures for {len(texts)} prompts.")
    return [
        judge(reading, parse(text)) for reading, text in zip(read(pictures), texts, strict=True)
    ]


def _chosen(
    per_category: int | None, categories: Iterable[str] | None
) -> dict[str, tuple[str, ...]]:
    known = prompts()
    names = list(known if categories is None else categories)
    strange = [name for name in names if name not in known]
    if strange or not names:
        raise ValueError(f"categories are {names}; choose of {', '.join(known)}.")
    if per_category is not None and per_category < 1:
        raise ValueError(f"per_category is {per_category}; it must be at least 1.")
    return {name: known[name][:per_category] for name in names}


def _row(name: str, verdicts: Sequence[Verdict]) -> Row:
    wrong = Counter(attribute for verdict in verdicts for attribute in verdict.wrong())
    right = sum(verdict.right for verdict in verdicts)
    return Row(name, right, len(verdicts), tuple(wrong.most_common()))
