from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from worlds import generator, make_batch, uneven_world

from diffstill.analytic import (
    AffineStudent,
    AnalyticNetwork,
    GaussianMixtureWorld,
    MLPStudent,
    PerturbedNetwork,
    analytic_denoiser,
    perturbed,
)
from diffstill.diffusion.prediction import PREDICTION_TYPES, PredictionType
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.models.denoiser import Denoiser

COSINE = NoiseSchedule.create("cosine", 1000)
SHAPES = ("isotropic", "diagonal", "full")


def noisy_points(world: GaussianMixtureWorld, count: int = 64, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t, labels) float64, labels including null."""
    g = generator(seed)
    labels = torch.randint(0, world.num_classes + 1, (count,), generator=g)
    t = torch.randint(0, COSINE.T, (count,), generator=g)
    x0 = world.sample(labels, g)
    return COSINE.add_noise(x0, torch.randn(x0.shape, generator=g, dtype=torch.float64), t), t, labels


def autograd(value: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_epsilon_is_minus_sigma_times_the_autograd_score(shape: str) -> None:
    world = uneven_world(shape)
    x_t, t, labels = noisy_points(world)
    x_t.requires_grad_()
    score = autograd(world.log_density(x_t, t, COSINE, labels), x_t)
    _, sigma = COSINE.at(t, 4, torch.float64)
    torch.testing.assert_close(world.epsilon(x_t, t, COSINE, labels), -sigma * score, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(world.score(x_t, t, COSINE, labels), score, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gap_is_minus_sigma_times_the_gradient_of_the_class_posterior(shape: str) -> None:
    world = uneven_world(shape)
    x_t, t, labels = noisy_points(world)
    labels = labels % world.num_classes
    x_t.requires_grad_()
    posterior = world.class_posterior(x_t, t, COSINE)
    torch.testing.assert_close(posterior.sum(1), torch.ones(64, dtype=torch.float64))
    _, sigma = COSINE.at(t, 4, torch.float64)
    # Where p(y | x_t) underflows its logarithm has no gradient; the gap is right there too, but autograd is not.
    likely = posterior[torch.arange(64), labels] > 1e-200
    assert likely.sum() > 50
    truth = -sigma * autograd(posterior[torch.arange(64), labels].log()[likely], x_t)
    gap = world.gap(x_t, t, COSINE, labels)
    torch.testing.assert_close(gap[likely], truth[likely], rtol=1e-7, atol=1e-7)


def test_the_density_is_the_one_the_samples_come_from() -> None:
    """First and second moments of every class, and of the null mixture, to 5 standard errors."""
    world = uneven_world("full")
    assert world.rotations is not None
    full = world.rotations @ torch.diag_embed(world.variances) @ world.rotations.mT
    count = 40_000
    for label in range(world.num_classes + 1):
        x = world.sample(torch.full((count,), label), generator(label)).flatten(1)
        share = world.log_weights[label].exp()
        mean = share @ world.means
        second = (share[:, None, None] * (full + world.means[:, :, None] * world.means[:, None, :])).sum(0)
        products = x[:, :, None] * x[:, None, :]
        assert bool(((x.mean(0) - mean).abs() < 5 * x.std(0) / math.sqrt(count)).all())
        assert bool(((products.mean(0) - second).abs() < 5 * products.std(0) / math.sqrt(count)).all())


def test_the_density_integrates_to_one() -> None:
    world = GaussianMixtureWorld.ring(num_classes=3, components_per_class=2)
    axis = torch.linspace(-4, 4, 161, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).view(-1, 2, 1, 1)
    t = torch.full((len(grid),), 300)
    for label in range(world.num_classes + 1):
        mass = world.log_density(grid, t, COSINE, torch.full_like(t, label)).exp().sum() * (axis[1] - axis[0]) ** 2
        assert mass.item() == pytest.approx(1, abs=1e-6)


def test_null_is_the_mixture_of_the_classes_by_their_prior() -> None:
    world = uneven_world()
    x_t, t, _ = noisy_points(world)
    prior = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    each = [world.log_density(x_t, t, COSINE, torch.full_like(t, label)) for label in range(3)]
    joint = prior.log() + torch.stack(each, dim=1)
    null = world.log_density(x_t, t, COSINE)
    torch.testing.assert_close(null, joint.logsumexp(1))
    torch.testing.assert_close(world.class_posterior(x_t, t, COSINE), (joint - null[:, None]).exp())
    assert torch.equal(null, world.log_density(x_t, t, COSINE, torch.full_like(t, world.null_label)))


def test_full_diagonal_and_isotropic_tables_agree_where_they_say_the_same() -> None:
    means = torch.randn(4, 3, generator=generator(0), dtype=torch.float64)
    classes = torch.tensor([0, 1, 1, 0])
    variances = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    diagonal = variances[:, None].expand(4, 3)
    worlds = [GaussianMixtureWorld(means, c, classes) for c in (variances, diagonal, torch.diag_embed(diagonal))]
    x_t, t, labels = noisy_points(worlds[0])
    labels = labels.clamp(max=2)
    for kind in PREDICTION_TYPES:
        outputs = [world.prediction(x_t, t, COSINE, labels, kind) for world in worlds]
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0])
    draws = [world.sample(labels, generator(1)) for world in worlds[:2]]
    torch.testing.assert_close(*draws)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_x0_v_and_epsilon_are_one_prediction(kind: PredictionType) -> None:
    """Through the Denoiser's own conversions, which divide by alpha or sigma where the closed forms do not."""
    world = uneven_world()
    denoiser = Denoiser(AnalyticNetwork(world, COSINE, kind), COSINE, world.num_classes, (3, 1, 1), kind)
    x_t, t, labels = noisy_points(world)
    out = denoiser(x_t, t, labels)
    torch.testing.assert_close(denoiser.x0(out, x_t, t), world.x0(x_t, t, COSINE, labels), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(denoiser.epsilon(out, x_t, t), world.epsilon(x_t, t, COSINE, labels))


@pytest.mark.parametrize("label", [0, 2, 3])
@pytest.mark.parametrize("t", [150, 300, 800])
def test_epsilon_is_the_minimiser_of_the_denoising_loss(t: int, label: int) -> None:
    """``eps - E[eps | x_t]`` is orthogonal to every function of x_t: tried on a spread of them, to 5 standard errors.

    The same test refuses the other branch's epsilon, so it has the power to see a wrong answer.
    """
    world, count = uneven_world(), 40_000
    g = generator(100 * label + t)
    labels, stamp = torch.full((count,), label), torch.full((count,), t)
    x0 = world.sample(labels, g)
    noise = torch.randn(x0.shape, generator=g, dtype=torch.float64)
    x_t = COSINE.add_noise(x0, noise, stamp)
    flat = x_t.flatten(1)
    probes = torch.cat([torch.ones(count, 1), flat, flat**2, (4 * flat).sin(), (9 * flat).cos(), flat.sign()], dim=1)

    def worst(prediction: Tensor) -> float:
        residual = (noise - prediction).flatten(1)[:, :, None] * probes[:, None, :]
        return (residual.mean(0) / (residual.std(0) / math.sqrt(count))).abs().max().item()

    assert worst(world.epsilon(x_t, stamp, COSINE, labels)) < 5
    other = torch.full_like(labels, world.null_label if label == 0 else 0)
    assert worst(world.epsilon(x_t, stamp, COSINE, other)) > 10


def test_single_gaussian_is_the_affine_formula() -> None:
    """``eps* = sigma (x - alpha m) / V``, ``V = alpha^2 d^2 + sigma^2``."""
    m, d = 0.3, 0.5
    world = GaussianMixtureWorld.single_gaussians(torch.full((1, 1, 2, 2), m), d)
    x = torch.randn(6, 1, 2, 2, dtype=torch.float64, generator=generator(0))
    t = torch.tensor([0, 1, 300, 600, 980, 999])
    alpha, sigma = COSINE.at(t, 4, torch.float64)
    V = alpha**2 * d**2 + sigma**2
    m = float(world.means[0, 0])
    torch.testing.assert_close(world.epsilon(x, t, COSINE), sigma * (x - alpha * m) / V)
    torch.testing.assert_close(world.x0(x, t, COSINE), m + alpha * d**2 * (x - alpha * m) / V)
    torch.testing.assert_close(world.gap(x, t, COSINE, torch.zeros_like(t)), torch.zeros_like(x))


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, 4.0])
def test_guidance_of_equal_variance_gaussians(scale: float) -> None:
    """``x0^s = x0_k + (s - 1) (sigma^2 / V) (mu_k - sum_j gamma_j mu_j)``, by way of epsilon."""
    g = generator(3)
    means, d = torch.randn(3, 1, 2, 2, generator=g, dtype=torch.float64), 0.4
    world = GaussianMixtureWorld.single_gaussians(means, d)
    x, t, labels = noisy_points(world)
    labels = labels % 3
    alpha, sigma = COSINE.at(t, 4, torch.float64)
    V = alpha**2 * d**2 + sigma**2
    gamma = world.class_posterior(x, t, COSINE)
    mean_now = torch.einsum("bk,kchw->bchw", gamma, means)
    x0 = means[labels] + alpha * d**2 * (x - alpha * means[labels]) / V
    x0 = x0 + (scale - 1) * sigma**2 / V * (means[labels] - mean_now)
    guided = world.guided_epsilon(x, t, COSINE, labels, scale)
    torch.testing.assert_close(guided, (x - alpha * x0) / sigma, rtol=1e-6, atol=1e-6)


def test_ring_has_interleaved_multimodal_classes() -> None:
    world = GaussianMixtureWorld.ring(num_classes=4, components_per_class=2, radius=0.7, std=0.1)
    assert world.sample_shape == (2, 1, 1)
    torch.testing.assert_close(world.means.norm(dim=1), torch.full((8,), 0.7, dtype=torch.float64))
    assert world.log_weights[1].exp().tolist() == pytest.approx([0, 0.5, 0, 0, 0, 0.5, 0, 0])
    assert world.log_weights[4].exp().tolist() == pytest.approx([1 / 8] * 8)


def test_draw_labels_follows_the_prior() -> None:
    counts = torch.bincount(uneven_world().draw_labels(100_000, generator(0)))
    assert (counts / 100_000).tolist() == pytest.approx([0.5, 0.2, 0.3], abs=0.008)


def test_an_analytic_denoiser_is_a_denoiser() -> None:
    world = uneven_world()
    denoiser = analytic_denoiser(world, COSINE, "v_prediction")
    batch = make_batch(world, COSINE, 16)
    cond, null = denoiser.branches(batch.x_t, batch.t, batch.labels)
    assert cond.dtype == torch.float32
    assert denoiser.device == torch.device("cpu")
    torch.testing.assert_close(cond, world.v(batch.x_t, batch.t, COSINE, batch.labels))
    torch.testing.assert_close(null, world.v(batch.x_t, batch.t, COSINE))
    assert not any(p.requires_grad for p in denoiser.network.parameters())
    copy = denoiser.with_network(deepcopy(denoiser.network))
    copy.network.load_state_dict(denoiser.network.state_dict())
    assert torch.equal(copy(batch.x_t, batch.t, batch.labels), cond)


def test_a_world_can_be_unfrozen_into_a_student_that_learns_its_means() -> None:
    network = AnalyticNetwork(uneven_world(), COSINE)
    network.requires_grad_(True)
    x_t, t, labels = noisy_points(network.world)
    network(x_t, t, labels).square().sum().backward()
    assert network.world.means.grad is not None
    assert bool((network.world.means.grad.abs().sum(1) > 0).all())


def test_perturbed_branches_are_off_by_exactly_the_given_errors() -> None:
    world = uneven_world()
    teacher = analytic_denoiser(world, COSINE)
    null_error = torch.tensor([0.1, -0.2, 0.3]).view(3, 1, 1)
    student = perturbed(teacher, 0.5, null_error)
    assert isinstance(student.network, PerturbedNetwork)
    batch = make_batch(world, COSINE, 32)
    truth, made = (d.branches(batch.x_t, batch.t, batch.labels) for d in (teacher, student))
    torch.testing.assert_close(made[0] - truth[0], torch.full_like(truth[0], 0.5))
    torch.testing.assert_close(made[1] - truth[1], null_error.expand_as(truth[1]))
    assert [name for name, p in student.network.named_parameters() if p.requires_grad] == ["errors"]
    (made[1] ** 2).sum().backward()
    grad = student.network.errors.grad
    assert grad is not None
    assert bool((grad[:-1] == 0).all())
    assert bool((grad[-1] != 0).all())


@pytest.mark.parametrize("kind", ["affine", "mlp"])
def test_students_see_time_label_and_input(kind: str) -> None:
    torch.manual_seed(0)
    shape = (1, 2, 2)
    student = AffineStudent(3, shape, 1000, bins=10) if kind == "affine" else MLPStudent(3, shape, 1000)
    x = torch.randn(1, *shape)

    def out(t: int, label: int, factor: float = 1.0) -> Tensor:
        return student(factor * x, torch.tensor([t]), torch.tensor([label]))

    base = out(500, 1)
    assert base.shape == x.shape
    assert not torch.allclose(base, out(100, 1))
    assert not torch.allclose(base, out(500, 3))
    assert not torch.allclose(base, out(500, 1, 2.0))
    out(999, 3).sum().backward()
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"means": torch.zeros(2, 3, 1)}, r"means must be \(K, D\)"),
        ({"sample_shape": (2, 2)}, "does not hold the 3 numbers"),
        ({"covariances": torch.ones(3)}, r"covariances must be \(K,\)"),
        ({"covariances": -torch.ones(2)}, "positive semi-definite"),
        ({"covariances": torch.eye(3).tril().add(torch.ones(3, 3).tril()).expand(2, 3, 3)}, "symmetric"),
        ({"component_classes": torch.tensor([0, 2])}, "every class needs"),
        ({"weights": torch.tensor([1.0, 0.0])}, "must be positive"),
        ({"weights": torch.ones(3)}, "one a component"),
        ({"class_prior": torch.ones(3)}, "one a class"),
    ],
)
def test_tables_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    tables = {"means": torch.zeros(2, 3), "covariances": torch.ones(2), "component_classes": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        GaussianMixtureWorld(**{**tables, **change})  # type: ignore[arg-type]


def test_a_world_without_image_shape_makes_no_denoiser() -> None:
    world = GaussianMixtureWorld(torch.zeros(1, 2), torch.ones(1), torch.tensor([0]), sample_shape=(2,))
    with pytest.raises(ValueError, match=r"\(C, H, W\)"):
        analytic_denoiser(world, COSINE)
