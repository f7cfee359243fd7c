"""The one attention call of all networks; whoever builds a network may hand in another."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, heads side by side.

    q, k, v: [B, N, L, D]; mask: bool (True takes part) or additive, broadcastable to
    [B, N, Lq, Lk].  Returns [B, Lq, N * D].
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
