"""How many channels a latent has."""

from ..budgets import Budget
from ..cells import Table
from ..lab import Measurement
from ..measurements import LinearVAE, TrainedVAE
from .claims import Chart, Claim, Row, curve, differences

CHANNELS = (4, 8, 16)
# The paper's table 3, by channels: PSNR in dB, SSIM, FID.
PAPER = {4: (25.12, 0.75, 2.41), 8: (26.40, 0.79, 1.56), 16: (28.62, 0.86, 1.06)}
QUANTITIES = (
    ("psnr", "PSNR", "dB", False),
    ("ssim", "SSIM", "of 1", False),
    ("fid", "FID", "FID", True),
)


def measured(budget: Budget) -> list[Measurement]:
    pictures = budget.pictures
    return [
        *(LinearVAE(channels, pictures) for channels in CHANNELS),
        *(
            TrainedVAE(channels, budget.vae_steps, budget.vae_batch_size, pictures)
            for channels in CHANNELS
        ),
    ]


def claims(budget: Budget, table: Table) -> list[Claim]:
    found = []
    for kind in ("linear code", "VAE"):
        for few, many in zip(CHANNELS, CHANNELS[1:], strict=False):
            for number, (quantity, title, unit, falls) in enumerate(QUANTITIES):
                theirs = PAPER[few][number], PAPER[many][number]
                names = f"{kind}, {many} channels", f"{kind}, {few} channels"
                found.append(
                    Claim(
                        f"{kind}: {many} channels have the better {title} than {few}",
                        f"{theirs[1]:g} against {theirs[0]:g}",
                        unit,
                        differences(table, (names[0], quantity), (names[1], quantity), falls=falls),
                        own=kind != "VAE",  # more components cannot be worse
                    )
                )
    return found


def charts(budget: Budget, table: Table) -> list[Chart]:
    return [
        Chart(
            "latent channels",
            f"{title}, {unit}",
            tuple(
                curve(kind, table, {c: (f"{kind}, {c} channels", quantity) for c in CHANNELS})
                for kind in ("linear code", "VAE")
            ),
        )
        for quantity, title, unit, _ in QUANTITIES
    ]


VAE = Row(
    "vae",
    "Latent channels of the VAE",
    "Factor 8, 64 px, held-out pictures there and back. The linear code is the best there is of "
    "its size (principal components); the VAE learns reconstruction + KL without a discriminator.",
    measured,
    claims,
    charts,
)
