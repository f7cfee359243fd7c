"""What a user reads when something is wrong: a stable code first, then what it is and what to do.

Programs that drive ComfyUI may compare the code, `SD3:missing_encoder`; the sentence may change.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from ..sd3_core.errors import CheckpointError, NumericalError

CODES = (
    "missing_file",
    "bad_file",
    "missing_encoder",
    "missing_part",
    "wrong_model",
    "wrong_encoders",
    "wrong_latent",
    "wrong_lora",
    "bad_setting",
    "run_refused",
    "not_finite",
)


class NodeError(ValueError):
    """Begins with `SD3:<code>: `."""

    def __init__(self, code: str, message: str):
        super().__init__(f"SD3:{code}: {message}")


@contextmanager
def coded(code: str) -> Iterator[None]:
    """Give the core's errors their code; an interruption and a full memory pass unchanged."""
    try:
        yield
    except NodeError:
        raise
    except CheckpointError as error:
        raise NodeError("bad_file" if code == "bad_setting" else code, str(error)) from error
    except NumericalError as error:
        raise NodeError("not_finite", str(error)) from error
    except ValueError as error:
        raise NodeError(code, str(error)) from error
