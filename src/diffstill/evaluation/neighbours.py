"""Distances without a Gaussian assumption: the kernel distance (KID) and precision and recall by nearest neighbours."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .intervals import from_error, proportion
from .results import Estimate


class KernelDistance:
    """Squared MMD to a fixed reference under the kernel ``(x.y / D + 1)^3`` (KID, Binkowski et al., 1801.01401), from
    all rows at once instead of subsets: unbiased, with less noise; may be negative.

    Args:
        reference: features (N, D), N >= 2.
    """

    def __init__(self, reference: Tensor) -> None:
        self._reference = reference.cpu().double()
        self._within = float(_to_each_other(self._reference).mean())

    def estimate(self, features: Tensor, *, level: float = 0.95) -> Estimate:
        """The distance of features (M, D), with an interval over their sampling noise, the reference given.

        The standard error is the infinitesimal jackknife's, as for the Frechet distance: the influence of a row is
        twice its mean kernel to the other rows less that to the reference. Exact to first order, conservative where
        both sets have one distribution.
        """
        rows = features.cpu().double()
        near, far = _to_each_other(rows), _to_others(rows, self._reference)
        value = self._within + float(near.mean() - 2 * far.mean())
        return from_error(value, 2 * float((near - far).std()) / math.sqrt(len(rows)), level=level)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _to_others(rows: Tensor, others: Tensor, chunk: int = 1024) -> Tensor:
    """(N,) mean kernel of each row (N, D) to ``others`` (M, D)."""
    return torch.cat([_kernel(part, others).mean(1) for part in rows.split(chunk)])


def _to_each_other(rows: Tensor) -> Tensor:
    """(N,) mean kernel of each row (N, D) to the other rows."""
    n = len(rows)
    if n < 2:
        raise ValueError(f"a kernel distance needs two rows or more a side, not {n}")
    itself = (rows.square().sum(1) / rows.shape[1] + 1) ** 3
    return (_to_others(rows, rows) * n - itself) / (n - 1)


class Manifold:
    """The union of balls around points, each reaching to its k-th nearest neighbour (Kynkäänniemi et al., 1904.06991).

    Args:
        points: features (N, D), N > k.
        k: which neighbour sets the radius.
        chunk: rows of the distance matrix held at once.
        slack: how much farther each ball reaches, in units of the points' mean length: where points are repeated,
            balls have no radius, and rounding would decide what lies in them.
    """

    def __init__(self, points: Tensor, k: int = 3, chunk: int = 1024, *, slack: float = 0.0) -> None:
        if len(points) <= k:
            raise ValueError(f"{len(points)} points have no {k}-th neighbour")
        self._points = points.cpu().double()
        self._chunk = chunk
        # The point itself is among its neighbours at distance 0, so the k-th other one is number k + 1.
        radii = [torch.cdist(part, self._points).kthvalue(k + 1, dim=1).values for part in self._points.split(chunk)]
        self._radii = torch.cat(radii)
        if slack:
            self._radii += slack * self._points.norm(dim=1).mean()

    def contains(self, queries: Tensor) -> Tensor:
        """(M,) bool: whether each query (M, D) lies in a ball."""
        parts = queries.cpu().double().split(self._chunk)
        return torch.cat([(torch.cdist(part, self._points) <= self._radii).any(1) for part in parts])


class PrecisionRecall(NamedTuple):
    """Precision: the share of generated images on the real manifold. Recall: the share of real images on the other."""

    precision: Estimate
    recall: Estimate


def precision_recall(
    real: Tensor,
    fake: Tensor,
    k: int = 3,
    *,
    real_manifold: Manifold | None = None,
    fake_manifold: Manifold | None = None,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., 1904.06991, Eq. 1-2) with Wilson intervals.

    Precision's interval runs over the generated images, recall's over the real ones, each given the other set's
    manifold. Both depend on the set sizes: compare at equal numbers only.

    Args:
        real: features (N, D).
        fake: features (M, D).
        real_manifold: ``Manifold(real, k)`` where the caller has it already; ``fake_manifold`` likewise.
    """
    inside = (real_manifold or Manifold(real, k)).contains(fake)
    covered = (fake_manifold or Manifold(fake, k)).contains(real)
    return PrecisionRecall(proportion(int(inside.sum()), len(inside)), proportion(int(covered.sum()), len(covered)))
