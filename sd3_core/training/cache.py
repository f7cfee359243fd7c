"""Latents and text embeddings on disk: made once, read often, made anew when something changed.

An entry's name is a hash of all that it depends on: of a picture the file's bytes, crop and size,
of a caption its tokens, of both the network's weights and dtype.  So nothing in the folder can be
stale, and any of it may be deleted.  Entries hold numbers only: no name and no word of a prompt.

Each encoder has an entry of its own for a caption: another T5 length leaves CLIP's untouched.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conditioning import Conditioning
from ..models.vae import Posterior, to_model_space
from .dataset import Dataset, Item
from .entries import check_space, read_entry, take_inventory, write_entry
from .layout import Layout, States, without

__all__ = [
    "Cache",
    "CachedLatents",
    "CachedPrompt",
    "PictureStage",
    "Prepared",
    "Progress",
    "Reading",
    "TextStage",
    "without",
]

FORMAT = 1  # of the entries; raise it when their meaning changes

OnProgress = Callable[["Progress"], None]


@dataclass(frozen=True)
class PictureStage:
    """The VAE: what it is, and how to get it when a picture is missing."""

    identity: str  # of the weights and of the dtype they compute in
    factor: int  # image pixels per latent pixel
    channels: int  # of the latents
    load: Callable[[], Callable[[Tensor], Posterior]]  # [1, 3, H, W] in -1..1 -> VAE space


@dataclass(frozen=True)
class Reading:
    """What an encoder reads of a caption."""

    text: str  # as a prompt
    ids: tuple[int, ...]  # tokens, padding included
    cut: bool = False  # the caption is longer than what the encoder is given


@dataclass(frozen=True)
class TextStage:
    """A text encoder: what it is, how it reads, and how to get it when a caption is missing."""

    identity: str
    read: Callable[[str], Reading]
    # Takes the texts of Readings, gives the states of each as they come.
    load: Callable[[], Callable[[Sequence[str]], Iterator[States]]]


@dataclass(frozen=True)
class CachedLatents:
    """A picture as the VAE sees it, float32, in VAE space: see draw."""

    mean: Tensor  # [C, H/8, W/8]
    logvar: Tensor | None = None  # like mean; None: the mean is certain
    mask: Tensor | None = None  # [1, H/8, W/8], weights of the loss in 0..1

    def draw(self, noise: Tensor | None = None) -> Tensor:
        """Latents in model space: a sample with this noise (like mean), or without it the mean.

        The one place where training data passes from VAE space to model space.
        """
        if noise is None or self.logvar is None:
            return to_model_space(self.mean)
        return to_model_space(Posterior(self.mean, self.logvar).sample(noise))


@dataclass(frozen=True)
class CachedPrompt:
    """A caption for the MMDiT, float32, batch of one, and where each encoder stands in it."""

    conditioning: Conditioning
    layout: Layout


@dataclass(frozen=True)
class Progress:
    what: str  # "pictures", or the encoder's name
    done: int
    total: int


@dataclass(frozen=True)
class Prepared:
    """What prepare did."""

    pictures: int  # entries made
    captions: dict[str, int]  # by encoder: entries made
    found: int  # entries that were there already
    damaged: int  # among the made ones, those that had to be made again
    cut: dict[str, int]  # by encoder: captions that are longer than what it is given

    def lines(self) -> list[str]:
        made = {"pictures": self.pictures, **self.captions}
        parts = [f"{what}: {count} encoded" for what, count in made.items() if count]
        lines = ["; ".join([*parts, f"{self.found} found in the cache"])]
        if self.damaged:
            lines.append(f"{self.damaged} damaged entries were made again")
        for name, count in self.cut.items():
            lines.append(f"{count} captions are longer than what {name} is given, and cut")
        return lines


@dataclass(frozen=True)
class TextEntry:
    """Where an encoder's states of a caption are, and whether it saw all of it."""

    path: Path
    cut: bool


@dataclass(frozen=True)
class Cache:
    """The cached latents and text embeddings of one model, in one folder.

    storage: what entries are kept in.  float16 rounds by at most 2^-11 of a value; an entry beyond
    its range is kept in float32.
    texts: the encoders that are on; the layout has a span for each.
    """

    folder: Path
    pictures: PictureStage
    texts: Mapping[str, TextStage]
    layout: Layout
    storage: torch.dtype = torch.float16
    _known: dict[tuple[str, str], TextEntry] = field(default_factory=dict, repr=False)

    @torch.inference_mode(False)  # ComfyUI's inference mode makes tensors that cannot be trained on
    def latents(self, item: Item) -> CachedLatents:
        """Of a picture that `prepare` has seen.  Raises CheckpointError when it is gone."""
        tensors = read_entry(self._latents_path(item))
        return CachedLatents(tensors["mean"], tensors["logvar"], tensors.get("mask"))

    @torch.inference_mode(False)
    def conditioning(self, caption: str) -> CachedPrompt:
        """Of a caption that `prepare` has seen.  Raises CheckpointError when it is gone."""
        states = {}
        for name in self.texts:
            tensors = read_entry(self._text_entry(name, caption).path)
            states[name] = States(tensors["context"], tensors.get("pooled", torch.zeros(0)))
        return CachedPrompt(self.layout.place(states), self.layout)

    @torch.no_grad()
    def prepare(
        self,
        dataset: Dataset,
        *,
        extra: Iterable[str] = ("",),
        on_progress: OnProgress | None = None,
    ) -> Prepared:
        """Make what is missing for this dataset and the extra captions.

        A network is loaded only if something of it is missing, and has left memory before the next
        one is loaded.  Stopped at any moment, it goes on from there.  Raises OSError, naming folder
        and bytes, when the disk is full, and ValueError for pictures that changed or do not fit.
        """
        items = {self._latents_path(item): item for item in dataset.pictures}
        for item in items.values():
            _check_size(item, self.pictures.factor)
        captions = list(dict.fromkeys([*extra, *dataset.captions()]))
        texts = {
            name: {self._text_entry(name, caption).path: caption for caption in captions}
            for name in self.texts
        }
        there = take_inventory([*items, *(path for paths in texts.values() for path in paths)])
        wanted = {path: item for path, item in items.items() if path in there.missing}
        unread = {
            name: {path: text for path, text in paths.items() if path in there.missing}
            for name, paths in texts.items()
        }
        made = {name: len(paths) for name, paths in unread.items()}
        check_space(self.folder, self._space(wanted.values(), made))
        if wanted:
            self._make_latents(wanted, on_progress)
        for name, paths in unread.items():
            if paths:
                self._make_states(name, paths, on_progress)
        cut = {name: sum(self._text_entry(name, c).cut for c in captions) for name in self.texts}
        return Prepared(
            pictures=len(wanted),
            captions=made,
            found=there.sound,
            damaged=there.damaged,
            cut={name: count for name, count in cut.items() if count},
        )

    def _make_latents(self, wanted: Mapping[Path, Item], on_progress: OnProgress | None) -> None:
        encode = self.pictures.load()
        for done, (path, item) in enumerate(wanted.items(), 1):
            pixels = item.picture.read()
            posterior = encode(pixels.image[None])  # one by one: a batch may round otherwise
            tensors = {"mean": posterior.mean[0], "logvar": posterior.logvar[0]}
            if pixels.mask is not None:
                tensors["mask"] = F.avg_pool2d(pixels.mask, self.pictures.factor)
            write_entry(path, tensors, self.storage)
            _tell(on_progress, "pictures", done, len(wanted))

    def _make_states(
        self, name: str, wanted: Mapping[Path, str], on_progress: OnProgress | None
    ) -> None:
        encode = self.texts[name].load()
        every = encode([self.texts[name].read(caption).text for caption in wanted.values()])
        for done, (path, states) in enumerate(zip(wanted, every, strict=True), 1):
            pooled = {"pooled": states.pooled} if len(states.pooled) else {}
            write_entry(path, {"context": states.context, **pooled}, self.storage)
            _tell(on_progress, name, done, len(wanted))

    def _latents_path(self, item: Item) -> Path:
        return self._path("latents", self.pictures.identity, item.picture.key)

    def _text_entry(self, name: str, caption: str) -> TextEntry:
        if (name, caption) not in self._known:
            stage = self.texts[name]
            reading = stage.read(caption)
            path = self._path("text", stage.identity, name, ",".join(map(str, reading.ids)))
            self._known[name, caption] = TextEntry(path, reading.cut)
        return self._known[name, caption]

    def _path(self, kind: str, *content: str) -> Path:
        facts = repr((FORMAT, kind, str(self.storage), *content))
        key = hashlib.sha256(facts.encode()).hexdigest()
        return self.folder / kind / key[:2] / f"{key}.safetensors"  # few files in each folder

    def _space(self, items: Iterable[Item], captions: Mapping[str, int]) -> int:
        """Bytes that these entries will take, about."""
        values = 0
        for item in items:
            width, height = (side // self.pictures.factor for side in item.bucket)
            values += (2 * self.pictures.channels + 1) * width * height
        for name, count in captions.items():
            span = self.layout.spans[name]
            rows, columns = span.rows[1] - span.rows[0], span.columns[1] - span.columns[0]
            values += count * rows * columns
        return values * self.storage.itemsize


def _check_size(item: Item, factor: int) -> None:
    if any(side % factor for side in item.bucket):
        width, height = item.bucket
        raise ValueError(
            f"{item.name}: {width}x{height} does not fit the VAE; sides must be multiples of "
            f"{factor}. Choose bucket_step accordingly."
        )


def _tell(on_progress: OnProgress | None, what: str, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(Progress(what, done, total))
