from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from diffstill.diffusion.schedule import NoiseSchedule, cosine_betas

NAMES = ("cosine", "linear", "scaled_linear")


def test_cosine_table_has_the_known_values() -> None:
    abar = NoiseSchedule.create("cosine", 1000).alphas_cumprod
    assert abar.dtype == torch.float64
    assert abar[0].item() == pytest.approx(0.9999, abs=1e-12)  # the clip of the first beta to 1e-4
    assert abar[980].item() == pytest.approx(8.76e-4, abs=5e-7)


def test_snr_exceeds_5_at_exactly_the_first_261_timesteps() -> None:
    high = NoiseSchedule.create("cosine", 1000).snr > 5
    assert high.tolist() == [True] * 261 + [False] * 739


def test_cosine_betas_are_clipped_at_both_ends() -> None:
    betas = cosine_betas(1000)
    assert betas[0] == 1e-4
    assert betas[-1] == 0.9999
    wider = cosine_betas(1000, lo=1e-6, hi=0.999)
    assert wider[0] < 1e-4
    assert wider[-1] == 0.999
    inner = (betas > 1e-4) & (betas < 0.999)
    assert torch.equal(betas[inner], wider[inner])


@pytest.mark.parametrize(("ours", "theirs"), [("linear", "linear"), ("scaled_linear", "scaled_linear")])
def test_named_schedules_are_those_of_diffusers(ours: str, theirs: str) -> None:
    ends = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}[ours]
    stock = DDPMScheduler(beta_schedule=theirs, beta_start=ends[0], beta_end=ends[1])
    torch.testing.assert_close(NoiseSchedule.create(ours).betas.float(), stock.betas)


def test_cosine_is_diffusers_squaredcos_where_neither_is_clipped() -> None:
    stock = DDPMScheduler(beta_schedule="squaredcos_cap_v2").betas
    ours = NoiseSchedule.create("cosine").betas.float()
    inner = (stock > 1e-4) & (stock < 0.999)
    assert inner.sum() > 900
    torch.testing.assert_close(ours[inner], stock[inner], rtol=1e-5, atol=1e-7)


@given(name=st.sampled_from(NAMES), T=st.integers(2, 1500))
@settings(max_examples=40, deadline=None)
def test_every_schedule_preserves_variance_and_only_adds_noise(name: str, T: int) -> None:
    schedule = NoiseSchedule.create(name, T)
    assert schedule.T == T
    torch.testing.assert_close(schedule.alphas**2 + schedule.sigmas**2, torch.ones(T, dtype=torch.float64))
    assert bool((schedule.alphas_cumprod.diff() < 0).all())
    assert bool((schedule.snr.diff() < 0).all())
    torch.testing.assert_close(schedule.alphas_cumprod.log(), (1 - schedule.betas).log().cumsum(0))


def test_shorter_schedules_span_the_same_noise() -> None:
    for name in NAMES:
        long, short = (NoiseSchedule.create(name, T).alphas_cumprod for T in (1000, 250))
        torch.testing.assert_close(short[:-2].log(), long[3:-8:4].log(), rtol=0.03, atol=1e-3)


def test_a_schedule_survives_the_trip_through_a_diffusers_scheduler() -> None:
    schedule = NoiseSchedule.create("cosine", 200)
    exact = NoiseSchedule.from_scheduler(DDPMScheduler(200, trained_betas=schedule.betas.tolist()))
    assert torch.equal(exact.betas, schedule.betas)
    assert exact.fingerprint() == schedule.fingerprint()
    rounded = NoiseSchedule("cosine", schedule.betas.float().double())
    assert rounded.fingerprint() != schedule.fingerprint()
    assert rounded.same_as(schedule)
    stock = NoiseSchedule.from_scheduler(DDPMScheduler(beta_schedule="linear"))
    assert stock.name == "linear"
    assert stock.same_as(NoiseSchedule.create("linear", 1000))


def test_different_schedules_are_told_apart() -> None:
    cosine = NoiseSchedule.create("cosine", 200)
    assert not cosine.same_as(NoiseSchedule.create("cosine", 201))
    assert not cosine.same_as(NoiseSchedule.create("linear", 200))
    assert cosine.fingerprint() != NoiseSchedule.create("linear", 200).fingerprint()


def test_add_noise_is_that_of_diffusers_and_broadcasts_per_sample() -> None:
    schedule = NoiseSchedule.create("cosine", 1000)
    stock = DDPMScheduler(1000, trained_betas=schedule.betas.tolist())
    x0, noise = torch.randn(2, 7, 3, 4, 4).unbind()
    t = torch.tensor([0, 1, 250, 500, 750, 980, 999])
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), stock.add_noise(x0, noise, t), rtol=1e-4, atol=1e-5)
    one = schedule.add_noise(x0[3:4], noise[3:4], t[3:4])
    assert torch.equal(one, schedule.add_noise(x0, noise, t)[3:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_gives_the_table_rows_in_the_asked_shape_and_dtype(dtype: torch.dtype) -> None:
    schedule = NoiseSchedule.create("cosine", 100)
    t = torch.tensor([99, 0, 5])
    alpha, sigma = schedule.at(t, 4, dtype)
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    assert alpha.dtype == dtype
    assert torch.equal(alpha.flatten(), schedule.alphas[t].to(dtype))
    assert torch.equal(sigma.flatten(), schedule.sigmas[t].to(dtype))


@pytest.mark.parametrize(
    "betas",
    [
        torch.tensor([0.1, 0.2]),  # float32
        torch.tensor([[0.1]], dtype=torch.float64),
        torch.tensor([], dtype=torch.float64),
        torch.tensor([0.1, 1.0], dtype=torch.float64),
        torch.tensor([0.0, 0.5], dtype=torch.float64),
        torch.tensor([0.1, float("nan")], dtype=torch.float64),
    ],
)
def test_unusable_betas_are_refused(betas: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="betas must"):
        NoiseSchedule("mine", betas)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'sqrt'; one of cosine, linear, scaled_linear"):
        NoiseSchedule.create("sqrt")
