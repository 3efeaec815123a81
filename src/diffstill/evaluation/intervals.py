"""Intervals for what is measured: proportions, standard errors, repeated seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

from scipy.stats import t as student_t
from torch import Tensor

from .results import Estimate


def normal_quantile(level: float) -> float:
    """Two-sided standard-normal quantile: 1.96 for 0.95."""
    return NormalDist().inv_cdf(0.5 + level / 2)


def from_error(value: float, error: float, *, level: float = 0.95, floor: float = -math.inf) -> Estimate:
    """``value +- z * error`` for a standard ``error``; the low end is not let below ``floor``."""
    if not (math.isfinite(value) and math.isfinite(error)):
        return Estimate.of(value, level=level)
    half = normal_quantile(level) * error
    return Estimate(value=value, low=max(value - half, min(floor, value)), high=value + half, level=level)


def proportion(successes: int, trials: int, *, level: float = 0.95) -> Estimate:
    """``successes / trials`` with Wilson's score interval (Wilson 1927), honest at 0 and 1 too.

    Raises:
        ValueError: unless ``0 <= successes <= trials`` and ``trials > 0``.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes of {trials} trials")
    z2 = normal_quantile(level) ** 2
    p = successes / trials
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(z2 * (p * (1 - p) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    low, high = (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)
    return Estimate(value=p, low=low, high=high, level=level)


def t_interval(values: Sequence[float | None], level: float = 0.95) -> Estimate:
    """Mean and ``mean +/- t_{n-1} s / sqrt(n)`` (Student's t, s with n - 1).

    One value has no interval. No value at all, or one that is missing or not finite, gives no mean.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) < len(values):
        return Estimate(value=None, level=level)
    mean = fmean(known)
    if len(known) == 1:
        return Estimate(value=mean, level=level)
    half = float(student_t.ppf((1 + level) / 2, len(known) - 1)) * stdev(known) / math.sqrt(len(known))
    return Estimate(value=mean, low=mean - half, high=mean + half, level=level)


def mean_interval(values: Tensor, level: float = 0.95) -> Estimate:
    """Mean of (n,) values with its normal interval."""
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return from_error(float(values.mean()), error, level=level)


def pool(estimates: Sequence[Estimate]) -> Estimate:
    """One estimate from one estimate a sampling seed: the mean.

    Interval: Student's t over the seeds' values from three seeds on; below that the seeds' own intervals, whose
    half-widths add in quadrature (independent noise, the same reference). Null as soon as one seed's value is null.
    """
    values = [e.value for e in estimates if e.value is not None]
    level = estimates[0].level
    if len(estimates) == 1 or len(values) < len(estimates):
        return estimates[0] if len(estimates) == 1 else Estimate.of(math.nan, level=level)
    mean, n = fmean(values), len(values)
    if n >= 3:
        return t_interval(values, level)
    below = [v - e.low for v, e in zip(values, estimates, strict=True) if e.low is not None]
    above = [e.high - v for v, e in zip(values, estimates, strict=True) if e.high is not None]
    if len(below) < n or len(above) < n:
        return Estimate.of(mean, level=level)
    return Estimate(value=mean, low=mean - math.hypot(*below) / n, high=mean + math.hypot(*above) / n, level=level)
