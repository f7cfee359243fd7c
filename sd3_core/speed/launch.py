"""How the joint blocks of one run are started: one by one, as a CUDA graph, or compiled.

A forward starts a thousand kernels.  On a fast card and a small picture starting them takes longer
than their work: a graph starts all of them at once, and a compiled block fewer of them.  Both keep
what they saw: weights at their addresses and no hook.  Where that may not hold they refuse.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import quoted
from ..models.fused import hooked
from ..models.gpu import current
from ..models.mmdit import Tokens
from .modulation import Columns, TabledMMDiT, with_parts

WAYS = ("plain", "graph", "compile")
MOST_GRAPHS = 8  # each holds the memory of a forward; skip-layer guidance takes four
WARM = 2

Run = Callable[[], Tokens]
Capture = Callable[[Run], tuple[Tokens, Callable[[], None]]]  # -> its output, and how to refill it


def launch(network: TabledMMDiT, way: str, device: torch.device, backend: str = "inductor") -> None:
    """Let a network start its blocks in one of WAYS.  backend: torch.compile's.

    Raises ValueError, saying why, where the way cannot serve.
    """
    check(way, device)
    if way == "plain":
        return
    reason = obstacle(network, device)
    if reason:
        raise ValueError(f"launch is {quoted(way)}, but {reason}. Launch plainly.")
    if way == "graph":
        network.starter = Graphs()
    else:
        network.joint_blocks = compiled_blocks(network, backend)


def check(way: str, device: torch.device) -> None:
    """What can be said before anything is loaded.  Raises ValueError."""
    if way not in WAYS:
        raise ValueError(f"launch is {quoted(way)}; choose one of {', '.join(WAYS)}.")
    if way == "graph" and device.type != "cuda":
        raise ValueError(
            f"launch is {quoted(way)}, and CUDA graphs are not for {device.type}: "
            "choose plain or compile."
        )


def obstacle(network: nn.Module, device: torch.device) -> str:
    """Why neither a graph nor compiled blocks serve; empty where they do."""
    for path, module in network.named_modules():
        if hooked(module):
            return f"{path} has a hook, such as an attached LoRA's, which would not be called"
    for path, tensor in network.state_dict().items():
        if tensor.device.type != device.type:
            return f"{path} is offloaded to {tensor.device.type}, and carried over in each call"
    return ""


# CUDA graphs


@dataclass(frozen=True)
class Recorded:
    """One forward of some blocks; `given` is filled, `refill` run, and `out` read."""

    given: Tokens
    out: Tokens
    refill: Callable[[], None]


class Graphs:
    """One graph for each set of blocks and shape, recorded when it is first met."""

    def __init__(self, capture: Capture | None = None):
        self.capture = capture or cuda_graph
        self.recorded: dict[tuple[object, ...], Recorded] = {}

    def __call__(
        self,
        run: Callable[[Tokens, tuple[int, ...]], Tokens],
        tokens: Tokens,
        blocks: tuple[int, ...],
    ) -> Tokens:
        if torch.is_grad_enabled() or not blocks:
            return run(tokens, blocks)
        shapes = tuple((tuple(t.shape), t.dtype) for t in parts(tokens))
        with torch.inference_mode(False), torch.no_grad():  # so that it serves in either mode
            if (blocks, shapes) not in self.recorded:
                self.recorded[blocks, shapes] = self.record(run, tokens, blocks)
            recorded = self.recorded[blocks, shapes]
            for place, tensor in zip(parts(recorded.given), parts(tokens), strict=True):
                place.copy_(tensor)
            recorded.refill()
            # Copies: the next step overwrites the graph's own.
            x, context = recorded.out.x.clone(), recorded.out.context.clone()
        return Tokens(x, context, tokens.c, tokens.size)

    def record(
        self,
        run: Callable[[Tokens, tuple[int, ...]], Tokens],
        tokens: Tokens,
        blocks: tuple[int, ...],
    ) -> Recorded:
        if len(self.recorded) >= MOST_GRAPHS:
            self.recorded.pop(next(iter(self.recorded)))
        x, context, c = (tensor.clone() for tensor in parts(tokens))
        given = Tokens(x, context, c, tokens.size)
        with current(x.device):
            out, refill = self.capture(lambda: run(given, blocks))
        return Recorded(given, out, refill)


def parts(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    return tokens.x, tokens.context, tokens.c


def cuda_graph(run: Run) -> tuple[Tokens, Callable[[], None]]:
    """Record a run, after a few on a stream of their own: libraries set themselves up in these."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return out, graph.replay


# Compiled blocks


class CompiledBlock(nn.Module):
    """A block of a table's network that takes its own part of the row.

    So blocks of one kind are alike to the compiler, which then compiles one of them: two or three
    for the whole network.
    """

    def __init__(self, block: nn.Module, columns: slice, backend: str):
        super().__init__()
        self.block, self.columns = block, columns
        self.block.compile(backend=backend, dynamic=False)

    def forward(
        self, x: Tensor, context: Tensor, c: Tensor, attend: Callable[..., Tensor]
    ) -> tuple[Tensor, Tensor]:
        return self.block(x, context, c[:, self.columns], attend)


def compiled_blocks(network: TabledMMDiT, backend: str) -> nn.ModuleList:
    blocks = nn.ModuleList()
    for block in network.joint_blocks:
        streams = {name: block.get_submodule(name) for name in ("context_block", "x_block")}
        own = {name: columns_of(stream) for name, stream in streams.items()}
        start = min(columns.start for columns in own.values())
        stop = max(columns.stop for columns in own.values())
        for name, stream in streams.items():
            moved = Columns(slice(own[name].start - start, own[name].stop - start))
            streams[name] = with_parts(stream, {"adaLN_modulation": moved})
        blocks.append(CompiledBlock(with_parts(block, streams), slice(start, stop), backend))
    return blocks


def columns_of(stream: nn.Module) -> slice:
    columns = stream.get_submodule("adaLN_modulation")
    assert isinstance(columns, Columns)
    return columns.columns
