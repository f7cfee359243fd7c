"""What a user reads when something is wrong: a stable code first, then what it is and what to do.

Programs that drive ComfyUI may compare the code, `SD3:missing_encoder`; the sentence may change.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import folder_paths

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
    """Begins with `SD3:<code>: `; where its files lie on the machine is left out."""

    def __init__(self, code: str, message: str):
        super().__init__(f"SD3:{code}: {without_places(message)}")


def without_places(text: str) -> str:
    """Paths in ComfyUI's folders as seen from there: who reads it may sit at another machine."""
    for place, name in _places():
        text = text.replace(place + os.sep, f"{name}/").replace(place, name)
    return text


def _places() -> list[tuple[str, str]]:
    """ComfyUI's folders and how they are named, the innermost first."""
    known: dict[Path, str] = {
        Path.home(): "~",
        Path(__file__).parent.parent: "SD3 Workbench",
        Path(folder_paths.base_path): "ComfyUI",
        Path(folder_paths.models_dir): "models",
    }
    for kind, (folders, *_) in folder_paths.folder_names_and_paths.items():
        known = {Path(folder): str(kind) for folder in folders} | known
    for kind in ("output", "input", "temp", "user"):
        known[Path(getattr(folder_paths, f"get_{kind}_directory")())] = kind
    known |= {path.resolve(): name for path, name in known.items()}
    deep = [(str(path), name) for path, name in known.items() if len(path.parts) > 1]
    return sorted(deep, key=lambda one: -len(one[0]))


@contextmanager
def coded(code: str) -> Iterator[None]:
    """Give the core's errors their code, and the system's of a file that cannot be read or written;
    an interruption and a full memory pass unchanged."""
    try:
        yield
    except NodeError:
        raise
    except CheckpointError as error:
        raise NodeError("bad_file" if code == "bad_setting" else code, str(error)) from error
    except NumericalError as error:
        raise NodeError("not_finite", str(error)) from error
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        raise NodeError("bad_file", f"{place}{error.strerror or error}.") from error
    except ValueError as error:
        raise NodeError(code, str(error)) from error
