"""What a model of fewer steps must predict so that its one step does what the teacher does in several."""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion.prediction import target
from ..diffusion.steps import ddim_step, one_step_target
from ..models.denoiser import Denoiser

JUMP = 2
"""Steps that a model for the stochastic sampler goes down at once (guided.md 3)."""


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
    origin, ends, count = _way(teacher, steps, reach)
    ends = ends.to(t.device, non_blocking=True)
    start, end = ends[t + reach], ends[t]
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
    # The student's own levels: a respaced schedule keeps more signal in its noisiest step than the origin's may have.
    alpha, sigma = teacher.schedule.at(t, x.ndim, x.dtype)
    reached = one_step_target(x_t, x, alpha, sigma, *_level(teacher, t - reach, x))
    noise = (x_t - alpha * reached) / sigma
    return target(reached, noise, alpha, sigma, teacher.prediction_type)


def evaluations(teacher: Denoiser, steps: int | None = None, reach: int = 1) -> int:
    """Teacher evaluations an image that ``trajectory_target`` makes."""
    return _way(teacher, steps, reach)[2]


def _way(teacher: Denoiser, steps: int | None, reach: int) -> tuple[Denoiser, Tensor, int]:
    """The model that goes the way, its timesteps from ``reach`` times -1 on, and in how many evaluations it goes."""
    origin, chosen = teacher.origin or (teacher, torch.arange(teacher.schedule.T))
    ends = torch.cat([torch.full((reach,), -1), chosen.cpu()])
    longest = int((ends[reach:] - ends[:-reach]).max())
    return origin, ends, -(-longest // JUMP) if origin.sampler == "stochastic" else min(steps or longest, longest)


def _level(model: Denoiser, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise scale at ``t``, where -1 is the clean image."""
    alpha, sigma = model.schedule.at(t.clamp(min=0), x.ndim, x.dtype)
    clean = (t < 0).view(alpha.shape)
    return torch.where(clean, 1.0, alpha), torch.where(clean, 0.0, sigma)
