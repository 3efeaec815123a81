"""Ordinary training on noise: the teacher, the student from scratch, and fine-tuning after pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..diffusion.prediction import target
from .base import (
    Batch,
    Losses,
    Method,
    Options,
    RoleOptimizer,
    Setting,
    TeacherOutputs,
    per_sample_mse,
    register,
)
from .curriculum import Curriculum, CurriculumOptions


class SupervisedOptions(Options):
    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of samples trained on the null label, where there are classes"
    )
    dropout_unit: Literal["sample", "batch"] = Field(
        "sample", description="batch: one coin per batch, as released (D3)"
    )
    curriculum: CurriculumOptions = CurriculumOptions()


@register
class Supervised(Method):
    """``mean_i w_hat(t_i) |network(x_t, t, y) - target|^2`` with classifier-free label dropout (dash.md 2.3, 3)."""

    name = "supervised"
    summary = "train on noise with label dropout and a timestep curriculum (teachers, and students from scratch)"
    source = "Ho & Salimans 2207.12598; DASH 2606.00798 Eq. 2"
    options_class = SupervisedOptions

    def __init__(self, setting: Setting, options: Options) -> None:
        super().__init__(setting, options)
        self.curriculum = Curriculum(self.schedule, self.options.curriculum)
        if self.curriculum.learns:
            self.roles["curriculum"] = self.curriculum
            self.role_optimizers["curriculum"] = RoleOptimizer(weight_decay=0.0, clip=False, ema=False)
        else:
            self.frozen["curriculum"] = self.curriculum

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        labels = batch.labels
        if not self.student.unconditional:
            drawn = batch.uniform("label_dropout", whole_batch=self.options.dropout_unit == "batch")
            dropped = (drawn < self.options.label_dropout).expand_as(labels)
            labels = torch.where(dropped, self.student.null_label, labels)
        alpha, sigma = self.schedule.at(batch.t, batch.x0.ndim)
        wanted = target(batch.x0, batch.noise, alpha, sigma, self.student.prediction_type)
        error = per_sample_mse(self.student(batch.x_t, batch.t, labels), wanted)
        # The role may be wrapped (DDP), so it is called through the roles table.
        weigh: Any = self.roles.get("curriculum", self.curriculum)
        return Losses(weigh(error, batch.t, batch.t_global), {"mse": error.mean().detach()})

    def artefacts(self) -> Mapping[str, Tensor]:
        return self.curriculum.table() if self.curriculum else {}


@register
class Pruning(Supervised):
    """Structured magnitude pruning of the teacher, then supervised fine-tuning (the paper's 8.95M row)."""

    name = "pruning"
    summary = "channels of largest magnitude kept from the teacher, then fine-tuned on noise"
    source = "DASH 2606.00798 baselines; structured magnitude pruning"
    init = "magnitude"
