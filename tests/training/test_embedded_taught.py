"""What the embedded model can be taught, measured by its checker; half an hour on a CPU.

    pytest tests/training/test_embedded_taught.py -s        # prints the tables as well

A LoRA teaches a colour that the world does not have, from 32 pictures, held to what the model
answered before on ordinary ones (the prior); DPO on the checker's own verdicts lifts a category
whose prompts it never sees.  The aims are 90 % with at most two points lost, and ten points.  What
is short of an aim ends as an expected failure with its number.

With sd3-tiny-6 salmon comes in 91.4 % of 128 pictures and 0.7 of 75.7 points are lost (768
pictures).  At 1e-3 and 3000 steps 89.8 % of 256 and 1.6 of 75.8 (1536 pictures); beside 2048
pictures, 1e-3: at weight 4 93.0 % and 2.7 after 2600 steps, 89.8 % and 3.0 after 2000; at weight 1
and 7e-4 93.8 % and 7.7.  Pictures merely mixed in cost 2.1 points for 82.8 %, 5.7 for 93.8 % (of
384).  Without dropped captions of the new pictures guidance overshoots: by 2000 steps at 7e-4,
weight 4, salmon came in 34 % at cfg 3 and in 83 % at cfg 1.5.

DPO lifts nothing: by 751 pairs of 540 prompts (500 steps of 16, its last 56 prompts held out)
counting went from 62.5 to 62.9 % of 256 pictures, by 190 pairs to 63.7, by 110 to 59.8.  The
winners' error fell throughout, and 81 % of the trained pairs were followed by then, but 50 to 56 %
of held-out ones: what makes a picture right here is how many things there are, and the squared
error of a velocity hardly tells.  Where the pairs are rendered and differ by one thing (8192 of
them, 2000 steps of 16 at 1e-3), 79 % of held-out ones were followed, the winners' error on them
fell by 0.0018, and counting came to 66.4 %; by 2048 such pairs to 65.6.  So the preference can be
learnt on given pictures, and the model's own way from noise to a picture hardly follows it.
"""

import json
from pathlib import Path

import pytest
import torch
from sd3_pack.sd3_core.checkpoints.load import load_mmdit, load_vae
from sd3_pack.sd3_core.checkpoints.lora_files import read_lora
from sd3_pack.sd3_core.embedded.captions import full_caption, short_caption
from sd3_pack.sd3_core.embedded.drawing import Painter
from sd3_pack.sd3_core.embedded.evaluation import prompts
from sd3_pack.sd3_core.embedded.model import FILE
from sd3_pack.sd3_core.embedded.render import draw
from sd3_pack.sd3_core.embedded.scenes import scenes
from sd3_pack.sd3_core.embedded.score import judge_pictures, score
from sd3_pack.sd3_core.embedded.world import COLOURS, GROUNDS
from sd3_pack.sd3_core.lora import merge
from sd3_pack.sd3_core.pictures import save_png, to_uint8
from sd3_pack.sd3_core.settings import Files, Settings
from sd3_pack.sd3_core.training.config import TrainConfig
from sd3_pack.sd3_core.training.folders import Source
from sd3_pack.sd3_core.training.trainer import train

pytestmark = pytest.mark.long

SIDE = 128  # pixels
# One that the VAE can show, which was taught eight: it turns brown (0.42, 0.26, 0.12) into a dark
# red (0.49, 0.16, 0.19), teal into green.
NEW, NEW_RGB = "salmon", torch.tensor([0.95, 0.55, 0.45])
STAND_IN = "red"  # whose place the new colour takes in rendered pictures
NEAR = 0.15  # RGB distance that still is the new colour; the nearest known ones are 0.3 away
PICTURES = 32
ORDINARY = 6144  # pictures of the world as it is: the prior
CATEGORY = "counting"  # what DPO is to lift
SEEDS = (2, 3, 4, 5)  # of the score: 768 pictures
SETTINGS = Settings(prompt="", device="cpu", dtype="fp32")


def painter(lora=None) -> Painter:
    """The embedded model, perhaps with a LoRA."""
    files = Files(checkpoint=FILE)
    if lora is None:
        return Painter(files, SETTINGS)
    model = load_mmdit(FILE, dtype=torch.float32)
    merge(model, read_lora(lora).parts["mmdit"], 1.0)
    return Painter(files, SETTINGS, model)


def run(folder, **settings) -> TrainConfig:
    return TrainConfig(
        output=folder / "output",
        checkpoint=FILE,
        resolution=SIDE,
        device="cpu",
        dtype="fp32",
        validate_every=settings.pop("validate_every", 0),
        **settings,
    )


def share(values) -> float:
    return sum(values) / len(values)


# A new colour


def recoloured(pictures: torch.Tensor, ground: str) -> torch.Tensor:
    """Pictures [B, 3, H, W] in 0..1 with the new colour where the stand-in was."""
    base, old = (torch.tensor(rgb)[:, None, None] for rgb in (GROUNDS[ground], COLOURS[STAND_IN]))
    cover = ((pictures - base) * (old - base)).sum(1, keepdim=True) / ((old - base) ** 2).sum()
    return (base + cover.clamp(0, 1) * (NEW_RGB[:, None, None] - base)).clamp(0, 1)


def stand_in_scenes(seed: int, count: int):
    """Single things of the stand-in's colour, on any ground, whose short caption names it."""
    found = (
        one
        for start in range(0, 100_000, 64)
        for one in scenes(seed, range(start, start + 64), (SIDE, SIDE), kinds={"single": 1.0})
    )
    wanted = (s for s in found if s.short.groups[0].colour == STAND_IN)
    return [next(wanted) for _ in range(count)]


def is_new_colour(picture: torch.Tensor) -> bool:
    """[3, H, W] in -1..1: whether the thing in it has the new colour."""
    pixels = (picture / 2 + 0.5).flatten(1)
    ground = pixels.median(dim=1).values[:, None]
    thing = pixels[:, (pixels - ground).norm(dim=0) > 0.3]
    return thing.shape[1] > 60 and bool((thing.median(dim=1).values - NEW_RGB).norm() < NEAR)


@torch.inference_mode()
def behind_the_vae(pictures: torch.Tensor) -> torch.Tensor:
    vae = load_vae(FILE, dtype=torch.float32)
    return torch.cat([vae.decode(vae.encode(some).mean) for some in pictures.split(8)])


def write_pictures(folder: Path, pictures: torch.Tensor, captions: list[str]) -> None:
    """pictures: [B, 3, H, W] in -1..1."""
    folder.mkdir()
    for number, caption in enumerate(captions):
        save_png(to_uint8(pictures[number : number + 1])[0], folder / f"{number:03}.png", {})
        (folder / f"{number:03}.txt").write_text(caption, encoding="utf-8")


def test_a_lora_teaches_a_new_colour_from_32_pictures(tmp_path):
    shown = stand_in_scenes(11, PICTURES)
    new = torch.cat([recoloured(draw([one]) / 2 + 0.5, one.ground) * 2 - 1 for one in shown])
    assert all(map(is_new_colour, behind_the_vae(new)))
    texts = [short_caption(one, n).replace(STAND_IN, NEW) for n, one in enumerate(shown)]
    write_pictures(tmp_path / NEW, new, texts)
    others = scenes(31, range(ORDINARY), (SIDE, SIDE))
    telling = [(short_caption if n % 4 else full_caption)(one, n) for n, one in enumerate(others)]
    write_pictures(tmp_path / "ordinary", draw(others), telling)
    asked = [short_caption(s, 0).replace(STAND_IN, NEW) for s in stand_in_scenes(12, 64)]
    before = painter()
    first = share([is_new_colour(one) for one in before(asked, seed=5)])
    table_before = score(before, seeds=SEEDS, per_category=32)
    outcome = train(
        run(
            tmp_path,
            run_name=NEW,
            data=(
                Source(tmp_path / NEW, repeats=192),  # every other picture
                Source(tmp_path / "ordinary", prior=True),
            ),
            prior_weight=8.0,
            steps=3400,
            batch_size=16,
            rank=32,
            learning_rate=1.3e-3,
            lr_schedule="cosine",
            posterior=False,  # this MMDiT learnt from latents without the posterior's noise
            stratified=True,
            warmup=40,
        )
    )
    after = painter(outcome.product)
    last = share([is_new_colour(one) for seed in (5, 6) for one in after(asked, seed=seed)])
    table_after = score(after, seeds=SEEDS, per_category=32)
    print(f"{NEW}: {first:.1%} -> {last:.1%}\n{table_before.text()}\n{table_after.text()}")  # noqa: T201
    lost = table_before.overall.share - table_after.overall.share
    assert first < 0.1
    assert last > 0.8
    assert lost < 0.04
    if last < 0.9 or lost > 0.02:
        pytest.xfail(f"{NEW} in {last:.1%}, {100 * lost:.1f} points lost; aims: 90 % and 2 points")


# A preference


def preferences(folder, base: Painter, count: int, seeds: int = 4) -> int:
    """Pairs of the model's own pictures, the checker's right ones before its wrong ones."""
    texts = [
        short_caption(scene, 0)
        for scene in scenes(21, range(count), (SIDE, SIDE), kinds={"count": 1.0})
    ]
    known = {text for category in prompts().values() for text in category}
    texts = [text for text in dict.fromkeys(texts) if text not in known]
    folder.mkdir()
    lines = []
    for start in range(0, len(texts), 32):
        some = texts[start : start + 32]
        drawn = [base(some, seed=1000 + seed) for seed in range(seeds)]
        verdicts = [judge_pictures(pictures, some) for pictures in drawn]
        for index, text in enumerate(some):
            right = [n for n in range(seeds) if verdicts[n][index].right]
            wrong = [n for n in range(seeds) if not verdicts[n][index].right]
            for good, bad in zip(right, wrong, strict=False):
                names = []
                for number in (good, bad):
                    name = f"{start + index:04}-{number}.png"
                    save_png(to_uint8(drawn[number][index : index + 1])[0], folder / name, {})
                    names.append(name)
                lines.append({"prompt": text, "chosen": names[0], "rejected": names[1]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "preferences.jsonl").write_text(text)
    return len(lines)


def test_dpo_on_the_checkers_verdicts_lifts_a_category(tmp_path):
    base = painter()
    before = score(base, categories=[CATEGORY])
    pairs = preferences(tmp_path / "pairs", base, count=520)
    outcome = train(
        run(
            tmp_path,
            run_name="dpo",
            method="dpo",
            data=(Source(tmp_path / "pairs"),),
            steps=500,
            batch_size=8,
            rank=32,
            learning_rate=1e-4,
            warmup=30,
            weight_decay=0.0,
            caption_dropout=0.0,
            validate_every=100,
            dpo_beta=2000.0,
            dpo_sft_weight=10.0,  # without these two the winners' error rises
            dpo_loser_scale=0.5,
        )
    )
    log = [json.loads(line) for line in (outcome.folder / "log.jsonl").open()]
    gaps = [line["validation_winner_gap"] for line in log if "validation_winner_gap" in line]
    after = score(painter(outcome.best or outcome.product), categories=[CATEGORY])
    print(f"{pairs} pairs; winner's gap {gaps}; {outcome.stopped}")  # noqa: T201
    print(f"{before.text()}\n{after.text()}")  # noqa: T201
    assert min(gaps[-2:]) <= 0  # the winners' error has not risen
    rise = after.overall.share - before.overall.share
    assert rise > -0.06
    if rise < 0.1:
        pytest.xfail(f"{CATEGORY} rose by {100 * rise:.1f} points; 10 are aimed at")
