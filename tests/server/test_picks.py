"""From pictures to a taste on a real server: picked over HTTP, taught by DPO, compared blindly."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from api_workflows import node, text_to_image
from comfy_server import Refused, reports

PROMPT = "two red circles on a white background"
ADDRESS = "/sd3_workbench/picks/{}"


def drawing(pick_name: str, seed: int):
    """Four pictures for the backlog."""
    workflow = text_to_image(prompt=PROMPT, steps=2, seed=seed, batch_size=4)
    workflow["pick"] = node(
        "SD3Pick",
        images=["decode", 0],
        pick_name=pick_name,
        prompt=PROMPT,
        seed=seed,
        model=["load", 0],
    )
    return workflow


def teaching(pick_name: str, run_name: str):
    """DPO on the picks, and the checker's comparison of the model before and after."""
    workflow = text_to_image(prompt=PROMPT, steps=2, seed=9, batch_size=2)
    workflow["pairs"] = node(
        "SD3Preferences", clip=["load", 1], vae=["load", 2], folder=f"sd3_picks/{pick_name}"
    )
    workflow["teach"] = node(
        "SD3TrainDPO",
        model=["load", 0],
        dataset=["pairs", 0],
        run_name=run_name,
        steps=2,
        learning_rate=0.01,
        rank=2,
        batch_size=2,
        resolution=64,
        seed=0,
        accumulation=1,
        warmup=0,
        validate_every=2,
        gradient_checkpointing=False,
        more="sample_steps = 2",
    )
    after = {**workflow["sample"]["inputs"], "model": ["teach", 0]}
    workflow["after"] = node("SD3Sample", **after)
    workflow["decoded"] = node("SD3VAEDecode", samples=["after", 0], vae=["load", 2])
    workflow["compare"] = node(
        "SD3Pick",
        images=["decode", 0],
        images_b=["decoded", 0],
        pick_name=f"{pick_name}-compared",
        prompt=PROMPT,
        label_a="before",
        label_b="after",
        model=["load", 0],
        model_b=["teach", 0],
        judge="checker",
    )
    return workflow


def test_picks_over_http_teach_a_taste_that_is_compared(server):
    for seed in (1, 2):
        assert reports(server.run(drawing("taste", seed)))["pick"]["added"] == 1
    seen = server.request(ADDRESS.format("taste"))
    assert (seen["open"], seen["decided"]) == (2, 0)
    vote = {"group": seen["group"]["id"], "best": seen["group"]["pictures"][0]}

    def cast(_):
        try:
            server.request(ADDRESS.format("taste"), vote)
        except Refused as refused:
            return refused.status
        return 200

    with ThreadPoolExecutor(16) as crowd:  # the same click from everywhere at once counts once
        answers = sorted(crowd.map(cast, range(64)))
    assert answers == [200] + [409] * 63
    seen = server.request(ADDRESS.format("taste"))
    assert (seen["open"], seen["decided"]) == (1, 1)
    shown = seen["group"]["pictures"]
    server.request(
        ADDRESS.format("taste"), {"group": seen["group"]["id"], "best": shown[1], "worst": shown[2]}
    )
    told = reports(server.run(teaching("taste", "taste")))
    assert told["pairs"]["pairs"] == 3 + 5
    assert told["teach"]["steps"] == 2
    assert told["teach"]["preference"]["step"] == 2
    assert told["compare"]["added"] == 2
    compared = told["compare"]["comparison"]
    assert sum(compared["wins"]) + compared["ties"] == 2
    (line, *_) = (
        (server.folder / "output/sd3_picks/taste-compared/preferences.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    assert " + taste" in line  # the LoRA that is on one of the two


@pytest.mark.parametrize(
    "name", ["..", "..%2f..%2fetc", "%2fetc%2fpasswd", "C%3a%5cwindows", "mine%00", ".hidden"]
)
@pytest.mark.parametrize("prefix", ["", "/api"])
def test_a_name_that_leads_elsewhere_is_refused_behind_comfyuis_own_server(server, prefix, name):
    for body in (None, {"undo": True}):
        with pytest.raises(Refused) as refused:
            server.request(prefix + ADDRESS.format(name), body)
        assert refused.value.status in (400, 404, 405)
