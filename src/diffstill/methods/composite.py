"""Composite (guided-output) distillation: the guided predictions are matched, the gap itself is not pinned."""

from __future__ import annotations

from pydantic import Field, model_validator
from torch import Tensor

from ..diffusion.guidance import guide
from .base import Batch, Losses, TeacherOutputs, per_sample_mse, register
from .distillation import Distillation, DistillOptions


class CompositeOptions(DistillOptions):
    scale: float = Field(4.0, ge=0, description="guidance scale of the matched outputs; the low end of the range")
    scale_to: float | None = Field(None, description="draw s ~ U[scale, scale_to] per sample (multi-scale composite)")

    @model_validator(mode="after")
    def _ordered(self) -> CompositeOptions:
        if self.scale_to is not None and self.scale_to <= self.scale:
            raise ValueError(f"scale_to {self.scale_to:g} must be greater than scale {self.scale:g}")
        return self


@register
class Composite(Distillation):
    """``E[w |guided_S(s) - guided_T(s)|^2]``: zero whenever ``s e_c + (1-s) e_u = 0`` (2606.00798 v2, Eq. 4)."""

    name = "composite"
    summary = "guided outputs matched at one scale, or at scales drawn from a range"
    source = "DASH 2606.00798 v2 Eq. 4"
    options_class = CompositeOptions
    teacher_needs = frozenset({"cond", "null"})
    student_passes = 2
    copy_parts = {"composite": 0.0}

    def scales(self, batch: Batch) -> float | Tensor:
        """The scale, or per-sample scales (B, 1, 1, 1)."""
        o = self.options
        if o.scale_to is None:
            return float(o.scale)
        return (o.scale + (o.scale_to - o.scale) * batch.uniform("scale")).view(-1, 1, 1, 1)

    def composite_term(self, batch: Batch, teacher: TeacherOutputs, cond: Tensor, null: Tensor) -> Tensor:
        scale = self.scales(batch)
        return self.weighted(batch, per_sample_mse(guide(cond, null, scale), guide(teacher.cond, teacher.null, scale)))

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        assert teacher is not None
        cond, null = self.student.branches(batch.x_t, batch.t, batch.labels)
        return Losses.weighted(composite=(1.0, self.composite_term(batch, teacher, cond, null)))
