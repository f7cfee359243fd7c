"""Ways of starting the blocks: the same velocity, nothing shared that the next step overwrites."""

import pytest
import torch
from build import recipe_tensor, with_recipe_weights
from sd3_pack.sd3_core.conditioning import Conditioning
from sd3_pack.sd3_core.guidance import SkipLayers, classifier_free
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from sd3_pack.sd3_core.noise import noise
from sd3_pack.sd3_core.samplers import euler
from sd3_pack.sd3_core.schedule import Schedule
from sd3_pack.sd3_core.speed import launch
from sd3_pack.sd3_core.speed.modulation import PreparedMMDiT
from torch.testing import assert_close

CONFIG = MMDiTConfig(
    depth=4,
    context_dim=32,
    pooled_dim=16,
    pos_embed_max_size=8,
    qk_norm=True,
    dual_attention_layers=(0,),
)
SIGMAS = Schedule(3.0).sigmas(4)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GUIDANCE = {"cfg": {}, "skip-layer": {"skip": SkipLayers((1, 2), 2.5)}}


def prepared() -> PreparedMMDiT:
    model = with_recipe_weights(MMDiT, CONFIG, 7)
    return PreparedMMDiT(model, Schedule.timestep(SIGMAS[:-1]), "cpu", torch.float32)


def prompt(name: str, length: int = 6) -> Conditioning:
    return Conditioning(
        recipe_tensor(f"{name}.context", (1, length, CONFIG.context_dim), 1),
        recipe_tensor(f"{name}.pooled", (1, CONFIG.pooled_dim), 1),
    )


def drawn(network: PreparedMMDiT, mode=torch.inference_mode, length: int = 6, **guidance):
    with mode():
        given = [network.prepare(prompt(name, length)) for name in "ab"]
        velocity = classifier_free(network, *given, 4.5, **guidance)
        return euler(velocity, noise((1, 16, 6, 8), 3), SIGMAS)


class Replayed:
    """In the place of a CUDA graph: what it computes goes to the same memory every time."""

    def __init__(self):
        self.recorded = self.refilled = 0

    def __call__(self, run):
        out = run()
        self.recorded += 1

        def refill() -> None:
            self.refilled += 1
            fresh = run()
            for place, tensor in ((out.x, fresh.x), (out.context, fresh.context)):
                place.copy_(tensor)

        return out, refill


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
def test_a_graph_gives_the_same_latents(mode, guidance):
    network, capture = prepared(), Replayed()
    plain = drawn(network, **guidance)
    network.starter = launch.Graphs(capture)
    assert torch.equal(drawn(network, mode, **guidance), plain)
    assert capture.recorded == (3 if guidance else 1)
    assert capture.refilled == capture.recorded * (len(SIGMAS) - 1)


def test_every_shape_has_its_graph_and_only_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(launch, "MOST_GRAPHS", 2)
    network, capture = prepared(), Replayed()
    network.starter = graphs = launch.Graphs(capture)
    for length, recorded in ((6, 1), (7, 2), (6, 2), (8, 3), (6, 4)):
        drawn(network, length=length)
        assert capture.recorded == recorded
        assert len(graphs.recorded) <= 2


def test_with_gradients_no_graph_runs():
    network, capture = prepared(), Replayed()
    network.starter = launch.Graphs(capture)
    drawn(network, torch.enable_grad)
    assert capture.recorded == 0


@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
def test_compiled_blocks_give_the_same_latents(guidance):
    plain, network = drawn(prepared(), **guidance), prepared()
    torch._dynamo.reset()
    launch.launch(network, "compile", CPU, backend="eager")
    assert_close(drawn(network, **guidance), plain, atol=1e-4, rtol=0)


def test_blocks_of_one_kind_are_compiled_once():
    """Dual, plain and last."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    network = prepared()
    launch.launch(network, "compile", CPU, backend=backend)
    drawn(network)
    assert len(seen) == 3


@pytest.mark.long
def test_inductor_gives_the_same_latents():
    plain, network = drawn(prepared()), prepared()
    torch._dynamo.reset()
    launch.launch(network, "compile", CPU)
    assert_close(drawn(network), plain, atol=1e-4, rtol=0)


def test_the_original_network_is_not_compiled():
    network = prepared()
    launch.launch(network, "compile", CPU, backend="eager")
    original = network.table.model.joint_blocks
    assert all(block._compiled_call_impl is None for block in original)


@pytest.mark.parametrize("way", ["graph", "compile"])
def test_hooks_and_offloaded_weights_are_refused(way):
    network = prepared()
    assert not launch.obstacle(network, CPU)
    with pytest.raises(ValueError, match=r"x_embedder\S* is offloaded to cpu, and carried over"):
        launch.launch(network, way, CUDA)
    network.joint_blocks[2].get_submodule("x_block.attn.qkv").register_forward_hook(lambda *_: None)
    reason = "joint_blocks.2.x_block.attn.qkv has a hook, such as an attached LoRA's"
    with pytest.raises(ValueError, match=reason):
        launch.launch(network, way, CUDA)


@pytest.mark.parametrize(
    ("way", "device", "reason"),
    [
        ("fast", CPU, "launch is 'fast'; choose one of plain, graph, compile"),
        ("graph", CPU, "CUDA graphs are not for cpu"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(way, device, reason):
    with pytest.raises(ValueError, match=reason):
        launch.check(way, device)
    with pytest.raises(ValueError, match=reason):
        launch.launch(prepared(), way, device)
