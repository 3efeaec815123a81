from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.diffusion.weighting import base_weights, unit_mean

COSINE = NoiseSchedule.create("cosine", 1000)


def share(weights: Tensor, first: int) -> float:
    return (weights[first:].sum() / weights.sum()).item()


def test_weight_shares_of_the_published_form() -> None:
    weights = base_weights(COSINE, "x0", gamma=5.0)
    assert weights.dtype == torch.float64
    assert weights[:261].tolist() == [5.0] * 261
    assert torch.equal(weights[261:], COSINE.snr[261:])
    assert share(weights, 500) == pytest.approx(0.0665, abs=5e-5)
    assert share(weights, 800) == pytest.approx(0.00334, abs=5e-6)


def test_forms_are_one_weighting_of_the_x0_error_seen_from_three_outputs() -> None:
    """Min-SNR weighs the x0 error by min(snr, gamma); ``|d_eps|^2 = snr |d_x|^2``, ``|d_v|^2 = (1 + snr) |d_x|^2``."""
    on_x0 = base_weights(COSINE, "x0")
    torch.testing.assert_close(base_weights(COSINE, "eps") * COSINE.snr, on_x0)
    torch.testing.assert_close(base_weights(COSINE, "v") * (1 + COSINE.snr), on_x0)
    assert base_weights(COSINE, "eps")[261:].eq(1).all()
    assert base_weights(COSINE, "none").eq(1).all()


@given(
    form=st.sampled_from(["none", "x0", "eps", "v"]),
    gamma=st.floats(0.1, 20),
    name=st.sampled_from(["cosine", "linear", "scaled_linear"]),
    T=st.integers(2, 400),
)
@settings(max_examples=40, deadline=None)
def test_unit_mean_keeps_proportions(form: str, gamma: float, name: str, T: int) -> None:
    raw = base_weights(NoiseSchedule.create(name, T), form, gamma)
    assert raw.shape == (T,)
    assert bool((raw > 0).all())
    made = unit_mean(raw)
    assert made.mean().item() == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(made * raw[0], raw * made[0])


def test_unit_mean_of_vanishing_weights_is_finite() -> None:
    assert unit_mean(torch.zeros(4, dtype=torch.float64)).tolist() == [0.0] * 4


def test_an_unknown_form_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'snr'; one of none, x0, eps, v"):
        base_weights(COSINE, "snr")
