"""What a run will take: the estimate against what the backward pass really keeps."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from sd3_pack.sd3_core import lora
from sd3_pack.sd3_core.bench.training import DIFFUSERS_LAYERS
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from sd3_pack.sd3_core.training.config import TrainConfig
from sd3_pack.sd3_core.training.networks import initialise, recompute_blocks
from sd3_pack.sd3_core.training.plan import (
    GIB,
    Estimate,
    check_fits,
    estimate_memory,
    kept_per_token,
)

SIZE = MMDiTConfig(depth=5, context_dim=64, pooled_dim=32, pos_embed_max_size=32, qk_norm=True)
TEXT, SIDE = 20, 16  # tokens, latent pixels
CONFIG = TrainConfig(run_name="plan")


def bytes_kept(model: MMDiT) -> int:
    """What autograd holds after a forward pass, apart from the parameters."""
    inputs = (torch.tensor([500.0]), torch.randn(1, TEXT, 64), torch.randn(1, 32))
    return bytes_saved(lambda: model(torch.randn(1, 16, SIDE, SIDE), *inputs), model.parameters())


def bytes_saved(
    forward: Callable[[], torch.Tensor], parameters: Iterable[torch.nn.Parameter]
) -> int:
    """What autograd holds after this, each storage once, apart from the parameters."""
    kept: dict[int, torch.Tensor] = {}
    known = {p.untyped_storage().data_ptr() for p in parameters}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert out.requires_grad
    return total


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("dual", [(), (0, 1, 2)])
def test_the_estimate_of_activations_is_what_the_backward_pass_keeps(method, dual):
    model = MMDiT(replace(SIZE, dual_attention_layers=dual))
    initialise(model, 16, seed=0)
    if method == "lora":
        lora.add(model, rank=2)
    tokens = (SIDE // 2) ** 2 + TEXT
    kept = kept_per_token(model.config, replace(CONFIG, method=method))
    estimate = kept * tokens * model.config.hidden_size * 4
    assert bytes_kept(model) == pytest.approx(estimate, rel=0.05)


def test_a_lora_keeps_no_more_for_the_backward_pass_than_that_of_diffusers():
    """Measured: the same to the byte; 15.3 numbers per token, channel and block."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle of this test")
    peft = pytest.importorskip("peft", reason="diffusers needs peft to train a LoRA")
    size = replace(SIZE, qk_norm=False)
    model = MMDiT(size)
    initialise(model, 16, seed=0)
    adapters = lora.add(model, rank=4)
    x, context = torch.randn(1, 16, SIDE, SIDE), torch.randn(1, TEXT, 64)
    timestep, pooled = torch.tensor([500.0]), torch.randn(1, 32)
    ours = bytes_saved(
        lambda: model(x, timestep, context, pooled), [*model.parameters(), *adapters.parameters()]
    )
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=SIDE,
        num_layers=size.depth,
        num_attention_heads=size.depth,
        joint_attention_dim=64,
        caption_projection_dim=size.hidden_size,
        pooled_projection_dim=32,
        pos_embed_max_size=32,
    )
    theirs.fuse_qkv_projections()
    theirs.requires_grad_(False)
    layers = [
        f"transformer_blocks.{block}.{layer}"
        for block in range(size.depth)
        for layer in DIFFUSERS_LAYERS.values()
    ]
    present = [name for name, _ in theirs.named_modules() if name in layers]
    theirs.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=present))
    their_bytes = bytes_saved(
        lambda: theirs(x, context, pooled, timestep, return_dict=False)[0], theirs.parameters()
    )
    assert sum(p.numel() for p in adapters.parameters()) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )
    assert ours <= 1.01 * their_bytes


def test_recomputed_blocks_keep_their_inputs_only():
    model = MMDiT(SIZE)
    initialise(model, 16, seed=0)
    lora.add(model, rank=2)
    whole = bytes_kept(model)
    recompute_blocks(model, random=False)
    assert bytes_kept(model) < 0.1 * whole


def test_the_training_state_is_counted_by_optimiser():
    with torch.device("meta"):
        model = MMDiT(SIZE)
    count = sum(parameter.numel() for parameter in model.parameters())
    adamw, adafactor, muon = (
        estimate_memory(
            model,
            dict(model.named_parameters()),
            replace(CONFIG, method="full", optimizer=optimizer),
            tokens=100,
            dtype=torch.float32,
        )
        for optimizer in ("adamw", "adafactor", "muon")
    )
    assert adamw.trained == 12 * count  # gradient and two moments, float32
    assert adafactor.trained < 5 * count
    assert 8 * count < muon.trained < 12 * count  # one moment for the blocks, two for the rest
    assert adamw.weights == 4 * (count + model.pos_embed.numel())


def test_what_does_not_fit_is_refused_with_what_may_help():
    estimate = Estimate(weights=4 * GIB, trained=1 * GIB, activations=9 * GIB)
    config = replace(CONFIG, batch_size=4)
    check_fits(estimate, loaded=4 * GIB, free=11.0 * GIB, config=config)
    with pytest.raises(ValueError, match="needs about 10.0 GiB more memory and 8.0 GiB are free"):
        check_fits(estimate, loaded=4 * GIB, free=8.0 * GIB, config=config)
    check_fits(estimate, loaded=0, free=None, config=config)
