"""Uni-DAD's losses written out by hand, and whom their gradients reach (unidad.md 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from few_steps import Roles, differing, factor, noised, slopes, source
from torch import Tensor, nn
from torch.nn import functional as F

from diffstill.diffusion.matching import matching_gradient
from diffstill.diffusion.prediction import PREDICTION_TYPES, PredictionType, to_epsilon, to_x0
from diffstill.methods import Batch
from diffstill.models.denoiser import Denoiser
from diffstill.models.features import encode_features

HIGH = 20.0
"""Largest ratio of noise to signal in these tests."""


def apart(kind: PredictionType = "epsilon", **options: Any) -> tuple[Any, Batch]:
    """A method whose four networks all differ, in eval mode, and a batch."""
    teacher = source(kind=kind)
    names = ("student", "critic", "target_teacher")[: 2 if options.get("target_teacher") == "none" else 3]
    roles = {role: differing(teacher, i) for i, role in enumerate(names, 2)}
    bench = Roles(teacher, roles, sigma_max=HIGH, **options)
    method: Any = bench.method()
    for network in method.roles.values():
        network.eval()
    return method, bench.batch()


def x0_of(model: Denoiser, x_t: Tensor, t: Tensor, labels: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return to_x0(model(x_t, t, labels), x_t, alpha, sigma, model.prediction_type)


def phases_of(method: Any) -> dict[str, Any]:
    return {phase.name: phase for phase in method.phases}


def run_phase(method: Any, name: str, batch: Batch) -> Any:
    with method.in_phase(phases_of(method)[name]):
        losses = method.phase_loss(name, batch, None)
        losses.total.backward()
    return losses


# ------------------------------------------------------------------------------------------------------ the matching


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize(("a", "normalizer"), [(0.25, "teacher"), (1.0, "none"), (0.75, "critic"), (0.5, "noisy")])
def test_the_matching_is_its_definition(kind: PredictionType, a: float, normalizer: Any) -> None:
    """At levels 20 to 980 of 1000, all three networks at the same (x_t, t)."""
    method, batch = apart(kind, target_weight=a, normalizer=normalizer)
    x = batch.x0.roll(1, 0)
    with torch.no_grad():
        x_t, t, alpha, sigma = noised(x, batch, "matching", HIGH, 0.02, 0.98)
        critic, real, target = (
            x0_of(m, x_t, t, batch.labels, alpha, sigma) for m in (method.critic, method.teacher, method._target)
        )
        g = [matching_gradient(x, critic, r, normalizer, x_t=x_t, ratio=sigma / alpha) for r in (real, target)]
        loss, slope = method.matching(x, batch)
    wanted = (1 - a) * g[0].square().mean() / 2 + a * g[1].square().mean() / 2
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(slope, ((1 - a) * g[0] + a * g[1]) / x.numel(), rtol=1e-3, atol=1e-7)


def test_guidance_is_the_teachers_alone() -> None:
    method, batch = apart(guidance=7.5, target_weight=0.5, normalizer="none")
    x = batch.x0
    with torch.no_grad():
        x_t, t, alpha, sigma = noised(x, batch, "matching", HIGH, 0.02, 0.98)
        critic = x0_of(method.critic, x_t, t, batch.labels, alpha, sigma)
        null = torch.full_like(batch.labels, 3)
        g = torch.zeros_like(x)
        for teacher in (method.teacher, method._target):
            cond, free = (teacher(x_t, t, labels) for labels in (batch.labels, null))
            g += 0.5 * (critic - to_x0(free + 7.5 * (cond - free), x_t, alpha, sigma, "epsilon"))
        _, slope = method.matching(x, batch)
    torch.testing.assert_close(slope, g / x.numel(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("a", [0.25, 1.0])
def test_where_all_networks_are_one_only_the_gan_moves_the_student(a: float) -> None:
    """The first step of a run, at levels of the whole range: the matching's gradient is exactly zero."""
    bench = Roles(source(), target_weight=a, gan_weight=0.5)
    levels = torch.linspace(0, 1 - 2**-24, 8)
    batch = replace(bench.batch(), uniform=lambda name, **_: levels)
    for gan in ("bce", "none"):
        method: Any = Roles(source(), target_weight=a, gan=gan).method()
        losses = run_phase(method, "student", batch)
        assert float(losses.parts["dmd"]) == float(losses.parts["dmd_norm"]) == 0
        moved = [bool(g.any()) for g in slopes(method.roles["student"]).values()]
        assert any(moved) == (gan == "bce")
    assert bool(run_phase(bench.method(), "critic", batch).total.isfinite())


# ----------------------------------------------------------------------------------------------------------- the GAN


def opinions(method: Any, x: Tensor, batch: Batch, name: str) -> list[Tensor]:
    """The heads' logits (B, 1) of images noised at their own levels over the whole range."""
    x_t, t, _, _ = noised(x, batch, name, HIGH)
    features = encode_features(method.critic, x_t, t, batch.labels, method._taps)
    made: list[Tensor] = method.roles["heads"](features)
    return made


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("gradient", ["chain", "last"])
def test_the_students_gradient_is_that_of_the_sum_of_both_losses(steps: int, gradient: str) -> None:
    """Against the loss written as one graph: half the mean square of ``x - stopgrad(x - g)``, plus the GAN's."""
    options = {"steps": steps, "gradient": gradient, "gan_weight": 0.3, "dmd_weight": 0.7}
    method, batch = apart(**options)
    losses = run_phase(method, "student", batch)
    found = slopes(method.roles["student"])
    other, batch = apart(**options)
    x = other.unroll(batch)
    with torch.no_grad():
        x_t, t, alpha, sigma = noised(x, batch, "matching", HIGH, 0.02, 0.98)
        critic, *teachers = (
            x0_of(m, x_t, t, batch.labels, alpha, sigma) for m in (other.critic, other.teacher, other._target)
        )
        errors = [(x - r).abs().flatten(1).mean(1).view(-1, 1, 1, 1) for r in teachers]
        g = [(critic - r) / w for r, w in zip(teachers, errors, strict=True)]
    dmd = torch.stack([0.5 * (x - (x - each).detach()).square().mean() for each in g]).mean()
    gan = torch.stack([F.softplus(-z).mean() for z in opinions(other, x, batch, "generator")]).mean()
    total = 0.7 * dmd + 0.3 * gan
    total.backward()
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-4)
    assert float(losses.parts["gan"]) == pytest.approx(gan.item(), rel=1e-4)
    wanted = slopes(other.roles["student"])
    whole, mine = (torch.cat([s.flatten() for s in each.values()]) for each in (wanted, found))
    assert found.keys() == wanted.keys()
    assert float((mine - whole).norm() / whole.norm()) < 1e-3


def test_the_logged_norms_are_of_the_gradients_at_the_images() -> None:
    """Of one image's loss, whatever the batch: the root of the mean square."""
    method, batch = apart(dmd_weight=3.0)
    x = method.unroll(batch).detach()
    parts = method.student_loss(batch).parts
    leaf = x.clone().requires_grad_()
    gan = torch.stack([F.softplus(-z).mean() for z in opinions(method, leaf, batch, "generator")]).mean()
    (slope,) = torch.autograd.grad(gan, leaf)
    for name, of in {"gan_norm": slope, "dmd_norm": method.matching(x, batch)[1]}.items():
        each = (len(x) * of).flatten(1).norm(dim=1)
        assert float(parts[name]) == pytest.approx(float(each.square().mean().sqrt()), rel=1e-3)
    assert float(parts["pixel"]) == pytest.approx(float(x.abs().mean()))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_critics_loss_is_denoising_of_generated_images_and_telling_them_apart(kind: PredictionType) -> None:
    method, batch = apart(kind, gan_critic_weight=0.2)
    losses = method.critic_loss(batch)
    with torch.no_grad():
        fake = method.unroll(batch)
        x_t, t, alpha, sigma = noised(fake, batch, "critic", HIGH)
        eps = to_epsilon(method.critic(x_t, t, batch.labels), x_t, alpha, sigma, kind)
        denoising = (eps - batch.normal("critic")).square().mean()
        real, made = (opinions(method, *each) for each in ((batch.x0, batch, "real"), (fake, batch, "fake")))
        gan = torch.stack(
            [F.softplus(-r).mean() + F.softplus(f).mean() for r, f in zip(real, made, strict=True)]
        ).mean()
    assert float(losses.parts["critic"]) == pytest.approx(float(denoising), rel=1e-4)
    assert float(losses.parts["gan_critic"]) == pytest.approx(float(gan), rel=1e-4)
    assert losses.total.item() == pytest.approx(float(denoising + 0.2 * gan), rel=1e-4)


def test_penalties_are_weighted_as_the_options_say() -> None:
    method, batch = apart(gan="wgan", r1=4.0, gradient_penalty=10.0, gan_critic_weight=0.5)
    losses = method.critic_loss(batch)
    fake = method.unroll(batch).detach()

    def slope(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        score = torch.stack([z.mean(1) for z in opinions(method, leaf, batch, "real")]).mean(0)
        return torch.autograd.grad(score.sum(), leaf)[0].flatten(1)

    share = batch.uniform("penalty").view(-1, 1, 1, 1)
    wanted = {
        "r1": 4.0 / 2 * slope(batch.x0).square().sum(1).mean(),
        "gradient_penalty": 10 * (slope(share * batch.x0 + (1 - share) * fake).norm(dim=1) - 1).square().mean(),
    }
    for name, value in wanted.items():
        assert float(losses.parts[name]) == pytest.approx(float(value), rel=1e-3)
    parts = {name: float(value) for name, value in losses.parts.items()}
    whole = parts["critic"] + 0.5 * (parts["gan_critic"] + parts["r1"] + parts["gradient_penalty"])
    assert losses.total.item() == pytest.approx(whole, rel=1e-4)


# --------------------------------------------------------------------------------------------------------- denoising


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_edm_weights_are_a_weight_on_the_error_of_the_noise(kind: PredictionType) -> None:
    """``(r^-2 + 4) MSE_x0 = (1 + 4 r^2) MSE_eps``, level by level."""
    method, batch = apart(kind, denoising="edm", gan="none")
    with torch.no_grad():
        loss = method.phase_loss("target", batch, None).total
        x_t, t, alpha, sigma = noised(batch.x0, batch, "target", HIGH)
        eps = to_epsilon(method._target(x_t, t, batch.labels), x_t, alpha, sigma, kind)
        ratio = sigma / alpha
        wanted = ((1 + 4 * ratio.square()) * (eps - batch.normal("target")).square()).mean()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-3)


def test_the_best_linear_critic_of_gaussian_images_is_the_known_one() -> None:
    """The student makes N(0, v): where the critic's gradient vanishes is ``alpha v / (alpha^2 v + sigma^2)``."""
    options = {"steps": 1, "sigma_min": 0.99, "sigma_max": 1.0, "gan": "none", "target_teacher": "none"}
    bench = Roles(factor(1.3), **options)
    batch = bench.batch(size=512)

    def slope(weight: float) -> tuple[float, Any]:
        method: Any = bench.method()
        method.critic.network.weight.data.fill_(weight)
        run_phase(method, "critic", batch)
        return float(method.critic.network.weight.grad), method

    at_zero, method = slope(0.0)
    assert method.student.network.weight.grad is None, "generated images are detached"
    best = at_zero / (at_zero - slope(1.0)[0])  # of a parabola
    v = 1.3**2 / 2  # x = 1.3 sigma z with sigma^2 = 1/2
    assert best == pytest.approx(2**0.5 * v / (v + 1), rel=0.02)


def test_the_target_teacher_learns_from_the_few_images_and_never_sees_generated_ones() -> None:
    method, batch = apart()
    losses = run_phase(method, "target", batch)
    x_t, t, *_ = noised(batch.x0, batch, "target", HIGH)
    out = method._target(x_t, t, batch.labels)
    wanted = (out - batch.normal("target")).square().mean()
    assert losses.total.item() == pytest.approx(wanted.item(), rel=1e-4)
    mine = slopes(method.roles["target_teacher"])
    assert [name for name in ("student", "critic", "heads") if slopes(method.roles[name])] == []
    other, batch = apart()
    for role in ("student", "critic"):
        with torch.no_grad():
            for parameter in other.roles[role].parameters():
                parameter.mul_(1.5)
    other.student_loss(batch)
    again = run_phase(other, "target", batch)
    assert torch.equal(again.total, losses.total)
    theirs = slopes(other.roles["target_teacher"])
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# --------------------------------------------------------------------------------------------------------- isolation

TRAINED = {"student": {"student"}, "critic": {"critic", "heads"}, "target": {"target_teacher"}}


@pytest.mark.parametrize("phase", list(TRAINED))
def test_a_phase_reaches_its_roles_and_nothing_else(phase: str) -> None:
    """Also where the teachers could be reached, were there a way."""
    method, batch = apart(gan="wgan", r1=1.0)
    method.teacher.network.requires_grad_(True)
    run_phase(method, phase, batch)
    networks = {**method.roles, "teacher": method.teacher.network}
    assert {name for name, network in networks.items() if slopes(network)} == TRAINED[phase]
    for role in TRAINED[phase]:
        # The label of the null branch is not among the batch's, but its row is part of a tensor that is.
        assert {name for name, _ in networks[role].named_parameters()} == set(slopes(networks[role]))


def test_a_frozen_target_teacher_is_reached_by_no_phase() -> None:
    method, batch = apart(target_teacher="frozen")
    assert set(method.roles) == {"student", "critic", "heads"}
    assert set(phases_of(method)) == {"student", "critic"}
    method.frozen["target_teacher"].requires_grad_(True)
    for phase in ("student", "critic"):
        run_phase(method, phase, batch)
    assert not slopes(method.frozen["target_teacher"])


def test_the_discriminator_trains_the_critics_encoder_and_not_its_decoder() -> None:
    found = {}
    for weight in (0.0, 10.0):
        method, batch = apart(gan_critic_weight=weight)
        run_phase(method, "critic", batch)
        found[weight] = slopes(method.roles["critic"])
    decoder = ("up_blocks", "conv_norm_out", "conv_out")
    for name, slope in found[0.0].items():
        same = torch.equal(slope, found[10.0][name])
        assert same == name.startswith(decoder), name


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("phase", list(TRAINED))
def test_what_asked_for_gradients_does_so_afterwards_and_nothing_more(phase: str, broken: bool) -> None:
    """Exactly the tensors that were trainable, also after an exception; so for train and eval mode."""
    method, batch = apart()
    for role, network in method.roles.items():
        next(iter(network.parameters())).requires_grad_(False)
        network.train(role != "critic")

    def state() -> list[bool]:
        networks = [*method.roles.values(), method.teacher.network]
        asked = [p.requires_grad for network in networks for p in network.parameters()]
        return asked + [module.training for network in networks for module in network.modules()]

    before, inside = state(), []
    if broken:
        method.roles["critic"].mid_block.forward = None
        method.roles["target_teacher"].mid_block.forward = None
        with pytest.raises(TypeError):
            run_phase(method, phase, batch)
    else:
        run_phase(method, phase, batch)
    assert state() == before
    with method.in_phase(phases_of(method)[phase]):
        for role, network in method.roles.items():
            if role not in TRAINED[phase]:
                inside += [p.requires_grad for p in network.parameters()]
                inside += [module.training for module in network.modules()]
    assert not any(inside)


# ------------------------------------------------------------------------------------------------------ who is asked


def asked(**options: Any) -> dict[str, int]:
    """How often each network is run in one step of all phases, but for the student."""
    method, batch = apart(**options)
    counted: dict[str, int] = {}

    def counting(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counted[name] = counted.get(name, 0) + 1

        return hook

    networks: dict[str, nn.Module] = {"teacher": method.teacher.network, "critic": method.critic.network}
    if method._target is not None:
        networks["target_teacher"] = method._target.network
    for name, network in networks.items():
        network.register_forward_pre_hook(counting(name))
    method.student_loss(batch)
    return counted


def test_the_matching_keeps_no_graph_of_its_networks() -> None:
    """Of three networks that would be a waste of memory, though nothing of it were used."""
    method, batch = apart(gan="none")
    modes: list[bool] = []
    for model in (method.teacher, method._target, method.critic):
        model.network.requires_grad_(True).register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    _, slope = method.matching(batch.x0, batch)
    assert modes == [False] * 3
    assert not slope.requires_grad


def test_a_teacher_without_weight_is_never_asked() -> None:
    assert asked(target_teacher="none", gan="none") == {"teacher": 1, "critic": 1}
    assert asked(target_weight=1, gan="none") == {"target_teacher": 1, "critic": 1}
    assert asked(target_weight=0.5, gan="none") == {"teacher": 1, "target_teacher": 1, "critic": 1}
    assert asked(dmd_weight=0, target_teacher="none") == {"critic": 1}, "the GAN's look at it"
    assert asked(target_weight=0.5, target_teacher="frozen") == {"teacher": 1, "target_teacher": 1, "critic": 2}
