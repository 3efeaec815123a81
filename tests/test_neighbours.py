from __future__ import annotations

import numpy as np
import pytest
import torch
from libraries import torch_fidelity, torchmetrics
from scipy.stats import binomtest, t
from torch import Tensor

from diffstill.evaluation.intervals import from_error, pool, proportion
from diffstill.evaluation.neighbours import KernelDistance, Manifold, precision_recall
from diffstill.evaluation.results import Estimate


def cloud(n: int, dim: int = 6, seed: int = 0, mean: float = 0.0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


def mmd2(x: Tensor, y: Tensor) -> float:
    value = KernelDistance(x).estimate(y).value
    assert value is not None
    return value


def test_mmd_equals_the_double_sums() -> None:
    x, y = cloud(7), cloud(5, seed=1, mean=0.5)

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 6 + 1) ** 3)

    within_x = np.mean([kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert mmd2(x, y) == pytest.approx(within_x + within_y - 2 * across, rel=1e-12)


def test_kid_is_unbiased_and_sees_a_shift() -> None:
    """Zero in expectation between two samples of one distribution, where a biased estimate would be positive."""
    same = [mmd2(cloud(20, seed=2 * i), cloud(20, seed=2 * i + 1)) for i in range(400)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 20
    assert mmd2(cloud(300), cloud(300, seed=1, mean=0.5)) > 4 * np.std(same)


@pytest.mark.parametrize("mean", [0.0, 0.1, 0.4])
def test_the_kid_interval_covers(mean: float) -> None:
    """Against a fixed reference: 95 % away from it, more at it, and never uselessly wide."""
    reference = cloud(800, 5)
    distance = KernelDistance(reference)
    found = [distance.estimate(cloud(150, 5, seed=i, mean=mean)) for i in range(1, 201)]
    expected = np.mean([distance.estimate(cloud(150, 5, seed=i, mean=mean)).value for i in range(201, 801)])
    assert np.mean([e.low <= expected <= e.high for e in found]) >= 0.9
    assert 0.85 <= np.mean([(e.high - e.value) / 1.96 for e in found]) / np.std([e.value for e in found]) <= 1.8


def test_kid_agrees_with_torchmetrics() -> None:
    theirs = torchmetrics("image.kid")
    x, y = cloud(30), cloud(30, seed=1, mean=0.4)
    assert mmd2(x, y) == pytest.approx(float(theirs.poly_mmd(x, y)), rel=1e-9)


def brute_manifold(points: Tensor, queries: Tensor, k: int) -> list[bool]:
    radii = [sorted(float((p - q).norm()) for q in points)[k] for p in points]
    return [any(float((q - p).norm()) <= r for p, r in zip(points, radii, strict=True)) for q in queries]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_manifold_equals_its_definition(k: int, chunk: int) -> None:
    points, queries = cloud(30, 3), cloud(40, 3, seed=1, mean=1.0)
    found = Manifold(points, k, chunk).contains(queries).tolist()
    assert found == brute_manifold(points, queries, k)
    assert 0 < sum(found) < 40


def test_precision_and_recall_tell_dropped_modes_from_stray_samples() -> None:
    modes = torch.tensor([[0.0, 0.0], [100.0, 0.0]], dtype=torch.float64)
    real = torch.cat([cloud(50, 2) + mode for mode in modes])
    one_mode = cloud(100, 2, seed=1) * 0.3
    dropped = precision_recall(real, one_mode)
    assert dropped.precision.value == 1.0
    assert dropped.recall.value <= 0.5
    stray = precision_recall(real, torch.cat([real, cloud(100, 2, seed=2) + 1000]))
    assert (stray.precision.value, stray.recall.value) == (0.5, 1.0)


def test_a_collapsed_sample_recalls_nothing() -> None:
    found = precision_recall(cloud(50), torch.full((50, 6), 0.1, dtype=torch.float64))
    assert found.recall.value == 0.0


def test_too_few_points_have_no_manifold() -> None:
    with pytest.raises(ValueError, match="3 points have no 3-th neighbour"):
        Manifold(cloud(3), 3)


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (20, 20), (7, 20), (990, 1000)])
def test_proportions_have_wilsons_interval(successes: int, trials: int) -> None:
    theirs = binomtest(successes, trials).proportion_ci(method="wilson")
    found = proportion(successes, trials)
    assert found.value == successes / trials
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_from_error_stops_at_the_floor_and_drops_what_is_not_finite() -> None:
    assert from_error(1.0, 2.0, floor=0.0).low == 0.0
    assert from_error(-1.0, 0.5, floor=0.0).low == -1.0
    assert from_error(2.0, 1.0).high == pytest.approx(3.96, abs=1e-3)
    assert from_error(float("nan"), 1.0).value is None
    assert from_error(1.0, float("nan")).low is None


def test_pooling_one_two_and_three_seeds() -> None:
    one, two, three = (Estimate(value=v, low=v - 1, high=v + 2) for v in (3.0, 5.0, 10.0))
    assert pool([one]) == one
    pair = pool([one, two])
    assert (pair.value, pair.low, pair.high) == pytest.approx((4, 4 - 2**0.5 / 2, 4 + 8**0.5 / 2))
    triple = pool([one, two, three])
    half = t.ppf(0.975, 2) * np.std([3, 5, 10], ddof=1) / 3**0.5
    assert (triple.value, triple.low, triple.high) == pytest.approx((6, 6 - half, 6 + half))
    assert pool([one, Estimate(value=None)]).value is None
    assert pool([one, Estimate(value=1.0)]).low is None


def test_agrees_with_torch_fidelity() -> None:
    metric_kid, metric_prc = torch_fidelity("metric_kid"), torch_fidelity("metric_prc")
    real, fake = cloud(60), cloud(60, seed=1, mean=0.4)
    kernel = {
        "kid_kernel": "poly",
        "kid_kernel_poly_degree": 3,
        "kid_kernel_poly_gamma": None,
        "kid_kernel_poly_coef0": 1,
    }
    theirs = float(metric_kid.kernel_mmd(real.numpy(), fake.numpy(), **kernel))
    assert mmd2(real, fake) == pytest.approx(theirs, rel=1e-9)
    found = precision_recall(real, fake)
    precision, recall = metric_prc.calculate_precision_recall_full(fake, real, 3)
    assert (found.precision.value, found.recall.value) == pytest.approx((precision, recall), abs=1e-6)
