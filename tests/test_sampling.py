from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import cosine_pi, generator, uneven_world

from diffstill.analytic import GaussianMixtureWorld, analytic_denoiser
from diffstill.diffusion.guidance import TAG, Constant, GuidanceSchedule, Interval, guide
from diffstill.diffusion.prediction import PREDICTION_TYPES, PredictionType
from diffstill.diffusion.sampling import (
    ClipMode,
    ddim_sample,
    ddim_timesteps,
    image_noise,
    reaches_noise,
    steps_mend,
    usual_steps,
)
from diffstill.diffusion.schedule import NoiseSchedule

COSINE = NoiseSchedule.create("cosine", 1000)
Predict = Callable[[Tensor, Tensor], Tensor]


def sample(
    cond: Predict, null: Predict, noise: Tensor, schedule: NoiseSchedule, guidance: GuidanceSchedule, **options: object
) -> Tensor:
    def predict(x: Tensor, t: Tensor, scale: float) -> Tensor:
        return guide(cond(x, t), null(x, t), scale)

    return ddim_sample(predict, noise, schedule, guidance, **options)  # type: ignore[arg-type]


def test_timesteps_lead() -> None:
    assert ddim_timesteps(1000, 50) == list(range(980, -1, -20))
    assert ddim_timesteps(1000, 1) == [0]
    assert ddim_timesteps(1000, 3) == [666, 333, 0]
    assert ddim_timesteps(10, 10) == list(range(9, -1, -1))


@given(T=st.integers(1, 2000), data=st.data())
def test_timesteps_are_those_of_diffusers(T: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, T))
    stock = DDIMScheduler(T, timestep_spacing="leading", steps_offset=0)
    stock.set_timesteps(steps)
    assert ddim_timesteps(T, steps) == stock.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=r"must lie in 1\.\.10"):
        ddim_timesteps(10, steps)


def both_samplers(
    world: GaussianMixtureWorld, kind: PredictionType, clip: ClipMode, guidance: GuidanceSchedule, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """50 steps by ours and by diffusers: ``paper`` is its ``use_clipped_model_output=False``, ``recompute`` is True."""
    denoiser = analytic_denoiser(world, COSINE, kind)
    x = torch.randn(12, *world.sample_shape, generator=generator(0), dtype=dtype)
    labels = torch.arange(12) % world.num_classes
    ours = ddim_sample(
        lambda x, t, s: denoiser.guided(x, t, labels, s),
        x,
        COSINE,
        guidance,
        prediction_type=kind,
        clip=clip,
    )
    betas = COSINE.betas.tolist()
    stock = DDIMScheduler(
        1000, trained_betas=betas, clip_sample=clip != "none", set_alpha_to_one=True, prediction_type=kind
    )
    if dtype == torch.float64:
        stock.alphas_cumprod = COSINE.alphas_cumprod
    stock.set_timesteps(50)
    for t in stock.timesteps:
        out = guide(*denoiser.branches(x, torch.full((12,), int(t)), labels), guidance(int(t), 1000))
        x = stock.step(out, t, x, eta=0.0, use_clipped_model_output=clip == "recompute").prev_sample
    return ours, x


@pytest.mark.parametrize("guidance", [Constant(1.0), Constant(2.0), TAG()], ids=str)
@pytest.mark.parametrize("clip", ["none", "paper", "recompute"])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_ddim_is_that_of_diffusers(kind: PredictionType, clip: ClipMode, guidance: GuidanceSchedule) -> None:
    """In float64, on a world where guidance amplifies every difference: the formulas are the same."""
    ours, stock = both_samplers(uneven_world(), kind, clip, guidance, torch.float64)
    torch.testing.assert_close(ours, stock, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("clip", ["none", "paper", "recompute"])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_ddim_is_that_of_diffusers_with_its_own_float32_table(kind: PredictionType, clip: ClipMode) -> None:
    ours, stock = both_samplers(GaussianMixtureWorld.ring(), kind, clip, Constant(2.0), torch.float32)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


def test_the_clip_modes_differ_where_x0_leaves_the_range() -> None:
    world = uneven_world()
    noise = torch.randn(12, 3, 1, 1, generator=generator(0), dtype=torch.float64)
    labels = torch.arange(12) % 3
    outs = [
        sample(
            lambda x, t: world.epsilon(x, t, COSINE, labels),
            lambda x, t: world.epsilon(x, t, COSINE),
            noise,
            COSINE,
            Constant(3.0),
            clip=clip,
        )
        for clip in ("none", "paper", "recompute")
    ]
    assert outs[0].abs().max() > 1.01
    assert outs[2].abs().max() <= 1
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (outs[a] - outs[b]).abs().max() > 0.01


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("clip", ["none", "paper", "recompute"])
def test_an_oracle_epsilon_recovers_its_x0(clip: ClipMode, steps: int) -> None:
    x0 = torch.rand(3, 1, 4, 4, generator=generator(1), dtype=torch.float64) * 2 - 1
    noise = torch.randn(x0.shape, generator=generator(2), dtype=torch.float64)

    def oracle(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = COSINE.at(t, 4, torch.float64)
        return (x - alpha * x0) / sigma

    out = sample(oracle, oracle, noise, COSINE, Constant(2.0), steps=steps, clip=clip)
    torch.testing.assert_close(out, x0, rtol=1e-9, atol=1e-9)


def test_the_null_pass_is_skipped_exactly_where_the_scale_is_1() -> None:
    denoiser = analytic_denoiser(GaussianMixtureWorld.ring(), COSINE)
    labels = torch.tensor([0, 1])
    calls: list[tuple[int, int]] = []

    def count(network: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append((len(inputs[0]), int(inputs[1][0])))

    denoiser.network.register_forward_pre_hook(count)
    noise = torch.randn(2, *denoiser.sample_shape, generator=generator(0))
    scales = Interval(3.0, 0.2, 0.8)
    ddim_sample(lambda x, t, s: denoiser.guided(x, t, labels, s), noise, COSINE, scales, steps=10)
    assert calls == [(4 if 200 <= t < 800 else 2, t) for t in range(900, -1, -100)]


def single(m: float = 0.3, d: float = 0.5) -> GaussianMixtureWorld:
    return GaussianMixtureWorld.single_gaussians(torch.full((1, 1, 1, 1), m, dtype=torch.float64), d)


def pushed_moments(
    world: GaussianMixtureWorld, schedule: NoiseSchedule, kind: PredictionType, **options: object
) -> list[float]:
    """(mean, std) of the sampler's output on a Gaussian world: the whole sampler is affine there, so two probes do."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return world.prediction(x, t, schedule, None, kind)

    probes = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    out = sample(predict, predict, probes, schedule, Constant(1.0), prediction_type=kind, clip="none", **options)
    offset, top = out.flatten().tolist()
    return [offset, abs(top - offset)]


@pytest.mark.parametrize(
    ("steps", "mean", "std"),
    [
        (1000, 0.299050, 0.498495),
        (100, 0.298986, 0.485981),
        (50, 0.298911, 0.472439),
        (10, 0.298155, 0.374128),
        (4, 0.296116, 0.225390),
        (2, 0.292953, 0.084216),
    ],
)
def test_ddim_on_a_gaussian_linear_schedule_leading(steps: int, mean: float, std: float) -> None:
    """Known answers."""
    schedule = NoiseSchedule.create("linear", 1000)
    assert pushed_moments(single(), schedule, "epsilon", steps=steps) == pytest.approx([mean, std], abs=2e-6)


@pytest.mark.parametrize(
    ("steps", "mean", "std"),
    [
        (100, 0.299075, 0.485447),
        (50, 0.299102, 0.471403),
        (10, 0.299295, 0.369955),
        (4, 0.299585, 0.217608),
        (2, 0.299864, 0.071521),
    ],
)
def test_ddim_on_a_gaussian_linear_schedule_trailing(steps: int, mean: float, std: float) -> None:
    """Explicit timesteps: the trailing grid 999, 999 - T/N, ...."""
    schedule = NoiseSchedule.create("linear", 1000)
    trailing = (np.arange(1000, 0, -1000 // steps) - 1).tolist()
    moments = pushed_moments(single(), schedule, "epsilon", timesteps=trailing)
    assert moments == pytest.approx([mean, std], abs=2e-6)


@pytest.mark.parametrize(
    ("steps", "std"),
    [
        (1, 0.0),
        (2, 0.2),
        (4, 0.333441),
        (8, 0.411375),
        (16, 0.453928),
        (32, 0.476459),
        (64, 0.488094),
        (1024, 0.499248),
    ],
)
def test_ddim_on_a_gaussian_continuous_cosine(steps: int, std: float) -> None:
    """Known answers."""
    moments = pushed_moments(single(), cosine_pi(steps), "v_prediction", steps=steps)
    assert moments == pytest.approx([0.3, std], abs=1e-6)


@pytest.mark.parametrize("steps", [64, 96, 128])
def test_a_model_of_few_steps_is_sampled_from_pure_noise(steps: int) -> None:
    """N(.3, .5^2) under a cosine schedule of so many steps: 50 evenly spaced ones would begin in its clean half."""
    schedule = NoiseSchedule.create("cosine", steps)
    mean, std = pushed_moments(single(), schedule, "epsilon", steps=usual_steps(steps))
    assert (mean, std) == (pytest.approx(0.3, abs=2e-3), pytest.approx(0.5, abs=0.02))
    mean, std = pushed_moments(single(), schedule, "epsilon", steps=50)
    assert abs(mean - 0.3) > 0.05, "what would go wrong"


def test_usual_numbers_of_steps() -> None:
    assert [usual_steps(T) for T in (1000, 500, 100, 50, 8, 1)] == [50, 50, 50, 50, 8, 1]
    assert [usual_steps(T) for T in (64, 96, 128, 190)] == [64, 96, 128, 190]
    assert [usual_steps(1000, most) for most in (25, 30, 1000, 2000)] == [25, 30, 1000, 1000]
    assert usual_steps(4, 1) == 4, "one step would return the noise"


def test_steps_that_leave_the_noisy_end_out_are_named_with_what_would_do() -> None:
    assert all(steps_mend(1000, n) is None for n in (2, 4, 10, 25, 30, 50, 100, 250, 333, 500, 1000))
    assert steps_mend(1000, 0) == steps_mend(1000, 1001) == "use 1..1000, the length of the model's schedule"
    for steps, near in ((1, "use 2: "), (600, "use 500 or 851: "), (350, "use 333 or ")):
        told = steps_mend(1000, steps)
        assert told is not None
        assert told.startswith(near), told
    assert steps_mend(1, 1) is None


@given(T=st.integers(2, 2000), data=st.data())
def test_what_is_recommended_will_do(T: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, T))
    told = steps_mend(T, steps)
    assert (told is None) == reaches_noise(T, steps)
    numbers = [] if told is None else [int(word) for word in told.split(":")[0].split() if word.isdigit()]
    assert all(steps_mend(T, number) is None for number in numbers)
    assert steps_mend(T, usual_steps(T, steps)) is None


def test_many_steps_reach_the_exact_flow() -> None:
    """In the limit the map is ``m + d z``; the error falls like 1/steps."""
    errors = [0.5 - pushed_moments(single(), cosine_pi(n), "v_prediction", steps=n)[1] for n in (64, 128, 256)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("guidance", [Constant(1.0), Constant(3.0), TAG(), Interval(2.5, 0.2, 0.7)], ids=str)
def test_guided_ddim_on_gaussians_is_the_closed_form_recursion(guidance: GuidanceSchedule) -> None:
    """cond N(c, d_c^2), null N(0, d_u^2): each guided step is an affine map of x, computed here by its coefficients."""
    c, d_c, d_u = 0.4, 0.3, 0.8
    cond_world, null_world = single(c, d_c), single(0.0, d_u)
    z = torch.randn(5, 1, 1, 1, generator=generator(0), dtype=torch.float64)
    out = sample(
        lambda x, t: cond_world.epsilon(x, t, COSINE),
        lambda x, t: null_world.epsilon(x, t, COSINE),
        z,
        COSINE,
        guidance,
        clip="none",
    )
    slope, offset = 1.0, 0.0
    abar = COSINE.alphas_cumprod.tolist()
    for t in range(980, -1, -20):
        a, b = math.sqrt(abar[t]), math.sqrt(1 - abar[t])
        s = guidance(t, 1000)
        k_c, k_u = b / (abar[t] * d_c**2 + b**2), b / (abar[t] * d_u**2 + b**2)
        k, shift = s * k_c + (1 - s) * k_u, -s * k_c * a * c  # guided eps = k x + shift
        p = abar[t - 20] if t else 1.0
        gain = math.sqrt(p) / a
        noise_gain = math.sqrt(1 - p) - gain * b
        slope, offset = (gain + noise_gain * k) * slope, (gain + noise_gain * k) * offset + noise_gain * shift
    torch.testing.assert_close(out, slope * z + offset, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("scale", "steps", "on_noise", "on_condition"),
    [
        (1.0, 1, 0.0, 1.0),
        (1.0, 2, 0.2, 1.0),
        (1.0, 64, 0.488094, 1.0),
        (1.3, 1, 0.0, 1.3),
        (1.3, 2, 0.093333, 1.161333),
        (1.3, 4, 0.237951, 1.139794),
        (1.3, 8, 0.311603, 1.140016),
        (1.3, 64, 0.381897, 1.140373),
        (2.0, 2, -0.155556, 1.288889),
        (2.0, 4, 0.085880, 1.283921),
        (2.0, 8, 0.154225, 1.307986),
        (2.0, 64, 0.214433, 1.321167),
        (5.0, 1, 0.0, 5.0),
        (5.0, 2, -1.222222, -2.111111),
        (5.0, 4, 0.048627, 1.309783),
        (5.0, 8, 0.001283, 1.283653),
        (5.0, 64, 0.016728, 1.362303),
    ],
)
def test_guided_sampling_of_the_hierarchical_gaussian(
    scale: float, steps: int, on_noise: float, on_condition: float
) -> None:
    """c ~ N(0, 1), x | c ~ N(c, 1/4), null N(0, 5/4): ``sample = M_z z + M_c c``: a table of known answers."""
    schedule = cosine_pi(steps)
    null_world = single(0.0, math.sqrt(1.25))

    def run(z: float, c: float) -> float:
        cond_world = single(c, 0.5)
        out = sample(
            lambda x, t: cond_world.v(x, t, schedule),
            lambda x, t: null_world.v(x, t, schedule),
            torch.full((1, 1, 1, 1), z, dtype=torch.float64),
            schedule,
            Constant(scale),
            steps=steps,
            prediction_type="v_prediction",
            clip="none",
        )
        return out.item()

    assert run(1.0, 0.0) == pytest.approx(on_noise, abs=2e-6)
    assert run(0.0, 1.0) == pytest.approx(on_condition, abs=2e-6)


def test_samples_of_a_mixture_have_its_moments() -> None:
    """A non-linear world: 250 steps from noise land in the asked class, with the class's mean and covariance."""
    world = GaussianMixtureWorld.ring(num_classes=2, components_per_class=1, std=0.2)
    labels = torch.arange(2000) % 2
    noise = image_noise(world.sample_shape, 0, 0, 2000).double()
    out = sample(
        lambda x, t: world.epsilon(x, t, COSINE),
        lambda x, t: world.epsilon(x, t, COSINE),
        noise,
        COSINE,
        Constant(1.0),
        steps=250,
        clip="none",
    ).flatten(1)
    side = out[:, 0].sign()
    assert side.mean().abs() < 5 / math.sqrt(len(labels))
    torch.testing.assert_close(out[:, 0].abs().mean(), torch.tensor(0.7, dtype=torch.float64), atol=0.03, rtol=0)
    spread = torch.stack([out[:, 0] - 0.7 * side, out[:, 1]]).std(1)
    torch.testing.assert_close(spread, torch.full((2,), 0.2, dtype=torch.float64), atol=0.015, rtol=0)


@given(seed=st.integers(0, 2**31), first=st.integers(0, 10_000), cut=st.integers(0, 6))
@settings(max_examples=25, deadline=None)
def test_image_noise_does_not_depend_on_the_batching(seed: int, first: int, cut: int) -> None:
    whole = image_noise((1, 2, 2), seed, first, 6)
    parts = torch.cat([image_noise((1, 2, 2), seed, first, cut), image_noise((1, 2, 2), seed, first + cut, 6 - cut)])
    assert whole.shape == (6, 1, 2, 2)
    assert torch.equal(whole, parts)
    assert len(whole.flatten(1).unique(dim=0)) == 6


def test_image_noise_is_standard_normal_and_differs_between_seeds() -> None:
    noise = image_noise((4, 4, 4), 3, 0, 500)
    assert noise.mean().abs() < 5 / math.sqrt(noise.numel())
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(noise, image_noise((4, 4, 4), 4, 0, 500))
