"""The Frechet distance between Gaussians fitted to two sets of features (Heusel et al., 1706.08500, Eq. 6).

``d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)``. It is called FID only in the features of the
2015-12-05 Inception network; see ``features.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .intervals import from_error
from .processes import sum_over_processes
from .results import Estimate


class FeatureStats:
    """Count, mean and scatter of feature rows, streamed and merged in float64 on the CPU.

    Scatter is kept about the mean (Chan, Golub & LeVeque 1983), so features far from the origin lose no digits, and
    any order of updates and merges gives the same statistics up to float64 rounding.

    Args:
        dim: number of features.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        """(dim,) float64; zeros while empty."""
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)
        """(dim, dim) float64: sum of ``(x - mean)(x - mean)^T``."""
        self._root: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> FeatureStats:
        """Statistics of features (N, D)."""
        return cls(features.shape[1]).update(features)

    @property
    def covariance(self) -> Tensor:
        """(dim, dim) float64 unbiased covariance.

        Raises:
            ValueError: with fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs two rows or more, not {self.count}")
        return self.scatter / (self.count - 1)

    def root(self) -> Tensor:
        """Symmetric square root of the covariance (dim, dim), kept until the next change."""
        if self._root is None:
            values, vectors = torch.linalg.eigh(self.covariance)
            self._root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        return self._root

    def update(self, features: Tensor) -> FeatureStats:
        """Adds rows (N, dim) of any float dtype on any device. Returns self."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must be (N, {self.dim}), not {tuple(features.shape)}")
        rows = features.detach().cpu().double()
        if len(rows):
            mean = rows.mean(0)
            centred = rows - mean
            self._combine(len(rows), mean, centred.T @ centred)
        return self

    def merge(self, other: FeatureStats) -> FeatureStats:
        """Adds another's rows. Returns self."""
        if other.dim != self.dim:
            raise ValueError(f"cannot merge {other.dim} features into {self.dim}")
        self._combine(other.count, other.mean, other.scatter)
        return self

    def all_reduce(self) -> FeatureStats:
        """Merges the statistics of all processes, on every process; does nothing in a single one. Returns self."""
        count = sum_over_processes(torch.tensor(float(self.count), dtype=torch.float64))
        if count > 0:
            mean = sum_over_processes(self.mean * self.count) / count
            offset = self.mean - mean
            self.scatter = sum_over_processes(self.scatter + self.count * torch.outer(offset, offset))
            self.count, self.mean, self._root = int(count), mean, None
        return self

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        if count == 0:
            return
        offset = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(offset, offset) * (self.count * count / total)
        self.mean = self.mean + offset * (count / total)
        self.count, self._root = total, None


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """Squared Frechet distance between two Gaussians, >= 0 up to rounding; symmetric; singular covariances are fine.

    The trace of the matrix root is the sum of the roots of the eigenvalues of ``S_b^1/2 S_a S_b^1/2``, a symmetric
    matrix: no complex parts and no offset to the diagonal. Rounding is about 1e-8 of the largest variance per
    feature when the covariances are rank-deficient, 1e-12 otherwise.

    Raises:
        ValueError: when the numbers of features differ, or a set has fewer than two rows.
    """
    if a.dim != b.dim:
        raise ValueError(f"{a.dim} features against {b.dim}: both sets must come from one extractor")
    return _distance(a, b, torch.linalg.eigvalsh(_middle(a, b)))


def frechet_estimate(features: Tensor, reference: FeatureStats, *, level: float = 0.95) -> Estimate:
    """The distance of ``features`` (N, D) to ``reference``, with an interval over the features' sampling noise.

    The interval is for the *expected distance at this N*, the reference taken as given: two models can be compared
    at equal N, and no number here is an estimate of the distance at infinite N, which is smaller. A naive
    percentile bootstrap fails here, because each resample is biased upward once more. The standard error is the
    infinitesimal jackknife's (Efron & Tibshirani 1993, 21.3) from the distance's closed-form influence function,

        I(x) = 2 (m - m_r).(x - m) + (x - m)^T (1 - T) (x - m) - tr((1 - T) S),

    with ``T = S_r^1/2 (S_r^1/2 S S_r^1/2)^-1/2 S_r^1/2``, the optimal transport map between the two Gaussians.
    It is exact to first order, conservative where the two sets have the same distribution, and costs one
    eigendecomposition. Below about five rows a feature the inverse is too noisy to trust the interval.
    """
    stats = FeatureStats.of(features)
    values, vectors = torch.linalg.eigh(_middle(stats, reference))
    distance = _distance(stats, reference, values)
    rows = features.detach().cpu().double() - stats.mean
    # rows^T T rows is the squared length of rows through half of T; null directions carry no transport.
    kept = values > values[-1] * stats.dim * torch.finfo(torch.float64).eps
    through = rows @ (reference.root() @ vectors[:, kept]) * values[kept] ** -0.25
    influence = rows @ (2 * (stats.mean - reference.mean)) + rows.square().sum(1) - through.square().sum(1)
    return from_error(distance, float(influence.std()) / len(rows) ** 0.5, level=level, floor=0.0)


def _middle(a: FeatureStats, b: FeatureStats) -> Tensor:
    """``S_b^1/2 S_a S_b^1/2``, symmetric to the last bit."""
    product = b.root() @ a.covariance @ b.root()
    return (product + product.T) / 2


def _distance(a: FeatureStats, b: FeatureStats, middle_eigenvalues: Tensor) -> float:
    cross = middle_eigenvalues.clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross)
