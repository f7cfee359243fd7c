"""The Triton kernels as machine code for real cards: Triton brings NVIDIA's assembler along."""

import pytest

pytest.importorskip("triton")

import triton
from sd3_pack.sd3_core.models import kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NORM = {
    **dict.fromkeys(("x", "gate", "delta", "shift", "scale", "gated", "out"), "*bf16"),
    **dict.fromkeys(("tokens", "width", "x_batch", "x_token"), "i32"),
    **dict.fromkeys(("gate_batch", "shift_batch", "scale_batch"), "i32"),
    "eps": "fp32",
}
HEADS = {
    **dict.fromkeys(("joint", "weights"), "*bf16"),
    **dict.fromkeys(("tokens", "texts", "heads"), "i32"),
    "eps": "fp32",
}
SHARED = {75: 64, 89: 99, 90: 227}  # KiB that a block may have


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize(
    ("kernel", "signature", "constants", "warps"),
    [
        ("_norm_modulate", NORM, {"GATED": True, "BLOCK": 4096}, 8),
        ("_norm_heads", HEADS, {"SIZE": 64, "BLOCK": 64}, 4),
    ],
)
def test_a_kernel_is_compiled_for(kernel, signature, constants, warps, architecture):
    """At SD3.5 Large's width and heads, the most that is asked of it."""
    source = ASTSource(
        getattr(kernels, kernel), {**signature, **dict.fromkeys(constants, "constexpr")}, constants
    )
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.shared <= SHARED[architecture] * 1024
