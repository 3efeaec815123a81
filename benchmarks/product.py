"""The library's own training step, driven from outside: what the product does, not a copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from problem import ANCHOR, CURRICULUM, LABEL_DROPOUT, NUM_CLASSES, Problem
from step import set_autotune

from diffstill.engine.arm import Arm, union_of_needs
from diffstill.engine.loop import Trainer
from diffstill.engine.runtime import Runtime
from diffstill.engine.stream import BatchStream
from diffstill.methods.base import Batch, Method, Setting, TeacherOutputs
from diffstill.methods.dash import Dash, DashOptions
from diffstill.methods.supervised import Supervised, SupervisedOptions
from diffstill.models.denoiser import Denoiser


class LibraryStep:
    """One step of ``Trainer`` a call. ``changed`` are training settings that differ from the library's defaults."""

    def __init__(self, problem: Problem, runtime: Runtime, run_dir: Path, **changed: Any) -> None:
        self.settings = problem.settings(**changed)
        self.stream = BatchStream(
            problem.data, problem.schedule, batch_size=problem.batch, seed=0, device=runtime.device
        )
        teacher = _denoiser(problem, problem.teacher()) if problem.work == "distil" else None
        self.arm = Arm(problem.work, _method(problem, teacher), self.settings, runtime)
        self.trainer = Trainer([self.arm], self.stream, self.settings, runtime, run_dir, teacher=teacher)

    @property
    def bf16(self) -> bool:
        """Whether the trained network runs in bf16: what ``precision`` resolves to on this device."""
        return self.arm.method.student.autocast_dtype is torch.bfloat16

    @property
    def teacher_bf16(self) -> bool:
        """Whether the teacher does; False without one."""
        return self.trainer.teacher is not None and self.trainer.teacher.autocast_dtype is torch.bfloat16

    def prepare(self) -> None:
        set_autotune(True)  # as Runtime does on CUDA

    def __call__(self) -> None:
        self.trainer.step()
        if self.arm.counts["loss"] >= self.settings.log_every:
            self.arm.take_means()

    def batch(self) -> Batch:
        """The first batch of the run."""
        return self.stream.batch(0)

    def loss_on(self, batch: Batch) -> float:
        """The loss at a batch, network dropout off, nothing changed."""
        network = self.arm.method.student.network
        network.eval()
        # Eager: nothing is compiled for a check that runs once, with other settings than the steps.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            needs = union_of_needs([self.arm])
            taught = None if self.trainer.teacher is None else TeacherOutputs(self.trainer.teacher, batch, needs)
            loss = float(self.arm.method.loss(batch, taught).total)
        network.train()
        return loss


@contextmanager
def exact() -> Iterator[None]:
    """Float32 in earnest, without TF32: for comparisons of losses."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _denoiser(problem: Problem, network: torch.nn.Module) -> Denoiser:
    return Denoiser(network, problem.schedule, NUM_CLASSES, problem.nets.sample_shape)


def _method(problem: Problem, teacher: Denoiser | None) -> Method:
    trained = _denoiser(problem, problem.trained())
    if teacher is None:
        return Supervised(Setting(trained), SupervisedOptions(label_dropout=LABEL_DROPOUT, curriculum=CURRICULUM))
    return Dash(Setting(trained, teacher, problem.curriculum()), DashOptions(lambda_an=ANCHOR))
