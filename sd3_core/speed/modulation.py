"""The modulation table: all that adaLN says during a run, computed before its first step.

The input of every adaLN is the noise level and the pooled text (Esser et al. 2024, figure 2), and a
sampler knows both before it starts.  So each layer is called once, for all levels and prompts
together.  Its weights, with those of the two embedders a third of the network, are then needed no
more and need not lie where the network computes.

Draw Things did this for SD3 Medium in 2024, then Argmax's DiffusionKit on Apple's MLX (its
`cache_modulation_params`).  Here one product per layer serves a whole run, rows are kept for the
next one, and weights that are streamed from their file never rest on the device.
"""

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..conditioning import Conditioning
from ..models.mmdit import MMDiT, Tokens, timestep_embedding

EMBEDDERS = ("t_embedder.", "y_embedder.")
AT_ONCE = 64  # timesteps computed together; for two prompts SD3.5 Large's rows take 0.6 GB
MOST_ROWS = 128  # kept when more are computed

Call = Callable[[nn.Module, Tensor], Tensor]  # (layer, its input) -> its output
# (how to run these blocks one by one, their tokens, the blocks) -> the tokens behind them
Starter = Callable[[Callable[[Tokens, tuple[int, ...]], Tokens], Tokens, tuple[int, ...]], Tokens]
Row = tuple[float, int]  # timestep, number of the prompt


def is_tabled(name: str) -> bool:
    """Whether a table stands in for this parameter of an MMDiT."""
    return name.startswith(EMBEDDERS) or ".adaLN_modulation." in f".{name}"


def is_seldom_used(name: str) -> bool:
    """What need not lie on the device: that, and the position table, of which a crop does."""
    return is_tabled(name) or name == "pos_embed"


def tabled_layers(model: MMDiT) -> list[nn.Module]:
    """The layers that a table stands in for, which hold what `is_tabled` names."""
    return [model.t_embedder, model.y_embedder, *(layer for _, layer in modulators(model))]


def modulators(model: nn.Module) -> Iterator[tuple[str, nn.Sequential]]:
    """Every adaLN of a network, with its path."""
    for path, layer in model.named_modules():
        if path.endswith("adaLN_modulation"):
            assert isinstance(layer, nn.Sequential)
            yield path, layer


def called(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), its weights in the device and dtype of x for this call alone; hooks act too."""
    if all((p.device, p.dtype) == (x.device, x.dtype) for p in layer.parameters()):
        return layer(x)
    weights = {name: weight.to(x.device, x.dtype) for name, weight in layer.named_parameters()}
    scales = {name: scale.to(x.device) for name, scale in layer.named_buffers()}
    return functional_call(layer, weights | scales, (x,))


class ModulationTable:
    """A row for each timestep and prompt that is met: every adaLN's output, side by side.

    model: whose layers are called, wherever they lie; rows know nothing of later changes.
    timesteps: those of the run; others that are met cost a pass over the layers each.
    dtype: of computing and keeping the rows.  call: how a layer is called.
    exact: compute each timestep by itself, as the batch that the network would be given, and so get
    its bits (where equal rows of a product get equal ones); otherwise all rows that a run needs
    come from one product per layer.
    """

    def __init__(
        self,
        model: MMDiT,
        timesteps: Sequence[float],
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        *,
        exact: bool = False,
        call: Call = called,
    ):
        self.model, self.timesteps = model, timesteps
        self.exact, self.call = exact, call
        self.layers = dict(modulators(model))
        self.columns = columns_of(self.layers)
        width = width_of(self.columns)
        self.values = torch.empty(0, width, device=device, dtype=dtype)
        self.pooled = torch.empty(0, model.config.pooled_dim, device=device, dtype=dtype)
        self.rows: dict[tuple[float, int, int], int] = {}  # a row, and how many prompts it was of
        self.passes = 0  # over the layers, so far

    @torch.no_grad()
    def number(self, pooled: Tensor) -> list[int]:
        """Numbers for these prompts, pooled [P, Dp]; equal ones have the same, now and later."""
        numbers = []
        for prompt in pooled.to(self.pooled):
            known = (self.pooled == prompt).all(dim=1).nonzero()
            numbers.append(int(known[0]) if len(known) else len(self.pooled))
            if not len(known):
                self.pooled = torch.cat([self.pooled, prompt[None]])
        return numbers

    def begin(self, timesteps: Sequence[float]) -> None:
        """Another run: rows of other timesteps were computed beside others."""
        if list(timesteps) != list(self.timesteps):
            self.timesteps = timesteps
            self.forget()

    def forget(self) -> None:
        self.rows, self.values = {}, self.values[:0]

    @torch.no_grad()
    def look_up(self, batch: Sequence[Row], dtype: torch.dtype) -> Tensor:
        """The rows of a batch, [B, width]; the first that is missing brings those beside it.

        A product's bits depend on how many rows it has, so the rows that are computed together are
        those of the same timesteps and as many prompts, whatever was looked up before: the same
        settings give the same picture.
        """
        size = len({prompt for _, prompt in batch})
        for timestep, prompt in batch:
            if (timestep, prompt, size) in self.rows:
                continue
            if timestep not in self.timesteps:
                return self._compute([batch]).to(dtype)
            prompts = [prompt for at, prompt in batch if at == timestep]
            start = self.timesteps.index(timestep) // AT_ONCE * AT_ONCE
            beside = self.timesteps[start : start + AT_ONCE]
            self._add([[(at, prompt) for prompt in prompts] for at in beside], size)
        return self._rows([self.rows[(*row, size)] for row in batch]).to(dtype)

    def _rows(self, places: Sequence[int]) -> Tensor:
        """By slices: a list of indices would have to be carried to a GPU, and waited for."""
        first, stop = places[0], places[-1] + 1
        if list(range(first, stop)) == list(places):
            return self.values[first:stop]
        return torch.cat([self.values[place : place + 1] for place in places])

    def _add(self, batches: Sequence[Sequence[Row]], size: int) -> None:
        if len(self.values) > MOST_ROWS:
            self.forget()
        if not self.exact:
            batches = [list(dict.fromkeys(chain(*batches)))]
        computed = self._compute(batches)
        places = {(*row, size): len(self.values) + at for at, row in enumerate(chain(*batches))}
        self.rows |= places
        self.values = torch.cat([self.values, computed]) if len(self.values) else computed

    def _compute(self, batches: Sequence[Sequence[Row]]) -> Tensor:
        """The rows of these calls of the network, one after the other."""
        self.passes += 1
        inputs = [self._time_and_text(batch) for batch in batches]
        rows = self.values.new_empty(sum(map(len, batches)), self.values.shape[1])
        for path, layer in self.layers.items():
            start = 0
            for c in inputs:
                rows[start : start + len(c), self.columns[path]] = self.call(layer, c)
                start += len(c)
        return rows

    def _time_and_text(self, batch: Sequence[Row]) -> Tensor:
        """c [B, D], as MMDiT.time_and_text; unless it is to be exact, each vector is embedded once.

        28 timesteps of two prompts would otherwise embed each pooled vector 28 times.
        """
        every = list(range(len(batch)))
        timesteps, prompts = [timestep for timestep, _ in batch], [prompt for _, prompt in batch]
        of_time, of_text = (
            (every, every) if self.exact else (numbered(timesteps), numbered(prompts))
        )
        if not self.exact:
            timesteps, prompts = list(dict.fromkeys(timesteps)), list(dict.fromkeys(prompts))
        frequencies = timestep_embedding(torch.tensor(timesteps)).to(self.values)
        t = self.call(self.model.t_embedder, frequencies)
        y = self.call(self.model.y_embedder, self.pooled[prompts])
        return t[of_time] + y[of_text]


def numbered(values: Sequence[Hashable]) -> list[int]:
    """Equal values have equal numbers, 0 ... in the order in which they come."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return [numbers[value] for value in values]


def bytes_of(model: MMDiT, dtype: torch.dtype, rows: int) -> int:
    """What a table of so many rows takes."""
    return rows * width_of(columns_of(dict(modulators(model)))) * dtype.itemsize


def width_of(columns: Mapping[str, slice]) -> int:
    return max(column.stop for column in columns.values())


def columns_of(layers: Mapping[str, nn.Module]) -> dict[str, slice]:
    """Where in a row each adaLN's output lies."""
    columns, start = {}, 0
    for path, layer in layers.items():
        stop = start + layer.get_parameter("1.weight").shape[0]
        columns[path] = slice(start, stop)
        start = stop
    return columns


class Columns(nn.Module):
    """In the place of an adaLN: its part of the row."""

    def __init__(self, columns: slice):
        super().__init__()
        self.columns = columns

    def forward(self, row: Tensor) -> Tensor:
        return row[:, self.columns]


class TabledMMDiT(MMDiT):
    """An MMDiT that looks its modulations up, and shares every other layer with the one it is of.

    For a prompt's pooled vector it takes the number that the table has for it.
    """

    def __init__(self, table: ModulationTable):
        nn.Module.__init__(self)
        model = table.model
        self.table, self.config, self.attention = table, model.config, model.attention
        self.x_embedder = model.x_embedder
        self.context_embedder: nn.Module = model.context_embedder
        self.joint_blocks, self.final_layer = looked_up(model, table.columns)
        self.positions: dict[tuple[int, int], Tensor] = {}
        self.starter: Starter | None = None  # see launch.py

    def run_blocks(self, tokens: Tokens, blocks: Iterable[int]) -> Tokens:
        if self.starter is None:
            return super().run_blocks(tokens, blocks)
        return self.starter(super().run_blocks, tokens, tuple(blocks))

    def time_and_text(self, timestep: Tensor, pooled: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the table, [B, width].  pooled: numbers [B, 1]."""
        batch = list(zip(timestep.tolist(), pooled[:, 0].tolist(), strict=True))
        return self.table.look_up(batch, dtype)

    def crop_positions(self, height: int, width: int) -> Tensor:
        if (height, width) not in self.positions:
            crop = self.table.model.crop_positions(height, width)
            self.positions = {(height, width): crop.to(self.table.values.device)}
        return self.positions[height, width]


class PreparedMMDiT(TabledMMDiT):
    """The network of one run, which takes what `prepare` makes of a prompt."""

    def __init__(
        self,
        model: MMDiT,
        timesteps: Tensor,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        exact: bool = False,
    ):
        """device, dtype: of the computation; the table is float32 unless it is to be exact."""
        kept = dtype if exact else torch.float32
        super().__init__(ModulationTable(model, timesteps.tolist(), device, kept, exact=exact))
        if not exact:
            self.context_embedder = nn.Identity()

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """The same prompts: the context in the network's width, the number for the pooled vector.

        A prompt's tokens enter the first block alike in every step.
        """
        context, numbers = conditioning.context, self.table.number(conditioning.pooled)
        if not self.table.exact:
            context = self.table.model.context_embedder(context)
        return Conditioning(context, torch.tensor(numbers)[:, None])


def looked_up(model: MMDiT, columns: Mapping[str, slice]) -> tuple[nn.ModuleList, nn.Module]:
    """The joint blocks and the last layer with Columns for adaLN."""
    blocks = nn.ModuleList()
    for index, block in enumerate(model.joint_blocks):
        streams = {}
        for stream in ("context_block", "x_block"):
            own = Columns(columns[f"joint_blocks.{index}.{stream}.adaLN_modulation"])
            streams[stream] = with_parts(block.get_submodule(stream), {"adaLN_modulation": own})
        blocks.append(with_parts(block, streams))
    own = Columns(columns["final_layer.adaLN_modulation"])
    return blocks, with_parts(model.final_layer, {"adaLN_modulation": own})


def with_parts(module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """The same module with other parts under these names; it shares all its others."""
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)  # such as a compiled one, which calls the original
    twin._modules = {**module._modules, **parts}
    return twin
