"""The N-step stochastic sampler and what is trained for it: exact laws, the closed recursion of jumps, the scheduler
that travels, and the way there and back (guided.md 3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rounds import (
    affine_round,
    column,
    ddim,
    ddim_law,
    embedding,
    exact,
    follow,
    plain_diffusers,
    single,
    stochastic_law,
)  # fmt: skip
from torch import Tensor
from worlds import cosine_pi, generator

from diffstill.analytic import analytic_denoiser
from diffstill.checks.bench import tiny_denoiser
from diffstill.diffusion.guidance import Constant
from diffstill.diffusion.prediction import PREDICTION_TYPES, PredictionType
from diffstill.diffusion.sampling import ddim_encode, estimate, level, noise_source, stochastic_sample
from diffstill.diffusion.schedule import NoiseSchedule, spaced_indices
from diffstill.diffusion.steps import ddim_step, noising_kernel, one_step_noise
from diffstill.errors import InputError
from diffstill.evaluation.sampling import draw, sample_images
from diffstill.methods import Setting
from diffstill.methods.progressive import Progressive, ProgressiveOptions
from diffstill.methods.trajectory import trajectory_target
from diffstill.models.denoiser import Denoiser
from diffstill.models.folder import load_model, save_model
from diffstill.models.lineage import Lineage
from diffstill.pipelines.stochastic import StochasticJumpScheduler

ZERO = torch.zeros(2, dtype=torch.int64)
ANGLES = st.floats(0.0, np.pi / 2)
INNER_ANGLES = st.floats(0.001, np.pi / 2 - 0.001)

# ------------------------------------------------------------------------------------------------------ exact laws


class ExactFlow(Denoiser):
    """Jumps of two steps along the exact flow of N(.3, .5^2), whose gain is ``sqrt(V_u / V_t)``."""

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor, scale: Tensor | None = None) -> Tensor:
        (alpha, sigma), (low_alpha, low_sigma) = (level(self.schedule, s) for s in (int(t[0]), max(int(t[0]) - 2, -1)))
        gain = ((low_alpha**2 / 4 + low_sigma**2) / (alpha**2 / 4 + sigma**2)) ** 0.5
        there = 0.3 * low_alpha + gain * (x_t - 0.3 * alpha)
        # The x0 from which ``low_alpha x0 + low_sigma eps`` is that.
        ratio = low_sigma / sigma
        return (there - ratio * x_t) / (low_alpha - ratio * alpha)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 16, 64])
def test_exact_jumps_preserve_the_law(steps: int) -> None:
    base = exact(steps, "sample")
    flow = ExactFlow(base.network, base.schedule, 1, (1, 1, 1), "sample")
    assert stochastic_law(flow) == (pytest.approx(0.3, abs=1e-7), pytest.approx(0.5, abs=1e-7))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(("steps", "std"), [(2, 0.2), (4, 0.274695), (8, 0.334183), (16, 0.398950)])
def test_an_ordinary_denoiser_is_too_narrow_in_jumps_of_two(kind: PredictionType, steps: int, std: float) -> None:
    assert stochastic_law(exact(steps, kind)) == (pytest.approx(0.3, abs=1e-6), pytest.approx(std, abs=2e-6))


RECURSION = {64: 0.484637, 32: 0.484652, 16: 0.484710, 8: 0.484937, 4: None, 2: 0.487461, 1: 0.488094}
GAINS = {8: 0.942255, 4: 0.787862, 2: 0.488094}


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_closed_recursion_from_64_deterministic_steps(kind: PredictionType) -> None:
    """First the jumps of the 64-step student, then round by round: each from the jumps of the one before."""
    model: Denoiser = exact(64, kind)
    tolerance = 1e-6 if kind != "epsilon" else 3e-6  # the clean image at alpha = 3e-8
    for steps, std in RECURSION.items():
        model = follow(model, steps, reach=2)
        mean, found = stochastic_law(model)
        assert mean == pytest.approx(0.3, abs=tolerance), steps
        assert std is None or found == pytest.approx(std, abs=tolerance), steps
        if steps in GAINS:
            x, t = column(0, 1), steps - 1
            out = model(x, torch.full((2,), t), ZERO)
            x0, eps = estimate(out, x, t, model.schedule, kind, "none")
            alpha, sigma = level(model.schedule, t - 2)
            low, high = (alpha * x0 + sigma * eps).flatten().tolist()
            assert high - low == pytest.approx(GAINS[steps], abs=tolerance)


@pytest.mark.parametrize("steps", [32, 8, 4, 2])
def test_the_rounds_end_where_one_training_from_the_first_teacher_would(steps: int) -> None:
    model: Denoiser = exact(64)
    direct = follow(model, steps, reach=2)
    for count in (64, 32, 16, 8, 4, 2):
        model = follow(model, count, reach=2)
        if count == steps:
            break
    x, labels = column(-1.5, 0.7, 2.0), torch.zeros(3, dtype=torch.int64)
    for t in range(steps):
        stamp = torch.full((3,), t)
        torch.testing.assert_close(model(x, stamp, labels), direct(x, stamp, labels), rtol=1e-9, atol=1e-9)


def test_affine_students_in_the_trainer_make_the_recursion(tmp_path: Path) -> None:
    """Rounds 8 (deterministic teacher) -> 8 -> 4 -> 2 with ``sampler: stochastic``."""
    perfect: Denoiser = exact(8)
    trained: Denoiser = exact(8)
    for steps in (8, 4, 2):
        perfect = follow(perfect, steps, reach=2)
        trained = affine_round(trained, steps, tmp_path / str(steps), sampler="stochastic")
        assert trained.sampler == "stochastic"
        assert stochastic_law(trained) == pytest.approx(stochastic_law(perfect), abs=2e-3)
    assert abs(stochastic_law(exact(2))[1] - stochastic_law(trained)[1]) > 0.1


@given(ends=st.tuples(INNER_ANGLES, INNER_ANGLES).filter(lambda pair: pair[0] != pair[1]))
@settings(deadline=None)
def test_the_noising_kernel_keeps_variance_and_agrees_with_the_log_snr_form(ends: tuple[float, float]) -> None:
    k, u = sorted(ends)
    lower, upper = (np.cos(k), np.sin(k)), (np.cos(u), np.sin(u))
    factor, spread = noising_kernel(*lower, *upper)
    assert factor == pytest.approx(upper[0] / lower[0])
    assert factor**2 * lower[1] ** 2 + spread**2 == pytest.approx(upper[1] ** 2)
    ratio = (upper[0] / upper[1]) ** 2 / (lower[0] / lower[1]) ** 2  # exp(logsnr_u - logsnr_k)
    assert spread**2 == pytest.approx((1 - ratio) * upper[1] ** 2, abs=1e-12)


@pytest.mark.parametrize(
    ("t", "factor", "spread"), [(1.0, 0.541196, 0.840896), (0.75, 0.765367, 0.643594), (0.5, 0.923880, 0.382683)]
)
def test_the_noising_kernel_of_four_steps(t: float, factor: float, spread: float) -> None:
    (k, u) = ((np.cos(np.pi / 2 * s), np.sin(np.pi / 2 * s)) for s in (t - 0.5, t - 0.25))
    assert noising_kernel(*k, *u) == pytest.approx((factor, spread), abs=1e-6)


def test_from_the_clean_image_the_kernel_is_the_forward_process() -> None:
    assert noising_kernel(1.0, 0.0, 0.6, 0.8) == pytest.approx((0.6, 0.8))
    assert noising_kernel(0.6, 0.8, 0.6, 0.8) == pytest.approx((1.0, 0.0)), "no way, no noise; never a NaN"


# ------------------------------------------------------------------------------------------------- the way up


@given(t=ANGLES, u=ANGLES, seed=st.integers(0, 99))
@settings(deadline=None)
def test_the_one_step_noise_reaches_what_it_was_made_of(t: float, u: float, seed: int) -> None:
    assume(t + 0.01 < u <= np.pi / 2 - 0.001)
    angle = torch.tensor([t, u], dtype=torch.float64)
    (a_t, a_u), (s_t, s_u) = angle.cos(), angle.sin()
    x_t, x_u = torch.randn(2, 5, dtype=torch.float64, generator=generator(seed))
    eps = one_step_noise(x_t, x_u, a_t, s_t, a_u, s_u)
    x0 = (x_t - s_t * eps) / a_t
    torch.testing.assert_close(a_u * x0 + s_u * eps, x_u, rtol=1e-9, atol=1e-9)
    if t > 0.01:
        torch.testing.assert_close(ddim_step(x0, x_t, a_t, s_t, a_u, s_u), x_u, rtol=1e-9, atol=1e-9)


def test_one_encoding_step_with_it_lands_where_the_teachers_two_do() -> None:
    """From the clean image, where the target of the clean image is singular, and from a noisy one."""
    teacher = exact(8)
    labels = torch.zeros(3, dtype=torch.int64)
    x, one = column(-1.0, 0.2, 0.9), Constant(1.0)

    def encode(predict: Any, kind: PredictionType, stamps: list[int]) -> Tensor:
        return ddim_encode(predict, x, teacher.schedule, one, timesteps=stamps, prediction_type=kind)

    stops = [encode(lambda z, t, s: teacher(z, t, labels), "v_prediction", list(range(n))) for n in range(8)]
    levels = [torch.tensor(level(teacher.schedule, i), dtype=torch.float64).unbind() for i in range(-1, 7)]

    def student(z: Tensor, t: Tensor, scale: float) -> Tensor:
        """At -1, 1, 3: the noise estimate of two of the teacher's steps. The clean image is shown as timestep 0."""
        here = int(t[0]) + 1 if int(t[0]) else 0
        torch.testing.assert_close(z, stops[here])
        return one_step_noise(z, stops[here + 2], *levels[here], *levels[here + 2])

    for stamps in ([1], [1, 3], [1, 3, 5]):
        torch.testing.assert_close(encode(student, "epsilon", stamps), stops[stamps[-1] + 1], rtol=0, atol=1e-12)


DDIB = {4: (1.9189, 2, 2.1622), 64: (1.7658, 2, 2.4685), 256: (1.7540, 2, 2.4919)}


def with_clean_step(steps: int) -> NoiseSchedule:
    """``cosine_pi`` with a nearly clean timestep 0 (t = 1e-6) before its own: what a clean image is shown as when it
    is encoded. On the grid alone that would be t = 1 / steps."""
    abar = torch.cat([torch.tensor([1e-6]).double().mul(np.pi / 2).cos() ** 2, cosine_pi(steps).alphas_cumprod])
    return NoiseSchedule("cosine_pi", 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]]))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", list(DDIB))
def test_style_transfer_between_gaussians_has_the_known_map(kind: PredictionType, steps: int) -> None:
    """A = N(-1, .5^2) encodes, B = N(2, .25^2) decodes: in the limit -1.5, -1, 0 become 1.75, 2, 2.5."""
    schedule, labels = with_clean_step(steps), torch.zeros(3, dtype=torch.int64)
    one, two = (analytic_denoiser(single(m, d), schedule, kind) for m, d in ((-1.0, 0.5), (2.0, 0.25)))
    up = list(range(1, steps + 1))
    noise = ddim_encode(
        lambda x, t, s: one.guided(x, t, labels, s), column(-1.5, -1.0, 0.0), schedule, Constant(1.0),
        timesteps=up, prediction_type=kind,
    )  # fmt: skip
    back = ddim(two, noise, labels, timesteps=up[::-1])
    assert back.flatten().tolist() == pytest.approx(DDIB[steps], abs=1e-4)


def test_encoding_and_decoding_with_one_model_comes_back_in_the_limit() -> None:
    def error(steps: int) -> float:
        model = analytic_denoiser(single(), with_clean_step(steps), "v_prediction")
        x, up = column(-0.8, 1.3), list(range(1, steps + 1))
        noise = ddim_encode(
            lambda z, t, s: model.guided(z, t, ZERO, s), x, model.schedule, Constant(1.0),
            timesteps=up, prediction_type="v_prediction",
        )  # fmt: skip
        return float((ddim(model, noise, ZERO, timesteps=up[::-1]) - x).abs().max())

    errors = [error(steps) for steps in (32, 64, 128)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


# ------------------------------------------------------------------------------------ the scheduler that travels


def student(kind: PredictionType = "v_prediction", steps: int = 5) -> Denoiser:
    """A random U-Net as a model for the stochastic sampler, with the times of a teacher."""
    whole = tiny_denoiser((8, 8), 1, None, kind)
    with torch.no_grad():
        embedding(whole).weight.mul_(3)
    fewer = whole.respaced(spaced_indices(1000, steps, "trailing"))
    made = Denoiser(whole.network.eval(), fewer.schedule, 3, (1, 8, 8), kind)
    made.time_index, made.sampler = fewer.time_index, "stochastic"
    return made


def scheduler_of(model: Denoiser, **options: Any) -> StochasticJumpScheduler:
    T = model.schedule.T
    return StochasticJumpScheduler(T, model.schedule.betas.tolist(), prediction_type=model.prediction_type, **options)


@pytest.mark.parametrize("clip", ["none", "paper", "recompute"])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_scheduler_goes_the_samplers_way(kind: PredictionType, clip: Any) -> None:
    model, labels, seed = student(kind), torch.arange(3), 4
    seen: list[Tensor] = []

    def predict(x: Tensor, t: Tensor, scale: float) -> Tensor:
        seen.append(x)
        return model.guided(x, t, labels, scale)

    with torch.no_grad():
        fresh = noise_source(model.sample_shape, seed, 0, 3)
        ours = stochastic_sample(
            predict, fresh(), model.schedule, Constant(2.0), fresh, prediction_type=kind, clip=clip
        )
        scheduler = scheduler_of(model, clip_sample=clip != "none")
        scheduler.set_timesteps(5)
        draws = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(3)]
        x = torch.stack([torch.randn(model.sample_shape, generator=g) for g in draws])
        for step, t in enumerate(scheduler.timesteps):
            torch.testing.assert_close(x, seen[step], rtol=1e-4, atol=1e-4)
            out = model.guided(scheduler.scale_model_input(x, t), t.expand(3), labels, 2.0)
            x = scheduler.step(out, t, x, use_clipped_model_output=clip == "recompute", generator=draws).prev_sample
    assert ours.std() > 0.1
    torch.testing.assert_close(x, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))


def test_clip_modes_are_ways_apart() -> None:
    """Else the test above would not tell them from each other."""
    model, labels = student(), torch.arange(3)
    outs = [
        draw(model, labels, Constant(2.0), noise_source(model.sample_shape, 4, 0, 3), clip=clip)
        for clip in ("none", "paper", "recompute")
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (outs[a] - outs[b]).abs().max() > 0.01


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_another_number_of_steps_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"^num_inference_steps {steps}: this model is sampled in all its 5 steps$"):
        scheduler_of(student()).set_timesteps(steps)
    with pytest.raises(InputError, match=f"^steps: {steps} "):
        sample_images(student(), 2, guidance=Constant(1.0), steps=steps)


def test_the_scheduler_needs_its_betas_and_noises_like_the_schedule() -> None:
    for betas in (None, [0.1, 0.2]):
        with pytest.raises(ValueError, match="give one beta for each of num_train_timesteps"):
            StochasticJumpScheduler(5, betas)
    model = student()
    x, noise = torch.randn(2, 3, 1, 8, 8, generator=generator(0))
    t = torch.tensor([0, 4, 2])
    torch.testing.assert_close(scheduler_of(model).add_noise(x, noise, t), model.schedule.add_noise(x, noise, t))


# -------------------------------------------------------------------------------------------------- saved and loaded


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stochastic")
    for kind in ("v_prediction", "epsilon"):
        save_model(student(kind), root / kind, lineage=Lineage.new(kind, "progressive"), class_names=["a", "b", "c"])
    return root


def test_a_stochastic_model_comes_back(saved: Path) -> None:
    model, back = student(), load_model(saved / "v_prediction").denoiser
    assert (back.sampler, back.scale_range, back.prediction_type) == ("stochastic", None, "v_prediction")
    assert back.time_index is not None
    assert back.time_index.tolist() == [199, 399, 599, 799, 999]
    assert torch.equal(back.schedule.betas, model.schedule.betas)
    index = json.loads((saved / "v_prediction" / "model_index.json").read_text())
    assert index["scheduler"] == ["stochastic", "StochasticJumpScheduler"]
    assert "import diffstill" not in (saved / "v_prediction" / "scheduler" / "stochastic.py").read_text()
    labels = torch.tensor([0, 2])
    mine, theirs = (sample_images(m, 2, guidance=Constant(2.0), steps=5, labels=labels) for m in (model, back))
    assert (mine.int() - theirs.int()).abs().max() <= 1


def test_plain_diffusers_draws_a_stochastic_models_pixels_as_a_stranger(saved: Path) -> None:
    runs: dict[str, dict[str, Any]] = {
        "default": {},
        "strong": {"guidance_scale": 3.5},
        "unclipped": {"clip": "none"},
        "fewer": {"num_inference_steps": 4},
    }
    labels, seed = [0, 1, 2, 2], 11
    found = plain_diffusers(saved, ["v_prediction", "epsilon"], labels, seed, runs)
    for name in ("v_prediction", "epsilon"):
        model = load_model(saved / name).denoiser
        for run, scale in {"default": 2.0, "strong": 3.5}.items():
            fresh = noise_source(model.sample_shape, seed, 0, 4)
            with model.evaluating():
                ours = draw(model, torch.tensor(labels), Constant(scale), fresh)
            theirs = torch.from_numpy(found[f"{name}/{run}"]).permute(0, 3, 1, 2)
            assert theirs.std() > 0.1
            torch.testing.assert_close(theirs, (ours / 2 + 0.5).clamp(0, 1), rtol=0, atol=2e-4)
        assert np.abs(found[f"{name}/unclipped"] - found[f"{name}/default"]).max() > 0.01
        assert str(found[f"{name}/fewer"]) == "num_inference_steps 4: this model is sampled in all its 5 steps"


# ---------------------------------------------------------------------------------------- refusals


def stochastic_teacher(steps: int = 8) -> Denoiser:
    return student(steps=steps).freeze()


def progressive(teacher: Denoiser, **options: Any) -> Progressive:
    made = Denoiser(tiny_denoiser((8, 8), 2).network, teacher.schedule, 3, (1, 8, 8), "v_prediction")
    return Progressive(Setting(made, teacher), ProgressiveOptions(**options))


def test_a_stochastic_teacher_teaches_only_its_own_jumps() -> None:
    teacher = stochastic_teacher()
    halved = teacher.respaced(spaced_indices(8, 4, "trailing"))
    assert progressive(halved, sampler="stochastic").student.sampler == "stochastic"
    for wrong, options in (
        (halved, {}),  # a deterministic student
        (teacher, {"sampler": "stochastic"}),  # all of its steps: the first would be one of one
        (teacher.respaced(spaced_indices(8, 4)), {"sampler": "stochastic"}),  # leading: no way to the clean image
        # Seen through all of its steps, it would be taken for a deterministic model.
        (teacher.respaced(range(8)).respaced(spaced_indices(8, 4, "trailing")), {}),
        (teacher.respaced(range(8)).respaced(spaced_indices(8, 4, "trailing")), {"sampler": "stochastic"}),
    ):
        with pytest.raises(InputError, match="does not fit a teacher that was made for the stochastic sampler") as told:
            progressive(wrong, **options)
        assert "\n" not in str(told.value)


def test_a_deterministic_teacher_may_have_a_stochastic_student() -> None:
    base = exact(8)
    made = follow(base, 8, reach=2)
    x, stamp = column(0, 1), torch.full((2,), 5)
    torch.testing.assert_close(made(x, stamp, ZERO), trajectory_target(base, x, stamp, ZERO, reach=2))
    assert ddim_law(base)[1] == pytest.approx(0.411375, abs=1e-6)
