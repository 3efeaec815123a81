"""Methods that each break one rule of the conformance checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffstill.methods import Batch, Losses, Options, Phase, RoleOptimizer, Setting, TeacherOutputs
from diffstill.methods.base import per_sample_mse
from diffstill.methods.distillation import Distillation, DistillOptions


def total(value: Tensor) -> Losses:
    return Losses(value, {})


class Plain(Distillation):
    """A sound method, the starting point of the broken ones."""

    name = "plain"
    options_class = DistillOptions
    teacher_needs = frozenset({"cond"})
    trains_null = False

    def errors(self, batch: Batch, teacher: TeacherOutputs | None) -> Tensor:
        assert teacher is not None
        return per_sample_mse(self.student(batch.x_t, batch.t, batch.labels), teacher.cond)

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        return total(self.errors(batch, teacher).mean())


class ReachesTheTeacher(Plain):
    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        return total((self.student.null(batch.x_t, batch.t) - self.teacher.null(batch.x_t, batch.t)).square().mean())


class IdleRole(Plain):
    def __init__(self, setting: Setting, options: Options) -> None:
        super().__init__(setting, options)
        self.roles["head"] = nn.Linear(1, 1)
        self.role_optimizers["head"] = RoleOptimizer()


class VectorTotal(Plain):
    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        return total(self.errors(batch, teacher))


class ForgetsGuidance(Plain):
    trains_null = True


class HoldsTensor(Plain):
    def __init__(self, setting: Setting, options: Options) -> None:
        super().__init__(setting, options)
        self.weights = torch.ones(3)


class HoldsModule(Plain):
    def __init__(self, setting: Setting, options: Options) -> None:
        super().__init__(setting, options)
        self.helper = nn.Linear(1, 1)


class WrongCopyValue(Plain):
    copy_parts = {"imitation": 0.0}

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        assert teacher is not None
        # Compares with the target of another sample.
        error = per_sample_mse(self.student(batch.x_t, batch.t, batch.labels), teacher.cond.roll(1, 0)).mean()
        return Losses(error, {"imitation": error.detach()})


class DividesByT(Plain):
    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        return total((self.errors(batch, teacher) / batch.t).mean())


class DrawsItself(Plain):
    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        errors = self.errors(batch, teacher)
        return total((errors * torch.rand_like(errors)).mean())


class FavoursTheFirst(Plain):
    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        errors = self.errors(batch, teacher)
        return total((errors * torch.arange(len(errors))).mean())


class NormalisesByTheBatch(Plain):
    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        assert teacher is not None
        return total(self.errors(batch, teacher).mean() / teacher.cond.square().mean())


class LeavesHook(Plain):
    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        handle = self.student.network.register_forward_hook(lambda *args: None)
        made = super().loss(batch, teacher)
        handle.remove()  # not reached where the forward raises
        return made


class MovesTheTeacher(Plain):
    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        with torch.no_grad():
            next(self.teacher.network.parameters()).mul_(0.999)
        return super().loss(batch, teacher)


class TrainsModeTeacher(Plain):
    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        self.teacher.network.train()
        return super().loss(batch, teacher)


class NeverAsks(Plain):
    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        return total(self.student(batch.x_t, batch.t, batch.labels).square().mean())


class NoAverage(Plain):
    def __init__(self, setting: Setting, options: Options) -> None:
        super().__init__(setting, options)
        self.role_optimizers["student"] = RoleOptimizer(ema=False)


class Remembers(Plain):
    """State that no checkpoint holds."""

    def __init__(self, setting: Setting, options: Options) -> None:
        super().__init__(setting, options)
        self.calls = 0

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        self.calls += 1
        return total(self.errors(batch, teacher).mean() * self.calls)


class TwoPhases(Plain):
    """Sound, too: a second network with an optimizer and a cadence of its own."""

    def __init__(self, setting: Setting, options: Options) -> None:
        super().__init__(setting, options)
        self.roles["head"], self.role_optimizers["head"] = nn.Linear(1, 1), RoleOptimizer(ema=False)

    @property
    def phases(self) -> tuple[Phase, ...]:
        return Phase("student", ("student",)), Phase("head", ("head",), every=2)

    def phase_loss(self, phase: str, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        error = self.errors(batch, teacher)
        head: Any = self.roles["head"]
        return total(error.mean() if phase == "student" else head(error.detach()[:, None]).square().mean())


class RoleOfNoPhase(TwoPhases):
    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("student", ("student",)),)


class PhaseOfAnotherRole(TwoPhases):
    def phase_loss(self, phase: str, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        return super().phase_loss("head", batch, teacher)

    @property
    def phases(self) -> tuple[Phase, ...]:
        return Phase("both", ("student", "head")), Phase("none", ())


class ThawsTheOther(TwoPhases):
    def phase_loss(self, phase: str, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        self.roles["head"].requires_grad_(True)
        head: Any = self.roles["head"]
        return total(self.errors(batch, teacher).mean() + head(batch.t[:, None].float()).square().mean())
