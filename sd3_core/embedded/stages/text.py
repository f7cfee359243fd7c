"""The text encoders of the embedded model.

The CLIPs learn to tell which caption belongs to which picture (Radford et al. 2021,
arXiv:2103.00020), against a small picture tower that both share and that also gives the features
for FID.  T5 learns to fill gaps (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4) and, in its
manner of many tasks in one form, to tell a caption again in other words, which it cannot do without
knowing what belongs to what.  The picture tower and T5's decoder are scaffolding: not shipped.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.layouts import PREFIXES
from ...checkpoints.save import save_tensors
from ...models.clip import CLIPConfig, CLIPTextModel
from ...models.t5 import T5Config, T5Encoder
from ...text.prompt import Piece
from ...text.tokenizers import Tokenizer, clip_windows, t5_sequence
from ...text.vocabularies import Tokenizers
from ...training.batches import generator
from ...training.config import LoopConfig
from ...training.loop import Losses
from ...training.optimizers import Parameters
from ..captions import full_caption, short_caption
from ..dice import Dice
from ..render import draw
from .samples import HELD, TRAINING, scenes_of

WINDOW = 24  # tokens of a CLIP window, and the least of T5's
SIZE = (64, 64)  # of the pictures
SENTINELS = 4  # rows of T5's embedding behind the tokenizer's: gaps
TEMPERATURE = 0.07  # of the first step
HELD_OUT = 512  # captions of a validation


@dataclass(frozen=True, kw_only=True)
class CLIPStage(LoopConfig):
    steps: int = 3000
    batch_size: int = 128
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    lr_schedule: str = "cosine"
    warmup: int = 100
    ema: float = 0.995
    checkpoint_every: int = 500
    validate_every: int = 500


@dataclass(frozen=True, kw_only=True)
class T5Stage(LoopConfig):
    steps: int = 3000
    batch_size: int = 96
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    lr_schedule: str = "cosine"
    warmup: int = 100
    ema: float = 0.995
    checkpoint_every: int = 500
    validate_every: int = 500


def clip_configs(tokenizers: Tokenizers) -> dict[str, CLIPConfig]:
    """Sizes in the released models' proportions: heads of 64, four times as wide inside."""
    assert tokenizers.clip_l
    assert tokenizers.clip_g
    left = CLIPConfig(64, 2, 1, 256, tokenizers.clip_l.size, WINDOW, "quick_gelu", None)
    right = CLIPConfig(128, 2, 2, 512, tokenizers.clip_g.size, WINDOW, "gelu", 128)
    return {"clip_l": left, "clip_g": right}


def t5_config(tokenizers: Tokenizers) -> T5Config:
    assert tokenizers.t5
    return T5Config(256, 512, 64, 2, 2, tokenizers.t5.size + SENTINELS, 32)


def clip_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """The first window of each text: [B, WINDOW]."""
    return torch.tensor(
        [clip_windows(tokenizer, [Piece(text, 1.0)], WINDOW)[0].ids for text in texts]
    )


def t5_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Each text, padded or cut: [B, WINDOW]."""
    rows = [t5_sequence(tokenizer, [Piece(text, 1.0)], WINDOW).ids[:WINDOW] for text in texts]
    return torch.tensor(rows)


def computing(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Products in this dtype, weights and sums in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class PictureTower(nn.Module):
    """[B, 3, 64, 64] in -1..1 -> features [B, 256], and a direction for each text tower."""

    def __init__(self, widths: Mapping[str, int]):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 128), (128, 128)):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GELU()]
        self.convolutions = nn.Sequential(*layers)
        self.features = nn.Linear(128 * 16, 256)
        self.heads = nn.ModuleDict({name: nn.Linear(256, width) for name, width in widths.items()})

    def forward(self, pictures: Tensor) -> Tensor:
        return F.gelu(self.features(self.convolutions(pictures).flatten(1)))


def initialise_text(network: nn.Module, seed: int, name: str) -> None:
    """Normal weights as CLIP's: of 0.02 for tables, by width for layers."""
    for key, parameter in network.named_parameters():
        if parameter.dim() < 2:
            continue
        std = 0.02 if "embedding" in key or "shared" in key else parameter.shape[1] ** -0.5
        nn.init.normal_(parameter, std=std, generator=generator(seed, name, key))


class CLIPTask:
    """Both text towers and the picture tower, by symmetric contrast within a pass's samples."""

    product = "model"

    def __init__(
        self, tokenizers: Tokenizers, config: CLIPStage, device: torch.device, dtype: torch.dtype
    ):
        self.config, self.device, self.dtype = config, device, dtype
        self.tokenizers = {"clip_l": tokenizers.clip_l, "clip_g": tokenizers.clip_g}
        sizes = clip_configs(tokenizers)
        self.towers = nn.ModuleDict({name: CLIPTextModel(sizes[name], nn) for name in sizes})
        self.pictures = PictureTower({name: size.pooled_dim for name, size in sizes.items()})
        self.projections = nn.ModuleDict(  # CLIP-L's own is not part of SD3
            {"clip_l": nn.Linear(64, 64, bias=False), "clip_g": nn.Identity()}
        )
        self.scales = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(-math.log(TEMPERATURE))) for name in sizes}
        )
        parts = {
            "towers": self.towers,
            "pictures": self.pictures,
            "projections": self.projections,
            "scales": self.scales,
        }
        for name, part in parts.items():
            initialise_text(part, config.seed, name)
            part.to(device)
        self.parameters: Parameters = {
            f"{name}.{key}": parameter
            for name, part in parts.items()
            for key, parameter in part.named_parameters()
        }

    def loss(self, step: int, rows: range, size: int) -> Losses:
        with computing(self.device, self.dtype):
            return self._contrast(TRAINING, [step * size + row for row in rows])

    def _contrast(self, seed: int, numbers: Sequence[int]) -> Losses:
        scenes = scenes_of(seed, numbers, SIZE)
        captions = [
            (short_caption if number % 2 else full_caption)(one, number)
            for one, number in zip(scenes, numbers, strict=True)
        ]
        features = self.pictures(draw(scenes, self.device))
        total = torch.zeros(len(scenes), device=self.device)
        logs = {}
        for name, tower in self.towers.items():
            tokenizer = self.tokenizers[name]
            assert tokenizer
            ids = clip_ids(tokenizer, captions).to(self.device)
            said = F.normalize(self.projections[name](tower(ids, tokenizer.end).pooled), dim=1)
            seen = F.normalize(self.pictures.heads[name](features), dim=1)
            logits = (seen @ said.T).float() * self.scales[name].clamp(max=math.log(100)).exp()
            logits = logits.masked_fill(same_elsewhere(captions).to(self.device), -math.inf)
            own = torch.arange(len(scenes), device=self.device)
            each = (F.cross_entropy(logits, own, reduction="none")) / 2
            total = total + each + F.cross_entropy(logits.T, own, reduction="none") / 2
            logs[name] = (logits.argmax(1) == own).float()
        return Losses(total, logs)

    def validate(self) -> Mapping[str, float]:
        """Loss, and how often a picture finds its caption among 256."""
        losses = [
            self._contrast(HELD, range(start, start + 256)) for start in range(0, HELD_OUT, 256)
        ]
        logs = {
            name: float(torch.cat([one.logs[name] for one in losses]).mean())
            for name in self.towers
        }
        return {"loss": float(torch.cat([one.each for one in losses]).mean()), **logs}

    def sample(self, folder: Path, step: int) -> None:
        """Nothing to see."""

    def export(self, path: Path, step: int) -> Path:
        tensors = {
            PREFIXES[name] + key: tensor
            for name, tower in self.towers.items()
            for key, tensor in tower.state_dict().items()
        }
        tower = {f"picture_tower.{k}": v for k, v in self.pictures.state_dict().items()}
        return save_tensors(path, tensors | tower, {"sd3_workbench.step": str(step)})


def same_elsewhere(captions: Sequence[str]) -> Tensor:
    """Where another row has the very same caption, which is no wrong answer: [B, B]."""
    numbers = {text: number for number, text in enumerate(dict.fromkeys(captions))}
    kinds = torch.tensor([numbers[text] for text in captions])
    return (kinds[:, None] == kinds) & ~torch.eye(len(captions), dtype=torch.bool)


class Teller(nn.Module):
    """T5's decoder, for as long as T5 learns: states of a text -> the next tokens of another."""

    def __init__(self, config: T5Config):
        super().__init__()
        layer = nn.TransformerDecoderLayer(
            config.d_model, 4, config.d_ff, dropout=0.0, batch_first=True, norm_first=True
        )
        self.places = nn.Parameter(torch.zeros(WINDOW, config.d_model))
        self.layers = nn.TransformerDecoder(layer, 1, nn.LayerNorm(config.d_model))
        self.out = nn.Linear(config.d_model, config.vocab_size)

    def forward(self, embedded: Tensor, states: Tensor) -> Tensor:
        """embedded: [B, L, D], the tokens so far; states: [B, S, D].  Returns logits [B, L, V]."""
        length = embedded.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=embedded.device)
        return self.out(self.layers(embedded + self.places[:length], states, tgt_mask=mask))


class T5Task:
    """Half of the samples fill gaps, half tell a full caption as a short one."""

    product = "model"

    def __init__(
        self, tokenizers: Tokenizers, config: T5Stage, device: torch.device, dtype: torch.dtype
    ):
        assert tokenizers.t5
        self.config, self.device, self.dtype = config, device, dtype
        self.tokenizer = tokenizers.t5
        sizes = t5_config(tokenizers)
        self.encoder, self.teller = T5Encoder(sizes, nn), Teller(sizes)
        parts = {"encoder": self.encoder, "teller": self.teller}
        for name, part in parts.items():
            initialise_text(part, config.seed, name)
            part.to(device)
        nn.init.normal_(self.encoder.shared.weight, generator=generator(config.seed, "shared"))
        self.parameters: Parameters = {
            f"{name}.{key}": parameter
            for name, part in parts.items()
            for key, parameter in part.named_parameters()
        }

    def loss(self, step: int, rows: range, size: int) -> Losses:
        with computing(self.device, self.dtype):
            return self._tell(TRAINING, [step * size + row for row in rows])

    def _tell(self, seed: int, numbers: Sequence[int]) -> Losses:
        given, wanted = [], []
        for one, number in zip(scenes_of(seed, numbers, SIZE), numbers, strict=True):
            texts = (full_caption(one, number), short_caption(one, number))
            if number % 2:
                source, target = (self.tokenizer.ids(text) for text in texts)
            else:
                source, target = self._gaps(self.tokenizer.ids(texts[number // 2 % 2]), number)
            given.append(self._framed(source))
            wanted.append(self._framed(target))
        source = torch.tensor(given, device=self.device)
        target = torch.tensor(wanted, device=self.device)
        begin = torch.full_like(target[:, :1], self.tokenizer.pad)  # as T5's decoder begins
        before = self.encoder.shared(torch.cat((begin, target[:, :-1]), dim=1))
        logits = self.teller(before, self.encoder(source)).float()
        each = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
        real = (target != self.tokenizer.pad).float()
        right = ((logits.argmax(2) == target).float() * real).sum(1) / real.sum(1)
        return Losses((each * real).sum(1) / real.sum(1), {"tokens_right": right})

    def _gaps(self, ids: list[int], number: int) -> tuple[list[int], list[int]]:
        """One to three gaps of one to three tokens: what is left, and what was in them."""
        dice = Dice("gaps", number)
        left, taken, place = [], [], 0
        first = self.tokenizer.size
        for sentinel in range(first, first + dice.among((1, 2, 3))):
            start = place + dice.among(range(4))
            stop = start + dice.among((1, 1, 2, 3))
            if stop > len(ids):
                break
            left += [*ids[place:start], sentinel]
            taken += [sentinel, *ids[start:stop]]
            place = stop + 1
            left += ids[stop:place]
        return left + ids[place:], taken

    def _framed(self, ids: list[int]) -> list[int]:
        ids = [*ids[: WINDOW - 1], self.tokenizer.end]
        return ids + [self.tokenizer.pad] * (WINDOW - len(ids))

    def validate(self) -> Mapping[str, float]:
        losses = self._tell(HELD, range(HELD_OUT))
        right = losses.logs["tokens_right"]
        return {
            "loss": float(losses.each.mean()),
            "filled": float(right[0::2].mean()),
            "retold": float(right[1::2].mean()),
        }

    def sample(self, folder: Path, step: int) -> None:
        """Nothing to see."""

    def export(self, path: Path, step: int) -> Path:
        state = {PREFIXES["t5"] + key: value for key, value in self.encoder.state_dict().items()}
        return save_tensors(path, state, {"sd3_workbench.step": str(step)})
