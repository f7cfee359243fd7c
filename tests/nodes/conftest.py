"""ComfyUI in the pytest process, on the CPU, with models from a temporary folder.

The checkout is the one that COMFYUI_PATH names, else ~/comfy/ComfyUI; without one the tests of
this folder that need it are not collected, and test_without_comfyui.py says so.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from build import with_recipe_weights
from safetensors.torch import save_file
from sd3_pack.sd3_core.models.clip import CLIPConfig, CLIPTextModel
from sd3_pack.sd3_core.models.mmdit import MMDiT, MMDiTConfig
from sd3_pack.sd3_core.models.t5 import T5Config, T5Encoder
from tiny import SINGLE_FILE_PREFIXES, tokenizer_tensors, write_tiny_checkpoint
from tiny_tokenizers import clip_vocabulary, t5_vocabulary, write_tiny_tokenizers

COMFYUI = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI").expanduser()
HAS_COMFYUI = (COMFYUI / "comfy").is_dir()
FOLDERS = ("diffusion_models", "checkpoints", "text_encoders", "vae", "loras", "embeddings")

# As wide as the released models, so that ComfyUI's own classes load it; as deep as a test can wait.
RELEASED_WIDTHS = {
    "mmdit": (
        MMDiT,
        MMDiTConfig(depth=2, pos_embed_max_size=24, qk_norm=True, dual_attention_layers=(0,)),
    ),
    "clip_l": (
        CLIPTextModel,
        CLIPConfig(768, 3, 12, 64, len(clip_vocabulary()), 77, "quick_gelu", None),
    ),
    "clip_g": (
        CLIPTextModel,
        CLIPConfig(1280, 3, 20, 64, len(clip_vocabulary()), 77, "gelu", 1280),
    ),
    "t5": (T5Encoder, T5Config(4096, 64, 64, 2, 2, len(t5_vocabulary()), 32)),
}


def pytest_ignore_collect(collection_path: Path):
    """The test modules import ComfyUI, so where there is none they are not even read."""
    if HAS_COMFYUI or not collection_path.name.startswith("test_"):
        return None
    return collection_path.name != "test_without_comfyui.py"


def start_comfyui() -> None:
    sys.path.insert(0, str(COMFYUI))
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    import comfy.model_management  # noqa: F401  reads the arguments once


if HAS_COMFYUI:
    start_comfyui()


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
        state = with_recipe_weights(network_class, config, seed=7).state_dict()
        tensors |= {SINGLE_FILE_PREFIXES[kind] + name: value for name, value in state.items()}
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
