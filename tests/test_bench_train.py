"""bench train: the same curve before any time, and our own trainer under it.  No speed asserted."""

import json
from math import prod

import pytest
import torch
from sd3_pack.sd3_core.__main__ import main
from sd3_pack.sd3_core.bench import arms, cases, report, run, training
from sd3_pack.sd3_core.bench.cases import Case, choose
from sd3_pack.sd3_core.bench.worker import Worker
from sd3_pack.sd3_core.models.mmdit import MMDiTConfig

SIZE = MMDiTConfig(depth=2, context_dim=24, pooled_dim=16, pos_embed_max_size=8)
TRAIN = Case("train", "train", SIZE, pixels=64, text=5, batch=1, steps=3)
RECOMPUTE = Case("train", "train", SIZE, pixels=64, text=5, batch=2, steps=3, recompute=True)
CPU = torch.device("cpu")


class Changed(arms.Ours):
    """Ours, but its losses are changed on the way."""

    def __init__(self, factor: float):
        super().__init__(CPU)
        self.factor = factor

    def prepare(self, case, file):
        work = super().prepare(case, file)
        return lambda given: work(given) * self.factor


class InThisProcess:
    """A worker without a process of its own."""

    def __init__(self, arm):
        self.ask = Worker(arm).reply


def workers(**others) -> dict[str, InThisProcess]:
    return {name: InThisProcess(arm) for name, arm in ({"ours": arms.Ours(CPU)} | others).items()}


def test_the_name_train_stands_for_both_ways():
    assert [case.name for case in choose(["train"], quick=True)] == ["train", "train-recompute"]


def test_another_curve_prints_no_time(tmp_path):
    outcome = run.run_case(TRAIN, workers(wrong=Changed(1.001)), tmp_path, rounds=1)
    assert outcome.wrong == ["wrong"]
    assert all(not arm.seconds for arm in outcome.arms.values())


@pytest.mark.parametrize(("factor", "failed"), [(2.0, False), (float("nan"), True)])
def test_a_trainer_with_a_loss_of_its_own_must_only_be_finite(factor, failed, tmp_path):
    outcome = run.run_case(TRAIN, workers(comfyui=Changed(factor)), tmp_path, rounds=1)
    assert outcome.failed == failed
    assert ("a loss of its own" in "\n".join(report.lines(outcome))) != failed


@pytest.mark.parametrize("case", [TRAIN, RECOMPUTE], ids=["kept", "recomputed"])
def test_diffusers_and_peft_have_the_same_curve(case, tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    outcome = run.run_case(case, workers(diffusers=arms.Diffusers(CPU)), tmp_path, rounds=1)
    assert not outcome.left_out
    assert not outcome.wrong
    assert outcome.arms["diffusers"].trained == outcome.arms["ours"].trained


def test_our_arm_trains(tmp_path):
    work = training.Ours(TRAIN, cases.write_weights(TRAIN, tmp_path), CPU)
    given = cases.make_inputs(TRAIN)
    losses = torch.cat([work(given), work(given)])
    assert losses.isfinite().all()
    assert losses[-1] < losses[0]
    assert len(losses) == 6
    halves = [prod(half.shape) for half in training.first_halves(TRAIN).values()]
    assert work.trained > 2 * min(halves) * len(halves)


def test_ours_alone_runs_in_a_process_of_its_own(monkeypatch, capsys, tmp_path):
    found = run.arms_here(run.Options(threads=1))["ours"]
    monkeypatch.setattr(run, "arms_here", lambda options: {"ours": found})
    monkeypatch.setattr(cases, "quick_cases", lambda size: (TRAIN,))
    path = tmp_path / "out.json"
    arguments = ["bench", "train", "--quick", "--threads", "1", "--rounds", "2"]
    assert main([*arguments, "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "steps/s" in said
    (case,) = json.loads(path.read_text())["cases"]
    assert f"trains {case['arms']['ours']['trained']:,}" in said
    assert len(case["arms"]["ours"]["seconds"]) == 2
