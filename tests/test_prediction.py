from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffstill.diffusion.guidance import guide
from diffstill.diffusion.prediction import PREDICTION_TYPES, PredictionType, target, to_epsilon, to_x0
from diffstill.models.denoiser import measuring

# Angles of (alpha, sigma) = (cos, sin), away from the ends where epsilon (or x0) is not determined.
ANGLES = st.floats(0.01, math.pi / 2 - 0.01)
KINDS = st.sampled_from(PREDICTION_TYPES)
NUMBERS = st.floats(-10, 10)


def numbers(*values: float) -> list[Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


@given(x0=NUMBERS, noise=NUMBERS, angle=ANGLES, kind=KINDS)
@settings(deadline=None)
def test_target_converts_back_to_the_x0_and_noise_it_came_from(
    x0: float, noise: float, angle: float, kind: PredictionType
) -> None:
    x, e, alpha, sigma = numbers(x0, noise, math.cos(angle), math.sin(angle))
    x_t = alpha * x + sigma * e
    made = target(x, e, alpha, sigma, kind)
    torch.testing.assert_close(to_x0(made, x_t, alpha, sigma, kind), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(to_epsilon(made, x_t, alpha, sigma, kind), e, rtol=1e-9, atol=1e-9)


@given(prediction=NUMBERS, x_t=NUMBERS, angle=ANGLES, kind=KINDS)
@settings(deadline=None)
def test_any_prediction_explains_x_t(prediction: float, x_t: float, angle: float, kind: PredictionType) -> None:
    """Also where the prediction is wrong: ``alpha x0 + sigma eps = x_t``, so a round trip gives the prediction back."""
    p, x, alpha, sigma = numbers(prediction, x_t, math.cos(angle), math.sin(angle))
    x0, eps = to_x0(p, x, alpha, sigma, kind), to_epsilon(p, x, alpha, sigma, kind)
    torch.testing.assert_close(alpha * x0 + sigma * eps, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(target(x0, eps, alpha, sigma, kind), p, rtol=1e-9, atol=1e-9)


@given(x0=NUMBERS, noise=NUMBERS, angle=ANGLES)
@settings(deadline=None)
def test_v_is_the_rotation_of_salimans_and_ho(x0: float, noise: float, angle: float) -> None:
    x, e, alpha, sigma = numbers(x0, noise, math.cos(angle), math.sin(angle))
    x_t, v = alpha * x + sigma * e, target(x, e, alpha, sigma, "v_prediction")
    torch.testing.assert_close(v, alpha * e - sigma * x)
    torch.testing.assert_close(alpha * x_t - sigma * v, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sigma * x_t + alpha * v, e, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(v**2 + x_t**2, x**2 + e**2, rtol=1e-9, atol=1e-9)


@given(first=NUMBERS, second=NUMBERS, x_t=NUMBERS, angle=ANGLES)
@settings(deadline=None)
def test_errors_scale_with_snr(first: float, second: float, x_t: float, angle: float) -> None:
    """``|d_eps|^2 = snr |d_x|^2`` and ``|d_v|^2 = (1 + snr) |d_x|^2``."""
    a, b, x, alpha, sigma = numbers(first, second, x_t, math.cos(angle), math.sin(angle))
    snr = alpha**2 / sigma**2
    d_x = a - b
    eps = [to_epsilon(p, x, alpha, sigma, "sample") for p in (a, b)]
    v = [target(p, e, alpha, sigma, "v_prediction") for p, e in zip((a, b), eps, strict=True)]
    torch.testing.assert_close((eps[0] - eps[1]) ** 2, snr * d_x**2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((v[0] - v[1]) ** 2, (1 + snr) * d_x**2, rtol=1e-6, atol=1e-6)


@given(cond=NUMBERS, null=NUMBERS, x_t=NUMBERS, angle=ANGLES, scale=st.floats(-2, 10), kind=KINDS)
@settings(deadline=None)
def test_guidance_commutes_with_conversion(
    cond: float, null: float, x_t: float, angle: float, scale: float, kind: PredictionType
) -> None:
    c, u, x, alpha, sigma = numbers(cond, null, x_t, math.cos(angle), math.sin(angle))
    for convert in (to_x0, to_epsilon):
        late = convert(guide(c, u, scale), x, alpha, sigma, kind)
        early = guide(convert(c, x, alpha, sigma, kind), convert(u, x, alpha, sigma, kind), scale)
        torch.testing.assert_close(late, early, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("convert", [to_x0, to_epsilon, target])
def test_an_unknown_kind_is_answered_with_the_known_ones(convert: object) -> None:
    with pytest.raises(ValueError, match="'noise'; one of epsilon, sample, v_prediction"):
        convert(*numbers(0, 0, 0, 1), "noise")  # type: ignore[operator]


def test_what_is_measured_on_cuda_is_measured_in_float32() -> None:
    """These switches are there without a GPU, too; training has them on."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def switches() -> list[bool]:
        return [matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark]

    def switch(tf32: bool, convolutions: bool, tuned: bool) -> None:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = tf32, convolutions, tuned

    def fails() -> None:
        with measuring(torch.device("cuda")):
            assert [*switches(), torch.is_grad_enabled()] == [False] * 4
            raise KeyError

    before = switches()
    try:
        switch(True, True, True)
        with pytest.raises(KeyError):
            fails()
        assert [*switches(), torch.is_grad_enabled()] == [True] * 4, "also after an exception"
        with measuring(torch.device("cpu")):
            assert [*switches(), torch.is_grad_enabled()] == [True, True, True, False]
    finally:
        switch(*before)
