"""Ways between two noises: straight (``lerp``), and along the sphere that Gaussian noise lives on (``slerp``)."""

from __future__ import annotations

import torch
from torch import Tensor

FLAT = 1e-3
"""Sine of an angle below which two directions are taken for parallel, or for opposite."""


def lerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """``(1 - weight) a + weight b``; everything broadcasts.

    Of two independent standard-normal noises the mixture has variance ``(1 - l)^2 + l^2``: half of it in the middle,
    where a sampler meets images of too little noise.
    """
    return (1 - weight) * a + weight * b


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Along the great circle from ``a`` (B, ...) to ``b`` (B, ...), sample by sample (Shoemake 1985).

    ``(sin((1 - l) w) a + sin(l w) b) / sin w`` with w the angle between the two. Equal norms are kept exactly;
    independent noises of many dimensions, which are nearly orthogonal and of nearly one norm, keep the variance 1 that
    samplers start from. Parallel noises are mixed straight, which is the limit; so are opposite ones, between which no
    great circle is the shortest.
    """
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    unit_a, unit_b = (x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) for x in (flat_a, flat_b))
    # Kahan's form of the angle, exact near 0 and pi, where the arc cosine is not.
    angle = 2 * torch.atan2((unit_a - unit_b).norm(dim=1), (unit_a + unit_b).norm(dim=1))
    angle = angle.view(-1, *[1] * (a.ndim - 1))
    sine = angle.sin()
    # The shares first, so that the ends are the noises themselves.
    curved = ((1 - weight) * angle).sin() / sine * a + (weight * angle).sin() / sine * b
    return torch.where(sine > FLAT, curved, lerp(a, b, weight))
