"""Images taken part of the way to noise and back, or drawn anew where they are masked, by deterministic DDIM.

Plain functions of a prediction function, as the samplers are. Encoding to noise is ``sampling.ddim_encode``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .guidance import GuidanceSchedule
from .prediction import PredictionType
from .sampling import ClipMode, Noise, Predict, ddim_sample, estimate, level
from .schedule import NoiseSchedule
from .steps import noising_kernel


def noise_to(images: Tensor, noise: Tensor, schedule: NoiseSchedule, t: int) -> Tensor:
    """``alpha_t images + sigma_t noise`` (B, ...); at t = -1 the images themselves."""
    alpha, sigma = level(schedule, t)
    return alpha * images + sigma * noise


def last_steps(timesteps: Sequence[int], strength: float) -> list[int]:
    """The last ``round(strength * N)`` of N descending timesteps: those that are left to go from an edited image.

    Raises:
        ValueError: unless ``0 <= strength <= 1``.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength} must lie in 0..1")
    return list(timesteps[len(timesteps) - round(strength * len(timesteps)) :])


def partly_noised(
    images: Tensor, noise: Tensor, schedule: NoiseSchedule, timesteps: Sequence[int], strength: float
) -> Tensor:
    """``images`` (B, ...) at the noise level from which ``last_steps`` are left to go.

    At strength 0 that is the images, at strength 1 the noise: nothing of the image is left, as in sampling.
    """
    left = last_steps(timesteps, strength)
    if len(left) == len(timesteps):
        return noise
    return noise_to(images, noise, schedule, left[0] if left else -1)


def img2img_sample(
    predict: Predict,
    images: Tensor,
    noise: Tensor,
    schedule: NoiseSchedule,
    guidance: GuidanceSchedule,
    *,
    timesteps: Sequence[int],
    strength: float,
    prediction_type: PredictionType = "epsilon",
    clip: ClipMode = "recompute",
) -> Tensor:
    """``images`` (B, ...) noised to an intermediate level and denoised again (SDEdit, 2108.01073, deterministic).

    Args:
        timesteps: descending, of a whole sampling run.
        strength: the share of them that is gone through: 0 gives the images back, 1 is sampling from ``noise``.
    """
    left = last_steps(timesteps, strength)
    if not left:
        return images
    start = partly_noised(images, noise, schedule, timesteps, strength)
    return ddim_sample(predict, start, schedule, guidance, timesteps=left, prediction_type=prediction_type, clip=clip)


def inpaint_sample(
    predict: Predict,
    images: Tensor,
    masked: Tensor,
    fresh: Noise,
    schedule: NoiseSchedule,
    guidance: GuidanceSchedule,
    *,
    timesteps: Sequence[int],
    prediction_type: PredictionType = "epsilon",
    clip: ClipMode = "recompute",
    resample: int = 1,
) -> Tensor:
    """``images`` (B, ...) with their masked part drawn anew; the other pixels come back bit for bit.

    Before every step the known part is put in at that noise level, with one noise for an image throughout, so that it
    walks the straight way of a deterministic sampler that knows the image. With ``resample`` R > 1 each step but the
    last is taken R times, going back up with fresh noise in between (RePaint, 2201.09865, Algorithm 1): the drawn part
    then hears more of the known one, at R times the cost.

    Args:
        masked: bool, broadcasts against the images; True where they are drawn anew.
        fresh: the start noise, and the noise of the known part, at its first call; that of the returns at later ones.
        timesteps: descending.
    """
    noise = fresh()
    x = noise
    for t, u in pairwise([*timesteps, -1]):
        known, here, below = noise_to(images, noise, schedule, t), level(schedule, t), level(schedule, u)
        stamp = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        for turn in range(resample if u >= 0 else 1):
            if turn:
                factor, spread = noising_kernel(*below, *here)
                x = factor * x + spread * fresh()
            x = torch.where(masked, x, known)
            prediction = predict(x, stamp, guidance(t, schedule.T))
            x0, eps = estimate(prediction, x, t, schedule, prediction_type, clip)
            x = below[0] * x0 + below[1] * eps
    return torch.where(masked, x, images)
