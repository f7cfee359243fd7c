"""Thousands of hostile files by seed: each ends in a right result or in one short sentence.

Checkpoints have a suite of their own (checkpoints/test_fuzz.py), pipes and devices, too
(core/test_reading.py).
"""

import copy
import json
import random
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sd3_pack.sd3_core import verify as verifying
from sd3_pack.sd3_core.pictures import save_png
from sd3_pack.sd3_core.text.tokenizers import TokenizerFiles, clip_tokenizer, t5_tokenizer
from sd3_pack.sd3_core.training.config import make_config, read_settings
from sd3_pack.sd3_core.training.folders import Source, list_pictures
from sd3_pack.sd3_core.training.picks import PickRefused, Picks
from sd3_pack.sd3_core.training.preferences import list_pairs
from sd3_pack.sd3_core.training.run import State, open_run
from sd3_pack.sd3_core.training.scan import look_at
from tiny_tokenizers import clip_merges, clip_vocabulary, write_tiny_spiece, write_tiny_t5

TRIALS = 60  # of each kind; `long` runs 3,000
SECONDS = 2.0  # of the processor, for one input
BYTES = 10**9

JUNK = (
    *(None, True, False, 0, -1, 1, 1.5, -0.0, 1e308, 10**30, 10**400, 2**63, 2**64),
    *("", "x", "a\0b", "\ud83d", "../x", "/etc/passwd", "//host/share", "x" * 5000, "\u2028"),
    *([], {}, [[]], [{}], [None], {"type": "x"}, [0] * 200, float("nan"), float("inf")),
    *("Sequence", "Replace", "Precompiled", "AAAA", "(a+)+$", "clip_x", "nan"),
)


def changed(draw: random.Random, value: Any) -> Any:
    """JSON with something somewhere in it replaced, removed, doubled, renamed or wrapped."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2, 4))):
        value = _change(draw, value)
    return value


def _change(draw: random.Random, value: Any) -> Any:
    keys = (
        list(value)
        if isinstance(value, dict)
        else range(min(len(value), 50))
        if (isinstance(value, list))
        else ()
    )
    if not keys or draw.random() < 0.1:
        return draw.choice((draw.choice(JUNK), [value], {"x": value}))
    key = draw.choice(keys)
    match draw.randrange(8):
        case 0:
            del value[key]
        case 1:
            value[key] = draw.choice(JUNK)
        case 2 if isinstance(value, dict):
            value[draw.choice((str(draw.choice(JUNK)), key + "x"))] = value[key]
        case 3 if isinstance(value, list):
            value.insert(key, copy.deepcopy(value[key]))
        case _:
            value[key] = _change(draw, value[key])
    return value


def as_text(draw: random.Random, value: Any) -> bytes:
    """JSON, sometimes torn, flipped or nested without end."""
    data = bytearray(json.dumps(value).encode())
    match draw.randrange(12):
        case 0:
            del data[draw.randrange(len(data) + 1) :]
        case 1 if data:
            data[draw.randrange(len(data))] = draw.randrange(256)
        case 2:
            data = bytearray(b"[" * 50_000)
        case 3:
            data = bytearray(b'{"a":' * 50_000)
    return bytes(data)


def flipped(draw: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.choice((1, 2, 8, 64))):
        if damaged:
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
    match draw.randrange(6):
        case 0:
            del damaged[draw.randrange(len(damaged)) :]
        case 1:
            damaged += draw.randbytes(draw.choice((1, 1000)))
    return bytes(damaged)


# What is attacked


@pytest.fixture(scope="session")
def given(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("given")
    write_tiny_t5(folder)
    write_tiny_spiece(folder)
    t5 = json.loads((folder / "tokenizer.json").read_bytes())
    t5["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFKC"},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "x"},
        ],
    }
    clip = {**t5, "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": []}
    merges = [list(pair) for pair in clip_merges()]
    clip["model"] = {"type": "BPE", "vocab": clip_vocabulary(), "merges": merges}
    clip["model"]["end_of_word_suffix"] = "</w>"
    return SimpleNamespace(t5=t5, clip=clip, spiece=(folder / "spiece.model").read_bytes())


def tokenizers(draw: random.Random, folder: Path, given: SimpleNamespace) -> None:
    match draw.randrange(4):
        case 0:
            data = as_text(draw, changed(draw, given.t5))
            tokenizer = t5_tokenizer(TokenizerFiles("here", {"tokenizer.json": lambda: data}))
        case 1:
            data = as_text(draw, changed(draw, given.clip))
            files = TokenizerFiles("here", {"tokenizer.json": lambda: data})
            tokenizer = clip_tokenizer(files, "clip_l")
        case 2:
            data = flipped(draw, given.spiece)
            tokenizer = t5_tokenizer(TokenizerFiles("here", {"spiece.model": lambda: data}))
        case _:
            vocabulary = as_text(draw, changed(draw, given.clip["model"]["vocab"]))
            merges = "\n".join(f"{left} {right}" for left, right in clip_merges())
            pairs = flipped(draw, merges.encode())
            files = {"vocab.json": lambda: vocabulary, "merges.txt": lambda: pairs}
            tokenizer = clip_tokenizer(TokenizerFiles("here", files), "clip_g")
    for text in ("a red circle", "", "猫🐱  q\n" * 20, "a" * 60):
        assert all(type(one) is int for one in tokenizer.ids(text))


RECORD = {
    "format": verifying.FORMAT,
    "settings": {
        **{"prompt": "x", "negative": "", "prompt_clip_g": None, "prompt_t5": None},
        **{"use": ["clip_l"], "t5_length": "auto", "width": 16, "height": 16, "batch": 1},
        **{"seed": 0, "seed_each": False, "steps": 2, "cfg": 1.0, "cfg_start": 0.0},
        **{"cfg_end": 1.0, "shift": 3.0, "scheduler": "normal", "sampler": "euler"},
        **{"skip_scale": 0.0, "skip_layers": [], "skip_start": 0.0, "skip_end": 1.0},
        **{"init": None, "mask": None, "denoise": 1.0, "dtype": "fp32", "device": "cpu"},
    },
    "files": {"checkpoint": "gone.safetensors"},
    "loras": [["gone.safetensors", 1.0]],
    "fingerprints": {},
    "surroundings": {"torch": "2"},
    "index": 0,
}


def records(draw: random.Random, folder: Path, given: SimpleNamespace) -> None:
    pixels = torch.zeros(16, 16, 3, dtype=torch.uint8)
    (folder / "gone.safetensors").write_bytes(b"x")
    with suppress(UnicodeEncodeError):  # a PNG's text is UTF-8
        save_png(pixels, folder / "x.png", changed(draw, RECORD))
        verifying.verify(folder / "x.png")


def pick_lines(folder: Path) -> dict[str, list]:
    group = {"id": "g", "prompt": "x", "pictures": ["a.png", "b.png"], "arms": ["A", "B"]}
    group |= {"seed": 1, "model": "m", "time": "t", "models": [], "places": [0, 1]}
    vote = {"id": "g:0", "group": "g", "prompt": "x", "seed": 1, "chosen": "pictures/a.png"}
    vote |= {"rejected": "pictures/b.png", "arms": ["A", "B"], "weight": 1.0}
    undo = {"undo": "g:0", "time": "t"}
    rows = [{"file_name": "a.png", "text": "x", "weight": 1.0, "bucket": [64, 64]}]
    return {
        "candidates.jsonl": [group, {**group, "id": "h"}],
        "preferences.jsonl": [vote, undo, vote],
        "metadata.jsonl": rows,
    }


def pick_files(draw: random.Random, folder: Path, given: SimpleNamespace) -> None:
    for name, lines in pick_lines(folder).items():
        damaged = [as_text(draw, changed(draw, line)) for line in lines]
        (folder / name).write_bytes(b"\n".join(damaged))
    picks = Picks(folder)
    for group in picks.open_groups():
        assert len(group.shown()) == len(group.pictures)
        picks.vote(group.id, verdict="tie")
    picks.comparison()
    json.dumps(picks.passed_over())
    with suppress(PickRefused):
        picks.undo()
    for read in (list_pairs, list_pictures):
        with suppress(ValueError):
            read(Source(folder))


def run_files(draw: random.Random, folder: Path, given: SimpleNamespace) -> None:
    with open_run(folder, "run") as run:
        run.settle({"a": 1, "b": [1]}, 5, {"a": 1}, {"b": {"x": ("1", "2", "3")}})
        run.save(State(1, {"w": torch.ones(3)}, {"best": None}), keep=2, best=None)
        run.save(State(2, {"w": torch.ones(3)}, {"best": None}), keep=2, best=None)
        run.write({"step": 1, "loss": 1.0})
    place = folder / "sd3" / "run"
    name = draw.choice(("config.json", "data.json", "log.jsonl", "state/step-00000002.safetensors"))
    data = (place / name).read_bytes()
    with suppress(ValueError):
        data = as_text(draw, changed(draw, json.loads(data)))
    (place / name).write_bytes(flipped(draw, data) if draw.random() < 0.5 else data)
    with open_run(folder, "run") as run:
        run.settle({"a": 1, "b": [1]}, 5, {"a": 1}, {"b": {"x": ("1", "2", "3")}})
        state = run.newest()
        assert state is not None
        assert state.tensors["w"].equal(torch.ones(3))  # right, or refused
        run.put_aside()
        run.rewind(state.step, looked=True)


SETTINGS = {
    **{"run_name": "x", "data": ["a", {"path": "b", "repeats": 2, "weight": 0.5}], "steps": 10},
    **{"learning_rate": 1e-4, "rank": 4, "density": "logit_normal(0, 1)", "use": ["t5"]},
    **{"sample_prompts": ["a"], "buckets": [[64, 64]], "ema": 0.9, "crop": "center", "seed": 1},
}


def settings(draw: random.Random, folder: Path, given: SimpleNamespace) -> None:
    table = changed(draw, SETTINGS)
    name, data = "x.json", as_text(draw, table)
    if draw.random() < 0.5:
        name = "x.toml"
        with suppress(AttributeError):
            lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
            data = flipped(draw, "\n".join(lines).encode())
    (folder / name).write_bytes(data)
    make_config(read_settings(folder / name))


def pictures(draw: random.Random, folder: Path, given: SimpleNamespace) -> None:
    size = draw.choice(((1, 1), (16, 9), (64, 64)))
    mode = draw.choice(("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F"))
    kind = draw.choice(("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"))
    levels = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (*size, 3), np.uint8)
    data = BytesIO()
    with suppress(OSError, ValueError, KeyError):  # not every kind stores every mode
        Image.fromarray(levels).convert(mode if mode != "I;16" else "L").save(data, kind)
    (folder / "x.png").write_bytes(flipped(draw, data.getvalue() or b"x"))
    facts = look_at(folder / "x.png")
    assert facts.fault or facts.width * facts.height > 0
    if facts.fault:
        raise ValueError(facts.fault)


ATTACKS = (tokenizers, records, pick_files, run_files, settings, pictures)


def attack(
    how: Callable[[random.Random, Path, SimpleNamespace], None],
    seeds: range,
    folder: Path,
    given: SimpleNamespace,
) -> None:
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        began, held = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            how(random.Random(seed), place, given)
        except ValueError as error:
            if len(str(error)) > 1500:
                raise AssertionError(f"{how.__name__} with seed {seed}: too long") from error
        except BaseException as error:
            raise AssertionError(f"{how.__name__} with seed {seed}") from error
        spent = time.process_time() - began
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
        assert spent < SECONDS, f"{how.__name__} with seed {seed} takes {spent:.1f} s"
        unit = 1 if sys.platform == "darwin" else 1024
        assert grown * unit < BYTES, f"{how.__name__} with seed {seed} takes {grown:,} KiB"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ATTACKS)
def test_what_is_hostile_ends_in_a_right_result_or_one_sentence(tmp_path, how, given):
    attack(how, range(TRIALS), tmp_path, given)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ATTACKS)
def test_three_thousand_of_each(tmp_path, how, given):
    attack(how, range(TRIALS, TRIALS + 3000), tmp_path, given)
