"""The blocks' fast ways against their plain ones: equal, and nothing that is given is changed."""

import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from build import recipe_tensor, with_recipe_weights
from sd3_pack.sd3_core.models import fused, gpu, onednn
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from sd3_pack.sd3_core.models.onednn import Ops
from torch import nn
from torch.testing import assert_close

PACK = Path(__file__).parent.parent.parent
CUDA = torch.device("cuda")
CONFIG = MMDiTConfig(
    depth=3,
    context_dim=32,
    pooled_dim=16,
    pos_embed_max_size=8,
    qk_norm=True,
    dual_attention_layers=(0,),
)
CONFIGS = {"qk-norm, dual": CONFIG, "plain": MMDiTConfig(3, 2, 16, 32, 16, 8)}

# Run with Triton's interpreter, which must be chosen before Triton is imported.
INTERPRETED = """
import sys
sys.path.insert(0, ".")
import torch
from sd3_core.models import fused
from sd3_core.models.mmdit import MMDiT, MMDiTConfig

print(fused.largest_difference("cpu"))
torch.manual_seed(0)
plainly = fused.serves
for dtype in (torch.float32, torch.bfloat16):
    model = MMDiT(MMDiTConfig(3, 2, 16, 32, 16, 8, True, (0,))).requires_grad_(False)
    for tensor in (*model.parameters(), model.pos_embed):
        tensor.normal_(0.0, 0.2)
    model = model.to(dtype)
    shapes = ((2, 16, 6, 8), (2, 5, 32), (2, 16))
    x, context, pooled = (torch.randn(shape).to(dtype) for shape in shapes)
    outputs = []
    for serves in (plainly, lambda norm, x: not isinstance(norm, torch.nn.Identity)):
        fused.serves = serves
        with torch.no_grad():
            outputs.append(model(x, torch.full((2,), 500.0), context, pooled).float())
    plain, fast = outputs
    assert not torch.equal(plain, fast)
    print(float((fast - plain).abs().max() / plain.abs().max()))
"""


def given(batch: int = 2):
    shapes = {"x": (batch, 16, 6, 8), "context": (batch, 5, 32), "pooled": (batch, 16)}
    made = {name: recipe_tensor(name, shape, 1) for name, shape in shapes.items()}
    return made | {"timestep": torch.linspace(900, 300, batch)}


def block_inputs(batch: int = 2):
    shapes = ((batch, 12, 192), (batch, 5, 192), (batch, 192))
    return [recipe_tensor(str(shape), shape, 2) for shape in shapes]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("ops", [nn, Ops])
def test_without_gradients_the_velocity_is_the_same(config, ops):
    model = with_recipe_weights(MMDiT, config, 7, ops)
    with torch.enable_grad():
        plain = model(**given())
    with torch.no_grad():
        assert_close(model(**given()), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_products_written_to_their_places_are_the_same(monkeypatch, config, batch):
    model = with_recipe_weights(MMDiT, config, 7)
    with torch.no_grad():
        plain = model(**given(batch))
        monkeypatch.setattr(fused, "writes_itself", lambda layer, x: True)
        assert_close(model(**given(batch)), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_block_changes_nothing_that_it_is_given(monkeypatch, mode):
    monkeypatch.setattr(fused, "writes_itself", lambda layer, x: True)
    model = with_recipe_weights(MMDiT, CONFIG, 7)
    tensors = block_inputs()
    kept = [tensor.clone() for tensor in tensors]
    with mode():
        for block in model.joint_blocks:
            block(*tensors, model.attention)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


def test_gradients_go_through_every_part():
    model = with_recipe_weights(MMDiT, CONFIG, 7).requires_grad_(True)
    model(**given()).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without


@pytest.mark.parametrize("where", ["qkv", "norm1"])
def test_a_hook_is_called(where):
    model, seen = with_recipe_weights(MMDiT, CONFIG, 7), []
    part = model.joint_blocks[1].x_block.get_submodule({"qkv": "attn.qkv"}.get(where, where))
    part.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(**given())
    assert seen == [1]
    assert fused.hooked(part)


def test_the_kernels_give_what_the_plain_ways_give():
    pytest.importorskip("triton")
    answer = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        cwd=PACK,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    kernels, single, half = map(float, answer.stdout.split())
    assert kernels < 1e-5
    assert single < 1e-5
    assert half < 0.05


def test_only_plain_linear_layers_are_given_a_place():
    x = torch.zeros(1, 2, 4)
    assert not fused.writes_itself(nn.Linear(4, 4), x)  # on a CPU nothing is gained

    class There:
        device, dtype = CUDA, torch.float32

    class Layer(nn.Linear):
        pass

    assert not fused.writes_itself(Layer(4, 4), There())
    assert not fused.writes_itself(nn.Linear(4, 4), There())  # its weights are elsewhere
    lending = Layer(4, 4)
    lending.lend = there_lent
    assert fused.writes_itself(lending, There())
    lending.register_forward_hook(lambda *_: None)
    assert not fused.writes_itself(lending, There())


def there_lent(layer, x):
    return nullcontext((layer.weight * 2, layer.bias))


@torch.no_grad()
def test_weights_that_are_lent_are_those_that_count(monkeypatch):
    """A layer of another program's, whose weights are not what it computes with."""
    monkeypatch.setattr(fused, "writes_itself", fused.lends)
    x, out = torch.randn(2, 3, 4), torch.empty(2, 3, 8)
    layer, norm = nn.Linear(4, 8), nn.RMSNorm(4)
    fused.write_linear(layer, x, out)
    assert_close(out, layer(x))
    layer.lend = norm.lend = there_lent
    fused.write_linear(layer, x, out)
    assert_close(out, x @ layer.weight.t() * 2 + layer.bias)
    norm.bias = None
    assert torch.equal(fused.own_weight(norm, x), norm.weight * 2)


def test_a_layer_of_torchs_lends_where_its_weights_lie_right():
    x = torch.zeros(1)
    assert fused.lends(nn.RMSNorm(64), x)
    assert not fused.lends(nn.RMSNorm(64, dtype=torch.bfloat16), x)
    assert not fused.lends(nn.RMSNorm(64, device="meta"), x)
    assert not fused.lends(nn.LayerNorm(64), x)


def test_kernels_are_for_cuda_without_gradients_and_hooks(monkeypatch):
    class There:
        device, dtype = CUDA, torch.float32

    monkeypatch.setattr(fused, "why_not", lambda device: "")
    norm = nn.LayerNorm(4, elementwise_affine=False)
    assert not fused.serves(norm, There())  # gradients are on
    with torch.no_grad():
        assert fused.serves(norm, There())
        heads = nn.RMSNorm(64, eps=1e-6)
        assert not fused.serves(heads, There())  # its weight is on the CPU
        heads.lend = there_lent
        assert fused.serves(heads, There())
        assert not fused.serves(nn.LayerNorm(4), There())  # it has weights
        assert not fused.serves(nn.Identity(), There())
        norm.register_forward_hook(lambda *_: None)
        assert not fused.serves(norm, There())


def test_why_the_kernels_do_not_run_is_said(monkeypatch):
    why_not = fused.why_not.__wrapped__
    assert why_not(torch.device("cpu")) == "they are for CUDA"
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert why_not(CUDA) == "Triton is not installed"
    monkeypatch.setattr(fused, "find_spec", lambda name: name)
    monkeypatch.setattr(fused, "largest_difference", lambda device: 0.5)
    assert why_not(CUDA) == "they differ from the plain way by 0.5 here"
    monkeypatch.setattr(fused, "largest_difference", lambda device: 1 / 0)
    assert why_not(CUDA) == "Triton fails here (ZeroDivisionError: division by zero)"
    monkeypatch.setattr(fused, "largest_difference", lambda device: 1e-6)
    assert why_not(CUDA) == ""
    monkeypatch.setenv(fused.NO_TRITON, "1")
    assert why_not(CUDA) == f"{fused.NO_TRITON} is set"


def test_kernels_start_on_the_gpu_of_their_tensors(monkeypatch):
    """Triton starts on the current GPU, whatever the tensors say."""
    pytest.importorskip("triton")
    kernels, inside, started = fused.kernels(), [], []

    @contextmanager
    def current(device):
        inside.append(device)
        yield
        inside.pop()

    class Door:
        def __getitem__(self, grid):
            return lambda *_, **options: started.append((list(inside), options["num_warps"]))

    monkeypatch.setattr(kernels, "current", current)
    for name in ("_norm_modulate", "_norm_heads"):
        monkeypatch.setattr(kernels, name, Door())
    x, one = torch.zeros(1, 2, 1024), torch.zeros(1, 1, 1024)
    kernels.norm_modulate(x, one, one, 1e-6)
    kernels.gate_norm_modulate(x, one, x, one, one, 1e-6)
    for heads in (24, 38):  # SD3 Medium, SD3.5 Large: a program of twice the size
        kernels.norm_heads(torch.zeros(1, 2, 3, heads, 64), torch.zeros(2, 2, 64), 1, 1e-6)
    assert started == [([x.device], warps) for warps in (4, 4, 4, 8)]


def test_only_a_gpu_is_made_the_current_one():
    chosen = gpu.current(torch.device("cuda", 1))
    assert isinstance(chosen, torch.cuda.device)
    assert chosen.idx == 1
    with gpu.current(torch.device("cpu")):
        pass


def test_a_product_with_gelu_inside_serves_only_where_it_is_the_same_gelu(monkeypatch):
    """On a CPU torch's takes the other one, with the error function."""
    tried, cpu = fused.multiplies_with_gelu.__wrapped__, torch.device("cpu")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    assert not any(tried(cpu, dtype) for dtype in dtypes)

    def inside(bias, x, weight):
        product = torch.addmm(bias.float(), x.float(), weight.float())
        return nn.functional.gelu(product, approximate="tanh").to(x.dtype)

    def missing(*_):
        raise NotImplementedError("not for this device")

    monkeypatch.setattr(fused, "product_gelu", inside)
    assert all(tried(cpu, dtype) for dtype in dtypes)
    monkeypatch.setattr(fused, "product_gelu", missing)
    assert not tried(cpu, torch.float32)


def test_on_a_card_products_take_gelu_and_their_places_inside(monkeypatch):
    """As on CUDA, but for the device: the numbers are those of the plain ways."""
    model = with_recipe_weights(MMDiT, CONFIG, 7, ops=Ops)
    with torch.no_grad():
        plain = model(**given())
        bare = fused.writes_itself
        layers = []

        def writes(layer, x):
            layers.append(layer)
            return type(layer) is onednn.Linear and not fused.hooked(layer)

        def product(bias, x, weight):
            assert x.ndim == 2
            return nn.functional.gelu(torch.addmm(bias, x, weight), approximate="tanh")

        monkeypatch.setattr(fused, "writes_itself", writes)
        monkeypatch.setattr(fused, "product_gelu", product)
        fused.multiplies_with_gelu.cache_clear()
        assert_close(model(**given()), plain, atol=1e-5, rtol=0)
        names = {name.rpartition(".")[2] for name, m in model.named_modules() if m in layers}
        assert names == {"qkv", "proj", "fc1"}
    fused.multiplies_with_gelu.cache_clear()
    assert not bare(model.joint_blocks[0].x_block.mlp.fc1, given()["context"])
