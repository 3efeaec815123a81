"""Progressive distillation: a student of half the steps, each doing two of the teacher's (guided.md 2, 3)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..diffusion.weighting import DistanceWeight
from ..errors import InputError
from ..models.denoiser import Denoiser
from .base import Batch, Losses, Method, Options, Setting, TeacherOutputs, per_sample_mse, register
from .distillation import require_teacher
from .guided import TimestepWeights, drawn_scales, require_same_scale_input
from .trajectory import JUMP, evaluations, trajectory_target


class ProgressiveOptions(Options):
    sampler: Literal["deterministic", "stochastic"] = Field(
        "deterministic",
        description="what the student is made for: DDIM, or two steps down and one back up with noise",
    )
    weighting: DistanceWeight = Field(
        "truncated_snr", description="of the clean image's squared error: constant, snr, truncated_snr or v (1 + snr)"
    )
    teacher_evaluations: int | None = Field(
        None, ge=1, description="teacher steps that one of the student's replaces, at most; null: all that lie between"
    )
    null_weight: float = Field(
        1.0, ge=0, description="of the null branch, where the network has one; 0: conditional alone, no guidance"
    )
    edge_share: float = Field(0.0, ge=0, le=1, description="share of samples at an end of the range of scales")


@register
class Progressive(Method):
    """``omega(t) |x0_S(x_t) - x0~|^2``, where one step with x0~ lands where the teacher's two steps do.

    One round: the recipe's ``respace`` says how many steps the student has, and a chain of such stages (``rounds`` in
    a chain recipe) makes the schedule. A network that takes the guidance scale keeps it: each sample has a scale of its
    own, for teacher and student alike. One with two branches keeps both. The student starts as its teacher's copy and
    keeps its time input, so that step i is known by the teacher's timestep.
    """

    name = "progressive"
    summary = "half the steps a round: one step lands where two of the teacher's do, at any guidance scale"
    source = "Salimans & Ho 2202.00512; Meng et al. 2210.03142, section 3.2"
    options_class = ProgressiveOptions
    teacher_needs = frozenset({"model"})
    init = "inherit"
    fewer_steps = True
    keeps_scale = True

    teacher: Denoiser

    def __init__(self, setting: Setting, options: Options) -> None:
        super().__init__(setting, options)
        o = self.options
        self.teacher = require_teacher(setting, strides=True)
        require_same_scale_input(self.student, self.teacher)
        self.student = self.student.with_network(self.student.network)
        self.student.time_index, self.student.scale_range = self.teacher.time_index, self.teacher.scale_range
        self.student.sampler = "stochastic" if o.sampler == "stochastic" else "ddim"
        self.reach = JUMP if o.sampler == "stochastic" else 1
        self._check_jumps()
        self._both = bool(o.null_weight) and self.trains_null and not self.teacher.takes_scale
        self.guided = self._both or self.teacher.takes_scale
        self.trains_null, self.student_passes = self._both, 1 + self._both
        self.frozen["weights"] = TimestepWeights(self.schedule, self.student.prediction_type, o.weighting)

    def _check_jumps(self) -> None:
        """A teacher made for the stochastic sampler can only be asked for jumps of two, down to the clean image."""
        root, _ = self.teacher.whole
        if root.sampler != "stochastic":
            return
        # Respaced twice (teacher_steps), it would be seen in steps that it was not made for.
        origin, chosen = self.teacher.origin or (self.teacher, torch.arange(self.schedule.T))
        if self.options.teacher_evaluations is not None:
            raise InputError(
                "method.teacher_evaluations",
                self.options.teacher_evaluations,
                "leave it out: such a teacher goes in its own jumps",
                problem="does not fit a teacher that was made for the stochastic sampler",
            )
        if self.options.sampler != "stochastic" or origin is not root or bool((chosen % JUMP == 0).any()):
            raise InputError(
                "method.sampler",
                self.options.sampler,
                "use sampler: stochastic and respace: {steps: half the teacher's, spacing: trailing}, no teacher_steps",
                problem="does not fit a teacher that was made for the stochastic sampler",
            )

    @property
    def teacher_passes(self) -> int:
        return (1 + self._both) * evaluations(self.teacher, self.options.teacher_evaluations, self.reach)

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        assert teacher is not None
        o = self.options
        scale = None
        if self.teacher.scale_range is not None:
            scale = drawn_scales(batch, self.teacher.scale_range, o.edge_share)
        name = f"progressive {self.reach} {o.teacher_evaluations} {o.edge_share} {self._both}"
        wanted = teacher.once(name, lambda model, b: self._target(model, b, scale))
        x_t, t, labels = self._inputs(batch)
        out = self.student(x_t, t, labels) if scale is None else self.student.guided(x_t, t, labels, scale)
        error = per_sample_mse(out, wanted)
        weigh = self.frozen["weights"]
        count = batch.size
        terms = {"output": (1.0, weigh(error[:count], batch.t))}
        if self._both:
            terms["null"] = (o.null_weight, weigh(error[count:], batch.t))
        return Losses.weighted(**terms)

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The batch, twice where both branches are trained: with its labels, then with the null label."""
        if not self._both:
            return batch.x_t, batch.t, batch.labels
        null = torch.full_like(batch.labels, self.student.null_label)
        return torch.cat([batch.x_t] * 2), torch.cat([batch.t] * 2), torch.cat([batch.labels, null])

    def _target(self, model: Denoiser, batch: Batch, scale: Tensor | None) -> Tensor:
        steps = self.options.teacher_evaluations
        return trajectory_target(model, *self._inputs(batch), steps, reach=self.reach, scale=scale)
