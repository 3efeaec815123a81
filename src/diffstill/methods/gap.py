"""Gap (delta) matching: the guidance gap is matched, the branches may drift together (2606.00798 v2, Table A6)."""

from __future__ import annotations

from pydantic import Field

from ..diffusion.guidance import guidance_gap
from ..diffusion.prediction import target
from .base import Batch, Losses, TeacherOutputs, per_sample_mse, register
from .distillation import Distillation, DistillOptions


class GapOptions(DistillOptions):
    lambda_an: float = Field(0.0, ge=0, description="anchor of the conditional branch to the true noise (0: pure)")


@register
class GapMatching(Distillation):
    """``E[w |gap_S - gap_T|^2]``: zero whenever ``e_c = e_u``; with an anchor that ties the conditional branch (D9)."""

    name = "gap"
    summary = "the guidance gap matched, purely or with the conditional branch anchored to the noise"
    source = "DASH 2606.00798 v2 Table A6"
    options_class = GapOptions
    teacher_needs = frozenset({"cond", "null"})
    student_passes = 2
    copy_parts = {"gap": 0.0}

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        assert teacher is not None
        cond, null = self.student.branches(batch.x_t, batch.t, batch.labels)
        gap = per_sample_mse(guidance_gap(cond, null), guidance_gap(teacher.cond, teacher.null))
        alpha, sigma = self.schedule.at(batch.t, batch.x0.ndim)
        truth = target(batch.x0, batch.noise, alpha, sigma, self.student.prediction_type)
        return Losses.weighted(
            gap=(1.0, self.weighted(batch, gap)),
            anchor=(self.options.lambda_an, self.weighted(batch, per_sample_mse(cond, truth))),
        )
