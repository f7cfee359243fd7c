"""sd-scripts' data: which level's value holds, which folders and captions are meant."""

import os
import random
from pathlib import Path

import pytest
from sd3_pack.sd3_core.training.config import make_config, plain_settings, read_toml
from sd3_pack.sd3_core.training.folders import Source, list_pictures
from sd3_pack.sd3_core.training.kohya import translate
from sd3_pack.sd3_core.training.run import named_folder


@pytest.fixture
def translated(tmp_path):
    def translated(arguments: str = "", datasets: str = ""):
        config = tmp_path / "kohya.toml"
        if datasets:
            (tmp_path / "data.toml").write_text(datasets, encoding="utf-8")
            arguments = f'dataset_config = "data.toml"\n{arguments}'
        config.write_text(arguments, encoding="utf-8")
        return translate(config)

    return translated


def own(path: str, **options) -> Source:
    return Source(Path(path), subfolders=False, **options)


LEVELS = """
[general]
num_repeats = 2
caption_extension = ".gen"
caption_dropout_rate = 0.2
batch_size = 2
[[datasets]]
num_repeats = 3
caption_extension = ".data"
  [[datasets.subsets]]
  image_dir = "a"
  num_repeats = 4
  caption_extension = ".sub"
  [[datasets.subsets]]
  image_dir = "b"
[[datasets]]
  [[datasets.subsets]]
  image_dir = "c"
"""


def test_the_lower_level_goes_before_the_higher_one_and_all_before_the_arguments(translated):
    arguments = (
        'dataset_repeats = 9\ncaption_extension = ".arg"\ncaption_dropout_rate = 0.9\n'
        "train_batch_size = 8\nbucket_reso_steps = 32\n"
    )
    config = translated(arguments, LEVELS).config()
    assert config.data == (
        own("a", repeats=4, caption_extension=".sub"),
        own("b", repeats=3, caption_extension=".data"),
        own("c", repeats=2, caption_extension=".gen"),
    )
    assert (config.caption_dropout, config.batch_size, config.bucket_step) == (0.2, 2, 32)
    bare = LEVELS.partition("[[datasets]]")[2].replace("num_repeats", "# ")
    config = translated(arguments, f"[[datasets]]{bare}").config()
    assert [source.repeats for source in config.data] == [9, 9, 9]
    assert config.data[2].caption_extension == ".arg"
    assert (config.caption_dropout, config.batch_size) == (0.9, 8)


def test_an_empty_text_says_nothing_on_any_level(translated):
    told = translated(
        'vae = ""\noutput_dir = ""\nlr_scheduler = ""\n',
        '[[datasets]]\ncaption_extension = ".data"\n[[datasets.subsets]]\nimage_dir = "a"\n'
        'caption_extension = ""\nclass_tokens = ""\n',
    )
    assert told.config().vae is None
    assert "output" not in told.settings
    assert told.config().data == (own("a", caption_extension=".data"),)


def test_settings_that_differ_between_folders_are_the_first_ones_and_told(translated):
    told = translated(
        "",
        """
[[datasets]]
resolution = 512
  [[datasets.subsets]]
  image_dir = "a"
  [[datasets.subsets]]
  image_dir = "b"
  caption_dropout_rate = 0.3
  flip_aug = true
  random_crop = true
[[datasets]]
resolution = 768
batch_size = 4
  [[datasets.subsets]]
  image_dir = "c"
""",
    )
    config = told.config()
    assert (config.resolution, config.batch_size) == (512, 1)
    assert (config.caption_dropout, config.crop) == (0.0, "centre")
    assert {line for line in told.ignored if line.startswith("dataset")} == {
        "dataset 2: resolution = 768: a run has one, which is 512",
        "dataset 2: batch_size = 4: a run has one, which is 1",
        "dataset 1, subset 2: caption_dropout_rate = 0.3: a run has one, which is 0.0",
        "dataset 1, subset 2: random_crop = True: a run has one, which is False",
        "dataset 1, subset 2: flip_aug = True: pictures are never mirrored",
    }


def touch(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def captions(source: Source) -> dict[str, tuple]:
    return {one.name: (one.repeats, one.captions) for one in list_pictures(source).found}


def test_an_image_dir_is_read_as_sd_scripts_reads_it(translated, tmp_path):
    """No folders in it, no number in its name, its caption files alone, class_tokens without."""
    home = tmp_path / "5_cat"
    for name in ("a.png", "b.png", "c.d.png", "3_dog/deep.png"):
        touch(home / name)
    touch(home / "a.caption", "the cat")
    touch(home / "a.txt", "not read")
    touch(home / "b.txt", "not read")
    touch(home / "c.d.caption", "another")
    text = f"""
[[datasets]]
caption_extension = ".caption"
  [[datasets.subsets]]
  image_dir = '{home}'
  class_tokens = "sks cat"
"""
    (source,) = translated("", text).config().data
    assert captions(source) == {
        "a.png": (1, (("the cat",),)),
        "b.png": (1, (("sks cat",),)),
        "c.d.png": (1, (("another",),)),
    }


def test_a_train_data_dir_gives_its_numbered_folders_alone(translated, tmp_path):
    for name in ("10_sks cat/a.png", "10_sks cat/deep/b.png", "3/c.png", "0_none/d.png"):
        touch(tmp_path / "train" / name)
    for name in ("misc/e.png", "f.png", "2024_trip/g.png"):
        touch(tmp_path / "train" / name)
    touch(tmp_path / "reg" / "1_cat" / "r.png")
    told = translated(
        f"train_data_dir = '{tmp_path / 'train'}'\nreg_data_dir = '{tmp_path / 'reg'}'\n"
        'caption_extension = ".txt"\n'
    )
    data = told.config().data
    assert [(one.path.name, one.repeats, one.caption, one.prior) for one in data] == [
        ("10_sks cat", 10, "sks cat", False),
        ("2024_trip", 2024, "trip", False),
        ("3", 3, "", False),
        ("1_cat", 1, "cat", True),
    ]
    assert captions(data[0]) == {"a.png": (10, (("sks cat",),))}
    assert any(line.endswith("in front: 0_none, misc") for line in told.ignored)


def test_a_train_data_dir_that_is_not_here_is_told(translated):
    told = translated('train_data_dir = "elsewhere"\nreg_data_dir = "others"\n')
    assert told.config().data == (Source(Path("elsewhere")), Source(Path("others"), prior=True))
    assert "elsewhere is not here" in "\n".join(told.notes)


def test_a_dataset_config_goes_before_the_folders_of_the_arguments(translated):
    told = translated('train_data_dir = "x"\nreg_data_dir = "y"\nin_json = "z"\n', LEVELS)
    assert {source.path.name for source in told.config().data} == {"a", "b", "c"}
    for name in ("train_data_dir", "reg_data_dir", "in_json"):
        assert any(line.startswith(f"{name} = ") for line in told.ignored)


def test_the_same_folder_again_is_left_out_or_its_repeats_are_added(translated):
    text = """
[[datasets]]
  [[datasets.subsets]]
  image_dir = "a"
  num_repeats = 2
  [[datasets.subsets]]
  image_dir = "x/../a"
  num_repeats = 5
[[datasets]]
  [[datasets.subsets]]
  image_dir = "a/"
  num_repeats = 3
  [[datasets.subsets]]
  image_dir = "none"
  num_repeats = 0
  [[datasets.subsets]]
  num_repeats = 2
[[datasets]]
"""
    told = translated("", text)
    assert told.config().data == (own("a", repeats=5),)
    said = "\n".join(told.ignored)
    assert "dataset 1, subset 2: x/../a is in this dataset already" in said
    assert "dataset 2, subset 1: a/ is dataset 1, subset 1, too" in said
    assert "dataset 2, subset 2: num_repeats = 0" in said
    assert "dataset 2, subset 3: has no image_dir" in said
    assert "dataset 3: has no subsets" in said


def test_what_other_ways_of_training_read_is_told(translated):
    text = '[[datasets]]\n[[datasets.subsets]]\nmetadata_file = "m.json"\nimage_dir = "a"\n'
    assert "metadata_file = m.json: captions are read" in "\n".join(translated("", text).ignored)


def test_regularisation_pictures_alone_teach_nothing(translated):
    told = translated("", '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\nis_reg = true\n')
    assert told.config().data == ()
    assert any("nothing else to learn from" in line for line in told.ignored)


@pytest.mark.parametrize(
    ("name", "becomes"),
    [
        ("my/lora:v1", "my_lora_v1"),
        ("con", "_con"),
        (".hidden ", "hidden"),
        ("猫 v1.5", "猫 v1.5"),
        ("///", "___"),
        ("...", "run"),
        ("x" * 300, "x" * 100),
    ],
)
def test_an_output_name_becomes_the_name_of_a_run_and_is_told(translated, tmp_path, name, becomes):
    told = translated(f'output_name = "{name}"')
    assert told.config().run_name == becomes
    assert any("output_name" in note for note in told.notes) == (name != becomes)
    named_folder(tmp_path, becomes, "run_name")


def test_text_encoders_are_trained_there_unless_said_and_that_is_told(translated):
    said = "sd-scripts trains CLIP-L and CLIP-G, too"
    assert any(note.startswith(said) for note in translated("network_dim = 4").notes)
    given = translated("network_dim = 4\nnetwork_train_unet_only = true")
    assert not any(note.startswith(said) for note in given.notes)


def test_unet_lr_goes_before_learning_rate_whatever_stands_first(translated):
    for text in ("unet_lr = 1e-3\nlearning_rate = 1e-5", "learning_rate = 1e-5\nunet_lr = 1e-3"):
        assert translated(text).config().learning_rate == 1e-3


def test_without_buckets_pictures_are_square_as_there(translated):
    assert translated("enable_bucket = false").config().widest == 1.0
    assert "widest = 1.0" in translated("network_dim = 4").defaults
    assert "widest = 1.0" not in translated("enable_bucket = true").defaults


def test_windows_editors_files_are_read(tmp_path):
    path = tmp_path / "kohya.toml"
    path.write_bytes("\ufeffoutput_name = 'Vögel'\r\n".encode("utf-16-le"))
    assert translate(path).config().run_name == "Vögel"


# Whatever a file holds

VALUES = {
    "output_name": ["a", "a/b", "", "nul", "ü 😀 \x7f \\ \" '"],
    "output_dir": ["", "out", "C:\\trained\\new"],
    "vae": ["", "vae.safetensors"],
    "max_train_steps": [1, 1600],
    "max_train_epochs": [1, 10],
    "learning_rate": [1e-4, 2e-6],
    "unet_lr": [5e-5],
    "text_encoder_lr": [[1e-5], 0.0],
    "lr_warmup_steps": [0, 10, 0.05],
    "lr_scheduler": ["constant", "cosine", "polynomial", ""],
    "optimizer_type": ["AdamW", "adamw8bit", "Lion", "Prodigy", ""],
    "optimizer_args": [["weight_decay=0.1", "betas=0.9,0.99", "decouple=True"], []],
    "network_dim": [1, 32],
    "network_alpha": [1, 16.0],
    "network_args": [["train_block_indices=0-3,7", "emb_dims=[4]"]],
    "network_train_unet_only": [True, False],
    "mixed_precision": ["no", "fp16", "bf16"],
    "save_precision": ["float", "fp16", "bf16"],
    "weighting_scheme": ["uniform", "logit_normal", "mode", "cosmap", "sigma_sqrt", "none"],
    "logit_std": [1.0, 0.5],
    "training_shift": [1.0, 3.0],
    "clip_l_dropout_rate": [0.0, 0.1],
    "prior_loss_weight": [0, 0.0, 0.5, 1.0],
    "train_data_dir": ["", "train", "."],
    "reg_data_dir": ["", "reg"],
    "sample_every_n_steps": [0, 100],
    "train_batch_size": [1, 4],
    "dataset_repeats": [1, 7],
    "seed": [0, 42],
    "unknown_setting": [1, "x"],
}
DATA_VALUES = {
    "num_repeats": [0, 1, 2, 10],
    "caption_extension": ["", ".txt", ".caption", ".tags", "-c.txt"],
    "class_tokens": ["", "sks ü"],
    "caption_dropout_rate": [0.0, 0.1, 1],
    "random_crop": [True, False],
    "alpha_mask": [True, False],
    "flip_aug": [True, False],
    "shuffle_caption": [True, False],
    "enable_wildcard": [True, False],
    "caption_prefix": ["", "best, "],
}
DATASET_VALUES = {
    "resolution": [512, [512, 768], [1024, 1024]],
    "batch_size": [1, 2],
    "enable_bucket": [True, False],
    "bucket_reso_steps": [32, 64],
    "max_bucket_reso": [1024],
    "bucket_no_upscale": [True, False],
    "validation_split": [0.0, 0.1],
}


def some(dice: random.Random, values: dict) -> dict:
    return {k: dice.choice(v) for k, v in values.items() if dice.random() < 0.4}


@pytest.mark.parametrize("seed", range(150))
def test_what_is_written_is_accepted_by_train_and_nothing_goes_missing(tmp_path, seed):
    dice = random.Random(seed)
    arguments = some(dice, VALUES)
    file: dict = {**arguments, **some(dice, {**DATA_VALUES, **DATASET_VALUES})}
    datasets = None
    if dice.random() < 0.7:
        datasets = []
        for _ in range(dice.randint(0, 3)):
            subsets = [
                {
                    **some(dice, DATA_VALUES),
                    **some(dice, {"is_reg": [True, False]}),
                    "image_dir": dice.choice(["a", "b", "sub/c", "./a"]),
                }
                for _ in range(dice.randint(0, 3))
            ]
            datasets.append({**some(dice, {**DATA_VALUES, **DATASET_VALUES}), "subsets": subsets})
        general = some(dice, {**DATA_VALUES, **DATASET_VALUES})
        (tmp_path / "data.json").write_text(json_text({"general": general, "datasets": datasets}))
        file["dataset_config"] = str(tmp_path / "data.json")
    path = tmp_path / "kohya.json"
    path.write_text(json_text(file))
    translated = translate(path)
    config = translated.config()
    assert make_config(read_toml(translated.toml())) == config
    ascii_only = translated.toml(ascii_only=True)
    assert ascii_only.isascii()
    assert make_config(read_toml(ascii_only)) == config
    assert make_config(plain_settings(config)) == config  # as a run's folder keeps it
    named_folder(tmp_path, config.run_name, "run_name")
    for source in config.data:
        assert source.path.name
    told = "\n".join((*translated.ignored, *translated.notes))
    if "unknown_setting" in file:
        assert "unknown_setting" in told
    if datasets is None:
        return
    expected: dict[tuple[int, str], int] = {}
    for number, dataset in enumerate(datasets):
        for subset in dataset["subsets"]:
            levels = (subset, dataset, general, arguments)
            repeats = next(
                (v for one in levels for v in (one.get("num_repeats"),) if v is not None), None
            )
            repeats = (
                arguments.get("dataset_repeats", file.get("num_repeats", 1))
                if (repeats is None)
                else repeats
            )
            place = os.path.realpath(subset["image_dir"])
            if repeats:
                expected.setdefault((number, place), repeats)
    for source in config.data:
        place = os.path.realpath(source.path)
        each = [repeats for (_, one), repeats in expected.items() if one == place]
        assert source.repeats == sum(each) or ("with other" in told and source.repeats < sum(each))


def json_text(value) -> str:
    import json

    return json.dumps(value)
