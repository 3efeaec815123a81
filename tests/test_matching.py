"""Distribution matching between Gaussians: known gradients, fixed points and normalisers (unidad.md 2).

``E[x0 | x_t] = m + v / (v + r^2) (x_t - m)`` for N(m, v) in the variance-exploding form ``x_t = x + r n``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import generator

from diffstill.diffusion.levels import signal_and_noise
from diffstill.diffusion.matching import Normalizer, dual_domain, matching_gradient, matching_loss, tied
from diffstill.diffusion.prediction import to_x0

Gaussian = tuple[float, float]
"""Mean and variance."""
NORMALIZERS: tuple[Normalizer, ...] = ("teacher", "critic", "noisy", "none")


def clean(x_t: Tensor, law: tuple[float | Tensor, float | Tensor], ratio: float) -> Tensor:
    mean, variance = law
    return mean + variance / (variance + ratio**2) * (x_t - mean)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


# -------------------------------------------------------------------------------------------------- the pseudo-loss


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 999))
@settings(deadline=None)
def test_the_gradient_of_the_pseudo_loss_is_the_direction_over_all_elements(shape: list[int], seed: int) -> None:
    """Exactly, also through the graph that made the image; the value is half the mean square."""
    g, x = normals(2, *shape, seed=seed).float()
    x.requires_grad_()
    loss, slope = dual_domain(0.0, g, None)
    assert torch.equal(slope, g / g.numel())
    assert float(loss) == pytest.approx(0.5 * float(g.square().mean()), rel=1e-6)
    tie = tied(x, loss, slope)
    assert torch.equal(tie, loss)
    tie.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, g / g.numel())
    # Written out: half the mean square of x - stopgrad(x - g).
    y = x.detach().clone().requires_grad_()
    (0.5 * (y - (y - g).detach()).square().mean()).backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-5, atol=1e-6)


def test_nothing_but_the_image_gets_a_gradient() -> None:
    """Critic and teacher may have a graph: none of it is walked."""
    x, critic, teacher = (normals(3, 5, seed=i).requires_grad_() for i in range(3))
    value, slope = dual_domain(0.5, matching_gradient(x, critic, teacher), matching_gradient(x, critic, 2 * teacher))
    tied(x, value, slope).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, slope.detach())
    assert critic.grad is None
    assert teacher.grad is None


def test_without_a_normaliser_the_direction_is_the_difference() -> None:
    x, critic, teacher = normals(3, 4, 5)
    one = matching_gradient(x, critic, teacher, "none")
    assert torch.equal(one, critic - teacher)
    torch.testing.assert_close(matching_gradient(x, teacher + 3 * (critic - teacher), teacher, "none"), 3 * one)


# -------------------------------------------------------------------------------------------------------- sign, size


@pytest.mark.parametrize(
    ("fake", "real", "variance", "ratio", "delta"),
    [(2.0, 0.0, 0.7, 1.3, 1.41423), (0.0, 2.0, 0.7, 1.3, -1.41423), (1.0, -0.5, 0.2, 80.0, 1.49995)],
)
def test_two_gaussians_of_one_width_differ_by_the_same_for_every_sample(
    fake: float, real: float, variance: float, ratio: float, delta: float
) -> None:
    x = fake + variance**0.5 * normals(7, 1)
    x_t = x + ratio * normals(7, 1, seed=1)
    g = matching_gradient(x, clean(x_t, (fake, variance), ratio), clean(x_t, (real, variance), ratio), "none")
    assert (fake - real) * ratio**2 / (variance + ratio**2) == pytest.approx(delta, abs=6e-6)
    torch.testing.assert_close(g, torch.full_like(g, delta), rtol=0, atol=6e-6)
    for normalizer in NORMALIZERS:
        found = matching_gradient(
            x,
            clean(x_t, (fake, variance), ratio),
            clean(x_t, (real, variance), ratio),
            normalizer,
            x_t=x_t,
            ratio=torch.ones(7, 1, dtype=torch.float64),
        )
        assert bool((found.sign() == math.copysign(1, delta)).all()), "whatever it is divided by"


def test_a_step_against_it_moves_the_student_towards_the_teacher() -> None:
    """The trap: printed with the critic's noise estimate minus the teacher's, it would move away."""
    mean = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = mean + normals(64, 1)
    x_t = x.detach() + normals(64, 1, seed=1)
    value, slope = dual_domain(0.0, matching_gradient(x.detach(), clean(x_t, (2, 1), 1), clean(x_t, (0, 1), 1)), None)
    tied(x, value, slope).backward()
    assert mean.grad is not None
    assert float(mean.grad) > 0.1


def test_the_difference_of_clean_estimates_is_that_of_noise_estimates() -> None:
    """``x0_a - x0_b = ratio (eps_b - eps_a)``, so it is the score of the generator's images minus the teacher's."""
    ratio = torch.tensor([0.3, 6.0], dtype=torch.float64).view(2, 1)
    alpha, sigma = signal_and_noise(ratio)
    x_t, eps_a, eps_b = normals(3, 2, 9)
    difference = to_x0(eps_a, x_t, alpha, sigma, "epsilon") - to_x0(eps_b, x_t, alpha, sigma, "epsilon")
    torch.testing.assert_close(difference, ratio * (eps_b - eps_a))


# ------------------------------------------------------------------------------------------------------ fixed points

# A grid of Gauss-Hermite nodes: integrals over (z, n) of polynomials are exact.
NODES = 6


def grid() -> tuple[Tensor, Tensor, Tensor]:
    """z, n (N, 1) and weights (N, 1) whose sums are expectations over two standard normals."""
    places, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(NODES))
    weights = weights / weights.sum()
    z, n = torch.meshgrid(places, places, indexing="ij")
    both = weights[:, None] * weights[None, :]
    return z.reshape(-1, 1), n.reshape(-1, 1), both.reshape(-1, 1)


def settle(
    direction: Callable[[Tensor, Tensor, Gaussian, float], Tensor],
    start: tuple[float, float],
    ratio_of: Callable[[int], float],
    steps: int = 800,
    rate: float = 0.3,
) -> tuple[float, float]:
    """Mean and standard deviation of the student ``m + s z`` after gradient descent along the direction of matching,
    with the exact critic of its images at every step."""
    z, n, weight = grid()
    m, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in start)
    for step in range(steps):
        ratio = ratio_of(step)
        x = m + s * z
        held = x.detach()
        g = direction(held, held + ratio * n, (m.item(), s.item() ** 2), ratio)
        # ``tied`` takes the mean over samples; the grid's samples have weights.
        dm, ds = torch.autograd.grad(tied(x, g.new_zeros(()), weight * g), (m, s))
        with torch.no_grad():
            m -= rate * dm
            s -= rate * ds
    return m.item(), s.item()


def towards(source: Gaussian, target: Gaussian, a: float) -> Callable[[Tensor, Tensor, Gaussian, float], Tensor]:
    def direction(x: Tensor, x_t: Tensor, student: Gaussian, ratio: float) -> Tensor:
        critic = clean(x_t, student, ratio)
        parts = [matching_gradient(x, critic, clean(x_t, law, ratio), "none") for law in (source, target)]
        return dual_domain(a, *parts)[1] * x.numel()

    return direction


def test_matching_one_gaussian_ends_in_it() -> None:
    """Over many noise levels, from far away."""
    levels = [0.1, 0.5, 1.0, 3.0]
    law = settle(towards((0, 1), (9, 9), 0.0), (3.0, 0.3), lambda step: levels[step % 4])
    assert law == pytest.approx((0, 1), abs=1e-3)


PRODUCT = {0.0: (0.0, 1.0), 0.25: (0.696, 0.860), 0.5: (1.231, 0.734), 0.75: (1.655, 0.616), 1.0: (2.0, 0.5)}


@pytest.mark.parametrize("a", list(PRODUCT))
def test_two_domains_end_in_the_product_of_the_diffused_ones(a: float) -> None:
    """Towards N(0, 1) and N(2, .25) at ratio 1; from one end and from the other."""
    precision = (1 - a) / 2 + a / 1.25
    wanted = (a * 2 / 1.25 / precision, (1 / precision - 1) ** 0.5)
    assert wanted == pytest.approx(PRODUCT[a], abs=6e-4)
    for start in ((0.0, 1.0), (2.0, 0.5), (-1.0, 2.0)):
        assert settle(towards((0, 1), (2, 0.25), a), start, lambda step: 1.0) == pytest.approx(wanted, abs=5e-3)


def test_the_ends_are_plain_matching_bit_for_bit_and_ask_no_more() -> None:
    g, other = normals(2, 4, 3)
    for a, first, second in ((0.0, g, None), (1.0, None, g), (0.0, g, other * math.nan), (1.0, other * math.nan, g)):
        loss, slope = dual_domain(a, first, second)
        assert torch.equal(loss, matching_loss(g))
        assert torch.equal(slope, g / g.numel())
    loss, slope = dual_domain(0.25, g, other)
    torch.testing.assert_close(loss, 0.75 * matching_loss(g) + 0.25 * matching_loss(other))
    torch.testing.assert_close(slope, (0.75 * g + 0.25 * other) / g.numel())


@pytest.mark.parametrize("a", [-0.01, 1.01, math.nan, math.inf])
def test_a_share_outside_0_to_1_is_refused(a: float) -> None:
    g = torch.ones(1)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        dual_domain(a, g, g)


@pytest.mark.parametrize(("a", "first", "second"), [(0.0, None, 1), (1.0, 1, None), (0.5, None, 1), (0.5, 1, None)])
def test_a_gradient_with_weight_must_be_there(a: float, first: int | None, second: int | None) -> None:
    with pytest.raises(ValueError, match="missing"):
        dual_domain(a, *(None if g is None else torch.ones(g) for g in (first, second)))


# ------------------------------------------------------------------------------------------------------- normalisers


def folded(mean: float, variance: float) -> float:
    """``E |X|`` of X ~ N(mean, variance)."""
    sd = variance**0.5
    return sd * math.sqrt(2 / math.pi) * math.exp(-0.5 * (mean / sd) ** 2) + mean * math.erf(mean / sd / math.sqrt(2))


@pytest.mark.parametrize("teacher", [(0.0, 1.0), (2.0, 0.25), (-1.0, 4.0)])
@pytest.mark.parametrize("ratio", [0.3, 1.3, 20.0])
def test_in_many_dimensions_the_normaliser_is_a_folded_normals_mean(teacher: Gaussian, ratio: float) -> None:
    """``x - x0_R = (1 - k) (x - m_R) - k r n``: within 2% at D = 4096, sample by sample."""
    m_f, v_f = 0.5, 0.7
    x = m_f + v_f**0.5 * normals(6, 1, 64, 64)
    x_t = x + ratio * normals(6, 1, 64, 64, seed=1)
    critic, real = clean(x_t, (m_f, v_f), ratio), clean(x_t, teacher, ratio)
    k = teacher[1] / (teacher[1] + ratio**2)
    wanted = folded((1 - k) * (m_f - teacher[0]), (1 - k) ** 2 * v_f + k**2 * ratio**2)
    divisor = (critic - real) / matching_gradient(x, critic, real)
    assert float((divisor / wanted - 1).abs().max()) < 0.06, "of single elements: the divisor is one a sample"
    each = (critic - real).flatten(1).norm(dim=1) / matching_gradient(x, critic, real).flatten(1).norm(dim=1)
    torch.testing.assert_close(each, torch.full_like(each, wanted), rtol=0.03, atol=0)
    assert float(each.mean()) == pytest.approx(wanted, rel=0.02)


def test_each_sample_and_each_teacher_has_its_own_divisor() -> None:
    x, critic, teacher = normals(3, 5, 2, 3, 3)
    whole = matching_gradient(x, critic, teacher)
    for i in range(5):
        part = slice(i, i + 1)
        torch.testing.assert_close(matching_gradient(x[part], critic[part], teacher[part]), whole[part])
        by_hand = (critic[i] - teacher[i]) / (x[i] - teacher[i]).abs().mean()
        torch.testing.assert_close(whole[i], by_hand)
    # Both terms have a scale of order one, however far one teacher is away.
    far = x + 100 * (teacher - x)
    torch.testing.assert_close(matching_gradient(x, x, far), matching_gradient(x, x, teacher))


def test_the_other_normalisers_are_what_they_say() -> None:
    """``critic`` is the paper's form: the difference of noise estimates over the critic's own error, times
    ``sigma / alpha``."""
    x, noise, eps_critic, eps_teacher = normals(4, 5, 1, 4, 4)
    ratio = torch.tensor([0.1, 0.5, 1.0, 5.0, 40.0], dtype=torch.float64).view(5, 1, 1, 1)
    alpha, sigma = signal_and_noise(ratio)
    x_t = alpha * x + sigma * noise
    critic, teacher = (to_x0(eps, x_t, alpha, sigma, "epsilon") for eps in (eps_critic, eps_teacher))
    mean = (noise - eps_critic).abs().flatten(1).mean(1).view(5, 1, 1, 1)
    found = matching_gradient(x, critic, teacher, "critic", ratio=ratio)
    torch.testing.assert_close(found, ratio * (eps_teacher - eps_critic) / mean)
    noisy = matching_gradient(x, critic, teacher, "noisy", x_t=x_t)
    error = (x_t - teacher).abs().flatten(1).mean(1).view(5, 1, 1, 1)
    torch.testing.assert_close(noisy, (critic - teacher) / error)
    with pytest.raises(ValueError, match="critic needs the noise-to-signal ratio"):
        matching_gradient(x, critic, teacher, "critic")
    with pytest.raises(ValueError, match="unknown normalizer 'l1'; one of teacher, critic, noisy, none"):
        matching_gradient(x, critic, teacher, "l1")  # type: ignore[arg-type]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_equal_estimates_give_zero_also_where_both_are_perfect(normalizer: Normalizer) -> None:
    """0 / 0; and what is not finite is no step at all."""
    x = normals(2, 3)
    zero = matching_gradient(x, x, x, normalizer, x_t=x, ratio=torch.ones(2, 1, dtype=torch.float64))
    assert bool((zero == 0).all())
    other = normals(2, 3, seed=1)
    same = matching_gradient(x, other, other, normalizer, x_t=x, ratio=torch.ones(2, 1, dtype=torch.float64))
    assert bool((same == 0).all())


def test_an_error_of_nothing_counts_as_a_hundred_millionth() -> None:
    """A teacher that knows the image by heart gives a large step, not an infinite one that is dropped."""
    x = normals(2, 3)
    torch.testing.assert_close(matching_gradient(x, x + 1e-3, x), torch.full_like(x, 1e5))


def test_what_is_not_finite_is_no_step() -> None:
    x, critic, teacher = normals(3, 4, 3)
    critic[0, 0], teacher[1, 1], critic[2, 2] = math.nan, math.inf, -math.inf
    found = matching_gradient(x, critic, teacher)
    assert bool(found.isfinite().all())
    assert float(found[0, 0]) == float(found[1, 1]) == float(found[2, 2]) == 0
    torch.testing.assert_close(found[3], matching_gradient(x, critic, teacher)[3])
    assert float(found[3].abs().min()) > 0


@given(ratio=st.floats(0.01, 150), a=st.floats(0, 1), seed=st.integers(0, 99))
@settings(deadline=None)
def test_at_the_start_where_all_networks_are_one_nothing_moves(ratio: float, a: float, seed: int) -> None:
    x = normals(3, 4, seed=seed)
    estimate = clean(x + ratio * normals(3, 4, seed=seed + 1), (0.3, 0.5), ratio)
    g = matching_gradient(x, estimate, estimate.clone())
    loss, slope = dual_domain(a, g, g)
    assert float(loss) == 0
    assert bool((slope == 0).all())
