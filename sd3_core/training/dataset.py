"""Pictures and captions: read, sorted into size buckets, dealt out in batches.

`read_dataset` turns folders into items and reports what it could not use; `tensor_dataset` does the
same for pictures in memory.  `Dataset.batch` says who comes next; it keeps no state.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from ..decode import EXTENSIONS
from .contents import Contents, short_hash
from .duplicates import exact_duplicates, near_duplicates
from .folders import Found, Listing, Source, list_pictures
from .framing import Framing
from .order import Groups, chance, epoch_order
from .pixels import FilePicture, TensorPicture
from .report import Report, Skipped, by_value, joined, left_out_told, with_wildcards
from .scan import Facts, look_at_all

MOST_CROPPED = 1 / 3  # of a picture's area, before the report names it

Captions = tuple[tuple[str, ...], ...]  # for each source of captions its alternatives


@dataclass(frozen=True)
class Item:
    """A picture to learn from."""

    name: str  # for people
    picture: FilePicture | TensorPicture
    bucket: tuple[int, int]  # width, height in pixels: the size it is trained in
    captions: Captions  # one source or two (original, synthetic), each with a caption at least
    repeats: int = 1  # times an epoch
    weight: float = 1.0  # factor of its loss
    prior: bool = False  # see folders.Source
    loser: "Item | None" = None  # of a preference: the picture that this one was preferred to


@dataclass(frozen=True)
class Draw:
    """One sample of a batch."""

    item: int  # index in Dataset.items
    caption: str
    weight: float


@dataclass(frozen=True, eq=False)
class Dataset:
    """Items and the order in which they are drawn.

    original_share: how often the first of two sources of captions is drawn from; Esser et al. 2024
    (arXiv:2403.03206) mix original and synthetic captions half and half.
    """

    items: tuple[Item, ...]
    report: Report
    original_share: float = 0.5

    def __post_init__(self) -> None:
        if not self.items:
            raise ValueError("the dataset is empty.")
        if not 0 <= self.original_share <= 1:
            raise ValueError(f"original_share is {self.original_share}; it must lie in 0..1.")

    def batch(
        self, step: int, size: int, seed: int, offset: int = 0, count: int | None = None
    ) -> list[Draw]:
        """Samples offset .. offset + count of the batch of `size` that step (from 0) trains on.

        size: the whole batch, over all processes and accumulated parts, so that it does not matter
        how these share it: each takes its slice.  Samples of one bucket lie side by side; a batch
        has several where their pictures do not fill batches of their own.  Every `epoch(size)`
        steps each item has come `repeats` times; only the `filled(size)` samples that an epoch's
        last batch lacks come besides, of items picked by chance.  The same for the same step, size
        and seed, whatever was asked before.
        """
        count = size - offset if count is None else count
        if step < 0 or size < 1 or offset < 0 or count < 0 or offset + count > size:
            raise ValueError(f"samples {offset}..{offset + count} of batch {step} of {size}")
        epoch, place = divmod(step, self.epoch(size))
        row = epoch_order(self._groups, size, seed, epoch)[place, offset : offset + count]
        return [
            Draw(int(item), self._caption(int(item), seed, step, index), self.items[item].weight)
            for index, item in enumerate(row, offset)
        ]

    def epoch(self, size: int) -> int:
        """Steps of an epoch with batches of this size."""
        return self._groups.batches(size)

    def filled(self, size: int) -> int:
        """Samples of an epoch, with batches of this size, beyond the items' repeats."""
        return self.epoch(size) * size - self._groups.draws

    def mixes(self, size: int) -> bool:
        """Whether a batch of this size may hold pictures of several buckets."""
        return self._groups.mixes(size)

    def captions(self) -> list[str]:
        """Every caption that may be drawn, once."""
        texts = (text for item in self.items for source in item.captions for text in source)
        return list(dict.fromkeys(texts))

    @cached_property
    def pictures(self) -> tuple[Item, ...]:
        """Every picture that training looks at: the items, and what they were preferred to."""
        return (*self.items, *(item.loser for item in self.items if item.loser is not None))

    @cached_property
    def digest(self) -> str:
        """Identity of what is drawn: pixels, captions, repeats, weights and their order."""
        described = hashlib.sha256(repr(self.original_share).encode())
        for item in self.items:
            facts = (item.picture.key, item.bucket, item.captions, item.repeats, item.weight)
            described.update(repr(facts).encode() + (b"prior" if item.prior else b""))
            if item.loser is not None:
                described.update(item.loser.picture.key.encode())
        return described.hexdigest()

    @cached_property
    def contents(self) -> Contents:
        """The digest in parts, to tell what has changed; see contents.changes."""
        return {item.name: _parts(item) for item in self.items}

    @cached_property
    def _groups(self) -> Groups:
        members: dict[tuple[int, int], list[int]] = {}
        for index, item in enumerate(self.items):
            members.setdefault(item.bucket, []).extend([index] * item.repeats)
        return Groups(tuple(np.array(members[bucket]) for bucket in sorted(members)))

    def _caption(self, item: int, seed: int, step: int, index: int) -> str:
        sources = self.items[item].captions
        second = len(sources) > 1 and chance(seed, step, index, "source") >= self.original_share
        texts = sources[1 if second else 0]
        return texts[int(chance(seed, step, index, "caption") * len(texts))]


def _parts(item: Item) -> tuple[str, ...]:
    """An item's contents.PARTS; a pair's pictures count together."""
    pictures = [one.picture for one in (item, item.loser) if one is not None]
    framing = ([one.key for one in pictures], item.bucket, item.repeats, item.weight)
    framing += (item.prior,) if item.prior else ()
    parts = (item.captions, [one.digest for one in pictures], framing)
    return tuple(short_hash(part) for part in parts)


@dataclass(frozen=True)
class Used:
    """A file on its way to an item."""

    found: Found
    facts: Facts
    picture: FilePicture

    @property
    def item(self) -> Item:
        found = self.found
        captions = found.captions or (("",),)
        return Item(
            found.name,
            self.picture,
            self.picture.bucket,
            captions,
            found.repeats,
            found.weight,
            found.prior,
        )

    @property
    def kept(self) -> float:
        """Share of the picture's area that lies in its bucket."""
        left, top, right, bottom = self.picture.box
        return (right - left) * (bottom - top) / (self.facts.width * self.facts.height)

    @property
    def enlarged(self) -> bool:
        left, _, right, _ = self.picture.box
        return right - left < self.picture.bucket[0] - 0.5  # pixels; the box is not rounded


def read_dataset(
    sources: Sequence[Source],
    *,
    resolution: int,
    bucket_step: int = 64,
    widest: float = 2.0,
    alpha: str = "mask",
    background: str = "white",
    crop: str = "centre",
    crop_seed: int = 0,
    original_share: float = 0.5,
    memory: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Decode every picture of these folders and sort them into buckets.

    resolution: a bucket has at most resolution² pixels; its sides are multiples of bucket_step and
    its aspect lies between 1:widest and widest:1.  A picture is scaled to cover the bucket of the
    nearest aspect, up as well as down, and what juts out is cut off.  Nothing is mirrored.
    alpha: what transparency means; "mask": it weighs the loss, "composite": nothing.  Either way
    the picture is laid on `background`, a colour as in CSS.
    crop: "centre", or "random": a place that belongs to the file and crop_seed.
    original_share: see Dataset.  memory: a file, such as scan.json in the cache's folder, that
    spares the decoding next time; see look_at_all.  on_progress: called with (done, total).

    Files that cannot be used are skipped and listed in the report.  Raises ValueError for settings,
    for a metadata.jsonl that cannot be followed, and when no picture is left.
    """
    framing = Framing(resolution, bucket_step, widest, alpha, background, crop, crop_seed)
    listings = _list_all(sources)
    found = [one for listing in listings for one in listing.found]
    for one in found:
        _check_bucket(one, framing)
    looks = look_at_all([one.path for one in found], memory, on_progress)
    pairs = list(zip(found, looks, strict=True))
    skipped = [line for listing in listings for line in listing.skipped]
    skipped += [Skipped(one.name, facts.fault) for one, facts in pairs if facts.fault]
    used = [
        Used(one, facts, framing.frame(one.path, facts, one.row.bucket))
        for one, facts in pairs
        if not facts.fault
    ]
    if all(one.found.prior for one in used):
        learnt = [source for source in sources if not source.prior]
        left_out = joined([one.left_out for one in listings])
        raise ValueError(_nothing_left(learnt, skipped, left_out))
    items = tuple(one.item for one in used)
    return Dataset(items, _report(used, listings, skipped), original_share)


def tensor_dataset(
    images: Sequence[Tensor],
    captions: Sequence[str | Sequence[str]],
    masks: Sequence[Tensor | None] | None = None,
) -> Dataset:
    """Pictures in memory, trained in the size they have; pictures of one size form a bucket.

    images: each [3, H, W] in -1..1.  captions: for each a text or alternatives.  masks: for each
    weights of the loss, [1, H, W] in 0..1, or None.  Raises ValueError.
    """
    masks = [None] * len(images) if masks is None else masks
    if not len(images) == len(captions) == len(masks):
        raise ValueError(
            f"{len(images)} images, {len(captions)} captions and {len(masks)} masks; expected as "
            "many of each."
        )
    items = []
    for number, (image, texts, mask) in enumerate(zip(images, captions, masks, strict=True)):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"image {number} is {list(image.shape)}; expected [3, H, W].")
        if mask is not None and mask.shape != (1, *image.shape[1:]):
            raise ValueError(f"mask {number} is {list(mask.shape)}; expected [1, H, W] as image.")
        alternatives = (texts,) if isinstance(texts, str) else tuple(texts) or ("",)
        bucket = (image.shape[2], image.shape[1])
        name = f"image {number}"
        items.append(Item(name, TensorPicture(image, mask), bucket, (alternatives,)))
    silent = tuple(item.name for item in items if item.captions == (("",),))
    report = Report(len(items), len(items), _bucket_counts(items), without_caption=silent)
    return Dataset(tuple(items), report)


def _list_all(sources: Sequence[Source]) -> list[Listing]:
    folders = [source.path.resolve() for source in sources]
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise ValueError(f"{folder}: is listed twice; use its repeats instead.")
    # What is learnt from keeps its names when a prior comes to it.
    several = sum(not source.prior for source in sources) > 1
    return [
        list_pictures(source, f"{source.path.as_posix()}/" if several or source.prior else "")
        for source in sources
    ]


def _check_bucket(found: Found, framing: Framing) -> None:
    if found.row.bucket is not None:
        try:
            framing.check_bucket(found.row.bucket)
        except ValueError as error:
            raise ValueError(f"{found.name}: {found.row.line}: {error}.") from error


def _nothing_left(
    sources: Sequence[Source],
    skipped: Sequence[Skipped],
    left_out: Mapping[str, Sequence[str]],
) -> str:
    folders = ", ".join(str(source.path) for source in sources) or "no folder given"
    if not skipped and left_out:
        return f"{folders}: no picture to learn from in it; {'; '.join(left_out_told(left_out))}."
    if not skipped:
        return f"{folders}: no picture in it; {', '.join(EXTENSIONS)} are read."
    first = skipped[0]
    return f"{folders}: none of {len(skipped)} pictures can be used; {first.name}: {first.reason}."


def _report(
    used: Sequence[Used], listings: Sequence[Listing], skipped: Sequence[Skipped]
) -> Report:
    items = [one.item for one in used]
    return Report(
        pictures=len(items),
        draws=sum(item.repeats for item in items),
        prior=sum(item.prior for item in items),
        prior_draws=sum(item.repeats for item in items if item.prior),
        buckets=_bucket_counts(items),
        skipped=tuple(skipped),
        left_out=joined([one.left_out for one in listings]),
        without_caption=tuple(one.found.name for one in used if not one.found.captions),
        several_lines=by_value({one.found.name: one.found.lines for one in used}),
        wildcards=with_wildcards({item.name: item.captions for item in items}),
        small=tuple(one.found.name for one in used if one.enlarged),
        cropped=tuple(one.found.name for one in used if one.kept < 1 - MOST_CROPPED),
        notes=(
            *(note for one in listings for note in one.notes),
            *(f"{one.found.name}: {one.facts.note}" for one in used if one.facts.note),
        ),
        repeated_folders={k: v for one in listings for k, v in one.repeated_folders.items()},
        exact_duplicates=exact_duplicates({one.found.name: one.facts.digest for one in used}),
        near_duplicates=near_duplicates({one.found.name: one.facts.hash for one in used}),
    )


def _bucket_counts(items: Sequence[Item]) -> dict[tuple[int, int], int]:
    return dict(sorted(Counter(item.bucket for item in items).items()))
