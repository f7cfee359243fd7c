"""SD3 Pick: the node beside the queue, and its two addresses under everything that may be sent."""

import asyncio
import json
import threading
from dataclasses import replace

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from sd3_pack.nodes import pick
from sd3_pack.nodes.errors import NodeError
from sd3_pack.nodes.pick import SD3Pick
from sd3_pack.nodes.threads import _WAITING, MOST_WAITING
from sd3_pack.nodes.wires import ATTACHMENT, Origin
from sd3_pack.sd3_core.embedded.captions import short_caption
from sd3_pack.sd3_core.embedded.render import draw
from sd3_pack.sd3_core.embedded.scenes import scenes
from sd3_pack.sd3_core.training.picks import Picks


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path / "output"


def images(count, seed=0):
    return torch.rand(count, 64, 64, 3, generator=torch.Generator().manual_seed(seed))


def told(result):
    return result.ui["sd3_report"][0]


def talk(*requests):
    """The answers to (method, path, options) on a server of the two addresses alone."""

    async def run():
        application = web.Application()
        application.router.add_get(pick.ADDRESS, pick.show)
        application.router.add_post(pick.ADDRESS, pick.vote)
        answers = []
        async with TestClient(TestServer(application)) as client:
            for method, path, options in requests:
                async with client.request(method, path, **options) as answer:
                    text = await answer.text()
                    is_json = answer.content_type == "application/json"
                    answers.append((answer.status, json.loads(text) if is_json else text))
        return answers

    with torch.inference_mode(False):
        return asyncio.run(run())


def ask(name="mine"):
    return talk(("GET", f"/sd3_workbench/picks/{name}", {}))[0]


def send(body, name="mine"):
    return talk(("POST", f"/sd3_workbench/picks/{name}", {"json": body}))[0]


# The node


def test_pictures_pass_through_and_wait_in_the_backlog():
    batch = images(3)
    result = SD3Pick.execute(batch, "mine", " a circle ", seed=5)
    assert torch.equal(result.args[0], batch)
    assert told(result) == {
        "pick_name": "mine",
        "added": 1,
        "open": 1,
        "decided": 0,
        "comparison": None,
        "problem": "",
    }
    assert told(SD3Pick.execute(batch, "mine", "a circle", seed=5))["open"] == 1


def test_grey_candidates_are_kept_and_what_is_no_picture_is_named(output):
    grey = torch.rand(2, 8, 8, 1)
    SD3Pick.execute(grey, "mine", "x")
    SD3Pick.execute(grey.repeat(1, 1, 1, 3), "mine", "x")
    assert len(Picks(output / "sd3_picks" / "mine").groups()) == 1
    broken = images(2)
    broken[0, 0] = float("nan")
    with pytest.raises(NodeError, match="not_finite: images holds NaN .*picture 1 of 2"):
        SD3Pick.execute(broken, "mine", "x")
    with pytest.raises(NodeError, match="not_finite: images_b holds NaN"):
        SD3Pick.execute(images(2), "mine", "x", broken)


def test_half_a_character_is_refused_and_writes_nothing(output):
    with pytest.raises(NodeError, match="bad_setting: the prompt holds half a character"):
        SD3Pick.execute(images(2), "mine", "a \ud83d cat")
    assert not (output / "sd3_picks" / "mine").exists()


def test_lines_that_an_editor_saved_with_a_mark_all_count(output):
    SD3Pick.execute(images(2), "mine", "x")
    picks = Picks(output / "sd3_picks" / "mine")
    file = picks.folder / "candidates.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(picks.groups()) == 1


@pytest.mark.parametrize(("count", "sizes"), [(2, [2]), (4, [4]), (5, [3, 2]), (9, [3, 3, 3])])
def test_a_batch_is_cut_into_groups_of_two_to_four(output, count, sizes):
    SD3Pick.execute(images(count), "mine", "x")
    groups = Picks(output / "sd3_picks" / "mine").groups().values()
    assert [len(group.pictures) for group in groups] == sizes


def test_equal_pictures_of_a_batch_come_once(output):
    SD3Pick.execute(images(3)[[0, 1, 0, 2, 1, 0]], "mine", "x")
    (group,) = Picks(output / "sd3_picks" / "mine").open_groups()
    assert len(group.pictures) == 3
    assert group.places == (0, 1, 3)


def test_each_picks_place_in_its_batch_is_stored(output):
    SD3Pick.execute(images(5), "mine", "x", seed=9)
    picks = Picks(output / "sd3_picks" / "mine")
    assert [group.places for group in picks.groups().values()] == [(0, 1, 2), (3, 4)]
    last = picks.open_groups()[1]
    picks.vote(last.id, best=last.pictures[1])
    (line,) = (json.loads(text) for text in (picks.folder / "preferences.jsonl").open())
    assert (line["seed"], line["places"]) == (9, [4, 3])
    SD3Pick.execute(images(2), "two", "x", images(2, seed=1))
    two = Picks(output / "sd3_picks" / "two").groups().values()
    assert [group.places for group in two] == [(0, 0), (1, 1)]


def test_a_comparison_is_told_at_its_end_or_when_asked_for():
    SD3Pick.execute(images(2), "mine", "x", images(2, seed=1), "cfg 3", "cfg 7")
    group = ask()[1]["group"]
    status, seen = send({"group": group["id"], "best": group["pictures"][0]})
    assert (status, seen["decided"], seen["open"]) == (200, 1, 1)
    assert seen["hidden"]
    assert "cfg" not in json.dumps(seen)
    assert "wins" not in json.dumps(seen)
    ((_, revealed),) = talk(("GET", "/sd3_workbench/picks/mine?reveal=1", {}))
    assert sum(revealed["comparison"]["wins"]) == 1
    assert not revealed["hidden"]
    assert ask()[1]["comparison"] is None  # asked for anew each time
    _, seen = send({"group": seen["group"]["id"], "verdict": "tie"})
    assert seen["comparison"]["ties"] == 1
    assert not seen["hidden"]


def test_what_drew_each_side_is_stored_with_its_loras(output):
    class Model:
        def __init__(self, *loras, patches=0):
            origin = Origin(files={"mmdit": {"file": "base.safetensors"}}, loras=loras)
            self.attachments = {ATTACHMENT: replace(origin, lora_patches=len(loras))}
            self.patches = {str(n): [None] for n in range(len(loras) + patches)}

    plain, taught = Model(), Model({"file": "mine.safetensors", "strength": 0.8})
    natively = Model(patches=2)
    SD3Pick.execute(images(2), "one", "x", model=taught)
    SD3Pick.execute(images(1), "two", "x", images(1, seed=1), model=plain, model_b=taught)
    SD3Pick.execute(images(1), "three", "x", images(1, seed=1), model=plain)
    SD3Pick.execute(images(1), "four", "x", images(1, seed=1), model=plain, model_b=natively)
    one, two, three, four = (
        next(iter(Picks(output / "sd3_picks" / name).groups().values()))
        for name in ("one", "two", "three", "four")
    )
    named = "base.safetensors + mine.safetensors x 0.8"
    assert four.models[1] == "base.safetensors + a LoRA of 2 layers from another loader"
    assert (one.model, one.models) == (named, ())
    assert (two.model, two.models) == ("", ("base.safetensors", named))
    assert (three.model, three.models) == ("base.safetensors", ())
    assert three.seed is None


def test_a_vote_that_comes_in_pieces_counts(output):
    SD3Pick.execute(images(2), "mine", "x")
    group = ask()[1]["group"]
    whole = json.dumps({"group": group["id"], "verdict": "tie"}).encode()

    async def in_pieces():
        for piece in (whole[:9], whole[9:20], whole[20:]):
            yield piece
            await asyncio.sleep(0.05)

    headers = {"Content-Type": "application/json"}
    path = "/sd3_workbench/picks/mine"
    ((status, seen),) = talk(("POST", path, {"data": in_pieces(), "headers": headers}))
    assert (status, seen["decided"]) == (200, 1)


def test_a_disk_that_takes_nothing_is_told_in_json(output, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    SD3Pick.execute(images(2), "mine", "x")
    group = ask()[1]["group"]
    monkeypatch.setattr(Picks, "_append", full)
    status, told = send({"group": group["id"], "verdict": "tie"})
    assert status == 507
    assert "No space left on device" in told["error"]


@pytest.fixture
def world():
    """A prompt, four pictures that are as asked, and four that are not."""
    shown = scenes(3, range(40), (64, 64), kinds={"single": 1.0})
    asked = short_caption(shown[0])
    drawn = (draw(shown).permute(0, 2, 3, 1) + 1) / 2
    shape = shown[0].things[0].shape
    wrong = [place for place, one in enumerate(shown) if one.things[0].shape != shape]
    right = drawn[:1].repeat(4, 1, 1, 1)
    right[range(4), 0, 0, 0] -= torch.arange(4) / 255  # as asked all the same, but not equal
    return asked, right, drawn[wrong[:4]]


def test_the_checker_votes_at_once(output, world):
    asked, right, wrong = world
    batch = torch.cat([wrong[:1], right[:1], wrong[1:2], right[1:2]])
    for _ in range(2):  # the same candidates are not judged again
        result = SD3Pick.execute(batch, "mine", asked, judge="checker")
        assert (told(result)["open"], told(result)["decided"]) == (0, 1)
    picks = Picks(output / "sd3_picks" / "mine")
    ((group, lines),) = picks.votes().items()
    one, two, three, four = (f"pictures/{name}" for name in picks.groups()[group].pictures)
    assert {(line["chosen"], line["rejected"]) for line in lines} == {
        (two, one),
        (two, three),
        (four, one),
        (four, three),
    }
    assert told(SD3Pick.execute(wrong, "mine", asked))["open"] == 1  # a person's


def test_the_checker_compares_two_settings(output, world):
    asked, right, wrong = world
    ours = torch.cat([right[:2], wrong[:1], right[2:3]])
    others = torch.cat([wrong[:1], right[2:3], wrong[1:2], wrong[2:3]])
    result = SD3Pick.execute(ours, "mine", asked, others, "new", "old", judge="checker")
    comparison = told(result)["comparison"]
    assert comparison["arms"] == ("new", "old")
    assert (comparison["wins"], comparison["ties"]) == ((2, 0), 2)


def test_the_checker_refuses_what_is_outside_of_its_world(output):
    with pytest.raises(NodeError, match='judge is checker, .*"lighthouse".*Choose me'):
        SD3Pick.execute(images(2), "mine", "a lighthouse", judge="checker")
    assert not (output / "sd3_picks").exists()


def test_more_labels_than_two_are_said():
    SD3Pick.execute(images(1), "mine", "x", images(1, seed=1), "a", "b")
    assert ask()[1]["problem"] == ""
    result = SD3Pick.execute(images(1), "mine", "x", images(1, seed=2), "a", "c")
    assert "holds 3 labels (a, b, c)" in told(result)["problem"]
    assert "holds 3 labels" in ask()[1]["problem"]


def test_equal_pictures_of_two_settings_are_ties(output):
    batch = images(3)
    result = SD3Pick.execute(batch, "mine", "x", torch.cat([batch[:2], images(1, 1)]), "a", "b")
    assert (told(result)["added"], told(result)["open"]) == (3, 1)
    assert Picks(output / "sd3_picks" / "mine").comparison().ties == 2


def test_two_settings_are_compared_blindly(output):
    SD3Pick.execute(images(3), "mine", "x", images(3, seed=1), "cfg 3", "cfg 7")
    picks = Picks(output / "sd3_picks" / "mine")
    assert [group.arms for group in picks.groups().values()] == [("cfg 3", "cfg 7")] * 3
    status, seen = ask()
    assert status == 200
    assert "cfg" not in json.dumps(seen)
    for group in picks.open_groups():
        status, seen = send({"group": group.id, "best": group.pictures[1]})
        assert status == 200
    assert seen["comparison"]["wins"] == [3, 0]
    assert seen["comparison"]["arms"] == ["cfg 7", "cfg 3"]  # the leading one first
    assert seen["group"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((images(1), "mine", "x"), "one picture is no choice"),
        ((images(1).repeat(4, 1, 1, 1), "mine", "x"), "the 4 pictures are all equal"),
        ((images(2), "mine", "x", images(3)), "images has 2 pictures and images_b 3"),
        ((images(2), "mine", "x", images(2, 1), "A", "A"), "name them apart"),
        ((images(2), "../mine", "x"), "pick_name is '../mine'"),
        ((images(2), "", "x"), "pick_name is ''"),
    ],
)
def test_what_is_no_choice_is_refused(output, arguments, message):
    with pytest.raises(NodeError, match=message):
        SD3Pick.execute(*arguments)
    assert not (output / "sd3_picks").exists()


def test_a_name_is_checked_before_anything_runs():
    assert "pick_name is 'a/b'" in str(SD3Pick.validate_inputs("a/b"))
    assert SD3Pick.validate_inputs("my picks-2") is True


# The addresses


def test_a_click_is_recorded_and_the_next_group_comes(output):
    for number in range(2):
        SD3Pick.execute(images(2, seed=number), "mine", f"prompt {number}")
    status, first = ask()
    assert (status, first["open"], first["decided"]) == (200, 2, 0)
    assert first["subfolder"] == "sd3_picks/mine/pictures"
    best = first["group"]["pictures"][1]
    assert (output / first["subfolder"] / best).is_file()
    status, second = send({"group": first["group"]["id"], "best": best})
    assert (status, second["open"], second["decided"]) == (200, 1, 1)
    assert second["group"]["prompt"] != first["group"]["prompt"]
    assert send({"undo": True})[1]["open"] == 2
    lines = (output / "sd3_picks" / "mine" / "preferences.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["chosen"] == f"pictures/{best}"
    assert "undo" in json.loads(lines[1])


ESCAPES = [
    "..",
    "%2e%2e",
    "..%2f..%2fetc",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "..%5c..%5cwindows",
    "%2fetc%2fpasswd",
    "C%3a%5cwindows",
    "mine%00.png",
    "mine%2f..%2f..%2fother",
    ".hidden",
    "~root",
    "con",
    "mine%20",
    "x" * 300,
    "mine%0aother",
    "%F0%9F%98%80",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_leads_elsewhere_is_refused_and_makes_nothing(output, name):
    from yarl import URL

    SD3Pick.execute(images(2), "mine", "x")
    before = sorted(output.parent.rglob("*"))
    url = URL(f"/sd3_workbench/picks/{name}", encoded=True)
    for answer in talk(("GET", url, {}), ("POST", url, {"json": {"undo": True}})):
        assert answer[0] in (400, 404)
    assert sorted(output.parent.rglob("*")) == before


def test_a_link_out_of_the_folder_is_refused(output, tmp_path_factory):
    SD3Pick.execute(images(2), "mine", "x")
    outside = tmp_path_factory.mktemp("outside")
    (output / "sd3_picks" / "link").symlink_to(outside, target_is_directory=True)
    assert ask("link")[0] == 400


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"1" * 4000,
        b"[" * 4000,
        b"\xff\xfe\x00",
        b"{}",
        b'{"undo": false}',
        b'{"undo": 1, "group": "x"}',
        b'{"group": 1, "best": "x"}',
        b'{"group": ["x"], "best": "x"}',
        b'{"group": "x", "best": {"a": 1}}',
        b'{"group": "x", "best": null}',
        b'{"group": "x", "chosen": "x"}',
        b'{"verdict": "tie"}',
        b'{"group": "x", "undo": true}',
    ],
)
def test_a_malformed_body_is_refused_and_writes_nothing(output, body):
    SD3Pick.execute(images(2), "mine", "x")
    options = {"data": body, "headers": {"Content-Type": "application/json"}}
    ((status, answer),) = talk(("POST", "/sd3_workbench/picks/mine", options))
    assert status == 400
    assert answer["error"].endswith(".")
    assert not (output / "sd3_picks" / "mine" / "preferences.jsonl").exists()


def test_a_vote_that_does_not_fit_is_a_conflict(output):
    SD3Pick.execute(images(2), "mine", "x")
    group = ask()[1]["group"]
    for body in (
        {"group": "nobody", "best": "x"},
        {"group": group["id"], "best": "../../../secret.png"},
        {"group": group["id"]},
        {"group": group["id"], "verdict": "both"},
        {"undo": True},
    ):
        status, answer = send(body)
        assert status == 409
        assert answer["error"]
    assert send({"group": group["id"], "verdict": "tie"})[0] == 200
    assert send({"group": group["id"], "verdict": "tie"})[0] == 409
    status, nothing = ask("nothing here")
    assert (status, nothing["group"], nothing["open"]) == (200, None, 0)
    assert send({"undo": True}, "nothing here")[0] == 409
    assert not (output / "sd3_picks" / "nothing here").exists()


def test_a_flood_stays_small(output):
    """Large bodies are not read to their end; the same vote again and again is written once."""
    SD3Pick.execute(images(2), "mine", "x")
    group = ask()[1]["group"]
    path = "/sd3_workbench/picks/mine"
    body = {"group": group["id"], "best": group["pictures"][0]}
    large = {"data": b'{"group": "' + b"x" * 100_000 + b'"}'}
    large["headers"] = {"Content-Type": "application/json"}
    answers = talk(*[("POST", path, {"json": body})] * 50, ("POST", path, large))
    assert [status for status, _ in answers] == [200] + [409] * 49 + [413]
    lines = (output / "sd3_picks" / "mine" / "preferences.jsonl").read_text().splitlines()
    assert len(lines) == 1


def test_abandoned_requests_hold_no_thread_but_ours(output, monkeypatch):
    """The event loop's own threads stay free, and who asks too much is told so."""
    monkeypatch.setattr(pick, "state", lambda picks, reveal: stuck.wait(60) and {})
    stuck = threading.Event()
    path = "/sd3_workbench/picks/mine"

    async def run():
        application = web.Application()
        application.router.add_get(pick.ADDRESS, pick.show)
        async with TestClient(TestServer(application)) as client:
            asked = [asyncio.ensure_future(client.get(path)) for _ in range(MOST_WAITING)]
            while len(_WAITING) < MOST_WAITING:
                await asyncio.sleep(0.01)
            beyond = await client.get(path)
            told = await beyond.json()
            assert await asyncio.wait_for(asyncio.to_thread(lambda: "at once"), 30) == "at once"
            for one in asked[1:]:
                one.cancel()  # nobody waits for these any more
            stuck.set()
            answered = await asked[0]
            while _WAITING:
                await asyncio.sleep(0.01)
            after = await client.get(path)
            return beyond, told, answered.status, after.status

    try:
        beyond, told, *others = asyncio.run(run())
    finally:
        stuck.set()
    assert (beyond.status, beyond.headers["Retry-After"]) == (503, "2")
    assert "too many requests" in told["error"]
    assert others == [200, 200]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_another_pages_form_cannot_vote(kind):
    SD3Pick.execute(images(2), "mine", "x")
    options = {"data": b'{"undo": true}', "headers": {"Content-Type": kind}}
    ((status, _),) = talk(("POST", "/sd3_workbench/picks/mine", options))
    assert status == 415


def test_votes_at_the_same_time_are_all_kept(output):
    from concurrent.futures import ThreadPoolExecutor

    for number in range(20):
        SD3Pick.execute(images(2, seed=number), "mine", f"prompt {number}")
    picks = Picks(output / "sd3_picks" / "mine")
    groups = picks.open_groups()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda group: picks.vote(group.id, best=group.pictures[0]), groups))
    lines = (output / "sd3_picks" / "mine" / "preferences.jsonl").read_text().splitlines()
    assert len({json.loads(line)["group"] for line in lines}) == 20


@pytest.mark.parametrize("odd", ["{}", '{"group": []}', '{"pictures": 5}', "[" * 100_000])
def test_an_odd_line_is_told_and_the_folder_stays_usable(output, odd):
    SD3Pick.execute(images(2), "mine", "a")
    for name in ("candidates.jsonl", "preferences.jsonl"):
        with (output / "sd3_picks" / "mine" / name).open("a") as file:
            file.write(odd + "\n")
    status, state = ask()
    assert status == 200
    assert "passed over; the first: candidates.jsonl:2: " in state["problem"]
    group = state["group"]
    status, state = send({"group": group["id"], "best": group["pictures"][0]})
    assert (status, state["decided"]) == (200, 1)
    assert send({"undo": True})[1]["open"] == 1
