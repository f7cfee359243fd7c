"""Seeded weights for the golden recordings: a float32 parameter follows from its key alone."""

import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

EMBEDDINGS = (
    "token_embedding.weight",
    "position_embedding.weight",
    "shared.weight",
    "embed_tokens.weight",
)


def normal(name: str, shape, seed: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + 2**32 * int(seed)))
    return generator.standard_normal(tuple(int(s) for s in shape), dtype=np.float32)


def weight(name: str, shape, seed: int) -> np.ndarray:
    """The recipe's float32 value of the state-dict key `name`."""
    shape = tuple(int(s) for s in shape)
    if name == "encoder.embed_tokens.weight":  # T5: tied to shared.weight
        name = "shared.weight"
    n = normal(name, shape, seed)
    f = np.float32
    if len(shape) == 1:
        if name.endswith((".ln_q.weight", ".ln_k.weight")):
            return f(1.0) + f(0.3) * n
        if name.endswith(".weight"):
            return f(1.0) + f(0.1) * n
        if "adaLN_modulation" in name:
            return f(0.3) * n
        return f(0.02) * n
    if name.endswith("relative_attention_bias.weight"):
        return f(0.5) * n
    if name.endswith(EMBEDDINGS):
        return f(0.5) * n
    fan_in = int(np.prod(shape[1:]))
    if name.endswith(".SelfAttention.q.weight"):  # T5 has no 1/sqrt(d_kv): keep the logits O(1)
        return n * f(0.25 / math.sqrt(fan_in))
    return n * f(1.0 / math.sqrt(fan_in))


def recipe_state_dict(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """All parameters of a model with these keys and shapes."""
    return {name: torch.from_numpy(weight(name, shape, seed)) for name, shape in shapes.items()}
