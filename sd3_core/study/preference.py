"""DPO on an arm: the checker decides between two pictures of a prompt.

In latent space, so that nothing is decoded twice.  Wallace et al. 2023 (arXiv:2311.12908) with the
flow's loss; the LoRA is on all linear layers of attention and MLP.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import lora
from ..checkpoints.lora_files import save_lora
from ..conditioning import Conditioning
from ..training.batches import generator
from ..training.config import LoopConfig
from ..training.loop import Losses
from ..training.objectives import RectifiedFlow
from ..training.optimizers import Parameters
from ..training.preference import PairErrors, diffusion_dpo_loss
from .arms import Network

RANK = 16
BETA = 1000.0


class PairsTask:
    """Lower the winner's error against the untrained network's, and raise the loser's.

    winners, losers: [N, C, h, w]; conditioning: of N prompts.
    """

    product = "lora"

    def __init__(
        self,
        network: Network,
        winners: Tensor,
        losers: Tensor,
        conditioning: Conditioning,
        config: LoopConfig,
    ):
        self.network, self.config = network, config
        self.winners, self.losers, self.conditioning = winners, losers, conditioning
        self.objective = RectifiedFlow()
        draws = generator(config.seed, "lora")
        self.adapters = lora.add(network.model, rank=RANK, generator=draws).to(network.device)
        self.parameters: Parameters = dict(self.adapters.named_parameters())

    def loss(self, step: int, rows: range, size: int) -> Losses:
        draws, count = generator(self.config.seed, step, rows.start, "pairs"), len(rows)
        places = torch.randint(len(self.winners), (count,), generator=draws)
        noise = torch.randn(self.winners[places].shape, generator=draws)
        t = self.objective.draw(torch.rand(count, generator=draws))
        with torch.no_grad(), lora.disabled(self.network.model):
            reference = self._errors(places, noise, t)
        seen = diffusion_dpo_loss(self._errors(places, noise, t), reference, BETA)
        logs = {"accuracy": seen.accuracy, "winner_gap": seen.winner_gap, "margin": seen.margin}
        return Losses(seen.loss, logs)

    def _errors(self, places: Tensor, noise: Tensor, t: Tensor) -> PairErrors:
        device, given = self.network.device, self.conditioning
        prompts = Conditioning(given.context[places], given.pooled[places])
        x0 = torch.cat([self.winners[places], self.losers[places]])
        each = self.objective.loss(
            self.network.predict(prompts.repeat(2)),
            x0.to(device),
            noise.repeat(2, 1, 1, 1).to(device),
            t.repeat(2),
        )
        return PairErrors(*each.chunk(2))

    def validate(self) -> Mapping[str, float]:
        return {}

    def sample(self, folder: Path, step: int) -> None:
        """Nothing to see on the way."""

    def export(self, path: Path, step: int) -> Path:
        parts = {"mmdit": self.adapters.lora()}
        return save_lora(path, parts, "comfy", {"sd3_workbench.step": str(step)})
