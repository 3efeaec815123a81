"""Guided distillation, stage 1: one network that takes the scale, for a teacher of two passes (guided.md 1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from ..diffusion.schedule import NoiseSchedule
from ..diffusion.weighting import DistanceWeight, distance_weights
from ..errors import InputError
from ..models.denoiser import Denoiser
from .base import Batch, Losses, Method, Options, Setting, TeacherOutputs, per_sample_mse, register
from .distillation import require_teacher

STEEPEST = 2e4
"""The largest weight on a network's output that a loss may have: beyond it the noisiest timesteps drown all others.
The cleanest timestep of the usual schedules, with a beta of 1e-4, has an snr of 1e4, which is in order."""


class TimestepWeights(nn.Module):
    """Fixed weights of the squared error of a network's output, per timestep."""

    table: Tensor

    def __init__(self, schedule: NoiseSchedule, kind: Any, form: DistanceWeight) -> None:
        super().__init__()
        weights = distance_weights(schedule, kind, form)
        if float(weights.max()) > STEEPEST:
            raise InputError(
                "method.weighting",
                form,
                f"use weighting: {'constant' if kind == 'sample' else 'snr'}, or a teacher that predicts v_prediction",
                problem=f"weighs {kind} predictions up to {float(weights.max()):.2g} fold on this schedule",
            )
        self.register_buffer("table", weights.float())

    def forward(self, per_sample: Tensor, t: Tensor) -> Tensor:
        return (self.table[t] * per_sample).mean()


def drawn_scales(batch: Batch, ends: tuple[float, float], edge_share: float) -> Tensor:
    """(B,) guidance scales, uniform between ``ends``; a share of them exactly at one end or the other."""
    u = batch.uniform("guidance_scale")
    if edge_share:
        edge = batch.uniform("guidance_edge") < edge_share
        u = torch.where(edge, (u >= 0.5).to(u.dtype), u)
    return ends[0] + (ends[1] - ends[0]) * u


class GuidedOptions(Options):
    guidance_range: tuple[float, float] = Field((1.0, 5.0), description="scales s = 1 + w that the student learns")
    weighting: DistanceWeight = Field(
        "truncated_snr", description="of the clean image's squared error: constant, snr, truncated_snr or v (1 + snr)"
    )
    edge_share: float = Field(0.0, ge=0, le=1, description="share of samples drawn exactly at an end of the range")

    @field_validator("guidance_range")
    @classmethod
    def _ascending(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if not all(math.isfinite(end) for end in ends) or ends[0] >= ends[1] or ends[1] <= 1:
            raise ValueError(f"{list(ends)} is no range of scales; give two, the second greater and above 1: [1, 5]")
        return ends


@register
class Guided(Method):
    """``omega(t) |x0_S(x_t, y, s) - x0_T^s|^2`` with s drawn anew for every sample.

    The target is the teacher at scale s: both its branches, or, of a teacher that itself takes the scale, its answer.
    A student built as its teacher starts as the conditional teacher for every scale.
    """

    name = "guided"
    summary = "the guidance scale as an input: one pass at any scale (stage 1 of guided distillation)"
    source = "Meng et al. 2210.03142, section 3.1"
    options_class = GuidedOptions
    teacher_needs = frozenset({"cond", "null"})
    init = "inherit"
    scale_input = True
    trains_null = False

    teacher: Denoiser

    def __init__(self, setting: Setting, options: Options) -> None:
        super().__init__(setting, options)
        self.teacher = require_teacher(setting)
        require_scale_input(self.student)
        ends = self.options.guidance_range
        if self.teacher.takes_scale:
            self.teacher_needs = frozenset({"model"})
            require_scales_of(self.teacher, ends)
        self.student = self.student.with_network(self.student.network)
        self.student.scale_range = ends
        self.frozen["weights"] = TimestepWeights(self.schedule, self.student.prediction_type, self.options.weighting)

    @property
    def teacher_passes(self) -> int:
        return 1 if self.teacher.takes_scale else 2

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        assert teacher is not None
        o = self.options
        scale = drawn_scales(batch, o.guidance_range, o.edge_share)
        if self.teacher.takes_scale:
            wanted = teacher.once(
                f"guided {o.guidance_range} {o.edge_share}",
                lambda model, b: model.guided(b.x_t, b.t, b.labels, scale),
            )
        else:
            wanted = teacher.guided(scale)
        error = per_sample_mse(self.student.guided(batch.x_t, batch.t, batch.labels, scale), wanted)
        return Losses(self.frozen["weights"](error, batch.t), {"output": error.mean().detach()})


def require_scale_input(student: Denoiser) -> None:
    """Refuses a student whose network does not take the guidance scale."""
    if not student.takes_scale:
        mend = "use family: teacher, or guided_unet2d with widths of its own"
        raise InputError("student.family", "this one", mend, problem="does not take the guidance scale as an input")


def require_same_scale_input(student: Denoiser, teacher: Denoiser) -> None:
    """Refuses a student that takes the guidance scale where its teacher does not, or the other way round."""
    if student.takes_scale != teacher.takes_scale:
        mend = "use family: teacher, or a student whose network takes the guidance scale as its teacher's does"
        raise InputError("student.family", "this one", mend, problem="differs from the teacher in its scale input")


def require_scales_of(teacher: Denoiser, ends: tuple[float, float]) -> None:
    """Refuses scales that a teacher with a range of its own was never trained for."""
    known = teacher.scale_range
    if known is not None and not (known[0] <= ends[0] and ends[1] <= known[1]):
        mend = f"stay within the teacher's {list(known)}"
        raise InputError("method.guidance_range", list(ends), mend, problem="goes beyond what the teacher knows")
