"""The schedule that the page asks for while somebody turns its widgets."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from sd3_pack.nodes.routes import MOST_STEPS, answer, asked_schedule
from sd3_pack.nodes.sampling import SD3ShiftSchedule

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


def test_a_forgotten_widget_is_named():
    response = asyncio.run(answer(SimpleNamespace(query={"steps": "4", "shift": "1"})))
    assert response.status == 400
    assert "lacks denoise, scheduler" in json.loads(response.body)["error"]
