"""Samplers as plain functions of a prediction function. Deterministic DDIM (Song et al., 2010.02502, Eq. 12, eta = 0).

The pipeline that travels with a model uses the stock ``DDIMScheduler``; a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .guidance import GuidanceSchedule, guide
from .prediction import PredictionType, to_epsilon, to_x0
from .schedule import NoiseSchedule

ClipMode = Literal["recompute", "paper", "none"]
"""After clipping x0 to [-1, 1]: recompute eps from it (default, D23), keep the old eps (as released), or no clip."""

Branches = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(x_t, t) -> (cond, null)`` predictions; t is (B,) int64."""
Conditional = Callable[[Tensor, Tensor], Tensor]
"""``(x_t, t) -> cond`` prediction alone."""


def ddim_timesteps(T: int, steps: int) -> list[int]:
    """Leading spacing, descending: 980, 960, ..., 0 for T=1000 and 50 steps.

    Raises:
        ValueError: unless ``1 <= steps <= T``.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps {steps} must lie in 1..{T}")
    stride = T // steps
    return [i * stride for i in range(steps)][::-1]


def ddim_sample(
    conditional: Conditional,
    branches: Branches,
    noise: Tensor,
    schedule: NoiseSchedule,
    guidance: GuidanceSchedule,
    *,
    steps: int = 50,
    prediction_type: PredictionType = "epsilon",
    clip: ClipMode = "recompute",
    timesteps: Sequence[int] | None = None,
) -> Tensor:
    """Images (B, ...) from standard-normal ``noise`` (B, ...); in [-1, 1] unless ``clip='none'``.

    Where the scale is exactly 1 the null pass is skipped (the result is the same; NFE counts one).
    """
    x = noise
    stamps = list(timesteps) if timesteps is not None else ddim_timesteps(schedule.T, steps)
    stride = schedule.T // steps
    abar = schedule.alphas_cumprod
    for i, t in enumerate(stamps):
        stamp = torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device)
        scale = guidance(t, schedule.T)
        if scale == 1.0:
            out = conditional(x, stamp)
        else:
            out = guide(*branches(x, stamp), scale)
        alpha, sigma = schedule.at(stamp, x.ndim, x.dtype)
        x0 = to_x0(out, x, alpha, sigma, prediction_type)
        eps = to_epsilon(out, x, alpha, sigma, prediction_type)
        if clip != "none":
            x0 = x0.clamp(-1, 1)
        if clip == "recompute":
            eps = to_epsilon(x0, x, alpha, sigma, "sample")
        before = (stamps[i + 1] if i + 1 < len(stamps) else -1) if timesteps is not None else t - stride
        prev = float(abar[before]) if before >= 0 else 1.0
        x = prev**0.5 * x0 + (1 - prev) ** 0.5 * eps
    return x


def count_nfe(guidance: GuidanceSchedule, T: int, steps: int) -> int:
    """Network evaluations per image: a guided step counts two, a step at s = 1 one."""
    return sum(1 if guidance(t, T) == 1.0 else 2 for t in ddim_timesteps(T, steps))


def image_noise(
    shape: tuple[int, ...], seed: int, first: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard-normal noise (count, *shape) float32 for images ``first .. first+count-1`` of stream ``seed``.

    Each image has its own generator, so image i is the same for any batch size, on any number of processes.
    """
    rows = []
    for index in range(first, first + count):
        generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + index) % (2**63))
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows).to(device) if rows else torch.empty((0, *shape), device=device)
