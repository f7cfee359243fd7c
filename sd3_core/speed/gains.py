"""What makes a run faster or smaller, and whether it acts: one line that says so."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..models import fused

NOT_ASKED = "not asked for"


@dataclass(frozen=True)
class Gain:
    name: str
    active: bool
    note: str = ""  # how far it went; of one that is not active: why


def sentence(gains: Sequence[Gain]) -> str:
    """Speed: modulation table, step cache (7 of 20 ...). Not active: fp8 (not asked for)."""
    active = ", ".join(with_note(gain) for gain in gains if gain.active) or "nothing"
    rest = ", ".join(with_note(gain) for gain in gains if not gain.active)
    return f"Speed: {active}." + (f" Not active: {rest}." if rest else "")


def with_note(gain: Gain) -> str:
    return f"{gain.name} ({gain.note})" if gain.note else gain.name


def asked(name: str, active: bool, note: str = "") -> Gain:
    """One that acts on request alone."""
    return Gain(name, active, note if active else NOT_ASKED)


def fused_kernels(device: torch.device) -> Gain:
    """Of a run whose layers are the core's or have what models/fused.py asks for."""
    why = fused.why_not(device)
    return Gain("fused kernels", not why, why)
