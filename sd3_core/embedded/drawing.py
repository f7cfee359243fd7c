"""Many prompts at once, drawn as `generate` draws one: for the score and for sample pictures."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..conditioning import Conditioning
from ..generate import decode, denoiser, sample_with, step_cache, text_encoders
from ..models.mmdit import MMDiT
from ..settings import Files, Settings, make_plan


class Painter:
    """Prompts and a seed -> pictures, with the networks of these files, each read once.

    settings: all but prompt, seed and batch; what is open the model's preset decides, as for
    `generate`.  Raises CheckpointError and ValueError as make_plan does.
    """

    def __init__(self, files: Files, settings: Settings | None = None, model: MMDiT | None = None):
        self.settings = settings or Settings(prompt="")
        self.files = files
        self.plan = make_plan(files, self.settings)
        self.encoders = text_encoders(files, self.plan)
        self.model = model or denoiser(self.plan)
        self.known: dict[str, Conditioning] = {}

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], seed: int) -> Tensor:
        """[B, 3, H, W] in -1..1; each picture has its own part of the seed's noise."""
        settings = replace(self.settings, seed=seed, batch=len(prompts))
        plan = make_plan(self.files, settings)
        positive = Conditioning.cat([self._read(prompt) for prompt in prompts])
        start = torch.zeros(plan.latent_shape, device=plan.device)
        negative = self._read(settings.negative)
        x0 = sample_with(self.model, plan, positive, negative, start, cache=step_cache(plan))
        return decode(plan, x0).cpu()

    def _read(self, prompt: str) -> Conditioning:
        if prompt not in self.known:
            wanted = self.plan.settings
            read = self.encoders.encode(prompt, use=wanted.use, t5_length=wanted.t5_length)
            self.known[prompt] = read.conditioning
        return self.known[prompt]
