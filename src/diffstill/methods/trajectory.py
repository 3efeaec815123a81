"""What a model of fewer steps must predict so that its one step does what the teacher does in several."""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion.prediction import target
from ..diffusion.steps import ddim_step, one_step_target
from ..models.denoiser import Denoiser

JUMP = 2
"""Steps that a model for the stochastic sampler goes down at once (guided.md 4)."""


def trajectory_target(
    teacher: Denoiser,
    x_t: Tensor,
    t: Tensor,
    labels: Tensor,
    steps: int | None = None,
    *,
    reach: int = 1,
    scale: Tensor | None = None,
) -> Tensor:
    """The prediction at ``x_t`` whose one step lands where the teacher's own steps lead (Salimans & Ho, 2202.00512).

    The way goes from timestep ``indices[t]`` to ``indices[t - reach]`` (the clean image below the first) by
    deterministic DDIM; nothing is clipped. A teacher made for the stochastic sampler goes in its own jumps of two.

    Args:
        teacher: a respaced teacher (``Denoiser.respaced``); one that is not has single steps.
        x_t: (B, C, H, W); t: (B,) int64, steps of the respaced schedule; labels: (B,), the null label too.
        steps: teacher evaluations on the way at most, evenly spread; None: at all of its steps.
        reach: steps of the respaced schedule that the one step makes.
        scale: (B,) guidance scale at which the teacher goes; None: its plain prediction for the label.

    Returns:
        (B, C, H, W) in the teacher's prediction type.
    """
    whole = torch.arange(teacher.schedule.T, device=t.device)
    origin, chosen = teacher.origin or (teacher, whole)
    ends = torch.cat([whole.new_full((reach,), -1), chosen.to(t.device)])
    start, end = ends[t + reach], ends[t]
    longest = int((ends[reach:] - ends[:-reach]).max())
    count = -(-longest // JUMP) if origin.sampler == "stochastic" else min(steps or longest, longest)
    x, at = x_t, start
    for number in range(1, count + 1):
        if origin.sampler == "stochastic":  # shorter ways wait, so that every step made is a whole jump
            following = torch.minimum(start, end + JUMP * (count - number))
        else:
            following = start - (start - end) * number // count
        alpha, sigma = origin.schedule.at(at, x.ndim, x.dtype)
        out = origin(x, at, labels) if scale is None else origin.guided(x, at, labels, scale)
        x = ddim_step(origin.x0(out, x, at), x, alpha, sigma, *_level(origin, following, x))
        at = following
    alpha, sigma = origin.schedule.at(start, x.ndim, x.dtype)
    reached = one_step_target(x_t, x, alpha, sigma, *_level(origin, end, x))
    noise = (x_t - alpha * reached) / sigma
    return target(reached, noise, alpha, sigma, teacher.prediction_type)


def _level(model: Denoiser, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise scale at ``t``, where -1 is the clean image."""
    alpha, sigma = model.schedule.at(t.clamp(min=0), x.ndim, x.dtype)
    clean = (t < 0).view(alpha.shape)
    return torch.where(clean, 1.0, alpha), torch.where(clean, 0.0, sigma)
