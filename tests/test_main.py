"""The command line, run as a user runs it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sd3_pack.sd3_core.__main__ import main, output_files
from sd3_pack.sd3_core.embedded.captions import short_caption
from sd3_pack.sd3_core.embedded.render import draw as draw_scenes
from sd3_pack.sd3_core.embedded.scenes import scenes
from sd3_pack.sd3_core.pictures import read_png, save_png, to_uint8
from sd3_pack.sd3_core.training.config import read_toml
from sd3_pack.sd3_core.verify import LATER_SETTINGS
from tiny import write_tiny_checkpoint
from tiny_tokenizers import write_tiny_tokenizers

PACK = Path(__file__).parent.parent
QUICK = ["--steps", "2", "--width", "64", "--height", "48", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_tokenizers(folder / "tokenizers")
    path = folder / "tiny.safetensors"
    write_tiny_checkpoint(path, tokenizers=folder / "tokenizers")
    return path


@pytest.fixture(scope="module")
def drawn(model, tmp_path_factory):
    """A picture with its settings."""
    picture = tmp_path_factory.mktemp("drawn") / "out.png"
    assert draw(model, picture, "--seed", "2") == 0
    return picture


def draw(model: Path, output: Path, *options: str) -> int:
    files = ["--checkpoint", str(model), "-o", str(output)]
    return main(["generate", "a red circle", *files, *QUICK, *options])


def test_one_command_turns_a_prompt_into_a_picture(model, tmp_path):
    """In a process of its own, from the pack's folder."""
    command = [sys.executable, "-m", "sd3_core", "generate", "a red circle", *QUICK]
    files = ["--checkpoint", str(model), "-o", str(tmp_path / "out.png")]
    done = subprocess.run([*command, *files], cwd=PACK, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "out.png") in done.stdout
    assert Image.open(tmp_path / "out.png").size == (64, 48)


def again(picture: Path, model: Path) -> int:
    """The exit status of verify for somebody who trusts the model's folder."""
    return main(["verify", str(picture), "--allow", str(model.parent)])


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_no_word_ends_a_command_under_a_narrow_code_page(model, tmp_path, encoding):
    """Redirected: a prompt and names for which the code page has no letters."""
    name = "ein Vögelchen 猫 😀"
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(model, folder / "modèle 猫.safetensors")
    (folder / "kohya.toml").write_text(f'output_dir = "{name}"', encoding="utf-8")
    drawing = ["generate", name, "--checkpoint", str(folder / "modèle 猫.safetensors"), *QUICK]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    # One process: each start takes seconds.
    script = (
        "import sys; from sd3_core.__main__ import main\n"
        "sys.exit(max(main(line.split('\\t')) for line in sys.argv[1:]))"
    )
    lines = [
        [*drawing, "-o", str(folder / "猫.png")],
        ["verify", str(folder / "猫.png")],
        ["inspect", str(folder / "modèle 猫.safetensors")],
        ["inspect", "--json", str(folder / "modèle 猫.safetensors")],
        ["train", "--from-kohya", str(folder / "kohya.toml")],
    ]
    command = [sys.executable, "-c", script, *("\t".join(line) for line in lines)]
    done = subprocess.run(command, cwd=PACK, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    told = done.stdout.decode(encoding)
    assert "\\u732b.png" in told
    settings = read_toml(told[told.rindex("run_name") :])
    assert settings["output"] == name
    failed = [*command[:3], "inspect\t" + str(folder / "no 猫.safetensors")]
    done = subprocess.run(failed, cwd=PACK, capture_output=True, env=environment)
    assert (done.returncode, b"error: " in done.stderr) == (2, True)


def test_a_model_whose_name_is_not_utf8_draws_and_verifies(model, tmp_path):
    odd = tmp_path / os.fsdecode(b"mod\xe8le.safetensors")
    try:
        shutil.copy(model, odd)
    except OSError as error:
        pytest.skip(f"this file system has no such names ({error})")
    picture = tmp_path / os.fsdecode(b"\xe9.png")
    assert draw(odd, picture, "--seed", "5") == 0
    assert main(["verify", str(picture)]) == 0
    assert main(["inspect", str(odd)]) == 0
    assert main(["export", str(tmp_path / "all.safetensors"), "--checkpoint", str(odd)]) == 0


def test_half_a_character_in_a_prompt_is_one_sentence(model, tmp_path, capsys):
    options = ["--checkpoint", str(model), "-o", str(tmp_path / "out.png"), *QUICK]
    assert main(["generate", "a \ud83d cat", *options]) == 2
    assert "the prompt holds half a character (U+D83D)" in capsys.readouterr().err


def test_a_picture_is_verified_bit_for_bit(model, tmp_path, capsys):
    picture = tmp_path / "out.png"
    assert draw(model, picture, "--seed", "5", "--batch", "2", "--negative", "grün ✓") == 0
    assert again(tmp_path / "out-2.png", model) == 0
    told = capsys.readouterr()
    assert "bit-equal" in told.out
    assert f"opens {model.as_posix()}\n" in told.err


def test_a_picture_drawn_with_the_step_cache_tells_and_verifies(model, tmp_path, capsys):
    picture = tmp_path / "out.png"
    options = ("--step-cache", "0.9", "--steps", "6", "--cfg-end", "0.5", "--measure")
    assert draw(model, picture, "--seed", "5", *options) == 0
    told = capsys.readouterr().out
    assert re.search(r"step cache \([1-4] of 6 evaluations left out\)", told)
    assert re.search(r"distance: 0\.\d{4} of the latents' size", told)
    assert again(picture, model) == 0
    assert draw(model, tmp_path / "plain.png", "--seed", "5", "--steps", "6") == 0
    assert "Not active: " in capsys.readouterr().out
    assert not (read_png(picture)[0] == read_png(tmp_path / "plain.png")[0]).all()


def test_a_picture_with_its_mask_verifies_at_its_own_size(model, tmp_path, capsys):
    levels = np.random.default_rng(0).integers(0, 256, (67, 45, 3)).astype(np.uint8)
    Image.fromarray(levels).save(tmp_path / "photo.png")
    Image.new("L", (30, 20), 255).save(tmp_path / "mask.png")
    picture = tmp_path / "out.png"
    files = ["--checkpoint", str(model), "-o", str(picture)]
    start = ["--init", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png")]
    assert main(["generate", "a red circle", *files, *start, "--steps", "2"]) == 0
    assert "note: photo.png is 45 x 67 pixels: cut around its centre to 40 x 64." in (
        capsys.readouterr().out
    )
    assert Image.open(picture).size == (40, 64)
    assert again(picture, model) == 0


def test_a_picture_from_before_these_settings_verifies(model, drawn, tmp_path):
    pixels, record = read_png(drawn)
    older = {k: v for k, v in record["settings"].items() if k not in LATER_SETTINGS}
    assert len(older) < len(record["settings"])
    save_png(torch.from_numpy(pixels.copy()), tmp_path / "old.png", record | {"settings": older})
    assert again(tmp_path / "old.png", model) == 0


def test_a_changed_picture_is_measured(model, tmp_path, capsys):
    picture = tmp_path / "out.png"
    draw(model, picture)
    pixels, record = read_png(picture)
    pixels = pixels.copy()
    pixels[0, 0, 0] ^= 4
    save_png(torch.from_numpy(pixels), picture, record)
    assert again(picture, model) == 1
    assert "up to 4 of 255" in capsys.readouterr().out


def test_another_model_is_named_as_the_difference(model, tmp_path, capsys):
    picture = tmp_path / "out.png"
    draw(model, picture)
    other = tmp_path / "other.safetensors"
    write_tiny_checkpoint(other, tokenizers=model.parent / "tokenizers", seed=9)
    assert main(["verify", str(picture), "--checkpoint", str(other)]) == 1
    assert "the mmdit file's content" in capsys.readouterr().out


def test_a_picture_moved_with_its_model_still_verifies(model, tmp_path, monkeypatch):
    work, kept = tmp_path / "work", tmp_path / "kept"
    work.mkdir()
    kept.mkdir()
    (work / "tiny.safetensors").write_bytes(model.read_bytes())
    monkeypatch.chdir(work)
    assert draw(Path("tiny.safetensors"), Path("out.png")) == 0
    for name in ("out.png", "tiny.safetensors"):
        (work / name).rename(kept / name)
    assert main(["verify", str(kept / "out.png")]) == 0
    (kept / "tiny.safetensors").unlink()
    assert main(["verify", str(kept / "out.png")]) == 2


def test_the_settings_in_the_picture_are_complete_json(model, tmp_path):
    picture = tmp_path / "out.png"
    draw(model, picture, "--seed", "11")
    record = json.loads(Image.open(picture).info["sd3_workbench"])
    assert record["format"] == 1
    assert record["settings"]["seed"] == 11
    assert record["settings"]["steps"] == 2
    assert None not in [record["settings"][name] for name in ("cfg", "shift", "sampler", "width")]
    assert set(record["fingerprints"]) == {"mmdit", "vae", "clip_l", "clip_g", "t5"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: [r], "another version"),
        (lambda r: None, "another version"),
        (lambda r: r | {"format": 2}, "another version"),
        (lambda r: {k: v for k, v in r.items() if k != "loras"}, "damaged"),
        (lambda r: r | {"files": None}, "damaged"),
        (lambda r: r | {"index": 5}, "damaged"),
        (lambda r: r | {"settings": r["settings"] | {"width": "64"}}, "damaged"),
        (lambda r: r | {"settings": r["settings"] | {"prompt": None}}, "damaged"),
        (lambda r: r | {"settings": {}}, "damaged"),
        (lambda r: r | {"files": {"checkpoint": "../../etc/gone.safetensors"}}, "not opened"),
        (lambda r: r | {"files": {"checkpoint": "a\0b"}}, "names the checkpoint file"),
        (lambda r: r | {"files": {"checkpoint": "x" * 100_000}}, "names the checkpoint file"),
        (lambda r: r | {"settings": r["settings"] | {"use": ["clip_x"]}}, "damaged"),
        (lambda r: r | {"settings": r["settings"] | {"use": [[]]}}, "damaged"),
        (lambda r: r | {"settings": r["settings"] | {"skip_layers": ["a"]}}, "damaged"),
        (lambda r: r | {"settings": r["settings"] | {"cfg": 10**400}}, "damaged"),
        (lambda r: r | {"settings": r["settings"] | {"width": 10**400}}, "damaged"),
        (lambda r: r | {"loras": [["a", 10**400]]}, "damaged"),
    ],
)
def test_a_damaged_record_is_one_sentence(model, drawn, tmp_path, capsys, change, message):
    pixels, record = read_png(drawn)
    picture = tmp_path / "damaged.png"
    save_png(torch.from_numpy(pixels.copy()), picture, change(record))
    assert again(picture, model) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error) < 1000


ELSEWHERE = ("//host/share/x.safetensors", "\\\\host\\share\\x.safetensors", "/etc/x.safetensors")


@pytest.mark.parametrize(
    "name", [*ELSEWHERE, "\\\\?\\C:\\x.safetensors", "sub/../../x.safetensors"]
)
@pytest.mark.parametrize("what", ["checkpoint", "lora", "init"])
def test_what_a_picture_names_elsewhere_is_not_even_looked_at(
    model, drawn, tmp_path, capsys, monkeypatch, name, what
):
    """On Windows a look at //host/share tells that host who is asking."""
    pixels, record = read_png(drawn)
    changes = {
        "checkpoint": {"files": {"checkpoint": name}},
        "lora": {"loras": [[name, 1.0]]},
        "init": {"settings": record["settings"] | {"init": name}},
    }
    picture = tmp_path / "out.png"
    save_png(torch.from_numpy(pixels.copy()), picture, record | changes[what])
    looked = []
    stat = Path.stat
    monkeypatch.setattr(
        Path, "stat", lambda path, **given: (looked.append(path), stat(path, **given))[1]
    )
    assert again(picture, model) == 2
    assert f"names the {what} file {name}, which is not opened" in capsys.readouterr().err
    known = (model.parent, tmp_path)
    assert all(any(place in (path, *path.parents) for place in known) for path in looked)


def test_without_leave_only_the_pictures_own_folder_is_opened(model, drawn, tmp_path, capsys):
    assert main(["verify", str(drawn)]) == 2
    told = capsys.readouterr().err
    assert "outside of the picture's folder" in told
    assert "opens " not in told
    assert main(["verify", str(drawn), "--checkpoint", str(model)]) == 0
    inside = tmp_path / "models" / "deep"
    inside.mkdir(parents=True)
    (inside / model.name).write_bytes(model.read_bytes())
    assert draw(inside / model.name, tmp_path / "out.png", "--seed", "2") == 0
    assert main(["verify", str(tmp_path / "out.png")]) == 0


def test_a_scaled_copy_is_refused_with_both_sizes(model, drawn, tmp_path, capsys):
    pixels, record = read_png(drawn)
    small = torch.from_numpy(pixels[::2, ::2].copy())
    save_png(small, tmp_path / "small.png", record)
    assert again(tmp_path / "small.png", model) == 2
    assert "is 32 x 24 pixels, its settings draw 64 x 48" in capsys.readouterr().err


def test_a_foreign_picture_is_refused(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    assert main(["verify", str(tmp_path / "foreign.png")]) == 2
    assert "holds no settings of SD3 Workbench" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("missing/out.png", "no such folder"),
        ("out.jpg", "a name that ends in .png"),
        ("", "is a folder"),
    ],
)
def test_an_impossible_output_is_refused_before_the_work(model, tmp_path, capsys, output, message):
    assert draw(model, tmp_path / output) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_file_is_one_sentence_and_no_traceback(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_text("<html>not found</html>")
    assert draw(tmp_path / "model.safetensors", tmp_path / "out.png") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.safetensors: is no safetensors file")
    assert "Traceback" not in error


def test_default_names_are_numbered_and_never_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert output_files(None, 1) == [Path("sd3_0001.png")]
    (tmp_path / "sd3_0007-2.png").touch()
    assert output_files(None, 2) == [Path("sd3_0008-1.png"), Path("sd3_0008-2.png")]


def test_inspect_says_what_the_file_is(model, capsys):
    assert main(["inspect", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_split_files_are_exported_as_one_that_draws_the_same(model, tmp_path, capsys):
    split = tmp_path / "split"
    write_tiny_checkpoint(split, layout="split")
    whole = tmp_path / "whole.safetensors"
    files = [
        "--checkpoint",
        split / "sd3_tiny.safetensors",
        "--clip-l",
        split / "clip_l.safetensors",
    ]
    files += ["--clip-g", split / "clip_g.safetensors", "--t5", split / "t5xxl.safetensors"]
    files += ["--tokenizers", model.parent / "tokenizers"]
    assert main(["export", str(whole), *map(str, files)]) == 0
    assert draw(whole, tmp_path / "a.png", "--seed", "1") == 0
    assert draw(model, tmp_path / "b.png", "--seed", "1") == 0
    one, other = (np.asarray(Image.open(tmp_path / f"{n}.png"), dtype=np.int16) for n in "ab")
    assert np.abs(one - other).max() <= 1
    assert main(["export", str(whole), *map(str, files)]) == 2
    assert "is there already" in capsys.readouterr().err


# Without a file: the embedded model


def test_without_a_file_the_embedded_model_draws_and_tells_what_it_does_not_know(tmp_path, capsys):
    picture = tmp_path / "out.png"
    assert main(["generate", "a red zebra", "--steps", "1", "-o", str(picture)]) == 0
    told = "".join(capsys.readouterr())
    assert '"zebra": outside of the embedded model\'s world. It knows one to four' in told
    assert Image.open(picture).size == (128, 128)
    assert main(["generate", "a red circle", "--steps", "1", "-o", str(picture)]) == 0
    assert "world" not in "".join(capsys.readouterr())


def test_a_picture_is_read_against_its_prompt(tmp_path, capsys):
    (shown,) = scenes(3, range(1), (128, 128), kinds={"single": 1.0})
    picture = tmp_path / "out.png"
    save_png(to_uint8(draw_scenes([shown]))[0], picture, {})
    assert main(["check", str(picture), short_caption(shown)]) == 0
    assert "as asked" in capsys.readouterr().out
    assert main(["check", str(picture), "a zebra"]) == 2
    told = capsys.readouterr().err
    assert "zebra" in told
    assert "It knows" in told


def test_the_score_is_printed_and_written(tmp_path, capsys):
    counts = tmp_path / "score.json"
    few = ["--prompts", "1", "--seeds", "1", "--steps", "1", "--json", str(counts)]
    assert main(["score", *few]) == 0
    assert "| overall | " in capsys.readouterr().out
    rows = {row["category"]: row["total"] for row in json.loads(counts.read_text())}
    assert rows["overall"] == 6
    assert rows["unseen combinations"] == 1


def test_a_stage_of_the_embedded_model_is_one_command(tmp_path, capsys):
    assert main(["tiny", "words", "--output", str(tmp_path)]) == 0
    assert Path(capsys.readouterr().out.strip()).is_dir()
    assert main(["tiny", "pack", "--output", str(tmp_path), "--name", "mine"]) == 2
    assert "begins with sd3-tiny-" in capsys.readouterr().err
    assert main(["tiny", "shelves", "--output", str(tmp_path), "--scenes-from", "-1"]) == 2
    assert "give a number from 0" in capsys.readouterr().err


def full_disk(monkeypatch, free: int = 1000) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))


def test_a_full_disk_is_told_before_anything_is_drawn(model, tmp_path, capsys, monkeypatch):
    full_disk(monkeypatch)
    monkeypatch.setattr("sd3_pack.sd3_core.generate.generate", lambda *_: pytest.fail("drawn"))
    assert draw(model, tmp_path / "out.png", "--batch", "2") == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'out.png'}: about 8,388,608 bytes will be written there and 1,000" in told
    assert main(["score", "--json", str(tmp_path / "deep" / "score.json")]) == 2
    assert "score.json: about" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
