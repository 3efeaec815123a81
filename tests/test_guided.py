"""Guidance as an input of the network: known maps, stage 1 against its teacher, what is saved and what is refused
(guided.md 1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from engines import assert_same, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rounds import column, ddim, embedding, follow, single
from torch import Tensor, nn
from worlds import cosine_pi, generator, uneven_world

from diffstill.analytic import GaussianMixtureWorld, analytic_denoiser
from diffstill.checks.bench import Bench, tiny_denoiser
from diffstill.diffusion.guidance import guide
from diffstill.diffusion.prediction import PREDICTION_TYPES, PredictionType
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.errors import InputError
from diffstill.jobs.build import build_student
from diffstill.methods import METHODS, Setting, TeacherOutputs
from diffstill.methods.guided import Guided, GuidedOptions
from diffstill.models.denoiser import Denoiser
from diffstill.pipelines.guided_unet import scale_features
from diffstill.recipe import MethodSpec, NetworkSpec

COSINE = NoiseSchedule.create("cosine", 1000)
SCALE_WEIGHT = "class_embedding.scale.weight"


class TwoBranches(nn.Module):
    """Exact for c ~ N(0, 1), x | c ~ N(c, 1/4): label y is c = y (0 or 1), the null branch N(0, 5/4)."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.given = GaussianMixtureWorld.single_gaussians(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), 0.5)
        self.null = single(0.0, math.sqrt(1.25))

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        given = self.given.v(x_t, t, self.schedule, labels.clamp(max=1))
        return torch.where((labels == 2).view(-1, 1, 1, 1), self.null.v(x_t, t, self.schedule), given)


class OneBranch(nn.Module):
    """Any two branches as one network that takes the scale: exactly linear in it."""

    def __init__(self, network: nn.Module, null_label: int) -> None:
        super().__init__()
        self.network, self.null_label = network, null_label

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor, scale: Tensor | None = None) -> Tensor:
        cond = self.network(x_t, t, labels)
        null = self.network(x_t, t, torch.full_like(labels, self.null_label))
        return cond if scale is None else guide(cond, null, scale.view(-1, *[1] * (x_t.ndim - 1)))


def with_scale(model: Denoiser, ends: tuple[float, float]) -> Denoiser:
    network = OneBranch(model.network, model.null_label)
    made = Denoiser(network, model.schedule, model.num_classes, model.sample_shape, model.prediction_type)
    made.scale_range = ends
    return made


def hierarchical(steps: int) -> Denoiser:
    schedule = cosine_pi(steps)
    return Denoiser(TwoBranches(schedule), schedule, 2, (1, 1, 1), "v_prediction").freeze()


TABLE: dict[float, dict[int, tuple[float, float]]] = {
    1.0: {1: (0, 1), 2: (0.2, 1), 4: (0.333441, 1), 8: (0.411375, 1), 64: (0.488094, 1)},
    1.3: {1: (0, 1.3), 2: (0.093333, 1.161333), 4: (0.237951, 1.139794), 64: (0.381897, 1.140373)},
    2.0: {1: (0, 2), 2: (-0.155556, 1.288889), 8: (0.154225, 1.307986), 64: (0.214433, 1.321167)},
    5.0: {1: (0, 5), 2: (-1.222222, -2.111111), 8: (0.001283, 1.283653), 64: (0.016728, 1.362303)},
}


def maps(model: Denoiser, scale: float) -> tuple[float, float]:
    """``sample = M_z z + M_c c``: (M_z, M_c)."""
    origin, noise, given = ddim(model, column(0, 1, 0), torch.tensor([0, 0, 1]), scale).flatten().tolist()
    assert origin == pytest.approx(0, abs=1e-6)
    return noise - origin, given - origin


@pytest.mark.parametrize("scale", list(TABLE))
def test_guided_maps_of_the_hierarchical_gaussian_in_one_pass_or_two(scale: float) -> None:
    for steps, wanted in TABLE[scale].items():
        two = hierarchical(steps)
        for model in (two, with_scale(two, (1.0, 5.0))):
            assert maps(model, scale) == pytest.approx(wanted, abs=2e-6), steps


@pytest.mark.parametrize("takes_scale", [True, False])
def test_one_step_at_any_scale_does_what_64_guided_steps_do(takes_scale: bool) -> None:
    """Stage 2 on stage 1: perfect students of 16, 4 and 1 steps, asked at scales between. A network of two branches
    can not follow: it keeps each branch's own way, and guides what these reach."""
    first = hierarchical(64)
    model = with_scale(first, (1.0, 5.0)) if takes_scale else first
    for steps in (16, 4, 1):
        model = follow(model, steps)
    for scale, row in TABLE.items():
        if takes_scale or scale == 1:
            assert maps(model, scale) == pytest.approx(row[64], abs=2e-6)
        else:
            assert maps(model, scale) != pytest.approx(row[64], abs=0.05)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_guidance_of_a_mixture_at_a_scale_for_every_sample(kind: PredictionType) -> None:
    """``x0^s = x0_k + (s - 1) (sigma^2 / V) (mu_k - sum_j gamma_j mu_j)``: not linear in x_t."""
    means, d = torch.randn(3, 1, 2, 2, generator=generator(3), dtype=torch.float64), 0.4
    world = GaussianMixtureWorld.single_gaussians(means, d)
    two = analytic_denoiser(world, COSINE, kind)
    x = torch.randn(40, 1, 2, 2, generator=generator(4), dtype=torch.float64)
    t, labels = torch.arange(40) * 25 + 3, torch.arange(40) % 3
    scale = torch.linspace(0.5, 6, 40, dtype=torch.float64)
    alpha, sigma = COSINE.at(t, 4, torch.float64)
    V = alpha**2 * d**2 + sigma**2
    mine = means[labels]
    mean_now = torch.einsum("bk,kchw->bchw", world.class_posterior(x, t, COSINE), means)
    wanted = mine + alpha * d**2 * (x - alpha * mine) / V
    wanted = wanted + (scale.view(-1, 1, 1, 1) - 1) * sigma**2 / V * (mine - mean_now)
    for model in (two, with_scale(two, (0.5, 6.0))):
        found = model.x0(model.guided(x, t, labels, scale), x, t)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------- scales, branches, Meng's w

RANGES = st.tuples(st.floats(0, 8), st.floats(0.25, 8)).map(lambda pair: (pair[0], max(pair[0], 1.0) + pair[1]))


@given(ends=RANGES, seed=st.integers(0, 50), kind=st.sampled_from(PREDICTION_TYPES))
@settings(max_examples=30, deadline=None)
def test_branches_of_a_network_that_is_linear_in_the_scale_are_cond_and_null(
    ends: tuple[float, float], seed: int, kind: PredictionType
) -> None:
    """Whatever range it knows; so ``guided`` in one pass and the guidance of its branches are one thing."""
    two = analytic_denoiser(uneven_world(), COSINE, kind)
    one = with_scale(two, ends)
    x = torch.randn(6, 3, 1, 1, generator=generator(seed), dtype=torch.float64)
    t, labels = torch.tensor([0, 40, 300, 500, 800, 999]), torch.tensor([0, 1, 2, 2, 1, 0])
    cond, null = two.branches(x, t, labels)
    sizes = max(1.0, float(cond.abs().max()), float(null.abs().max()))
    # The scales at which it asks are float32, and the line through them reaches back from the range to 0.
    loose = 1e-5 * sizes * (1 + ends[0]) / min(1.0, ends[1] - max(1.0, ends[0]))
    found = one.branches(x, t, labels)
    torch.testing.assert_close(found[0], cond, rtol=0, atol=loose)
    torch.testing.assert_close(found[1], null, rtol=0, atol=loose)
    for s in (ends[0], 1.0, ends[1]):
        torch.testing.assert_close(one.guided(x, t, labels, s), guide(cond, null, s), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(two.guided(x, t, labels, s), guide(cond, null, s), rtol=1e-9, atol=1e-9)


@given(w=st.floats(0, 13), seed=st.integers(0, 9))
def test_mengs_w_is_the_scale_less_one(w: float, seed: int) -> None:
    """``(1 + w) cond - w null`` is guidance at s = 1 + w; w = 0 is purely conditional."""
    cond, null = torch.randn(2, 4, 1, 2, 2, generator=generator(seed), dtype=torch.float64)
    torch.testing.assert_close(guide(cond, null, 1 + w), (1 + w) * cond - w * null, rtol=1e-9, atol=1e-9)


def test_the_scale_features_are_those_of_latent_consistency_models_at_w() -> None:
    """Sinusoids of 1000 w, sines first; so the first layer's input at s = 1 is that of w = 0."""
    w = torch.tensor([0.0, 0.3, 1.0, 7.5])
    rates = torch.exp(-torch.arange(128) * (math.log(10000) / 127))
    phase = (1000 * w)[:, None] * rates
    torch.testing.assert_close(
        scale_features(1 + w, 256, "lcm"), torch.cat([phase.sin(), phase.cos()], 1), atol=1e-3, rtol=0
    )
    for kind in ("lcm", "fourier"):
        assert scale_features(torch.ones(1), 8, kind).tolist() == [[0.0] * 4 + [1.0] * 4]
    # Waves of 16 units of the scale to an eighth of one: neighbouring scales look alike at any number of features.
    first = scale_features(torch.tensor([1.0, 17.0]), 8, "fourier")[:, [0, 4]]
    torch.testing.assert_close(first[0], first[1], rtol=0, atol=1e-4)
    last = scale_features(torch.tensor([2.0, 2.125]), 64, "fourier")[:, [31, 63]]
    torch.testing.assert_close(last[0], last[1], rtol=0, atol=1e-3)
    close = scale_features(torch.tensor([2.0, 2.001]), 64, "fourier")
    assert (close[0] - close[1]).abs().max() < 0.06


# ----------------------------------------------------------------------------------------------------- stage 1


def stage_1(kind: PredictionType = "v_prediction", schedule: str = "cosine", **options: Any) -> Any:
    """Stage 1 on a random teacher, its student built by the jobs as ``family: teacher``."""
    teacher = tiny_denoiser((8, 16), 1, None, kind)
    teacher.schedule = NoiseSchedule.create(schedule, 1000)
    with torch.no_grad():
        embedding(teacher).weight.mul_(2)
    spec = MethodSpec(name="guided", **options)
    student = build_student(NetworkSpec(family="teacher"), spec, teacher.freeze(), seed=0)
    return Guided(Setting(student, teacher), spec.build_options())


def batch_for(method: Any, uniform: Callable[..., Tensor] | None = None) -> Any:
    made = Bench(METHODS["dash"]).batch()
    made = replace(made, x_t=method.schedule.add_noise(made.x0, made.noise, made.t))
    return made if uniform is None else replace(made, uniform=uniform)


def loss_of(method: Any, batch: Any) -> Any:
    return method.loss(batch, TeacherOutputs(method.teacher, batch, method.teacher_needs))


def test_at_first_the_student_is_the_conditional_teacher_at_every_scale() -> None:
    method = stage_1()
    student, teacher, batch = method.student, method.teacher, batch_for(method)
    assert student.takes_scale
    assert student.scale_range == (1.0, 5.0)
    assert_same(
        {k: v for k, v in student.network.state_dict().items() if k != SCALE_WEIGHT}, teacher.network.state_dict()
    )
    assert not student.network.state_dict()[SCALE_WEIGHT].any()
    with student.evaluating():
        cond, null = teacher.branches(batch.x_t, batch.t, batch.labels)
        assert (cond - null).abs().max() > 0.01
        for scale in (1.0, 2.5, 5.0, torch.linspace(1, 5, batch.size)):
            out = student.guided(batch.x_t, batch.t, batch.labels, scale)
            torch.testing.assert_close(out, cond, rtol=0, atol=2e-6)
        torch.testing.assert_close(student(batch.x_t, batch.t, batch.labels), cond, rtol=0, atol=2e-6)


def test_at_scale_1_a_new_student_loses_nothing_and_elsewhere_it_does() -> None:
    method = stage_1()

    def always(value: float) -> Callable[..., Tensor]:
        return lambda name, **_: torch.full((8,), value)

    assert loss_of(method, batch_for(method, always(0.0))).total.item() < 1e-11
    assert loss_of(method, batch_for(method, always(0.4))).total.item() > 1e-3
    plain = stage_1(guidance_range=(2.0, 5.0))
    assert loss_of(plain, batch_for(plain, always(0.0))).total.item() > 1e-3, "its range begins at 2"


def test_the_teacher_is_asked_once_with_and_without_labels_and_stays_as_it_was() -> None:
    method = stage_1()
    method.teacher.network.requires_grad_(True)  # if a gradient could get there, it would
    before = copy.deepcopy(method.teacher.network.state_dict())
    batch, asked, given = batch_for(method), [], []
    method.teacher.network.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append((*args, kwargs["class_labels"])), with_kwargs=True
    )
    method.student.network.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["guidance_scale"]), with_kwargs=True
    )
    loss_of(method, batch).total.backward()
    assert len(asked) == len(given) == 1
    (x, t, labels), (scale,) = asked[0], given
    assert torch.equal(x, torch.cat([batch.x_t] * 2))
    assert torch.equal(t, torch.cat([batch.t] * 2))
    assert torch.equal(labels, torch.cat([batch.labels, torch.full_like(batch.labels, 3)]))
    torch.testing.assert_close(scale, 1 + 4 * batch.uniform("guidance_scale"))
    assert_same(method.teacher.network.state_dict(), before)
    assert all(p.grad is None for p in method.teacher.network.parameters())
    weight = method.student.network.class_embedding.scale.weight
    assert weight.grad is not None
    assert weight.grad.any()


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("form", ["truncated_snr", "constant", "snr", "v"])
def test_the_loss_is_the_weighted_error_of_the_clean_image(kind: PredictionType, form: str) -> None:
    """``max(snr, 1) |x0_S - x0_T^s|^2`` for ``truncated_snr``, from clean images, whatever the network predicts."""
    method = stage_1(kind, schedule="scaled_linear", weighting=form)
    nn.init.normal_(method.student.network.class_embedding.scale.weight, std=0.3, generator=generator(1))
    batch = batch_for(method)
    alpha, sigma = (value.flatten() for value in method.schedule.at(batch.t, 4, torch.float64))
    snr = alpha**2 / sigma**2
    weight = {"truncated_snr": snr.clamp(min=1), "constant": snr**0, "snr": snr, "v": 1 + snr}[form]
    assert (snr.min() < 1) & (snr.max() > 1)
    scale = 1 + 4 * batch.uniform("guidance_scale")
    with torch.no_grad():
        found = loss_of(method, batch).total
        out = method.student(batch.x_t, batch.t, batch.labels, scale)
        mine, cond, null = (
            method.student.x0(prediction.double(), batch.x_t.double(), batch.t)
            for prediction in (out, *method.teacher.branches(batch.x_t, batch.t, batch.labels))
        )
        clean = null + scale.view(-1, 1, 1, 1) * (cond - null)
    wanted = (weight * (mine - clean).square().flatten(1).mean(1)).mean()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)


def test_a_share_of_the_scales_lies_at_the_ends() -> None:
    method = stage_1(guidance_range=(1.0, 3.0), edge_share=1.0)
    u = torch.tensor([0.0, 0.49, 0.5, 0.99, 0.1, 0.9, 0.3, 0.7])
    given: list[Tensor] = []
    method.student.network.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["guidance_scale"]), with_kwargs=True
    )
    loss_of(method, batch_for(method, lambda name, **_: u))
    assert given[0].tolist() == [1.0, 1.0, 3.0, 3.0, 1.0, 3.0, 1.0, 3.0]


# ---------------------------------------------------------------------------------------------------- refusals


def test_a_student_without_a_scale_input_is_refused() -> None:
    teacher = tiny_denoiser((8, 16), 1, None, "v_prediction").freeze()
    with pytest.raises(InputError, match="does not take the guidance scale as an input") as told:
        Guided(Setting(tiny_denoiser((8, 8), 2, teacher), teacher), GuidedOptions())
    assert one_line(told.value).startswith("student.family:")
    assert "use family: teacher, or guided_unet2d" in str(told.value)


@pytest.mark.parametrize("form", ["truncated_snr", "constant", "v"])
def test_epsilon_predictions_weighted_by_the_clean_image_are_refused(form: str) -> None:
    """On the cosine schedule such a weight is 4e9 at the noisiest timestep."""
    with pytest.raises(InputError, match=rf"^method\.weighting: '{form}' weighs epsilon predictions up to") as told:
        stage_1("epsilon", weighting=form)
    assert "use weighting: snr" in one_line(told.value)
    stage_1("epsilon", weighting="snr")


@pytest.mark.parametrize("name", ["cosine", "linear", "scaled_linear"])
@pytest.mark.parametrize("form", ["truncated_snr", "constant", "snr", "v"])
def test_every_weight_goes_with_the_other_predictions(name: str, form: str) -> None:
    """Their first timestep has an snr of 1e4, no more: a weight of ``sample`` predictions is never refused for it."""
    for kind in ("v_prediction", "sample"):
        stage_1(kind, schedule=name, weighting=form)


def test_scales_beyond_a_teacher_that_has_its_own_are_refused() -> None:
    teacher = tiny_denoiser((8, 8), 1, None, "v_prediction", "guided_unet2d").freeze()
    teacher.scale_range = (1.0, 4.0)
    student = tiny_denoiser((8, 8), 2, teacher, family="guided_unet2d")
    for ends in ((1.0, 5.0), (0.5, 3.0)):
        with pytest.raises(InputError, match=r"^method\.guidance_range: .* goes beyond what the teacher knows") as told:
            Guided(Setting(student, teacher), GuidedOptions(guidance_range=ends))
        assert "stay within the teacher's [1.0, 4.0]" in one_line(told.value)
    method = Guided(Setting(student, teacher), GuidedOptions(guidance_range=(2.0, 3.0)))
    assert method.student.scale_range == (2.0, 3.0)
    nn.init.normal_(embedding(teacher).scale.weight, std=0.3, generator=generator(0))
    batch, taught = batch_for(method), TeacherOutputs(teacher, batch_for(method), method.teacher_needs)
    scale = 2 + batch.uniform("guidance_scale")
    with torch.no_grad():
        wanted = teacher(batch.x_t, batch.t, batch.labels, scale)
        out = method.student(batch.x_t, batch.t, batch.labels, scale)
    part = method.loss(batch, taught).parts["output"]
    torch.testing.assert_close(part, (out - wanted).square().mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("ends", [[5, 1], [2, 2], [0, 1], [1, math.inf], [math.nan, 3], [1], [1, 2, 3], "1,5"])
def test_ranges_that_are_none_are_refused(ends: Any) -> None:
    with pytest.raises(ValidationError):
        GuidedOptions(guidance_range=ends)
    with pytest.raises(ValidationError, match="guidance_range"):
        MethodSpec(name="guided", guidance_range=ends)


def test_a_range_the_wrong_way_round_is_told_how_one_looks() -> None:
    with pytest.raises(ValidationError, match=r"\[5\.0, 1\.0\] is no range of scales; .* above 1: \[1, 5\]"):
        GuidedOptions(guidance_range=(5.0, 1.0))


def test_methods_of_two_branches_refuse_a_student_that_takes_the_scale() -> None:
    teacher = tiny_denoiser((8, 16), 1).freeze()
    narrow = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    spec = NetworkSpec.model_validate({"family": "guided_unet2d", **narrow})
    with pytest.raises(InputError, match=r"^student\.family: 'guided_unet2d' takes the guidance scale") as told:
        build_student(spec, MethodSpec(name="dash"), teacher, seed=0)
    assert "dash trains two branches" in one_line(told.value)
    build_student(spec, MethodSpec(name="guided"), teacher, seed=0)


def test_what_cannot_be_a_copy_of_its_teacher_is_refused() -> None:
    teacher, spec = tiny_denoiser((8, 16), 1, None, "v_prediction").freeze(), MethodSpec(name="guided")
    for change, says in (
        ({"init": "magnitude"}, "prunes nothing of a student as large"),
        ({"guidance_embed_dim": 7}, "guidance_embed_dim 7 must be an even number"),
        ({"guidance_embed_type": "wavelet"}, "use lcm or fourier|'wavelet' is not known"),
    ):
        with pytest.raises(InputError, match=says) as told:
            build_student(NetworkSpec.model_validate({"family": "teacher", **change}), spec, teacher, seed=0)
        one_line(told.value)
    chosen = NetworkSpec.model_validate({"family": "teacher", "guidance_embed_dim": 32})
    with pytest.raises(InputError, match="leave them out"):
        build_student(chosen, MethodSpec(name="dash"), teacher, seed=0)
    analytic = analytic_denoiser(uneven_world(), COSINE)
    with pytest.raises(InputError, match="cannot be built again"):
        build_student(NetworkSpec(family="teacher"), spec, analytic, seed=0)


def test_a_fresh_student_of_its_teachers_shape_has_weights_of_its_own() -> None:
    teacher, spec = tiny_denoiser((8, 16), 1, None, "v_prediction").freeze(), MethodSpec(name="guided")
    chosen = NetworkSpec.model_validate({"family": "teacher", "init": "fresh", "guidance_embed_dim": 32})
    first, again, other = (build_student(chosen, spec, teacher, seed=seed) for seed in (0, 0, 1))
    assert_same(first.network.state_dict(), again.network.state_dict())
    mine, theirs, before = (model.network.state_dict()["conv_in.weight"] for model in (first, other, teacher))
    assert not torch.equal(mine, theirs)
    assert not torch.equal(mine, before)
    assert embedding(first).scale.in_features == 32
