"""Encoder distillation: one step up lands where the teacher's own steps up lead, and the noise gives the image back."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from rounds import column, exact
from tiny import TINY
from torch import Tensor

from diffstill.checks.bench import random_images, tiny_denoiser
from diffstill.cli import main
from diffstill.diffusion.guidance import Constant
from diffstill.diffusion.sampling import ddim_encode, level
from diffstill.diffusion.schedule import NoiseSchedule, spaced_indices
from diffstill.errors import InputError
from diffstill.evaluation.encoding import decode, encode, measure_encoding
from diffstill.evaluation.sampling import sample_images
from diffstill.methods import Setting
from diffstill.methods.encoder import Encoder, EncoderOptions, encoder_target
from diffstill.methods.progressive import Progressive, ProgressiveOptions
from diffstill.models.denoiser import Denoiser
from diffstill.models.folder import load_model, save_model
from diffstill.models.lineage import Lineage
from diffstill.report.receipt import Receipt

ONE = Constant(1.0)
LABELS = torch.zeros(2, dtype=torch.int64)


class Follower(Denoiser):
    """The perfect encoder: it predicts its target itself."""

    leader: Denoiser

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor, scale: Tensor | None = None) -> Tensor:
        return encoder_target(self.leader, x_t, t, labels)


def perfect(teacher: Denoiser, steps: int) -> Follower:
    chosen = [0] if steps == 1 else spaced_indices(teacher.schedule.T, steps, "leading")
    leader = teacher.respaced(chosen)
    made = Follower(teacher.network, leader.schedule, 1, (1, 1, 1), teacher.prediction_type)
    made.leader, made.sampler = leader, "encode"
    top = level(teacher.schedule, teacher.schedule.T - 1) if teacher.end is None else None
    ends = teacher.end or tuple(torch.tensor([value], dtype=torch.float64) for value in top or ())
    made.end = ends  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_perfect_encoder_of_any_steps_does_what_the_teacher_does_in_all_of_its_own(kind: Any) -> None:
    teacher = exact(64, kind)
    x = column(-0.4, 1.1)
    one = x
    for t in range(63):  # the teacher's own steps up, one by one, the image taken for its first level
        stamp = torch.full((2,), t)
        out = teacher(one, stamp, LABELS)
        (alpha, _), (up_alpha, up_sigma) = level(teacher.schedule, t), level(teacher.schedule, t + 1)
        eps = teacher.epsilon(out, one, stamp)
        one = up_alpha * (one - level(teacher.schedule, t)[1] * eps) / alpha + up_sigma * eps
    for steps in (32, 8, 2, 1):
        found = encode(perfect(teacher, steps), x, LABELS, ONE)
        torch.testing.assert_close(found, one, rtol=1e-9, atol=1e-9)


def test_rounds_of_encoders_are_one_another_in_fewer_steps() -> None:
    teacher, x = exact(64), column(0.2, -1.0)
    eight = perfect(teacher, 8)
    four, one = perfect(eight, 4), perfect(perfect(eight, 2), 1)
    wanted = encode(eight, x, LABELS, ONE)
    torch.testing.assert_close(encode(four, x, LABELS, ONE), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(encode(one, x, LABELS, ONE), wanted, rtol=1e-9, atol=1e-9)


def test_the_exact_flow_is_reached_as_steps_grow_and_decoded_again() -> None:
    x, errors = column(-0.7, 0.9), []
    for steps in (16, 64, 256):
        teacher = exact(steps)
        noise = ddim_encode(
            lambda x, t, s, m=teacher: m.guided(x, t, LABELS, s),  # type: ignore[misc]
            x, teacher.schedule, ONE, timesteps=range(steps), prediction_type="v_prediction",
        )  # fmt: skip
        # The flow of N(.3, .5^2) takes x to (x - .3) / .5.
        errors.append(float((noise - (x - 0.3) / 0.5).abs().max()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    back = decode(exact(256), (x - 0.3) / 0.5, LABELS, ONE, steps=256)
    torch.testing.assert_close(back, x, rtol=0, atol=0.02)


def tiny_encoder(options: dict[str, Any] | None = None, steps: int = 4, spacing: Any = "leading") -> Encoder:
    teacher = tiny_denoiser((8, 16), 1, None, "v_prediction").freeze()
    student = teacher.with_network(copy.deepcopy(teacher.network).requires_grad_(True))
    few = teacher.respaced(spaced_indices(1000, 16, spacing)).respaced(spaced_indices(16, steps, spacing))
    student.schedule = few.schedule
    return Encoder(Setting(student, few), EncoderOptions(**(options or {})))


def test_the_student_knows_where_its_last_step_ends() -> None:
    method = tiny_encoder()
    assert method.student.end is not None
    # The teacher is seen with 16 leading steps, the last at 937; the way goes on to the noisiest timestep all the same.
    assert [float(part) for part in method.student.end] == pytest.approx(level(NoiseSchedule.create(), 999))
    assert method.teacher_passes == 4
    assert not method.guided


def test_what_leaves_no_way_up_is_refused() -> None:
    with pytest.raises(InputError, match=r"respace: .* are no steps from image to noise"):
        tiny_encoder(spacing="trailing")


def test_teachers_of_another_direction_are_refused() -> None:
    teacher = tiny_denoiser((8, 16), 1, None, "v_prediction").freeze()
    few = teacher.respaced(spaced_indices(1000, 8, "leading"))
    student = teacher.with_network(copy.deepcopy(teacher.network))
    student.schedule = few.schedule
    for sampler, method, options in (
        ("stochastic", Encoder, EncoderOptions()),
        ("encode", Progressive, ProgressiveOptions()),
    ):
        teacher.sampler = sampler  # type: ignore[assignment]
        with pytest.raises(InputError, match=f"teacher: 'a model made to be sampled by {sampler}' does not fit"):
            method(Setting(student, few), options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    method = tiny_encoder()
    path = tmp_path_factory.mktemp("encoder") / "model"
    lineage = Lineage.new("tiny", "encoder")
    save_model(method.student, path, lineage=lineage, class_names=["a", "b", "c"], guided=False)
    return path


def test_the_folder_brings_it_back(folder: Path) -> None:
    method, loaded = tiny_encoder(), load_model(folder).denoiser
    assert loaded.sampler == "encode"
    assert loaded.end is not None
    assert method.student.end is not None
    assert float(loaded.end[0]) == pytest.approx(float(method.student.end[0]))
    x, labels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    with method.student.evaluating(), loaded.evaluating():
        torch.testing.assert_close(encode(method.student, x, labels, ONE), encode(loaded, x, labels, ONE))


def test_plain_diffusers_encodes_the_same(folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler).__name__ == "EncodeScheduler"
    x, labels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(3)
    loaded = load_model(folder).denoiser
    with loaded.evaluating():
        ours = encode(loaded, x, labels, ONE)
    theirs = pipe(labels, latents=x, output_type="latent").images
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="this model encodes in all its 4 steps"):
        pipe(labels, latents=x, num_inference_steps=2)


@pytest.mark.parametrize("value", [None, 1.0, -0.1, "x"])
def test_a_damaged_end_is_named(folder: Path, tmp_path: Path, value: object) -> None:
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "final_alpha_cumprod": value}))
    with pytest.raises(InputError, match="last step ends at final_alpha_cumprod"):
        load_model(tmp_path / "model")


def test_it_draws_no_images(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="goes from images to noise"):
        sample_images(load_model(folder).denoiser, 2, guidance=ONE, steps=4)
    assert main(["sample", str(folder), "--out", str(tmp_path / "x.png"), "--quiet"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_line_trains_one_and_tells_how_well_it_encodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [word for word in TINY if not word.startswith("student")]
    command = ["distill", "digits-encoder", *tiny, "evaluation.steps=8", "--out", str(tmp_path / "run"), "--quiet"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "come back with a mean squared error of" in told
    student = Receipt.load(tmp_path / "run" / "receipt.json").models["student"]
    assert student.encoding is not None
    assert student.sweep == []
    assert student.encoding.steps == 8
    assert student.cost is not None
    assert student.cost.nfe == 8
    assert student.encoding.fine_error.value is not None
    assert (tmp_path / "run" / student.images["grid"]).exists()


def test_measured_errors_are_those_of_the_way_there_and_back(tiny_run: Path) -> None:
    teacher = load_model(tiny_run / "teacher").denoiser
    data = random_images(teacher, 10)
    few = teacher.respaced(spaced_indices(1000, 8, "leading"))
    lazy = few.with_network(teacher.network)  # it takes strides of the teacher: the coarse way but for the grid
    lazy.sampler, lazy.origin = "encode", None
    lazy.end = tuple(torch.tensor([v], dtype=torch.float64) for v in level(teacher.schedule, 999))  # type: ignore[assignment]
    found = measure_encoding(lazy, teacher, data, batch_size=4)
    whole = measure_encoding(lazy, teacher, data, batch_size=10)
    assert found.error.value == pytest.approx(whole.error.value, rel=1e-4)
    assert found.images == 10
    x = data.images.float() / 127.5 - 1
    with teacher.evaluating():
        noise = encode(lazy, x, data.labels, ONE)
        back = decode(teacher, noise, data.labels, ONE)
    assert found.error.value == pytest.approx(float((back - x).square().mean()), rel=1e-4)
    assert found.noise_std == pytest.approx(float(noise.std()), rel=1e-3)
