"""Fewer steps: respaced schedules and models against closed-form chains, and SFDDM's losses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from respacing import SIGMOID, WORLD, T, ddim_law
from tiny import TINY
from torch import Tensor
from torch.nn import functional

from diffstill.analytic import analytic_denoiser
from diffstill.checks.bench import Bench, tiny_denoiser
from diffstill.cli import main
from diffstill.diffusion.guidance import Constant
from diffstill.diffusion.schedule import NoiseSchedule, spaced_indices
from diffstill.diffusion.steps import ddim_step, one_step_target
from diffstill.errors import InputError
from diffstill.evaluation.sampling import sample_images
from diffstill.jobs.build import Teacher, respaced
from diffstill.methods import METHODS, Curriculum, Setting, TeacherOutputs
from diffstill.methods.sfddm import Sfddm, SfddmOptions
from diffstill.methods.trajectory import trajectory_target
from diffstill.models.denoiser import Denoiser
from diffstill.models.folder import load_model
from diffstill.recipe import RespaceSpec
from diffstill.report.receipt import Receipt

# ------------------------------------------------------------------------------------------------- single steps


@given(t=st.integers(1, T - 1), data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_one_step_target_reaches_what_it_was_made_of(t: int, data: st.DataObject) -> None:
    u = data.draw(st.integers(-1, t - 1))
    alpha, sigma = SIGMOID.alphas, SIGMOID.sigmas
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    a_u, s_u = (one, zero) if u < 0 else (alpha[u], sigma[u])
    x_t, x_u = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    reached = one_step_target(x_t, x_u, alpha[t], sigma[t], a_u, s_u)
    back = ddim_step(reached, x_t, alpha[t], sigma[t], a_u, s_u)
    torch.testing.assert_close(back, x_u, rtol=1e-9, atol=1e-9)
    if u < 0:
        torch.testing.assert_close(reached, x_u)


class Follower(Denoiser):
    """The perfect trajectory student: it predicts the target itself."""

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return trajectory_target(self.leader, x_t, t, labels, self.way)

    leader: Denoiser
    way: int | None = None


def follower(indices: list[int], way: int | None = None, kind: Any = "epsilon") -> Follower:
    leader = analytic_denoiser(WORLD, SIGMOID, kind).respaced(indices)
    made = Follower(leader.network, leader.schedule, leader.num_classes, leader.sample_shape, kind)
    made.leader, made.way = leader, way
    return made


@pytest.mark.parametrize(
    ("steps", "spacing", "mean", "std"),
    [
        (16, "trailing", 0.299919, 0.498865), (2, "trailing", 0.299919, 0.498865), (1, "trailing", 0.299919, 0.498865),
        (16, "leading", 0.277707, 0.503037), (8, "leading", 0.265048, 0.509011), (2, "leading", 0.166453, 0.630568),
    ],
)  # fmt: skip
def test_a_perfect_trajectory_student_takes_all_of_the_teachers_steps(
    steps: int, spacing: Any, mean: float, std: float
) -> None:
    found = ddim_law(follower(spaced_indices(T, steps, spacing)))
    assert found == (pytest.approx(mean, abs=2e-5), pytest.approx(std, abs=2e-5))


def test_on_fewer_teacher_steps_the_trajectory_lies_between() -> None:
    """Its law is the strided teacher's at one step a jump, and the whole teacher's at all of them."""
    indices = spaced_indices(T, 8, "trailing")
    stds = [ddim_law(follower(indices, way))[1] for way in (1, 2, 8, None)]
    assert stds[0] == pytest.approx(0.407601, abs=1e-5)
    assert stds == sorted(stds)
    assert stds[-1] == pytest.approx(0.498865, abs=2e-5)


def test_one_jump_has_the_known_gain_and_slope() -> None:
    model = analytic_denoiser(WORLD, SIGMOID, "sample").respaced([896, 960])
    far = 100.0  # its clean image lies far outside [-1, 1]: nothing may be clipped
    x = torch.tensor([0.0, far], dtype=torch.float64).view(2, 1, 1, 1)
    t, labels = torch.ones(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    low, high = trajectory_target(model, x, t, labels).flatten().tolist()
    assert (high - low) / far == pytest.approx(0.048059, abs=2e-6)
    low, high = model(x, t, labels).flatten().tolist()
    assert (high - low) / far == pytest.approx(0.037546, abs=2e-6)


# ------------------------------------------------------------------------------------------------------- the method

INDICES = [0, 60, 400, 980]


def setting(teacher_widths: tuple[int, int] = (8, 16), kind: Any = "epsilon", copied: bool = False) -> Setting:
    teacher = tiny_denoiser(teacher_widths, 1)
    teacher.prediction_type = kind
    fewer = teacher.freeze().respaced(INDICES)
    network = copy.deepcopy(teacher.network).requires_grad_(True) if copied else tiny_denoiser((8, 8), 2).network
    student = Denoiser(network, fewer.schedule, teacher.num_classes, teacher.sample_shape, kind)
    return Setting(student, fewer)


def make(chosen: Setting, **options: Any) -> Any:
    return Sfddm(chosen, SfddmOptions(**options))


def batch_of(method: Any) -> Any:
    bench = Bench(METHODS["dash"], teacher=tiny_denoiser((8, 16), 1))
    made = bench.batch()
    t = torch.arange(len(made.t)) % len(INDICES)
    from dataclasses import replace

    return replace(made, t=t, t_global=t, x_t=method.schedule.add_noise(made.x0, made.noise, t))


def loss_of(method: Any, batch: Any) -> Any:
    return method.loss(batch, TeacherOutputs(method.teacher, batch, method.teacher_needs))


def test_student_and_teacher_see_the_same_image() -> None:
    method = make(setting())
    batch = batch_of(method)
    whole = method.teacher.origin[0].schedule
    torch.testing.assert_close(batch.x_t, whole.add_noise(batch.x0, batch.noise, torch.tensor(INDICES)[batch.t]))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_copy_fed_the_teachers_timesteps_loses_nothing(kind: Any) -> None:
    method = make(setting(kind=kind, copied=True), time_index="teacher")
    losses = loss_of(method, batch_of(method))
    assert losses.total.item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        next(method.student.network.parameters()).add_(0.1)
    assert loss_of(method, batch_of(method)).total.item() > 1e-3
    own = make(setting(kind=kind, copied=True))
    assert loss_of(own, batch_of(own)).total.item() > 1e-3, "its own step is another time input"


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("l1", lambda a, b: (a - b).abs().mean()),
        ("mse", lambda a, b: (a - b).square().mean()),
        ("huber", lambda a, b: functional.huber_loss(a, b, delta=0.1)),
    ],
)
def test_the_loss_is_its_formula(name: str, loss: Any) -> None:
    method = make(setting((8, 8)), output_loss=name, feature_weight=0.7, null_weight=0.4)
    batch = batch_of(method)
    found = loss_of(method, batch)
    taps: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    outputs = {}
    for role, model, t in (
        ("student", method.student, batch.t),
        ("teacher", method.teacher.origin[0], torch.tensor(INDICES)[batch.t]),
    ):
        hook = model.network.conv_out.register_forward_pre_hook(lambda m, args, role=role: taps[role].append(args[0]))
        outputs[role] = [model(batch.x_t, t, batch.labels), model(batch.x_t, t, torch.full_like(batch.labels, 3))]
        hook.remove()
    parts = {
        "output": loss(outputs["student"][0], outputs["teacher"][0]),
        "null": loss(outputs["student"][1], outputs["teacher"][1]),
        "feature": (taps["student"][0] - taps["teacher"][0]).abs().mean(),
        "null_feature": (taps["student"][1] - taps["teacher"][1]).abs().mean(),
    }
    for part, value in parts.items():
        torch.testing.assert_close(found.parts[part], value.detach(), rtol=1e-5, atol=1e-6)
    total = parts["output"] + 0.4 * parts["null"] + 0.7 * parts["feature"] + 0.28 * parts["null_feature"]
    torch.testing.assert_close(found.total, total, rtol=1e-5, atol=1e-6)


def test_the_trajectory_loss_is_against_the_trajectory() -> None:
    method = make(setting(), target="trajectory", trajectory_steps=3, feature_weight=0)
    assert method.teacher_needs == {"model"}
    batch = batch_of(method)
    found = loss_of(method, batch)
    with torch.no_grad():
        wanted = trajectory_target(method.teacher, batch.x_t, batch.t, batch.labels, 3)
        null = trajectory_target(method.teacher, batch.x_t, batch.t, torch.full_like(batch.labels, 3), 3)
        cond, student_null = method.student.branches(batch.x_t, batch.t, batch.labels)
    torch.testing.assert_close(found.parts["output"], (cond - wanted).abs().mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.parts["null"], (student_null - null).abs().mean(), rtol=1e-4, atol=1e-5)


def test_arms_of_other_trajectories_do_not_share_them() -> None:
    ways = ((1, 1.0), (3, 1.0), (3, 0.0))
    methods = [
        make(setting(), target="trajectory", trajectory_steps=steps, null_weight=null, feature_weight=0)
        for steps, null in ways
    ]
    batch = batch_of(methods[0])
    shared = TeacherOutputs(methods[0].teacher, batch, frozenset({"model"}))
    for method in methods:
        torch.testing.assert_close(method.loss(batch, shared).total, loss_of(method, batch).total)


def test_without_a_null_weight_the_null_branch_is_neither_asked_nor_trained() -> None:
    method = make(setting(), null_weight=0)
    assert method.teacher_needs == {"cond", "features"}
    assert (method.student_passes, method.trains_null) == (1, False)
    assert set(loss_of(method, batch_of(method)).parts) == {"output", "feature"}


@pytest.mark.parametrize("options", [{}, {"target": "trajectory", "trajectory_steps": 2}])
def test_gradients_reach_the_student_and_its_projector_alone(options: dict[str, Any]) -> None:
    method = make(setting((8, 16)), **options)
    method.teacher.network.requires_grad_(True)  # if a gradient could get there, it would
    before = copy.deepcopy(method.teacher.network.state_dict())
    loss_of(method, batch_of(method)).total.backward()
    assert all(p.grad is None for p in method.teacher.network.parameters())
    assert all(torch.equal(before[k], v) for k, v in method.teacher.network.state_dict().items())
    trained = [p for role in method.roles.values() for p in role.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    for network in (method.teacher.network, method.student.network):
        assert all(not module._forward_hooks for module in network.modules())


def test_widths_are_bridged_only_where_they_differ() -> None:
    assert "projector" not in make(setting((8, 8))).roles
    wide = make(Setting(setting((8, 8)).student, tiny_denoiser((16, 16), 1).freeze().respaced(INDICES)))
    assert "projector" in wide.roles
    assert not wide.role_optimizers["projector"].ema, "dropped at export"
    bare = make(Setting(wide.student, wide.teacher), feature_weight=0)
    assert "projector" not in bare.roles


def test_a_curriculum_follows_the_chosen_steps() -> None:
    schedule = NoiseSchedule.create("cosine", 1000)
    whole = Curriculum(schedule)
    with torch.no_grad():
        whole.logits.copy_(torch.linspace(-2, 2, 1000))
    fewer = whole.respace(schedule.respace(INDICES), torch.tensor(INDICES))
    expected = whole.weights()[INDICES]
    torch.testing.assert_close(fewer.weights(), expected / expected.mean(), rtol=1e-5, atol=1e-6)
    assert not fewer.logits.requires_grad
    teacher = Teacher(tiny_denoiser((8, 8), 0), whole, None, None)
    seen = respaced(teacher, RespaceSpec(timesteps=tuple(INDICES))).curriculum
    assert seen is not None
    torch.testing.assert_close(seen.weights(), fewer.weights())


# --------------------------------------------------------------------------------------------- from recipe to folder

FEW = ["student.block_out_channels=[8, 16]", *(part for part in TINY if not part.startswith("student.block"))]


@pytest.fixture(scope="module", params=["own", "teacher"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sfddm") / request.param
    few = [*FEW, "respace.steps=4", "evaluation.teacher_steps=6", f"method.time_index={request.param}"]
    assert main(["distill", "digits-sfddm", *few, "--out", str(out), "--quiet"]) == 0
    return out


def test_a_run_measures_the_teacher_the_strided_teacher_and_the_student(run: Path) -> None:
    receipt = Receipt.load(run / "receipt.json")
    assert list(receipt.models) == ["teacher", "student", "strided-teacher"]
    assert {role: model.steps for role, model in receipt.models.items()} == {
        "teacher": 6, "student": 4, "strided-teacher": 4,
    }  # fmt: skip
    assert [point.nfe for point in receipt.models["teacher"].sweep] == [6, 12]
    assert [point.nfe for point in receipt.models["student"].sweep] == [4, 8]
    assert receipt.models["student"].fidelity is not None, "the gap is compared at the steps that both have"
    assert receipt.models["teacher"].fidelity is None


def test_a_student_of_the_conditional_branch_alone_has_no_live_null_branch(tmp_path: Path) -> None:
    few = [*FEW, "respace.steps=4", "evaluation.teacher_steps=6", "method.null_weight=0"]
    assert main(["distill", "digits-sfddm", *few, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert not load_model(tmp_path / "run" / "model").guided
    assert len(Receipt.load(tmp_path / "run" / "receipt.json").models["student"].sweep) == 1


def test_the_student_is_an_ordinary_model_of_its_steps(run: Path) -> None:
    loaded = load_model(run / "model")
    own = run.name == "own"
    assert loaded.denoiser.schedule.T == 4
    assert (loaded.denoiser.time_index is None) == own
    assert loaded.lineage is not None
    assert loaded.lineage.timesteps == [0, 250, 500, 750]
    teacher = load_model(run / "teacher").denoiser
    levels = teacher.schedule.alphas_cumprod[loaded.lineage.timesteps]
    torch.testing.assert_close(loaded.denoiser.schedule.alphas_cumprod, levels, rtol=1e-5, atol=1e-6)


def test_plain_diffusers_draws_the_same_pixels(run: Path) -> None:
    loaded = load_model(run / "model")
    pipeline = DiffusionPipeline.from_pretrained(run / "model", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    labels = [0, 3, 7]
    ours = sample_images(loaded.denoiser, 3, guidance=Constant(2.0), steps=4, labels=torch.tensor(labels))
    from diffstill.diffusion.sampling import image_noise

    theirs = pipeline(
        labels, guidance_scale=2.0, latents=image_noise(loaded.denoiser.sample_shape, 0, 0, 3), output_type="pt"
    ).images
    assert (theirs.mul(255).round().to(torch.int16) - ours.to(torch.int16)).abs().max() <= 1


def test_the_command_line_samples_and_evaluates_it(run: Path, tmp_path: Path) -> None:
    assert main(["sample", str(run / "model"), "--out", str(tmp_path / "x.png"), "--quiet"]) == 0
    folder = str(tmp_path / "e")
    teacher = str(run / "teacher")
    assert main(["eval", str(run / "model"), "--teacher", teacher, "--out", folder, "--quiet"]) == 0
    again, first = Receipt.load(tmp_path / "e"), Receipt.load(run)
    assert list(again.models) == list(first.models)
    assert again.models["student"].fidelity is not None
    assert first.models["student"].fidelity is not None
    ratios = [r.models["student"].fidelity.overall.ratio.value for r in (again, first)]  # type: ignore[union-attr]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-3)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("respace={steps: 2000}", r"respace: .*steps 2000 must lie in 1\.\.1000"),
        ("respace={timesteps: [5, 3]}", "respace: .*increasing"),
        ("respace={timesteps: [0, 1000]}", r"respace: .*0\.\.999"),
        ("respace={steps: 1}", "respace: .*use trailing"),
        ("respace={steps: 4, timesteps: [1]}", "respace"),
        ("evaluation.steps=17", "evaluation.steps"),
        ("method.trajectory_steps=0", "method.trajectory_steps: 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    override: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main(["distill", "digits-sfddm", override, "--out", str(tmp_path / "never"), "--dry-run"]) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told
    assert re.search(says, told), told
    assert not (tmp_path / "never").exists()


def test_a_transformer_shows_no_feature_map() -> None:
    from diffstill.models.adapters import FAMILIES

    network = FAMILIES["dit"].build(
        sample_shape=(1, 8, 8), num_classes=3, num_layers=1, num_attention_heads=1, attention_head_dim=8
    )
    model = Denoiser(network, NoiseSchedule.create("cosine", 1000), 3, (1, 8, 8))
    fewer = model.respaced(INDICES)
    student = Denoiser(copy.deepcopy(network), fewer.schedule, 3, (1, 8, 8))
    with pytest.raises(InputError, match=r"method\.feature_weight: 1\.0 needs a feature map"):
        Sfddm(Setting(student, fewer), SfddmOptions())
    Sfddm(Setting(student, fewer), SfddmOptions(feature_weight=0))
