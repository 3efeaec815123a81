"""Distances without a Gaussian assumption: the kernel distance (KID) and precision and recall by nearest neighbours."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .intervals import from_error, proportion
from .results import Estimate


class Kid(NamedTuple):
    """Mean and standard deviation of the squared MMD over subsets."""

    mean: float
    std: float


def polynomial_mmd2(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD between rows x (N, D) and y (M, D) under the kernel ``(x.y / D + 1)^3``; may be negative.

    Raises:
        ValueError: with fewer than two rows on a side.
    """
    n, m, dim = len(x), len(y), x.shape[1]
    if min(n, m) < 2:
        raise ValueError(f"MMD needs two rows or more a side, not {n} and {m}")
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1) ** 3

    within_x, within_y = kernel(x, x), kernel(y, y)
    within = (within_x.sum() - within_x.trace()) / (n * (n - 1)) + (within_y.sum() - within_y.trace()) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


def kid(
    x: Tensor, y: Tensor, subsets: int = 50, subset_size: int = 250, generator: torch.Generator | None = None
) -> Kid:
    """Kernel distance of Binkowski et al. (1801.01401, section 4): mean over ``subsets`` of the squared MMD.

    Args:
        x: reference features (N, D).
        y: generated features (M, D).
        subset_size: rows a subset, drawn without replacement from each side; at most ``min(N, M)``.
        generator: a CPU generator; None draws from a fixed seed, so equal inputs give equal numbers.
    """
    if not 2 <= subset_size <= min(len(x), len(y)) or subsets < 1:
        raise ValueError(f"{subsets} subsets of {subset_size} rows from {len(x)} and {len(y)} rows")
    generator = generator or torch.Generator().manual_seed(0)
    x, y = x.cpu().double(), y.cpu().double()
    draws = torch.tensor(
        [
            polynomial_mmd2(*(rows[torch.randperm(len(rows), generator=generator)[:subset_size]] for rows in (x, y)))
            for _ in range(subsets)
        ],
        dtype=torch.float64,
    )
    return Kid(float(draws.mean()), float(draws.std()) if subsets > 1 else math.nan)


def kid_estimate(reference: Tensor, features: Tensor, subsets: int, subset_size: int, level: float = 0.95) -> Estimate:
    """``kid`` with a subsampling interval (Politis & Romano 1994).

    The spread between subsets of m of n rows is that of m rows, not of n: the standard error is
    ``std sqrt(m/n) / sqrt(1 - m/n)``, the last factor because subsets drawn without replacement overlap.
    Conservative, as the reference's subsets vary too. ``subset_size`` is cut to half of the smaller set.
    """
    m = min(subset_size, len(reference) // 2, len(features) // 2)
    value, std = kid(reference, features, subsets, m)
    part = m / len(features)
    return from_error(value, std * math.sqrt(part / (1 - part)), level=level)


class Manifold:
    """The union of balls around points, each reaching to its k-th nearest neighbour (Kynkäänniemi et al., 1904.06991).

    Args:
        points: features (N, D), N > k.
        k: which neighbour sets the radius.
        chunk: rows of the distance matrix held at once.
    """

    def __init__(self, points: Tensor, k: int = 3, chunk: int = 1024) -> None:
        if len(points) <= k:
            raise ValueError(f"{len(points)} points have no {k}-th neighbour")
        self._points = points.cpu().double()
        self._chunk = chunk
        # The point itself is among its neighbours at distance 0, so the k-th other one is number k + 1.
        radii = [torch.cdist(part, self._points).kthvalue(k + 1, dim=1).values for part in self._points.split(chunk)]
        self._radii = torch.cat(radii)

    def contains(self, queries: Tensor) -> Tensor:
        """(M,) bool: whether each query (M, D) lies in a ball."""
        parts = queries.cpu().double().split(self._chunk)
        return torch.cat([(torch.cdist(part, self._points) <= self._radii).any(1) for part in parts])


class PrecisionRecall(NamedTuple):
    """Precision: the share of generated images on the real manifold. Recall: the share of real images on the other."""

    precision: Estimate
    recall: Estimate


def precision_recall(
    real: Tensor, fake: Tensor, k: int = 3, *, real_manifold: Manifold | None = None
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., 1904.06991, Eq. 1-2) with Wilson intervals.

    Precision's interval runs over the generated images, recall's over the real ones, each given the other set's
    manifold. Both depend on the set sizes: compare at equal numbers only.

    Args:
        real: features (N, D).
        fake: features (M, D).
        real_manifold: ``Manifold(real, k)`` where the caller has it already.
    """
    inside = (real_manifold or Manifold(real, k)).contains(fake)
    covered = Manifold(fake, k).contains(real)
    return PrecisionRecall(proportion(int(inside.sum()), len(inside)), proportion(int(covered.sum()), len(covered)))
