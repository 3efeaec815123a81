from __future__ import annotations

import math
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import torch_fidelity, torchmetrics
from scipy.linalg import sqrtm
from torch import Tensor

from diffstill.evaluation.frechet import FeatureStats, frechet_distance, frechet_estimate


def rows(n: int, dim: int, seed: int, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mixing + mean


def one_shot(a: Tensor, b: Tensor) -> float:
    """The textbook formula in numpy, by the eigenvalues of the plain product."""
    x, y = a.numpy(), b.numpy()
    s, t = np.atleast_2d(np.cov(x, rowvar=False)), np.atleast_2d(np.cov(y, rowvar=False))
    cross = np.sqrt(np.linalg.eigvals(s @ t).astype(complex)).real.sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * cross)


def gaussian(mean: Tensor, covariance: Tensor) -> FeatureStats:
    """Statistics that are exactly these, as from a very large sample."""
    stats = FeatureStats(len(mean))
    stats.count, stats.mean, stats.scatter = 10**9, mean.double(), covariance.double() * (10**9 - 1)
    return stats


@pytest.mark.parametrize("dim", [1, 5, 24])
def test_distance_equals_the_one_shot_formula(dim: int) -> None:
    a, b = rows(200, dim, 0), rows(150, dim, 1, mean=0.7)
    assert frechet_distance(FeatureStats.of(a), FeatureStats.of(b)) == pytest.approx(one_shot(a, b), rel=1e-9)


def test_distance_equals_scipys_matrix_root() -> None:
    a, b = FeatureStats.of(rows(300, 12, 2)), FeatureStats.of(rows(300, 12, 3, mean=1.0))
    root = sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    expected = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace())
    assert frechet_distance(a, b) == pytest.approx(expected - 2 * float(np.trace(root).real), rel=1e-9)


def test_distance_of_diagonal_gaussians_has_its_closed_form() -> None:
    mean = torch.tensor([1.0, -2.0, 0.5])
    first, second = torch.tensor([4.0, 1.0, 0.25]), torch.tensor([1.0, 9.0, 0.25])
    expected = float(mean.square().sum() + (first.sqrt() - second.sqrt()).square().sum())
    found = frechet_distance(gaussian(torch.zeros(3), first.diag()), gaussian(mean, second.diag()))
    assert found == pytest.approx(expected, rel=1e-9)


def test_singular_covariances_are_fine() -> None:
    narrow = torch.cat([rows(50, 3, 4), torch.zeros(50, 4, dtype=torch.float64)], 1)
    few = rows(5, 20, 5)
    for features in (narrow, few):
        stats = FeatureStats.of(features)
        assert abs(frechet_distance(stats, stats)) < 1e-6 * float(stats.covariance.trace())
    point = FeatureStats.of(torch.ones(4, 2))
    assert frechet_distance(point, gaussian(torch.zeros(2), torch.diag(torch.tensor([4.0, 0.0])))) == pytest.approx(6.0)


def test_distance_is_symmetric_and_needs_one_extractor() -> None:
    a, b = FeatureStats.of(rows(40, 6, 6)), FeatureStats.of(rows(40, 6, 7))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    with pytest.raises(ValueError, match="one extractor"):
        frechet_distance(a, FeatureStats.of(rows(40, 5, 8)))


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=5), order=st.randoms(use_true_random=False))
def test_statistics_are_the_same_for_any_split_in_any_order(cuts: list[int], order: Random) -> None:
    features = rows(40, 4, 9, mean=1e4)
    edges = [0, *sorted(cuts), 40]
    parts = [features[a:b] for a, b in pairwise(edges)]
    order.shuffle(parts)
    streamed, merged = FeatureStats(4), FeatureStats(4)
    for part in parts:
        streamed.update(part)
        merged.merge(FeatureStats(4).update(part))
    for stats in (streamed, merged):
        assert stats.count == 40
        np.testing.assert_allclose(stats.mean.numpy(), features.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(
            stats.covariance.numpy(), np.cov(features.numpy(), rowvar=False), rtol=1e-9, atol=1e-9
        )


def test_an_update_after_a_distance_changes_the_distance() -> None:
    a, b = FeatureStats.of(rows(30, 3, 10)), FeatureStats.of(rows(30, 3, 11))
    frechet_distance(b, a)
    a.update(rows(30, 3, 12))
    both = torch.cat([rows(30, 3, 10), rows(30, 3, 12)])
    assert frechet_distance(b, a) == pytest.approx(one_shot(rows(30, 3, 11), both), rel=1e-9)


def test_all_reduce_does_nothing_in_one_process() -> None:
    stats = FeatureStats.of(rows(30, 3, 13, mean=5.0))
    before = stats.mean.clone(), stats.scatter.clone()
    stats.all_reduce()
    assert stats.count == 30
    torch.testing.assert_close((stats.mean, stats.scatter), before)


def test_too_few_rows_say_so() -> None:
    with pytest.raises(ValueError, match="two rows"):
        frechet_distance(FeatureStats.of(rows(1, 3, 0)), FeatureStats.of(rows(9, 3, 0)))


@pytest.mark.parametrize(("shift", "stretch"), [(0.0, 1.0), (0.1, 1.05), (0.5, 1.4)])
def test_the_interval_covers_the_expected_distance(shift: float, stretch: float) -> None:
    """95 % intervals over fresh samples: 95 % away from the reference, more at it, and never uselessly wide."""
    dim, n, trials = 8, 200, 300
    generator = torch.Generator().manual_seed(15)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    reference = gaussian(torch.zeros(dim), mixing @ mixing.T)

    def draw() -> Tensor:
        noise = torch.randn(n, dim, generator=generator, dtype=torch.float64)
        return stretch * noise @ mixing.T + shift

    expected = np.mean([frechet_distance(FeatureStats.of(draw()), reference) for _ in range(3 * trials)])
    found = [frechet_estimate(draw(), reference) for _ in range(trials)]
    covered = np.mean([e.low <= expected <= e.high for e in found])
    spread = np.std([e.value for e in found])
    error = np.mean([(e.high - e.value) / 1.96 for e in found])
    assert 0.9 <= covered <= 1.0
    assert 0.85 <= error / spread <= 1.8


def test_the_estimate_is_the_distance_and_its_interval_shrinks_with_the_sample() -> None:
    reference = FeatureStats.of(rows(5000, 6, 16))
    features = rows(6400, 6, 17, mean=0.5)
    wide, tight = frechet_estimate(features[:400], reference), frechet_estimate(features, reference)
    assert tight.value == pytest.approx(frechet_distance(FeatureStats.of(features), reference), rel=1e-12)
    assert (wide.high - wide.low) / (tight.high - tight.low) == pytest.approx(4, rel=0.25)


def test_an_estimate_from_fewer_rows_than_features_is_finite() -> None:
    found = frechet_estimate(rows(10, 16, 18), FeatureStats.of(rows(200, 16, 19)))
    assert 0 <= found.low <= found.value <= found.high < math.inf


def test_agrees_with_torchmetrics() -> None:
    fid = torchmetrics("image.fid")
    a, b = FeatureStats.of(rows(300, 16, 20)), FeatureStats.of(rows(300, 16, 21, mean=0.3))
    theirs = float(fid._compute_fid(a.mean, a.covariance, b.mean, b.covariance))
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-9)


def test_agrees_with_torch_fidelity() -> None:
    fid = torch_fidelity("metric_fid")
    a, b = rows(300, 16, 22), rows(300, 16, 23, mean=0.3)
    theirs = fid.fid_statistics_to_metric(*(fid.fid_features_to_statistics(x) for x in (a, b)), verbose=False)
    found = frechet_distance(FeatureStats.of(a), FeatureStats.of(b))
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
