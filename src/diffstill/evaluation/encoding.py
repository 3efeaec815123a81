"""From images to the noise they would be drawn from, and how well that noise gives them back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.dataset import ImageData, to_float
from ..diffusion.guidance import Constant, GuidanceSchedule
from ..diffusion.sampling import ALL_STEPS, ClipMode, ddim_encode, ddim_sample, estimate, level
from ..diffusion.schedule import spaced_indices
from ..errors import InputError
from ..models.denoiser import Denoiser
from .intervals import mean_interval
from .results import Encoding

FINE = 50
"""Steps of the decoder that turns noise back into images."""


def encode(
    denoiser: Denoiser, images: Tensor, labels: Tensor, guidance: GuidanceSchedule, *, steps: int | None = None
) -> Tensor:
    """Noise (B, C, H, W) of images (B, C, H, W) in [-1, 1] of classes (B,): deterministic sampling run backwards.

    Args:
        steps: of a model that draws images, evenly spaced up to its noisiest timestep; None: all, at most 50. An
            encoder takes its own.

    Raises:
        InputError: a model for the stochastic sampler, other steps than an encoder's, more than the schedule has.
    """
    T = denoiser.schedule.T

    def predict(x: Tensor, t: Tensor, scale: float) -> Tensor:
        return denoiser.guided(x, t, labels, scale)

    if denoiser.sampler in ALL_STEPS:
        mend = "use a model for deterministic sampling"
        problem = f"is made for the {denoiser.sampler} sampler and cannot encode"
        raise InputError("model", "this one", mend, problem=problem)
    if denoiser.sampler == "encode":
        if steps not in (None, T):
            raise InputError("steps", steps, f"use {T}: an encoder takes all its steps")
        return _encode_by_own_steps(denoiser, images, labels, guidance)
    try:
        stamps = spaced_indices(T, steps or min(FINE, T), "trailing")
    except ValueError as error:
        raise InputError("steps", steps, str(error)) from None
    return ddim_encode(
        predict, images, denoiser.schedule, guidance, timesteps=stamps, prediction_type=denoiser.prediction_type
    )


def _encode_by_own_steps(denoiser: Denoiser, images: Tensor, labels: Tensor, guidance: GuidanceSchedule) -> Tensor:
    assert denoiser.end is not None
    x, schedule = images, denoiser.schedule
    for t in range(schedule.T):
        stamp = torch.full_like(labels, t)
        out = denoiser.guided(x, stamp, labels, guidance(t, schedule.T))
        x0, eps = estimate(out, x, t, schedule, denoiser.prediction_type, "none")
        last = t + 1 == schedule.T
        alpha, sigma = map(float, denoiser.end) if last else level(schedule, t + 1)
        x = alpha * x0 + sigma * eps
    return x


def decode(
    denoiser: Denoiser,
    noise: Tensor,
    labels: Tensor,
    guidance: GuidanceSchedule,
    *,
    steps: int = FINE,
    clip: ClipMode = "recompute",
) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] that deterministic sampling over evenly spaced steps makes of noise."""
    T = denoiser.schedule.T
    return ddim_sample(
        lambda x, t, s: denoiser.guided(x, t, labels, s),
        noise,
        denoiser.schedule,
        guidance,
        prediction_type=denoiser.prediction_type,
        clip=clip,
        timesteps=spaced_indices(T, min(steps, T), "trailing")[::-1],
    )


def measure_encoding(encoder: Denoiser, decoder: Denoiser, data: ImageData, *, batch_size: int = 256) -> Encoding:
    """Encodes every image of a split, decodes the noise with the first model's many steps, and compares.

    Beside it the decoder's own inversion in as many steps and in its many ones.
    """
    kept: dict[str, list[Tensor]] = {"own": [], "coarse": [], "fine": [], "noise": [], "distance": []}
    one = Constant(1.0)
    with encoder.evaluating(), decoder.evaluating():
        for start in range(0, len(data), batch_size):
            x = to_float(data.images[start : start + batch_size].to(decoder.device))
            labels = data.labels[start : start + batch_size].to(decoder.device)
            noises = {
                "own": encode(encoder, x, labels, one),
                "coarse": encode(decoder, x, labels, one, steps=encoder.schedule.T),
                "fine": encode(decoder, x, labels, one),
            }
            for name, noise in noises.items():
                back = decode(decoder, noise, labels, one)
                kept[name].append((back - x).square().flatten(1).mean(1).cpu())
            kept["noise"].append(noises["own"].flatten(1).cpu())
            kept["distance"].append((noises["own"] - noises["fine"]).square().flatten(1).mean(1).cpu())
    found = {name: torch.cat(parts).double() for name, parts in kept.items()}
    return Encoding(
        steps=encoder.schedule.T,
        images=len(data),
        error=mean_interval(found["own"]),
        coarse_error=mean_interval(found["coarse"]),
        fine_error=mean_interval(found["fine"]),
        noise_mean=float(found["noise"].mean()),
        noise_std=float(found["noise"].std()),
        noise_error=mean_interval(found["distance"]),
    )
