"""sd-scripts' configurations as ours."""

from pathlib import Path

import pytest
from sd3_pack.sd3_core.__main__ import main
from sd3_pack.sd3_core.training.config import make_config, read_toml
from sd3_pack.sd3_core.training.folders import Source
from sd3_pack.sd3_core.training.kohya import block_indices, translate
from sd3_pack.sd3_core.training.run import named_folder
from special_files import CAN_BE_MADE, make_special

GIVEN = """
[model]
pretrained_model_name_or_path = "sd3.5_medium.safetensors"
t5xxl = "t5.safetensors"
t5xxl_max_token_length = 154
[network]
network_module = "networks.lora_sd3"
network_dim = 32
network_args = ["train_block_indices=0,2-4", "x_attn_dim=8"]
[training]
output_name = "cat"
max_train_steps = 2000
lr_warmup_steps = 0.05
unet_lr = 5e-5
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1", "betas=0.9,0.95", "decouple=True"]
lr_scheduler = "cosine_with_restarts"
mixed_precision = "bf16"
gradient_checkpointing = true
weighting_scheme = "logit_normal"
logit_mean = 0.5
training_shift = 3.0
flip_aug = true
blocks_to_swap = 20
sdpa = true
resolution = "1024,768"
clip_l_dropout_rate = 0.1
clip_g_dropout_rate = 0.1
t5_dropout_rate = 0.1
min_timestep = 200
"""
DATASETS = """
[general]
bucket_reso_steps = 32
[[datasets]]
resolution = 512
batch_size = 4
  [[datasets.subsets]]
  image_dir = "cats"
  num_repeats = 10
  class_tokens = "cat"
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "kohya.toml"
    path.write_text(GIVEN)
    return path


def test_known_settings_are_translated(file):
    config = translate(file).config()
    assert config.run_name == "cat"
    assert config.checkpoint == Path("sd3.5_medium.safetensors")
    assert config.t5 == Path("t5.safetensors")
    assert config.t5_length == 154
    assert (config.rank, config.lora_alpha) == (32, 1.0)  # alpha's default there
    assert config.lora_blocks == (0, 2, 3, 4)
    assert "adaLN" in config.lora_kinds
    assert (config.steps, config.warmup, config.learning_rate) == (2000, 100, 5e-5)
    assert (config.optimizer, config.weight_decay, config.betas) == ("adamw_8bit", 0.1, (0.9, 0.95))
    assert (config.density, config.shift) == ("logit_normal(0.5, 1)", 3.0)
    assert (config.dtype, config.gradient_checkpointing) == ("bf16", True)
    assert config.resolution == 886  # the square of as many pixels
    assert config.encoder_dropout == 0.1
    assert config.lowest_sigma == 0.2


def test_what_is_not_used_is_listed(file):
    ignored = "\n".join(translate(file).ignored)
    for name in ("flip_aug", "blocks_to_swap", "cosine_with_restarts", "x_attn_dim", "decouple"):
        assert name in ignored
    assert "sdpa" not in ignored


def test_the_translation_is_toml_that_reads_back(file):
    translated = translate(file)
    assert make_config(read_toml(translated.toml())) == translated.config()


def test_a_dataset_file_beside_it_is_read_too(file):
    (file.parent / "data.toml").write_text(DATASETS)
    file.write_text('dataset_config = "data.toml"\n' + GIVEN)
    translated = translate(file)
    config = translated.config()
    cats = Source(Path("cats"), 10, subfolders=False, caption="cat", lines="first")
    assert config.data == (cats,)
    assert (config.batch_size, config.bucket_step) == (4, 32)


def test_a_datasets_own_settings_win_and_a_run_has_one_of_each(file):
    second = DATASETS.replace("cats", "dogs").replace("resolution = 512", "resolution = 768")
    (file.parent / "data.toml").write_text(DATASETS + second.replace("[general]", "[more]"))
    file.write_text('dataset_config = "data.toml"\n' + GIVEN)
    translated = translate(file)
    assert translated.config().resolution == 512  # over the 1024,768 of all
    assert [source.path.name for source in translated.config().data] == ["cats", "dogs"]
    assert "dataset 2: resolution = 768: a run has one, which is 512" in translated.ignored


def test_text_encoders_that_should_be_trained_are_told_and_usual_values_not(tmp_path):
    path = tmp_path / "kohya.toml"
    path.write_text(
        "network_train_unet_only = false\ntext_encoder_lr = [1e-5]\n"
        'enable_bucket = true\ncaption_extension = ".txt"\nnetwork_module = "lycoris.kohya"\n'
        "shuffle_caption = false\nkeep_tokens = 0\n"
    )
    names = [line.partition(" = ")[0] for line in translate(path).ignored]
    assert names == ["network_train_unet_only", "text_encoder_lr", "network_module"]


def test_other_defaults_are_told_where_nothing_is_given(file, tmp_path):
    bare = tmp_path / "bare.toml"
    bare.write_text("max_train_steps = 100")
    assert translate(bare).defaults == (
        "learning_rate = 2e-06",
        "eps = 1e-08",
        "rank = 4",
        "warmup = 0",
        "widest = 1.0",
        "t5_length = 256",
        "caption_dropout = 0.0",
        'density = "uniform"',
        "shift = 1.0",
        'loss_space = "x0"',
        'dtype = "fp32"',
    )
    assert translate(file).defaults == (
        "eps = 1e-08",
        "widest = 1.0",
        "caption_dropout = 0.0",
        'loss_space = "x0"',
    )
    told = make_config(translate(file).settings | read_toml("\n".join(translate(file).defaults)))
    assert (told.caption_dropout, told.loss_space) == (0.0, "x0")


def test_a_missing_dataset_file_is_listed(file):
    file.write_text('dataset_config = "data.toml"\n' + GIVEN)
    assert "there is no such file" in translate(file).ignored[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_train_steps = 0", "steps is 0"),
        ("network_dim = 'x'", "rank is 'x'"),
        ("a = [", "toml"),
        ("lr_warmup_steps = 'some'", "lr_warmup_steps is 'some'; sd-scripts has no such value"),
        ("min_timestep = [1]", r"min_timestep is \[1\]; sd-scripts has no"),
        ("datasets = 3", "datasets is 3; sd-scripts has no"),
        ("optimizer_args = 'weight_decay=x'", "optimizer_args is 'weight_decay=x'"),
    ],
)
def test_values_that_make_no_sense_are_one_sentence(tmp_path, line, message):
    path = tmp_path / "kohya.toml"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        translate(path)


def test_ranges_of_blocks():
    assert block_indices("0, 1,4-6") == [0, 1, 4, 5, 6]


def test_the_command_prints_ours_and_lists_the_rest(file, capsys):
    assert main(["train", "--from-kohya", str(file)]) == 0
    said = capsys.readouterr()
    assert make_config(read_toml(said.out)).rank == 32
    assert "not used: flip_aug = True: pictures are never mirrored" in said.err


REGULARISED = """
[[datasets]]
  [[datasets.subsets]]
  image_dir = "cats"
  [[datasets.subsets]]
  image_dir = "others"
  is_reg = true
"""


def test_regularisation_pictures_become_the_prior(file):
    (file.parent / "data.toml").write_text(REGULARISED)
    beginning = 'dataset_config = "data.toml"\n'
    file.write_text(beginning + 'prior_loss_weight = 0.5\nreg_data_dir = "more"\n' + GIVEN)
    translated = translate(file)
    assert translated.config().data == (
        Source(Path("cats"), subfolders=False, lines="first"),
        Source(Path("others"), prior=True, subfolders=False, lines="first"),
    )
    assert make_config(read_toml(translated.toml())) == translated.config()
    told = "\n".join(translated.ignored)
    assert "prior_loss_weight = 0.5: here prior_weight" in told
    assert "reg_data_dir = more: a dataset_config names its own" in told
    assert "sd-scripts learns from as many of them" in "\n".join(translated.notes)
    file.write_text(beginning + "prior_loss_weight = 0\n" + GIVEN)
    assert translate(file).config().data == (Source(Path("cats"), subfolders=False, lines="first"),)
    assert not any("reg" in line or "prior" in line for line in translate(file).ignored)


def test_a_folder_of_regularisation_pictures_is_the_prior_too(file):
    file.write_text('train_data_dir = "cats"\nreg_data_dir = "others"\n' + GIVEN)
    data = translate(file).config().data
    assert data == (Source(Path("cats")), Source(Path("others"), prior=True))
    file.write_text('train_data_dir = "cats"\nreg_data_dir = ""\n' + GIVEN)
    assert translate(file).config().data == (Source(Path("cats")),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('dataset_config = "' + "x" * 5000 + '"', "cannot be looked at"),
        ('train_data_dir = "' + "x" * 5000 + '"', "cannot be looked at"),
        ('sample_prompts = "' + "x" * 5000 + '.txt"', "cannot be looked at"),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a\\u0000b"', "image_dir is"),
        ('network_args = ["train_block_indices=0-99999999999"]', "network_args is"),
        ("network_args = " + "[" * 200 + "]" * 200, "network_args is"),
        ("network_alpha = 0x" + "f" * 9000, "network_alpha is a number of thousands of digits"),
        ('logit_mean = "x"', "logit_mean is 'x'"),
        ("logit_std = 0x" + "f" * 9000, "logit_std is a number of thousands of digits"),
        ("clip_l_dropout_rate = [1]\nclip_g_dropout_rate = [1]\nt5_dropout_rate = [1]", "dropout"),
    ],
)
def test_hostile_values_end_in_one_short_sentence(tmp_path, line, message):
    path = tmp_path / "kohya.toml"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        translate(path)
    assert len(str(caught.value)) < 500


def test_what_is_not_used_is_told_in_short(tmp_path):
    path = tmp_path / "kohya.toml"
    lines = ["weighting_scheme = [1]", "strange = 0x" + "f" * 9000, "x" * 50_000 + " = 1"]
    lines += ['other = "' + "x" * 50_000 + '"', 'output_name = "' + "猫" * 5000 + '"']
    path.write_text("\n".join(lines), encoding="utf-8")
    translated = translate(path)
    assert max(map(len, (*translated.ignored, *translated.notes))) < 400
    assert any("a number of thousands of digits" in line for line in translated.ignored)
    assert named_folder(tmp_path, translated.settings["run_name"], "run_name").parent == tmp_path


@pytest.mark.skipif(not CAN_BE_MADE, reason="this system makes no pipes")
@pytest.mark.parametrize("name", ["sample_prompts", "dataset_config"])
def test_a_pipe_that_a_configuration_names_is_not_waited_for(tmp_path, name):
    pipe = tmp_path / ("pipe.txt" if name == "sample_prompts" else "pipe.toml")
    make_special(pipe, "pipe")
    path = tmp_path / "kohya.toml"
    path.write_text(f'{name} = "{pipe.as_posix()}"', encoding="utf-8")
    assert any(name in line for line in translate(path).ignored)
