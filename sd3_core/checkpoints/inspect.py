"""What is in a file, told from its header alone: 16 GB take no longer than a small file."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..models.clip import CLIPConfig
from ..models.mmdit import MMDiTConfig
from ..models.vae import VAEConfig
from ..presets import PRESETS
from . import lora_keys
from .family import model_family, model_preset
from .header import is_folder, read_header
from .layouts import COMPONENTS, SUPPLIERS, Component, find_components
from .load import Config, read_config
from .lora_files import lora_in
from .sources import SCALE_NAMES, SCALE_SIGNS
from .stored import Part, name_list

PRECISIONS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8 e4m3fn",
    torch.float8_e5m2: "fp8 e5m2",
}
PAPER_DEPTHS = (15, 18, 21, 24, 30, 38)  # Esser et al. 2024 (arXiv:2403.03206), section 5.3
NAMES = {"mmdit": "MMDiT", "vae": "VAE", "clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}


@dataclass(frozen=True)
class ComponentReport:
    """One network: `tables` counts the position table, which is stored but not trained."""

    kind: str
    title: str
    variant: str
    parameters: int  # without `tables`
    tables: int
    tensors: int
    precision: str
    bytes: int
    layout: str
    note: str


@dataclass(frozen=True)
class LoRAReport:
    """A LoRA's header."""

    dialect: str
    kinds: dict[str, int]  # method -> adapters
    components: dict[str, int]  # network -> adapted parameters
    ranks: tuple[int, ...]
    modules: tuple[str, ...]
    unmatched: int
    family: str | None
    unsupported: tuple[str, ...]  # methods among `kinds` that are refused
    parameters: int  # numbers in all tensors but alpha
    precision: str


@dataclass(frozen=True)
class Report:
    """What `inspect` found out; `lines` for people, `to_json` for programs."""

    file: str
    bytes: int
    what: str
    family: str | None  # a key of presets.PRESETS
    components: tuple[ComponentReport, ...]
    lora: LoRAReport | None
    tokenizers: tuple[str, ...]
    unused: tuple[str, ...]  # stored names that no computation needs
    lacks: dict[str, str]  # network -> files that would supply it
    metadata: dict[str, str]
    preset: dict[str, float | str]  # what it is drawn with where nothing else is asked for

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def lines(self) -> list[str]:
        lines = [f"{self.file}: {self.what}", f"size: {_size(self.bytes)}"]
        for part in self.components:
            lines.append(f"{part.title}: {part.variant}")
            lines.append(
                f"  {_count(part.parameters)} parameters"
                + (f" and a position table of {_count(part.tables)}" if part.tables else "")
                + f" in {part.tensors} tensors, {part.precision}, {_size(part.bytes)}, "
                + part.layout
            )
            if part.note:
                lines.append(f"  {part.note}")
        if self.lora is not None:
            lines += _lora_lines(self.lora)
        if self.preset:
            told = ", ".join(f"{name} {value}" for name, value in self.preset.items())
            lines.append(f"drawn by default with: {told}")
        if self.tokenizers:
            lines.append(f"tokenizers inside: {', '.join(self.tokenizers)}")
        if self.unused:
            lines.append(f"{len(self.unused)} tensors are not used: {name_list(self.unused, 8)}")
        if self.lacks:
            lines.append("lacks:")
            lines += [f"  {NAMES[kind]}: {files}" for kind, files in self.lacks.items()]
        if self.metadata:
            lines.append("metadata:")
            lines += [f"  {key}: {_short(value)}" for key, value in self.metadata.items()]
        return lines


def inspect(path: str | Path) -> Report:
    """Describe a file, an index of shards or a diffusers folder without reading a weight.

    Raises CheckpointError when it is no readable file of SD3, saying what it looks like.
    """
    path = Path(path)
    if lora := _inspect_lora(path):
        return lora
    found = find_components(path)
    sizes = {kind: read_config(component) for kind, component in found.items()}
    mmdit, denoiser = sizes.get("mmdit"), found.get("mmdit")
    chosen, preset = None, {}
    if isinstance(mmdit, MMDiTConfig) and denoiser is not None:
        chosen, suits = model_family(denoiser, mmdit), model_preset(denoiser, mmdit)
        preset = {name: getattr(suits, name) for name in ("steps", "cfg", "sampler", "shift")}
    return Report(
        file=path.name,
        bytes=sum(file.stat().st_size for file in _files(found)),
        what=_what(found, chosen),
        family=chosen,
        components=tuple(_component(found[kind], sizes[kind], chosen) for kind in found),
        lora=None,
        tokenizers=_tokenizers(path, found),
        unused=_unused(found),
        lacks={kind: SUPPLIERS[kind] for kind in COMPONENTS if denoiser and kind not in found},
        metadata=_metadata(found),
        preset=preset,
    )


def _inspect_lora(path: Path) -> Report | None:
    if path.suffix == ".json":
        return None
    file = lora_in(path) if is_folder(path) else path
    if file is None:
        return None
    header = read_header(file)
    shapes = {name: info.shape for name, info in header.tensors.items()}
    lora = lora_keys.describe(shapes)
    if lora is None:
        return None
    of = " + ".join(NAMES[kind] for kind in lora.components)
    what = f"a LoRA for {lora.family or of or 'another model'}"
    if lora.unsupported:
        what += f", by {' and '.join(lora.unsupported)}, which is not supported here"
    sizes: Counter[str] = Counter()
    for name, info in header.tensors.items():
        if not name.endswith(".alpha"):
            sizes[_dtype_name(info.dtype)] += info.elements
    return Report(
        file=path.name,
        bytes=header.size,
        what=what,
        family=None,
        components=(),
        lora=LoRAReport(
            dialect=lora.dialect,
            kinds=lora.kinds,
            components=lora.components,
            ranks=lora.ranks,
            modules=lora.modules,
            unmatched=len(lora.unmatched),
            family=lora.family,
            unsupported=lora.unsupported,
            parameters=sizes.total(),
            precision=_shares(sizes),
        ),
        tokenizers=(),
        unused=(),
        lacks={},
        metadata=header.metadata,
        preset={},
    )


def _parts(found: dict[str, Component]) -> Iterator[Part]:
    for component in found.values():
        for source in component.sources.values():
            yield from source.parts


def _files(found: dict[str, Component]) -> set[Path]:
    return {part.header.path for part in _parts(found)}


def _unused(found: dict[str, Component]) -> tuple[str, ...]:
    """Names beside the parameters, their scales and the tokenizers, in the files' order."""
    headers = {part.header.path: part.header for part in _parts(found)}
    used = {(part.header.path, part.key) for part in _parts(found)}
    return tuple(
        name
        for path, header in headers.items()
        for name in header.tensors
        if (path, name) not in used
        and name.rpartition(".")[2] not in (*SCALE_NAMES, *SCALE_SIGNS, "scaled_fp8")
        and ".tokenizer." not in name
    )


def _what(found: dict[str, Component], chosen: str | None) -> str:
    """Model and networks in one phrase."""
    names = " + ".join(NAMES[kind] for kind in found)
    if chosen is None:
        return f"{names} for Stable Diffusion 3"
    model = "Stable Diffusion 3, of its own size" if chosen == "other" else PRESETS[chosen].title
    return f"{model}: {names}"


def _component(component: Component, config: Config, chosen: str | None) -> ComponentReport:
    sources = component.sources
    tables = sources["pos_embed"].elements if "pos_embed" in sources else 0
    variant, note = _variant(config, chosen), ""
    if component.kind == "mmdit" and (chosen or "").startswith("sd3.5_large"):
        note = "Shapes cannot tell Large from Large Turbo; the name is only a hint."
    if component.kind == "vae":
        note = "Shapes cannot tell it from the VAE of Flux, whose weights differ."
    return ComponentReport(
        kind=component.kind,
        title=NAMES[component.kind],
        variant=variant,
        parameters=sum(source.elements for source in sources.values()) - tables,
        tables=tables,
        tensors=len(sources),
        precision=_precision(component),
        bytes=sum(source.bytes for source in sources.values()),
        layout=_layout(component),
        note=note,
    )


def _variant(config: Config, chosen: str | None) -> str:
    if isinstance(config, MMDiTConfig):
        return ", ".join(_mmdit_features(config, chosen))
    if isinstance(config, VAEConfig):
        widths = " ".join(map(str, config.channels))
        return f"widths {widths}, {config.latent_channels} latent channels"
    if isinstance(config, CLIPConfig):
        return (
            f"width {config.hidden_size}, {config.num_layers} layers, window {config.window}, "
            f"vocabulary {config.vocab_size}, pooled {config.pooled_dim}"
        )
    return (
        f"width {config.d_model}, {config.num_layers} layers, {config.num_heads} heads, "
        f"vocabulary {config.vocab_size}"
    )


def _mmdit_features(config: MMDiTConfig, chosen: str | None) -> Iterator[str]:
    yield f"depth {config.depth}, width {config.hidden_size}"
    if config.qk_norm:
        yield "qk norm"
    if dual := config.dual_attention_layers:
        yield f"a second attention in {len(dual)} blocks ({dual[0]} to {dual[-1]})"
    yield f"positions {config.pos_embed_max_size} x {config.pos_embed_max_size}"
    yield f"context {config.context_dim}, pooled {config.pooled_dim}"
    if chosen == "other" and config.depth in PAPER_DEPTHS:
        yield "a depth of the SD3 paper"


def _precision(component: Component) -> str:
    counts: Counter[str] = Counter()
    for source in component.sources.values():
        name = _dtype_name(source.dtype)
        counts[f"scaled {name}" if source.scales else name] += source.elements
    return _shares(counts)


def _dtype_name(dtype: torch.dtype) -> str:
    return PRECISIONS.get(dtype, str(dtype).removeprefix("torch."))


def _shares(counts: Counter[str]) -> str:
    """Dtypes by the share of the parameters, most first; small remainders are counted too."""
    total = sum(counts.values()) or 1
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} {n / total:.1%}" for name, n in counts.most_common())


def _layout(component: Component) -> str:
    if component.style != "released":
        return f"names of {component.style}"
    if component.prefix:
        return f"under {component.prefix.rstrip('.')}"
    return "names without prefix"


def _tokenizers(path: Path, found: dict[str, Component]) -> tuple[str, ...]:
    if path.is_dir():
        return tuple(sorted(folder.name for folder in path.glob("tokenizer*") if folder.is_dir()))
    names: set[str] = set()
    for file in _files(found):
        for key in read_header(file).tensors:
            encoder, inside, name = key.partition(".tokenizer.")
            if inside:
                names.add(f"{encoder.rpartition('.')[2]} {name}")
    return tuple(sorted(names))


def _metadata(found: dict[str, Component]) -> dict[str, str]:
    merged: dict[str, str] = {}
    for component in found.values():
        merged |= component.metadata
    return merged


def _lora_lines(lora: LoRAReport) -> list[str]:
    kinds = ", ".join(f"{number} {kind}" for kind, number in lora.kinds.items())
    ranks = ", ".join(map(str, lora.ranks)) or "none"
    lines = [f"adapters: {kinds}, {lora.dialect} names, ranks {ranks}"]
    lines.append(f"{_count(lora.parameters)} parameters, {lora.precision}")
    for kind, number in lora.components.items():
        lines.append(f"changes {number} parameters of {NAMES[kind]}")
    if lora.modules:
        lines.append(f"modules: {name_list(lora.modules, 8)}")
    if lora.unmatched:
        lines.append(f"{lora.unmatched} keys mean nothing in Stable Diffusion 3")
    return lines


def _size(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} bytes"


def _count(number: int) -> str:
    return f"{number:,}"


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}... ({len(text)} characters)"
