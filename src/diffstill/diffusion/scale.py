"""How a guidance scale is shown to a network that takes it as an input. Its text travels inside model folders."""

from __future__ import annotations

import math

import torch
from torch import Tensor

OCTAVES = 7


def scale_features(scale: Tensor, dim: int, kind: str = "lcm") -> Tensor:
    """Features (B, dim) float32 of guidance scales (B,); a function of ``s - 1``, so purely conditional is the origin.

    ``lcm``: sinusoids of ``1000 (s - 1)`` with frequencies 1 to 1/10000, as latent consistency models have them.
    ``fourier``: sinusoids of ``pi (s - 1) 2^k / 8``, k evenly from 0 to 7: waves of 16 units of the scale to an eighth.
    """
    half = dim // 2
    steps = torch.arange(half, device=scale.device, dtype=torch.float32)
    if kind == "lcm":
        rates = 1000 * torch.exp(-math.log(10000) * steps / max(half - 1, 1))
    else:
        rates = math.pi / 8 * 2.0 ** torch.linspace(0, OCTAVES, half, device=scale.device)
    phase = (scale.float() - 1)[:, None] * rates
    return torch.cat([phase.sin(), phase.cos()], dim=1)
