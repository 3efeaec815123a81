"""The Frechet distance of the pixels themselves: a second opinion beside that of a network's features.

Features weigh what tells classes apart, pixels weigh every pixel alike and know nothing of what an image shows. Where
the few images that a model learnt from are no fair sample, textures of noise can lie nearer to their domain than clean
images do in one and not in the other (docs/unidad.md): neither alone ranks models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .frechet import FeatureStats, frechet_estimate
from .processes import gather_rows
from .results import Estimate

MOST = 1024
"""Values of an image up to which it is measured, 32x32 grey: a larger covariance wants more images than are drawn."""


def pixel_stats(images: Tensor) -> FeatureStats | None:
    """Statistics of images (N, C, H, W) uint8, pixels in [0, 1]; None of larger images, or of fewer than two."""
    size = images[:1].numel()
    if len(images) < 2 or size > MOST:
        return None
    stats = FeatureStats(size)
    for part in images.split(1000):
        stats.update(_pixels(part))
    return stats


def pixel_distance(images: Tensor, reference: FeatureStats | None) -> Estimate | None:
    """Distance of all processes' images to a reference, None where there is none.

    Args:
        images: (n, C, H, W) uint8, this process's.
    """
    return frechet_estimate(gather_rows(_pixels(images)), reference) if reference is not None else None


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1).to(torch.float32) / 255
