"""Encoder distillation: from image to noise in few steps, DDIM run backwards as the teacher (guided.md 4)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..diffusion.prediction import target
from ..diffusion.steps import ddim_step, one_step_noise
from ..errors import InputError
from ..models.denoiser import Denoiser
from .base import Batch, Losses, Method, Options, Setting, TeacherOutputs, per_sample_mse, register
from .distillation import require_teacher
from .guided import TimestepWeights, drawn_scales, require_same_scale_input


class EncoderOptions(Options):
    teacher_evaluations: int | None = Field(
        None, ge=1, description="teacher steps that one of the student's replaces, at most; null: all that lie between"
    )
    edge_share: float = Field(0.0, ge=0, le=1, description="share of samples at an end of the range of scales")


@register
class Encoder(Method):
    """``|eps_S(x_t) - eps~|^2``, where one step up with eps~ lands where the teacher's own steps up do.

    The student's steps begin at the recipe's timesteps and end at the next one, the last at the noisiest. Its first
    timestep stands for the image itself. The loss is on the noise, since the clean image's form is singular there. It
    encodes the class that it is told, at any scale where the teacher takes one; it does not draw images.
    """

    name = "encoder"
    summary = "from image to noise in few steps: deterministic sampling run backwards, for editing"
    source = "Meng et al. 2210.03142, section 3.4 (encoder); 2203.08382 (dual diffusion bridges)"
    options_class = EncoderOptions
    teacher_needs = frozenset({"model"})
    init = "inherit"
    fewer_steps = True
    keeps_scale = True
    spacing = "leading"
    trains_null = False

    teacher: Denoiser

    def __init__(self, setting: Setting, options: Options) -> None:
        super().__init__(setting, options)
        self.teacher = require_teacher(setting, made_for=("ddim", "encode"), strides=True)
        require_same_scale_input(self.student, self.teacher)
        self.student = self.student.with_network(self.student.network)
        self.student.time_index, self.student.scale_range = self.teacher.time_index, self.teacher.scale_range
        self.student.sampler = "encode"
        _, ends, _ = _way_up(self.teacher, None)
        if bool((ends.diff() < 1).any()) or int(self.teacher.whole[1][0]) != 0:
            mend = "begin at timestep 0, which stands for the image, and below the noisiest: respace.spacing=leading"
            raise InputError("respace", ends[:-1].tolist(), mend, problem="are no steps from image to noise")
        self.student.end = _end(self.teacher)
        self.guided = self.teacher.takes_scale
        self.frozen["weights"] = TimestepWeights(self.schedule, self.student.prediction_type, "snr")

    @property
    def teacher_passes(self) -> int:
        return _way_up(self.teacher, self.options.teacher_evaluations)[2]

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        assert teacher is not None
        o, ends = self.options, self.teacher.scale_range
        scale = None if ends is None else drawn_scales(batch, ends, o.edge_share)
        wanted = teacher.once(
            f"encoder {o.teacher_evaluations} {o.edge_share}",
            lambda model, b: encoder_target(model, b.x_t, b.t, b.labels, o.teacher_evaluations, scale=scale),
        )
        given = batch.x_t, batch.t, batch.labels
        out = self.student(*given) if scale is None else self.student.guided(*given, scale)
        error = per_sample_mse(out, wanted)
        return Losses(self.frozen["weights"](error, batch.t), {"output": error.mean().detach()})


def encoder_target(
    teacher: Denoiser, x_t: Tensor, t: Tensor, labels: Tensor, steps: int | None = None, *, scale: Tensor | None = None
) -> Tensor:
    """The prediction at ``x_t`` with which one step up lands where the teacher's own steps up lead.

    Arguments as ``trajectory_target``; the way goes from timestep ``indices[t]`` to ``indices[t + 1]``, from the last
    one to the teacher's noisiest level.
    """
    origin, ends, count = _way_up(teacher, steps)
    ends = ends.to(t.device, non_blocking=True)
    start, end = ends[t], ends[t + 1]
    x, at = x_t, start
    for number in range(1, count + 1):
        following = start + (end - start) * number // count
        out = origin(x, at, labels) if scale is None else origin.guided(x, at, labels, scale)
        x = ddim_step(origin.x0(out, x, at), x, *_levels(origin, at, x), *_levels(origin, following, x))
        at = following.clamp(max=origin.schedule.T - 1)
    alpha, sigma = _levels(origin, start, x)
    noise = one_step_noise(x_t, x, alpha, sigma, *_levels(origin, end, x))
    return target((x_t - sigma * noise) / alpha, noise, alpha, sigma, teacher.prediction_type)


def _way_up(teacher: Denoiser, steps: int | None) -> tuple[Denoiser, Tensor, int]:
    """The model that goes the way, the timesteps where steps begin and the end of the last, and the evaluations.

    T stands for the end of an encoder's last step, or of the whole teacher's where the model is a view of it.
    """
    origin, chosen = teacher.origin or (teacher, torch.arange(teacher.schedule.T))
    whole = origin.origin is None and origin.end is None
    ends = torch.cat([chosen.cpu(), torch.tensor([origin.schedule.T - whole])])
    longest = max(1, int(ends.diff().max()))
    return origin, ends, min(steps or longest, longest)


def _end(teacher: Denoiser) -> tuple[Tensor, Tensor]:
    """Signal and noise scale, (1,) float64, where the way up ends: an encoder's end, or the noisiest level there is."""
    root, _ = teacher.whole
    return root.end or root.schedule.at(torch.tensor([root.schedule.T - 1]), 1, torch.float64)


def _levels(model: Denoiser, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise scale at ``t``, where T is the end of the way."""
    alpha, sigma = model.schedule.at(t.clamp(max=model.schedule.T - 1), x.ndim, x.dtype)
    beyond = (t == model.schedule.T).view(alpha.shape)
    top_alpha, top_sigma = (value.item() for value in _end(model))  # numbers: nothing is sent to the device
    return torch.where(beyond, top_alpha, alpha), torch.where(beyond, top_sigma, sigma)
