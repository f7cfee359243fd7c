"""The schedule that the page asks for while somebody turns its widgets."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from sd3_pack.nodes.routes import MOST_STEPS, answer, asked_schedule
from sd3_pack.nodes.sampling import SD3ShiftSchedule
from sd3_pack.sd3_core.schedule import SCHEDULERS

WIDGETS = {"steps": "7", "shift": "2.5", "scheduler": "beta", "denoise": "0.6"}


def test_the_page_sees_what_the_node_would_report():
    ran = SD3ShiftSchedule.execute(steps=7, shift=2.5, scheduler="beta", denoise=0.6)
    (told,) = ran.ui["sd3_report"]
    assert asked_schedule(WIDGETS) == told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": "0"}, "steps is 0"),
        ({"steps": "many"}, "many"),
        ({"steps": str(MOST_STEPS + 1)}, "are drawn before a run"),
        ({"shift": "-1"}, "shift is -1"),
        ({"shift": "nan"}, "shift is nan"),
        ({"shift": "1e308"}, "shift is 1e+308"),
        ({"shift": "1e-320"}, "from 0.0001 to 10000"),
        ({"steps": "9" * 4000}, "are drawn before a run"),
        ({"steps": "9" * 5000}, "4300"),
        ({"scheduler": "x" * 5000}, "choose one of"),
        ({"scheduler": "../karras"}, "choose one of"),
        ({"denoise": "2"}, "denoise is 2"),
    ],
)
def test_what_no_node_would_take_is_refused_with_its_sentence(change, words):
    response = asyncio.run(answer(SimpleNamespace(query={**WIDGETS, **change})))
    assert response.status == 400
    error = json.loads(response.body)["error"]
    assert error.startswith("SD3:bad_setting: ")
    assert words in error
    assert len(error) < 500


@pytest.mark.parametrize("shift", ["0.0001", "0.01", "100", "10000"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_answer_is_json_for_every_shift(shift, scheduler):
    query = {"steps": "30", "shift": shift, "scheduler": scheduler, "denoise": "1"}
    response = asyncio.run(answer(SimpleNamespace(query=query)))
    assert response.status == 200

    def never(word: str) -> None:
        raise AssertionError(word)

    told = json.loads(response.body, parse_constant=never)
    assert len(told["sigmas"]) > 10


def test_a_forgotten_widget_is_named():
    response = asyncio.run(answer(SimpleNamespace(query={"steps": "4", "shift": "1"})))
    assert response.status == 400
    assert "lacks denoise, scheduler" in json.loads(response.body)["error"]
