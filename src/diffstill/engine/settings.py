"""The ``training`` section of a recipe."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal["auto", "fp32", "bf16"]


class TrainSettings(BaseModel):
    """How long and how fast to train. Progress is counted in images; steps follow from the batch size."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    images: int = Field(gt=0, description="images to train on, epochs included; a multiple of batch_size")
    batch_size: int = Field(64, gt=0, description="global batch, over all processes")
    micro_batch: int | None = Field(
        None, gt=0, description="images per forward pass (gradient accumulation); null: all"
    )
    lr: float = Field(2e-4, gt=0, description="peak learning rate of AdamW")
    lr_min: float = Field(1e-6, ge=0, description="learning rate at the end of the decay")
    warmup_images: int = Field(0, ge=0, description="linear warm-up from 0")
    decay: Literal["cosine", "linear", "none"] = Field("cosine", description="of the learning rate, after the warm-up")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW; a curriculum's lambda has none")
    grad_clip: float | None = Field(1.0, gt=0, description="global gradient norm; null: none")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="of the weights that are evaluated and saved")
    ema_cap: bool = Field(True, description="cap the decay by (1+n)/(10+n), so short runs forget their start")
    precision: Precision = Field(
        "auto",
        description="autocast of trained networks; auto: bf16 where the device has it (on a CPU from 32x32 on); "
        "fp32 uses TF32 matrix products and convolutions on CUDA; fp16 is not supported",
    )
    teacher_precision: Precision = Field(
        "auto", description="of the frozen teacher's forward; auto: bf16 where the device has it"
    )
    teacher_reuse: int = Field(
        1, ge=1, description="student updates per computed teacher output (docs/decisions.md: its cost in quality)"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, a third more arithmetic"
    )
    compile: Literal["auto", True, False] = Field(
        "auto", description="torch.compile; auto: long runs, on CUDA; on a CPU the teacher alone"
    )
    channels_last: Literal["auto", True, False] = Field("auto", description="memory layout; auto: on CUDA")
    log_every: int = Field(50, gt=0, description="steps between log records")
    checkpoint_every: int | None = Field(None, gt=0, description="images between checkpoints; null: by minutes alone")
    checkpoint_minutes: float = Field(5.0, gt=0, description="minutes between checkpoints; always one at the end")
    probe_every: int | None = Field(None, gt=0, description="images between guidance probes; null: ten per run")

    @model_validator(mode="after")
    def _divisible(self) -> TrainSettings:
        if self.images % self.batch_size:
            near = max(1, round(self.images / self.batch_size)) * self.batch_size
            raise ValueError(f"images {self.images} is no multiple of batch_size {self.batch_size}; use {near}")
        if (asked := self.micro_batch) and self.batch_size % asked:
            fit = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            near = min(fit, key=lambda n: abs(n - asked))
            raise ValueError(f"batch_size {self.batch_size} is no multiple of micro_batch {asked}; use {near}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must lie in [0, 1)")
        if not math.isfinite(self.lr):
            raise ValueError(f"lr {self.lr} is not finite; use 2e-4, say")
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min {self.lr_min:g} is greater than lr {self.lr:g}")
        return self

    @property
    def steps(self) -> int:
        return self.images // self.batch_size
