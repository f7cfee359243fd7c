"""Every kind of training run on a pretended card: the CPU's losses, and nothing left behind."""

import functools
import json
from dataclasses import replace

import pytest
from PIL import Image
from pretend_card import pretend_card
from sd3_pack.sd3_core.training.folders import Source
from sd3_pack.sd3_core.training.trainer import train
from training_set import scratch, write_pictures, write_training_set

SAMPLES = {"sample_every": 2, "sample_prompts": ("a red circle",), "sample_steps": 3}

KINDS = {
    "lora": lambda base: base,
    "dpo": lambda base: replace(
        base, method="dpo", data=(pairs(base),), dpo_beta=20.0, caption_dropout=0.0
    ),
}
MORE = {
    "from nothing, muon, dual attention": lambda base: replace(
        scratch(base), optimizer="muon", dual_attention_blocks=(0,)
    ),
    "prior": lambda base: replace(
        base, data=(*base.data, Source(base.output.parent / "prior", prior=True))
    ),
    "bf16": lambda base: replace(base, dtype="bf16"),
    "dropout": lambda base: replace(base, lora_dropout=0.2),
    "ema, adafactor": lambda base: replace(base, ema=0.9, optimizer="adafactor"),
    "samples": lambda base: replace(base, **SAMPLES),
    "edm": lambda base: replace(scratch(base), objective="edm(-1.2, 1.2)", **SAMPLES),
    "eps": lambda base: replace(scratch(base), objective="eps_linear", **SAMPLES),
    "whole network, qk-norm": lambda base: replace(
        base, method="full", qk_norm=True, learning_rate=1e-4
    ),
    "accumulation, stratified": lambda base: replace(base, accumulation=2, stratified=True),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    write_pictures(folder / "prior", 3)
    config = write_training_set(folder)
    return replace(config, dtype="fp32", validate_every=2, validation_items=2)


def pairs(base) -> Source:
    """Pictures that are preferred to others."""
    folder = base.output.parent / "pairs"
    for side, colour in (("chosen", (200, 40, 40)), ("rejected", (60, 60, 160))):
        (folder / side).mkdir(parents=True, exist_ok=True)
        for index in range(4):
            picture = Image.new("RGB", (64, 64), (20 * index, *colour[1:]))
            picture.paste(colour, (8, 8, 40, 40))
            picture.save(folder / side / f"{index}.png")
            (folder / side / f"{index}.txt").write_text("a red circle", encoding="utf-8")
    return Source(folder)


@pytest.fixture(scope="module")
def on_cpu(base):
    """name, kind -> the CPU's losses, each run once."""
    return functools.cache(lambda name, kind: trained(kind(base), name, "cpu"))


def losses(config) -> list[float]:
    log = config.output / "sd3" / config.run_name / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [line[name] for line in lines for name in ("loss", "validation_loss") if name in line]


def trained(config, name: str, device: str, **more) -> list[float]:
    config = replace(config, run_name=f"{name.replace(',', '')} {device[:3]}", device=device)
    train(config, **more)
    return losses(config)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*KINDS.items(), *(pytest.param(*item, marks=pytest.mark.long) for item in MORE.items())],
)
def test_it_learns_what_it_learns_on_the_cpu(base, on_cpu, name, kind):
    with pretend_card(8) as card:
        ours = trained(kind(base), name, "cuda")
        assert card.live == 0
        assert not card.counts.hazards
    assert ours == pytest.approx(on_cpu(name, kind), rel=1e-3)


def test_recomputation_leaves_nothing_on_the_card(base):
    with pretend_card(8) as card:
        trained(replace(base, gradient_checkpointing=True), "recomputed", "cuda")
        assert card.live == 0


def test_a_run_goes_on_where_it_was_stopped(base, on_cpu):
    class Stop(Exception):
        pass

    def stop(progress):
        if progress.step == 2:
            raise Stop

    with pretend_card(8) as card:
        with pytest.raises(Stop):
            trained(base, "stopped", "cuda", on_step=stop)
        assert card.live == 0
        again = trained(base, "stopped", "cuda")
    assert again == pytest.approx(on_cpu("lora", KINDS["lora"]), rel=1e-3)


@pytest.mark.long
def test_the_second_card_trains_alone(base, on_cpu):
    with pretend_card(8, device="cuda:1"):
        ours = trained(replace(base, **SAMPLES), "second", "cuda:1")
    assert ours == pytest.approx(on_cpu("lora", KINDS["lora"]), rel=1e-3)
