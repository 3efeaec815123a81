"""What the size-distillation methods share: the student's frozen curriculum and the refusal of mismatched pairs."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from ..diffusion.sampling import SamplerName
from ..errors import InputError
from ..models.denoiser import Denoiser
from .base import Batch, Method, Options, RoleOptimizer, Setting
from .curriculum import Curriculum, StudentCurriculum, student_curriculum


class DistillOptions(Options):
    curriculum: StudentCurriculum = Field(
        "transfer", description="transfer: the teacher's, frozen; base: lambda = 0; learn: from zero; none: uniform"
    )


class Distillation(Method):
    """A student matched to a teacher's outputs under the curriculum's timestep weights."""

    teacher: Denoiser

    def __init__(self, setting: Setting, options: Options) -> None:
        super().__init__(setting, options)
        self.teacher = require_teacher(setting)
        self.curriculum = student_curriculum(self.options.curriculum, self.schedule, setting.curriculum)
        if self.curriculum.logits.requires_grad:
            self.roles["curriculum"] = self.curriculum
            self.role_optimizers["curriculum"] = RoleOptimizer(weight_decay=0.0, clip=False, ema=False)
        else:
            self.frozen["curriculum"] = self.curriculum

    def weighted(self, batch: Batch, per_sample: Tensor) -> Tensor:
        """Mean over the batch of ``w_hat(t_i) per_sample_i``."""
        weigh: Curriculum = self.roles.get("curriculum", self.curriculum)  # type: ignore[assignment]
        return weigh(per_sample, batch.t, batch.t_global)

    def artefacts(self) -> Mapping[str, Tensor]:
        return self.curriculum.table() if self.curriculum else {}


def require_teacher(
    setting: Setting, *, made_for: tuple[SamplerName, ...] = ("ddim", "stochastic"), strides: bool = False
) -> Denoiser:
    """The teacher, once student and teacher are seen to speak of the same thing.

    Args:
        made_for: the samplers that the teacher's steps may be made for.
        strides: whether the method goes such a teacher's own way where the student has fewer steps.
    """
    student, teacher = setting.student, setting.teacher
    if teacher is None:
        raise InputError("teacher", None, "name a teacher model folder", problem="is missing")
    sampler = teacher.whole[0].sampler
    if sampler not in made_for or (sampler != "ddim" and teacher.origin is not None and not strides):
        mend = f"use a teacher made for {' or '.join(made_for if strides else ('ddim',))}"
        raise InputError("teacher", f"a model made to be sampled by {sampler}", mend, problem="does not fit the method")
    if not student.schedule.same_as(teacher.schedule):
        raise InputError(
            "schedule",
            f"{student.schedule.name} with T={student.schedule.T}",
            f"use the teacher's {teacher.schedule.name} with T={teacher.schedule.T}",
            problem="differs from the teacher's",
        )
    for field in ("num_classes", "sample_shape", "prediction_type"):
        mine, theirs = getattr(student, field), getattr(teacher, field)
        if mine != theirs:
            raise InputError(
                f"student.{field}", mine, f"use the teacher's {theirs}", problem="differs from the teacher's"
            )
    return teacher
