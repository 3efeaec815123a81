"""DASH: both branches of the teacher are imitated at the same noisy point, so the guidance gap is pinned
(2606.00798, Eq. 4-7; dash.md 2.1)."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator

from ..diffusion.prediction import target
from .base import Batch, Losses, Options, Setting, TeacherOutputs, per_sample_mse, register
from .distillation import Distillation, DistillOptions


class DashOptions(DistillOptions):
    lambda_im: float = Field(1.0, ge=0, description="imitation of the conditional branch")
    lambda_un: float = Field(1.0, ge=0, description="imitation of the null branch")
    lambda_an: float = Field(0.1, ge=0, description="anchor of the conditional branch to the true noise")
    cond_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="ablation D11: label dropout on the conditional pass, those samples anchored to noise",
    )

    @model_validator(mode="after")
    def _some(self) -> DashOptions:
        if self.lambda_im == self.lambda_un == self.lambda_an == 0:
            raise ValueError("lambda_im, lambda_un and lambda_an are all 0; give one of them a weight")
        return self


@register
class Dash(Distillation):
    """``L = lambda_im E[w |S_c - T_c|^2] + lambda_un E[w |S_u - T_u|^2] + lambda_an E[w |S_c - eps|^2]``.

    The anchor is on the conditional branch only. The guidance scale never enters: one student serves every scale.
    """

    name = "dash"
    summary = "dual-branch distillation: conditional and null outputs both pinned, guidance stays alive"
    source = "DASH 2606.00798 Eq. 4-7"
    options_class = DashOptions
    teacher_needs = frozenset({"cond", "null"})
    student_passes = 2
    copy_parts = {"imitation": 0.0, "null": 0.0}

    def __init__(self, setting: Setting, options: Options) -> None:
        super().__init__(setting, options)
        if self.options.lambda_un == 0:
            self.teacher_needs = frozenset({"cond"})
            self.student_passes = 1
            self.trains_null = bool(self.options.cond_dropout)
        if self.options.cond_dropout:
            self.copy_parts = {"null": 0.0}  # dropped samples are anchored to noise under the name of imitation

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        assert teacher is not None
        o = self.options
        labels = batch.labels
        if o.cond_dropout:
            dropped = batch.uniform("cond_dropout") < o.cond_dropout
            labels = torch.where(dropped, self.student.null_label, labels)
        if o.lambda_un:
            cond, null = self.student.branches(batch.x_t, batch.t, labels)
            null_term = self.weighted(batch, per_sample_mse(null, teacher.null))
        else:
            cond = self.student(batch.x_t, batch.t, labels)
            null_term = torch.zeros((), device=cond.device)
        alpha, sigma = self.schedule.at(batch.t, batch.x0.ndim)
        truth = target(batch.x0, batch.noise, alpha, sigma, self.student.prediction_type)
        to_truth, to_teacher = per_sample_mse(cond, truth), per_sample_mse(cond, teacher.cond)
        if o.cond_dropout:
            # A dropped sample has no teacher target (the teacher saw the true label): the noise is its only target.
            to_teacher = torch.where(dropped, to_truth, to_teacher)
        return Losses.weighted(
            imitation=(o.lambda_im, self.weighted(batch, to_teacher)),
            null=(o.lambda_un, null_term),
            anchor=(o.lambda_an, self.weighted(batch, to_truth)),
        )
