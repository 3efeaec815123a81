"""``training.teacher_reuse``: which batches come round again, and that resuming inside a window changes nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from worlds import uneven_world

from diffstill.analytic import MLPStudent, analytic_denoiser
from diffstill.data.dataset import ImageData
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.engine.arm import Arm
from diffstill.engine.loop import REUSE_WINDOW, Trainer
from diffstill.engine.runtime import Runtime
from diffstill.engine.settings import TrainSettings
from diffstill.engine.stream import BatchStream
from diffstill.methods import METHODS, Setting
from diffstill.models.denoiser import Denoiser

SCHEDULE = NoiseSchedule.create("cosine", 100)


def trainer(folder: Path, reuse: int, steps: int = 40) -> Trainer:
    world = uneven_world()
    teacher = analytic_denoiser(world, SCHEDULE)
    shape = teacher.sample_shape
    torch.manual_seed(0)
    student = Denoiser(MLPStudent(teacher.num_classes, shape, SCHEDULE.T), SCHEDULE, teacher.num_classes, shape)
    method = METHODS["dash"](Setting(student, teacher), METHODS["dash"].options_class(curriculum="none"))
    settings = TrainSettings(images=4 * steps, batch_size=4, teacher_reuse=reuse, log_every=1000, channels_last=False)
    runtime = Runtime("cpu")
    labels = torch.arange(64) % teacher.num_classes
    pixels = torch.randint(0, 256, (64, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    names = tuple(str(k) for k in range(teacher.num_classes))
    data = ImageData("noise", "train", pixels, labels, names)
    stream = BatchStream(data, SCHEDULE, batch_size=4, seed=0, device=runtime.device)
    return Trainer([Arm("a", method, settings, runtime)], stream, settings, runtime, folder, teacher=teacher)


def test_windows_come_round_r_times_and_cover_the_stream(tmp_path: Path) -> None:
    made = trainer(tmp_path, reuse=3)
    shown = [made._shown(4 * step)[0] // 4 for step in range(2 * 3 * REUSE_WINDOW)]
    window = list(range(REUSE_WINDOW))
    assert shown == window * 3 + [REUSE_WINDOW + k for k in window] * 3
    assert made._shown(4 * 4 * REUSE_WINDOW)[1] == range(4 * REUSE_WINDOW, 4 * 2 * REUSE_WINDOW), "all of them are kept"
    plain = trainer(tmp_path, reuse=1)
    assert [plain._shown(4 * step)[0] // 4 for step in range(20)] == list(range(20))


def test_resume_inside_a_window_is_exact(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", reuse=2)
    whole.run()
    first = trainer(tmp_path / "cut", reuse=2)
    first.total = 4 * 13
    first.run()
    again = trainer(tmp_path / "cut", reuse=2)
    again.run()
    a, b = whole.arms[0].tensors(), again.arms[0].tensors()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_teacher_is_asked_once_a_batch_and_old_windows_are_forgotten(tmp_path: Path) -> None:
    made = trainer(tmp_path, reuse=3, steps=2 * 3 * REUSE_WINDOW)
    asked: list[int] = []
    assert made.teacher is not None
    made.teacher.network.register_forward_pre_hook(lambda module, args: asked.append(made.images_seen // 4))
    made.run()
    assert asked == [*range(REUSE_WINDOW), *range(3 * REUSE_WINDOW, 4 * REUSE_WINDOW)]
    assert sorted(made._cache) == [4 * step for step in range(REUSE_WINDOW, 2 * REUSE_WINDOW)]
