"""The shape of the project, held by reading every import: who knows whom, what nobody does."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACK = Path(__file__).parent.parent

# From the bottom up: a module may import its own layer and those before it, never a later one.
LAYERS = (
    ("sd3_core.errors", "sd3_core.plain_text", "sd3_core.reading"),
    ("sd3_core.models",),
    (
        "sd3_core.conditioning",
        "sd3_core.schedule",
        "sd3_core.noise",
        "sd3_core.guidance",
        "sd3_core.samplers",
        "sd3_core.measures",
        "sd3_core.adapters",
        "sd3_core.lora",
        "sd3_core.presets",
        "sd3_core.precision",
        "sd3_core.sizes",
        "sd3_core.memory",
    ),
    ("sd3_core.text", "sd3_core.checkpoints", "sd3_core.pictures", "sd3_core.decode"),
    ("sd3_core.speed",),
    ("sd3_core.settings", "sd3_core.generate", "sd3_core.verify"),
    ("sd3_core.training", "sd3_core.bench"),
    ("sd3_core.embedded",),
    ("sd3_core.sweep",),
    ("sd3_core.study",),
    ("sd3_core", "sd3_core.__main__"),  # the table of contents and the command line
    ("nodes",),
    ("__init__",),  # the pack's own door for ComfyUI
)
PACKAGES = ("sd3_core", "nodes")
COMFYUI = (
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
    "nodes",
    "server",
)
HEAVY = ("transformers", "diffusers", "tokenizers", "sentencepiece", "peft", "scipy", "torchvision")
UNSAFE_MODULES = (
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
)
UNSAFE_CALLS = ("eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load")
# Used where it is installed, and only when asked for; tomllib is Python's own from 3.11 on.
OPTIONAL = ("diffusers", "matplotlib", "tomllib", "tomli", "triton")
# Modules that exist only beside such a package: imported inside a function, and so may import it.
ON_DEMAND = ("sd3_core.models.kernels",)
DISTRIBUTIONS = {"PIL": "pillow"}  # imported name -> installed name, where they differ
VAGUE_NAMES = ("utils", "util", "common", "helpers", "misc")


@dataclass(frozen=True)
class Import:
    """One import statement's target, as an absolute dotted name."""

    target: str
    line: int
    relative: bool
    at_module_level: bool


@dataclass(frozen=True)
class Module:
    name: str
    is_package: bool
    tree: ast.Module

    @property
    def imports(self) -> list[Import]:
        return list(found_imports(self))


def read_module(path: Path) -> Module:
    parts = path.relative_to(PACK).with_suffix("").parts
    is_package = parts[-1] == "__init__" and len(parts) > 1
    name = ".".join(parts[:-1] if is_package else parts)
    return Module(name, is_package, ast.parse(path.read_text(encoding="utf-8"), str(path)))


def planted(name: str, source: str) -> Module:
    """A module that is not in the tree: the rules are tried on it."""
    return Module(name, is_package=False, tree=ast.parse(source))


def statements(node: ast.AST, at_module_level: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below this one, and whether it runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        yield child, at_module_level
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from statements(child, at_module_level and not inside)


def found_imports(module: Module) -> Iterator[Import]:
    for node, at_module_level in statements(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, False, at_module_level)
        elif isinstance(node, ast.ImportFrom):
            base = package_above(module, node.level) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                target = f"{origin}.{alias.name}" if origin else alias.name
                yield Import(target, node.lineno, bool(node.level), at_module_level)


def package_above(module: Module, level: int) -> str:
    parts = module.name.split(".")
    drop = level - 1 if module.is_package else level
    return ".".join(parts[: len(parts) - drop])


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer_of(name: str) -> int | None:
    """Index in LAYERS of the longest entry that holds this dotted name."""
    holding = [
        (len(entry), index)
        for index, layer in enumerate(LAYERS)
        for entry in layer
        if is_within(name, entry) and (entry != "sd3_core" or name == entry)
    ]
    return max(holding)[1] if holding else None


def module_named(target: str, names: set[str]) -> str | None:
    """The module a target lies in: `sd3_core.schedule.Schedule` -> `sd3_core.schedule`."""
    while target and target not in names:
        target = target.rpartition(".")[0]
    return target or None


MODULES = [
    read_module(path)
    for path in sorted(
        [PACK / "__init__.py", *(p for name in PACKAGES for p in (PACK / name).rglob("*.py"))]
    )
]
NAMES = {module.name for module in MODULES}


# --- the rules: each returns what breaks it -----------------------------------------------------


def without_layer(module: Module) -> list[str]:
    return [] if layer_of(module.name) is not None else [f"{module.name}: name its layer in LAYERS"]


def reversed_arrows(module: Module, names: set[str] = NAMES) -> list[str]:
    own = layer_of(module.name)
    broken = []
    for found in module.imports:
        known = module_named(found.target, names) if found.relative else None
        other = layer_of(known) if known else None
        if own is not None and other is not None and other > own:
            broken.append(f"{module.name}:{found.line} imports {known}, a layer above its own")
    return broken


def absolute_imports_of_ourselves(module: Module) -> list[str]:
    return [
        f"{module.name}:{found.line} imports {found.target} by an absolute name"
        for found in module.imports
        if not found.relative and found.target.split(".")[0] in ("sd3_core", "sd3_pack", "tests")
    ]


def comfyui_in_the_core(module: Module) -> list[str]:
    if not is_within(module.name, "sd3_core"):
        return []
    return [
        f"{module.name}:{found.line} imports {found.target}"
        for found in module.imports
        if (not found.relative and found.target.split(".")[0] in COMFYUI)
        or (found.relative and not is_within(found.target, "sd3_core"))
    ]


def unsafe_code(module: Module) -> list[str]:
    imported = [
        f"{module.name}:{found.line} imports {found.target}"
        for found in module.imports
        if found.target.split(".")[0] in UNSAFE_MODULES or found.target in UNSAFE_CALLS
    ]
    calls = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call)]
    called = [
        f"{module.name}:{call.lineno} calls {ast.unparse(call.func)}"
        for call in calls
        if ast.unparse(call.func) in UNSAFE_CALLS
        or any(word.arg == "allow_pickle" for word in call.keywords)
    ]
    return imported + called


def heavy_at_module_level(module: Module) -> list[str]:
    return [
        f"{module.name}:{found.line} imports {found.target} at module level"
        for found in module.imports
        if found.at_module_level and found.target.split(".")[0] in HEAVY
    ]


def unrequired_packages(module: Module) -> list[str]:
    """Imports of the core that neither Python nor requirements.txt brings."""
    if not is_within(module.name, "sd3_core"):
        return []
    lines = (PACK / "requirements.txt").read_text(encoding="utf-8").lower().splitlines()
    brought = {re.split(r"[^a-z0-9_-]", line)[0] for line in lines} | sys.stdlib_module_names
    broken = []
    for found in module.imports:
        package = found.target.split(".")[0]
        late = not found.at_module_level or module.name in ON_DEMAND
        optional = package in OPTIONAL and late
        known = DISTRIBUTIONS.get(package, package) in brought
        if not found.relative and not known and not optional:
            broken.append(f"{module.name}:{found.line} imports {package}, which nobody installs")
    return broken


def on_demand_at_module_level(module: Module, names: set[str] = NAMES) -> list[str]:
    return [
        f"{module.name}:{found.line} imports {found.target} at module level"
        for found in module.imports
        if found.at_module_level and module_named(found.target, names) in ON_DEMAND
    ]


def open_keyword_arguments(module: Module) -> list[str]:
    if not is_within(module.name, "sd3_core"):
        return []  # in nodes/ some signatures are ComfyUI's, and open
    return [
        f"{module.name}:{node.lineno} takes **{node.args.kwarg.arg}"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        and node.args.kwarg is not None
    ]


def vague_names(module: Module) -> list[str]:
    return [module.name] if module.name.split(".")[-1] in VAGUE_NAMES else []


RULES = (
    without_layer,
    reversed_arrows,
    absolute_imports_of_ourselves,
    comfyui_in_the_core,
    unsafe_code,
    heavy_at_module_level,
    unrequired_packages,
    on_demand_at_module_level,
    open_keyword_arguments,
    vague_names,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_module_breaks_the_rule(rule):
    broken = [line for module in MODULES for line in rule(module)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (without_layer, "sd3_core.elsewhere", ""),
        (reversed_arrows, "sd3_core.models.mmdit", "from ..checkpoints import header"),
        (
            reversed_arrows,
            "sd3_core.models.mmdit",
            "def late():\n    from ..schedule import Schedule",
        ),
        (reversed_arrows, "sd3_core.schedule", "from .generate import generate"),
        (reversed_arrows, "sd3_core.text.encoders", "from .. import Schedule"),
        (absolute_imports_of_ourselves, "sd3_core.generate", "from sd3_core.models import mmdit"),
        (absolute_imports_of_ourselves, "nodes.text", "import sd3_core"),
        (comfyui_in_the_core, "sd3_core.generate", "import folder_paths"),
        (comfyui_in_the_core, "sd3_core.generate", "from comfy.utils import load_torch_file"),
        (comfyui_in_the_core, "sd3_core.generate", "from ..nodes import wires"),
        (unsafe_code, "sd3_core.checkpoints.load", "torch.load(path)"),
        (unsafe_code, "sd3_core.checkpoints.load", "from torch import load"),
        (unsafe_code, "sd3_core.checkpoints.load", "import pickle"),
        (unsafe_code, "sd3_core.checkpoints.load", "numpy.load(path, allow_pickle=True)"),
        (unsafe_code, "sd3_core.presets", "eval(text)"),
        (
            heavy_at_module_level,
            "sd3_core.text.tokenizers",
            "from transformers import CLIPTokenizer",
        ),
        (heavy_at_module_level, "sd3_core.bench", "if True:\n    import diffusers"),
        (unrequired_packages, "sd3_core.schedule", "import pandas"),
        (unrequired_packages, "sd3_core.bench", "from diffusers import StableDiffusion3Pipeline"),
        (unrequired_packages, "sd3_core.models.fused", "import triton"),
        (on_demand_at_module_level, "sd3_core.models.fused", "from . import kernels"),
        (open_keyword_arguments, "sd3_core.generate", "def generate(prompt, **options): ..."),
        (vague_names, "sd3_core.utils", ""),
    ],
)
def test_the_rule_notices_a_planted_fault(rule, name, source):
    module = planted(name, source)
    names = {*NAMES, "sd3_core", "sd3_core.schedule", "sd3_core.generate", "sd3_core.checkpoints"}
    assert rule(module, names) if rule is reversed_arrows else rule(module)


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (reversed_arrows, "sd3_core.generate", "from .models.mmdit import MMDiT"),
        (reversed_arrows, "sd3_core.guidance", "from .schedule import Schedule"),
        (heavy_at_module_level, "sd3_core.bench", "def run():\n    import diffusers"),
        (unrequired_packages, "sd3_core.bench", "def run():\n    from diffusers import pipelines"),
        (unrequired_packages, "sd3_core.pictures", "import math, torch.nn\nfrom PIL import Image"),
        (unrequired_packages, "sd3_core.models.kernels", "import triton"),
        (on_demand_at_module_level, "sd3_core.models.fused", "def f():\n    from . import kernels"),
        (unsafe_code, "sd3_core.generate", "model.eval()"),
    ],
)
def test_the_rule_lets_good_code_pass(rule, name, source):
    assert not rule(planted(name, source))


def test_every_layer_name_is_used_once():
    entries = [entry for layer in LAYERS for entry in layer]
    assert len(entries) == len(set(entries))


def test_imports_make_no_circle():
    graph = {
        module.name: {
            target
            for found in module.imports
            if found.relative
            and (target := module_named(found.target, NAMES)) not in (None, module.name)
        }
        for module in MODULES
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError and names the circle


def test_the_packs_own_init_imports_nothing():
    init = read_module(PACK / "__init__.py")
    assert not [found for found in init.imports if found.at_module_level]


def test_importing_the_core_stays_light():
    question = f"import sys, sd3_core; print([n for n in {HEAVY!r} if n in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", question], cwd=PACK, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
