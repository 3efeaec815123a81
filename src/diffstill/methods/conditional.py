"""Conditional-only output distillation: the null branch is never touched, and guidance collapses (dash.md D10)."""

from __future__ import annotations

from .base import Batch, Losses, TeacherOutputs, per_sample_mse, register
from .distillation import Distillation, DistillOptions


@register
class ConditionalOnly(Distillation):
    """``E[w |S_c - T_c|^2]``; the student's null row is never trained (weight decay alone touches it)."""

    name = "conditional"
    summary = "output distillation of the conditional branch alone (the null branch stays untrained)"
    source = "Hinton et al. 1503.02531, as DASH 2606.00798 baseline"
    options_class = DistillOptions
    teacher_needs = frozenset({"cond"})
    trains_null = False
    copy_parts = {"imitation": 0.0}

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        assert teacher is not None
        cond = self.student(batch.x_t, batch.t, batch.labels)
        return Losses.weighted(imitation=(1.0, self.weighted(batch, per_sample_mse(cond, teacher.cond))))
