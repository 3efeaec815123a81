"""How alike images are that should be the same: PSNR, SSIM and feature distance of pairs, and of strangers as a floor.

Images are in [0, 1], so the maximum of PSNR is 1. (Taking it for 255 on such images adds 48.13 dB.)
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from .results import Estimate, Result

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
BOOTSTRAP = 1000


class PairFigures(Result):
    """How alike pairs of images are, with percentile bootstrap intervals over the pairs."""

    pairs: int
    identical: int = Field(description="pairs that are equal in every pixel")
    psnr: Estimate = Field(description="dB, of the mean squared error over all pairs; null where all are identical")
    ssim: Estimate = Field(description="mean over the pairs; 1 where they are identical")
    distance: Estimate = Field(description="mean Euclidean distance in the extractor's features")


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """(N,) float64 mean squared difference of each pair of images (N, C, H, W)."""
    return (a.double() - b.double()).square().flatten(1).mean(1)


def psnr(error: Tensor) -> Tensor:
    """``10 log10(1 / error)`` in dB for mean squared errors of images in [0, 1]; infinite at 0."""
    return -10 * error.log10()


def ssim(a: Tensor, b: Tensor, batch_size: int = 512) -> Tensor:
    """(N,) float64 structural similarity of each pair of images (N, C, H, W) in [0, 1] (Wang et al. 2004).

    A Gaussian window of 11 pixels and sigma 1.5 (for smaller images the largest odd window that fits, alike
    truncated and normalised), C1 = 0.01^2, C2 = 0.03^2, population variances, averaged over all places where the
    window lies within the image and over the channels.

    Raises:
        ValueError: images of different shapes.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"images of one shape (N, C, H, W) are compared, not {tuple(a.shape)} and {tuple(b.shape)}")
    parts = zip(a.split(batch_size), b.split(batch_size), strict=True)
    return torch.cat([_ssim(x.double(), y.double()) for x, y in parts])


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    n, channels, height, width = a.shape
    column, row = (_window(side).to(a.device) for side in (height, width))
    kernel = (column[:, None] * row[None, :])[None, None]
    a, b = a.reshape(n * channels, 1, height, width), b.reshape(n * channels, 1, height, width)
    mean_a, mean_b, aa, bb, ab = F.conv2d(torch.cat([a, b, a * a, b * b, a * b]), kernel).chunk(5)
    var_a, var_b, cov = aa - mean_a.square(), bb - mean_b.square(), ab - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + K1**2) / (mean_a.square() + mean_b.square() + K1**2)
    structure = (2 * cov + K2**2) / (var_a + var_b + K2**2)
    return (luminance * structure).reshape(n, -1).mean(1)


def _window(side: int) -> Tensor:
    """Normalised Gaussian weights (size,) float64, size odd and at most ``side``."""
    size = min(WINDOW, side - 1 + side % 2)
    offsets = torch.arange(size, dtype=torch.float64) - size // 2
    weights = (-offsets.square() / (2 * SIGMA**2)).exp()
    return weights / weights.sum()


def compare_pairs(
    a: Tensor, b: Tensor, features_a: Tensor, features_b: Tensor, *, bootstrap: int = BOOTSTRAP, seed: int = 0
) -> PairFigures:
    """Image i of ``a`` against image i of ``b``.

    Args:
        a, b: (N > 0, C, H, W) uint8.
        features_a, features_b: (N, D), of the same images.
        bootstrap: number of resamples.
    """
    x, y = a.double() / 255, b.double() / 255
    error = squared_error(x, y)
    distance = (features_a.double() - features_b.double()).norm(dim=1)
    table = torch.stack([error, ssim(x, y), distance], 1)
    generator = torch.Generator().manual_seed(seed)
    n = len(table)
    draws = torch.stack([table[torch.randint(n, (n,), generator=generator)].mean(0) for _ in range(bootstrap)])
    means = table.mean(0)
    levels = psnr(draws[:, 0]).tolist() if float(means[0]) > 0 else []
    return PairFigures(
        pairs=n,
        identical=int((error == 0).sum()),
        psnr=Estimate.of(float(psnr(means[0])) if float(means[0]) > 0 else math.inf, levels),
        ssim=Estimate.of(float(means[1]), draws[:, 1].tolist()),
        distance=Estimate.of(float(means[2]), draws[:, 2].tolist()),
    )


def strangers(labels: Tensor) -> Tensor:
    """(N,) int64: for each image the next one of its class, the first after the last; -1 where it is alone in it."""
    found = torch.full_like(labels, -1)
    for label in labels.unique():
        places = torch.nonzero(labels == label).flatten()
        if len(places) > 1:
            found[places] = places.roll(-1)
    return found


def compare_strangers(a: Tensor, b: Tensor, features_a: Tensor, features_b: Tensor, labels: Tensor) -> PairFigures:
    """Image i of ``a`` against another image of its class in ``b``: what pairs score that share nothing but the class.

    Raises:
        ValueError: no class has two images.
    """
    partner = strangers(labels)
    known = partner >= 0
    if not bool(known.any()):
        raise ValueError("no class has two images")
    other = partner[known]
    return compare_pairs(a[known], b[other], features_a[known], features_b[other])
