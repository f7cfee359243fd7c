"""Every row from its first cell to the report, at a budget of seconds; and what stops a study."""

import csv
import io
import math
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from sd3_pack.sd3_core.__main__ import main
from sd3_pack.sd3_core.study import report as report_module
from sd3_pack.sd3_core.study.arms import Network, load_arm, new_arm, validation_loss
from sd3_pack.sd3_core.study.cells import Cell, Table
from sd3_pack.sd3_core.study.lab import TimeIsUp, budgeted
from sd3_pack.sd3_core.study.measurements import ArmScore
from sd3_pack.sd3_core.study.report import COLUMNS, Outcome, as_csv, markdown, number, text_table
from sd3_pack.sd3_core.study.rows import ROWS, find_rows
from sd3_pack.sd3_core.study.rows.claims import Chart, Claim, Curve, Row, arm
from sd3_pack.sd3_core.study.run import known, measure_row, run_study
from sd3_pack.sd3_core.study.statistics import RULE

PACK = Path(__file__).parent.parent.parent
VERDICTS = {"shown", "not shown", "reversed"}


def nothing(row, what, done, total):
    """A listener that does not care."""


@pytest.mark.parametrize("name", list(ROWS))
def test_a_row_runs_from_end_to_end(name, lab, tiny):
    row = ROWS[name]
    seen = []
    measure_row(row, tiny, lab, lambda *told: seen.append(told))
    assert seen[-1][2] == seen[-1][3] == len(seen) - 1
    outcome = known(row, tiny, lab)
    assert outcome.complete
    assert len(outcome.claims) >= 2
    for claim in outcome.claims:
        assert len(claim.values) == tiny.seeds
        assert all(map(math.isfinite, claim.values)), claim
        assert claim.verdict in VERDICTS
        assert claim.paper
        assert claim.unit
    charts = outcome.charts
    assert charts
    for chart in charts:
        assert all(curve.points for curve in chart.curves), chart
        assert all(len(v) == tiny.seeds for curve in chart.curves for v in curve.points.values())
    assert f"study {name}" in markdown([outcome], "tiny", tiny, {})


def test_what_is_known_is_not_measured_again(lab, tiny, monkeypatch):
    row = ROWS["densities"]
    measure_row(row, tiny, lab, nothing)

    def refuse(self, lab, seed):
        raise AssertionError("measured again")

    monkeypatch.setattr(ArmScore, "measure", refuse)
    measure_row(row, tiny, lab, nothing)
    with pytest.raises(AssertionError, match="again"):
        measure_row(row, replace(tiny, pictures=2), lab, nothing)


def test_rows_share_the_base_arm(tiny):
    def keys(name):
        return {(w.arm, w.steps) for w in ROWS[name].measurements(tiny) if hasattr(w, "arm")}

    base = (arm(tiny), tiny.sampling_steps)
    assert all(
        base in keys(name) for name in ("densities", "objectives", "steps", "path", "scaling")
    )


def test_every_row_of_the_issue_is_there_and_names_are_told_apart(tiny):
    assert len(ROWS) == 13
    for row in ROWS.values():
        names = [what.name for what in row.measurements(tiny)]
        assert len(set(names)) == len(names), row.name
        if row.workflow:
            assert (PACK / "workflows" / f"{row.workflow}.json").is_file()
    subsets = [what.use for what in ROWS["encoders"].measurements(tiny)]
    assert len({frozenset(use) for use in subsets}) == 7


def test_the_time_that_is_up_leaves_a_report_of_what_there_is(lab, tiny, tmp_path):
    late = budgeted(replace(lab, output=tmp_path / "fresh"), 1e-9)
    study = run_study([ROWS["vae"]], "tiny", tiny, late, tmp_path / "report")
    assert "time is up" in study.notes[0]
    text = (tmp_path / "report" / "paper.md").read_text(encoding="utf-8")
    assert "Unfinished: 0 of" in text
    assert "not measured" in text


def test_the_time_is_looked_at_before_each_cell(lab, tiny, tmp_path):
    late = budgeted(replace(lab, output=tmp_path), 1e-9)
    with pytest.raises(TimeIsUp):
        measure_row(ROWS["vae"], tiny, late, nothing)


# --- the report -----------------------------------------------------------------------------------


def made_up(values):
    """A row of one claim, and its outcome."""
    table = Table({("a", seed): Cell({"x": v}, 1.0, "here") for seed, v in enumerate(values)})
    row = Row(
        "made-up",
        "A title",
        "A setup.",
        lambda budget: [],
        lambda budget, table: [Claim("one, two", "1.5", "dB", tuple(values))],
        lambda budget, table: [Chart("x", "y", (Curve("c", {1: values} if values else {}),))],
    )
    return row, table


def outcome_of(values, tiny):
    row, table = made_up(values)
    return Outcome(row, table, len(values), tiny)


def test_csv_holds_a_line_for_each_claim(tiny):
    outcomes = [outcome_of(values, tiny) for values in ([2.0, 2.5, 3.0], [], [1.0])]
    lines = list(csv.DictReader(io.StringIO(as_csv(outcomes))))
    assert tuple(lines[0]) == COLUMNS
    first, empty, alone = lines
    assert (first["mean"], first["verdict"], first["seeds"]) == ("2.5", "shown", "3")
    assert float(first["low"]) == pytest.approx(2.5 - 4.303 * 0.5 / math.sqrt(3), rel=1e-4)
    assert first["values"] == "2 2.5 3"
    assert (first["claim"], first["whose"]) == ("one, two", "paper")
    assert (empty["mean"], empty["verdict"]) == ("", "not measured")
    assert (alone["mean"], alone["low"], alone["verdict"]) == ("1", "", "not shown")


def test_the_report_says_rule_machine_and_verdict(tiny):
    text = markdown([outcome_of([2.0, 2.5, 3.0], tiny)], "tiny", tiny, {"made-up": "p.png"})
    assert RULE in text
    assert "**The machine.** here." in text
    assert "| one, two | 1.5 | +2.50 dB | +1.26 to +3.74 | 3 | shown |" in text
    assert "| 1 | 2.50 ± 1.24 |" in text
    assert "![A title](p.png)" in text
    assert "Of 1 claims of the paper: 1 shown. Of 0 questions of our own" in text


def test_questions_of_our_own_are_counted_apart(tiny):
    outcome = outcome_of([2.0, 2.5, 3.0], tiny)
    mine = replace(outcome.claims[0], own=True)
    row = replace(outcome.row, claims=lambda budget, table: [mine])
    text = markdown([replace(outcome, row=row)], "tiny", tiny, {})
    assert "Of 0 claims of the paper: none. Of 1 questions of our own and checks" in text
    assert "| one, two | *own*: 1.5 | +2.50 dB |" in text


def test_numbers_that_are_all_0_are_a_sentence(tiny):
    text = markdown([outcome_of([0.0, 0.0, 0.0], tiny)], "tiny", tiny, {})
    assert "y: 0 everywhere" in text
    assert "0 ± 0" not in text


def test_an_interval_of_correlations_stays_between_minus_1_and_1():
    claim = Claim("one goes with the other", "strong", "of 1", (0.2, 0.9, 0.99), correlated=True)
    found = claim.interval
    assert found is not None
    assert -1 < found.low < 0.2 < found.mean < found.high < 1
    assert claim.verdict == "not shown"
    assert replace(claim, values=(1.0, 1.0, 1.0)).interval.mean == pytest.approx(1)


def test_the_terminal_has_the_table_too(tiny):
    assert "shown         one, two: +2.50 dB (+1.26 to +3.74)" in text_table(
        [outcome_of([2.0, 2.5, 3.0], tiny)]
    )


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234.5, "1234"), (12.345, "12.3"), (0.012345, "0.0123")]
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_without_matplotlib_one_sentence_says_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "find_spec", lambda name: None)
    outcomes = [outcome_of([1.0, 2.0, 3.0], tiny)]
    files, notes = report_module.write_report(tmp_path, outcomes, "tiny", tiny)
    assert [path.name for path in files] == ["paper.md", "paper.csv"]
    assert len(notes) == 1
    assert "pip install matplotlib" in notes[0]
    assert "![" not in files[0].read_text(encoding="utf-8")


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_figures_are_drawn(tiny, tmp_path):
    outcomes = [outcome_of([1.0, 2.0, 3.0], tiny)]
    files, notes = report_module.write_report(tmp_path, outcomes, "tiny", tiny)
    assert notes == []
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_a_report_that_cannot_be_written_leaves_the_old_one(tiny, tmp_path, monkeypatch):
    outcomes = [outcome_of([1.0, 2.0, 3.0], tiny)]
    files, _ = report_module.write_report(tmp_path, outcomes, "tiny", tiny)
    before = [path.read_bytes() for path in files]
    real, calls = os.fsync, []

    def full(number):
        calls.append(number)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space"):
        report_module.write_report(tmp_path, [outcome_of([9.0] * 3, tiny)], "tiny", tiny)
    monkeypatch.setattr(os, "fsync", real)
    assert calls
    assert [path.read_bytes() for path in files] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "huge"], "budget is 'huge'; choose one of these."),
        (["nonsense"], "row is 'nonsense'; choose of densities, "),
        (["--seeds", "2"], "seeds is 2; an interval takes at least 3."),
        (["--minutes", "0"], "minutes is 0.0; give a number above 0"),
    ],
)
def test_a_wrong_option_is_refused_in_a_sentence(arguments, said, capsys):
    assert main(["study", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_rows_are_listed(capsys):
    assert main(["study", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ROWS)


def test_the_command_measures_a_row(tmp_path, capsys, monkeypatch, tiny):
    from sd3_pack.sd3_core.study import budgets

    monkeypatch.setitem(budgets.BUDGETS, "tiny", tiny)
    folders = ["--output", str(tmp_path / "out"), "--report", str(tmp_path / "report")]
    common = ["study", "vae", "--budget", "tiny", "--device", "cpu", "--dtype", "fp32", *folders]
    assert main(common) == 0
    first = capsys.readouterr().out
    assert "linear code: 16 channels have the better PSNR than 8" in first
    assert str(tmp_path / "report" / "paper.md") in first
    assert main(common) == 0
    assert capsys.readouterr().out == first


def test_no_rows_are_all_rows():
    assert find_rows([]) == list(ROWS.values())


@pytest.mark.long
def test_an_arm_learns(lab, tiny):
    """Three minutes of a core: the loss of held-out pictures falls, colours come as asked."""
    budget = replace(tiny, scenes=2048, steps=300, batch_size=32, depths=(1, 2, 3), pictures=48)
    made = arm(budget)
    score = ArmScore("learns", made, (10,), budget.pictures)
    first = validation_loss(
        Network(new_arm(made, 0), torch.device("cpu"), torch.float32),
        made.make_objective(),
        lab.world.held(64),
    )
    numbers = score.measure(lab, 0)
    assert numbers["loss"] < first / 3
    assert numbers["attributes@10"] > 30
    assert load_arm(lab.trained(made, 0), torch.device("cpu")).config.depth == 2
