"""Our CLIP in ComfyUI's text nodes, beside ComfyUI's own network on the same weights."""

import functools

import comfy.clip_model
import comfy.lora
import comfy.sd
import comfy.text_encoders.sd3_clip
import comfy.utils
import pytest
import torch
from comfy_call import call
from comfy_extras.nodes_sd3 import CLIPTextEncodeSD3
from released_widths import prefixed
from sd3_pack.nodes.comfy_text import MODULES
from sd3_pack.nodes.errors import NodeError
from sd3_pack.nodes.files import EMBEDDED
from sd3_pack.nodes.loaders import SD3LoadCheckpoint, load_clip
from sd3_pack.nodes.text import SD3EncodePrompt
from sd3_pack.sd3_core.checkpoints.layouts import find_components
from sd3_pack.sd3_core.checkpoints.load import component_of, load_t5, read_config
from sd3_pack.sd3_core.checkpoints.load import load_clip as load_core_clip
from sd3_pack.sd3_core.generate import encode_prompts
from sd3_pack.sd3_core.settings import Files, Settings, make_plan
from sd3_pack.sd3_core.text.encoders import TextEncoders
from sd3_pack.sd3_core.text.vocabularies import Tokenizers
from tiny import tokenizer_tensors
from tiny_tokenizers import clip_vocabulary

import nodes

ENCODERS = ("clip_l", "clip_g", "t5")
TOLERANCE = {"atol": 5e-5, "rtol": 0}  # golden README: conditioning
PROMPT = "a red (circle:1.3) on a blue square"


def clip_of(file, kinds=ENCODERS):
    parts = find_components(file)
    return load_clip({kind: parts[kind] for kind in kinds}, "auto")


@pytest.fixture(scope="module")
def our_clip(wide):
    with torch.inference_mode():
        return clip_of(wide)


def their_clip(wide, ours, kinds=ENCODERS, long=None):
    """ComfyUI's SD3 text encoders with the same weights, behind our tokenizer's tiny vocabulary."""
    sizes = {
        "clip_l_model_config": {"num_hidden_layers": 3, "intermediate_size": 64},
        "clip_g_model_config": {"num_hidden_layers": 3, "intermediate_size": 64},
        "t5xxl_model_config": {
            "num_layers": 2,
            "d_ff": 64,
            "num_heads": 2,
            "vocab_size": read_config(find_components(wide)["t5"]).vocab_size,
        },
    }
    if long is not None:
        sizes["clip_l_model_config"]["max_position_embeddings"] = 248
    make = comfy.text_encoders.sd3_clip.sd3_clip(
        **{kind: kind in kinds for kind in ENCODERS}, dtype_t5=torch.float32
    )

    class Target:
        params = {}
        clip = functools.partial(make)
        tokenizer = staticmethod(lambda embedding_directory, tokenizer_data: ours.tokenizer)

    clip = comfy.sd.CLIP(Target, model_options={**sizes, "dtype": torch.float32})
    state = comfy.utils.load_torch_file(str(wide))
    state = {k.removeprefix("text_encoders."): v for k, v in state.items()}
    if long is not None:
        state = {k: v for k, v in state.items() if not k.startswith("clip_l.")}
        longer = comfy.utils.load_torch_file(str(long))
        state |= {k.removeprefix("text_encoders."): v for k, v in longer.items()}
    missing, _ = clip.cond_stage_model.load_state_dict(state, strict=False)
    assert all("logit_scale" in m or "clip_l.transformer.text_projection" in m for m in missing)
    for name in ("clip_l", "clip_g"):  # the numbers of the released vocabulary, hard-coded there
        if name in kinds:
            our_encoder = getattr(ours.cond_stage_model, name)
            getattr(clip.cond_stage_model, name).special_tokens = our_encoder.special_tokens
    return clip


@pytest.fixture(scope="module")
def native(wide, our_clip):
    """native(kinds) -> ComfyUI's CLIP of these encoders."""
    small = functools.partial(comfy.clip_model.CLIPEmbeddings, vocab_size=len(clip_vocabulary()))
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(comfy.clip_model, "CLIPEmbeddings", small)
        yield functools.lru_cache(functools.partial(their_clip, wide, our_clip))


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for (context, extra), (their_context, their_extra) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(context, their_context, **TOLERANCE)
        torch.testing.assert_close(
            extra["pooled_output"], their_extra["pooled_output"], **TOLERANCE
        )


@pytest.mark.parametrize("prompt", [PROMPT, "", "red circle " * 60, "(red:0) [a] \\(b\\)"])
def test_clip_text_encode_gives_what_the_native_encoders_give(our_clip, native, prompt):
    ours = nodes.CLIPTextEncode().encode(our_clip, prompt)[0]
    same(ours, nodes.CLIPTextEncode().encode(native(), prompt)[0])


@pytest.mark.parametrize("kinds", [("clip_l",), ("clip_g",), ("t5",), ("clip_l", "t5")])
def test_missing_encoders_are_left_out_as_natively(wide, native, kinds):
    ours = nodes.CLIPTextEncode().encode(clip_of(wide, kinds), PROMPT)[0]
    same(ours, nodes.CLIPTextEncode().encode(native(kinds), PROMPT)[0])


@pytest.mark.parametrize("padding", ["none", "empty_prompt"])
@pytest.mark.parametrize("texts", [("a", "red " * 90, "circle"), ("", "", "red"), ("a", "", "")])
def test_clip_text_encode_sd3_gives_what_the_native_encoders_give(our_clip, native, texts, padding):
    ours = call(CLIPTextEncodeSD3, our_clip, *texts, padding)[0]
    same(ours, call(CLIPTextEncodeSD3, native(), *texts, padding)[0])


@pytest.mark.parametrize("layer", [-1, -2, -3, -5])
def test_clip_set_last_layer_acts_as_natively(our_clip, native, layer):
    def encode(clip):
        (cut,) = nodes.CLIPSetLastLayer().set_last_layer(clip, layer)
        return nodes.CLIPTextEncode().encode(cut, PROMPT)[0]

    same(encode(our_clip), encode(native()))


def test_an_embedding_takes_its_words_place(models, our_clip, native):
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    vectors = {
        "clip_l": torch.randn(2, 768, generator=generator),
        "clip_g": torch.randn(2, 1280, generator=generator),
    }
    save_file(vectors, models / "embeddings" / "mine.safetensors")
    ours = nodes.CLIPTextEncode().encode(our_clip, "a embedding:mine circle")[0]
    same(ours, nodes.CLIPTextEncode().encode(native(), "a embedding:mine circle")[0])
    plain = nodes.CLIPTextEncode().encode(our_clip, "a circle")[0]
    assert (ours[0][0] - plain[0][0]).abs().max() > 1e-2


@pytest.mark.parametrize("make", ["ours", "theirs"])
def test_an_embedding_that_not_every_encoder_reads_is_told(models, our_clip, native, make):
    """And counted where it is read alone."""
    from safetensors.torch import save_file

    folder = models / "embeddings"
    save_file({"clip_g": torch.ones(3, 1280)}, folder / "only_g.safetensors")
    save_file({"emb_params": torch.ones(2, 1024)}, folder / "other.safetensors")
    (folder / "broken.safetensors").write_bytes(b"none")
    clip = our_clip if make == "ours" else native()

    def told(prompt):
        (report,) = SD3EncodePrompt.execute(clip, prompt, "").ui["sd3_report"]
        counts = report["positive"]["tokens"]
        return report["positive"]["notes"], [counts[kind] for kind in ENCODERS]

    assert told("a circle") == ([], [2, 2, 2])
    notes, counts = told("a embedding:only_g, circle")
    assert notes == [
        "embedding:only_g has no vectors for CLIP-L and T5, which read the prompt without it."
    ]
    comma = [count - 2 for count in told("a , circle")[1]]
    assert counts == [2 + comma[0], 5 + comma[1], 2 + comma[2]]
    notes, counts = told("a (embedding:gone:1.2) circle")
    assert len(notes) == 1
    assert notes[0].startswith("embedding:gone is not in models/embeddings")
    assert counts == [2, 2, 2]
    notes, counts = told("a embedding:other circle")
    assert len(notes) == 1
    assert "vectors 1024 wide, which no encoder here takes" in notes[0]
    assert counts == [2, 2, 2]
    assert told("embedding:broken")[0][0].startswith("embedding:broken is not in models/embeddings")


@pytest.fixture(scope="module")
def long_file(wide):
    """A Long-CLIP of CLIP-L's width."""
    from dataclasses import replace

    from released_widths import RELEASED_WIDTHS
    from safetensors.torch import save_file

    network_class, config = RELEASED_WIDTHS["clip_l"]
    path = wide.parent.parent / "text_encoders" / "clip_l_long.safetensors"
    state = prefixed("clip_l", network_class, replace(config, window=248))
    save_file(state | tokenizer_tensors(wide.parent.parent / "tokenizers"), path)
    yield path
    path.unlink()


@pytest.mark.parametrize("kinds", [("clip_l", "clip_g", "t5"), ("clip_l", "t5"), ("clip_l",)])
@pytest.mark.parametrize("words", [3, 100, 400])
def test_a_long_clip_is_read_as_in_comfyui(wide, long_file, our_clip, native, kinds, words):
    """Beside CLIP-G its first rows count; alone all do, and T5 stays as long as it was."""
    found = find_components(wide)
    parts = {"clip_l": component_of(long_file, "clip_l")}
    parts |= {kind: found[kind] for kind in kinds if kind != "clip_l"}
    clip = load_clip(parts, "auto")
    prompt = "red " * words
    ours = nodes.CLIPTextEncode().encode(clip, prompt)[0]
    theirs = long_native(wide, long_file, clip, kinds)
    same(ours, nodes.CLIPTextEncode().encode(theirs, prompt)[0])
    out = SD3EncodePrompt.execute(clip, prompt, "")
    (told,) = out.ui["sd3_report"]
    differ = [note for note in told["positive"]["notes"] if "windows of the CLIPs differ" in note]
    assert len(differ) == ("clip_g" in kinds)
    if "t5" in kinds:
        assert told["positive"]["tokens"]["t5_length"] == max(77, words + 1)
    context = out.args[0][0][0]
    expected = core_encoder(parts, clip).encode(prompt).conditioning.context
    if "t5" not in kinds:  # the zeros in its place: the node's are as many as its tokens would be
        expected = expected[:, :-77]
        context = context[:, : expected.shape[1]]
    torch.testing.assert_close(context, expected, **TOLERANCE)


def core_encoder(parts, clip):
    """The command line's encoders of the same files."""
    load = {kind: (lambda kind=kind: load_core_clip(parts[kind], kind)) for kind in parts}
    if "t5" in parts:
        load["t5"] = lambda: load_t5(parts["t5"])
    own = {kind: getattr(clip.tokenizer, MODULES[kind]).tokenizer.tokenizer for kind in ENCODERS}
    return TextEncoders(Tokenizers(**own), context_dim=4096, pooled_dim=2048, **load)


def long_native(wide, long_file, ours, kinds):
    small = functools.partial(comfy.clip_model.CLIPEmbeddings, vocab_size=len(clip_vocabulary()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.clip_model, "CLIPEmbeddings", small)
        return their_clip(wide, ours, kinds, long_file)


def test_text_lora_keys_are_those_of_the_native_encoders(our_clip, native):
    ours = comfy.lora.model_lora_keys_clip(our_clip.cond_stage_model, {})
    theirs = comfy.lora.model_lora_keys_clip(native().cond_stage_model, {})
    unused = "clip_l.transformer.text_projection.weight"  # SD3 does not project CLIP-L
    assert ours == {key: name for key, name in theirs.items() if name != unused}


def test_a_patch_on_the_clip_acts_and_leaves_the_base_alone(our_clip):
    before = nodes.CLIPTextEncode().encode(our_clip, PROMPT)[0][0][0]
    changed = our_clip.clone()
    name = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    weight = our_clip.cond_stage_model.state_dict()[name]
    changed.add_patches({name: ("diff", (torch.ones_like(weight),))}, 1.0)
    after = nodes.CLIPTextEncode().encode(changed, PROMPT)[0][0][0]
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(nodes.CLIPTextEncode().encode(our_clip, PROMPT)[0][0][0], before)


# SD3EncodePrompt


def test_words_that_the_built_in_model_does_not_know_are_named(models):
    clip = SD3LoadCheckpoint.execute(EMBEDDED).args[1]
    for prompt, known in (("a red zebra", False), ("a red circle", True)):
        (told,) = SD3EncodePrompt.execute(clip, prompt, "").ui["sd3_report"]
        said = " ".join(told["notes"])
        assert ('"zebra": outside' in said) is not known
        assert ("It knows" in said) is not known


@pytest.mark.parametrize(
    "use", [ENCODERS, ("clip_l", "t5"), ("clip_g", "t5"), ("clip_l", "clip_g"), ("t5",), ()]
)
def test_encode_prompt_is_the_cores_encoding(tiny, tiny_three, use):
    settings = Settings(PROMPT, "square", use=use, width=64, height=64, steps=2, device="cpu")
    files = Files(checkpoint=tiny)
    positive, negative = encode_prompts(files, make_plan(files, settings))
    switches = [kind in use for kind in ENCODERS]
    out = SD3EncodePrompt.execute(tiny_three[1], PROMPT, "square", "", "", *switches)
    for ours, core in zip(out.args, (positive, negative), strict=True):
        torch.testing.assert_close(ours[0][0], core.conditioning.context, **TOLERANCE)
        pooled = ours[0][1]["pooled_output"]
        torch.testing.assert_close(pooled, core.conditioning.pooled, **TOLERANCE)


def test_each_encoder_may_read_its_own_text_at_any_length(tiny, tiny_three):
    settings = Settings(
        "a red circle",
        prompt_clip_g="blue",
        prompt_t5="green square " * 9,
        t5_length=40,
        width=64,
        height=64,
        steps=2,
        device="cpu",
    )
    files = Files(checkpoint=tiny)
    core, _ = encode_prompts(files, make_plan(files, settings))
    out = SD3EncodePrompt.execute(
        tiny_three[1], "a red circle", "", "blue", "green square " * 9, True, True, True, 40
    )
    torch.testing.assert_close(out.args[0][0][0], core.conditioning.context, **TOLERANCE)
    (told,) = out.ui["sd3_report"]
    assert told["positive"]["tokens"] == core.tokens


@pytest.mark.parametrize("use", [ENCODERS, ("clip_l", "t5"), ("t5",), ("clip_l", "clip_g"), ()])
def test_encode_prompt_takes_the_native_clip(our_clip, native, use):
    switches = [kind in use for kind in ENCODERS]
    ours = SD3EncodePrompt.execute(our_clip, PROMPT, "blue", "", "", *switches)
    theirs = SD3EncodePrompt.execute(native(), PROMPT, "blue", "", "", *switches)
    for mine, their in zip(ours.args, theirs.args, strict=True):
        same(mine, their)


@pytest.mark.parametrize("kinds", [("clip_l",), ("clip_g",), ("t5",)])
def test_missing_encoders_leave_zeros_of_normal_length(wide, native, kinds):
    for clip in (clip_of(wide, kinds), native(kinds)):
        out = SD3EncodePrompt.execute(clip, PROMPT, "")
        context, extra = out.args[0][0]
        assert context.shape == (1, 154, 4096)
        assert extra["pooled_output"].shape == (1, 2048)
        assert (context[:, 77:].abs().sum() == 0) == ("t5" not in kinds)
        assert (context[:, :77, :768].abs().sum() == 0) == ("clip_l" not in kinds)
        (told,) = out.ui["sd3_report"]
        assert sum("not loaded" in note for note in told["notes"]) == 2


def test_the_report_counts_tokens_and_names_files(our_clip):
    (told,) = SD3EncodePrompt.execute(our_clip, "a red circle", "").ui["sd3_report"]
    assert told["positive"]["tokens"] == {
        "clip_l": 3,
        "clip_g": 3,
        "t5": 3,
        "clip_windows": 1,
        "t5_length": 77,
    }
    assert told["files"]["t5"]["file"] == "wide.safetensors"


def test_a_checkpoint_without_encoders_is_named_at_the_socket():
    with pytest.raises(NodeError, match=r"^SD3:missing_encoder: no CLIP arrived"):
        SD3EncodePrompt.execute(None, "a", "")


def test_another_models_clip_is_refused():
    class Other:
        cond_stage_model = torch.nn.Linear(1, 1)

    with pytest.raises(NodeError, match=r"^SD3:wrong_encoders: this CLIP is a Linear"):
        SD3EncodePrompt.execute(Other(), "a", "")


# The prompt cache


@pytest.fixture
def encodings(monkeypatch, tmp_path):
    """How often a network encoded, with a cache in an empty folder."""
    from sd3_pack.nodes import text

    monkeypatch.setenv("SD3_WORKBENCH_PROMPT_CACHE", str(tmp_path / "prompts"))
    calls = []
    encode = text.encode

    def counted(clip, words, use):
        calls.append(use)
        return encode(clip, words, use)

    monkeypatch.setattr(text, "encode", counted)
    return calls


def test_a_known_prompt_reads_no_encoder(tiny_three, encodings):
    first = SD3EncodePrompt.execute(tiny_three[1], PROMPT, "square")
    again = SD3EncodePrompt.execute(tiny_three[1], PROMPT, "square")
    assert len(encodings) == 2
    for one, other in zip(first.args, again.args, strict=True):
        assert torch.equal(one[0][0], other[0][0])
        assert one[0][1].keys() == other[0][1].keys() == {"pooled_output"}
        assert torch.equal(one[0][1]["pooled_output"], other[0][1]["pooled_output"])
    (report,) = again.ui["sd3_report"]
    assert report["positive"]["known"]
    (report,) = first.ui["sd3_report"]
    assert not report["positive"]["known"]


@pytest.mark.parametrize(
    "change", [("a dog", "square"), (PROMPT, "square", "dog"), (PROMPT, "square", "", "", False)]
)
def test_another_prompt_or_encoder_is_encoded(tiny_three, encodings, change):
    SD3EncodePrompt.execute(tiny_three[1], PROMPT, "square")
    encodings.clear()
    SD3EncodePrompt.execute(tiny_three[1], *change)
    assert encodings


def test_a_changed_clip_is_neither_looked_up_nor_kept(our_clip, models, encodings):
    name = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    weight = our_clip.cond_stage_model.state_dict()[name]
    patched, skipped = our_clip.clone(), our_clip.clone()
    patched.add_patches({name: ("diff", (torch.ones_like(weight),))}, 1.0)
    skipped.clip_layer(-1)
    SD3EncodePrompt.execute(our_clip, PROMPT, "square")
    for clip in (patched, skipped):
        encodings.clear()
        SD3EncodePrompt.execute(clip, PROMPT, "square")
        SD3EncodePrompt.execute(clip, PROMPT, "square")
        assert len(encodings) == 4


def test_a_prompt_with_an_embedding_is_not_kept(our_clip, models, encodings):
    vector = torch.randn(1, our_clip.cond_stage_model.clip_l.transformer.config.hidden_size)
    comfy.utils.save_torch_file({"clip_l": vector}, str(models / "embeddings" / "kept.safetensors"))
    for _ in range(2):
        SD3EncodePrompt.execute(our_clip, "a embedding:kept circle", "square")
    assert len(encodings) == 3
