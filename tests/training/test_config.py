"""Settings of a run: read, checked one by one, written back."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from sd3_pack.sd3_core.__main__ import main, setting
from sd3_pack.sd3_core.training.config import (
    LoopConfig,
    TrainConfig,
    make_config,
    plain_settings,
    read_settings,
    read_toml,
    told_settings,
)
from sd3_pack.sd3_core.training.folders import Source

PACK = Path(__file__).parent.parent.parent

TOML = """
run_name = "cat"
data = ["a", { path = "b", repeats = 3, weight = 0.5 }, { path = "c", lines = "whole" }]
betas = [0.9, 0.95]
learning_rate = 1
lora_blocks = [0, 1]
t5_length = 77
shift = "auto"
checkpoint = "models/sd3.5_medium.safetensors"
gradient_checkpointing = true
"""


def test_toml_becomes_settings():
    config = make_config(read_toml(TOML))
    assert config.data == (
        Source(Path("a")),
        Source(Path("b"), 3, 0.5),
        Source(Path("c"), lines="whole"),
    )
    assert config.betas == (0.9, 0.95)
    assert config.learning_rate == 1.0
    assert isinstance(config.learning_rate, float)
    assert config.lora_blocks == (0, 1)
    assert (config.t5_length, config.shift) == (77, "auto")
    assert config.checkpoint == Path("models/sd3.5_medium.safetensors")


def test_one_folder_may_be_named_without_a_list():
    assert make_config({"run_name": "x", "data": "a"}).data == (Source(Path("a")),)


def test_settings_survive_json():
    config = make_config(read_toml(TOML))
    assert make_config(json.loads(json.dumps(plain_settings(config)))) == config


def test_settings_that_are_given_away_hold_no_folders():
    config = replace(
        make_config(read_toml(TOML)), output=Path("/tmp/someone"), data=(Source(Path("/tmp/a/b")),)
    )
    told = json.dumps(told_settings(config))
    assert "/" not in told
    assert "sd3.5_medium.safetensors" in told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "there is no setting 'learning_rat'. Did you mean learning_rate?"),
        ({"lines": "whole"}, 'lines is said of a folder: data = [{ path = "pictures", lines'),
        ({"data": {"path": "a", "lines": 1}}, 'prior = true, lines = "whole"}'),
        ({"steps": 0}, "steps is 0; expected a whole number from 1"),
        ({"steps": 1.5}, "steps is 1.5; expected a whole number"),
        ({"steps": True}, "steps is True; expected a whole number"),
        ({"steps": "10"}, "steps is '10'; expected a whole number"),
        ({"run_name": 5}, "run_name is 5; expected text in quotes"),
        ({"betas": [0.9]}, "betas is"),
        ({"betas": [0.9, 1.5]}, "two numbers in 0..1"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"optimizer": "muon"}, "optimizer is 'muon', which is for whole models"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; expected one of adamw, adafactor"),
        ({"lr_schedule": "linear"}, "lr_schedule is 'linear'"),
        ({"method": "dreambooth"}, "method is 'dreambooth'"),
        ({"lora_kinds": ["attention"]}, "some of attn, attn2, mlp, adaLN"),
        ({"lora_kinds": ["attn", "clip_l"]}, "'clip_l'); text encoders are not trained here"),
        ({"train_text_encoder": True}, "'train_text_encoder': text encoders are not trained here"),
        ({"clip_l_lr": 1e-5}, "'clip_l_lr': text encoders are not trained here: a LoRA changes"),
        ({"te1_lr": 1e-5}, "'te1_lr': text encoders are not trained here"),
        ({"use": ["t5xxl"]}, "some of clip_l, clip_g, t5"),
        ({"caption_dropout": 1.1}, "caption_dropout is 1.1; expected between 0 and 1"),
        ({"lowest_sigma": 0.9, "highest_sigma": 0.5}, "below highest_sigma"),
        ({"dtype": "fp16"}, "fp16 overflows"),
        ({"sample_every": 10}, "without sample_prompts"),
        ({"qk_norm": True}, "no LoRA file can carry"),
        ({"gradient_checkpointing": 1}, "expected true or false"),
        ({"data": [{"folder": "x"}]}, "a folder"),
        ({"data": [{"path": "x", "repeats": "2"}]}, "a folder"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"keep": 0}, "keep is 0"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_expected(change, message):
    with pytest.raises(ValueError, match=r"\w") as error:
        make_config({"run_name": "x", **change})
    assert message in str(error.value)


def test_the_name_of_a_run_is_needed():
    with pytest.raises(ValueError, match="run_name is missing"):
        make_config({"steps": 5})


@pytest.mark.parametrize("text", ["steps = ", "= 3", "[a", "a = 1\na = 2"])
def test_broken_toml_is_one_sentence(tmp_path, capsys, text):
    (tmp_path / "run.toml").write_text(text)
    assert main(["train", str(tmp_path / "run.toml")]) == 2
    assert capsys.readouterr().err.startswith("error: run.toml: ")


def test_a_missing_file_is_one_sentence(tmp_path, capsys):
    assert main(["train", str(tmp_path / "missing.toml")]) == 2
    assert "missing.toml: cannot be read" in capsys.readouterr().err


def test_single_settings_are_changed_on_the_command_line():
    assert setting("steps=100") == ("steps", 100)
    assert setting("run_name=my cat") == ("run_name", "my cat")
    assert setting("sample_prompts=['a', 'b']") == ("sample_prompts", ["a", "b"])
    assert setting("data={path = 'a', repeats = 2}") == ("data", {"path": "a", "repeats": 2})


def test_a_setting_without_a_value_is_one_sentence(capsys):
    with pytest.raises(SystemExit):
        main(["train", "x.toml", "--set", "steps"])
    assert "'steps': give NAME=VALUE, such as steps=2000" in capsys.readouterr().err


def test_on_python_3_10_toml_is_read_with_tomli_where_it_is_installed(monkeypatch, tmp_path):
    parser = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", parser)
    assert make_config(read_toml(TOML)).betas == (0.9, 0.95)
    monkeypatch.setitem(sys.modules, "tomli", None)
    path = tmp_path / "cat.toml"
    path.write_text(TOML)
    with pytest.raises(
        ValueError, match=r"cat.toml: TOML needs .* install the package tomli .*\.json"
    ):
        read_settings(path)
    path = path.with_suffix(".json")
    path.write_text(json.dumps(plain_settings(TrainConfig(run_name="cat"))))
    assert make_config(read_settings(path)).run_name == "cat"
    assert setting("steps=100") == ("steps", 100)  # JSON is enough


@pytest.mark.parametrize("name", ["train-lora.toml", "train-small.toml"])
def test_the_examples_in_the_documents_are_complete_and_good(name):
    table = read_settings(PACK / "docs" / name)
    config = make_config(table)
    assert config.run_name
    # what an example leaves out it names in a comment, so that nothing has to be looked up
    text = (PACK / "docs" / name).read_text(encoding="utf-8")
    shared = [field for field in LoopConfig.__dataclass_fields__ if field not in text]
    assert shared == []
    only = {"train-lora.toml": "lora", "train-small.toml": "scratch"}[name]
    assert config.method == only


def test_every_setting_is_in_one_of_the_examples():
    names = ("lora", "small", "dpo")
    texts = [(PACK / "docs" / f"train-{name}.toml").read_text() for name in names]
    missing = [
        field
        for field in TrainConfig.__dataclass_fields__
        if not any(f"{field} = " in text for text in texts)
    ]
    assert missing == []


def test_the_example_of_preferences_is_good():
    config = make_config(read_settings(PACK / "docs" / "train-dpo.toml"))
    assert config.method == "dpo"
    assert config.trains_lora


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dpo_beta", 0.0),
        ("dpo_loser_scale", 1.5),
        ("dpo_sft_weight", -1.0),
        ("dpo_patience", -1),
        ("lora_alpha", 0.0),
        ("lora_alpha", float("nan")),
        ("lora_dropout", 1.0),
        ("resolution", 0),
        ("weight_decay", float("inf")),
    ],
)
def test_settings_that_would_teach_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        make_config({"run_name": "x", "checkpoint": "x.safetensors", "data": ["x"], name: value})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.toml", "a = " + "[" * 100_000),
        ("x.json", "[" * 100_000),
        ("x.json", '{"a": ' * 100_000),
        ("x.toml", ".".join(["a"] * 20_000) + " = 1"),  # 25 seconds
        ("x.toml", "[" + ".".join(["a"] * 20_000) + "]\nx = 1"),
        ("x.toml", "a = {" + ".".join(["a"] * 20_000) + " = 1}"),
        ("x.json", "9" * 5000),
        ("x.toml", "x = 1\n" * 100_000),
        ("x.toml", "a" * 10_000),
    ],
    ids=range(9),
)
def test_a_file_made_to_break_its_reader_is_one_short_sentence(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name) as raised:
        read_settings(tmp_path / name)
    assert len(str(raised.value)) < 300 + len(str(tmp_path))


HUGE = (10**400, -(10**400), 16**8000, "x" * 100_000, [10**400], ["x" * 100_000], {"path": 10**400})


@pytest.mark.parametrize("name", [field.name for field in fields(TrainConfig)])
@pytest.mark.parametrize("value", HUGE, ids=range(len(HUGE)))
def test_a_huge_value_is_one_short_sentence_or_is_taken(name, value):
    try:
        make_config({"run_name": "a", name: value})
    except ValueError as error:
        told = str(error)
    else:
        told = ""
    assert len(told) < 600


def test_usual_toml_is_read_as_before():
    text = 'sample_prompts = ["a.b.c = d", "e"]\n[a.b.c]\nx = [\n  0.1, 0.2, 0.3,\n]\ny.z = 1.5'
    assert read_toml(text)["a"]["b"]["c"] == {"x": [0.1, 0.2, 0.3], "y": {"z": 1.5}}
    assert read_toml("x = [" + ", ".join(["0.5"] * 100) + "]")["x"] == [0.5] * 100
    assert read_toml("x = [\n" + ", ".join(["0.5"] * 100) + "\n]")["x"] == [0.5] * 100
