"""Each method's loss on real U-Nets against the formula written out by hand, and where its gradients may go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_bench import OTHER_NETWORKS, bench
from torch import Tensor

from diffstill.checks import losses
from diffstill.checks.bench import tiny_denoiser
from diffstill.diffusion.prediction import PredictionType
from diffstill.engine.arm import Arm
from diffstill.engine.settings import TrainSettings
from diffstill.methods import METHODS, Losses, TeacherOutputs
from diffstill.models.denoiser import Denoiser

KINDS: tuple[PredictionType, ...] = ("epsilon", "v_prediction")
kinds = pytest.mark.parametrize("kind", KINDS)


class Case:
    """A method, a batch, and all that a formula by hand needs."""

    def __init__(self, name: str, kind: PredictionType = "epsilon", size: int = 8, **options: Any) -> None:
        self.bench = bench(name, kind, **options)
        self.method: Any = self.bench.method()
        self.batch = self.bench.batch(size=size)
        self.losses = self.bench.loss(self.method, self.batch)

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Student cond and null, teacher cond and null, by four separate calls."""
        b, found = self.batch, []
        for denoiser in (self.method.student, self.method.teacher):
            found += [denoiser(b.x_t, b.t, b.labels), denoiser(b.x_t, b.t, torch.full_like(b.labels, 3))]
        s_c, s_u, t_c, t_u = found
        return s_c, s_u, t_c.detach(), t_u.detach()

    def truth(self) -> Tensor:
        """What a network of this kind is trained to output: eps, or ``alpha eps - sigma x0``."""
        b = self.batch
        if self.method.student.prediction_type == "epsilon":
            return b.noise
        abar = self.method.schedule.alphas_cumprod[b.t].float().view(-1, 1, 1, 1)
        return abar.sqrt() * b.noise - (1 - abar).sqrt() * b.x0

    def mean(self, errors: Tensor) -> Tensor:
        """``E[w_hat(t) mean_pixels errors]`` under the transferred curriculum, normalised over all timesteps."""
        source = self.bench.curriculum()
        snr = self.method.schedule.snr
        omega = snr.clamp(max=5.0) * torch.sigmoid(source.logits.double())
        weights = (omega / omega.mean())[self.batch.t].float()
        return (weights * errors.flatten(1).mean(1)).mean()

    def part(self, name: str) -> Tensor:
        return self.losses.parts[name]


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), rtol=2e-5, atol=1e-6)


# Values


@kinds
def test_dash_is_its_three_terms(kind: PredictionType) -> None:
    case = Case("dash", kind, lambda_im=0.7, lambda_un=1.3, lambda_an=0.2)
    s_c, s_u, t_c, t_u = case.outputs()
    imitation, null = case.mean((s_c - t_c) ** 2), case.mean((s_u - t_u) ** 2)
    anchor = case.mean((s_c - case.truth()) ** 2)
    for name, wanted in (("imitation", imitation), ("null", null), ("anchor", anchor)):
        same(case.part(name), wanted)
    same(case.losses.total, 0.7 * imitation + 1.3 * null + 0.2 * anchor)


@kinds
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_composite_compares_guided_outputs(kind: PredictionType, scale: float) -> None:
    case = Case("composite", kind, scale=scale)
    s_c, s_u, t_c, t_u = case.outputs()
    same(case.losses.total, case.mean((scale * (s_c - t_c) + (1 - scale) * (s_u - t_u)) ** 2))


@kinds
def test_multi_scale_composite_draws_a_scale_a_sample(kind: PredictionType) -> None:
    case = Case("composite", kind, size=64, scale=1.0, scale_to=4.0)
    scales = case.method.scales(case.batch).flatten()
    assert scales.shape == (64,)
    assert 1 <= float(scales.min()) < 1.5
    assert 3.5 < float(scales.max()) <= 4
    assert len(scales.unique()) == 64
    s_c, s_u, t_c, t_u = case.outputs()
    s = scales.view(-1, 1, 1, 1)
    same(case.losses.total, case.mean((s * (s_c - t_c) + (1 - s) * (s_u - t_u)) ** 2))
    assert not torch.equal(scales, case.method.scales(case.bench.batch(64, size=64)).flatten())


@kinds
def test_gap_compares_gaps_with_and_without_an_anchor(kind: PredictionType) -> None:
    pure, anchored = Case("gap", kind), Case("gap", kind, lambda_an=0.1)
    s_c, s_u, t_c, t_u = pure.outputs()
    gap, anchor = pure.mean(((s_c - s_u) - (t_c - t_u)) ** 2), pure.mean((s_c - pure.truth()) ** 2)
    same(pure.losses.total, gap)
    same(anchored.losses.total, gap + 0.1 * anchor)
    same(pure.part("anchor"), anchor)


@kinds
def test_single_head_is_matched_to_the_guided_teacher(kind: PredictionType) -> None:
    case = Case("single-head", kind, scale=2.5)
    s_c, _, t_c, t_u = case.outputs()
    same(case.losses.total, case.mean((s_c - (2.5 * t_c - 1.5 * t_u)) ** 2))
    assert case.method.guided is False


@kinds
def test_conditional_is_the_imitation_term_alone(kind: PredictionType) -> None:
    case = Case("conditional", kind)
    s_c, _, t_c, _ = case.outputs()
    same(case.losses.total, case.mean((s_c - t_c) ** 2))


@kinds
def test_fitnets_adds_projected_features_of_the_conditional_branch(kind: PredictionType) -> None:
    case = Case("fitnets", kind, scale=2.0, lambda_hint=0.3, stages=("mid", "down.0"))
    s_c, s_u, t_c, t_u = case.outputs()
    composite = case.mean((2 * (s_c - t_c) - (s_u - t_u)) ** 2)
    b, hints = case.batch, []
    for stage, find in (("mid", lambda n: n.mid_block), ("down.0", lambda n: n.down_blocks[0])):
        seen: list[Tensor] = []
        for denoiser in (case.method.student, case.method.teacher):
            handle = find(denoiser.network).register_forward_hook(
                lambda m, a, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
            )
            denoiser(b.x_t, b.t, b.labels)
            handle.remove()
        mine, theirs = seen
        layer = case.method.projector.layers[stage.replace(".", "_")]
        error = (layer(mine) - theirs).square().flatten(1).mean(1) / theirs.square().flatten(1).mean(1)
        hints.append(error.mean())
    same(case.part("hint"), torch.stack(hints).mean())
    same(case.losses.total, composite + 0.3 * torch.stack(hints).mean())


@kinds
@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_supervised_is_weighted_noise_matching_with_dropped_labels(kind: PredictionType, unit: str) -> None:
    flat = {"rule": "none"}
    case = Case("supervised", kind, size=64, label_dropout=0.4, dropout_unit=unit, curriculum=flat)
    b = case.batch
    drawn = b.uniform("label_dropout", whole_batch=unit == "batch")
    dropped = (drawn < 0.4).expand(64)
    labels = torch.where(dropped, 3, b.labels)
    error = (case.method.student(b.x_t, b.t, labels) - case.truth()).square().mean()
    same(case.losses.total, error)
    same(case.part("mse"), error)
    if unit == "sample":
        assert 0.2 < float(dropped.float().mean()) < 0.6


def test_dropping_by_the_batch_takes_all_labels_or_none() -> None:
    case = bench("supervised", label_dropout=0.5, dropout_unit="batch")
    method: Any = case.method()
    shares = set()
    for number in range(12):
        seen: list[Tensor] = []
        handle = method.student.network.class_embedding.register_forward_hook(
            lambda m, a, out, seen=seen: seen.append(a[0])
        )
        case.loss(method, case.batch(8 * number))
        handle.remove()
        shares.add(float((seen[0] == 3).float().mean()))
    assert shares == {0.0, 1.0}


@kinds
def test_dropped_conditional_samples_are_anchored_to_noise(kind: PredictionType) -> None:
    """D11: a dropped sample shows the student the null label, and the noise is its only target."""
    case = Case("dash", kind, size=64, lambda_un=0.0, lambda_an=0.1, cond_dropout=0.3)
    b = case.batch
    dropped = b.uniform("cond_dropout") < 0.3
    assert 5 < int(dropped.sum()) < 35
    cond = case.method.student(b.x_t, b.t, torch.where(dropped, 3, b.labels))
    teacher = case.outputs()[2]
    wanted = torch.where(dropped.view(-1, 1, 1, 1), case.truth(), teacher)
    same(case.losses.total, case.mean((cond - wanted) ** 2) + 0.1 * case.mean((cond - case.truth()) ** 2))


@kinds
def test_a_copy_of_the_teacher_leaves_only_the_anchor(kind: PredictionType) -> None:
    made = bench("dash", kind)
    copy = made.teacher()
    copy.network.requires_grad_(True)
    method = made.method(student=copy)
    batch = made.batch()
    found = made.loss(method, batch).parts
    assert float(found["imitation"]) < 1e-12
    assert float(found["null"]) < 1e-12
    assert float(found["anchor"]) > 0.1


@kinds
def test_the_anchor_moves_the_conditional_target_a_tenth_of_the_way(kind: PredictionType) -> None:
    """Anchor identity (dash.md 2.2): the same gradient as one squared error to 10/11 teacher + 1/11 truth."""
    case = Case("dash", kind, lambda_un=0.0)
    s_c, _, t_c, _ = case.outputs()
    merged = 1.1 * case.mean((s_c - (10 * t_c + case.truth()) / 11) ** 2)
    parameters = list(case.method.student.network.parameters())
    mine = torch.autograd.grad(case.losses.total, parameters)
    for a, b in zip(mine, torch.autograd.grad(merged, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# Gradients


"""Methods whose students have few steps or take the scale: tests/test_checks.py and test_unidad_training.py try them by
the same rules."""


@kinds
@pytest.mark.parametrize("name", [name for name in METHODS if name not in OTHER_NETWORKS])
def test_gradients_reach_the_roles_and_nothing_else(name: str, kind: PredictionType) -> None:
    assert losses.gradients(bench(name, kind)) == f"trained: {', '.join(roles_of(name))}"


def roles_of(name: str) -> list[str]:
    own = {"fitnets": ["projector"], "supervised": ["curriculum"], "pruning": ["curriculum"]}
    return ["student", *own.get(name, [])]


TRAINS_NULL: list[tuple[str, dict[str, Any], bool]] = [
    ("dash", {}, True),
    ("dash", {"lambda_un": 0.0}, False),
    ("dash", {"lambda_un": 0.0, "cond_dropout": 0.5}, True),
    ("composite", {}, True),
    ("composite", {"scale": 1.0}, False),
    ("composite", {"scale": 1.0, "scale_to": 3.0}, True),
    ("gap", {}, True),
    ("fitnets", {}, True),
    ("conditional", {}, False),
    ("single-head", {}, False),
    ("sfddm", {}, True),
    ("sfddm", {"null_weight": 0.0}, False),
    ("supervised", {"label_dropout": 0.5}, True),
    ("supervised", {"label_dropout": 0.0}, False),
]


@kinds
@pytest.mark.parametrize(("name", "options", "trained"), TRAINS_NULL)
def test_the_null_row_has_a_gradient_exactly_where_it_is_trained(
    name: str, options: dict[str, Any], trained: bool, kind: PredictionType
) -> None:
    case = Case(name, kind, **options)
    rows = case.method.student.network.class_embedding.weight
    (gradient,) = torch.autograd.grad(case.losses.total, rows)
    assert bool((gradient[3] != 0).any()) is trained
    used = case.batch.labels.unique()
    if not options.get("cond_dropout") and not options.get("label_dropout"):
        assert bool((gradient[used] != 0).any(1).all())


@kinds
def test_perturbing_the_null_row_moves_the_null_term_alone(kind: PredictionType) -> None:
    case = Case("dash", kind)
    with torch.no_grad():
        case.method.student.network.class_embedding.weight[3] += 0.5
    after = case.bench.loss(case.method, case.batch).parts
    same(after["imitation"], case.part("imitation"))
    same(after["anchor"], case.part("anchor"))
    assert abs(float(after["null"] - case.part("null"))) > 1e-4


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OTHER_NETWORKS])
def test_no_hooks_stay(name: str) -> None:
    assert losses.hooks(bench(name)) == "none left"


def test_only_learned_curricula_are_roles_without_decay_clipping_or_average() -> None:
    for mode, learned in (("transfer", False), ("base", False), ("none", False), ("learn", True)):
        method = bench("dash", curriculum=mode).method()
        assert ("curriculum" in method.roles) is learned
        assert ("curriculum" in method.frozen) is not learned
    how = method.role_optimizers["curriculum"]
    assert (how.weight_decay, how.clip, how.ema) == (0.0, False, False)
    for rule, learned in (("tirt", True), ("uncertainty", True), ("min_snr", False), ("none", False)):
        assert ("curriculum" in bench("supervised", curriculum={"rule": rule}).method().roles) is learned


def test_the_projector_is_trained_and_not_exported() -> None:
    made = bench("fitnets")
    method: Any = made.method()
    plain = tiny_denoiser((8, 8), 0).network.state_dict().keys()
    arm = Arm("a", method, TrainSettings(images=8, batch_size=8, lr=1e-2), made.runtime)
    before = method.projector.layers["mid"].weight.clone()
    batch = made.batch()
    arm.backward(arm.phases["train"], batch, TeacherOutputs(method.teacher, batch, method.teacher_needs), 1.0, True)
    arm.update(arm.phases["train"], 0)
    assert not torch.equal(before, method.projector.layers["mid"].weight)
    assert method.projector.layers["mid"].weight.shape == (16, 8, 1, 1)
    assert arm.student.network.state_dict().keys() == plain
    assert set(arm.ema) == {"student"}
    assert set(method.artefacts()) == {"logits", "base", "weights"}


# What the teacher computes


def rows_through(denoiser: Denoiser, run: Any) -> list[int]:
    seen: list[int] = []
    handle = denoiser.network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize(
    ("name", "options", "rows", "passes"),
    [
        ("dash", {}, [16], 2),
        ("dash", {"lambda_un": 0.0}, [8], 1),
        ("conditional", {}, [8], 1),
        ("single-head", {}, [16], 1),
        ("gap", {}, [16], 2),
        ("composite", {}, [16], 2),
        ("fitnets", {}, [16], 2),
        ("supervised", {}, [], 1),
    ],
)
def test_no_branch_is_computed_that_is_not_needed(
    name: str, options: dict[str, Any], rows: list[int], passes: int
) -> None:
    made = bench(name, **options)
    method = made.method()
    assert method.teacher is not None
    batch = made.batch()
    assert rows_through(method.teacher, lambda: made.loss(method, batch)) == rows
    assert rows_through(method.student, lambda: made.loss(method, batch)) == [8 * passes]
    assert method.student_passes == passes


def test_teacher_outputs_are_computed_once_without_gradients_and_refuse_what_was_not_asked() -> None:
    made = bench("dash")
    teacher, batch = made.teacher(), made.batch()
    teacher.network.requires_grad_(True)
    both = TeacherOutputs(teacher, batch, frozenset({"cond", "null", "features"}))
    assert not both.computed
    assert rows_through(teacher, lambda: (both.cond, both.null, both.features, both.cond)) == [16]
    assert both.computed
    assert not both.cond.requires_grad
    alone = TeacherOutputs(teacher, batch, frozenset({"cond", "features"}))
    same(alone.cond, both.cond)
    for stage, feature in alone.features.items():
        torch.testing.assert_close(feature, both.features[stage], rtol=1e-4, atol=1e-5)
    with pytest.raises(LookupError, match="null output but does not list it"):
        _ = alone.null
    same(TeacherOutputs(teacher, batch, frozenset({"null"})).null, both.null)


def test_what_arms_share_is_charged_to_each_of_them_once() -> None:
    """In whatever order they come; with ``teacher_reuse`` the same outputs are shown again, and cost nothing more."""
    made, now = bench("dash"), [0.0]
    outputs = TeacherOutputs(made.teacher(), made.batch(), frozenset({"model"}), lambda: now[0])

    def dear(model: object, batch: object) -> int:
        now[0] += 5.0
        return 1

    outputs.once("path", dear)
    assert outputs.owed("first") == 0.0, "its own clock has run already"
    outputs.once("path", dear)
    outputs.once("path", dear)
    assert outputs.owed("second") == 5.0
    outputs.once("other", dear)
    outputs.once("path", dear)
    assert outputs.owed("third") == 5.0, "the path; the other it computed itself"
    for arm in ("first", "second", "third"):
        outputs.once("path", dear)
        assert outputs.owed(arm) == 0.0
    assert outputs.owed("idle") == 0.0


def test_terms_of_weight_zero_are_logged_and_send_no_gradient() -> None:
    a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    found = Losses.weighted(a=(0.5, a), b=(0.0, b))
    found.total.backward()
    assert (float(found.total.detach()), a.grad, b.grad) == (1.0, torch.tensor(0.5), None)
    assert {k: float(v) for k, v in found.parts.items()} == {"a": 2.0, "b": 3.0}
    assert not any(part.requires_grad for part in found.parts.values())
