"""What a recipe may say of Uni-DAD; DMD2 and its kin are settings of it (docs/unidad.md)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..diffusion.adversarial import Aggregation, GanLoss
from ..diffusion.matching import Normalizer
from ..models.features import Taps
from .base import Options


class UniDadOptions(Options):
    steps: int = Field(3, ge=1, le=64, description="evaluations of the student, K")
    sigma_max: float | None = Field(
        None, gt=0, description="largest noise-to-signal ratio; null: by the side of the images, 10 at 8 to 80 at 64"
    )
    sigma_end: float = Field(0.5, gt=0, description="ratio of the student's last step")
    sigma_min: float = Field(0.002, gt=0, description="smallest ratio of the losses")
    times: Literal["interpolate", "nearest"] = Field(
        "interpolate", description="time input of a ratio between the teacher's timesteps"
    )
    gradient: Literal["chain", "last", "random"] = Field(
        "chain", description="through all K steps, the last one, or one at random (DMD2)"
    )
    target_teacher: Literal["online", "frozen", "none"] = Field(
        "online", description="trained on the few images in the same run; a finished one (roles.target_teacher); none"
    )
    target_weight: float | None = Field(
        None, ge=0, le=1, description="a: share of the target teacher in the matching; null: 0.5, or 0 without one"
    )
    dmd_weight: float = Field(1.0, ge=0, description="of the distribution matching; 0: none, no teacher is asked")
    normalizer: Normalizer = Field(
        "teacher", description="what the matching gradient is divided by: an error (teacher, critic, noisy), or none"
    )
    guidance: float = Field(1.0, ge=0, description="guidance scale of the teachers; the critic's is 1")
    gan: GanLoss | Literal["none"] = Field("bce", description="bce, hinge, lsgan, wgan, none")
    aggregation: Aggregation = Field("mean", description="of the heads: mean of losses, sum of losses, mean logit")
    gan_weight: float = Field(0.01, ge=0, description="of the GAN in the student's loss")
    gan_share: float | None = Field(
        None, gt=0, description="sets gan_weight so that the GAN's gradient at the image is this share of matching's"
    )
    calibration: int = Field(20, ge=1, description="student updates that a calibration measures, at gan_weight")
    calibrate: Literal["once", "always"] = Field(
        "once", description="gan_share holds where the calibration ended, or always, over about its last updates"
    )
    gan_critic_weight: float = Field(0.03, ge=0, description="of the GAN in the critic's loss")
    r1: float = Field(0.0, ge=0, description="gamma of the R1 penalty on real images")
    gradient_penalty: float = Field(10.0, ge=0, description="of wgan")
    taps: Taps = Field(
        "all",
        description="encoder blocks with a head: all; blocks (each stage after its downsampling, and the middle); "
        "last (the middle); the last k; or names",
    )
    head: Literal["linear", "conv"] = Field("linear", description="linear: 1x1 convolution; conv: DMD2's")
    pool: Literal["global", "patch"] = Field("global", description="of a head's logits")
    denoising: Literal["epsilon", "edm"] = Field("epsilon", description="loss of critic and target teacher")
    student_every: int = Field(5, ge=1, description="critic updates per student update")
    target_every: int | None = Field(None, ge=1, description="steps between the target teacher's; null: student_every")
    critic_lr_scale: float = Field(1.0, gt=0, description="learning rate of the critic over the student's")
    heads_lr_scale: float = Field(1.0, gt=0, description="of the heads")
    target_lr_scale: float = Field(1.0, gt=0, description="of the target teacher")

    @model_validator(mode="after")
    def _fit(self) -> UniDadOptions:
        a = self.a
        if self.target_teacher == "none" and a > 0:
            raise ValueError(f"target_weight {a:g} needs a target teacher; use target_teacher: online, or 0")
        if self.target_teacher != "none" and (a == 0 or self.dmd_weight == 0):
            raise ValueError("the target teacher would never be asked; use target_teacher: none")
        if self.gan == "none" and self.dmd_weight == 0:
            raise ValueError("nothing would train the student; give dmd_weight, or a gan")
        if self.gan_share is not None and (self.gan == "none" or self.dmd_weight == 0):
            raise ValueError("gan_share balances the gan against the matching; leave it out without both")
        if self.gan_share is None and self.gan_weight == 0 and self.dmd_weight == 0:
            raise ValueError("nothing would train the student; give gan_weight, or dmd_weight")
        return self

    @field_validator("taps", mode="before")
    @classmethod
    def _some(cls, taps: Any) -> Any:
        if isinstance(taps, bool) or taps in ([], ()) or (isinstance(taps, int) and taps < 1):
            raise ValueError("give all, blocks, last, how many of the last (1 or more), or names")
        return taps

    @property
    def a(self) -> float:
        """Share of the target domain."""
        if self.target_weight is not None:
            return self.target_weight
        return 0.0 if self.target_teacher == "none" else 0.5
