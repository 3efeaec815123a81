"""Timestep curricula: TIRT of DASH (2606.00798, Eq. 2), its fixed base, uncertainty weighting; learned with the
teacher, saved with it, and transferred frozen to the student (dash.md 2.3, D4, D5, D21)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..diffusion.schedule import NoiseSchedule
from ..diffusion.weighting import base_weights, unit_mean
from ..errors import InputError

Rule = Literal["tirt", "min_snr", "none", "uncertainty"]
SnrForm = Literal["x0", "eps", "v", "none"]


class CurriculumOptions(BaseModel):
    """The ``curriculum`` section of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: Rule = "tirt"
    snr_form: SnrForm = Field("x0", description="x0: min(snr, gamma), as published; eps: /snr; v: /(snr+1); none: flat")
    gamma: float = Field(5.0, gt=0)
    clamp: float | None = Field(3.0, gt=0, description="bound on |lambda|; null for the published rule without bound")
    normalise: Literal["batch", "all"] = Field("batch", description="what the learned weights average to 1 over")


class Curriculum(nn.Module):
    """Loss weights per timestep under uniform timesteps.

    ``tirt``: ``omega_t = base_t sigmoid(lambda_t)``, normalised to mean 1; lambda descends the same loss, which
    lowers the weight of above-average timesteps (dash.md 6). ``min_snr``: lambda = 0 for ever. ``none``: ones.
    ``uncertainty``: ``base_t (loss exp(-u_t) + u_t)`` (EDM2-style), whose log term forbids the runaway of ``tirt``.
    """

    base: Tensor

    def __init__(self, schedule: NoiseSchedule, options: CurriculumOptions | None = None) -> None:
        super().__init__()
        self.options = options or CurriculumOptions()
        self.T, self.schedule_name = schedule.T, schedule.name
        self.schedule_fingerprint = schedule.fingerprint()
        form = "none" if self.options.rule == "none" else self.options.snr_form
        self.register_buffer("base", base_weights(schedule, form, self.options.gamma).float())
        self.logits = nn.Parameter(torch.zeros(schedule.T))
        """lambda_t (``tirt``) or u_t (``uncertainty``)."""
        if not self.learns:
            self.logits.requires_grad_(False)

    @property
    def learns(self) -> bool:
        return self.options.rule in ("tirt", "uncertainty")

    def freeze(self) -> Curriculum:
        """From now on a constant vector of unit mean over all timesteps (D4). Returns self."""
        self.logits.requires_grad_(False)
        return self

    def _omega(self) -> Tensor:
        if self.options.rule == "tirt":
            return self.base * torch.sigmoid(self._bounded())
        if self.options.rule == "uncertainty":
            return self.base * torch.exp(-self.logits)
        return self.base

    def _bounded(self) -> Tensor:
        """lambda inside its bound. The gradient passes at the bound itself, where lambda is put back, not beyond it;
        that of ``clamp`` depends there on torch's version (in 2.14 it is zero)."""
        bound = self.options.clamp
        if bound is None:
            return self.logits
        return torch.where(self.logits.abs() <= bound, self.logits, self.logits.detach().clamp(-bound, bound))

    def weights(self) -> Tensor:
        """(T,) float32, unit mean over all timesteps."""
        return unit_mean(self._omega())

    def forward(self, per_sample: Tensor, t: Tensor, t_global: Tensor) -> Tensor:
        """Weighted mean of ``per_sample`` losses (B,) at timesteps ``t`` (B,), a scalar.

        While learning, the normaliser is the mean over the *global* batch ``t_global`` (as published), so that several
        processes agree with one; frozen, it is the mean over all timesteps.
        """
        if self.options.rule == "uncertainty" and self.logits.requires_grad:
            u = self.logits[t]
            return (self.base[t] * (per_sample * torch.exp(-u) + u)).mean()
        omega = self._omega()
        over_batch = self.logits.requires_grad and self.options.normalise == "batch"
        scale = (omega[t_global] if over_batch else omega).mean().clamp(min=1e-8)
        return (omega[t] / scale * per_sample).mean()

    @torch.no_grad()
    def keep_inside(self) -> None:
        """Puts lambda back to its bound after an update: beyond it the clamp has no gradient, and it would stay."""
        if self.logits.requires_grad and self.options.rule == "tirt" and self.options.clamp is not None:
            self.logits.clamp_(-self.options.clamp, self.options.clamp)

    def respace(self, schedule: NoiseSchedule, indices: Tensor) -> Curriculum:
        """The weights at the steps ``indices`` (T',) of this curriculum's schedule, for the respaced one; frozen."""
        made = Curriculum(schedule, self.options)
        with torch.no_grad():
            made.logits.copy_(self.logits[indices])
        return made.freeze()

    def table(self) -> dict[str, Tensor]:
        """Tensors to save with the model."""
        return {"logits": self.logits.detach().clone(), "base": self.base.clone(), "weights": self.weights().detach()}

    def meta(self) -> dict[str, str]:
        """What has to match for a transfer."""
        return {
            "options": self.options.model_dump_json(),
            "T": str(self.T),
            "schedule": self.schedule_name,
            "schedule_fingerprint": self.schedule_fingerprint,
        }

    @classmethod
    def from_table(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, str], schedule: NoiseSchedule) -> Curriculum:
        """The saved curriculum, frozen.

        Raises:
            InputError: where it was learned for another T or another schedule.
        """
        try:
            options = CurriculumOptions.model_validate_json(meta["options"])
            T = int(meta["T"])
            logits = tensors["logits"]
            base = tensors["base"]
        except (KeyError, ValueError) as error:
            raise InputError("teacher.curriculum", str(error), "save the teacher again with diffstill train") from error
        made = cls(schedule, options)
        same = T == schedule.T and logits.shape == (schedule.T,)
        if not same or not torch.allclose(base, made.base, rtol=1e-3, atol=1e-5):
            raise InputError(
                "schedule",
                f"{schedule.name} with T={schedule.T}",
                f"use the curriculum's own schedule, {meta.get('schedule')} with T={T}",
                problem="differs from the transferred curriculum's",
            )
        with torch.no_grad():
            made.logits.copy_(logits)
        return made.freeze()


StudentCurriculum = Literal["transfer", "base", "learn", "none"]
"""transfer: the teacher's, frozen. base: its fixed part (lambda = 0), frozen. learn: from zero, with the student."""


def student_curriculum(mode: StudentCurriculum, schedule: NoiseSchedule, teacher: Curriculum | None) -> Curriculum:
    """The student's curriculum.

    Raises:
        InputError: ``transfer`` from a teacher that has none (never a silent fallback, dash.md D21).
    """
    if mode == "none":
        return Curriculum(schedule, CurriculumOptions(rule="none")).freeze()
    if teacher is None:
        raise InputError(
            "method.curriculum",
            mode,
            "use a teacher trained by diffstill train, or method.curriculum=none",
            problem="needs the teacher's curriculum, which this teacher does not carry",
        )
    made = Curriculum(schedule, teacher.options)
    if mode == "learn":
        return made
    if mode == "transfer":
        made.load_state_dict(teacher.state_dict())
    return made.freeze()
