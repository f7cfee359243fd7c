"""Scene -> what a person writes under it in short, and a full sentence.

The short caption leaves sizes and ground out most of the time, and says of two groups how they
stand only when the scene is about that; the full one says all there is.  `requests.parse` reads
both back exactly.
"""

from .dice import Dice
from .requests import GROUND_NOUNS, IMAGE_NOUNS, RELATION_PHRASES, SIZE_WORDS, plural
from .world import CORNERS, WORD, Group, Request, Scene

NUMBERS = ("no", "one", "two", "three", "four")
CENTRES = ("in the middle", "in the centre", "at the center")


def short_caption(scene: Scene, variant: int = 0) -> str:
    """As "two red circles left of a blue square"; each variant chooses its own wording."""
    dice = Dice("short", variant)
    told = scene.short
    bare = len(told.groups) == 1 and told.groups[0].count == 1 and dice.happens(0.3)
    text = _body(told, dice, bare)
    return f"{text} {_ground(told.ground, dice)}" if told.ground else text


def full_caption(scene: Scene, variant: int = 0) -> str:
    """As "The picture shows two small red circles to the left of a large blue square on white." """
    dice = Dice("full", variant)
    told = scene.full
    text = f"{_frame(told, dice)} {_ground(told.ground, dice)}."
    return text[0].upper() + text[1:]


def _frame(told: Request, dice: Dice) -> str:
    """The sentence but for its ground."""
    first = told.groups[0]
    verb = "is" if first.count == 1 else "are"
    form = dice.among(("picture", "shows", "there", "plain"))
    if form == "plain" and told.relation:
        one, other = (_phrase(group, dice) for group in told.groups)
        return f"{one} {verb} {dice.among(RELATION_PHRASES[told.relation])} {other}"
    if form == "plain" and len(told.groups) == 1 and first.position:
        return f"{_noun(first, dice)} {verb} {_position(first.position, dice)}"
    body = _body(told, dice)
    if form == "there" and len(told.groups) == 1 + bool(told.relation):
        return f"there {verb} {body}"
    noun = dice.among(IMAGE_NOUNS)
    if form == "shows":
        return f"{dice.among(('the', 'this'))} {noun} shows {body}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun} of {body}"


def _body(told: Request, dice: Dice, bare: bool = False) -> str:
    phrases = [_phrase(group, dice, bare) for group in told.groups]
    if told.relation:
        return f" {dice.among(RELATION_PHRASES[told.relation])} ".join(phrases)
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _phrase(group: Group, dice: Dice, bare: bool = False) -> str:
    noun = _noun(group, dice, bare)
    return f"{noun} {_position(group.position, dice)}" if group.position else noun


def _noun(group: Group, dice: Dice, bare: bool = False) -> str:
    size = dice.among(SIZE_WORDS[group.size]) if group.size else ""
    if group.shape == WORD:
        return _word(group, size, dice)
    noun = group.shape if group.count == 1 else plural(group.shape)
    words = " ".join(word for word in (size, group.colour or "", noun) if word)
    if bare:
        return words
    if group.count > 1:
        return f"{NUMBERS[group.count]} {words}"
    article = "an" if words[0] in "aeiou" else "a"
    return f"{dice.among((article, article, article, 'one'))} {words}"


def _word(group: Group, size: str, dice: Dice) -> str:
    kind = "letter" if len(group.text) == 1 else dice.among(("word", "letters"))
    text = dice.among((group.text, f'"{group.text}"'))
    manner = f"in {size} {group.colour} letters" if size else f"in {group.colour}"
    return f"the {kind} {text} {manner}"


def _position(position: str, dice: Dice) -> str:
    if position not in CORNERS:
        return dice.among(CENTRES)
    return dice.among((f"at the {position}", f"in the {position} corner", f"in the {position}"))


def _ground(ground: str | None, dice: Dice) -> str:
    name = dice.among(("grey", "gray")) if ground == "grey" else ground
    noun = dice.among((*GROUND_NOUNS, *GROUND_NOUNS, ""))
    return f"on a {name} {noun}" if noun else f"on {name}"
