"""Prompt -> what it asks for, in the words that the captions of the world are made of.

The model was taught these words and no other, so a word that is missing here is one it cannot
follow; `advice` says so.
"""

import re
from dataclasses import dataclass, field, replace

from ..text.prompt import parse_prompt
from .world import (
    COLOURS,
    CORNERS,
    EDGES,
    GROUNDS,
    LONGEST_WORD,
    MOST_THINGS,
    SHAPES,
    WORD,
    Group,
    Request,
)

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
RELATION_PHRASES = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under"),
}
IMAGE_NOUNS = ("picture", "image", "photo", "drawing")
GROUND_NOUNS = ("background", "ground")
COUNT_WORDS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
# Words that carry nothing to draw; all but those of the last line occur in captions.
LOOSE_WORDS = {"at", "the", "in", "on", "of", "to", "is", "are", "there", "this", "shows", "corner"}
LOOSE_WORDS |= {"and", "letter", "letters", "word"}
LOOSE_WORDS |= {*IMAGE_NOUNS, "side", "with", "please", "draw", "me", "show", "it", "its", "that"}

KNOWS = (
    f"It knows one to four {', '.join(SHAPES[:-1])} or {SHAPES[-1]}; {', '.join(COLOURS)}; small, "
    "large; top, bottom, left, right, centre; left of, right of, above, below; words of one to "
    "three letters; a white, grey or black background."
)

_TEXT = re.compile(
    rf"\b(?:word|letters?)\s+(?:[\"'“”]([a-z]{{1,{LONGEST_WORD}}})[\"'“”]|([a-z]{{1,{LONGEST_WORD}}})\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Token:
    kind: str  # count, size, colour, shape, place, relation, ground, text, and below
    value: str
    words: str = ""  # as written


def parse(prompt: str) -> Request:
    """What a prompt asks for.

    Raises ValueError, in a sentence, when that is not in the world or not understood.
    """
    tokens = _tokens(prompt)
    strange = [token.words for token in tokens if token.kind == "unknown"]
    if strange:
        raise ValueError(f"{_listed(strange)}: outside of the embedded model's world.")
    reader = Reader()
    for token in tokens:
        reader.take(token)
    return reader.request()


def unknown_words(prompt: str) -> tuple[str, ...]:
    """The words of a prompt that the embedded model was never taught, each once."""
    return tuple(dict.fromkeys(token.words for token in _tokens(prompt) if token.kind == "unknown"))


def known_words() -> tuple[str, ...]:
    """Every phrase that a prompt may use, in alphabetical order."""
    return tuple(sorted(_VOCABULARY))


def advice(prompt: str) -> str | None:
    """One line for a prompt that leaves the world: what in it does so, and what there is."""
    try:
        parse(prompt)
    except ValueError as error:
        return f"{error} {KNOWS}"
    return None


@dataclass
class Reader:
    """The request so far.  Adjectives wait for their noun, or join the noun before "in" or "is"."""

    groups: list[Group] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    describing: bool = False  # whether adjectives now tell of the last group
    relation: str | None = None
    ground: str | None = None

    def take(self, token: Token) -> None:
        if token.kind in ("size", "colour"):
            self._adjective(token)
        elif token.kind in ("shape", "text"):
            self._noun(token)
        elif token.kind == "place":
            self._place(token.value)
        elif token.kind == "relation":
            self._relate(token)
        elif token.kind == "ground":
            self.ground = self._only_once(self.ground, token.value, token)
        elif token.kind == "count":
            self.describing = False
            self.waiting["count"] = token.value
        elif token.kind != "loose":  # "describe" or "part"
            self.describing = token.kind == "describe" and bool(self.groups) and not self.waiting

    def request(self) -> Request:
        if not self.groups:
            raise ValueError("the prompt names no shape.")
        if {"colour", "size"} & set(self.waiting):
            raise ValueError(f"{_listed(list(self.waiting.values()))}: of what?")
        if sum(group.count for group in self.groups) > MOST_THINGS:
            raise ValueError(f"more than {MOST_THINGS} things.")
        if self.relation and len(self.groups) != 2:
            raise ValueError(f'"{self.relation}" is understood between two kinds of things.')
        return Request(tuple(self.groups), self.relation, self.ground)

    def _adjective(self, token: Token) -> None:
        if self.describing:
            old = getattr(self.groups[-1], token.kind)
            self._change_last(token.kind, self._only_once(old, token.value, token))
        else:
            old = self.waiting.get(token.kind)
            self.waiting[token.kind] = self._only_once(old, token.value, token)

    def _noun(self, token: Token) -> None:
        found = self.waiting
        number = int(found.get("count", 1))
        if "count" not in found and token.kind == "shape" and token.words != token.value:
            raise ValueError(f"how many {token.words}?")
        word = token.kind == "text"
        shape, text = (WORD, token.value) if word else (token.value, "")
        self.groups.append(
            Group(number, shape, found.get("colour"), found.get("size"), found.get("place"), text)
        )
        self.waiting, self.describing = {}, False

    def _place(self, place: str) -> None:
        if self.groups and not self.waiting:
            self._change_last("position", place)
        else:
            self.waiting["place"] = place

    def _relate(self, token: Token) -> None:
        if len(self.groups) != 1:
            raise ValueError(f'"{token.words}" is understood between two kinds of things.')
        self.relation = self._only_once(self.relation, token.value, token)
        self.describing = False

    def _change_last(self, name: str, value: str) -> None:
        self.groups[-1] = replace(self.groups[-1], **{name: value})

    @staticmethod
    def _only_once(old: str | None, new: str, token: Token) -> str:
        if old not in (None, new):
            raise ValueError(f"{old} or {token.words}?")
        return new


def _tokens(prompt: str) -> list[Token]:
    """The prompt without its weights, in phrases of the world."""
    text = "".join(piece.text for piece in parse_prompt(prompt))
    tokens, end = [], 0
    for found in _TEXT.finditer(text):
        quoted, plain = found.groups()
        if plain and plain.lower() in LOOSE_WORDS and plain != plain.upper():
            continue  # "the letters in red"
        tokens += _phrases(text[end : found.start()])
        tokens.append(Token("text", (quoted or plain).upper(), found.group()))
        end = found.end()
    return tokens + _phrases(text[end:])


def _phrases(text: str) -> list[Token]:
    tokens = []
    for found in _PATTERN.finditer(text.lower()):
        words = found.group()
        kind, value = _VOCABULARY.get(" ".join(words.split()), ("unknown", words))
        tokens.append(Token(kind, value, words))
    return tokens


def _vocabulary() -> dict[str, tuple[str, str]]:
    """Phrase -> kind and value; a longer phrase wins over its parts."""
    known = {word: ("loose", word) for word in LOOSE_WORDS}
    known |= {word: ("describe", word) for word in ("in", "is", "are")}
    known |= {word: ("part", word) for word in ("and", ",", "with")}
    known |= {word: ("count", str(number)) for word, number in COUNT_WORDS.items()}
    known |= {str(number): ("count", str(number)) for number in range(1, MOST_THINGS + 1)}
    known |= {word: ("size", size) for size, words in SIZE_WORDS.items() for word in words}
    known |= {colour: ("colour", colour) for colour in COLOURS}
    known |= {shape: ("shape", shape) for shape in SHAPES}
    known |= {plural(shape): ("shape", shape) for shape in SHAPES}
    known |= {place: ("place", place) for place in (*CORNERS, *EDGES)}
    known |= dict.fromkeys(("middle", "centre", "center"), ("place", "centre"))
    known |= {
        phrase: ("relation", name) for name, many in RELATION_PHRASES.items() for phrase in many
    }
    for ground in GROUNDS:
        for name in {ground, ground.replace("grey", "gray")}:
            nouns = [f"{name} {noun}" for noun in GROUND_NOUNS]
            on = [f"{word} {name}" for word in ("on", "on a")]
            both = [f"{word} {noun}" for word in ("on a", "on") for noun in nouns]
            known |= dict.fromkeys((*nouns, *on, *both), ("ground", ground))
    return known


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _listed(words: list[str]) -> str:
    return ", ".join(f'"{word}"' for word in dict.fromkeys(words))


_VOCABULARY = _vocabulary()
_PATTERN = re.compile(
    "|".join(
        [
            *(
                r"\b" + phrase.replace(" ", r"\s+") + r"\b"
                for phrase in sorted(_VOCABULARY, key=len, reverse=True)
                if phrase != ","
            ),
            ",",
            r"[^\W_]+(?:['’-][^\W_]+)*",
        ]
    )
)
