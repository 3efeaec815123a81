"""Loss weights per timestep: fixed forms and the pieces of DASH's TIRT curriculum (dash.md 2.3).

A weight is a *loss* weight under uniform timesteps, never a sampling distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .schedule import NoiseSchedule


def base_weights(schedule: NoiseSchedule, form: str, gamma: float = 5.0) -> Tensor:
    """(T,) float64 unnormalised weights of the loss on the network's output.

    ``none``: ones. ``x0``: ``min(snr, gamma)``, what TIRT puts on the epsilon loss (trap (a)).
    ``eps``: ``min(snr, gamma) / snr``, the standard Min-SNR-gamma (2303.09556) for epsilon prediction.
    ``v``: ``min(snr, gamma) / (snr + 1)``, its form for a v-prediction loss.
    """
    if form == "none":
        return torch.ones(schedule.T, dtype=torch.float64)
    if form == "x0":
        return schedule.snr.clamp(max=gamma)
    if form == "eps":
        return schedule.snr.clamp(max=gamma) / schedule.snr
    if form == "v":
        return schedule.snr.clamp(max=gamma) / (schedule.snr + 1)
    raise ValueError(f"unknown weight form {form!r}; one of none, x0, eps, v")


def unit_mean(weights: Tensor) -> Tensor:
    """Weights divided by their mean over all timesteps (floor 1e-8)."""
    return weights / weights.mean().clamp(min=1e-8)
