"""Picking with the mouse: a click is a line in the file, in both renderers."""

import json

import pytest
from PIL import Image
from sd3_pack.sd3_core.training.picks import Picks

STATE = """(id) => {
    const element = app.graph.getNodeById(id).widgets.find((w) => w.name === "sd3_pick").element;
    const boxes = [...element.querySelectorAll("img")];
    return {
        text: element.innerText,
        pictures: boxes.map((box) => new URL(box.src).searchParams.get("filename")),
        loaded: boxes.length > 0 && boxes.every((box) => box.complete && box.naturalWidth > 0),
    };
}"""


def workflow(name):
    nodes = {
        "1": ("LoadImage", {"image": "pick.png"}),
        "2": ("SD3Pick", {"images": ["1", 0], "pick_name": name, "prompt": ""}),
    }
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


@pytest.fixture(autouse=True)
def picture(server):
    """What the workflow's loader shows, whichever test opens it first."""
    Image.new("RGB", (64, 64), "teal").save(server.folder / "input" / "pick.png")


@pytest.fixture
def picks(server, request, tmp_path):
    """A backlog: two pictures, two arms, four pictures."""
    name = "".join(letter for letter in request.node.name if letter.isalnum())
    made = Picks(server.folder / "output" / "sd3_picks" / name)
    colours = ("red", "green", "blue", "white")
    data = []
    for colour in colours:
        Image.new("RGB", (64, 64), colour).save(tmp_path / "one.png")
        data.append((tmp_path / "one.png").read_bytes())
    made.add("two pictures", data[:2])
    made.add("two settings", data[2:], arms=("old", "new"))
    made.add("four pictures", data)
    return made


def lines(picks):
    path = picks.folder / "preferences.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_clicks_are_recorded(editor, picks, screenshot):
    editor.open(workflow(picks.folder.name))
    editor.fit()
    seen = editor.until(lambda: (now := editor.page.evaluate(STATE, 2))["loaded"] and now)
    assert "3 to pick" in seen["text"]
    assert "two pictures" in seen["text"]
    assert len(seen["pictures"]) == 2
    screenshot("-two")

    def click(name):
        editor.page.locator(f'.sd3-pick img[src*="{name}"]').first.click()

    def press(text):
        editor.page.locator(".sd3-pick button", has_text=text).first.click()

    def shows(prompt):
        return editor.until(
            lambda: prompt in (now := editor.page.evaluate(STATE, 2))["text"] and now
        )

    locator = editor.page.locator(f'.sd3-pick img[src*="{seen["pictures"][1]}"]')
    locator.evaluate("(box) => { box.click(); box.click(); }")  # faster than the answer
    seen = shows("two settings")
    (line,) = lines(picks)
    assert line["prompt"] == "two pictures"
    assert "old" not in seen["text"]  # which is which stays hidden
    click(seen["pictures"][0])
    seen = shows("four pictures")
    assert "wins" not in seen["text"]  # nor how it stands, while pictures wait
    press("reveal")
    seen = shows("wins 100 %")
    assert "Seen with 1 to pick" in seen["text"]
    assert len(seen["pictures"]) == 4
    screenshot("-four")
    click(seen["pictures"][0])
    editor.page.evaluate("(id) => app.graph.getNodeById(id).onExecuted({})", 2)  # a run ends
    editor.page.wait_for_timeout(500)
    assert editor.page.locator(".sd3-pick img.sd3-best").count() == 1
    click(seen["pictures"][3])
    shows("Everything is picked")
    decided = [line for line in lines(picks) if line["prompt"] == "four pictures"]
    assert len(decided) == 5
    assert decided[0]["chosen"].endswith(seen["pictures"][0])
    assert all(line["rejected"].endswith(seen["pictures"][3]) for line in decided[3:])
    press("undo")
    seen = shows("four pictures")
    press("tie")
    shows("Everything is picked")
    assert "tie" in lines(picks)[-1]


def test_a_group_decided_in_another_window_gives_way_to_the_next(editor, picks):
    editor.open(workflow(picks.folder.name))
    seen = editor.until(lambda: (now := editor.page.evaluate(STATE, 2))["loaded"] and now)
    picks.vote(picks.open_groups()[0].id, verdict="tie")
    editor.page.locator(f'.sd3-pick img[src*="{seen["pictures"][0]}"]').dblclick()
    seen = editor.until(
        lambda: "two settings" in (now := editor.page.evaluate(STATE, 2))["text"] and now
    )
    assert "decided already" in seen["text"]
    assert len(lines(picks)) == 1
    assert all("409" in heard for heard in editor.errors)
    editor.errors.clear()  # Chromium's line about the answer


def test_a_backlog_that_is_not_there_yet_says_so(editor):
    editor.open(workflow("nothing-yet"))
    editor.until(lambda: "Run to collect" in editor.page.evaluate(STATE, 2)["text"])
