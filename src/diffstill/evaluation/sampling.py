"""Images from a model, each one a pure function of (seed, index): equal for any batch size and number of processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..data.dataset import to_uint8
from ..diffusion.guidance import Constant, GuidanceSchedule
from ..diffusion.sampling import ClipMode, ddim_sample, image_noise
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
            noise = image_noise(denoiser.sample_shape, seed, first + start, part.stop - start, denoiser.device)
            drawn = _draw(denoiser, noise, labels[part].to(denoiser.device), scale, steps, clip)
            images[part] = to_uint8(drawn.nan_to_num(0.0)).cpu()
            if progress is not None:
                progress(part.stop)
    return images


def _draw(
    denoiser: Denoiser, noise: Tensor, labels: Tensor, guidance: GuidanceSchedule, steps: int, clip: ClipMode
) -> Tensor:
    """One batch of images (B, C, H, W) in [-1, 1] from noise (B, C, H, W) and labels (B,)."""
    return ddim_sample(
        lambda x_t, t: denoiser(x_t, t, labels),
        lambda x_t, t: denoiser.branches(x_t, t, labels),
        noise,
        denoiser.schedule,
        guidance,
        steps=steps,
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
