"""Prompt to picture with a tiny model of generated weights: laws and refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sd3_pack.sd3_core import generate as generation
from sd3_pack.sd3_core.checkpoints.load import load_mmdit, load_vae
from sd3_pack.sd3_core.errors import CheckpointError, NumericalError, OutOfMemory
from sd3_pack.sd3_core.generate import generate
from sd3_pack.sd3_core.pictures import to_uint8
from sd3_pack.sd3_core.presets import PRESETS
from sd3_pack.sd3_core.schedule import Schedule
from sd3_pack.sd3_core.settings import Files, Settings, make_plan, settled
from tiny import METADATA, write_tiny_checkpoint, write_tiny_lora, write_tiny_model

QUICK = Settings("a red circle", seed=7, steps=2, cfg=3.0, sampler="euler", device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    write_tiny_checkpoint(folder / "split", layout="split", metadata=METADATA)
    write_tiny_checkpoint(folder / "other.safetensors", ("mmdit", "vae", "clip_l"), seed=1)
    return folder


@pytest.fixture(scope="module")
def files(folder):
    return Files(checkpoint=folder / "tiny.safetensors")


@pytest.fixture(scope="module")
def plain(files):
    return generate(files, QUICK)


def same_picture(one: torch.Tensor, other: torch.Tensor) -> None:
    """Matrix products round differently with the alignment of the weights in their file."""
    assert (one.int() - other.int()).abs().max() <= 1


@pytest.fixture
def photo(tmp_path):
    levels = torch.arange(64 * 64 * 3, dtype=torch.float32).reshape(64, 64, 3) % 255
    path = tmp_path / "photo.png"
    Image.fromarray(levels.to(torch.uint8).numpy()).save(path)
    return path


@pytest.fixture
def left_half(tmp_path):
    """A mask: the left half is drawn anew."""
    pixels = np.zeros((64, 64), dtype=np.uint8)
    pixels[:, :32] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_the_same_settings_give_the_same_pixels(files, plain):
    assert torch.equal(generate(files, QUICK).pixels, plain.pixels)
    assert plain.pixels.shape == (1, 64, 64, 3)
    assert plain.pixels.dtype == torch.uint8


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"prompt": "a blue square"},
        {"negative": "a dog"},
        {"prompt_clip_g": "a dog"},
        {"prompt_t5": "a dog"},
        {"steps": 3},
        {"cfg": 4.0},
        {"shift": 1.0},
        {"scheduler": "simple"},
        {"sampler": "heun"},
        {"sampler": "dpmpp_2m", "steps": 3},
        {"use": ("clip_l", "t5")},
        {"t5_length": 20},
        {"skip_scale": 2.0, "skip_layers": (1,)},
        {"cfg_end": 0.3},
        {"cfg_start": 0.7},
        {"prompt": "a (red:1.5) circle"},
    ],
)
def test_every_setting_acts(files, plain, change):
    assert not torch.equal(generate(files, replace(QUICK, **change)).pixels, plain.pixels)


def test_split_files_draw_what_the_single_file_draws(folder, plain):
    split = Files(
        checkpoint=folder / "split" / "sd3_tiny.safetensors",
        clip_l=folder / "split" / "clip_l.safetensors",
        clip_g=folder / "split" / "clip_g.safetensors",
        t5=folder / "split" / "t5xxl.safetensors",
        tokenizers=folder / "tokenizers",
    )
    same_picture(generate(split, QUICK).pixels, plain.pixels)


def test_a_named_file_wins_over_the_checkpoint(folder, files, plain):
    other = replace(files, mmdit=folder / "other.safetensors")
    result = generate(other, QUICK)
    assert not torch.equal(result.pixels, plain.pixels)
    assert result.record["fingerprints"]["mmdit"] != plain.record["fingerprints"]["mmdit"]
    assert result.record["fingerprints"]["vae"] == plain.record["fingerprints"]["vae"]


def test_a_missing_encoder_gives_zeros_and_says_so(folder, files):
    without = Files(
        checkpoint=folder / "split" / "sd3_tiny.safetensors",
        clip_l=folder / "split" / "clip_l.safetensors",
        clip_g=folder / "split" / "clip_g.safetensors",
        tokenizers=folder / "tokenizers",
    )
    result = generate(without, QUICK)
    assert any("T5" in note and "zeros" in note for note in result.notes)
    off = generate(files, replace(QUICK, use=("clip_l", "clip_g")))
    assert any("T5 is off" in note for note in off.notes)
    same_picture(result.pixels, off.pixels)


def test_the_first_picture_of_a_batch_has_the_shape_of_the_others(files):
    result = generate(files, replace(QUICK, batch=2, width=48, height=72))
    assert result.pixels.shape == (2, 72, 48, 3)
    assert not torch.equal(result.pixels[0], result.pixels[1])


def test_the_models_own_numbers_rule_where_the_user_gave_none(files):
    plan = make_plan(files, Settings("x", device="cpu"))
    assert (plan.width, plan.height, plan.schedule.shift) == (64, 64, 2.0)


def test_auto_shift_grows_with_the_side(files):
    plan = make_plan(files, Settings("x", shift="auto", width=128, height=128, device="cpu"))
    assert plan.schedule.shift == pytest.approx(4.0)


def test_on_step_sees_every_step_and_can_stop_the_run(files):
    seen = []
    generate(files, replace(QUICK, steps=3), lambda step: seen.append((step.index, step.total)))
    assert seen == [(0, 3), (1, 3), (2, 3)]

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(files, QUICK, stop)


def test_image_to_image_comes_closer_to_its_picture_as_denoise_falls(files, photo):
    def draw(denoise):
        return generate(files, replace(QUICK, init=photo, denoise=denoise)).pixels.float()

    kept = draw(0.0)  # only the way through the VAE and back
    changes = [float((draw(denoise) - kept).abs().mean()) for denoise in (0.3, 1.0)]
    assert 0 < changes[0] < changes[1]


def test_a_mask_keeps_the_pictures_own_pixels(files, photo, left_half):
    pixels = generate(files, replace(QUICK, init=photo, mask=left_half)).pixels[0]
    original = torch.from_numpy(np.asarray(Image.open(photo)).copy())
    assert torch.equal(pixels[:, 32:], original[:, 32:])
    assert not torch.equal(pixels[:, :24], original[:, :24])


def test_a_picture_is_drawn_at_its_own_size_and_its_mask_follows_it(files, tmp_path):
    """A mask of another aspect: a band from a quarter to three quarters of the height."""
    levels = np.random.default_rng(0).integers(0, 256, (130, 67, 3)).astype(np.uint8)
    Image.fromarray(levels).save(tmp_path / "tall.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 16, 64, 48))
    mask.save(tmp_path / "mask.png")
    wanted = replace(QUICK, init=tmp_path / "tall.png", mask=tmp_path / "mask.png")
    result = generate(files, wanted)
    assert result.pixels.shape == (1, 128, 64, 3)
    assert (result.record["settings"]["width"], result.record["settings"]["height"]) == (64, 128)
    assert "tall.png is 67 x 130 pixels: cut around its centre to 64 x 128." in result.notes
    assert any(note.startswith("mask.png is 64 x 64 pixels") for note in result.notes)
    original = torch.from_numpy(levels[1:129, 1:65])
    changed = (result.pixels[0] != original).any(2).float().mean(1)
    assert (changed[:30] == 0).all()
    assert (changed[98:] == 0).all()
    assert (changed[36:92] > 0.5).all()


def test_a_size_that_cuts_the_picture_is_told(files, photo):
    result = generate(files, replace(QUICK, init=photo, width=24, height=48))
    told = "photo.png is 64 x 64 pixels: scaled to 24 x 48 and cut around its centre, 50% of it."
    assert told in result.notes
    as_it_is = generate(files, replace(QUICK, init=photo))
    assert not any("photo.png" in note for note in as_it_is.notes)


def networks(files):
    parts = make_plan(files, QUICK).parts
    return load_mmdit(parts["mmdit"]), load_vae(parts["vae"])


def by_hand(files, sigmas, start, start_noise):
    """The stages of QUICK, written out with the functions that golden recordings hold."""
    mmdit, vae = networks(files)
    with torch.no_grad():
        plan = make_plan(files, QUICK)
        positive, negative = (p.conditioning for p in generation.encode_prompts(files, plan))
        x = start + sigmas[0] * (start_noise - start)
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            given = (x, 1000 * sigma.reshape(1))
            with_prompt = mmdit(*given, positive.context, positive.pooled)
            without = mmdit(*given, negative.context, negative.pooled)
            x = x + (sigma_next - sigma) * (without + 3.0 * (with_prompt - without))
        return to_uint8(vae.decode(x / 1.5305 + 0.0609))


def test_text_to_image_is_its_stages_in_order(files, plain):
    sigmas = Schedule(2.0).sigmas(2)
    start_noise = torch.randn(1, 16, 8, 8, generator=torch.manual_seed(7))
    same_picture(plain.pixels, by_hand(files, sigmas, torch.zeros_like(start_noise), start_noise))


def test_image_to_image_is_its_stages_in_order(files, photo):
    _, vae = networks(files)
    pixels = torch.from_numpy(np.asarray(Image.open(photo), dtype=np.float32).copy())
    with torch.no_grad():
        mean = vae.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1).mean
    sigmas = Schedule(2.0).sigmas(2, denoise=0.4)
    start_noise = torch.randn(1, 16, 8, 8, generator=torch.manual_seed(7))
    expected = by_hand(files, sigmas, (mean - 0.0609) * 1.5305, start_noise)
    same_picture(generate(files, replace(QUICK, init=photo, denoise=0.4)).pixels, expected)


def test_a_picture_of_a_batch_can_have_a_seed_of_its_own(files):
    batch = generate(files, replace(QUICK, batch=2, seed_each=True))
    alone = generate(files, replace(QUICK, seed=8))
    same_picture(batch.pixels[1:], alone.pixels)


def test_a_cfg_of_0_draws_the_negative_prompt_and_says_so(files):
    result = generate(files, replace(QUICK, cfg=0.0, negative="a dog"))
    same_picture(result.pixels, generate(files, replace(QUICK, prompt="a dog", cfg=1.0)).pixels)
    assert sum("the prompt does not count" in note for note in result.notes) == 1


def test_skip_layer_guidance_brings_its_own_cfg():
    """SD3.5 Medium: 4.5, and 4.0 beside skip-layer guidance."""
    preset = PRESETS["sd3.5_medium"]
    given = Settings("x", width=1024, height=1024)
    assert settled(given, preset).cfg == 4.5
    assert settled(replace(given, skip_scale=2.5), preset).cfg == 4.0
    assert settled(replace(given, skip_scale=2.5, cfg=6.0), preset).cfg == 6.0


def test_notes_on_the_negative_prompt_are_told_apart(files):
    result = generate(files, replace(QUICK, negative="a red circle " * 12))
    assert any(note.startswith("negative prompt: CLIP-L read") for note in result.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 60}, "width is 60; it must be a multiple of 8. Try 64"),
        ({"height": 4096}, "height is 4096; this model draws at most 384 pixels"),
        ({"width": -8}, "width is -8"),
        ({"height": 0}, "height is 0"),
        ({"skip_scale": float("nan"), "skip_layers": (1,)}, "skip_scale is nan"),
        ({"cfg": 1e30}, "cfg is 1e\\+30"),
        ({"shift": 1e300}, "shift is 1e\\+300"),
        ({"cfg_start": 20.0, "cfg_end": 80.0}, "cfg_start is 20.0; it is a part of the run"),
        ({"t5_length": 3_000_000_000}, "4096 is the limit"),
        ({"prompt": "\ud800"}, "holds half a character"),
        ({"prompt": "(" * 3000 + "x" + ")" * 3000}, "nested too deeply"),
        ({"negative": "(x:1e999)"}, "weight inf"),
        ({"batch": 0}, "batch is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"shift": "high"}, "shift is high; give a number or auto"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"cfg": float("nan")}, "cfg is nan; give a number"),
        ({"sampler": "ddim"}, "sampler is 'ddim'; choose one of euler, heun, dpmpp_2m"),
        ({"scheduler": "karras"}, "scheduler is 'karras'"),
        ({"denoise": 0.5}, "give --init"),
        ({"skip_scale": 2.0, "skip_layers": (9,)}, "blocks 0 to 1"),
        ({"skip_scale": 2.0}, "needs its blocks"),
        ({"seed": -1}, "seed is -1"),
        ({"cfg_start": 0.9, "cfg_end": 0.1}, "0.9"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"t5_length": 0}, "t5_length"),
        ({"init": "nowhere.png"}, "nowhere.png"),
    ],
)
def test_bad_settings_are_refused_before_a_weight_is_read(files, monkeypatch, change, message):
    def read(*_, **__):
        raise AssertionError("the long work began")

    for name in ("load_mmdit", "load_vae", "load_clip", "load_t5_to_fit"):
        monkeypatch.setattr(generation, name, read)
    with pytest.raises(ValueError, match=message):
        generate(files, replace(QUICK, **change))


def test_a_mask_without_a_picture_is_refused(files, left_half):
    with pytest.raises(ValueError, match="give --init"):
        generate(files, replace(QUICK, mask=left_half))


def test_missing_networks_are_named_with_what_supplies_them(folder):
    with pytest.raises(CheckpointError, match=r"no mmdit and no vae.*--mmdit FILE.*--vae FILE"):
        make_plan(Files(clip_l=folder / "split" / "clip_l.safetensors"), QUICK)


def test_no_text_encoder_at_all_is_refused(folder):
    checkpoint = Files(checkpoint=folder / "split" / "sd3_tiny.safetensors")
    with pytest.raises(CheckpointError, match=r"none of the text encoders.*--clip-l FILE"):
        make_plan(checkpoint, QUICK)
    assert make_plan(checkpoint, replace(QUICK, use=())).parts


def test_networks_of_different_models_are_told_apart(folder, files, tmp_path):
    from build import with_recipe_weights
    from safetensors.torch import save_file
    from sd3_pack.sd3_core.models.t5 import T5Config, T5Encoder

    stranger = T5Config(
        d_model=96, d_ff=32, d_kv=16, num_heads=2, num_layers=1, vocab_size=200, num_buckets=32
    )
    path = tmp_path / "t5xxl.safetensors"
    save_file(dict(with_recipe_weights(T5Encoder, stranger, 0).state_dict()), path)
    with pytest.raises(CheckpointError, match=r"tokens 96 wide.*takes 224.*different models"):
        make_plan(replace(files, t5=path), QUICK)


@pytest.mark.parametrize(
    ("loader", "weight", "stage"),
    [
        ("load_mmdit", "final_layer.linear.bias", "the MMDiT's first step"),
        ("load_vae", "encoder.conv_out.bias", "the VAE's encoder"),
        ("load_vae", "decoder.conv_out.bias", "the VAE's decoder"),
        ("load_clip", "text_model.final_layer_norm.bias", "CLIP-L"),
        ("load_t5_to_fit", "encoder.final_layer_norm.weight", "T5"),
    ],
)
def test_an_overflow_names_its_stage(files, photo, monkeypatch, loader, weight, stage):
    load = getattr(generation, loader)

    def broken(*arguments, **options):
        network = load(*arguments, **options)
        network.get_parameter(weight).data.fill_(float("nan"))
        return network

    monkeypatch.setattr(generation, loader, broken)
    with pytest.raises(NumericalError, match=f"{stage} gave NaN"):
        generate(files, replace(QUICK, init=photo))


def test_loras_act_by_their_strength_and_are_recorded(files, plain, tmp_path):
    path = write_tiny_lora(tmp_path / "style.safetensors")
    half = generate(replace(files, loras=((path, 0.5),)), QUICK)
    whole = generate(replace(files, loras=((path, 1.0),)), QUICK)
    none = generate(replace(files, loras=((path, 0.0),)), QUICK)
    assert torch.equal(none.pixels, plain.pixels)
    assert not torch.equal(half.pixels, plain.pixels)
    assert not torch.equal(half.pixels, whole.pixels)
    assert half.record["loras"] == [[path.as_posix(), 0.5]]
    assert "lora 1" in half.record["fingerprints"]


def peft_folder(path, alpha):
    """A LoRA of rank 2 as PEFT leaves it."""
    path.mkdir()
    name = "base_model.model.transformer_blocks.0.attn.to_q"
    generator = torch.Generator().manual_seed(2)
    tensors = {
        f"{name}.lora_A.weight": torch.randn(2, 128, generator=generator),
        f"{name}.lora_B.weight": torch.randn(128, 2, generator=generator),
    }
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def test_a_folder_of_peft_acts_at_its_own_strength_and_is_recorded(files, plain, tmp_path):
    four = peft_folder(tmp_path / "four", alpha=4)
    one = peft_folder(tmp_path / "one", alpha=1)
    drawn = generate(replace(files, loras=((four, 0.25),)), QUICK)
    assert torch.equal(drawn.pixels, generate(replace(files, loras=((one, 1.0),)), QUICK).pixels)
    assert not torch.equal(drawn.pixels, plain.pixels)
    assert drawn.record["loras"] == [[four.as_posix(), 0.25]]
    stored = drawn.record["fingerprints"]
    (four / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    now = generate(replace(files, loras=((four, 0.25),)), QUICK).record["fingerprints"]
    changed = [name for name in stored if stored[name] != now[name]]
    assert changed == ["lora 1 adapter_config.json"]


def test_a_lora_for_an_encoder_that_is_not_there_is_noted_or_refused(files, tmp_path):
    both = write_tiny_lora(tmp_path / "style.safetensors")
    alone = tmp_path / "alone.safetensors"
    tensors = {key: value for key, value in load_file(both).items() if "clip_l" in key}
    save_file(tensors, alone)
    write_tiny_checkpoint(tmp_path / "without.safetensors", ("mmdit", "vae", "clip_g"))
    network = Files(checkpoint=tmp_path / "without.safetensors")
    with pytest.warns(UserWarning, match="CLIP-L, which is not among the files"):
        plan = make_plan(replace(network, loras=((both, 1.0),)), QUICK)
    assert list(plan.loras[0][0].parts) == ["mmdit"]
    with pytest.raises(CheckpointError, match=r"alone\.safetensors: changes .*CLIP-L alone"):
        make_plan(replace(network, loras=((alone, 1.0),)), QUICK)


def test_a_lora_of_another_model_is_refused_before_the_work(files, tmp_path):
    path = write_tiny_lora(tmp_path / "style.safetensors", width=192)
    with pytest.raises(CheckpointError, match=r"style\.safetensors: this LoRA is for another"):
        make_plan(replace(files, loras=((path, 1.0),)), QUICK)


def test_a_lora_part_for_an_encoder_that_is_off_is_noted(files, tmp_path):
    path = write_tiny_lora(tmp_path / "style.safetensors")
    off = replace(QUICK, use=("clip_g", "t5"))
    result = generate(replace(files, loras=((path, 1.0),)), off)
    assert any("CLIP-L, which is off" in note for note in result.notes)


def test_a_lora_strength_that_is_no_number_is_refused(files, tmp_path):
    path = write_tiny_lora(tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"the strength of style\.safetensors is nan"):
        make_plan(replace(files, loras=((path, float("nan")),)), QUICK)


def test_a_checkpoint_given_as_lora_is_refused(files):
    with pytest.raises(CheckpointError, match=r"tiny\.safetensors"):
        make_plan(replace(files, loras=((files.checkpoint, 1.0),)), QUICK)


@pytest.mark.parametrize(
    ("function", "stage"),
    [
        ("encode_prompts", "encoding the prompts"),
        ("sample", "sampling"),
        ("decoded", "decoding"),
    ],
)
def test_full_memory_ends_in_a_sentence_and_the_next_run_draws(
    files, plain, monkeypatch, function, stage
):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(generation, function, full)
    with pytest.raises(OutOfMemory, match=f"while {stage}. Try .*a smaller batch, a smaller width"):
        generate(files, replace(QUICK, batch=2))
    monkeypatch.undo()
    same_picture(generate(files, QUICK).pixels, plain.pixels)


def test_how_it_was_decoded_is_said(files, plain, monkeypatch):
    (told,) = [gain for gain in plain.gains if gain.name == "decoding in stripes"]
    assert (told.active, told.note) == (False, "the memory holds the whole")
    monkeypatch.setattr(generation, "free_memory", lambda device: 1.0)
    cut = generate(files, QUICK)
    (told,) = [gain for gain in cut.gains if gain.name == "decoding in stripes"]
    assert told.active
    assert (cut.pixels.int() - plain.pixels.int()).abs().max() <= 1
