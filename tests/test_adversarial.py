"""Losses of a discriminator of many heads, of its generator, and their penalties, in closed form (unidad.md 2)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import generator

from diffstill.diffusion.adversarial import (
    Aggregation,
    GanLoss,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    mean_logit,
    measured_norms,
    per_image,
    r1_penalty,
)

KINDS: tuple[GanLoss, ...] = ("bce", "hinge", "lsgan", "wgan")
AGGREGATIONS: tuple[Aggregation, ...] = ("mean", "sum", "logit")


def logits(*values: float) -> list[Tensor]:
    """One head with one place and these logits."""
    return [torch.tensor(values, dtype=torch.float64).view(-1, 1)]


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


# ------------------------------------------------------------------------------------------------------ closed forms


def squash(z: float) -> float:
    return 1 / (1 + math.exp(-z))


REAL = {
    "bce": lambda z: -math.log(squash(z)),
    "hinge": lambda z: max(0.0, 1 - z),
    "lsgan": lambda z: (squash(z) - 1) ** 2,
    "wgan": lambda z: -z,
}
FAKE = {
    "bce": lambda z: -math.log(1 - squash(z)),
    "hinge": lambda z: max(0.0, 1 + z),
    "lsgan": lambda z: squash(z) ** 2,
    "wgan": lambda z: z,
}
MADE = {**REAL, "hinge": lambda z: -z}
"""The generator's: that of real images, which a hinge does not cut off."""


@pytest.mark.parametrize("kind", KINDS)
def test_one_head_has_the_known_losses(kind: GanLoss) -> None:
    real, fake = (0.3, -2.0, 4.0), (1.5, -0.7, 0.0)
    mean = sum(map(REAL[kind], real)) / 3 + sum(map(FAKE[kind], fake)) / 3
    assert float(discriminator_loss(logits(*real), logits(*fake), kind)) == pytest.approx(mean)
    assert float(generator_loss(logits(*fake), kind)) == pytest.approx(sum(map(MADE[kind], fake)) / 3)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_put_together_as_asked(kind: GanLoss) -> None:
    """Of unequal numbers of places: a head counts as one whatever its places."""
    heads = [normals(4, 1), normals(4, 9, seed=1), normals(4, 3, seed=2)]
    others = [normals(4, 1, seed=3), normals(4, 9, seed=4), normals(4, 3, seed=5)]

    def mean(form: Any, z: Tensor) -> float:
        return sum(map(form, z.flatten().tolist())) / z.numel()

    each = [mean(REAL[kind], r) + mean(FAKE[kind], f) for r, f in zip(heads, others, strict=True)]
    assert float(discriminator_loss(heads, others, kind)) == pytest.approx(sum(each) / 3)
    assert float(discriminator_loss(heads, others, kind, "sum")) == pytest.approx(sum(each))
    each = [mean(MADE[kind], f) for f in others]
    assert float(generator_loss(others, kind)) == pytest.approx(sum(each) / 3)
    assert float(generator_loss(others, kind, "sum")) == pytest.approx(sum(each))
    one, two = (torch.stack([z.mean(1) for z in group]).mean(0) for group in (heads, others))
    torch.testing.assert_close(mean_logit(heads), one)
    wanted = mean(REAL[kind], one) + mean(FAKE[kind], two)
    assert float(discriminator_loss(heads, others, kind, "logit")) == pytest.approx(wanted)
    assert float(generator_loss(others, kind, "logit")) == pytest.approx(mean(MADE[kind], two))


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_of_the_mean_logit_is_no_more_than_the_mean_of_losses(seed: int) -> None:
    """Jensen, for a convex form; equal where heads agree."""
    heads, others = ([3 * normals(4, 1, seed=10 * seed + 5 * side + i) for i in range(4)] for side in (0, 1))
    for kind in ("bce", "hinge"):
        assert generator_loss(heads, kind, "logit") <= generator_loss(heads, kind) + 1e-12
        assert discriminator_loss(heads, others, kind, "logit") < discriminator_loss(heads, others, kind)
        agreed = [heads[0]] * 4, [others[0]] * 4
        torch.testing.assert_close(discriminator_loss(*agreed, kind, "logit"), discriminator_loss(*agreed, kind))
    assert generator_loss(heads, "bce", "logit") < generator_loss(heads, "bce")


def test_one_confident_head_silences_the_rest_in_the_mean_logit_alone() -> None:
    """Why it is not the default."""
    for aggregation, share in (("mean", 0.5), ("logit", squash(-20))):
        unsure, sure = torch.zeros(1, 1, requires_grad=True), torch.full((1, 1), 40.0)
        generator_loss([unsure, sure], "bce", aggregation).backward()  # type: ignore[arg-type]
        assert unsure.grad is not None
        assert float(unsure.grad) == pytest.approx(-0.5 * share, rel=1e-4)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_raises_the_logits_that_the_discriminator_lowers(kind: GanLoss, aggregation: Aggregation) -> None:
    """Non-saturating: the slope does not vanish where the discriminator is sure."""
    fake = [z.requires_grad_() for z in (normals(3, 1).clamp(-0.5, 0.5), normals(3, 4, seed=1).clamp(-0.5, 0.5))]
    real = [z.detach().clone().requires_grad_() for z in fake]
    up = torch.autograd.grad(generator_loss(fake, kind, aggregation), fake)
    down = torch.autograd.grad(discriminator_loss(real, fake, kind, aggregation), [*real, *fake])
    assert all(bool((g < 0).all()) for g in up)
    assert all(bool((g < 0).all()) for g in down[:2])
    assert all(bool((g > 0).all()) for g in down[2:])
    if kind == "bce":
        sure = torch.full((1, 1), -30.0, requires_grad=True)
        generator_loss([sure], kind, aggregation).backward()
        assert sure.grad is not None
        assert float(sure.grad) == pytest.approx(-1)


def test_large_logits_stay_finite() -> None:
    for kind in KINDS:
        far = [torch.tensor([[1e4], [-1e4]])]
        assert bool(discriminator_loss(far, far, kind).isfinite())
        assert bool(generator_loss(far, kind).isfinite())


# --------------------------------------------------------------------------------------------------------- penalties


def test_r1_of_a_linear_critic_is_half_its_squared_weights() -> None:
    """``gamma / 2 |v|^2``: the half is the penalty's, gamma the caller's. Its gradient in v is v."""
    v = normals(1, 2, 2).requires_grad_()
    found = r1_penalty(lambda x: (v * x).flatten(1).sum(1), normals(7, 1, 2, 2, seed=1))
    torch.testing.assert_close(found, 0.5 * v.square().sum())
    (slope,) = torch.autograd.grad(found, v)
    torch.testing.assert_close(slope, v.detach())


def test_r1_is_taken_at_every_image_by_itself() -> None:
    """``score = |x|^2``: slope 2 x."""
    x = normals(5, 3)
    torch.testing.assert_close(r1_penalty(lambda z: z.square().sum(1), x), (4 * x.square().sum(1)).mean() / 2)
    flat = r1_penalty(lambda z: 0 * z.sum(1), x)
    assert float(flat) == pytest.approx(0, abs=1e-12)


def test_a_gradients_norm_an_image_does_not_depend_on_their_number() -> None:
    slopes = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = float(slopes.flatten(1).square().sum(1).mean())
    for count in (6, 3, 2, 1):
        parts = [float(per_image(part / count)) for part in slopes.split(count)]
        assert sum(parts) / len(parts) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("always", [False, True])
def test_an_update_without_one_of_the_gradients_is_not_measured(always: bool) -> None:
    kept = torch.tensor([2.0, 0.5, 1.0])
    for none in ([0.0, 1.0], [1.0, 0.0]):
        assert torch.equal(measured_norms(kept, torch.tensor(none), 4, always), kept)
    assert measured_norms(kept, torch.tensor([1.0, 1.0]), 4, always)[2] == 2


def test_the_gradient_penalty_pulls_the_slope_to_one() -> None:
    v = normals(1, 2, 2).requires_grad_()
    real, fake = normals(2, 6, 1, 2, 2, seed=1)
    share = torch.rand(6, dtype=torch.float64, generator=generator(2))
    found = gradient_penalty(lambda x: (v * x).flatten(1).sum(1), real, fake, share)
    torch.testing.assert_close(found, (v.norm() - 1).square())
    (slope,) = torch.autograd.grad(found, v)
    torch.testing.assert_close(slope, (2 * (v.norm() - 1) * v / v.norm()).detach())
    unit = v.detach() / v.detach().norm()
    assert float(gradient_penalty(lambda x: (unit * x).flatten(1).sum(1), real, fake, share)) < 1e-12


def test_the_gradient_penalty_looks_between_real_and_fake() -> None:
    """``score = |x|^2``: slope ``2 |s real + (1 - s) fake|``, each sample at its own place."""
    real, fake = normals(2, 4, 3, seed=1)
    share = torch.tensor([0.0, 1.0, 0.3, 0.8], dtype=torch.float64)
    place = share[:, None] * real + (1 - share[:, None]) * fake
    found = gradient_penalty(lambda x: x.square().sum(1), real, fake, share)
    torch.testing.assert_close(found, (2 * place.norm(dim=1) - 1).square().mean())
