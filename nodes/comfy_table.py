"""The modulation table under ComfyUI's samplers: KSampler, SD3 Sample and whatever else samples.

ComfyUI tells a network its noise levels beforehand ("sample_sigmas") and names each prompt of a run
("uuids").  The table holds for one state of the weights; where patches may change them within a
run, the network computes its modulations in every step as before.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor, nn

from ..sd3_core.models.mmdit import MMDiT
from ..sd3_core.speed.fp8 import in_float8
from ..sd3_core.speed.modulation import ModulationTable, TabledMMDiT, is_tabled, with_parts
from ._compat import weights_of

WEIGHTS = "sd3_weights"  # in transformer_options: weights_in_force
RUN = "sd3_run"  # in transformer_options during a run: comfy_speed.Run
LOOKED_UP = "sd3_looked_up"  # in transformer_options: the network to call, and rows of its table
LEVELS = "sd3_levels"  # there, too, for a run in parts: the noise levels of all of them


def weights_in_force(patcher: Any) -> Any:
    """What tells one state of a MODEL's weights from another; None where no run is sure of one."""
    return None if patcher is None or obstacle(patcher) else patcher.patches_uuid


def obstacle(patcher: Any) -> str:
    """Why a MODEL computes its modulations in every step; empty where it need not."""
    if patcher.current_hooks is not None:
        return "hooks may change its weights within a run"
    if getattr(patcher, "injections", {}):
        return "a node injects code into its layers"
    if any(name.startswith("diffusion_model") for name in patcher.object_patches):
        return "a node exchanges its layers"
    return ""


class LookedUp(TabledMMDiT):
    """It takes rows of the table, looked up before it is called.

    So that torch.compile sees no look-up: for each noise level it would compile the network anew.
    """

    def time_and_text(self, timestep: Tensor, pooled: Tensor, dtype: torch.dtype) -> Tensor:
        """pooled: rows [B, width], of this dtype."""
        return pooled


class Tabled:
    """A network with the table of one state of its weights, through one run after the other."""

    def __init__(self, model: MMDiT, state: tuple[Any, torch.device, torch.dtype]):
        """state: what the table holds for: weights, and where and in what it computes."""
        self.state = state
        table = ModulationTable(model, [], *state[1:], call=called_plainly)
        self.network = LookedUp(table)
        self.sigmas: Tensor | None = None
        self.numbers: dict[Any, list[int]] = {}  # uuid -> its prompts in the table
        self.calls = 0  # of the network, so far
        self.float8: nn.Module | None = None  # the network in float8, once that was asked for

    def network_of(self, run: Any) -> MMDiT:
        """The network to call in this run (comfy_speed.Run), which is told that it is called."""
        network: Any = self.network
        if run is None:
            return network
        run.tabled += 1
        if not run.asked.fp8 or run.plain:
            return network
        run.in_float8 += 1
        if self.float8 is None:
            blocks = in_float8(
                network.joint_blocks, partial(weights_of, like=self.network.table.values)
            )
            self.float8 = with_parts(network, {"joint_blocks": blocks})
        return self.float8  # pyright: ignore[reportReturnType]

    def begin(self, sigmas: Tensor, timesteps: Callable[[], list[float]]) -> None:
        """A run over these noise levels, if it is another one; timesteps: of its steps."""
        if self.sigmas is not sigmas:
            self.sigmas, self.numbers = sigmas, {}
            self.network.table.begin(timesteps())

    def rows(self, timesteps: list[float], pooled: Tensor, uuids: list[Any]) -> Tensor:
        """timesteps [B]; pooled [B, Dp], an equal share for each uuid -> rows [B, width]."""
        numbers: list[int] = []
        for uuid, own in zip(uuids, pooled.chunk(len(uuids)), strict=True):
            if len(self.numbers.get(uuid, ())) != len(own):
                self.numbers[uuid] = self.network.table.number(own)
            numbers += self.numbers[uuid]
        batch = list(zip(timesteps, numbers, strict=True))
        return self.network.table.look_up(batch, self.network.table.values.dtype)


def called_plainly(layer: nn.Module, x: Tensor) -> Tensor:
    """ComfyUI's layers bring their own weights, with patches, wherever these are kept."""
    return layer(x)


def looked_up(
    model: Any,
    x: Tensor,
    sigma: Tensor,
    pooled: Tensor | None,
    dtype: torch.dtype,
    options: Mapping[str, Any],
) -> tuple[MMDiT, Tensor] | None:
    """The network to call, and what it takes for `pooled`; None where no table will do.

    model: a BaseModel.  x [B, C, H, W]; sigma [B]; pooled [B, Dp].  dtype: of the computation.
    """
    weights, sigmas, uuids = (options.get(key) for key in (WEIGHTS, "sample_sigmas", "uuids"))
    whole = options.get(LEVELS)
    if weights is None or sigmas is None or not uuids or pooled is None or torch.is_grad_enabled():
        return None
    network = getattr(model.diffusion_model, "_orig_mod", model.diffusion_model)  # torch.compile's
    state = (weights, x.device, dtype)
    tabled: Tabled | None = network.tabled
    if tabled is None or tabled.state != state:
        tabled = network.tabled = Tabled(network, state)
    run = options.get(RUN)

    def timesteps(levels: Tensor) -> list[float]:
        return model.model_sampling.timestep(levels).float().tolist()

    if whole is not None:
        sigmas, steps = whole, whole[:-1]
    else:
        steps = sigmas[:-1] if run is None else torch.tensor(run.levels.steps)
    tabled.begin(sigmas, partial(timesteps, steps))
    tabled.calls += 1
    level = None if run is None else run.levels.believe(sigma)
    here = timesteps(sigma if level is None else torch.full(sigma.shape, level))
    return tabled.network_of(run), tabled.rows(here, pooled, uuids)


def forget_table(patcher: Any, leaves: bool = True) -> None:
    """When the model leaves the device; before each run it is detached only to be loaded again."""
    if leaves:
        patcher.model.diffusion_model.tabled = None


class LoadList(list[Any]):
    """ComfyUI's list of a model's layers, sorted largest first to load, smallest first to unload.

    Here what a table stands in for is loaded last and unloaded first.
    """

    def sort(self, *, key: None = None, reverse: bool = False) -> None:  # pyright: ignore
        super().sort(key=lambda entry: (not is_tabled(name_in(entry)), *entry), reverse=reverse)


def name_in(entry: tuple[Any, ...]) -> str:
    """The layer's name, from the network on; versions of ComfyUI put it in different places."""
    name = next(item for item in entry if isinstance(item, str))
    return name.removeprefix("diffusion_model.")


class TabledPatcher(comfy.model_patcher.ModelPatcher):
    """Without dynamic VRAM: when memory is short, the modulations' third leaves first."""

    def _load_list(self, *arguments: Any, **named: Any) -> LoadList:
        return LoadList(super()._load_list(*arguments, **named))
