"""PyTorch's door for a device written in Python: the PrivateUse1 backend, registered once."""

import functools

import torch
from torch.utils import backend_registration

NAME = "pretend"  # what C++ knows the card's tensors by
DEVICE = torch.device("privateuseone", 0)


def why_not() -> str:
    """Why there can be no pretended card here, in words; empty where there can."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return f"a pretended card needs torch 2.10 or newer (this is {torch.__version__})"
    return ""


@functools.cache
def register() -> None:
    """Cannot be taken back: the process has the backend from here on, and nothing else changes."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())


class Module:
    """torch.pretend: what PyTorch asks the module of a device."""

    is_initialized = is_available = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: None)
