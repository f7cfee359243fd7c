"""ComfyUI in the pytest process, on the CPU, with models from a temporary folder.

The checkout is the one that COMFYUI_PATH names, else ~/comfy/ComfyUI; without one the tests of
this folder that need it are not collected, and test_without_comfyui.py says so.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from released_widths import RELEASED_WIDTHS, prefixed
from safetensors.torch import save_file
from tiny import tokenizer_tensors, write_tiny_checkpoint
from tiny_tokenizers import write_tiny_tokenizers

COMFYUI = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI").expanduser()
HAS_COMFYUI = (COMFYUI / "comfy").is_dir()
FLOAT32 = "--fp32-unet --fp32-vae --fp32-text-enc"  # what the tests compare to a CPU's digits
FOLDERS = ("diffusion_models", "checkpoints", "text_encoders", "vae", "loras", "embeddings")


def pytest_ignore_collect(collection_path: Path):
    """The test modules import ComfyUI, so where there is none they are not even read."""
    if HAS_COMFYUI or not collection_path.name.startswith("test_"):
        return None
    return collection_path.name != "test_without_comfyui.py"


def start_comfyui(flags: str) -> None:
    sys.path.insert(0, str(COMFYUI))
    import comfy.options
    import utils.install_util  # noqa: F401  first, as in main.py: 0.3.64 has another utils later

    comfy.options.enable_args_parsing()
    given, sys.argv = sys.argv, ["main.py", *flags.split()]
    from comfy.cli_args import args

    sys.argv = given
    args.cpu = not torch.cuda.is_available()
    import comfy.model_management  # noqa: F401  reads the arguments once


def pytest_configure(config):
    """When the options are known, and before any test module is imported."""
    if HAS_COMFYUI:
        on_card = FLOAT32 if config.getoption("--card") else ""
        start_comfyui(config.getoption("--comfyui-flags") or on_card)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder of models that ComfyUI's folder_paths lists, and nothing else of this machine's.

    checkpoints/tiny.safetensors: everything, of no released width, tokenizers inside.
    checkpoints/wide.safetensors: all but a VAE, as wide as the released models.
    """
    import folder_paths

    base = tmp_path_factory.mktemp("models")
    for name in FOLDERS:
        (base / name).mkdir()
        kinds = folder_paths.folder_names_and_paths[name][1]
        folder_paths.folder_names_and_paths[name] = ([str(base / name)], kinds)
    folder_paths.set_output_directory(str(base / "output"))
    write_tiny_tokenizers(base / "tokenizers")
    write_tiny_checkpoint(
        base / "checkpoints" / "tiny.safetensors",
        tokenizers=base / "tokenizers",
        metadata={"sd3_workbench.shift": "2.0", "sd3_workbench.native_pixels": str(64 * 64)},
    )
    tensors = tokenizer_tensors(base / "tokenizers")
    for kind, (network_class, config) in RELEASED_WIDTHS.items():
        tensors |= prefixed(kind, network_class, config)
    save_file(tensors, base / "checkpoints" / "wide.safetensors")
    folder_paths.filename_list_cache.clear()
    return base


@pytest.fixture(autouse=True)
def inference_mode():
    """As ComfyUI runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def wide(models) -> Path:
    return models / "checkpoints" / "wide.safetensors"


@pytest.fixture(scope="session")
def tiny(models) -> Path:
    return models / "checkpoints" / "tiny.safetensors"


@pytest.fixture(scope="session")
def our_model(wide):
    from sd3_pack.nodes.loaders import load_model
    from sd3_pack.sd3_core.checkpoints.load import component_of

    with torch.inference_mode():
        return load_model(component_of(wide, "mmdit"), "auto")


@pytest.fixture(scope="session")
def their_model(wide):
    """The same file, loaded by ComfyUI."""
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(wide))


@pytest.fixture(scope="session")
def tiny_three(tiny):
    """MODEL, CLIP, VAE of the tiny checkpoint."""
    from sd3_pack.nodes.loaders import SD3LoadCheckpoint

    with torch.inference_mode():
        return SD3LoadCheckpoint.execute("tiny.safetensors").args


@pytest.fixture
def conditioning():
    """conditioning(seed) -> a CONDITIONING as wide as the released models'."""

    def make(seed: int, tokens: int = 20):
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(1, tokens, 4096, generator=generator)
        return [[context, {"pooled_output": torch.randn(1, 2048, generator=generator)}]]

    return make
