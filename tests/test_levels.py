"""Noise levels by their ratio: conversions, Karras and geometric lists, the times of levels (unidad.md 2)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import generator

from diffstill.checks.bench import tiny_denoiser
from diffstill.diffusion.levels import geometric_ratios, karras_ratios, ratios, signal_and_noise, time_of
from diffstill.diffusion.prediction import PREDICTION_TYPES, PredictionType, target, to_epsilon, to_x0
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.errors import InputError
from diffstill.methods import Setting
from diffstill.methods.unidad import UniDad
from diffstill.methods.unidad_options import UniDadOptions
from diffstill.models.denoiser import Denoiser

LINEAR = NoiseSchedule.create("linear", 1000)
CHAINS = {1: [930], 2: [144, 930], 3: [144, 604, 930], 4: [144, 456, 728, 930]}
"""Nearest steps of the linear schedule of DDPM to the student's levels from 80 to 0.5 (unidad.md 2)."""


def value(number: float) -> torch.Tensor:
    return torch.tensor([number], dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ conversions


@given(log_ratio=st.floats(-7, 7), kind=st.sampled_from(PREDICTION_TYPES), seed=st.integers(0, 99))
@settings(deadline=None)
def test_the_two_forms_of_the_process_and_all_predictions_go_into_each_other(
    log_ratio: float, kind: PredictionType, seed: int
) -> None:
    """``x_t / alpha = x_0 + ratio n``, and x0 and eps come back from any prediction."""
    ratio = value(math.exp(log_ratio))
    alpha, sigma = signal_and_noise(ratio)
    torch.testing.assert_close(alpha**2 + sigma**2, value(1.0), rtol=0, atol=1e-15)
    torch.testing.assert_close(alpha**2, 1 / (1 + ratio**2), rtol=1e-12, atol=0)
    x0, noise = torch.randn(2, 5, dtype=torch.float64, generator=generator(seed))
    x_t = alpha * x0 + sigma * noise
    torch.testing.assert_close(x_t / alpha, x0 + ratio * noise, rtol=1e-9, atol=1e-9)
    told = target(x0, noise, alpha, sigma, kind)
    torch.testing.assert_close(to_x0(told, x_t, alpha, sigma, kind), x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(to_epsilon(told, x_t, alpha, sigma, kind), noise, rtol=1e-6, atol=1e-6)


def test_a_schedules_ratios_are_noise_over_signal() -> None:
    table = ratios(LINEAR)
    torch.testing.assert_close(table, LINEAR.sigmas / LINEAR.alphas)
    assert (float(table[0]), float(table[-1])) == (pytest.approx(0.01, abs=1e-6), pytest.approx(157.41, abs=5e-3))
    assert bool((table.diff() > 0).all())
    alpha, sigma = signal_and_noise(table)
    torch.testing.assert_close((alpha, sigma), (LINEAR.alphas, LINEAR.sigmas), rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------------------------------ lists


def test_karras_levels_are_those_of_the_published_recipe() -> None:
    """rho = 7 from .002 to 80: indices 20 and 980 are .0032 and 72.1; what the linear schedule covers of them."""
    levels = karras_ratios(0.002, 80.0)
    assert (len(levels), levels.dtype) == (1000, torch.float64)
    assert levels[[0, 20, 980, 999]].tolist() == pytest.approx([0.002, 0.0032, 72.1, 80.0], rel=0.01)
    roots = levels ** (1 / 7)
    torch.testing.assert_close(roots.diff(), (roots[1] - roots[0]).expand(999), rtol=1e-6, atol=0)
    assert float((time_of(levels, LINEAR, nearest=True) == 0).double().mean()) == 0.085
    assert float((levels < ratios(LINEAR)[0]).double().mean()) == 0.073


@given(high=st.floats(1.0, 200), share=st.floats(1e-4, 0.9), count=st.integers(2, 12))
@settings(deadline=None)
def test_the_students_levels_fall_by_one_factor_from_end_to_end(high: float, share: float, count: int) -> None:
    chain = geometric_ratios(high, high * share, count)
    assert chain.shape == (count,)
    assert (float(chain[0]), float(chain[-1])) == (pytest.approx(high), pytest.approx(high * share))
    steps = chain.log().diff()
    torch.testing.assert_close(steps, torch.full_like(steps, math.log(share) / (count - 1)), rtol=1e-9, atol=0)


def test_lists_that_cannot_be_are_refused() -> None:
    assert geometric_ratios(80, 0.5, 1).tolist() == [80]
    with pytest.raises(ValueError, match=r"^0 levels: give 1 or more$"):
        geometric_ratios(80, 0.5, 0)
    for high, low in ((0.5, 80), (1, 1), (1, 0), (1, -1), (math.nan, 1)):
        with pytest.raises(ValueError, match="both must be positive, the first the larger"):
            geometric_ratios(high, low, 3)


# ------------------------------------------------------------------------------------------------------------ times


@pytest.mark.parametrize(("steps", "indices"), list(CHAINS.items()))
def test_the_students_levels_have_the_known_indices(steps: int, indices: list[int]) -> None:
    chain = geometric_ratios(80, 0.5, steps)
    near = time_of(chain, LINEAR, nearest=True)
    assert (near.dtype, near.tolist()) == (torch.int64, indices[::-1])
    between = time_of(chain, LINEAR)
    assert between.dtype == torch.float64
    assert (between - near).abs().max() <= 0.5


@given(schedule=st.sampled_from(["linear", "cosine", "scaled_linear"]), low=st.integers(0, 998), share=st.floats(0, 1))
@settings(deadline=None)
def test_times_are_linear_in_the_log_of_the_ratio(schedule: str, low: int, share: float) -> None:
    made = NoiseSchedule.create(schedule, 1000)
    table = ratios(made)
    between = (torch.lerp(table[low].log(), table[low + 1].log(), share)).exp()
    assert float(time_of(between, made)) == pytest.approx(low + share, abs=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "scaled_linear"])
@pytest.mark.parametrize("nearest", [True, False])
def test_a_schedules_own_levels_have_their_own_times_and_the_rest_is_clamped(schedule: str, nearest: bool) -> None:
    made = NoiseSchedule.create(schedule, 1000)
    table = ratios(made)
    torch.testing.assert_close(time_of(table, made, nearest=nearest).double(), torch.arange(1000).double())
    outside = torch.stack([table[0] / 10, table[-1] * 10])
    assert time_of(outside, made, nearest=nearest).tolist() == [0, 999]
    spread = torch.logspace(-4, 5, 5000, dtype=torch.float64)
    assert bool((time_of(spread, made, nearest=nearest).diff() >= 0).all())


def test_the_nearest_step_is_near_by_the_signal_level() -> None:
    """Not by the ratio: at the noisy end the two differ."""
    levels = torch.tensor([100.0, 157.0, 0.3, 20.0], dtype=torch.float64)
    wanted = [(1 / (1 + v**2) - LINEAR.alphas_cumprod).abs().argmin().item() for v in levels]
    assert time_of(levels, LINEAR, nearest=True).tolist() == wanted
    halfway = ((ratios(LINEAR)[900] + ratios(LINEAR)[901]) / 2)[None]
    assert time_of(halfway, LINEAR, nearest=True).item() == 901, "the middle of the ratios lies beyond that of alpha^2"


def test_a_model_of_fewer_steps_is_asked_by_the_times_it_knows() -> None:
    indices = [99, 399, 999]
    few = LINEAR.respace(indices)
    times = torch.tensor(indices)
    assert time_of(ratios(few), few, times=times, nearest=True).tolist() == indices
    middle = ratios(few)[:2].log().mean().exp()[None]
    assert time_of(middle, few, times=times).item() == pytest.approx(249)
    assert time_of(ratios(few).view(1, 3), few, times=times).shape == (1, 3), "in the shape of what was asked"


# ---------------------------------------------------------------------------------------------- what a student is of


def student(schedule: str = "linear", **options: Any) -> UniDad:
    teacher = tiny_denoiser((8, 8), 1)
    teacher.schedule = NoiseSchedule.create(schedule, 1000)
    mine = tiny_denoiser((8, 8), 2, teacher)
    given = UniDadOptions.model_validate({"sigma_max": 80, "target_teacher": "none", **options})
    return UniDad(Setting(mine, teacher.freeze()), given)


@pytest.mark.parametrize(("steps", "indices"), list(CHAINS.items()))
def test_the_methods_student_is_a_model_of_these_steps(steps: int, indices: list[int]) -> None:
    made = student(steps=steps, times="nearest").student
    assert (made.schedule.T, made.sampler) == (steps, "renoise")
    assert made.time_index is not None
    assert (made.time_index.dtype, made.time_index.tolist()) == (torch.int64, indices)
    torch.testing.assert_close(ratios(made.schedule), geometric_ratios(80, 0.5, steps).flip(0), rtol=1e-9, atol=0)
    between = student(steps=steps).student.time_index
    assert between is not None
    assert between.dtype == torch.float32
    torch.testing.assert_close(between.double(), time_of(ratios(made.schedule), LINEAR), rtol=1e-6, atol=0)


def test_levels_stay_within_what_the_teacher_knows_and_follow_the_images_side() -> None:
    table = ratios(LINEAR)
    wide = student(sigma_max=500)
    assert float(ratios(wide.student.schedule)[-1]) == pytest.approx(float(table[-1]))
    alpha, sigma, times = wide._levels.alphas, wide._levels.sigmas, wide._levels.times
    assert float(sigma[0] / alpha[0]) == pytest.approx(float(table[0]), rel=1e-4), "0.002 is below all that it knows"
    assert (float(times[0]), float(times[-1])) == (pytest.approx(0, abs=1e-3), pytest.approx(999))
    own = student(sigma_max=None)  # 8 pixels
    assert float(ratios(own.student.schedule)[-1]) == pytest.approx(10)
    torch.testing.assert_close(own._levels.sigmas / own._levels.alphas, karras_ratios(float(table[0]), 10).float())
    torch.testing.assert_close(
        own._levels.times.double(), time_of(karras_ratios(float(table[0]), 10), LINEAR), rtol=1e-6, atol=1e-4
    )


@pytest.mark.parametrize("times", ["nearest", "interpolate"])
def test_a_teacher_of_fewer_steps_is_asked_at_the_whole_ones_times(times: Any) -> None:
    """Its network was trained on those; so are student, critic and target teacher, which start from it."""
    steps = torch.arange(9, 1000, 10)
    whole = tiny_denoiser((8, 8), 1)
    whole.schedule = LINEAR
    few = whole.freeze().respaced(steps.tolist())
    mine = Denoiser(tiny_denoiser((8, 8), 2).network, few.schedule, 3, (1, 8, 8))
    made = UniDad(Setting(mine, few), UniDadOptions(sigma_max=80, target_teacher="none", times=times))
    levels = karras_ratios(float(ratios(few.schedule)[0]), 80)
    wanted = time_of(levels, few.schedule, times=steps, nearest=times == "nearest").to(made._levels.times.dtype)
    assert torch.equal(made._levels.times, wanted)
    assert made.student.time_index is not None
    chain = geometric_ratios(80, 0.5, 3).flip(0)
    known = time_of(chain, few.schedule, times=steps, nearest=times == "nearest")
    torch.testing.assert_close(made.student.time_index, known.to(made.student.time_index.dtype))
    assert (known - torch.tensor(CHAINS[3])).abs().max() <= 10


@pytest.mark.parametrize("options", [{"sigma_end": 80}, {"sigma_end": 0.001}, {"sigma_max": 0.4}])
def test_ends_of_the_chain_that_do_not_fit_are_refused_in_one_line(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^method\.sigma_end: .* within the teacher's 0\.01 to 157; use 0\.5, say$"):
        student(**options)
    if "sigma_end" in options:
        student(steps=1, **options)  # which has one level only
