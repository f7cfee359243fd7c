"""Picking the better pictures: a backlog of candidates, the votes on them, what they say together.

    candidates.jsonl    a line for each group of 2 to 4 pictures that one prompt made
    preferences.jsonl   a line for each pair that a vote decided; see preferences.py
    pictures/           named by their content, so that no name tells who drew them

Both files are only ever appended to.  A vote may be taken back; a group is voted on once.
"""

import codecs
import hashlib
import math
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from ..checkpoints.save import save_bytes
from ..errors import cut, quoted
from ..plain_text import as_json, check_whole
from ..reading import read_regular
from .fields import Fields, read_fields, whole
from .order import shuffled
from .preferences import PREFERENCES

CANDIDATES, PICTURES = "candidates.jsonl", "pictures"
FEWEST, MOST = 2, 4  # pictures of a group
OF_EACH = ("arms", "models", "places")  # what a group may tell of each of its pictures
LARGEST = 2**26  # bytes of either file; beyond, nothing is appended
MOST_READ = 2 * LARGEST
Z95 = 1.959964  # of the normal distribution: 95 % lie within

T = TypeVar("T")

# Votes come from the server's threads, candidates from the queue's: what is appended must still fit
# what was read.
_WRITING = threading.RLock()


class PickRefused(ValueError):
    """A vote that cannot be: says why."""


@dataclass(frozen=True)
class Group:
    """Candidates for one prompt.

    arms: in a blind comparison, which setting drew each.  models: which model drew each, where the
    arms have a model each; else `model` drew them all.  places: which of its batch each was, from
    0; with the seed it can be drawn again.
    """

    id: str
    prompt: str
    pictures: tuple[str, ...]  # names in pictures/
    arms: tuple[str, ...] = ()
    seed: int | None = None
    model: str = ""
    time: str = ""
    models: tuple[str, ...] = ()
    places: tuple[int, ...] = ()

    @property
    def is_equal(self) -> bool:
        """There is nothing to vote on: two arms drew the same."""
        return len(set(self.pictures)) == 1

    def shown(self) -> list[str]:
        """The pictures in the order in which they are shown: by chance, but always the same."""
        return [self.pictures[place] for place in shuffled(len(self.pictures), self.id)]


@dataclass(frozen=True)
class Comparison:
    """Two arms, blindly compared; ties count half for each."""

    arms: tuple[str, str]
    wins: tuple[int, int]
    ties: int
    rate: float  # of the first arm
    low: float  # of the 95 % interval
    high: float
    needed: int | None  # more votes, if the rate stays, until the interval excludes 1/2


class Picks:
    """The picks of one folder, read anew for every question."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time):
        self.folder, self.clock = folder, clock

    # What there is

    def groups(self) -> dict[str, Group]:
        groups, _ = _read(self.folder / CANDIDATES, _group)
        return {group.id: group for group in groups}

    def votes(self) -> dict[str, list[dict[str, Any]]]:
        """The lines of every vote that stands, by group, oldest first."""
        standing: dict[str, list[dict[str, Any]]] = {}
        for line in self._lines():
            if "undo" in line:
                standing.pop(str(line["undo"]).rpartition(":")[0], None)
            elif "group" in line:
                standing.setdefault(line["group"], []).append(line)
        return standing

    def passed_over(self) -> list[str]:
        """Lines that say nothing, torn by a crash or by another hand: where, and why."""
        _, of_candidates = _read(self.folder / CANDIDATES, _group)
        _, of_votes = _read(self.folder / PREFERENCES, _vote)
        return of_candidates + of_votes

    def open_groups(self) -> list[Group]:
        done = self.votes()
        return [
            group
            for name, group in self.groups().items()
            if name not in done and not group.is_equal
        ]

    def arms(self) -> list[str]:
        """The settings that the groups compare, in order; two, or there is no comparison."""
        groups = self.groups().values()
        return list(dict.fromkeys(arm for group in groups for arm in group.arms))

    # What comes in

    def add(
        self,
        prompt: str,
        pictures: Sequence[bytes],
        *,
        arms: Sequence[str] = (),
        seed: int | None = None,
        model: str = "",
        models: Sequence[str] = (),
        places: Sequence[int] = (),
    ) -> Group:
        """Put candidates (PNG files' bytes) into the backlog; the same ones are not put twice.

        Equal candidates are one, as nobody can prefer either; those of two arms are a tie.  Raises
        PickRefused.
        """
        if not FEWEST <= len(pictures) <= MOST:
            raise PickRefused(f"{len(pictures)} pictures; a group has {FEWEST} to {MOST}.")
        try:
            check_whole(prompt, "the prompt")
        except ValueError as error:
            raise PickRefused(str(error)) from error
        if not arms:
            every, pictures = pictures, different(pictures)
            places = [places[every.index(one)] for one in pictures] if places else ()
        names = [hashlib.sha256(data).hexdigest()[:16] + ".png" for data in pictures]
        content = repr((prompt, names, list(arms)))
        group = Group(
            hashlib.sha256(content.encode()).hexdigest()[:16],
            prompt,
            tuple(names),
            tuple(arms),
            seed,
            model,
            self._now(),
            tuple(models),
            tuple(places),
        )
        for name, data in zip(names, pictures, strict=True):
            path = self.folder / PICTURES / name
            if not path.exists():
                save_bytes(path, data)
        with _WRITING:
            known = self.groups().get(group.id)
            if known is None:
                self._append(CANDIDATES, [asdict(group)])
        return known or group

    def vote(self, name: str, best: str = "", worst: str = "", verdict: str = "") -> None:
        """Decide an open group.

        best, worst: pictures of it; the worst may be left out.  verdict: "tie" or "skip" instead.
        Best goes before all others, all others go before the worst.  Raises PickRefused.
        """
        self._cast(name, lambda group: self._decided(group, best, worst, verdict))

    def judge(self, name: str, right: Collection[str], by: str) -> None:
        """Decide an open group as a program sees it, which the lines then name.

        right: pictures of it; each goes before each other one.  All or none: a tie.  Raises
        PickRefused.
        """

        def decided(group: Group) -> list[dict[str, Any]]:
            wrong = [one for one in group.pictures if one not in right]
            better = [one for one in group.pictures if one in right]
            if not wrong or not better:
                return self._decided(group, "", "", "tie")
            return [
                self._pair(group, chosen, rejected) for chosen, rejected in product(better, wrong)
            ]

        self._cast(name, lambda group: [{**line, "by": by} for line in decided(group)])

    def _cast(self, name: str, decide: Callable[[Group], list[dict[str, Any]]]) -> None:
        with _WRITING:
            group = self.groups().get(name)
            if group is None or group.is_equal or name in self.votes():
                what = "there is no such group" if group is None else "it is decided already"
                raise PickRefused(f"group {quoted(name)}: {what}.")
            lines = decide(group)
            known = {
                "group": name,
                "prompt": group.prompt,
                "seed": group.seed,
                "model": group.model,
            }
            # An undone vote's ids must not come back: the undo line would take them too.
            turn = sum(line.get("group") == name for line in self._lines())
            self._append(
                PREFERENCES,
                [
                    {"id": f"{name}:{turn + number}", **known, **line, "time": self._now()}
                    for number, line in enumerate(lines)
                ],
            )

    def _decided(self, group: Group, best: str, worst: str, verdict: str) -> list[dict[str, Any]]:
        if verdict in ("tie", "skip"):
            if best or worst:
                raise PickRefused(f"{verdict} and a best or worst picture: give one of them.")
            paths = [f"{PICTURES}/{picture}" for picture in group.pictures]
            return [{verdict: paths, **{name: list(each) for name, each in _of_each(group)}}]
        if verdict:
            raise PickRefused(
                f"verdict is {quoted(verdict)}; choose tie or skip, or name the best."
            )
        for picture in filter(None, (best, worst)):
            if picture not in group.pictures:
                raise PickRefused(f"{quoted(picture)} is no picture of group {group.id}.")
        if not best or best == worst:
            raise PickRefused("name the best picture, and another one as the worst, if any.")
        others = [one for one in group.pictures if one not in (best, worst)]
        pairs = [(best, one) for one in others] + [(one, worst) for one in others if worst]
        pairs += [(best, worst)] if worst else []
        return [self._pair(group, chosen, rejected) for chosen, rejected in pairs]

    @staticmethod
    def _pair(group: Group, chosen: str, rejected: str) -> dict[str, Any]:
        line: dict[str, Any] = {
            "chosen": f"{PICTURES}/{chosen}",
            "rejected": f"{PICTURES}/{rejected}",
        }
        for name, each in _of_each(group):
            of = dict(zip(group.pictures, each, strict=True))
            line[name] = [of[chosen], of[rejected]]
        return line

    def undo(self) -> str:
        """Take back the newest vote that stands; returns its group.  Raises PickRefused."""
        with _WRITING:
            standing = self.votes()
            if not standing:
                raise PickRefused("there is no vote to take back.")
            name, lines = list(standing.items())[-1]
            now = self._now()
            self._append(PREFERENCES, [{"undo": line["id"], "time": now} for line in lines])
        return name

    def comparison(self) -> Comparison | None:
        """What the votes say of the arms, the leading one first; None without any.

        Equal pictures of both arms are ties that nobody has to vote for.
        """
        arms, groups = self.arms(), self.groups().values()
        lines = [line for vote in self.votes().values() for line in vote if line.get("arms")]
        if len(arms) != 2:
            return None
        won = [line["arms"][0] for line in lines if "chosen" in line]
        arms.sort(key=lambda arm: -won.count(arm))
        ties = sum("tie" in line for line in lines) + sum(group.is_equal for group in groups)
        return compare((arms[0], arms[1]), (won.count(arms[0]), won.count(arms[1])), ties)

    def _lines(self) -> list[dict[str, Any]]:
        return _read(self.folder / PREFERENCES, _vote)[0]

    def _now(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(self.clock()))

    def _append(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """All lines in one write at the file's end, so that no reader meets a part of them.

        A line that a crash tore ends here: it must not take the next one with it.
        """
        path = self.folder / name
        data = "".join(as_json(line) + "\n" for line in lines).encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        with _WRITING, path.open("ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size > LARGEST:
                raise PickRefused(f"{name} is full ({LARGEST:,} bytes): begin another folder.")
            if size:
                file.seek(-1, os.SEEK_END)
                data = data if file.read(1) == b"\n" else b"\n" + data
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())


def different(pictures: Sequence[bytes]) -> list[bytes]:
    """Each picture once.  Raises PickRefused where that leaves no choice."""
    found = list(dict.fromkeys(pictures))
    if len(found) < FEWEST:
        raise PickRefused(
            f"the {len(pictures)} pictures are all equal: draw them with different seeds."
        )
    return found


def compare(arms: tuple[str, str], wins: tuple[int, int], ties: int) -> Comparison | None:
    """The first arm's win rate with Wilson's score interval; None without votes.

    Wilson 1927 (doi:10.1080/01621459.1927.10502953), equation 1: it stays inside 0 ... 1 and
    excludes 1/2 exactly where the score test at 5 % does, hence the votes needed.
    """
    votes = sum(wins) + ties
    if not votes:
        return None
    rate = (wins[0] + ties / 2) / votes
    share = Z95**2 / votes
    middle = (rate + share / 2) / (1 + share)
    half = math.sqrt(rate * (1 - rate) * share + share**2 / 4) / (1 + share)
    distance = abs(rate - 0.5)
    needed = None
    if distance > 1e-9:
        needed = max(0, math.ceil(Z95**2 / 4 / distance**2) - votes)
    return Comparison(
        arms, wins, ties, rate, max(0.0, middle - half), min(1.0, middle + half), needed
    )


def _read(path: Path, check: Callable[[Fields], T]) -> tuple[list[T], list[str]]:
    """What `check` makes of each line of a .jsonl file; and the lines that are passed over.

    One odd line must not take the others with it, whoever wrote it.
    """
    try:
        data = read_regular(path, MOST_READ).removeprefix(codecs.BOM_UTF8)  # an editor's
        texts = data.split(b"\n")  # a prompt may hold what else parts lines
    except FileNotFoundError:
        return [], []
    found, passed = [], []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            found.append(check(read_fields(text.decode(), "those that are written here")))
        except (ValueError, RecursionError) as error:
            passed.append(f"{path.name}:{number}: {cut(error)}")
    return found, passed


def _of_each(group: Group) -> list[tuple[str, Sequence[Any]]]:
    """Those of OF_EACH that this group tells."""
    return [(name, each) for name in OF_EACH if (each := getattr(group, name))]


def _group(line: Mapping[str, Any]) -> Group:
    """Raises ValueError for a line of which another program or hand has made something else."""
    known = {name: line[name] for name in Group.__dataclass_fields__ if name in line}
    if not {"id", "prompt", "pictures"} <= known.keys():
        raise ValueError("id, prompt or pictures is missing")
    for name in ("id", "prompt", "model", "time"):
        _check(name, known.get(name, ""), _is_text)
    _check("id", known["id"], bool)
    if "seed" in known:
        _check("seed", known["seed"], lambda seed: whole(seed) is not None)
        known["seed"] = whole(known["seed"])
    pictures = known["pictures"]
    _check("pictures", pictures, lambda names: _is_list(names, _is_name))
    _check("pictures", pictures, lambda names: FEWEST <= len(names) <= MOST)
    for name in OF_EACH:
        of_one = _is_place if name == "places" else _is_text
        each = known.get(name, [])
        _check(name, each, lambda each, of_one=of_one: _is_list(each, of_one))
        _check(name, each, lambda each: len(each) in (0, len(pictures)))
        known[name] = tuple(each)
    return Group(**{**known, "pictures": tuple(pictures)})


def _vote(line: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError as _group does; lines of other programs pass, they are no votes."""
    if "undo" not in line and "group" in line:
        group, arms = line["group"], line.get("arms", [])
        _check("group", group, _is_text)
        _check("id", line.get("id"), lambda name: _is_text(name) and name.startswith(f"{group}:"))
        _check("arms", arms, lambda arms: _is_list(arms, _is_text))
    return line


def _check(name: str, value: Any, fits: Callable[[Any], bool]) -> None:
    if not fits(value):
        raise ValueError(f"{name} is {quoted(value)}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)  # half characters


def _is_name(value: Any) -> bool:
    """Of a file in pictures/, which it does not leave."""
    return isinstance(value, str) and re.fullmatch(r"\w[\w.-]*", value) is not None


def _is_place(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_list(value: Any, of_one: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of_one, value))
