"""The distance of the pixels themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffstill.evaluation.pixels import MOST, pixel_distance, pixel_stats


def pictures(count: int, mean: float, spread: float, seed: int, side: int = 6) -> torch.Tensor:
    """Images of independent Gaussian pixels, in [0, 1] before they are rounded to bytes."""
    drawn = torch.randn(count, 1, side, side, generator=torch.Generator().manual_seed(seed))
    return ((mean + spread * drawn).clamp(0, 1) * 255).round().to(torch.uint8)


def test_it_is_the_closed_form_of_independent_pixels() -> None:
    """|m - m'|^2 + (s - s')^2, over 36 pixels, in units of the full range."""
    found = pixel_distance(pictures(20_000, 0.45, 0.10, 1), pixel_stats(pictures(20_000, 0.50, 0.05, 2)))
    assert found is not None
    assert found.value == pytest.approx(36 * (0.05**2 + 0.05**2), rel=0.02)
    assert found.low < found.value < found.high


@given(noise=st.floats(0.05, 0.3), seed=st.integers(0, 99))
def test_noise_moves_images_away_and_more_noise_farther(noise: float, seed: int) -> None:
    images, reference = pictures(400, 0.5, 0.05, seed), pixel_stats(pictures(400, 0.5, 0.05, seed + 100))
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed + 200))
    noisy = [((images / 255 + level * drawn).clamp(0, 1) * 255).to(torch.uint8) for level in (0, noise, 1.5 * noise)]
    clean, some, more = (pixel_distance(each, reference).value for each in noisy)
    assert clean < some < more


def test_large_images_and_single_ones_have_none() -> None:
    side = int(MOST**0.5)
    assert pixel_stats(pictures(3, 0.5, 0.1, 0, side)) is not None
    assert pixel_stats(pictures(3, 0.5, 0.1, 0, side + 1)) is None
    assert pixel_stats(pictures(1, 0.5, 0.1, 0)) is None
    assert pixel_distance(pictures(3, 0.5, 0.1, 0), None) is None


def test_statistics_are_the_same_in_any_number_of_parts() -> None:
    """More images than a part holds."""
    images = pictures(2_500, 0.4, 0.1, 3, side=3)
    rows = images.flatten(1).double() / 255
    found = pixel_stats(images)
    assert found is not None
    torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.covariance, torch.cov(rows.T), rtol=1e-6, atol=1e-8)
