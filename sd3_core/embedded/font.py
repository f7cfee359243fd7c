"""Capital letters on 5 x 7 dots, drawn for this project; each is one piece.

Dots of a letter share sides, not only corners, wherever a single joint holds it together: a joint
at a corner breaks behind a VAE.
"""

from functools import cache

import torch
from torch import Tensor

COLUMNS, ROWS = 5, 7
ADVANCE = COLUMNS + 1  # dots from a letter to the next

_DOTS = {
    "A": ".###. #...# #...# ##### #...# #...# #...#",
    "B": "####. #...# #...# ####. #...# #...# ####.",
    "C": "##### #.... #.... #.... #.... #.... #####",
    "D": "####. #...# #...# #...# #...# #...# ####.",
    "E": "##### #.... #.... ####. #.... #.... #####",
    "F": "##### #.... #.... ####. #.... #.... #....",
    "G": "##### #.... #.... #.### #...# #...# #####",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "I": ".###. ..#.. ..#.. ..#.. ..#.. ..#.. .###.",
    "J": "..### ...#. ...#. ...#. ...#. #..#. ####.",
    "K": "#..## #.##. ###.. ##... ###.. #.##. #..##",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "M": "#...# ##.## ##### #.#.# #.#.# #...# #...#",
    "N": "#...# ##..# ###.# #.#.# #.### #..## #...#",
    "O": ".###. #...# #...# #...# #...# #...# .###.",
    "P": "####. #...# #...# ####. #.... #.... #....",
    "Q": ".###. #...# #...# #...# #.### #..## .####",
    "R": "####. #...# #...# ####. #..#. #..## #...#",
    "S": ".#### ##... ##... .###. ...## ...## ####.",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "U": "#...# #...# #...# #...# #...# #...# #####",
    "V": "#...# #...# #...# ##.## .#.#. .###. ..#..",
    "W": "#...# #...# #.#.# #.#.# #.#.# ##### .#.#.",
    "X": "#...# ##.## .###. ..#.. .###. ##.## #...#",
    "Y": "#...# ##.## .###. ..#.. ..#.. ..#.. ..#..",
    "Z": "##### ...## ..##. .##.. ##... #.... #####",
}
LETTERS = "".join(_DOTS)


@cache
def letter(name: str) -> Tensor:
    """The letter's dots, float [ROWS, COLUMNS] of 0 and 1."""
    return torch.tensor([[float(dot == "#") for dot in row] for row in _DOTS[name].split()])


def columns(text: str) -> int:
    """How many dots a word is wide."""
    return ADVANCE * len(text) - 1


def word(text: str) -> Tensor:
    """The word's dots, float [ROWS, columns(text)]."""
    dots = torch.zeros(ROWS, columns(text))
    for index, name in enumerate(text):
        dots[:, index * ADVANCE : index * ADVANCE + COLUMNS] = letter(name)
    return dots
