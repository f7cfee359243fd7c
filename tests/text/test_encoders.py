"""Conditioning against the recordings and transformers, and its laws on tiny networks."""

import itertools

import pytest
import torch
from build import with_recipe_weights
from sd3_pack.sd3_core.errors import CheckpointError, NumericalError
from sd3_pack.sd3_core.models.clip import CLIPConfig, CLIPTextModel
from sd3_pack.sd3_core.models.t5 import T5Config, T5Encoder
from sd3_pack.sd3_core.text.encoders import ENCODERS, TextEncoders, weigh
from sd3_pack.sd3_core.text.prompt import parse_prompt
from sd3_pack.sd3_core.text.tokenizers import clip_windows
from sd3_pack.sd3_core.text.vocabularies import Tokenizers
from tiny_tokenizers import clip_vocabulary, t5_vocabulary

WINDOW, CONTEXT, L_WIDTH, G_WIDTH = 12, 256, 64, 128
POOLED = L_WIDTH + G_WIDTH
CAT = "a photo of a cat"
LONG = "a red cat and the blue dog of the green car, a photo of the square circle"


def clip(which: str, seed: int = 1, vocabulary: int | None = None, window: int = WINDOW):
    width = L_WIDTH if which == "clip_l" else G_WIDTH
    config = CLIPConfig(
        hidden_size=width,
        num_layers=2,
        num_heads=width // 64,
        intermediate_size=96,
        vocab_size=vocabulary or len(clip_vocabulary()),
        window=window,
        activation="quick_gelu" if which == "clip_l" else "gelu",
        projection_dim=None if which == "clip_l" else G_WIDTH,
    )
    return with_recipe_weights(CLIPTextModel, config, seed)


def t5(seed: int = 3, width: int = CONTEXT):
    config = T5Config(width, 96, 32, 2, 2, vocab_size=len(t5_vocabulary()) + 18, num_buckets=32)
    return with_recipe_weights(T5Encoder, config, seed)


@pytest.fixture(scope="module")
def networks():
    return {"clip_l": clip("clip_l"), "clip_g": clip("clip_g", seed=2), "t5": t5()}


@pytest.fixture(scope="module")
def encoders(tiny_tokenizers, networks):
    return TextEncoders(tiny_tokenizers, context_dim=CONTEXT, pooled_dim=POOLED, **networks)


def assert_equal(one, other):
    torch.testing.assert_close(one.conditioning.context, other.conditioning.context)
    torch.testing.assert_close(one.conditioning.pooled, other.conditioning.pooled)


# Golden: real widths, few layers, the released vocabularies.


@pytest.fixture(scope="module")
def wide_networks():
    """768, 1280 and 4096 wide; 0.9 GB, made once for all recordings."""
    clip_l = CLIPConfig(768, 3, 12, 256, 49408, 77, "quick_gelu", None)
    clip_g = CLIPConfig(1280, 3, 20, 256, 49408, 77, "gelu", 1280)
    t5_config = T5Config(4096, 128, 64, 64, 1, vocab_size=32128, num_buckets=32)
    return {
        "clip_l": with_recipe_weights(CLIPTextModel, clip_l, seed=351),
        "clip_g": with_recipe_weights(CLIPTextModel, clip_g, seed=352),
        "t5": with_recipe_weights(T5Encoder, t5_config, seed=353),
    }


@pytest.fixture(scope="module")
def wide_encoders(released_tokenizers, wide_networks):
    return TextEncoders(released_tokenizers, context_dim=4096, pooled_dim=2048, **wide_networks)


def assert_recorded(context, pooled, expected: dict, name: str):
    """Tolerances of the recordings; the sums run over 4096 channels and reach 3000."""
    close = torch.testing.assert_close
    close(context[..., ::64], expected[f"{name}.cond_ch64"], atol=5e-5, rtol=0)
    sums = {"cond_row_sum": context, "cond_row_abs": context.abs()}
    for key, values in sums.items():
        close(values.double().sum(-1).float(), expected[f"{name}.{key}"], atol=5e-3, rtol=0)
    if pooled is not None:
        close(pooled, expected[f"{name}.pooled"], atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        *(f"sd35.{case}" for case in ("empty", "cat", "unicode")),
        *(f"comfy.{case}" for case in ("empty", "cat", "unicode", "long_l1")),
        *(f"comfy.weighted{case}" for case in ("", "_low", "_zero", "_long")),
    ],
)
def test_conditioning_equals_the_recording(golden, wide_encoders, name):
    expected, recorded = golden("cond_assembly")
    encoded = wide_encoders.encode(recorded["cases"][name.split(".")[1]]["prompt"])
    assert_recorded(encoded.conditioning.context, encoded.conditioning.pooled, expected, name)


@pytest.mark.parametrize("name", ["L", "G", "T5", "LG", "L_T5", "G_T5"])
def test_missing_encoders_equal_the_recording_with_zeros_in_their_place(
    golden, wide_encoders, name
):
    """ComfyUI leaves out the rows of what is missing; here they are there, and zero."""
    expected, recorded = golden("cond_assembly")
    case = recorded["cases"][f"comfy_only_{name}"]
    use = [e for e, letters in (("clip_l", "L"), ("clip_g", "G"), ("t5", "T5")) if letters in name]
    encoded = wide_encoders.encode(case["prompt"], use=use)
    context, pooled = encoded.conditioning.context, encoded.conditioning.pooled
    assert context.shape == (1, 154, 4096)
    start, stop = (77 if name == "T5" else 0), (154 if "T5" in name else 77)
    assert_recorded(context[:, start:stop], pooled, expected, f"comfy_only_{name}")
    assert not context[:, :start].any()
    assert not context[:, stop:].any()


# Transformers as oracle, on widths, lengths and a projection that the recordings lack.


def test_conditioning_equals_transformers(tiny_tokenizers, networks, encoders):
    transformers = pytest.importorskip("transformers")
    texts, states, pooled = {}, {}, {}
    for name in ("clip_l", "clip_g"):
        config, tokenizer = networks[name].config, getattr(tiny_tokenizers, name)
        oracle = transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                projection_dim=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                max_position_embeddings=WINDOW,
                hidden_act=config.activation,
                bos_token_id=tokenizer.start,
                eos_token_id=tokenizer.end,
            )
        ).eval()
        weights = networks[name].state_dict()
        weights.setdefault("text_projection.weight", torch.eye(config.hidden_size))
        oracle.load_state_dict(weights, strict=False)
        ids = [tokenizer.start, *tokenizer.ids(CAT), tokenizer.end]
        texts[name] = torch.tensor([ids + [tokenizer.pad] * (WINDOW - len(ids))])
        output = oracle(texts[name], output_hidden_states=True)
        states[name], pooled[name] = output.hidden_states[-2], output.text_embeds
    config = networks["t5"].config
    oracle = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_ff=config.d_ff,
            d_kv=config.d_kv,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    weights = networks["t5"].state_dict()
    oracle.load_state_dict(
        {**weights, "encoder.embed_tokens.weight": weights["shared.weight"]}, strict=False
    )
    ids = [*tiny_tokenizers.t5.ids(CAT), 1]
    states["t5"] = oracle(torch.tensor([ids + [0] * (19 - len(ids))])).last_hidden_state

    ours = encoders.encode(CAT, t5_length=19).conditioning
    side_by_side = torch.cat([states["clip_l"], states["clip_g"]], dim=-1)
    padded = torch.nn.functional.pad(side_by_side, (0, CONTEXT - POOLED))
    expected = torch.cat([padded, states["t5"]], dim=1)
    torch.testing.assert_close(ours.context, expected, atol=2e-5, rtol=0)
    both = torch.cat([pooled["clip_l"], pooled["clip_g"]], dim=-1)
    torch.testing.assert_close(ours.pooled, both, atol=2e-5, rtol=0)


# Laws.


def test_shapes_and_dtype(encoders):
    encoded = encoders.encode(CAT)
    assert encoded.conditioning.context.shape == (1, 2 * WINDOW, CONTEXT)
    assert encoded.conditioning.pooled.shape == (1, POOLED)
    assert encoded.conditioning.context.dtype == torch.float32


@pytest.mark.parametrize(
    "use", [use for count in range(4) for use in itertools.combinations(ENCODERS, count)]
)
def test_an_encoder_that_is_off_leaves_zeros_and_changes_nothing_else(encoders, use):
    everything = encoders.encode(CAT, t5_length=14).conditioning
    some = encoders.encode(CAT, t5_length=14, use=use).conditioning
    context, pooled = everything.context.clone(), everything.pooled.clone()
    if "clip_l" not in use:
        context[:, :WINDOW, :L_WIDTH] = 0
        pooled[:, :L_WIDTH] = 0
    if "clip_g" not in use:
        context[:, :WINDOW, L_WIDTH:POOLED] = 0
        pooled[:, L_WIDTH:] = 0
    if "t5" not in use:
        context[:, WINDOW:] = 0
    torch.testing.assert_close(some.context, context)
    torch.testing.assert_close(some.pooled, pooled)


@pytest.mark.parametrize("missing", ENCODERS)
def test_an_encoder_that_is_not_loaded_is_one_that_is_off(
    tiny_tokenizers, networks, encoders, missing
):
    others = {name: network for name, network in networks.items() if name != missing}
    without = TextEncoders(tiny_tokenizers, context_dim=CONTEXT, pooled_dim=POOLED, **others)
    off = encoders.encode(CAT, use=tuple(others))
    assert_equal(without.encode(CAT), off)


def test_a_weight_of_one_changes_nothing(encoders):
    assert_equal(encoders.encode(f"({CAT}:1.0)"), encoders.encode(CAT))


def test_a_weight_of_zero_is_the_empty_prompt_at_that_token(encoders):
    fog = encoders.encode("(a:0)").conditioning.context
    empty = encoders.encode("").conditioning.context
    torch.testing.assert_close(fog[:, [1, WINDOW]], empty[:, [1, WINDOW]])


def test_weights_are_linear_and_leave_the_pooled_vector_alone(encoders):
    one, two, three = (
        encoders.encode(f"a (cat:{weight}) dog").conditioning for weight in (1.0, 2.0, 3.0)
    )
    step = two.context - one.context
    torch.testing.assert_close(three.context - two.context, step, atol=1e-5, rtol=0)
    assert step[:, 2].abs().max() > 0.1  # CLIP's `cat`
    assert torch.equal(two.context[:, 1], three.context[:, 1])  # `a` has no weight
    assert torch.equal(two.pooled, three.pooled)
    torch.testing.assert_close(one.pooled, three.pooled)  # a smaller batch: not to the last bit


def test_weigh_leaves_weight_one_bit_for_bit():
    hidden, empty = torch.randn(2, 3, 4), torch.randn(1, 3, 4)
    weights = torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 0.0]])
    weighed = weigh(hidden, empty, weights)
    assert torch.equal(weighed[:, 0], hidden[:, 0])
    torch.testing.assert_close(weighed[0, 1], 2 * hidden[0, 1] - empty[0, 1])
    torch.testing.assert_close(weighed[1, 2], empty[0, 2])


def test_a_long_prompt_is_several_windows_and_pools_the_first(encoders):
    encoded = encoders.encode(LONG)
    windows = encoded.tokens["clip_windows"]
    assert windows > 1
    rows = windows * WINDOW + encoded.tokens["t5_length"]
    assert encoded.conditioning.context.shape == (1, rows, CONTEXT)
    more = encoders.encode(LONG + " (and:1.0) the red car of the dog")
    torch.testing.assert_close(more.conditioning.pooled, encoded.conditioning.pooled)


def test_windows_in_one_batch_equal_windows_on_their_own(tiny_tokenizers, networks, encoders):
    tokenizer, network = tiny_tokenizers.clip_g, networks["clip_g"]
    windows = clip_windows(tokenizer, parse_prompt(LONG), WINDOW)
    alone = [network(torch.tensor([row.ids]), tokenizer.end).hidden for row in windows]
    context = encoders.encode(LONG).conditioning.context
    rows = len(windows) * WINDOW
    torch.testing.assert_close(context[:, :rows, L_WIDTH:POOLED], torch.cat(alone, dim=1))


def test_clip_l_and_clip_g_get_the_same_number_of_windows(encoders):
    encoded = encoders.encode(CAT, prompt_clip_g=LONG)
    alone = encoders.encode(CAT)
    empty = encoders.encode("")
    context = encoded.conditioning.context
    first, second = slice(0, WINDOW), slice(WINDOW, 2 * WINDOW)
    l_part = slice(0, L_WIDTH)
    torch.testing.assert_close(
        context[:, first, l_part], alone.conditioning.context[:, first, l_part]
    )
    torch.testing.assert_close(
        context[:, second, l_part], empty.conditioning.context[:, first, l_part]
    )


def test_each_encoder_may_read_another_text(encoders):
    mixed = encoders.encode("cat", prompt_clip_g="dog", prompt_t5="car")
    cat, dog, car = (encoders.encode(word).conditioning for word in ("cat", "dog", "car"))
    context = mixed.conditioning.context
    l_part, g_part = slice(0, L_WIDTH), slice(L_WIDTH, POOLED)
    torch.testing.assert_close(context[:, :WINDOW, l_part], cat.context[:, :WINDOW, l_part])
    torch.testing.assert_close(context[:, :WINDOW, g_part], dog.context[:, :WINDOW, g_part])
    torch.testing.assert_close(context[:, WINDOW:], car.context[:, WINDOW:])
    torch.testing.assert_close(mixed.conditioning.pooled[:, l_part], cat.pooled[:, l_part])
    torch.testing.assert_close(mixed.conditioning.pooled[:, g_part], dog.pooled[:, g_part])


def test_an_empty_text_for_one_encoder_is_not_the_common_prompt(encoders):
    mixed = encoders.encode(CAT, prompt_t5="").conditioning.context
    torch.testing.assert_close(
        mixed[:, WINDOW:], encoders.encode("").conditioning.context[:, WINDOW:]
    )


@pytest.mark.parametrize("length", [1, 8, 12, 30])
def test_t5_length_is_a_minimum(encoders, length):
    encoded = encoders.encode(CAT, t5_length=length)
    assert encoded.tokens["t5"] == 5
    assert encoded.tokens["t5_length"] == max(length, 6)
    assert encoded.conditioning.context.shape[1] == WINDOW + max(length, 6)


def test_t5_length_auto_is_the_clip_window(encoders):
    assert_equal(encoders.encode(CAT), encoders.encode(CAT, t5_length=WINDOW))


def test_tokens_count_the_words_each_encoder_saw(encoders):
    encoded = encoders.encode(CAT, prompt_t5=LONG, use=("clip_l", "t5"))
    assert encoded.tokens["clip_l"] == 5
    assert encoded.tokens["clip_g"] == 0
    assert encoded.tokens["t5"] > WINDOW
    assert encoded.tokens["clip_windows"] == 1
    assert encoded.tokens["t5_length"] == encoded.tokens["t5"] + 1


def test_nothing_to_say_about_a_short_prompt(encoders):
    assert encoders.encode(CAT).notes == ()


def test_notes_tell_what_is_off_and_what_is_not_loaded(tiny_tokenizers, networks):
    encoders = TextEncoders(
        tiny_tokenizers, context_dim=CONTEXT, pooled_dim=POOLED, clip_l=networks["clip_l"]
    )
    assert encoders.encode(CAT).notes == (
        "CLIP-G is not loaded: zeros stand in its place.",
        "T5 is not loaded: zeros stand in its place.",
    )
    off = encoders.encode(CAT, use=()).notes
    assert off[0] == "CLIP-L is off: zeros stand in its place."
    assert off[-1] == "No encoder is on: this is the picture of no prompt."


def test_notes_tell_of_long_prompts(encoders):
    notes = " ".join(encoders.encode(LONG).notes)
    assert f"in 3 windows of {WINDOW}; its pooled vector comes from the first." in notes
    assert f"its part grew from {WINDOW} to" in notes


def test_notes_tell_of_unknown_characters_and_embeddings(encoders):
    notes = encoders.encode("embedding:mine 猫").notes
    assert "T5 does not know 1 of the" in " ".join(notes)
    assert sum("`embedding:` as plain words" in note for note in notes) == 3


def test_a_network_is_loaded_when_needed_and_once(tiny_tokenizers, networks):
    opened = []

    def load():
        opened.append("t5")
        return networks["t5"]

    encoders = TextEncoders(
        tiny_tokenizers,
        context_dim=CONTEXT,
        pooled_dim=POOLED,
        clip_l=networks["clip_l"],
        t5=load,
    )
    encoders.encode(CAT, use=("clip_l",))
    assert opened == []
    encoders.encode(CAT)
    encoders.encode(LONG)
    assert opened == ["t5"]


def test_window_is_given_where_no_clip_is_there_to_tell(tiny_tokenizers, networks):
    encoders = TextEncoders(
        tiny_tokenizers, context_dim=CONTEXT, pooled_dim=POOLED, t5=networks["t5"], window=20
    )
    encoded = encoders.encode(CAT)
    assert encoded.conditioning.context.shape == (1, 40, CONTEXT)
    assert not encoded.conditioning.context[:, :20].any()


def test_half_precision_networks_give_float32(tiny_tokenizers):
    halves = {"clip_l": clip("clip_l").bfloat16(), "t5": t5().bfloat16()}
    encoders = TextEncoders(tiny_tokenizers, context_dim=CONTEXT, pooled_dim=POOLED, **halves)
    encoded = encoders.encode("a (cat:1.2)")
    assert encoded.conditioning.context.dtype == torch.float32
    assert encoded.conditioning.pooled.dtype == torch.float32


def test_result_carries_no_gradient(tiny_tokenizers):
    trainable = clip("clip_l").requires_grad_(True)
    encoders = TextEncoders(
        tiny_tokenizers, context_dim=CONTEXT, pooled_dim=POOLED, clip_l=trainable
    )
    assert not encoders.encode(CAT).conditioning.context.requires_grad


# Errors.


@pytest.mark.parametrize(("name", "title"), [("clip_g", "CLIP-G"), ("t5", "T5")])
def test_nan_names_the_encoder(tiny_tokenizers, name, title):
    network = clip("clip_g") if name == "clip_g" else t5()
    next(p for p in network.parameters() if p.ndim == 1).fill_(float("nan"))
    encoders = TextEncoders(
        tiny_tokenizers, context_dim=CONTEXT, pooled_dim=POOLED, **{name: network}
    )
    with pytest.raises(NumericalError, match=f"{title} gave NaN or infinity in float32"):
        encoders.encode(CAT)


def test_nan_in_the_last_layer_reaches_only_the_pooled_vector_and_is_seen(tiny_tokenizers):
    network = clip("clip_l")
    network.text_model.final_layer_norm.weight.fill_(float("inf"))
    encoders = TextEncoders(tiny_tokenizers, context_dim=CONTEXT, pooled_dim=POOLED, clip_l=network)
    with pytest.raises(NumericalError, match="CLIP-L"):
        encoders.encode(CAT)


def test_infinite_weight_is_refused(encoders):
    with pytest.raises(ValueError, match="weight inf of 'cat': expected a finite number"):
        encoders.encode("a (cat:inf)")


@pytest.mark.parametrize("length", [0, -1, 2.5, True, "long"])
def test_bad_t5_length_is_refused(encoders, length):
    with pytest.raises(ValueError, match="expected 'auto' or a whole number from 1"):
        encoders.encode(CAT, t5_length=length)


@pytest.mark.parametrize("use", [("clip", "t5"), "t5"])
def test_unknown_encoder_is_refused(encoders, use):
    with pytest.raises(ValueError, match="expected a tuple of some of clip_l, clip_g, t5"):
        encoders.encode(CAT, use=use)


def test_vocabulary_larger_than_the_embedding_is_refused(tiny_tokenizers):
    small = clip("clip_l", vocabulary=100)
    with pytest.raises(CheckpointError, match="CLIP-L: the tokenizer has 5.. entries.*only 100"):
        TextEncoders(tiny_tokenizers, context_dim=CONTEXT, pooled_dim=POOLED, clip_l=small)


def test_network_without_tokenizer_is_refused(networks):
    with pytest.raises(CheckpointError, match="T5 has no tokenizer"):
        TextEncoders(Tokenizers(), context_dim=CONTEXT, pooled_dim=POOLED, t5=networks["t5"])


@pytest.mark.parametrize(
    ("context_dim", "pooled_dim"), [(CONTEXT, POOLED + 1), (CONTEXT, 100), (512, POOLED)]
)
def test_encoders_of_another_model_are_refused(tiny_tokenizers, networks, context_dim, pooled_dim):
    with pytest.raises(CheckpointError, match="do not fit the MMDiT: CLIP is 192 wide"):
        TextEncoders(
            tiny_tokenizers, context_dim=context_dim, pooled_dim=pooled_dim, **networks
        ).encode(CAT)


def test_clips_of_different_windows_stand_side_by_side_as_far_as_the_shorter_goes(
    tiny_tokenizers, networks
):
    """As in ComfyUI, where Long-CLIP's first rows stand beside CLIP-G's."""
    long = clip("clip_l", window=3 * WINDOW)
    given = {"context_dim": CONTEXT, "pooled_dim": POOLED}
    both = TextEncoders(tiny_tokenizers, clip_l=long, clip_g=networks["clip_g"], **given)
    alone = TextEncoders(tiny_tokenizers, clip_l=long, **given)
    beside = TextEncoders(tiny_tokenizers, clip_g=networks["clip_g"], **given)
    for prompt in (CAT, LONG):
        encoded, left, right = (some.encode(prompt) for some in (both, alone, beside))
        rows = encoded.tokens["clip_windows"] * WINDOW
        context = encoded.conditioning.context
        assert context.shape[1] == rows + WINDOW
        shown = min(rows, left.tokens["clip_windows"] * 3 * WINDOW)
        torch.testing.assert_close(
            context[:, :shown, :L_WIDTH], left.conditioning.context[:, :shown, :L_WIDTH]
        )
        torch.testing.assert_close(
            context[:, :rows, L_WIDTH:], right.conditioning.context[:, :rows, L_WIDTH:]
        )
    assert f"(CLIP-L {3 * WINDOW} and CLIP-G {WINDOW} tokens)" in encoded.notes[1]


def test_a_long_clip_alone_does_not_lengthen_t5(tiny_tokenizers, networks):
    encoders = TextEncoders(
        tiny_tokenizers,
        context_dim=CONTEXT,
        pooled_dim=POOLED,
        clip_l=clip("clip_l", window=248),
        t5=networks["t5"],
    )
    for use in (("clip_l", "t5"), ("t5",)):
        encoded = encoders.encode(CAT, use=use)
        assert encoded.tokens["t5_length"] == 77
        assert encoded.conditioning.context.shape[1] == 248 + 77
