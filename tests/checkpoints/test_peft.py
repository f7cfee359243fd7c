"""PEFT's adapters at PEFT's strength: what we merge is what PEFT merges, wherever it saved."""

import json
import re
import warnings

import pytest
import torch
from build import with_recipe_weights
from peft_models import CONVOLUTION, TARGETS, base_model, merged, save_with_header, trained
from safetensors.torch import load_file, save_file
from sd3_pack.sd3_core import lora
from sd3_pack.sd3_core.checkpoints.diffusers import to_diffusers
from sd3_pack.sd3_core.checkpoints.lora_files import read_lora, save_lora
from sd3_pack.sd3_core.errors import CheckpointError
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig

diffusers = pytest.importorskip("diffusers", reason="diffusers makes the model that PEFT adapts")
peft = pytest.importorskip("peft", reason="PEFT is the oracle of these tests")

SMALL = MMDiTConfig(
    depth=2,
    context_dim=24,
    pooled_dim=16,
    pos_embed_max_size=8,
    qk_norm=True,
    dual_attention_layers=(0,),
)
BOTH = [*TARGETS, CONVOLUTION]
PATTERNS = {
    "rank_pattern": {"attn.to_q": 2, r"^transformer_blocks\.1\.attn.*to_k": 3, "proj_out": 1},
    "alpha_pattern": {"to_v": 3, r"blocks\.\d+\.attn2\.to_out\.0": 32, "ff.net.0.proj": 1},
}
KINDS = {
    "LoRA": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=BOTH),
    "as published for Flow-GRPO and NFT": lambda: peft.LoraConfig(
        r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=BOTH
    ),
    "rsLoRA": lambda: peft.LoraConfig(r=16, lora_alpha=8, use_rslora=True, target_modules=BOTH),
    "patterns": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=BOTH, **PATTERNS),
    "rsLoRA with patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=BOTH, **PATTERNS
    ),
    "LoRA with bias": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, lora_bias=True, target_modules=TARGETS
    ),
    "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=BOTH),
    "DoRA with patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, use_dora=True, use_rslora=True, target_modules=BOTH, **PATTERNS
    ),
    "LoHa": lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=BOTH, **PATTERNS),
    "LoHa with cores": lambda: peft.LoHaConfig(
        r=4, alpha=8, use_effective_conv2d=True, target_modules=BOTH
    ),
    "LoKr": lambda: peft.LoKrConfig(r=4, alpha=8, target_modules=BOTH, **PATTERNS),
    "LoKr in two factors": lambda: peft.LoKrConfig(
        r=2, alpha=8, decompose_both=True, target_modules=BOTH
    ),
    "LoKr with a core": lambda: peft.LoKrConfig(
        r=4, alpha=8, use_effective_conv2d=True, target_modules=BOTH
    ),
    "LoKr in whole factors": lambda: peft.LoKrConfig(r=64, alpha=8, target_modules=BOTH),
}


@pytest.fixture(scope="module")
def base():
    return base_model(diffusers, with_recipe_weights(MMDiT, SMALL, seed=3))


def ours(adapters, strength=1.0):
    """The weights that we merge, by diffusers' names."""
    model = with_recipe_weights(MMDiT, SMALL, seed=3)
    lora.merge(model, adapters, strength)
    return to_diffusers("mmdit", model.state_dict())


def assert_same(found, expected, base):
    before = base.state_dict()
    changed = [key for key, value in expected.items() if not torch.equal(value, before[key])]
    assert len(changed) > 20
    for key in before:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=2e-6, msg=key)


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="peft")
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_peft_merges_as_peft_merges_it(tmp_path, base, kind, quiet):
    made = trained(peft, base, KINDS[kind]())
    made.save_pretrained(tmp_path)
    expected = merged(made)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        file = read_lora(path)
        assert file.report.unmatched == ()
        assert_same(ours(file.parts["mmdit"]), expected, base)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_in_the_header_act_as_those_beside_the_file(tmp_path, base, kind, quiet):
    made = trained(peft, base, KINDS[kind]())
    save_with_header(made, tmp_path / "pytorch_lora_weights.safetensors")
    assert_same(ours(read_lora(tmp_path).parts["mmdit"]), merged(made), base)


def test_diffusers_own_file_acts_as_diffusers_loads_it(tmp_path, base, quiet):
    from diffusers import StableDiffusion3Pipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    made = trained(peft, base, KINDS["patterns"]())
    inner = made.get_base_model()
    inner.peft_config = made.peft_config
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers={
            key.removeprefix("base_model.model."): value
            for key, value in get_peft_model_state_dict(made).items()
        },
        **_collate_lora_metadata({"transformer": inner}),
    )
    assert_same(ours(read_lora(tmp_path).parts["mmdit"]), merged(made), base)


def test_a_lora_put_on_by_diffusers_and_saved_from_the_model_keeps_its_strength(tmp_path, base):
    import copy

    model = copy.deepcopy(base)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=12, target_modules=["to_q"]))
    for key, value in model.named_parameters():
        if "lora_" in key:
            value.data.copy_(0.1 * torch.randn(value.shape))
    model.save_lora_adapter(tmp_path)  # bare names, settings in the header without prefix
    model.fuse_lora()
    (query, *_) = [a for a in read_lora(tmp_path).parts["mmdit"] if a.rows == (0, 128)]
    assert query.change.scale == 3.0


@pytest.fixture(scope="module", params=["LoRA", "DoRA", "LoHa", "LoKr in whole factors"])
def learnt(request, base):
    """An adapter named style: its settings, its tensors as in training, the merged model."""
    made = trained(peft, base, KINDS[request.param](), "style")
    tensors = {
        key.removeprefix("base_model.model."): value.detach().clone()
        for key, value in made.state_dict().items()
        if ".style" in key
    }
    assert any(re.search(r"\.(lora_A|hada_w1_a|lokr_w1)\.style", key) for key in tensors)
    return made.peft_config["style"], tensors, merged(made)


@pytest.mark.parametrize(
    "wrapped",
    [
        "{}",
        "_orig_mod.{}",
        "module.{}",
        "module._orig_mod.{}",
        "transformer.base_model.model.{}",
        "transformer._orig_mod.{}",
        "base_model.model.{}",
        "base_model.model._orig_mod.{}",
        "_orig_mod.base_model.model.module.{}",
        "diffusion_model.base_model.model.{}",
        "_fsdp_wrapped_module.{}",
    ],
)
def test_wrapped_names_with_any_adapters_name_are_read(tmp_path, base, learnt, wrapped, quiet):
    config, tensors, expected = learnt
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({wrapped.format(key): value for key, value in tensors.items()}, path)
    file = read_lora(tmp_path)
    assert file.report.unmatched == ()
    assert_same(ours(file.parts["mmdit"]), expected, base)


def test_wrappers_inside_a_path_are_read_too(tmp_path, base, quiet):
    made = trained(peft, base, KINDS["patterns"]())
    made.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {
        re.sub(r"(transformer_blocks\.\d+\.)", r"\1_checkpoint_wrapped_module.", key): value
        for key, value in load_file(path).items()
    }
    save_file(tensors, path)
    assert_same(ours(read_lora(path).parts["mmdit"]), merged(made), base)


# Where the settings are


@pytest.fixture
def folder(tmp_path, base):
    trained(peft, base, KINDS["LoRA"]()).save_pretrained(tmp_path)
    return tmp_path


def scales(path):
    return {adapter.change.scale for adapter in read_lora(path).parts["mmdit"]}


def test_a_renamed_file_keeps_its_settings_and_others_do_not_take_them(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    path.rename(folder / "style.safetensors")
    assert scales(folder / "style.safetensors") == {2.0}
    bare = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    save_file(bare, folder / "other.safetensors")  # of the same rank, by another program
    assert scales(folder / "other.safetensors") == {1.0}
    (folder / "style.safetensors").unlink()
    assert scales(folder / "other.safetensors") == {2.0}  # now the folder's only one


def test_a_files_own_alpha_wins(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    names = {key.partition(".lora_")[0] for key in tensors}
    save_file(tensors | {f"{name}.alpha": torch.tensor(1.0) for name in names}, path)
    assert scales(path) == {0.25}


def test_a_folder_finds_its_lora_wherever_peft_puts_it(tmp_path, base):
    made = trained(peft, base, KINDS["LoRA"](), "style")
    made.save_pretrained(tmp_path)
    assert (tmp_path / "style" / "adapter_model.safetensors").is_file()
    assert scales(tmp_path) == {2.0}


def test_a_folder_without_one_lora_says_what_it_holds(tmp_path):
    with pytest.raises(CheckpointError, match=r"is a folder.*it holds nothing\)\. Name a"):
        read_lora(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"holds a\.safetensors, b\.safetensors\)"):
        read_lora(tmp_path)


def test_pefts_file_without_its_settings_says_that_its_strength_is_unknown(folder):
    (folder / "adapter_config.json").unlink()
    with pytest.warns(UserWarning, match="keeps the strength in adapter_config.json"):
        assert scales(folder) == {1.0}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"r": 8}, "say rank 8 for .*, its tensors have 4"),
        ({"rank_pattern": {"to_q": 2}}, "say rank 2 for .*to_q, its tensors have 4"),
        ({"r": "4"}, "r is '4'; a whole number"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": None}, "lora_alpha is None; a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"alpha_pattern": ["to_q"]}, "alpha_pattern is .* a table"),
        ({"alpha_pattern": {"to_(q": 1}}, "no pattern"),
        ({"alpha_pattern": {"(a+)+": 1}}, "too complicated"),
        ({"alpha_pattern": {".*" * 30: 1}}, "too complicated"),
        ({"alpha_pattern": {"to_q": "much"}}, "'to_q'.*is 'much'"),
    ],
)
def test_settings_that_cannot_be_meant_are_said_and_not_used(folder, change, fault):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.warns(UserWarning, match=f"adapter_config.json beside it cannot be used.*{fault}"):
        assert scales(folder) == {1.0}


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, "{}", "\udc80"])
def test_settings_that_are_none_are_said(folder, text):
    (folder / "adapter_config.json").write_text(text, errors="surrogateescape")
    with pytest.warns(UserWarning, match="cannot be used"):
        assert scales(folder) == {1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "VERA"}, "uses 'VERA' by adapter_config.json"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'.*own weights.*plain LoRA"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ],
)
def test_what_peft_computes_otherwise_is_refused(folder, change, message):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        read_lora(folder)


def test_two_adapters_in_one_file_are_refused(folder):
    path = folder / "adapter_model.safetensors"
    tensors = {
        key.replace(".weight", f".{name}.weight"): value.clone()
        for key, value in load_file(path).items()
        for name in ("one", "two")
    }
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"2 adapters side by side \(one, two\)"):
        read_lora(path)


def test_adalora_is_refused(folder):
    path = folder / "adapter_model.safetensors"
    name = "base_model.model.transformer_blocks.0.attn.to_q"
    save_file(load_file(path) | {f"{name}.lora_E": torch.ones(4, 1)}, path)
    with pytest.raises(CheckpointError, match="uses AdaLoRA"):
        read_lora(path)


def test_pefts_dora_is_not_written_as_another_kind(folder, base):
    trained(peft, base, KINDS["DoRA"]()).save_pretrained(folder)
    parts = read_lora(folder).parts
    for dialect in ("comfy", "kohya", "diffusers"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_lora(folder / "again.safetensors", parts, dialect)
