"""The grammar of weights, each rule as ComfyUI 0.33 has it."""

import pytest
from sd3_pack.sd3_core.text.prompt import Piece, parse_prompt


def pieces(prompt: str) -> list[tuple[str, float]]:
    return [(piece.text, piece.weight) for piece in parse_prompt(prompt)]


def test_text_without_syntax_is_one_piece_of_weight_one():
    assert parse_prompt("a cat, sitting") == [Piece("a cat, sitting", 1.0)]


def test_empty_prompt_has_no_pieces():
    assert parse_prompt("") == []


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("(red) car", [("red", 1.1), (" car", 1.0)]),
        ("((red)) car", [("red", 1.1 * 1.1), (" car", 1.0)]),
        ("a (red:1.3) car", [("a ", 1.0), ("red", 1.3), (" car", 1.0)]),
        ("no(space)between", [("no", 1.0), ("space", 1.1), ("between", 1.0)]),
        ("(fog:0)(light:-0.5)", [("fog", 0.0), ("light", -0.5)]),
        ("()", []),
    ],
)
def test_parentheses_weigh(prompt, expected):
    assert pieces(prompt) == expected


def test_a_number_is_absolute_inside_another_weight():
    assert pieces("(a (b:1.5) (c):0.9)") == [("a ", 0.9), ("b", 1.5), (" ", 0.9), ("c", 0.9 * 1.1)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("(a:1.2:0.7)", [("a:1.2", 0.7)]),
        ("(a: 1.2 )", [("a", 1.2)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:)", [("a:", 1.1)]),
        ("(:1.3)", [(":1.3", 1.1)]),
    ],
)
def test_the_last_colon_counts_when_a_number_follows(prompt, expected):
    assert pieces(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (r"\(plain\) text", [("(plain) text", 1.0)]),
        (r"(in \(side\):1.2)", [("in (side)", 1.2)]),
        (r"(a:1.2\))", [("a:1.2)", 1.1)]),
        (r"\\(a", [(r"\(a", 1.0)]),
        (r"back\slash", [(r"back\slash", 1.0)]),
    ],
)
def test_a_backslash_makes_a_parenthesis_plain(prompt, expected):
    assert pieces(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a (b:1.3 c", [("a ", 1.0), ("(b:1.3 c", 1.0)]),
        ("(((", [("(((", 1.0)]),
        ("((a)", [("(a", 1.1)]),
        ("a) (b:1.3) c", [("a) (b:1.3) c", 1.0)]),
        ("a) ((b:1.3) c", [("a) (", 1.0), ("b", 1.3), (" c", 1.0)]),
    ],
)
def test_unbalanced_parentheses_are_text(prompt, expected):
    assert pieces(prompt) == expected


def test_newlines_are_text():
    assert pieces("(a\nb:1.2)\n") == [("a\nb", 1.2), ("\n", 1.0)]
