"""The data of a sd-scripts configuration: which folders, and which settings hold for each.

sd-scripts' rule (docs/config_README): what a subset says goes before what its dataset says, that
before [general], and that before the arguments, which a configuration file may hold as well.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import cut, quoted

# Arguments that are called otherwise in a dataset_config.
RENAMED_ARGUMENTS = {
    "train_batch_size": "batch_size",
    "dataset_repeats": "num_repeats",
    "caption_extention": "caption_extension",  # as it was once spelt
}
OF_DATASETS = (
    *("batch_size", "bucket_no_upscale", "bucket_reso_steps", "enable_bucket", "max_bucket_reso"),
    *("min_bucket_reso", "network_multiplier", "resolution", "validation_seed", "validation_split"),
)
OF_SUBSETS = (
    *("alpha_mask", "caption_dropout_every_n_epochs", "caption_dropout_rate", "caption_prefix"),
    *("caption_separator", "caption_suffix", "caption_tag_dropout_rate", "color_aug"),
    *("custom_attributes", "enable_wildcard", "face_crop_aug_range", "flip_aug", "keep_tokens"),
    *("keep_tokens_separator", "random_crop", "resize_interpolation", "secondary_separator"),
    *("shuffle_caption", "token_warmup_min", "token_warmup_step"),
)
# Each folder of ours has its own.
OF_SOURCES = ("image_dir", "num_repeats", "class_tokens", "caption_extension", "is_reg")
INHERITED = {*OF_DATASETS, *OF_SUBSETS, "num_repeats", "caption_extension", "class_tokens"}
# What holds there where nothing is said, of what a run of ours has one of.
UNSAID = {
    "batch_size": 1,
    "bucket_reso_steps": 64,
    "caption_dropout_rate": 0.0,
    "enable_bucket": False,
    "random_crop": False,
    "alpha_mask": False,
}


@dataclass(frozen=True)
class Subset:
    """A folder with the settings that hold for it, whatever level they come from."""

    settings: dict[str, Any]
    dataset: int = 1
    number: int = 1

    @property
    def label(self) -> str:
        return f"dataset {self.dataset}, subset {self.number}"


def given(table: Mapping[str, Any]) -> dict[str, Any]:
    """Without what says nothing: an empty text is no path and no name."""
    return {name: value for name, value in table.items() if value is not None and value != ""}


def merged_subsets(
    arguments: Mapping[str, Any], general: Mapping[str, Any], datasets: Sequence[Any]
) -> list[Subset]:
    """Every subset with what it inherits.  Raises ValueError for what is no table."""
    base = {**arguments, **given(_table("general", general))}
    found = []
    for place, dataset in enumerate(_list("datasets", datasets), 1):
        own = dict(given(_table("datasets", dataset)))
        subsets = _list("subsets", own.pop("subsets", []))
        for number, subset in enumerate(subsets, 1):
            settings = {**base, **own, **given(_table("subsets", subset))}
            found.append(Subset(settings, place, number))
    return found


def _table(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {quoted(value)}; sd-scripts has no such value.")
    return value


def _list(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is {quoted(value)}; sd-scripts has no such value.")
    return value


def numbered_folders(name: str, home: str, prior: bool, told: list[str]) -> list[dict[str, Any]]:
    """train_data_dir or reg_data_dir as subsets: its folders N_words, each N times, words for
    pictures without a caption; the others are left out, as there.

    told: receives a line for what is not used.
    """
    folders = sorted(path for path in Path(home).iterdir() if path.is_dir())
    subsets, left_out = [], []
    for folder in folders:
        number, _, words = folder.name.partition("_")
        try:
            repeats = int(number)
        except ValueError:
            repeats = 0
        if repeats < 1:
            left_out.append(folder.name)
            continue
        subset = {"image_dir": folder.as_posix(), "num_repeats": repeats, "is_reg": prior}
        subsets.append({**subset, "class_tokens": words})
    if left_out:
        told.append(f"{name} = {cut(home)}: without a number in front: {cut(', '.join(left_out))}")
    if not subsets:
        told.append(
            f"{name} = {cut(home)}: holds no folder such as 10_cat, and sd-scripts takes these"
        )
    return subsets


def sources(subsets: Sequence[Subset], told: list[str]) -> list[dict[str, Any]]:
    """Our `data`, a table for each folder.  told: receives a line for what is not used.

    The same folder again in a dataset is left out, as there; in another dataset it is trained once
    more there, for which its repeats are added here.  Raises ValueError.
    """
    data: list[dict[str, Any]] = []
    known: dict[str, tuple[Subset, dict[str, Any]]] = {}
    met: set[tuple[int, str]] = set()  # folders of each dataset
    for subset in subsets:
        source = _source(subset, told)
        if source is None:
            continue
        shown, place = cut(source["path"]), os.path.realpath(source["path"])
        again = (subset.dataset, place) in met
        met.add((subset.dataset, place))
        if place not in known:
            known[place] = (subset, source)
            data.append(source)
            continue
        first, taken = known[place]
        differing = {"path": "", "repeats": 0}
        if again:
            told.append(f"{subset.label}: {shown} is in this dataset already")
        elif taken | differing == source | differing:
            taken["repeats"] = taken.get("repeats", 1) + source.get("repeats", 1)
            told.append(
                f"{subset.label}: {shown} is {first.label}, too, in one size here: its "
                "repeats are added"
            )
        else:
            told.append(f"{subset.label}: {shown} is {first.label}, with other settings")
    return data


def _source(subset: Subset, told: list[str]) -> dict[str, Any] | None:
    settings = subset.settings
    for name in ("metadata_file", "conditioning_data_dir"):
        if name in settings:
            why = "captions are read beside the pictures, or from a metadata.jsonl"
            why = why if name == "metadata_file" else "there is no ControlNet in training"
            told.append(f"{subset.label}: {name} = {cut(settings[name])}: {why}")
    if "image_dir" not in settings:
        told.append(f"{subset.label}: has no image_dir")
        return None
    for name, kind in (
        ("image_dir", str),
        ("num_repeats", int),
        ("class_tokens", str),
        ("caption_extension", str),
        ("is_reg", bool),
    ):
        value = settings.get(name)
        if value is not None and (
            type(value) is not kind or (isinstance(value, str) and "\0" in value)
        ):
            raise ValueError(f"{name} is {quoted(value)}; sd-scripts has no such value.")
    repeats = settings.get("num_repeats", 1)
    if repeats < 1:
        told.append(
            f"{subset.label}: num_repeats = {cut(repeats)}: such a subset is left out, as there"
        )
        return None
    source: dict[str, Any] = {"path": settings["image_dir"], "subfolders": False}
    if repeats != 1:
        source["repeats"] = repeats
    if "class_tokens" in settings:
        source["caption"] = settings["class_tokens"]
    if "caption_extension" in settings:
        source["caption_extension"] = settings["caption_extension"]
    if settings.get("is_reg"):
        source["prior"] = True
    if not settings.get("enable_wildcard"):  # with it a line is drawn at random, as here
        source["lines"] = "first"
    return source
