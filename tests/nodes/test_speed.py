"""SD3 Memory Plan: it says what happened."""

import json

import pytest
import torch
from sd3_pack.nodes.errors import NodeError
from sd3_pack.nodes.speed import SD3MemoryPlan

import nodes


def plan(model, *arguments):
    out = SD3MemoryPlan.execute(model, *(arguments or (4, 1024, 1024)))
    (report,) = out.ui["sd3_report"]
    json.dumps(report)
    return out.args[0], report


def test_the_plan_counts_what_a_run_did(our_model, conditioning):
    our_model.model.diffusion_model.tabled = None
    before, report = plan(our_model)
    assert (report["rows_held"], report["calls"], report["passes"]) == (0, 0, 0)
    assert 0.3 < report["modulation_mib"] / report["weights_mib"] < 0.9
    latent = {"samples": torch.zeros(1, 16, 16, 12)}
    arguments = ("euler", "normal", conditioning(1), conditioning(2), latent)
    nodes.common_ksampler(our_model, 5, 4, 3.0, *arguments)
    after, report = plan(our_model)
    assert (report["rows_held"], report["calls"], report["passes"]) == (8, 4, 1)
    assert "8 rows held. So far 4 calls of the network took 1 passes" in after
    table = our_model.model.diffusion_model.tabled.network.table
    assert report["table_mib"] == round(table.values.nbytes / 2**20)


def test_the_plan_says_where_no_table_acts(our_model, their_model):
    text, report = plan(their_model)
    assert "anew in every step: it was not loaded by SD3 Workbench" in text
    assert report["table_mib"] is None
    swapped = our_model.clone()
    swapped.add_object_patch("diffusion_model.joint_blocks.0", torch.nn.Identity())
    assert "anew in every step: a node exchanges its layers" in plan(swapped)[0]


def test_the_plan_tells_large_pictures_and_known_prompts(our_model, monkeypatch, tmp_path):
    text, _ = plan(our_model, 4, 512, 512)
    assert "Decoding 512 x 512: whole." in text
    assert "Prompt cache: off." in text
    monkeypatch.setenv("SD3_WORKBENCH_PROMPT_CACHE", str(tmp_path))
    text, report = plan(our_model)
    assert report["decode_mib"] > 500
    assert "Prompt cache: 0 prompts on disk." in text


def test_another_kind_of_model_is_refused(our_model):
    class Other:
        model = torch.nn.Identity()

    with pytest.raises(NodeError, match="not Stable Diffusion 3"):
        plan(Other())
