"""The network that is trained: loaded, made anew, with qk norm added, with less memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checkpoints.layouts import PREFIXES, Component
from ..checkpoints.load import load_mmdit
from ..checkpoints.save import save_tensors
from ..models.attention import Attention
from ..models.cast import CastOps
from ..models.mmdit import HEAD_DIM, JointBlock, MMDiT, MMDiTConfig, SelfAttention, position_table
from .batches import generator


def load_to_train(part: Component, device: torch.device) -> MMDiT:
    """The whole network in float32, whose layers compute in the dtype of their input.

    Small steps on bf16 weights would be rounded away.  Raises ValueError for scaled fp8.
    """
    check_trainable(part)
    model = load_mmdit(part, device=device, ops=CastOps())
    return model.float().requires_grad_(True)


def check_trainable(part: Component) -> None:
    """Raises ValueError for a network whose weights are scaled fp8; its header tells."""
    if any(source.scales for source in part.sources.values()):
        raise ValueError(
            f"{part.file.name}: holds scaled fp8 weights, too coarse to be trained on; take the "
            'bf16 file, or method = "lora".'
        )


def add_qk_norm(model: MMDiT) -> None:
    """Give every attention RMS norm of queries and keys, with weights of one.

    Esser et al. 2024 (arXiv:2403.03206), section 5.3.2: it may be added to a model that was trained
    without it, which then needs some training.
    """
    for module in model.modules():
        if isinstance(module, SelfAttention) and isinstance(module.ln_q, nn.Identity):
            device = module.qkv.weight.device
            norms = [CastOps.RMSNorm(HEAD_DIM, eps=1e-6, device=device) for _ in range(2)]
            module.ln_q, module.ln_k = norms
    model.config = replace(model.config, qk_norm=True)


def recompute_blocks(model: MMDiT, *, random: bool) -> None:
    """Gradient checkpointing: a joint block keeps its input only, and runs again in the backward.

    random: the blocks draw random numbers (dropout), which must come again.
    """
    for block in model.joint_blocks:
        block.__class__ = RecomputedWithDropout if random else Recomputed


class Recomputed(JointBlock):
    """A class, not a `forward` of the block's own, which would refer to the block in a circle."""

    draws = False  # whether random numbers have to come again

    def forward(
        self, x: Tensor, context: Tensor, c: Tensor, attend: Attention
    ) -> tuple[Tensor, Tensor]:
        plainly, given = super().forward, (x, context, c, attend)
        out: Any = checkpoint(plainly, *given, use_reentrant=False, preserve_rng_state=self.draws)
        return out


class RecomputedWithDropout(Recomputed):
    draws = True


def write_new_mmdit(
    path: Path, config: MMDiTConfig, *, base: int, seed: int, metadata: dict[str, str]
) -> None:
    """A network that has learnt nothing yet, as a file.  base: see position_table."""
    model = MMDiT(config)
    initialise(model, base, seed)
    tensors = {PREFIXES["mmdit"] + name: tensor for name, tensor in model.state_dict().items()}
    save_tensors(path, tensors, metadata)


@torch.no_grad()
def initialise(model: MMDiT, base: int, seed: int) -> None:
    """First weights: every block is the identity and the network says 0.

    Xavier for linear layers and the patch embedding, zero for adaLN and the last layer, as in
    DiT (Peebles and Xie 2022, arXiv:2212.09748, section 3.2, adaLN-Zero); so the first loss of the
    rectified flow is the mean of (noise - x0)^2.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            norm = name.endswith(("ln_q.weight", "ln_k.weight"))
            nn.init.constant_(parameter, 1.0 if norm else 0.0)
        elif "adaLN_modulation" in name or name.startswith("final_layer."):
            nn.init.zeros_(parameter)
        else:
            nn.init.xavier_uniform_(parameter.flatten(1), generator=generator(seed, name))
    config = model.config
    table = position_table(config.hidden_size, config.pos_embed_max_size, base)
    model.pos_embed.copy_(table)
