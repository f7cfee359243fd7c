"""Pictures that look alike, found by a perceptual hash.  They are reported, never removed.

The hash is the sign pattern of the lowest frequencies, as in "pHash" (Zauner 2010, "Implementation
and benchmarking of perceptual image hash functions"): it survives scaling, recompression and small
changes of brightness.  It knows no colour: a red disc and a blue one look alike to it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np
from PIL import Image

MOST_DIFFERENT = 4  # bits of 64; re-encoded and rescaled copies differ by 0 to 4
BITS, SIDE, LOW = 64, 32, 8  # of the hash; of the grey thumbnail; of the frequencies kept
FLAT = 2.0  # grey levels of deviation below which there is nothing to tell pictures by


def perceptual_hash(picture: Image.Image) -> int | None:
    """64 bits that similar pictures share; None for a picture of one even colour."""
    thumbnail = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    grey = np.asarray(thumbnail, dtype=np.float64)
    if grey.std() < FLAT:
        return None
    basis = _cosines()
    low = (basis @ grey @ basis.T).flatten()
    bits = low > np.median(low[1:])  # the first is the brightness
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """The discrete cosine transform's lowest rows, [LOW, SIDE]."""
    frequency, place = np.arange(LOW)[:, None], np.arange(SIDE)[None]
    return np.cos(np.pi * frequency * (2 * place + 1) / (2 * SIDE))


def near_duplicates(
    hashes: Mapping[str, int | None], most: int = MOST_DIFFERENT
) -> tuple[tuple[str, ...], ...]:
    """Groups of names whose hashes differ in at most `most` bits, directly or by way of others."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, value in hashes.items():
        if value is not None:
            names[value].append(name)
    groups = _connected(names, _close_pairs(list(names), most))
    return _sorted([name for value in group for name in names[value]] for group in groups)


def exact_duplicates(digests: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    """Groups of names whose files have the same bytes."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, digest in digests.items():
        names[digest].append(name)
    return _sorted(names.values())


def _close_pairs(values: Sequence[int], most: int) -> set[tuple[int, int]]:
    """All pairs at most `most` bits apart.

    Two such numbers, cut into most + 1 pieces, agree in one of them: only those are compared.
    """
    cuts = [round(piece * BITS / (most + 1)) for piece in range(most + 2)]
    pairs = set()
    for start, end in zip(cuts, cuts[1:], strict=False):
        alike: dict[int, list[int]] = defaultdict(list)
        for value in values:
            alike[value >> start & (1 << (end - start)) - 1].append(value)
        for group in alike.values():
            pairs |= {(a, b) for a, b in combinations(group, 2) if (a ^ b).bit_count() <= most}
    return pairs


def _connected(values: Iterable[int], pairs: Iterable[tuple[int, int]]) -> Iterable[list[int]]:
    group_of = {value: [value] for value in values}
    for a, b in pairs:
        first, second = group_of[a], group_of[b]
        if first is not second:
            first += second
            group_of.update(dict.fromkeys(second, first))
    return {id(group): group for group in group_of.values()}.values()


def _sorted(groups: Iterable[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(sorted(tuple(sorted(group)) for group in groups if len(group) > 1))
