"""Progressive distillation: closed-form slopes and chains, rounds in the real trainer, what a round starts and ends as
(guided.md 2)."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_same, losses, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from rounds import Follower, affine_round, column, ddim, ddim_law, embedding, exact, follow
from torch import Tensor, nn
from worlds import generator

from diffstill.analytic import MLPStudent
from diffstill.checks.bench import BATCH, Bench, Killed, tiny_denoiser
from diffstill.diffusion.prediction import PREDICTION_TYPES, PredictionType, to_x0
from diffstill.diffusion.sampling import estimate, level
from diffstill.diffusion.schedule import NoiseSchedule, spaced_indices
from diffstill.diffusion.weighting import distance_weights
from diffstill.engine.log import read_log
from diffstill.engine.loop import Trainer
from diffstill.errors import InputError
from diffstill.jobs.build import Teacher, build_student, respaced
from diffstill.methods import METHODS, Setting, TeacherOutputs
from diffstill.methods.progressive import Progressive, ProgressiveOptions
from diffstill.methods.trajectory import trajectory_target
from diffstill.models.denoiser import Denoiser
from diffstill.recipe import MethodSpec, NetworkSpec, RespaceSpec

KINDS = st.sampled_from(PREDICTION_TYPES)
ZERO = torch.zeros(2, dtype=torch.int64)

# --------------------------------------------------------------------------------------------- known slopes and chains


@pytest.mark.parametrize(
    ("steps", "std"), [(1, 0.0), (2, 0.2), (4, 0.333441), (8, 0.411375), (32, 0.476459), (1024, 0.499248)]
)
def test_a_strided_model_has_the_table_of_its_number_of_steps(steps: int, std: float) -> None:
    """Known answers by way of ``respaced``; test_sampling.py has them to 1e-6. The noisiest step keeps the signal
    of a beta that float32 can tell from 1: alpha is 3.5e-4 of the step before."""
    model = exact(1024).respaced(spaced_indices(1024, steps, "trailing"))
    assert ddim_law(model) == (pytest.approx(0.3, abs=2e-4), pytest.approx(std, abs=4e-4))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(("steps", "t", "slope"), [(4, 3, 0.0581653), (4, 1, 0.4456358), (2, 1, 0.2)])
def test_two_steps_in_one_have_the_known_slope(kind: PredictionType, steps: int, t: int, slope: float) -> None:
    """``x~ = m + k (z - alpha m)``: k for the ways (1, .75, .5), (.5, .25, 0) and (1, .5, 0), at the teacher's own
    levels: two steps down of a model that is not respaced, since k at t = 1 moves with what signal is left there."""
    teacher = exact(steps, kind)
    x, stamp = column(0, 1), torch.full((2,), t)
    target = trajectory_target(teacher, x, stamp, ZERO, reach=2)
    low, high = teacher.x0(target, x, stamp).flatten().tolist()
    assert high - low == pytest.approx(slope, abs=1e-7)
    assert low == pytest.approx(0.3 - slope * level(teacher.schedule, t)[0] * 0.3, abs=1e-7)


def test_the_teachers_own_slope_is_another() -> None:
    """``alpha d^2 / V``: what a student learns whose target is not its teacher's way."""
    teacher = exact(4)
    x, stamp = column(0, 1), torch.ones(2, dtype=torch.int64)
    low, high = teacher.x0(teacher(x, stamp, ZERO), x, stamp).flatten().tolist()
    alpha, sigma = level(teacher.schedule, 1)
    assert high - low == pytest.approx(0.25 * alpha / (0.25 * alpha**2 + sigma**2))
    assert abs(high - low - 0.4456358) > 0.1


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_perfect_chain_of_64_steps_ends_in_one_that_does_them_all(kind: PredictionType) -> None:
    model: Denoiser = exact(64, kind)
    wanted = ddim_law(model)
    assert wanted == (pytest.approx(0.3, abs=1e-9), pytest.approx(0.4880940, abs=5e-8))
    for steps in (32, 16, 8, 4, 2, 1):
        model = follow(model, steps)
        assert ddim_law(model) == pytest.approx(wanted, abs=1e-11 if kind != "epsilon" else 1e-7), steps


# ----------------------------------------------------------------------------------------------------- any network


def random_model(kind: PredictionType, name: str, T: int, seed: int) -> Denoiser:
    """A network of random float64 weights, far from any denoiser."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MLPStudent(2, (3, 1, 1), T, width=16).double()
        for parameter in network.parameters():
            parameter.data = 0.7 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    return Denoiser(network, NoiseSchedule.create(name, T), 2, (3, 1, 1), kind).freeze()


@given(
    kind=KINDS,
    name=st.sampled_from(["cosine", "linear", "scaled_linear"]),
    T=st.integers(2, 24),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_one_step_of_a_perfect_student_lands_where_the_teachers_do(
    kind: PredictionType, name: str, T: int, seed: int, data: st.DataObject
) -> None:
    """The DDIM steps are those of the sampler: its estimate of (x0, eps), put together at the level it goes to."""
    teacher = random_model(kind, name, T, seed)
    indices = sorted(data.draw(st.sets(st.integers(0, T - 1), min_size=1, max_size=T)))
    t = data.draw(st.integers(0, len(indices) - 1))
    fewer = teacher.respaced(indices)
    x = torch.randn(4, 3, 1, 1, dtype=torch.float64, generator=generator(seed))
    labels = torch.tensor([0, 1, 2, 1])

    def step(model: Denoiser, out: Tensor, x: Tensor, t: int, u: int) -> Tensor:
        x0, eps = estimate(out, x, t, model.schedule, kind, "none")
        alpha, sigma = level(model.schedule, u)
        return alpha * x0 + sigma * eps

    end = indices[t - 1] if t else -1
    z = x
    for stamp in range(indices[t], end, -1):
        z = step(teacher, teacher(z, torch.full((4,), stamp), labels), z, stamp, stamp - 1)
    reached = trajectory_target(fewer, x, torch.full((4,), t), labels)
    landed = step(fewer, reached, x, t, t - 1)
    scale = max(1.0, float(z.abs().max()), float(reached.abs().max()))
    # Predictions of epsilon are divided by alpha to step, those of x0 by sigma.
    worst = 1 / min(*level(fewer.schedule, t)) if kind != "v_prediction" else 1.0
    torch.testing.assert_close(landed, z, rtol=0, atol=1e-12 * scale * worst)


@given(kind=KINDS, chain=st.sampled_from([(6, 3, 1), (8, 4, 2, 1), (12, 5), (7, 2)]), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_chain_of_perfect_students_samples_what_the_first_teacher_does(
    kind: PredictionType, chain: tuple[int, ...], seed: int
) -> None:
    model = random_model(kind, "linear", chain[0], seed)
    x = torch.randn(3, 3, 1, 1, dtype=torch.float64, generator=generator(seed))
    labels = torch.tensor([0, 1, 2])
    wanted = ddim(model, x, labels)
    for steps in chain[1:]:
        model = follow(model, steps)
        torch.testing.assert_close(ddim(model, x, labels), wanted, rtol=1e-8, atol=1e-8)


def test_each_sample_goes_its_own_way_at_its_own_scale() -> None:
    """Timesteps, ways of different length and guidance scales within one batch: as one by one."""
    teacher = random_model("v_prediction", "cosine", 20, 3).respaced([2, 3, 11, 19])
    x = torch.randn(4, 3, 1, 1, dtype=torch.float64, generator=generator(0))
    t, labels = torch.tensor([3, 0, 2, 1]), torch.tensor([1, 0, 0, 1])
    scale = torch.tensor([1.0, 2.5, 4.0, 0.5], dtype=torch.float64)
    for reach in (1, 2):
        together = trajectory_target(teacher, x, t, labels, reach=reach, scale=scale)
        for i in range(4):
            part = slice(i, i + 1)
            alone = trajectory_target(teacher, x[part], t[part], labels[part], reach=reach, scale=scale[part])
            torch.testing.assert_close(together[part], alone, rtol=1e-10, atol=1e-10)
    plain = trajectory_target(teacher, x, t, labels)
    torch.testing.assert_close(trajectory_target(teacher, x, t, labels, scale=torch.ones(4).double()), plain)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_noisiest_step_keeps_its_target_though_float32_betas_keep_more_signal(schedule: str) -> None:
    """Betas of a respaced schedule stay below 1 in float32, so that its last level is not the teacher's; a prediction
    that were made for the teacher's level would give an epsilon student another clean image."""
    teacher = random_model("epsilon", schedule, 1000, 1)
    student = follow(teacher, 2)
    x = torch.randn(3, 3, 1, 1, dtype=torch.float64, generator=generator(1))
    labels = torch.arange(3)
    # The teacher's own steps, from the same image.
    torch.testing.assert_close(ddim(student, x, labels), ddim(teacher, x, labels), rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------- the trainer, for real


def test_affine_students_in_the_trainer_converge_to_the_slopes(tmp_path: Path) -> None:
    """Rounds 4 -> 2 -> 1: k of each grid point, and at the end one step with the gain of four DDIM steps."""
    two = affine_round(exact(4), 2, tmp_path / "two")
    x = column(0, 1).float()
    for t, slope in ((1, 0.0581653), (0, 0.4456358)):
        stamp = torch.full((2,), t)
        low, high = two.x0(two(x, stamp, ZERO), x, stamp).flatten().tolist()
        assert high - low == pytest.approx(slope, abs=5e-4)
    assert two.time_index is not None
    assert two.time_index.tolist() == [1, 3], "known by the first teacher's timesteps"
    one = affine_round(two, 1, tmp_path / "one")
    assert one.time_index is not None
    assert one.time_index.tolist() == [3]
    assert ddim_law(one) == (pytest.approx(0.3, abs=1e-3), pytest.approx(0.333441, abs=1e-3))


# --------------------------------------------------------------------------------------------------- the loss


def setting(kind: PredictionType = "v_prediction", family: str = "unet2d", steps: int = 4, seed: int = 2) -> Setting:
    """A random U-Net as a teacher of ``2 steps`` and a student of its shape with weights of its own."""
    teacher = tiny_denoiser((8, 8), 1, None, kind, family)
    if teacher.takes_scale:
        nn.init.normal_(embedding(teacher).scale.weight, std=0.3, generator=generator(5))
        teacher.scale_range = (1.0, 4.0)
    whole = teacher.freeze().respaced(spaced_indices(1000, 2 * steps, "trailing"))
    fewer = whole.respaced(spaced_indices(2 * steps, steps, "trailing"))
    network = tiny_denoiser((8, 8), seed, None, kind, family).network
    student = Denoiser(network, fewer.schedule, teacher.num_classes, teacher.sample_shape, kind)
    student.scale_range = teacher.scale_range
    return Setting(student, fewer)


def batch_for(method: Any) -> Any:
    made = Bench(METHODS["dash"]).batch()
    t = torch.arange(len(made.t)) % method.schedule.T
    return replace(made, t=t, t_global=t, x_t=method.schedule.add_noise(made.x0, made.noise, t))


def loss_of(method: Any, batch: Any) -> Any:
    return method.loss(batch, TeacherOutputs(method.teacher, batch, method.teacher_needs))


@pytest.mark.parametrize("form", ["constant", "snr", "truncated_snr", "v"])
@pytest.mark.parametrize("family", ["unet2d", "guided_unet2d"])
def test_the_loss_is_the_weighted_error_of_the_clean_image(form: Any, family: str) -> None:
    method = Progressive(setting(family=family), ProgressiveOptions(weighting=form, null_weight=0.25))
    batch = batch_for(method)
    student, teacher = method.student, method.teacher
    alpha, sigma = (value.flatten().double() for value in method.schedule.at(batch.t, 4, torch.float64))
    snr = alpha**2 / sigma**2
    weight = {"constant": torch.ones_like(snr), "snr": snr, "truncated_snr": snr.clamp(min=1), "v": 1 + snr}[form]

    def term(labels: Tensor, scale: Tensor | None) -> Tensor:
        x, t = batch.x_t, batch.t
        wanted = trajectory_target(teacher, x, t, labels, scale=scale)
        out = student(x, t, labels) if scale is None else student(x, t, labels, scale)
        error = (student.x0(out, x, t) - student.x0(wanted, x, t)).square().flatten(1).mean(1)
        return (weight * error).mean().float()

    with torch.no_grad():
        found = loss_of(method, batch)
        if family == "unet2d":
            null = torch.full_like(batch.labels, student.null_label)
            parts = {"output": term(batch.labels, None), "null": term(null, None)}
            total = parts["output"] + 0.25 * parts["null"]
        else:
            scale = 1 + 3 * batch.uniform("guidance_scale")
            parts = {"output": term(batch.labels, scale)}
            total = parts["output"]
    assert found.parts.keys() == parts.keys()
    for name, value in parts.items():
        torch.testing.assert_close(found.parts[name], value, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(found.total, total, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("form", ["constant", "snr", "truncated_snr", "v"])
def test_weights_of_the_output_are_those_of_the_clean_image(kind: PredictionType, form: Any) -> None:
    schedule = NoiseSchedule.create("linear", 50)
    alpha, sigma = schedule.alphas, schedule.sigmas
    x_t, a, b = torch.randn(3, 50, dtype=torch.float64, generator=generator(0))
    distance = (to_x0(a, x_t, alpha, sigma, kind) - to_x0(b, x_t, alpha, sigma, kind)).square()
    snr = (alpha / sigma).square()
    weight = {"constant": snr**0, "snr": snr, "truncated_snr": snr.clamp(min=1), "v": 1 + snr}[form]
    torch.testing.assert_close(distance_weights(schedule, kind, form) * (a - b).square(), weight * distance)


# -------------------------------------------------------------------------------------------- a round's bookkeeping


def round_of(family: str, **options: Any) -> Any:
    """A round of 8 -> 4 steps, put together as the jobs do it."""
    model = tiny_denoiser((8, 8), 1, None, "v_prediction", family)
    spec = MethodSpec(name="progressive", **options)
    whole = Teacher(model.freeze(), None, None, None)
    teacher = respaced(whole, RespaceSpec(steps=4, spacing="trailing", teacher_steps=8)).denoiser
    student = build_student(NetworkSpec(family="teacher"), spec, teacher, seed=0)
    return model, Progressive(Setting(student, teacher), spec.build_options())


@pytest.mark.parametrize("family", ["unet2d", "guided_unet2d"])
def test_a_round_starts_as_its_teachers_copy(family: str) -> None:
    model, method = round_of(family)
    student = method.student
    assert (student.schedule.T, method.teacher.schedule.T) == (4, 4)
    assert student.time_index.tolist() == [249, 499, 749, 999], "t = 1/4, 1/2, 3/4, 1"
    assert (student.prediction_type, student.scale_range) == ("v_prediction", model.scale_range)
    assert_same(student.network.state_dict(), model.network.state_dict())
    assert not {id(p) for p in student.network.parameters()} & {id(p) for p in model.network.parameters()}
    assert all(p.requires_grad for p in student.network.parameters())
    assert not any(p.requires_grad for p in model.network.parameters())
    x, labels, t = torch.randn(4, 1, 8, 8, generator=generator(0)), torch.tensor([0, 3, 2, 1]), torch.arange(4)
    with student.evaluating():
        mine, theirs = student(x, t, labels), model(x, torch.tensor([249, 499, 749, 999]), labels)
        elsewhere = model(x, t, labels)
    # Convolutions of thawed weights round otherwise.
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)
    assert (mine - elsewhere).abs().max() > 1e-3


def trainer_of(method: Progressive, folder: Path, steps: int = 6, die_at: int | None = None) -> Trainer:
    bench = Bench(METHODS["dash"])

    def told(progress: Any) -> None:
        if progress.images_seen == (die_at or -1) * BATCH:
            raise Killed

    made = bench.trainer(folder, steps=steps, lr=2e-3, lr_min=0, decay="linear", checkpoint_every=3 * BATCH)
    arm = type(made.arms[0])("arm", method, made.settings, bench.runtime)
    stream = bench.stream()
    stream.schedule = method.schedule
    return Trainer([arm], stream, made.settings, bench.runtime, folder, teacher=method.teacher, on_progress=told)


@pytest.mark.parametrize("family", ["unet2d", "guided_unet2d"])
def test_a_round_begins_with_a_new_optimizer_and_ends_at_rate_0(family: str, tmp_path: Path) -> None:
    model, method = round_of(family)
    before = copy.deepcopy(model.network.state_dict())
    trainer = trainer_of(method, tmp_path)
    arm = trainer.arms[0]
    assert len(arm.optimizers["train"].state) == 0
    trainer.run()
    rates = [r["lr"] for r in read_log(tmp_path / "log.jsonl") if "loss" in r]
    assert rates == pytest.approx([2e-3 * (1 - (i + 1) / 6) for i in range(6)])
    assert rates[-1] == 0
    assert arm.optimizers["train"].param_groups[0]["lr"] == pytest.approx(2e-3 / 6), "of the last step taken"
    assert_same(model.network.state_dict(), before)
    assert any(not torch.equal(before[k], v) for k, v in arm.student.network.state_dict().items())
    assert arm.student.time_index is not None
    # The next round: half the steps, this one's weights and times, nothing of its optimizer.
    spec = MethodSpec(name="progressive")
    done = Teacher(arm.student.freeze(), None, None, None)
    teacher = respaced(done, RespaceSpec(steps=2, spacing="trailing")).denoiser
    following = Progressive(
        Setting(build_student(NetworkSpec(family="teacher"), spec, teacher, seed=0), teacher), ProgressiveOptions()
    )
    assert following.student.time_index is not None
    assert following.student.time_index.tolist() == [499, 999]
    assert_same(following.student.network.state_dict(), arm.student.network.state_dict())
    assert len(trainer_of(following, tmp_path / "next").arms[0].optimizers["train"].state) == 0


@pytest.mark.parametrize(
    ("family", "options"), [("unet2d", {}), ("guided_unet2d", {}), ("unet2d", {"sampler": "stochastic"})]
)
def test_a_round_killed_in_the_middle_ends_bit_identical(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    whole = trainer_of(round_of(family, **options)[1], tmp_path / "whole")
    whole.run()
    with pytest.raises(Killed):
        trainer_of(round_of(family, **options)[1], tmp_path / "cut", die_at=4).run()
    again = trainer_of(round_of(family, **options)[1], tmp_path / "cut")
    again.run()
    assert_same(again.arms[0].tensors(), whole.arms[0].tensors())
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


# ----------------------------------------------------------------------------------------------------- refusals


def test_epsilon_predictions_under_a_weight_on_the_clean_image_are_refused() -> None:
    with pytest.raises(InputError, match=r"^method\.weighting: 'truncated_snr' weighs epsilon predictions") as caught:
        Progressive(setting("epsilon"), ProgressiveOptions())
    assert "use weighting: snr" in one_line(caught.value)
    Progressive(setting("epsilon"), ProgressiveOptions(weighting="snr"))


def test_students_that_differ_from_the_teacher_in_the_scale_are_refused() -> None:
    plain, scaled = setting(), setting(family="guided_unet2d")
    for student, teacher in ((plain.student, scaled.teacher), (scaled.student, plain.teacher)):
        with pytest.raises(InputError, match="differs from the teacher in its scale input; use family: teacher"):
            Progressive(Setting(student, teacher), ProgressiveOptions())


def test_a_follower_is_no_plain_model() -> None:
    """The perfect student of these tests answers by its teacher's way, and not by the network that it carries."""
    student = follow(exact(8), 4)
    assert isinstance(student, Follower)
    x, t = column(0.5, 1), torch.full((2,), 2)
    assert not torch.allclose(student(x, t, ZERO), student.leader(x, t, ZERO))
