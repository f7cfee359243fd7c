"""Rows within a budget: what is known is taken from the ledger, the rest is measured in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .budgets import Budget
from .cells import Table
from .lab import Lab, TimeIsUp
from .report import Outcome, write_report
from .rows import ROWS
from .rows.claims import Row

OnCell = Callable[[str, str, int, int], None]  # row, measurement, cells done, cells in all


@dataclass(frozen=True)
class Study:
    """What is there when a run ends."""

    outcomes: tuple[Outcome, ...]  # of all rows
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def run_study(
    rows: Sequence[Row],
    name: str,
    budget: Budget,
    lab: Lab,
    report: Path,
    on_cell: OnCell = lambda row, what, done, total: None,
) -> Study:
    """Measure these rows as far as the lab's time goes, then report on all that is known.

    name: of the budget.  The report is written too when something else ends the run.
    """
    stopped: list[str] = []
    try:
        for row in rows:
            measure_row(row, budget, lab, on_cell)
    except TimeIsUp:
        stopped.append(
            "the time is up; what was measured is kept. Start it again and it goes on from there."
        )
    finally:
        outcomes = [known(row, budget, lab) for row in ROWS.values()]
        files, notes = write_report(report, outcomes, name, budget)
    return Study(tuple(outcomes), tuple(files), (*stopped, *notes))


def measure_row(row: Row, budget: Budget, lab: Lab, on_cell: OnCell) -> None:
    """Seed by seed.  Raises TimeIsUp."""
    measurements = row.measurements(budget)
    total, done = budget.seeds * len(measurements), 0
    for seed in range(budget.seeds):
        for what in measurements:
            on_cell(row.name, f"{what.name}, seed {seed}", done, total)
            lab.cell(what, seed)
            done += 1
    on_cell(row.name, "", done, total)


def known(row: Row, budget: Budget, lab: Lab) -> Outcome:
    """A row as far as it is in the ledger."""
    measurements = row.measurements(budget)
    cells = {}
    for what in measurements:
        for seed in range(budget.seeds):
            if (cell := lab.known(what, seed)) is not None:
                cells[what.name, seed] = cell
    return Outcome(row, Table(cells), budget.seeds * len(measurements), budget)


def with_seeds(budget: Budget, seeds: int | None) -> Budget:
    """Raises ValueError below three."""
    return budget if seeds is None else replace(budget, seeds=seeds)
