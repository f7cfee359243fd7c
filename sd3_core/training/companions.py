"""Pictures that lie beside the pictures to learn from and belong to something else.

Masks and control pictures of other trainers, previews, the bins and notes of systems.  Learnt as
pictures they would teach black and white under an empty prompt; so they are left out, and the
report says which, why, and how to have them in.  A picture that metadata.jsonl names is always
meant, and so is one with a caption of its own, whatever its folder is called.

OneTrainer writes NAME-masklabel.png and NAME-condlabel.png beside NAME; sd-scripts
(conditioning_data_dir), diffusion-pipe and ai-toolkit (mask_path, control_path) and SimpleTuner
(conditioning_data) take a folder in which they have the pictures' names.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..decode import EXTENSIONS
from .report import Skipped

HIDDEN = "hidden, as their names begin with a dot: rename what is to be learnt"
SYSTEM = "in folders that a system or a program keeps for itself: move what is to be learnt"
LABELS = (
    "masks and control pictures by their names; what a mask hides can be made transparent in the "
    "picture itself, and what is to be learnt renamed"
)
BESIDE = (
    "in folders named for masks, control pictures or previews, with the names of pictures beside "
    "them; what a mask hides can be made transparent in the picture itself, and what is to be "
    "learnt given a caption"
)

# Of macOS, Synology, QNAP, Windows, Linux; those that begin with a dot are hidden anyway.
SYSTEM_FOLDERS = re.compile(
    r"\..*|__macosx|@eadir|[@#]recycle|#snapshot|@recently-snapshot|\$recycle\.bin"
    r"|system volume information|lost\+found",
    re.IGNORECASE,
)
COMPANION_FOLDERS = re.compile(
    r"_?(mask|control|conditioning|cond|masklabel|condlabel|canny|depth|normal|openpose|pose|hed"
    r"|lineart|scribble|seg|segmentation|thumb|thumbnail|preview)s?([ _-]?(image|map|data))?s?_?",
    re.IGNORECASE,
)
LABEL = re.compile(r"[-_](masklabel|condlabel)$", re.IGNORECASE)  # unmistakable
MASK = re.compile(r"^mask[-_. ]|[-_. ]mask$", re.IGNORECASE)  # beside a picture without it


def visible_folders(
    top: Path, skipped: list[Skipped], left: dict[Path, str]
) -> Iterator[tuple[Path, list[str]]]:
    """Each folder and its files' names, sorted; links are followed, circles are not.

    left: receives the pictures that are hidden or a system's, and why nobody looks at them.
    """
    seen = set()

    def note(error: OSError) -> None:
        skipped.append(Skipped(str(error.filename), f"cannot be read ({error.strerror})"))

    for folder, inner, names in os.walk(top, onerror=note, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        for name in sorted(filter(SYSTEM_FOLDERS.fullmatch, inner)):
            left.update(dict.fromkeys(_pictures_within(Path(folder, name)), SYSTEM))
        inner[:] = sorted(name for name in inner if not SYSTEM_FOLDERS.fullmatch(name))
        names.sort()
        hidden = [name for name in names if name.startswith(".")]
        left.update({Path(folder, name): HIDDEN for name in hidden if _is_picture(name)})
        yield Path(folder), [name for name in names if not name.startswith(".")]


def _pictures_within(folder: Path) -> Iterator[Path]:
    """In a folder that nobody looks into otherwise: what cannot be read there is no matter."""
    for place, _, names in os.walk(folder):
        yield from (Path(place) / name for name in sorted(names) if _is_picture(name))


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


class Companions:
    """Tells which pictures, of a folder with all folders in it, belong to others of them.

    folders: each with the names of its files.
    """

    def __init__(self, top: Path, folders: Sequence[tuple[Path, list[str]]]):
        self.top = top
        self.stems = {
            folder: {_stem(name) for name in names if _is_picture(name)}
            for folder, names in folders
        }
        self.belongs: dict[Path, bool] = {}  # folders of companions, as far as they were asked for

    def reason(self, path: Path, captioned: bool) -> str:
        """Why a picture is left out; empty where it is meant."""
        stem = _stem(path.name)
        if LABEL.search(stem):
            return LABELS
        if captioned:
            return ""
        if MASK.search(stem) and MASK.sub("", stem) in self.stems[path.parent]:
            return LABELS
        folders = [folder for folder in path.parents if self.top in folder.parents]
        return BESIDE if any(map(self._belongs, folders)) else ""

    def _belongs(self, folder: Path) -> bool:
        """Whether a folder is named for companions, and most of its pictures have the names of
        others: of masks/sub/1.png in the sub/ beside masks/, or within a folder beside it."""
        if not COMPANION_FOLDERS.fullmatch(folder.name):
            return False
        if folder not in self.belongs:
            holder = folder.parent
            beside = [one for one in self.stems if one.parent == holder and one != folder]
            others = [one for one in beside if not COMPANION_FOLDERS.fullmatch(one.name)]
            owned = []
            for place, stems in self.stems.items():
                if place == folder or folder in place.parents:
                    within = place.relative_to(folder)
                    places = [one / within for one in (holder, *others)]
                    known = {stem for one in places for stem in self.stems.get(one, ())}
                    owned += [bool({stem, MASK.sub("", stem)} & known) for stem in stems]
            self.belongs[folder] = 2 * sum(owned) >= max(1, len(owned))
        return self.belongs[folder]


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]
