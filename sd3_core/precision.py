"""Which device, and which number format, so that no card draws a black picture.

float16 ends at 65504.  Activations of SD3.5's blocks, of T5's feed-forward and of the VAE pass
that limit and turn into infinities, then NaN, then black.  bfloat16 has float32's range at half the
size, so it is the choice wherever the hardware computes in it; elsewhere float32 is.
"""

import platform

import torch
from torch import Tensor

from .errors import NumericalError, quoted

# Of the CLIPs, on every device: in bfloat16 their states err by 0.5 %, and they are small.
CLIP_DTYPE = torch.float32
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(wanted: str = "auto") -> torch.device:
    """The named device, or the fastest there is.  Raises ValueError when it is not there."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device).item()
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # torch's own words differ per back end
        raise ValueError(
            f"device {quoted(wanted)} cannot be used here ({error}). Try 'cpu'."
        ) from error
    return device


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of the MMDiT.  wanted: auto, bf16, fp16 or fp32."""
    if wanted == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    if wanted not in DTYPES:
        raise ValueError(f"dtype is {quoted(wanted)}; choose auto, {', '.join(DTYPES)}.")
    return DTYPES[wanted]


def wide_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of T5 and the VAE beside an MMDiT in `dtype`: never float16."""
    if dtype != torch.float16:
        return dtype
    return torch.bfloat16 if computes_bf16(device) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """As `pick_dtype` takes it."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def processor_name(device: torch.device) -> str:
    """Which processor computes; results differ in the last bits between models."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


# AMD's GPUs that accept bfloat16 and emulate it: GCN, Vega, RDNA, RDNA 2 (as LLVM names targets).
EMULATED_BY = (
    "gfx8",
    "gfx900",
    "gfx902",
    "gfx904",
    "gfx906",
    "gfx909",
    "gfx90c",
    "gfx101",
    "gfx103",
)


def computes_bf16(device: torch.device) -> bool:
    """Whether a GPU has instructions for bfloat16."""
    if device.type != "cuda":
        return False
    if torch.version.hip is not None:  # where the capability is but the number of the target
        target: str = torch.cuda.get_device_properties(device).gcnArchName
        return not target.startswith(EMULATED_BY)
    # Before Ampere (8.0) CUDA accepts bfloat16 and emulates it, far slower than float32.
    return torch.cuda.get_device_capability(device) >= (8, 0)


def check_finite(tensor: Tensor, stage: str, dtype: torch.dtype) -> Tensor:
    """The tensor itself.  Raises NumericalError naming the stage when it holds NaN or infinity."""
    if not tensor.isfinite().all():
        name = str(dtype).removeprefix("torch.")
        advice = {
            torch.float16: "Compute in bf16 or fp32 (--dtype).",
            torch.bfloat16: "Compute in fp32 (--dtype), or take a smaller number if one is extreme "
            "(cfg, shift, a weight in the prompt).",
        }.get(
            dtype,
            "A number is extreme (cfg, shift, a weight in the prompt, a LoRA's strength), or the "
            "weights are damaged.",
        )
        raise NumericalError(f"{stage} gave NaN or infinity in {name}. {advice}")
    return tensor
