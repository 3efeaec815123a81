"""SFDDM: one training to any number of steps (2405.14961; sfddm.md 2.2), and its trajectory target, which is ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from ..errors import InputError
from ..models.denoiser import Denoiser
from ..models.features import Projector, tapped
from .base import Batch, Losses, Method, Options, RoleOptimizer, Setting, TeacherOutputs, register
from .distillation import require_teacher
from .fitnets import feature_widths
from .trajectory import evaluations, trajectory_target

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": functional.l1_loss,
    "mse": functional.mse_loss,
    "huber": lambda a, b: functional.huber_loss(a, b, delta=0.1),
}
FEATURE = "last"
"""The stage whose output is matched: what enters the network's last convolution."""


class SfddmOptions(Options):
    target: Literal["teacher_output", "trajectory"] = Field(
        "teacher_output",
        description="teacher_output: the teacher's prediction at the same point, as released; trajectory (ours): what "
        "reaches in one step where the teacher's own steps lead",
    )
    trajectory_steps: int | None = Field(
        None, ge=1, description="teacher steps per student step, at most; null: all that lie between"
    )
    time_index: Literal["own", "teacher"] = Field(
        "own", description="the time input of the student: its own step, as released, or the teacher's timestep"
    )
    output_loss: Literal["l1", "mse", "huber"] = Field("l1", description="between outputs; the features' is always l1")
    feature_weight: float = Field(1.0, ge=0, description="of the features' loss; 0: outputs alone")
    null_weight: float = Field(1.0, ge=0, description="of the null branch; 0: the conditional branch alone")


@register
class Sfddm(Method):
    """``L = E|S - T| + feature_weight E|h_S - h_T|`` at the same noisy image, on the conditional and the null branch.

    The student is a whole diffusion model of fewer steps; the recipe's ``respace`` says which of the teacher's. With
    ``target=teacher_output`` a perfect student is the teacher strided over those steps, no better (sfddm.md 2.3).
    With ``target=trajectory`` its steps reach what the teacher reaches in all of its own.
    """

    name = "sfddm"
    summary = "few steps in one training: outputs and last features of the teacher at the student's noise levels"
    source = "SFDDM 2405.14961; target=trajectory is this project's extension"
    options_class = SfddmOptions
    compiles = False
    fewer_steps = True

    teacher: Denoiser

    def __init__(self, setting: Setting, options: Options) -> None:
        super().__init__(setting, options)
        o = self.options
        self.teacher = require_teacher(setting, made_for=("ddim",))
        self.student = self.student.with_network(self.student.network)
        self.student.time_index = self.teacher.time_index if o.time_index == "teacher" else None
        branches = {"cond", "null"} if o.null_weight else {"cond"}
        features = {"features"} if o.feature_weight else set()
        # The trajectory replaces the teacher's outputs at x_t, not its features there.
        way = {"model"} if o.target == "trajectory" else set()
        self.teacher_needs = frozenset(way | features | (branches if features or not way else set()))
        self.student_passes = len(branches)
        self.guided = self.trains_null = bool(o.null_weight)
        parts = [] if o.target == "trajectory" else ["output", *(["null"] if o.null_weight else [])]
        parts += (["feature", *(["null_feature"] if o.null_weight else [])]) if features else []
        # Told its own steps, a network with the teacher's weights is not the teacher.
        same_times = o.time_index == "teacher" or self.teacher.time_index is None
        self.copy_parts = dict.fromkeys(parts, 0.0) if same_times else {}
        if features:
            self._bridge_widths()

    @property
    def teacher_passes(self) -> int:
        outputs = super().teacher_passes
        if self.options.target == "teacher_output":
            return outputs
        return outputs + self.student_passes * evaluations(self.teacher, self.options.trajectory_steps)

    def _bridge_widths(self) -> None:
        mine, theirs = (feature_widths(each).get(FEATURE) for each in (self.student, self.teacher))
        if mine is None or theirs is None:
            whose = "student" if mine is None else "teacher"
            raise InputError(
                "method.feature_weight",
                self.options.feature_weight,
                "use 0",
                problem=f"needs a feature map, and the {whose}'s network shows none before its last layer",
            )
        if mine != theirs:
            self.projector = Projector({FEATURE: (mine, theirs)}).to(self.student.device)
            self.roles["projector"] = self.projector
            self.role_optimizers["projector"] = RoleOptimizer(ema=False)

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        assert teacher is not None
        o = self.options
        both = bool(o.null_weight)
        with tapped(self.student.network, bool(o.feature_weight)) as features:
            if both:
                cond, null = self.student.branches(batch.x_t, batch.t, batch.labels)
            else:
                cond = self.student(batch.x_t, batch.t, batch.labels)
        compare = LOSSES[o.output_loss]
        wanted, wanted_null = self._targets(batch, teacher)
        terms = {"output": (1.0, compare(cond, wanted))}
        if both:
            terms["null"] = (o.null_weight, compare(null, wanted_null))
        if o.feature_weight:
            # Taps may be bf16 (autocast ended inside the network); the loss and the projector are float32.
            mine = {FEATURE: features[FEATURE].float()}
            last = self.roles["projector"](mine)[FEATURE] if "projector" in self.roles else mine[FEATURE]
            count = len(batch.labels)
            theirs = teacher.features[FEATURE].float()
            terms["feature"] = (o.feature_weight, functional.l1_loss(last[:count], theirs))
            if both:
                theirs = teacher.null_features[FEATURE].float()
                terms["null_feature"] = (o.feature_weight * o.null_weight, functional.l1_loss(last[count:], theirs))
        return Losses.weighted(**terms)

    def _targets(self, batch: Batch, teacher: TeacherOutputs) -> tuple[Tensor, Tensor]:
        """Targets of the conditional and the null branch (the second is unused where the null branch has no weight)."""
        both = bool(self.options.null_weight)
        if self.options.target == "teacher_output":
            return teacher.cond, teacher.null if both else teacher.cond
        found = teacher.once(f"trajectory {self.options.trajectory_steps} {both}", self._trajectory)
        cond, null = found.chunk(2) if both else (found, found)
        return cond, null

    def _trajectory(self, model: Denoiser, batch: Batch) -> Tensor:
        x_t, t, labels = batch.x_t, batch.t, batch.labels
        if self.options.null_weight:
            x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])
            labels = torch.cat([labels, torch.full_like(labels, model.null_label)])
        return trajectory_target(model, x_t, t, labels, self.options.trajectory_steps)
