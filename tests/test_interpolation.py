from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffstill.diffusion.interpolation import lerp, slerp


def noises(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g)


@given(seed=st.integers(0, 2**31), pixels=st.integers(1, 80))
@settings(max_examples=40, deadline=None)
def test_the_ends_are_the_noises_themselves(seed: int, pixels: int) -> None:
    a, b = noises(seed, 3, pixels)
    for mix in (lerp, slerp):
        assert torch.equal(mix(a, b, 0.0), a)
        assert torch.equal(mix(a, b, 1.0), b)


@given(seed=st.integers(0, 2**31), weight=st.floats(0, 1), pixels=st.integers(2, 80))
@settings(max_examples=60, deadline=None)
def test_slerp_keeps_equal_norms_and_has_no_direction(seed: int, weight: float, pixels: int) -> None:
    a, b = (x.double() / x.double().norm(dim=1, keepdim=True) * 2.5 for x in noises(seed, 4, pixels))
    mixed = slerp(a, b, weight)
    torch.testing.assert_close(mixed.norm(dim=1), torch.full((4,), 2.5, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(mixed, slerp(b, a, 1 - weight), rtol=1e-6, atol=1e-9)


def test_slerp_goes_along_the_circle_at_an_even_pace() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.cos(2.4), math.sin(2.4)]])
    for weight in (0.25, 0.5, 0.9):
        expected = torch.tensor([[math.cos(2.4 * weight), math.sin(2.4 * weight)]])
        torch.testing.assert_close(slerp(a, b, weight), expected)


def test_each_sample_has_its_own_angle() -> None:
    a, b = noises(0, 5, 3, 4, 4)
    whole = slerp(a, b, 0.3)
    for i in range(5):
        torch.testing.assert_close(whole[i : i + 1], slerp(a[i : i + 1], b[i : i + 1], 0.3), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weight", [0.25, 0.5])
def test_slerp_keeps_the_law_of_noise_and_lerp_shrinks_it(weight: float) -> None:
    """Variance 1 against ``(1 - l)^2 + l^2``; no two pixels become alike; norms lie between those of the ends."""
    a, b = noises(1, 4000, 64)
    curved, straight = slerp(a, b, weight), lerp(a, b, weight)
    assert curved.var().item() == pytest.approx(1, abs=0.01)
    assert straight.var().item() == pytest.approx((1 - weight) ** 2 + weight**2, abs=0.01)
    between = math.hypot(math.cos(weight * math.pi / 2) ** 2, math.sin(weight * math.pi / 2) ** 2)
    assert curved.square().mean(1).std().item() == pytest.approx(math.sqrt(2 / 64) * between, rel=0.1)
    assert (curved.T.cov() - torch.eye(64)).abs().max() < 0.1


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_parallel_and_opposite_noises_are_mixed_straight(factor: float) -> None:
    a, _ = noises(2, 2, 16)
    torch.testing.assert_close(slerp(a, factor * a, 0.4), (0.6 + 0.4 * factor) * a, rtol=1e-5, atol=1e-6)


def test_nothing_is_not_finite_where_a_noise_is_zero() -> None:
    a, _ = noises(3, 2, 16)
    assert bool(slerp(a, torch.zeros_like(a), 0.5).isfinite().all())
