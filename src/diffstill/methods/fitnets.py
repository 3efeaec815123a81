"""FitNets: hints on intermediate features beside the guided-output loss (Romero et al., 1412.6550)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..errors import InputError
from ..models.denoiser import Denoiser
from ..models.features import Projector, tapped
from .base import Batch, Losses, Options, RoleOptimizer, Setting, TeacherOutputs, per_sample_mse, register
from .composite import Composite, CompositeOptions


class FitNetsOptions(CompositeOptions):
    lambda_hint: float = Field(1.0, gt=0, description="weight of the mean hint loss")
    stages: tuple[str, ...] = Field(("mid",), description="stages whose outputs are hinted: down.0, mid, up.1, ...")


@register
class FitNets(Composite):
    """``composite + lambda_hint mean_l E[|P_l f_S^l - f_T^l|^2 / |f_T^l|^2]``.

    P_l are 1x1 convolutions trained with the student and dropped at export. The DASH paper does not say which loss its
    FitNets row adds the hints to; ours is the composite one, so exactly one factor changes from that row.
    """

    name = "fitnets"
    summary = "guided outputs matched, plus hints on intermediate features through 1x1 projectors"
    source = "Romero et al. 1412.6550, as DASH 2606.00798 baseline"
    options_class = FitNetsOptions
    teacher_needs = frozenset({"cond", "null", "features"})
    copy_parts = {"composite": 0.0}
    compiles = False

    def __init__(self, setting: Setting, options: Options) -> None:
        super().__init__(setting, options)
        mine, theirs = feature_widths(self.student), feature_widths(self.teacher)
        for stage in self.options.stages:
            if stage not in mine or stage not in theirs:
                known = ", ".join(sorted(set(mine) & set(theirs)))
                raise InputError("method.stages", stage, f"use stages that both networks have: {known}")
        self.projector = Projector({stage: (mine[stage], theirs[stage]) for stage in self.options.stages})
        self.projector.to(self.student.device)
        self.roles["projector"] = self.projector
        self.role_optimizers["projector"] = RoleOptimizer(ema=False)

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        assert teacher is not None
        with tapped(self.student.network) as features:
            cond, null = self.student.branches(batch.x_t, batch.t, batch.labels)
        # Taps may be bf16 (autocast ended inside the network); the projector is float32.
        mine = {stage: features[stage].chunk(2)[0].float() for stage in self.options.stages}
        projected: dict[str, Tensor] = self.roles["projector"](mine)
        # Normalised sample by sample, so that the mean over micro-batches or processes is the mean over the batch.
        hints = [
            (
                per_sample_mse(projected[stage], teacher.features[stage])
                / teacher.features[stage].float().square().flatten(1).mean(1).clamp(min=1e-8)
            ).mean()
            for stage in self.options.stages
        ]
        return Losses.weighted(
            composite=(1.0, self.composite_term(batch, teacher, cond, null)),
            hint=(self.options.lambda_hint, torch.stack(hints).mean()),
        )


def feature_widths(denoiser: Denoiser) -> dict[str, int]:
    """Channels of every stage's output, from one forward of a single image of zeros."""
    device = denoiser.device
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    with denoiser.evaluating(), tapped(denoiser.network) as features:
        denoiser(torch.zeros((1, *denoiser.sample_shape), device=device), zero, zero)
    return {name: feature.shape[1] for name, feature in features.items() if feature.ndim == 4}
