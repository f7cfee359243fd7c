"""The bench: equality before time, and what it writes.  No test asserts a speed."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from sd3_pack.sd3_core.__main__ import main
from sd3_pack.sd3_core.bench import arms, cases, ceilings, floor, report, run
from sd3_pack.sd3_core.bench.cases import TOLERANCE, Case, as_json, choose, from_json
from sd3_pack.sd3_core.bench.run import PLAIN
from sd3_pack.sd3_core.bench.worker import Worker
from sd3_pack.sd3_core.guidance import plain
from sd3_pack.sd3_core.models.mmdit import MMDiTConfig
from sd3_pack.sd3_core.models.vae import VAEConfig

SIZE = MMDiTConfig(
    depth=3,
    context_dim=24,
    pooled_dim=16,
    pos_embed_max_size=8,
    qk_norm=True,
    dual_attention_layers=(0,),
)
FORWARD = Case("forward", "forward", SIZE, pixels=64, text=5)
TINY = (
    FORWARD,
    Case("cut", "forward", SIZE, pixels=64, text=5, blocks=2),
    Case("sample", "sample", SIZE, pixels=64, text=5, batch=1, steps=2),
    Case("decode", "decode", VAEConfig((32, 32, 64, 64), 1), pixels=32, batch=1),
)
CPU = torch.device("cpu")


class Changed(arms.Ours):
    """Ours, but its output is changed on the way."""

    def __init__(self, change):
        super().__init__(CPU)
        self.change = change

    def prepare(self, case, file):
        work = super().prepare(case, file)
        return lambda given: self.change(work(given))

    def load(self, case, file):
        return {name: self.change(w) for name, w in super().load(case, file).items()}


class Broken(arms.Ours):
    def prepare(self, case, file):
        raise RuntimeError("too old for this")


class InThisProcess:
    """A worker without a process of its own."""

    def __init__(self, arm):
        self.ask = Worker(arm).reply


def workers(**others) -> dict[str, InThisProcess]:
    return {name: InThisProcess(arm) for name, arm in ({"ours": arms.Ours(CPU)} | others).items()}


@pytest.fixture
def use(monkeypatch):
    """use(case, arm=...): let the command run this case, with these arms beside ours."""

    def replace(case: Case, **others) -> None:
        @contextmanager
        def started(named, deadline=None):
            yield workers(**others)

        monkeypatch.setattr(cases, "quick_cases", lambda size: (case,))
        monkeypatch.setattr(run, "started", started)

    return replace


WRONG = {
    "scaled": lambda out: out * 1.001,
    "not a number": lambda out: out * float("nan"),
    "of another shape": lambda out: out[..., :-1],
}


def single_spaced(text: str) -> str:
    """Columns are as wide as the longest name of an arm."""
    return " ".join(text.split())


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_result_prints_no_time_and_fails(use, capsys, tmp_path, change):
    use(FORWARD, good=arms.Ours(CPU), wrong=Changed(change))
    assert main(["bench", "--quick", "--json", str(tmp_path / "out.json")]) == 1
    said = capsys.readouterr().out.split("of the rounds.")[1]
    assert "wrong WRONG" in single_spaced(said)
    assert "wall" not in said
    (found,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert not found["equal"]
    assert found["wrong"] == ["wrong"]
    assert all(arm["seconds"] == [] for arm in found["arms"].values())


def test_wrong_weights_print_no_time_and_fail(use, capsys):
    use(Case("load", "load", SIZE, dtype="bfloat16"), wrong=Changed(lambda w: w + 0.01))
    assert main(["bench", "--quick"]) == 1
    said = capsys.readouterr().out.split("of the rounds.")[1]
    assert said.count("WRONG") == 2
    assert "wall" not in said


def test_equal_results_are_timed_in_turns(tmp_path):
    outcome = run.run_case(FORWARD, workers(other=arms.Ours(CPU)), tmp_path, rounds=3)
    assert not outcome.failed
    assert {name: len(arm.seconds) for name, arm in outcome.arms.items()} == {
        "ours": 3,
        "other": 3,
    }
    _, ours, other = report.lines(outcome)
    assert "ours takes" in other
    assert "wall" in ours


def test_every_round_begins_with_another_arm():
    assert [run.turned(["a", "b", "c"], index)[0] for index in range(4)] == ["a", "b", "c", "a"]


def test_an_arm_that_cannot_is_left_out_with_its_reason(tmp_path):
    outcome = run.run_case(FORWARD, workers(old=Broken(CPU)), tmp_path, rounds=1)
    assert not outcome.failed
    said = single_spaced("\n".join(report.lines(outcome)))
    assert "old left out: RuntimeError: too old for this" in said


@pytest.mark.parametrize(
    ("work", "blocks"), [("sample", None), ("modulate", None), ("modulate", 2)]
)
def test_the_table_gives_what_the_network_computes(tmp_path, work, blocks):
    case = Case(work, work, SIZE, pixels=64, text=5, batch=1, steps=4, blocks=blocks)
    plain = {run.PLAIN: arms.Ours(CPU, plain=True)}
    outcome = run.run_case(case, workers(**plain, diffusers=Broken(CPU)), tmp_path, rounds=1)
    assert not outcome.failed
    assert set(outcome.arms) == {"ours", run.PLAIN}
    assert ("diffusers" in outcome.left_out) == (work == "sample")


def test_half_precision_is_compared_as_such(tmp_path):
    case = Case("sample", "sample", SIZE, pixels=64, text=5, batch=1, steps=2, dtype="bfloat16")
    plain = {run.PLAIN: arms.Ours(CPU, plain=True)}
    outcome = run.run_case(case, workers(**plain), tmp_path, rounds=1)
    assert not outcome.failed
    assert outcome.arms[run.PLAIN].difference > TOLERANCE["sample"] * outcome.scale / 100


def test_only_ours_meets_ours_without_the_table():
    assert run.takes_part("comfyui", FORWARD)
    assert not run.takes_part(run.PLAIN, FORWARD)
    assert not run.takes_part("comfyui", Case("modulate", "modulate", SIZE))


def test_being_slower_than_comfyui_is_said():
    outcome = run.Outcome(FORWARD)
    for arm, times in (("ours", [1.1] * 3), ("comfyui", [1.0] * 3), ("diffusers", [0.1] * 3)):
        outcome.arms[arm] = run.Measured(seconds=times)
    assert report.slower(outcome) == ["forward: ours takes 1.10 of comfyui's time, more than 1.05."]
    outcome.arms["ours"].seconds = [1.04] * 3
    assert not report.slower(outcome)


def test_the_limits_of_a_device_are_measured(monkeypatch):
    monkeypatch.setattr(ceilings, "ROUNDS", 1)
    found = ceilings.measure(CPU, side=8, tokens=4)
    assert {"matmul TFLOP/s", "copy TB/s"} <= set(found)
    assert all(value > 0 for value in found.values())
    assert len(list(ceilings.lines(found))) == len(found) + 1


def test_the_floor_counts_what_the_networks_multiply():
    """Against the closed formulas: SD3 Medium 17.8 and SD3.5 Large 62.2 TFLOP a guided step."""
    step = Case("step", "sample", cases.MEDIUM, pixels=1024, text=333, batch=1)
    assert floor.flops(step) == pytest.approx(17.8e12, rel=0.01)
    assert floor.flops(replace(step, network=cases.LARGE)) == pytest.approx(62.2e12, rel=0.01)
    assert floor.flops(replace(step, steps=8)) == 8 * floor.flops(step)
    decode = Case("decode", "decode", VAEConfig(), pixels=1024, batch=1)
    assert floor.flops(decode) == pytest.approx(10.47e12, rel=0.01)
    cut = replace(step, work="forward", batch=2, blocks=2)
    assert 0 < floor.flops(cut) < 0.15 * floor.flops(step)
    assert floor.floor_seconds(step, {floor.MATMUL: 2.0}) == pytest.approx(8.9, rel=0.01)
    assert floor.floor_seconds(step, {}) is None
    assert floor.floor_seconds(cases.load_case("100mb"), {floor.MATMUL: 2.0}) is None


def test_arms_that_work_in_turn_are_compared_and_lose_their_times_if_wrong(tmp_path):
    case = Case("sample", "sample", SIZE, pixels=64, text=5, batch=1, steps=2)
    plain = {run.PLAIN: arms.Ours(CPU, plain=True)}
    outcome = run.run_in_turn(case, workers(**plain, old=Broken(CPU)), tmp_path, 2, "cpu")
    assert not outcome.failed
    assert {name: len(arm.seconds) for name, arm in outcome.arms.items()} == {"ours": 2, PLAIN: 2}
    assert outcome.left_out == {"old": "RuntimeError: too old for this"}
    assert outcome.arms["ours"].traffic == {"moved": None, "kernels": None}
    assert outcome.arms["ours"].prepared > 0
    assert "ms/step" in "\n".join(report.lines(outcome))
    wrong = {"wrong": Changed(lambda out: out * 1.01)}
    outcome = run.run_in_turn(case, workers(**wrong), tmp_path, 2, "cpu")
    assert outcome.wrong == ["wrong"]
    assert all(not arm.seconds and not arm.wall for arm in outcome.arms.values())


class Kept(arms.Ours):
    released = 0

    def release(self):
        self.released += 1


def test_in_turn_each_arm_lets_go_before_the_next_one(tmp_path):
    case = Case("sample", "sample", SIZE, pixels=64, text=5, batch=1, steps=2)
    worker = Worker(arm := Kept(CPU))
    process = InThisProcess(arm)
    process.ask = worker.reply
    run.run_in_turn(case, {"ours": process}, tmp_path, 1, "cpu")
    assert arm.released == 1
    assert worker.work is None


def test_what_is_approximate_is_an_arm_whose_distance_is_shown(monkeypatch, tmp_path):
    def unguided(model, positive, negative, sigmas):
        return plain(model, positive)

    monkeypatch.setitem(arms.APPROXIMATIONS, "unguided", unguided)
    assert run.arms_here(run.Options())["ours-unguided"] == {
        "kind": "ours",
        "approximation": "unguided",
        "device": "cpu",
        "threads": None,
    }
    case = Case("sample", "sample", SIZE, pixels=64, text=5, batch=1, steps=2)
    assert run.takes_part("ours-unguided", case)
    assert not run.takes_part("ours-unguided", FORWARD)
    approximate = {
        "ours-unguided": arms.make_arm({"kind": "ours", "approximation": "unguided"}, CPU)
    }
    outcome = run.run_case(case, workers(**approximate), tmp_path, rounds=1)
    assert not outcome.failed
    assert outcome.arms["ours-unguided"].difference > 0.1
    nan = {"ours-unguided": Changed(lambda out: out * float("nan"))}
    assert run.run_case(case, workers(**nan), tmp_path, rounds=1).failed


def test_compiled_blocks_are_an_arm(tmp_path):
    pytest.importorskip("diffusers")
    case = Case("sample", "sample", SIZE, pixels=64, text=5, batch=1, steps=2)
    compiled = {
        "ours-compile": arms.Ours(CPU, way="compile", backend="eager"),
        "diffusers-compile": arms.Diffusers(CPU, backend="eager"),
    }
    outcome = run.run_case(case, workers(**compiled), tmp_path, rounds=2)
    assert not outcome.left_out
    assert not outcome.wrong


def test_a_part_of_the_memory_is_for_arms_that_carry_their_weights():
    (capped,) = (case for case in cases.gpu_cases() if case.memory_gb)
    assert run.Outcome(capped).ours == run.IN_COMFYUI
    assert "in 12 GB" in capped.title


def test_an_arm_that_gives_no_answer_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "NO_ANSWER", 0.0)
    worker = run.WorkerProcess({"kind": "ours", "device": "cpu", "threads": 1})
    try:
        assert worker.ask({"do": "run"}) == {"error": "gave no answer in 0 s"}
        assert worker.ask({"do": "run"}) == {"error": "gave no answer in 0 s"}
    finally:
        worker.close()


def test_when_the_time_is_over_arms_are_left_out(tmp_path):
    deadline = run.Deadline(0.0)
    assert deadline.left <= 0
    assert run.Deadline().left == run.NO_ANSWER


@pytest.mark.long
def test_the_gpu_plan_runs_on_any_device_when_tiny(tmp_path, capsys):
    """Every arm of the plan but the CUDA graph, each in its process; 2 minutes of CPU time."""
    path = tmp_path / "plan.json"
    arguments = ["--gpu-plan", "--quick", "--rounds", "1", "--threads", "1", "--json", str(path)]
    main(["bench", *arguments])  # its status also tells of times, which mean nothing here
    written = json.loads(path.read_text())
    assert written["ceilings"][floor.MATMUL] > 0
    assert [case["name"] for case in written["cases"]] == [c.name for c in cases.gpu_cases()]
    for case in written["cases"]:
        assert case["equal"], case["name"]
        assert not case["left_out"], case["name"]
        assert case["floor"] > 0
        assert all(len(arm["seconds"]) == 1 for arm in case["arms"].values())


def test_the_gpu_plan_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["bench", "--gpu-plan"]) == 2
    assert "device 'cuda' cannot be used here" in capsys.readouterr().err


def test_without_ours_the_case_fails(tmp_path):
    only = {"ours": InThisProcess(Broken(CPU))}
    assert run.run_case(FORWARD, only, tmp_path, rounds=1).failed


def test_ours_alone_runs_in_a_process_of_its_own(monkeypatch, capsys, tmp_path):
    found = run.arms_here(run.Options(threads=1))["ours"]
    monkeypatch.setattr(run, "arms_here", lambda options: {"ours": found})
    load = Case("load", "load", SIZE, dtype="bfloat16")
    monkeypatch.setattr(cases, "quick_cases", lambda size: (load, FORWARD))
    path = tmp_path / "out.json"
    assert main(["bench", "--quick", "--threads", "1", "--rounds", "2", "--json", str(path)]) == 0
    assert capsys.readouterr().out.count("nothing here to compare with") == 3
    written = json.loads(path.read_text())
    assert written["format"] == 1
    assert written["surroundings"]["threads"] == 1
    assert [(c["name"], c["part"]) for c in written["cases"]] == [
        ("load", "call"),
        ("load", "touched"),
        ("forward", ""),
    ]
    for case in written["cases"]:
        assert set(case) >= {"case", "equal", "arms", "largest_value", "left_out", "wrong"}
        assert len(case["arms"]["ours"]["seconds"]) == 2
        assert from_json(case["case"]) in (load, FORWARD)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_diffusers_does_the_same_work(case, tmp_path):
    pytest.importorskip("diffusers")
    outcome = run.run_case(case, workers(diffusers=arms.Diffusers(CPU)), tmp_path, rounds=1)
    assert not outcome.left_out
    assert not outcome.wrong


def test_diffusers_loads_the_same_weights(tmp_path):
    pytest.importorskip("diffusers")
    case = Case("load", "load", SIZE, dtype="bfloat16")
    file = cases.write_weights(case, tmp_path)
    request = {"do": "load", "with": {"case": as_json(case), "file": str(file)}}
    both = workers(diffusers=arms.Diffusers(CPU))
    answers = {name: worker.ask(request) for name, worker in both.items()}
    outcome = run.load_outcome(case, "touched", [answers])
    assert not outcome.left_out
    assert not outcome.wrong


@pytest.mark.parametrize("size", cases.SIZES)
def test_cases_survive_the_way_to_their_worker(size):
    for case in (*cases.all_cases(size), *cases.quick_cases(size), *cases.gpu_cases(), *TINY):
        assert from_json(json.loads(json.dumps(as_json(case)))) == case


def test_the_4gb_file_is_sd3_mediums():
    assert cases.load_case("4gb").network == MMDiTConfig(depth=24)


def test_a_name_stands_for_its_family():
    assert [case.name for case in choose(["steps", "decode-256"])] == [
        "decode-256",
        "steps-1",
        "steps-2",
        "steps-4",
    ]


def test_names_of_cases_are_unique():
    names = [case.name for case in choose()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["forwards"], "there is no case 'forwards'; choose from load, forward"),
        (["--size", "5gb"], "size is '5gb'; choose one of 100mb"),
        (["--reference", "nowhere"], "nowhere: holds no mmditx.py"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments, said, capsys):
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert main(["bench", "--plot", "out.png"]) == 2
    captured = capsys.readouterr()
    assert "pip install matplotlib" in captured.err
    assert captured.out == ""


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    outcomes = [timed_case(f"resolution-{n}", n, n**2.0, 3 * n**2.0) for n in (1, 2, 4)]
    report.plot(tmp_path / "out.png", outcomes)
    assert (tmp_path / "out.png").stat().st_size > 1000


def timed_case(name: str, at: float, ours: float, theirs: float) -> run.Outcome:
    case = Case(name, "forward", SIZE, study=name.partition("-")[0], at=at)
    measured = {"ours": run.Measured(0.0, [ours], [ours]), "b": run.Measured(0.0, [theirs])}
    return run.Outcome(case, arms=measured)


def test_growth_is_the_slope_of_the_logarithms():
    points = [(size, 0.5 * size**1.7) for size in (100.0, 200.0, 400.0)]
    assert report.growth("resolution", "ours", points).exponent == pytest.approx(1.7)


def test_steps_have_a_fixed_cost_and_one_each():
    found = report.growth("steps", "ours", [(1, 2.5), (2, 3.0), (4, 4.0)])
    assert (found.fixed, found.each) == (pytest.approx(2.0), pytest.approx(0.5))


def test_growth_is_found_for_every_arm_of_a_study():
    outcomes = [timed_case(f"batch-{n}", n, 2.0 * n, 3.0 * n) for n in (1, 2, 4)]
    found = report.growths(outcomes)
    assert [(one.study, one.arm) for one in found] == [("batch", "ours"), ("batch", "b")]
    assert all(one.exponent == pytest.approx(1.0) for one in found)


def test_the_ratio_is_ours_over_theirs_round_by_round():
    outcome = timed_case("forward", 1, 1.0, 2.0)
    outcome.arms["ours"].seconds = [1.0, 2.0, 9.0]
    outcome.arms["b"].seconds = [2.0, 2.0, 10.0]
    assert report.ratio(outcome, "b") == report.Ratio(0.9, 0.5, 1.0)
