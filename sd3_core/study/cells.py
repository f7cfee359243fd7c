"""What was measured, its key, and the ledger that keeps it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.save import save_bytes

FORMAT = 1  # of a cell's meaning; another number and everything is measured anew

Numbers = Mapping[str, float]


@dataclass(frozen=True)
class Cell:
    """What was measured."""

    numbers: Numbers
    seconds: float
    where: str  # the machine


def key_of(settings: Mapping[str, Any], seed: int) -> str:
    """12 hex digits of what decides the outcome; settings as a Measurement has them."""
    text = json.dumps([FORMAT, dict(settings), seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Ledger:
    """A file for each cell, whatever it is called; a damaged one counts as not there."""

    def __init__(self, folder: Path):
        self.folder = folder

    def find(self, settings: Mapping[str, Any], seed: int) -> Cell | None:
        try:
            known = json.loads(self._path(settings, seed).read_text(encoding="utf-8"))
            numbers = {str(key): float(value) for key, value in known["numbers"].items()}
            return Cell(numbers, float(known["seconds"]), str(known["where"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def keep(self, name: str, settings: Mapping[str, Any], seed: int, cell: Cell) -> Path:
        value = {
            "format": FORMAT,
            "name": name,
            "seed": seed,
            "settings": dict(settings),
            "numbers": dict(cell.numbers),
            "seconds": round(cell.seconds, 3),
            "where": cell.where,
        }
        text = json.dumps(value, indent=1, sort_keys=True) + "\n"
        return save_bytes(self._path(settings, seed), text.encode())

    def _path(self, settings: Mapping[str, Any], seed: int) -> Path:
        return self.folder / f"{settings['kind'].lower()}-seed{seed}-{key_of(settings, seed)}.json"


class Table:
    """The cells of a row that there are: by measurement's name and seed."""

    def __init__(self, cells: Mapping[tuple[str, int], Cell]):
        self.cells = cells

    def number(self, name: str, seed: int, quantity: str) -> float:
        return self.cells[name, seed].numbers[quantity]

    def seeds(self, *names: str) -> list[int]:
        """Those for which all of these measurements are there."""
        every = sorted({seed for _, seed in self.cells})
        return [seed for seed in every if all((name, seed) in self.cells for name in names)]

    def values(self, name: str, quantity: str) -> list[float]:
        """Over the seeds there are."""
        return [self.number(name, seed, quantity) for seed in self.seeds(name)]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self.cells)
