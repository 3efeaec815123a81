"""Single-head distillation: one scale is baked in, sampling takes one pass, the guidance dial is gone."""

from __future__ import annotations

from pydantic import Field

from ..diffusion.guidance import guide
from .base import Batch, Losses, TeacherOutputs, per_sample_mse, register
from .distillation import Distillation, DistillOptions


class SingleHeadOptions(DistillOptions):
    scale: float = Field(2.0, ge=0, description="the guidance scale that is baked into the student")


@register
class SingleHead(Distillation):
    """``E[w |S_c - guided_T(s)|^2]``; sampled without guidance at half the network evaluations."""

    name = "single-head"
    summary = "one guidance scale baked into a single-pass student (no dial)"
    source = "DASH 2606.00798 baselines"
    options_class = SingleHeadOptions
    teacher_needs = frozenset({"cond", "null"})
    guided = False

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        assert teacher is not None
        cond = self.student(batch.x_t, batch.t, batch.labels)
        wanted = guide(teacher.cond, teacher.null, float(self.options.scale))
        return Losses.weighted(guided=(1.0, self.weighted(batch, per_sample_mse(cond, wanted))))
