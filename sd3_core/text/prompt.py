"""`(word:1.3)` in a prompt -> pieces of text, each with its weight.

The grammar is ComfyUI's (0.33), so that a prompt means the same here and there:

- `(text)` multiplies the weight by 1.1, and again for each level of nesting;
- `(text:0.8)` sets the weight, also inside another weight; the last colon counts, and what follows
  it must be a number, else the colon is text and the group means 1.1;
- `\\(` and `\\)` are plain parentheses; a backslash before anything else is text;
- an opening parenthesis that is never closed is text;
- a closing one that was never opened is text and cancels the next opening one, so that
  `a) (b:1.3) c` has no weights.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

EMPHASIS = 1.1

# An escaped parenthesis is one symbol, so that it never compares equal to a plain one.
_SYMBOL = re.compile(r"\\[()]|.", re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """A stretch of the prompt under one weight; it is tokenized on its own."""

    text: str
    weight: float = 1.0


def parse_prompt(prompt: str) -> list[Piece]:
    """The prompt's pieces, in order; their texts hold no syntax any more."""
    return list(_pieces(_SYMBOL.findall(prompt), 1.0))


def _pieces(symbols: list[str], weight: float) -> Iterator[Piece]:
    for part in _top_level_parts(symbols):
        if len(part) >= 2 and part[0] == "(" and part[-1] == ")":
            yield from _pieces(*_group(part[1:-1], weight))
        else:
            yield Piece("".join(symbol[-1] for symbol in part), weight)


def _top_level_parts(symbols: list[str]) -> Iterator[list[str]]:
    """Cuts before each `(` and after each `)` that stand outside every other pair."""
    part: list[str] = []
    depth = 0
    for symbol in symbols:
        if symbol == "(":
            if depth == 0 and part:
                yield part
                part = []
            depth += 1
        part.append(symbol)
        if symbol == ")":
            depth -= 1
            if depth == 0:
                yield part
                part = []
    if part:
        yield part


def _group(symbols: list[str], weight: float) -> tuple[list[str], float]:
    """What stands between two parentheses -> its text without the number, and its weight."""
    colons = [index for index, symbol in enumerate(symbols) if symbol == ":"]
    if colons and colons[-1] > 0:  # `(:1.3)` has no text before the colon and stays text
        try:
            return symbols[: colons[-1]], float("".join(symbols[colons[-1] + 1 :]))
        except ValueError:
            pass
    return symbols, weight * EMPHASIS
