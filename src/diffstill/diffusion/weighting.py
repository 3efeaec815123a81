"""Loss weights per timestep: fixed forms and the pieces of DASH's TIRT curriculum (dash.md 2.3).

A weight is a *loss* weight under uniform timesteps, never a sampling distribution.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .prediction import PredictionType
from .schedule import NoiseSchedule


def base_weights(schedule: NoiseSchedule, form: str, gamma: float = 5.0) -> Tensor:
    """(T,) float64 unnormalised weights of the loss on the network's output.

    ``none``: ones. ``x0``: ``min(snr, gamma)``, what TIRT puts on the epsilon loss (dash.md 6).
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


DistanceWeight = Literal["constant", "snr", "truncated_snr", "v"]


def distance_weights(schedule: NoiseSchedule, kind: PredictionType, form: DistanceWeight) -> Tensor:
    """(T,) float64 weights of the squared error of a network's *output*, for a weight on the clean image's error.

    Salimans & Ho, 2202.00512, section 4: on ``|x0 - x0'|^2`` the weight is 1 (``constant``), snr (``snr``, the error
    of the noise), ``max(snr, 1)`` (``truncated_snr``) or ``1 + snr`` (``v``); the output's error is the clean image's
    times ``alpha / sigma`` for epsilon and ``1 / sigma`` for v_prediction.
    """
    alpha, sigma = schedule.alphas_cumprod, 1 - schedule.alphas_cumprod
    scaled = {
        "constant": sigma,
        "snr": alpha,
        "truncated_snr": torch.maximum(alpha, sigma),
        "v": torch.ones_like(alpha),
    }[form]
    if kind == "v_prediction":
        return scaled
    return scaled / (alpha if kind == "epsilon" else sigma)


def unit_mean(weights: Tensor) -> Tensor:
    """Weights divided by their mean over all timesteps (floor 1e-8)."""
    return weights / weights.mean().clamp(min=1e-8)
