"""Why two branches (dash.md 2.2): the algebra of the losses, then the same by real optimisation against the truth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import generator, loss_of, make_batch, make_method, train

from diffstill.analytic import (
    AffineStudent,
    GaussianMixtureWorld,
    MLPStudent,
    PerturbedNetwork,
    analytic_denoiser,
    perturbed,
)
from diffstill.diffusion.guidance import Constant, guidance_gap
from diffstill.diffusion.sampling import ddim_sample
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.models.denoiser import Denoiser

SCHEDULE = NoiseSchedule.create("cosine", 100)
ANGLES = torch.arange(3) * (2 * torch.pi / 3)
WORLD = GaussianMixtureWorld.single_gaussians(0.6 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1).view(3, 2, 1, 1), 0.4)
TEACHER = analytic_denoiser(WORLD, SCHEDULE)
BATCH = make_batch(WORLD, SCHEDULE, 64)
ERROR = torch.tensor([0.3, -0.4]).view(2, 1, 1)  # mean square 1/8
E2 = 0.125


def value(name: str, student: Denoiser, part: str | None = None, **options: object) -> float:
    losses = loss_of(make_method(name, student, TEACHER, **options), BATCH)
    return (losses.total if part is None else losses.parts[part]).item()


def fresh_student(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return TEACHER.with_network(MLPStudent(WORLD.num_classes, WORLD.sample_shape, SCHEDULE.T))


def test_a_copy_of_the_teacher_has_no_distillation_loss() -> None:
    assert value("dash", TEACHER, "imitation") == value("dash", TEACHER, "null") == 0
    assert value("composite", TEACHER) == value("gap", TEACHER) == 0
    # All that is left is the anchor: the noise that no denoiser can know.
    noise = (BATCH.noise - TEACHER(BATCH.x_t, BATCH.t, BATCH.labels)).square().mean().item()
    assert value("dash", TEACHER) == pytest.approx(0.1 * noise, rel=1e-5)


def test_the_default_weights_are_1_1_and_a_tenth() -> None:
    losses = loss_of(make_method("dash", fresh_student(), TEACHER), BATCH)
    parts = losses.parts
    assert losses.total.item() == pytest.approx((parts["imitation"] + parts["null"] + 0.1 * parts["anchor"]).item())


@pytest.mark.parametrize("s", [1.5, 2.0, 4.0])
def test_composite_is_blind_along_one_direction_that_dash_sees(s: float) -> None:
    student = perturbed(TEACHER, ERROR, s / (s - 1) * ERROR)
    assert value("composite", student, scale=s) == pytest.approx(0, abs=1e-10)
    assert value("dash", student, lambda_an=0) == pytest.approx(E2 * (1 + (s / (s - 1)) ** 2), rel=1e-4)
    assert value("gap", student) == pytest.approx(E2 / (s - 1) ** 2, rel=1e-4)
    # At any other scale s' the error is e_c (s - s') / (s - 1): the dial is wrong everywhere but at s.
    for other in (1.0, s + 1):
        assert value("composite", student, scale=other) == pytest.approx(E2 * ((s - other) / (s - 1)) ** 2, rel=1e-4)
    assert value("composite", student, scale=1.0, scale_to=s) > 0.1 * E2


def test_gap_matching_is_blind_to_common_drift_that_dash_sees() -> None:
    student = perturbed(TEACHER, ERROR, ERROR)
    assert value("gap", student) == pytest.approx(0, abs=1e-10)
    assert value("dash", student, lambda_an=0) == pytest.approx(2 * E2, rel=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_dash_is_mean_error_and_gap_error_together(seed: int) -> None:
    """``|e_c|^2 + |e_u|^2 = 2 |m|^2 + |d|^2 / 2``; guidance at s = 1/2 is the mean of the branches."""
    student = fresh_student(seed)
    mean, gap = value("composite", student, scale=0.5), value("gap", student)
    assert min(mean, gap) > 1e-3
    assert value("dash", student, lambda_an=0) == pytest.approx(2 * mean + gap / 2, rel=1e-5)


def test_uncorrelated_branch_errors_grow_25_fold_at_scale_4() -> None:
    student = perturbed(TEACHER, torch.tensor([0.3, 0.0]).view(2, 1, 1), torch.tensor([0.0, 0.3]).view(2, 1, 1))
    assert value("composite", student, scale=4.0) == pytest.approx(25 * 0.045, rel=1e-4)


@given(imitation=st.floats(0.1, 3), anchor=st.floats(0.01, 3))
@settings(max_examples=10, deadline=None)
def test_the_anchor_only_moves_the_conditional_target(imitation: float, anchor: float) -> None:
    """The anchor identity of dash.md 2.2: values up to its constant, gradients without."""
    student = fresh_student()
    method = make_method("dash", student, TEACHER, lambda_im=imitation, lambda_un=0, lambda_an=anchor)
    total = loss_of(method, BATCH).total
    parameters = [p for name, p in student.network.named_parameters()]
    gradients = torch.autograd.grad(total, parameters)

    truth = TEACHER(BATCH.x_t, BATCH.t, BATCH.labels)
    both = imitation + anchor
    merged_target = (imitation * truth + anchor * BATCH.noise) / both
    merged = both * (student(BATCH.x_t, BATCH.t, BATCH.labels) - merged_target).square().mean()
    constant = imitation * anchor / both * (truth - BATCH.noise).square().mean()
    torch.testing.assert_close(total, merged + constant, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients, torch.autograd.grad(merged, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_null_row_is_seen_by_the_null_term_alone() -> None:
    student = fresh_student()
    assert isinstance(student.network, MLPStudent)
    rows = student.network.label_embedding.weight
    before = loss_of(make_method("dash", student, TEACHER), BATCH).parts
    with torch.no_grad():
        rows[WORLD.null_label] += 0.5
    after = loss_of(make_method("dash", student, TEACHER), BATCH).parts
    torch.testing.assert_close(after["imitation"], before["imitation"])
    torch.testing.assert_close(after["anchor"], before["anchor"])
    assert abs(after["null"] - before["null"]) > 1e-4
    for lambda_un, moves in ((0.0, False), (1.0, True)):
        method = make_method("dash", student, TEACHER, lambda_un=lambda_un)
        (gradient,) = torch.autograd.grad(loss_of(method, BATCH).total, rows)
        assert bool((gradient[WORLD.null_label] != 0).any()) is moves
        assert bool((gradient[: WORLD.num_classes] != 0).all())


def descend(name: str, errors: Tensor, lr: float, steps: int = 400, **options: object) -> Tensor:
    """Branch errors (num_classes + 1, D) after gradient descent from the given ones; all else is exact."""
    network = PerturbedNetwork(TEACHER.network, errors.view(-1, *WORLD.sample_shape))
    method = make_method(name, TEACHER.with_network(network), TEACHER, **options)
    train(method, lambda step: BATCH, steps, lr, torch.optim.SGD)
    assert value(name, method.student, None, **options) < 1e-8
    return network.errors.detach().flatten(1)


ERRORS = torch.randn(4, 2, generator=generator(5))


def test_descent_on_composite_stops_at_the_nearest_blind_point() -> None:
    """Gradient descent projects: the start's component in the blind space ``e_k = (s-1)/s e_null`` stays for ever."""
    s = 4.0
    blind = torch.tensor([(s - 1) / s] * 3 + [1.0])[:, None]
    nearest = blind * (blind * ERRORS).sum(0) / (blind**2).sum()
    found = descend("composite", ERRORS, lr=0.12, scale=s)
    torch.testing.assert_close(found, nearest, rtol=1e-3, atol=1e-3)
    assert (found[:3] - found[3]).abs().max() > 0.05


def test_descent_on_the_gap_stops_at_common_drift() -> None:
    found = descend("gap", ERRORS, lr=1.0)
    torch.testing.assert_close(found, ERRORS.mean(0).expand(4, 2), rtol=1e-3, atol=1e-3)
    assert found.abs().max() > 0.05


def test_descent_on_both_branches_stops_at_the_teacher() -> None:
    torch.testing.assert_close(descend("dash", ERRORS, lr=2.0, lambda_an=0), torch.zeros(4, 2), rtol=0, atol=1e-3)


def test_a_blind_start_sends_composite_no_gradient() -> None:
    student = perturbed(TEACHER, 0.75 * ERROR, ERROR)
    loss_of(make_method("composite", student, TEACHER, scale=4.0), BATCH).total.backward()
    assert isinstance(student.network, PerturbedNetwork)
    assert student.network.errors.grad is not None
    assert student.network.errors.grad.abs().max() < 1e-6


def test_an_affine_student_finds_the_closed_form_coefficients() -> None:
    """One Gaussian: epsilon is ``sigma (x - alpha m) / V``, so slope and offset of every timestep are known."""
    schedule = NoiseSchedule.create("cosine", 8)
    world = GaussianMixtureWorld.single_gaussians(torch.tensor([0.3, -0.2]).view(1, 2, 1, 1), 0.5)
    teacher = analytic_denoiser(world, schedule)
    torch.manual_seed(0)
    network = AffineStudent(1, world.sample_shape, schedule.T, bins=schedule.T)
    method = make_method("dash", teacher.with_network(network), teacher, lambda_an=0)
    train(method, lambda step: make_batch(world, schedule, 256, seed=step), steps=400, lr=3e-2)
    slope = schedule.sigmas / (schedule.alphas_cumprod * 0.25 + schedule.sigmas**2)
    offset = -(slope * schedule.alphas)[:, None] * world.means
    truth = (slope[:, None, None] * torch.eye(2)).float()
    for label in (0, world.null_label):
        torch.testing.assert_close(network.weight[:, label].detach(), truth, rtol=0, atol=2e-3)
        torch.testing.assert_close(network.bias[:, label].detach(), offset.float(), rtol=0, atol=2e-3)


@dataclass(frozen=True)
class Trained:
    """A small network trained from random weights, and how far it is from the truth on fresh points."""

    student: Denoiser
    loss: float
    """Relative to the loss before training."""
    ratio: float
    cosine: float
    gap_error: float
    """Mean square, relative to the mean square of the true gap."""
    cond_error: float
    null_error: float

    def sample_error(self, scale: float) -> float:
        """Root mean square distance of guided samples to the teacher's, from the same noise."""
        labels = torch.arange(300) % WORLD.num_classes
        noise = torch.randn(300, *WORLD.sample_shape, generator=generator(5))
        with torch.no_grad():
            mine, truth = (
                ddim_sample(
                    lambda x, t, s, d=d: d.guided(x, t, labels, s),  # type: ignore[misc]
                    noise,
                    SCHEDULE,
                    Constant(scale),
                    steps=20,
                    clip="none",
                )
                for d in (self.student, TEACHER)
            )
        return (mine - truth).square().mean().sqrt().item()


@cache
def trained(name: str) -> Trained:
    student = fresh_student()
    options = {"scale": 4.0} if name == "composite" else {}
    method = make_method(name, student, TEACHER, **options)
    held_out = make_batch(WORLD, SCHEDULE, 4000, seed=10**6)
    before = loss_of(method, held_out).total.item()
    train(method, lambda step: make_batch(WORLD, SCHEDULE, 128, seed=step), steps=900, lr=5e-3)
    after = loss_of(method, held_out).total.item()
    # In the first tenth the true gap vanishes with sigma, and its direction is no more than rounding of the student.
    keep = held_out.t >= SCHEDULE.T // 10
    at = held_out.x_t[keep], held_out.t[keep], held_out.labels[keep]
    with torch.no_grad():
        (cond, null), (true_cond, true_null) = student.branches(*at), TEACHER.branches(*at)
    gap, true_gap = guidance_gap(cond, null).flatten(1), guidance_gap(true_cond, true_null).flatten(1)
    return Trained(
        student,
        after / before,
        (gap.norm(dim=1).mean() / true_gap.norm(dim=1).mean()).item(),
        torch.cosine_similarity(gap, true_gap).mean().item(),
        ((gap - true_gap).square().mean() / true_gap.square().mean()).item(),
        (cond - true_cond).square().mean().item(),
        (null - true_null).square().mean().item(),
    )


def test_training_with_dash_reaches_the_teacher_and_its_gap() -> None:
    dash = trained("dash")
    assert dash.ratio == pytest.approx(1, abs=0.02)
    assert dash.cosine > 0.94
    assert dash.gap_error < 0.01
    assert max(dash.cond_error, dash.null_error) < 1e-3
    assert max(dash.sample_error(s) for s in (1.0, 2.0)) < 0.04


def test_training_with_composite_matches_its_scale_and_loses_the_gap() -> None:
    composite = trained("composite")
    assert composite.loss < 2e-3
    # What is left lies along the blind direction e_u = 4/3 e_c, and nowhere else.
    assert composite.null_error / composite.cond_error == pytest.approx(16 / 9, rel=0.05)
    assert composite.gap_error > 5 * trained("dash").gap_error
    assert composite.cosine < trained("dash").cosine - 0.05
    at = {s: composite.sample_error(s) for s in (1.0, 2.0, 4.0)}
    assert at[4.0] < 0.06
    assert min(at[1.0], at[2.0]) > 2 * at[4.0]
    assert min(at[1.0] / trained("dash").sample_error(1.0), at[2.0] / trained("dash").sample_error(2.0)) > 5


def test_training_with_gap_matching_finds_the_gap_and_loses_the_branches() -> None:
    gap = trained("gap")
    assert gap.ratio == pytest.approx(1, abs=0.02)
    assert gap.gap_error < 0.01
    assert gap.null_error / gap.cond_error == pytest.approx(1, rel=0.05)
    assert gap.cond_error > 50 * trained("dash").cond_error
    assert min(gap.sample_error(s) for s in (1.0, 2.0, 4.0)) > 5 * trained("dash").sample_error(2.0)
