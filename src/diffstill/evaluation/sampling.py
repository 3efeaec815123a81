"""Images from a model, each one a pure function of (seed, index): equal for any batch size and number of processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..data.dataset import to_uint8
from ..diffusion.guidance import Constant, GuidanceSchedule
from ..diffusion.sampling import (
    ALL_STEPS,
    ClipMode,
    Noise,
    ddim_sample,
    noise_source,
    renoise_sample,
    stochastic_sample,
)
from ..errors import InputError
from ..models.denoiser import Denoiser


def sample_images(
    denoiser: Denoiser,
    count: int,
    *,
    guidance: GuidanceSchedule,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 256,
    clip: ClipMode = "recompute",
    labels: Tensor | None = None,
    first: int = 0,
    guided: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Images ``first .. first + count - 1`` of stream ``seed``, (count, C, H, W) uint8 on the CPU.

    The network is evaluated in eval mode without gradients and put back into its former mode. A model that outputs
    NaN gives mid-grey pixels: it is measured as bad, not hidden.

    Args:
        guidance: the guidance scale, constant or by timestep; ignored where ``guided`` is False.
        labels: (count,) int64 in 0..num_classes-1; None gives image i the class ``i mod num_classes``.
        guided: False for students without a null branch, which are sampled in one pass at scale 1.
        progress: called with the number of images done, after each batch.

    Raises:
        InputError: labels of a wrong number or out of range, or more steps than the schedule has.
    """
    if not 1 <= steps <= denoiser.schedule.T:
        raise InputError("steps", steps, f"use 1..{denoiser.schedule.T}, the length of the model's schedule")
    labels = _labels(denoiser, first, count, labels)
    scale = guidance if guided else Constant(1.0)
    images = torch.empty((count, *denoiser.sample_shape), dtype=torch.uint8)
    with denoiser.evaluating():
        for start in range(0, count, batch_size):
            part = slice(start, min(start + batch_size, count))
            fresh = noise_source(denoiser.sample_shape, seed, first + start, part.stop - start, denoiser.device)
            drawn = draw(denoiser, labels[part].to(denoiser.device), scale, fresh, steps=steps, clip=clip)
            images[part] = to_uint8(drawn.nan_to_num(0.0)).cpu()
            if progress is not None:
                progress(part.stop)
    return images


def draw(
    denoiser: Denoiser,
    labels: Tensor,
    guidance: GuidanceSchedule,
    fresh: Noise,
    *,
    steps: int | None = None,
    clip: ClipMode = "recompute",
) -> Tensor:
    """One batch of images (B, C, H, W) in [-1, 1] for labels (B,), by the sampler that the model was trained for.

    Args:
        fresh: the start noise at its first call; what a sampler that renoises adds at the following ones.
        steps: None: all of the model's.

    Raises:
        InputError: another number of steps than a model has that takes all of them; an encoder.
    """
    T = denoiser.schedule.T

    def predict(x: Tensor, t: Tensor, scale: float) -> Tensor:
        return denoiser.guided(x, t, labels, scale)

    if denoiser.sampler == "encode":
        raise InputError("model", "an encoder", "use a model that draws images", problem="goes from images to noise")
    if denoiser.sampler in ALL_STEPS and steps not in (None, T):
        raise InputError("steps", steps, f"use {T}: a model for the {denoiser.sampler} sampler takes all its steps")
    if denoiser.sampler == "renoise":
        kind = denoiser.prediction_type
        return renoise_sample(predict, fresh(), denoiser.schedule, fresh, prediction_type=kind)
    if denoiser.sampler == "stochastic":
        return stochastic_sample(
            predict, fresh(), denoiser.schedule, guidance, fresh, prediction_type=denoiser.prediction_type, clip=clip
        )
    return ddim_sample(
        predict,
        fresh(),
        denoiser.schedule,
        guidance,
        steps=steps or T,
        prediction_type=denoiser.prediction_type,
        clip=clip,
    )


def _labels(denoiser: Denoiser, first: int, count: int, labels: Tensor | None) -> Tensor:
    if labels is None:
        return torch.arange(first, first + count) % denoiser.num_classes
    if labels.shape != (count,):
        raise InputError("labels", tuple(labels.shape), f"give one label an image ({count})")
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < denoiser.num_classes:
        raise InputError("labels", labels.tolist(), f"use classes 0..{denoiser.num_classes - 1}")
    return labels
