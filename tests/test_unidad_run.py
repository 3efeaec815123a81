"""Uni-DAD as a user runs it: ten digits through the command line, and a ring of Gaussians that moves to two new
modes."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from few_steps import Roles
from rounds import plain_diffusers
from torch import Tensor
from worlds import generator

from diffstill.analytic import GaussianMixtureWorld, MLPStudent, analytic_denoiser
from diffstill.cli import main
from diffstill.data.dataset import ImageData
from diffstill.data.sources import load_data
from diffstill.diffusion.guidance import Constant
from diffstill.diffusion.sampling import noise_source
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.engine.log import read_log
from diffstill.engine.runtime import Runtime
from diffstill.errors import InputError
from diffstill.evaluation.cost import TrainingForecast
from diffstill.evaluation.sampling import draw
from diffstill.jobs.build import check_roles
from diffstill.jobs.distill import blank_teacher, prepare_student
from diffstill.jobs.plan import plan
from diffstill.models.denoiser import Denoiser
from diffstill.models.folder import load_model
from diffstill.recipe import DistillRecipe, load_recipe
from diffstill.report.receipt import Receipt

# ------------------------------------------------------------------------------------------------ ten digits

EVALUATION = ["evaluation.samples=20", "evaluation.pairs=20", "evaluation.latency_batches=[1]"]
TEACHER = [
    "data.unlabelled=true",
    "data.limit=100",
    "network.block_out_channels=[8, 16]",
    "network.norm_num_groups=4",
    "training.images=256",
    "training.batch_size=32",
    "training.warmup_images=0",
    "evaluation.steps=4",
    *EVALUATION,
]
RECIPE = """
kind: distill
name: ten-digits
data: {source: digits, classes: ["0"], unlabelled: true, shots: 10}
teacher: {model: TEACHER}
student: {family: teacher}
method: {name: unidad, steps: 2, student_every: 3}
training: {images: 160, batch_size: 8, lr: 1.0e-3, log_every: 1, ema_decay: 0.5}
evaluation: {samples: 20, pairs: 20, steps: 2, teacher_steps: 4, latency_batches: [1]}
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("few") / "teacher"
    assert main(["train", "digits-teacher", *TEACHER, "--out", str(out), "--quiet"]) == 0
    return out / "model"


def recipe(teacher: Path, folder: Path) -> str:
    file = folder / "ten-digits.yaml"
    file.write_text(RECIPE.replace("TEACHER", str(teacher)))
    return str(file)


def test_ten_digits_make_a_two_step_generator_that_plain_diffusers_draws(teacher: Path, tmp_path: Path) -> None:
    """Mechanics, not quality: finite, trained, evaluated in two steps, loaded by a stranger."""
    assert main(["distill", recipe(teacher, tmp_path), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    log = [record for record in read_log(tmp_path / "run" / "log.jsonl") if "loss" in record]
    assert len(log) == 20
    assert [n for n, record in enumerate(log) if "dmd" in record] == [0, 3, 6, 9, 12, 15, 18]
    assert log[0]["dmd"] == 0
    assert all(record["dmd"] > 0 for record in log[3::3])
    receipt = Receipt.load(tmp_path / "run" / "receipt.json")
    assert [point.nfe for point in receipt.models["student"].sweep] == [2]
    made, start = (load_model(folder).denoiser for folder in (tmp_path / "run" / "model", teacher))
    pairs = zip(made.network.parameters(), start.network.parameters(), strict=True)
    assert all(bool(a.isfinite().all()) and not torch.equal(a, b) for a, b in pairs)
    assert (made.schedule.T, made.sampler) == (2, "renoise")
    (images,) = plain_diffusers(tmp_path / "run", ["model"], [0, 0, 0], 7, {"default": {}}).values()
    with made.evaluating():
        ours = draw(made, torch.zeros(3, dtype=torch.int64), Constant(1.0), noise_source(made.sample_shape, 7, 0, 3))
    theirs = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert theirs.std() > 0.05
    torch.testing.assert_close(theirs, (ours / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)


def test_eval_gives_the_teacher_its_own_steps_not_the_generators(teacher: Path, tmp_path: Path) -> None:
    """In the generator's one or two steps the teacher would return noise."""
    told = ["distill", recipe(teacher, tmp_path), "evaluation.steps=10", "--out", str(tmp_path / "run"), "--quiet"]
    assert main(told) == 0
    for asked, steps in ((["samples=20"], 10), (["steps=5"], 5)):  # the model's own protocol, and another
        out = tmp_path / f"eval-{steps}"
        words = ["eval", str(tmp_path / "run/model"), "--teacher", str(teacher), *asked, "--out", str(out), "--quiet"]
        assert main(words) == 0
        found = Receipt.load(out / "receipt.json").models
        assert {name: model.steps for name, model in found.items()} == {"teacher": steps, "student": 2}


def test_a_dry_run_counts_the_memory_of_all_networks() -> None:
    """A target teacher that is trained: its weights, gradient and moments."""

    def told(*changes: str) -> TrainingForecast:
        made = load_recipe("digits-unidad", changes)
        ((forecast, _),) = [found for name, found in plan(made, Runtime("cpu")).forecasts.items() if name == made.name]
        return forecast

    whole, without = told(), told("method.target_teacher=none", "method.target_weight=0")
    assert whole.memory_mb - without.memory_mb == pytest.approx(4 * 4 * whole.parameters / 1e6, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        (
            ["training.lr=0.5", "training.grad_clip=null", "training.decay=none"],
            1,
            "images have left their range (mean",
        ),
        (["method.target_teacher=frozen"], 2, "method.target_teacher: 'frozen' has no model; name the finished model"),
        (["method.taps=[nowhere]"], 2, "method.taps: 'nowhere'"),
        (["method.sigma_end=30"], 2, "method.sigma_end: 30.0 does not lie below sigma_max 10 and within the teacher's"),
        (["method.target_weight=2"], 2, "method.target_weight: 2 is not usable"),
        (["method.sigma_min=30"], 2, "method.sigma_min and sigma_max: '30 and 10' leave no levels between them"),
        (["method.guidance=2"], 2, "has no live null branch to learn from"),
        (
            ["training.teacher_reuse=2"],
            2,
            "training.teacher_reuse: 2 would only repeat batches: unidad keeps no",
        ),
        (["training.teacher_precision=bf16"], 2, "training.teacher_precision: 'bf16' is not training.precision"),
        (["training.compile=true"], 2, "training.compile: true has nothing to compile"),
        (["roles={discriminator: here}"], 2, "roles.discriminator: no role that may start from a model of its own"),
    ],
)
def test_what_cannot_be_ends_in_one_line(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], code: int, says: str
) -> None:
    """A run that diverges among them, with what to try."""
    out = tmp_path / "run"
    capsys.readouterr()
    assert main(["distill", recipe(teacher, tmp_path), *changes, "--out", str(out), "--quiet"]) == code
    told = capsys.readouterr().err.strip()
    assert says in told
    assert "\n" not in told
    assert "Traceback" not in told
    assert out.exists() == (code == 1), "refused before anything is written"
    if code == 1:
        assert "try a lower training.lr" in told
        assert not (out / "receipt.json").exists()


def test_guidance_of_a_teacher_yet_to_be_trained_is_refused_before_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distill", "digits-unidad", "method.guidance=2", "--out", str(tmp_path / "run"), "--quiet"]) == 2
    assert "has no live null branch to learn from; leave its null branch alone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_role_must_know_the_teachers_noise_levels(teacher: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    (other / "curriculum.safetensors").unlink()
    config = other / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "beta_schedule": "linear", "trained_betas": None}))
    made = load_recipe(recipe(teacher, tmp_path), [f"roles.critic={other}", "method.target_teacher=none"])
    assert isinstance(made, DistillRecipe)
    data = load_data(made.data)
    with pytest.raises(InputError, match=r"^roles.critic: 'a model of another noise schedule' does not fit"):
        prepare_student(made, data, blank_teacher(made, data))
    student = made.model_copy(update={"roles": {"student": str(other)}})
    prepare_student(student, data, blank_teacher(student, data))  # it is asked at its own steps alone


def other_model(folder: Path, *changes: str) -> Path:
    """The teacher's recipe with changes, trained for one step."""
    assert (
        main(["train", "digits-teacher", *TEACHER, "training.images=32", *changes, "--out", str(folder), "--quiet"])
        == 0
    )
    return folder / "model"


def test_a_student_may_be_smaller_than_its_teachers_and_critic(teacher: Path, tmp_path: Path) -> None:
    small = other_model(tmp_path / "small", "network.block_out_channels=[8, 8]")
    roles, run = f"roles={{student: {small}}}", tmp_path / "run"
    assert main(["distill", recipe(teacher, tmp_path), roles, "--out", str(run), "--quiet"]) == 0
    made, start, source = (load_model(folder).denoiser.network for folder in (run / "model", small, teacher))
    pairs = list(zip(made.parameters(), start.parameters(), strict=True))
    assert all(a.shape == b.shape and not torch.equal(a, b) for a, b in pairs)
    count = sum(p.numel() for p in made.parameters())
    assert count < sum(p.numel() for p in source.parameters()) / 2
    receipt = Receipt.load(run / "receipt.json")
    assert receipt.models["student"].cost.parameters == count
    (images,) = plain_diffusers(run, ["model"], [0, 0, 0], 7, {"default": {}}).values()
    assert images.std() > 0.05


def test_a_role_is_no_model_that_takes_the_scale(teacher: Path) -> None:
    told, other = (load_model(teacher).denoiser for _ in range(2))
    check_roles({"student": other}, told)
    other.scale_range = (1.0, 5.0)
    with pytest.raises(InputError, match=r"^roles.student: 'a model that takes the guidance scale' does not fit"):
        check_roles({"student": other}, told)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("data.unlabelled=false", "'a model of classes 10' does not fit the teacher; use one of classes 1"),
        (
            "prediction_type=v_prediction",
            "'a model of prediction v_prediction' does not fit the teacher; use one of prediction epsilon",
        ),
        ("data.size=16", "'a model of images (1, 16, 16)' does not fit the teacher; use one of images (1, 8, 8)"),
    ],
)
def test_a_role_must_be_a_model_of_the_same_thing(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, says: str
) -> None:
    other = other_model(tmp_path / "other", change)
    capsys.readouterr()
    told = ["distill", recipe(teacher, tmp_path), f"roles.critic={other}", "--out", str(tmp_path / "run"), "--quiet"]
    assert main(told) == 2
    assert capsys.readouterr().err.strip() == f"diffstill: roles.critic: {says}"


# ----------------------------------------------------------------------------------------------- eight modes

SCHEDULE = NoiseSchedule.create("linear", 1000)
CENTRES = torch.tensor([[0.75, 0.55], [0.75, -0.55]])
"""The target's: two modes of the ring, moved."""


def few(seed: int) -> ImageData:
    """Ten points of the target."""
    points = targets(10, seed)
    pixels = ((points + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return ImageData("two", "train", pixels.view(10, 2, 1, 1), torch.zeros(10, dtype=torch.int64), ("only",))


def targets(count: int, seed: int) -> Tensor:
    return CENTRES[torch.arange(count) % 2] + 0.05 * torch.randn(count, 2, generator=generator(seed))


def discrepancy(a: Tensor, b: Tensor) -> float:
    """Squared MMD of (N, 2) under a Gaussian kernel as wide as the modes are apart."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (-torch.cdist(x, y).square() / (2 * 0.3**2)).exp().mean()

    return float(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))


@pytest.fixture(scope="module")
def ring() -> Denoiser:
    """A small network trained on the ring until it knows it: by the exact prediction at every noise level."""
    steps = 1500
    world = GaussianMixtureWorld.ring(num_classes=1, components_per_class=8, radius=0.7, std=0.05)
    exact = analytic_denoiser(world, SCHEDULE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MLPStudent(1, (2, 1, 1), 1000, width=64, depth=2)
        update = torch.optim.Adam(network.parameters(), lr=2e-3)
        fall = torch.optim.lr_scheduler.LambdaLR(update, lambda step: 1 - step / steps)
        labels = torch.zeros(256, dtype=torch.int64)
        for _ in range(steps):
            x0, t = world.sample(labels).float(), torch.randint(0, 1000, (256,))
            x_t = SCHEDULE.add_noise(x0, torch.randn_like(x0), t)
            update.zero_grad()
            (network(x_t, t, labels) - exact(x_t, t, labels)).square().mean().backward()
            update.step()
            fall.step()
    return Denoiser(network, SCHEDULE, 1, (2, 1, 1))


def drawn(student: Denoiser) -> Tensor:
    with student.evaluating():
        labels = torch.zeros(1000, dtype=torch.int64)
        return draw(student, labels, Constant(1.0), noise_source((2, 1, 1), 5, 0, 1000)).flatten(1)


def shown(seed: int) -> Tensor:
    """(10, 2): what a training on them sees."""
    return few(seed).images.view(10, 2).float() / 127.5 - 1


def diversity(x: Tensor, seed: int) -> float:
    """Mean distance between samples (N, 2) that are nearest to the same of the ten points: 0 of their copies."""
    nearest = torch.cdist(x, shown(seed)).argmin(1)
    clusters = [x[nearest == k] for k in range(10)]
    return sum(float(torch.pdist(c).mean()) for c in clusters if len(c) > 1) / len(clusters)


def fine_tuned(student: Denoiser, ring: Denoiser, seed: int) -> Tensor:
    """What the source model draws in the student's few steps after as many updates on the ten points."""
    network, points = copy.deepcopy(ring.network), shown(seed).view(10, 2, 1, 1)
    update, draws = torch.optim.Adam(network.parameters(), lr=5e-4), generator(seed)
    for _ in range(1500):
        x0, t = points[torch.randint(0, 10, (16,), generator=draws)], torch.randint(0, 1000, (16,), generator=draws)
        eps = torch.randn(x0.shape, generator=draws)
        update.zero_grad()
        out = network(SCHEDULE.add_noise(x0, eps, t), t, torch.zeros(16, dtype=torch.int64))
        (out - eps).square().mean().backward()
        update.step()
    return drawn(student.with_network(network))


def adapt(ring: Denoiser, folder: Path, seed: int, **options: Any) -> tuple[Tensor, Tensor, Denoiser]:
    """What the student draws before and after, and the student, with ten points."""
    settings: dict[str, Any] = {"sigma_max": 10.0, "steps": 3, "student_every": 5, "gan": "none", **options}
    bench = Roles(ring, **settings)
    bench.__dict__["data"] = few(seed)
    chosen = {"lr": 5e-4, "decay": "none", "weight_decay": 0.0, "ema_decay": 0.9, "log_every": 200}
    trainer = bench.trainer(folder, steps=1500, **chosen)
    before = drawn(trainer.arms[0].student)
    trainer.run()
    return before, drawn(trainer.arms[0].student), trainer.arms[0].student


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_ring_moves_to_two_new_modes_by_ten_points(ring: Denoiser, tmp_path: Path, seed: int) -> None:
    """The MLPs have no encoder, so it is the target teacher's work; matching the source alone stays where it was."""
    wanted = targets(1000, 99)
    before, after, student = adapt(ring, tmp_path / "both", seed, target_weight=0.75)
    _, source, _ = adapt(ring, tmp_path / "source", seed, target_teacher="none")
    tuned = fine_tuned(student, ring, seed)
    left = {name: discrepancy(x, wanted) for name, x in (("before", before), ("source", source), ("tuned", tuned))}
    assert discrepancy(after, wanted) < min(0.5 * left["before"], 0.7 * left["source"], left["tuned"])
    assert after.var(0).sum() > 2 * tuned.var(0).sum() > 0.1, "both modes: of one the variance is 0.005"
    assert diversity(after, seed) > 2 * diversity(tuned, seed)
