"""The backlog, the votes and what they say: appended, taken back, read as preferences."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO, FileIO
from pathlib import Path

import pytest
from PIL import Image
from sd3_pack.sd3_core.training.folders import Source
from sd3_pack.sd3_core.training.framing import Framing
from sd3_pack.sd3_core.training.picks import PickRefused, Picks, compare
from sd3_pack.sd3_core.training.preferences import read_preferences


def picture(*colour) -> bytes:
    data = BytesIO()
    Image.new("RGB", (64, 64), colour).save(data, format="PNG")
    return data.getvalue()


RED, GREEN, BLUE, WHITE = (
    picture(*c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
)


@pytest.fixture
def picks(tmp_path):
    return Picks(tmp_path / "mine", clock=lambda: 1_700_000_000)


def pairs(picks):
    dataset = read_preferences([Source(picks.folder)], framing=Framing(64, 16))
    return [(item.picture.path.name, item.loser.picture.path.name) for item in dataset.items]


def test_a_pick_of_two_is_one_pair(picks):
    group = picks.add("a circle", [RED, BLUE], seed=7, model="tiny")
    red, blue = group.pictures
    assert [one.id for one in picks.open_groups()] == [group.id]
    picks.vote(group.id, best=blue)
    assert picks.open_groups() == []
    assert pairs(picks) == [(blue, red)]
    (line,) = (json.loads(text) for text in (picks.folder / "preferences.jsonl").open())
    assert (line["prompt"], line["seed"], line["model"]) == ("a circle", 7, "tiny")
    assert line["time"].startswith("2023-11-1")


def test_each_arms_model_stands_beside_the_vote(picks):
    made = {"arms": ("old", "new"), "models": ("base", "base + mine 0.8")}
    red, blue = picks.add("x", [RED, BLUE], **made).pictures
    group, other = picks.add("y", [RED, BLUE], **made), picks.add("z", [RED, BLUE], **made)
    picks.vote(group.id, best=blue)
    picks.vote(other.id, verdict="tie")
    won, tie = (json.loads(text) for text in (picks.folder / "preferences.jsonl").open())
    assert (won["arms"], won["models"]) == (["new", "old"], ["base + mine 0.8", "base"])
    assert (tie["arms"], tie["models"]) == (["old", "new"], ["base", "base + mine 0.8"])
    assert (blue, red) in pairs(picks)


@pytest.mark.parametrize(("worst", "count"), [(3, 5), (None, 3)])
def test_best_and_worst_of_four_are_all_the_pairs_they_decide(picks, worst, count):
    group = picks.add("x", [RED, GREEN, BLUE, WHITE])
    names = group.pictures
    picks.vote(group.id, best=names[1], worst="" if worst is None else names[worst])
    found = pairs(picks)
    assert len(found) == len(set(found)) == count
    assert {(names[1], names[0]), (names[1], names[2]), (names[1], names[3])} <= set(found)
    if worst is not None:
        assert {(names[0], names[3]), (names[2], names[3])} <= set(found)


def test_a_judges_right_pictures_go_before_its_wrong_ones(picks):
    group = picks.add("x", [RED, GREEN, BLUE, WHITE])
    one, two, three, four = group.pictures
    picks.judge(group.id, {two, four}, by="checker")
    assert set(pairs(picks)) == {(two, one), (two, three), (four, one), (four, three)}
    for right in (set(), {one, two}):
        picks.judge(picks.add(f"{len(right)}", [RED, GREEN]).id, right, by="checker")
    lines = [line for vote in picks.votes().values() for line in vote]
    assert ["tie" in line for line in lines] == [False] * 4 + [True] * 2
    assert {line["by"] for line in lines} == {"checker"}
    with pytest.raises(PickRefused, match="decided already"):
        picks.judge(group.id, {one}, by="checker")


def test_an_undone_vote_teaches_nothing_and_may_be_cast_anew(picks):
    first, second = picks.add("x", [RED, BLUE]), picks.add("y", [RED, GREEN, BLUE])
    picks.vote(second.id, best=second.pictures[0], worst=second.pictures[1])
    picks.vote(first.id, best=first.pictures[0])
    assert picks.undo() == first.id
    assert len(pairs(picks)) == 3
    picks.vote(first.id, best=first.pictures[1])
    assert pairs(picks)[-1] == (first.pictures[1], first.pictures[0])
    assert picks.undo() == first.id
    assert picks.undo() == second.id
    with pytest.raises(PickRefused, match="no vote to take back"):
        picks.undo()
    assert {one.id for one in picks.open_groups()} == {first.id, second.id}


def test_votes_saved_by_pandas_stand(picks):
    """It gives each line every column, so each has an "undo" that is null."""
    first, second = picks.add("x", [RED, BLUE]), picks.add("y", [RED, GREEN])
    picks.vote(first.id, best=first.pictures[0])
    picks.vote(second.id, best=second.pictures[1])
    picks.undo()
    before = picks.votes(), picks.groups()
    for name in ("preferences.jsonl", "candidates.jsonl"):
        file = picks.folder / name
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        every = {column: None for line in lines for column in line}
        file.write_text("".join(json.dumps({**every, **line}) + "\n" for line in lines))
    assert list(picks.votes()) == list(before[0]) == [first.id]
    assert picks.groups() == before[1]
    assert len(pairs(picks)) == 1


def test_ties_and_skips_are_decided_and_say_nothing(picks):
    for verdict, colour in (("tie", BLUE), ("skip", GREEN)):
        picks.vote(picks.add("x", [RED, colour]).id, verdict=verdict)
    picks.vote(picks.add("x", [RED, WHITE]).id, best=picks.open_groups()[0].pictures[0])
    report = read_preferences([Source(picks.folder)], framing=Framing(64, 16)).report
    assert (report.pictures, report.ties, report.passed) == (1, 1, 1)
    assert not picks.open_groups()


def test_the_same_candidates_come_once(picks):
    first = picks.add("x", [RED, BLUE])
    assert picks.add("x", [RED, BLUE]) == first
    picks.vote(first.id, verdict="tie")
    picks.add("x", [RED, BLUE])
    assert picks.open_groups() == []
    assert len(picks.groups()) == 1


def test_sides_are_shuffled_but_stay_where_they_are(picks):
    groups = [picks.add(f"prompt {n}", [RED, BLUE], arms=("old", "new")) for n in range(40)]
    shown = [group.shown() for group in groups]
    assert shown == [group.shown() for group in picks.groups().values()]
    first = sum(order[0] == group.pictures[0] for order, group in zip(shown, groups, strict=True))
    assert 8 < first < 32
    assert all(len(name) == 20 for name in groups[0].pictures)  # no name tells the arm


def test_a_blind_comparison_counts_wins_by_arm(picks):
    for number, winner in enumerate("aaab"):
        group = picks.add(f"p{number}", [RED, BLUE], arms=("a", "b"))
        picks.vote(group.id, best=group.pictures["ab".index(winner)])
    picks.vote(picks.add("tied", [RED, BLUE], arms=("a", "b")).id, verdict="tie")
    picks.vote(picks.add("not asked", [RED, BLUE]).id, verdict="tie")
    result = picks.comparison()
    assert (result.wins, result.ties) == ((3, 1), 1)
    assert result.rate == pytest.approx(0.7)
    assert len(pairs(picks)) == 4  # the same votes are pairs for DPO
    picks.undo()
    picks.undo()
    assert picks.comparison().ties == 0


@pytest.mark.parametrize(
    ("wins", "ties", "low", "high"),
    # Wilson's interval, as statsmodels' proportion_confint(method="wilson") gives it
    [
        ((8, 2), 0, 0.4901625, 0.9433178),
        ((0, 10), 0, 0.0, 0.2775328),
        ((50, 50), 0, 0.4038, 0.5962),
    ],
)
def test_the_interval_is_wilsons(wins, ties, low, high):
    result = compare(("a", "b"), wins, ties)
    assert result.low == pytest.approx(low, abs=1e-4)
    assert result.high == pytest.approx(high, abs=1e-4)


@pytest.mark.parametrize("wins", [(6, 4), (8, 2), (3, 1), (55, 45)])
def test_the_votes_needed_are_the_fewest_whose_interval_excludes_one_half(wins):
    result = compare(("a", "b"), wins, 0)
    total, rate = sum(wins) + result.needed, result.rate

    def low(votes):
        share = 1.959964**2 / votes
        half = math.sqrt(rate * (1 - rate) * share + share**2 / 4)
        return (rate + share / 2 - half) / (1 + share)

    assert low(total) >= 0.5
    assert low(total - 1) < 0.5 or result.needed == 0


def test_equal_arms_need_no_number_of_votes():
    assert compare(("a", "b"), (3, 3), 2).needed is None
    assert compare(("a", "b"), (0, 0), 0) is None


def test_votes_on_one_group_at_the_same_time_are_one_vote(picks, monkeypatch):
    group = picks.add("x", [RED, BLUE])
    together = threading.Barrier(8)
    read = Picks.votes

    def read_together(self):
        """What lets all in at once if reading is not locked; else nobody meets and it goes on."""
        found = read(self)
        with suppress(threading.BrokenBarrierError):
            together.wait(0.2)
        return found

    monkeypatch.setattr(Picks, "votes", read_together)

    def vote(number):
        try:
            Picks(picks.folder).vote(group.id, best=group.pictures[number % 2])
        except PickRefused as error:
            return str(error)
        return "taken"

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(vote, range(8)))
    assert answers.count("taken") == 1
    assert sum("decided already" in answer for answer in answers) == 7
    assert len(pairs(picks)) == 1


def test_a_vote_that_cannot_be_is_refused_and_writes_nothing(picks):
    group = picks.add("x", [RED, BLUE])
    other = picks.add("y", [GREEN, WHITE])
    red, blue = group.pictures
    for arguments in (
        {"best": other.pictures[0]},
        {"best": red, "worst": red},
        {"best": "../../secret.png"},
        {"worst": red},
        {},
        {"verdict": "both"},
        {"verdict": "tie", "best": red},
    ):
        with pytest.raises(PickRefused):
            picks.vote(group.id, **arguments)
    with pytest.raises(PickRefused, match="no such group"):
        picks.vote("../x", best=red)
    assert not (picks.folder / "preferences.jsonl").exists()
    picks.vote(group.id, best=red)
    with pytest.raises(PickRefused, match="decided already"):
        picks.vote(group.id, best=blue)
    assert len(pairs(picks)) == 1


def test_equal_candidates_are_one(picks):
    group = picks.add("x", [RED, BLUE, RED, BLUE])
    assert group.pictures == picks.add("x", [RED, BLUE]).pictures
    picks.vote(group.id, best=group.pictures[1])
    assert pairs(picks) == [group.pictures[::-1]]
    with pytest.raises(PickRefused, match="all equal"):
        picks.add("y", [RED, RED, RED])
    assert len(picks.groups()) == 1


def test_equal_pictures_of_two_arms_are_a_tie_without_a_vote(picks):
    group = picks.add("x", [RED, BLUE], arms=("a", "b"))
    equal = picks.add("y", [RED, RED], arms=("a", "b"))
    assert picks.open_groups() == [group]
    picks.vote(group.id, best=group.pictures[1])
    result = picks.comparison()
    assert (result.arms, result.wins, result.ties) == (("b", "a"), (1, 0), 1)
    with pytest.raises(PickRefused, match="decided already"):
        picks.vote(equal.id, best=equal.pictures[0])
    assert picks.undo() == group.id


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_group_has_two_to_four_pictures(picks, count):
    with pytest.raises(PickRefused, match="2 to 4"):
        picks.add("x", [RED] * count)


def test_a_torn_line_is_left_out(picks):
    group = picks.add("x", [RED, BLUE])
    picks.vote(group.id, verdict="tie")
    with (picks.folder / "candidates.jsonl").open("a") as file:
        file.write('{"id": "half')
    assert len(picks.groups()) == 1


ODD = [
    "{}",
    "[]",
    "7",
    '{"a":' * 100_000,
    "[" * 100_000,
    json.dumps({"id": [], "prompt": "x", "pictures": ["a.png", "b.png"]}),
    json.dumps({"id": "x", "prompt": "x", "pictures": 5}),
    json.dumps({"id": "x", "prompt": "x", "pictures": ["a.png", "../../../b.png"]}),
    json.dumps({"id": "x", "prompt": 1, "pictures": ["a.png", "b.png"]}),
    json.dumps({"id": "x", "prompt": "\ud83d", "pictures": ["a.png", "b.png"]}),
    json.dumps({"id": "x", "prompt": "x", "pictures": ["a.png", "b.png"], "arms": ["one"]}),
    json.dumps({"id": "x", "prompt": "x", "pictures": ["a.png", "b.png"], "places": [0, None]}),
    json.dumps({"group": []}),
    json.dumps({"group": "x", "chosen": "a"}),  # no id: it could not be taken back
    json.dumps({"group": "x", "id": "x:0", "arms": 5}),
    json.dumps({"undo": {}}),
]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_an_odd_line_costs_itself_only_and_is_told(picks, odd):
    blind = {"arms": ("old", "new")}
    first, second = picks.add("x", [RED, BLUE], **blind), picks.add("y", [RED, GREEN], **blind)
    assert picks.passed_over() == []
    for name in ("preferences.jsonl", "candidates.jsonl"):
        with (picks.folder / name).open("a") as file:
            file.write(odd + "\n")
    picks.vote(first.id, best=first.pictures[0])
    picks.vote(second.id, verdict="tie")
    assert picks.undo() == second.id
    assert picks.open_groups() == [second]
    assert picks.comparison().wins == (1, 0)
    assert any(one.startswith("candidates.jsonl:3: ") for one in picks.passed_over())
    assert max(map(len, picks.passed_over())) < 200


@pytest.mark.parametrize("torn", [b'{"id": "ha', '{"prompt": "Grü'.encode()[:-1], b"{"])
def test_a_vote_after_a_torn_one_is_kept(picks, torn):
    first, second = picks.add("x", [RED, BLUE]), picks.add("y", [RED, GREEN])
    picks.vote(first.id, best=first.pictures[0])
    for name in ("preferences.jsonl", "candidates.jsonl"):
        with (picks.folder / name).open("ab") as file:
            file.write(torn)
    picks.vote(second.id, best=second.pictures[1])
    third = picks.add("z", [RED, WHITE])
    assert picks.votes().keys() == {first.id, second.id}
    assert picks.open_groups() == [third]
    assert pairs(picks) == [first.pictures, second.pictures[::-1]]


def test_a_write_in_pieces_is_a_whole_line(picks, monkeypatch):
    group = picks.add("x", [RED, BLUE])
    opened = Path.open

    class Slow(FileIO):
        def write(self, data):
            return super().write(data[:10])

    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", *rest, **named: (
            Slow(self, mode) if mode == "ab+" else opened(self, mode, *rest, **named)
        ),
    )
    picks.vote(group.id, best=group.pictures[0])
    assert pairs(picks) == [group.pictures]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r"])
def test_a_prompt_may_hold_what_parts_lines_elsewhere(picks, mark):
    prompt = f"a{mark}circle"
    group = picks.add(prompt, [RED, BLUE])
    assert [one.prompt for one in picks.open_groups()] == [prompt]
    picks.vote(group.id, best=group.pictures[0])
    assert picks.open_groups() == []
    assert pairs(picks) == [group.pictures]


def test_a_full_file_is_not_appended_to(picks, monkeypatch):
    from sd3_pack.sd3_core.training import picks as module

    group = picks.add("x", [RED, BLUE])
    monkeypatch.setattr(module, "LARGEST", 10)
    picks.vote(group.id, best=group.pictures[0])  # the first line makes the file
    with pytest.raises(PickRefused, match="is full"):
        picks.undo()


def test_what_a_table_makes_of_lines_counts_and_odd_ones_are_told(picks):
    """Through pandas: null, NaN and 7.0; and lines that say nothing at all."""
    group = picks.add("x", [RED, BLUE], seed=7)
    file = picks.folder / "candidates.jsonl"
    line = json.loads(file.read_text(encoding="utf-8"))
    nulls = {"seed": 7.0, "model": None, "arms": None, "models": float("nan")}
    lines = [json.dumps(line | nulls), '{"group": []}', json.dumps(line | {"pictures": None})]
    file.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    assert picks.groups() == {group.id: group}
    told = picks.passed_over()
    assert [one.partition(": ")[0] for one in told] == ["candidates.jsonl:2", "candidates.jsonl:3"]
    picks.vote(group.id, best=group.pictures[0])
    votes = picks.folder / "preferences.jsonl"
    vote = json.loads(votes.read_text(encoding="utf-8")) | {"undo": None, "arms": None}
    votes.write_text(json.dumps(vote) + "\n", encoding="utf-8")
    assert list(picks.votes()) == [group.id]
