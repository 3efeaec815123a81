"""Samplers as plain functions of a prediction function.

Deterministic DDIM (Song et al., 2010.02502, Eq. 12, eta = 0) and the N-step stochastic sampler of guided distillation
(Meng et al., 2210.03142). The pipeline that travels with a model uses schedulers; tests hold the two equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .guidance import GuidanceSchedule
from .prediction import PredictionType, to_epsilon, to_x0
from .schedule import NoiseSchedule
from .steps import noising_kernel

ClipMode = Literal["recompute", "paper", "none"]
"""After clipping x0 to [-1, 1]: recompute eps from it (default, D23), keep the old eps (as released), or no clip."""
SamplerName = Literal["ddim", "stochastic", "encode", "renoise"]
ALL_STEPS: tuple[SamplerName, ...] = ("stochastic", "renoise")
"""Samplers of random steps, whose models are sampled in all of them or not at all."""

Predict = Callable[[Tensor, Tensor, float], Tensor]
"""``(x_t, t, scale) -> prediction`` guided at that scale; t is (B,) int64."""
Noise = Callable[[], Tensor]
"""Fresh standard-normal noise of the images' shape, another at each call."""


def ddim_timesteps(T: int, steps: int) -> list[int]:
    """Leading spacing, descending: 980, 960, ..., 0 for T=1000 and 50 steps.

    Raises:
        ValueError: unless ``1 <= steps <= T``.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps {steps} must lie in 1..{T}")
    stride = T // steps
    return [i * stride for i in range(steps)][::-1]


NEAR_THE_END = 0.85
"""Share of a schedule that evenly spaced steps have to span."""


def reaches_noise(T: int, steps: int) -> bool:
    """Whether ``ddim_timesteps`` begins near the noisy end. Where ``steps`` does not divide T the remainder is left out
    there, and pure noise would be taken for an image of much less noise: 50 steps of 96 begin at 49."""
    stride = T // steps
    return T == 1 or (steps > 1 and (steps - 1) * stride >= NEAR_THE_END * (T - stride))


def usual_steps(T: int, most: int = 50) -> int:
    """``most``, or all of a model that has fewer or whose noisy end so many steps would leave out."""
    return most if most < T and reaches_noise(T, most) else T


def steps_mend(T: int, steps: int) -> str | None:
    """What to do instead of sampling T timesteps in ``steps`` evenly spaced ones; None where that is fine."""
    if not 1 <= steps <= T:
        return f"use 1..{T}, the length of the model's schedule"
    if reaches_noise(T, steps):
        return None
    near = [next((n for n in way if reaches_noise(T, n)), None) for way in (range(steps, 1, -1), range(steps, T + 1))]
    known = " or ".join(str(n) for n in near if n)
    begin = (steps - 1) * (T // steps)
    return f"use {known}: {steps} evenly spaced steps of {T} start at {begin}, where images are not yet noise"


def level(schedule: NoiseSchedule, t: int) -> tuple[float, float]:
    """``(alpha, sigma)`` at timestep ``t``, where -1 is the clean image."""
    abar = float(schedule.alphas_cumprod[t]) if t >= 0 else 1.0
    return abar**0.5, (1 - abar) ** 0.5


def estimate(
    prediction: Tensor, x: Tensor, t: int, schedule: NoiseSchedule, kind: PredictionType, clip: ClipMode
) -> tuple[Tensor, Tensor]:
    """``(x0, eps)`` that a raw prediction at timestep ``t`` implies, clipped as asked."""
    alpha, sigma = schedule.at(torch.full((1,), t, device=x.device), x.ndim, x.dtype)
    x0 = to_x0(prediction, x, alpha, sigma, kind)
    eps = to_epsilon(prediction, x, alpha, sigma, kind)
    if clip != "none":
        x0 = x0.clamp(-1, 1)
    if clip == "recompute":
        eps = to_epsilon(x0, x, alpha, sigma, "sample")
    return x0, eps


def ddim_sample(
    predict: Predict,
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

    Args:
        timesteps: descending, instead of evenly spaced ones; ``noise`` then is an image at the first one's noise level.
    """
    x = noise
    stamps = list(timesteps) if timesteps is not None else ddim_timesteps(schedule.T, steps)
    # Evenly spaced steps go back by T // steps, as diffusers' do; for those from 0 on that is to the next one.
    before = [*stamps[1:], -1] if timesteps is not None else [t - schedule.T // steps for t in stamps]
    for t, u in zip(stamps, before, strict=True):
        stamp = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        prediction = predict(x, stamp, guidance(t, schedule.T))
        x0, eps = estimate(prediction, x, t, schedule, prediction_type, clip)
        alpha, sigma = level(schedule, u)
        x = alpha * x0 + sigma * eps
    return x


def stochastic_sample(
    predict: Predict,
    noise: Tensor,
    schedule: NoiseSchedule,
    guidance: GuidanceSchedule,
    fresh: Noise,
    *,
    prediction_type: PredictionType = "epsilon",
    clip: ClipMode = "recompute",
) -> Tensor:
    """Images from ``noise`` by two steps down and one back up, over all of the schedule's steps (guided.md 3).

    For models that were trained for jumps of two steps; T evaluations, T - 1 fresh noises.
    """
    x = noise
    for t in reversed(range(schedule.T)):
        stamp = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        prediction = predict(x, stamp, guidance(t, schedule.T))
        x0, eps = estimate(prediction, x, t, schedule, prediction_type, clip)
        lower = level(schedule, max(t - 2, -1))
        x = lower[0] * x0 + lower[1] * eps
        if t > 0:
            factor, spread = noising_kernel(*lower, *level(schedule, t - 1))
            x = factor * x + spread * fresh()
    return x


def renoise_sample(
    predict: Predict,
    noise: Tensor,
    schedule: NoiseSchedule,
    fresh: Noise,
    *,
    prediction_type: PredictionType = "epsilon",
    last: int = 0,
    gradient_from: int | None = None,
) -> Tensor:
    """Images (B, ...) by clean estimates with fresh noise between them, over all of the schedule's steps (unidad.md
    2.3): training's unroll and the sampling of few-step generators alike. Nothing is clipped; T evaluations.

    Args:
        noise: standard-normal; scaled to the first step's noise level.
        last: the step whose clean estimate is given; 0 is the end of the chain.
        gradient_from: steps noisier than this one are taken without gradient; None: the caller's mode for all.
    """
    x = level(schedule, schedule.T - 1)[1] * noise
    for t in reversed(range(last, schedule.T)):
        stamp = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        tracked = torch.is_grad_enabled() and (gradient_from is None or t <= gradient_from)
        with torch.set_grad_enabled(tracked):
            x0, _ = estimate(predict(x, stamp, 1.0), x, t, schedule, prediction_type, "none")
            if t > last:
                alpha, sigma = level(schedule, t - 1)
                x = alpha * x0 + sigma * fresh()
    return x0


def ddim_encode(
    predict: Predict,
    images: Tensor,
    schedule: NoiseSchedule,
    guidance: GuidanceSchedule,
    *,
    timesteps: Sequence[int],
    prediction_type: PredictionType = "epsilon",
) -> Tensor:
    """DDIM run backwards: the noise (B, ...) that deterministic sampling would turn into ``images`` (DDIB, 2203.08382).

    Args:
        timesteps: ascending; the noise levels that the image passes through. The clean image itself is shown to the
            network as timestep 0. Nothing is clipped.
    """
    x = images
    for t, u in pairwise([-1, *timesteps]):
        stamp = torch.full((len(x),), max(t, 0), dtype=torch.int64, device=x.device)
        prediction = predict(x, stamp, guidance(int(stamp[0]), schedule.T))
        _, eps = estimate(prediction, x, int(stamp[0]), schedule, prediction_type, "none")
        (alpha, sigma), (up_alpha, up_sigma) = level(schedule, t), level(schedule, u)
        x = up_alpha * (x - sigma * eps) / alpha + up_sigma * eps
    return x


def count_nfe(guidance: GuidanceSchedule, T: int, steps: int, *, one_pass: bool = False) -> int:
    """Network evaluations per image: a guided step counts two, a step at s = 1 one.

    ``one_pass``: of a model that takes the scale as an input, or has no scale at all; every step counts one.
    """
    return sum(1 if one_pass or guidance(t, T) == 1.0 else 2 for t in ddim_timesteps(T, steps))


def image_noise(
    shape: tuple[int, ...], seed: int, first: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard-normal noise (count, *shape) float32 for images ``first .. first+count-1`` of stream ``seed``.

    Each image has its own generator, so image i is the same for any batch size, on any number of processes.
    """
    return noise_source(shape, seed, first, count, device)()


def noise_source(
    shape: tuple[int, ...], seed: int, first: int, count: int, device: torch.device | str = "cpu"
) -> Noise:
    """Successive noises (count, *shape) of the same images, each image from its own generator; see ``image_noise``."""
    seeds = [(seed * 1_000_003 + index) % (2**63) for index in range(first, first + count)]
    generators = [torch.Generator("cpu").manual_seed(number) for number in seeds]

    def draw() -> Tensor:
        rows = [torch.randn(shape, generator=generator) for generator in generators]
        return torch.stack(rows).to(device) if rows else torch.empty((0, *shape), device=device)

    return draw
