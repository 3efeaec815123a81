"""The work that is timed: networks, images and settings that the hand-written loop and the library share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import interpolate

from diffstill.data.dataset import ImageData
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.engine.settings import TrainSettings
from diffstill.methods.curriculum import Curriculum, CurriculumOptions
from diffstill.models.adapters.unet2d import build

Work = Literal["distil", "train"]
"""``distil``: a DASH step of the student. ``train``: a supervised step of the teacher."""

CUDA_AIM = {64: 4.0, 256: 2.5}
"""Ratio that a distillation step should reach on CUDA, by batch size: the larger the batch, the less of the
straightforward loop's time is the host's, which is what most rungs save."""
NUM_CLASSES = 10
LABEL_DROPOUT = 0.1
ANCHOR = 0.1
"""Weight of DASH's anchor to the true noise."""
CURRICULUM = CurriculumOptions(rule="min_snr")
"""Fixed weights: the curriculum's own learning costs a vector of T numbers a step and is left out on both sides."""


@dataclass(frozen=True)
class Nets:
    """A teacher and its student, by recipe options of the ``unet2d`` family."""

    name: str
    sample_shape: tuple[int, int, int]
    teacher: Mapping[str, Any]
    student: Mapping[str, Any]
    batches: Mapping[str, tuple[int, ...]]
    """Default batch sizes by device type."""
    cpu_aim: float
    """Ratio over the straightforward loop that a distillation step should reach on a CPU."""


DIGITS = Nets(
    "digits",
    (1, 8, 8),
    {"block_out_channels": (32, 64), "layers_per_block": 1, "attention_levels": (1,), "norm_num_groups": 8},
    {"block_out_channels": (16, 24), "layers_per_block": 1, "attention_levels": (1,), "norm_num_groups": 8},
    {"cpu": (64,), "cuda": (64,)},
    1.3,
)
CIFAR = Nets(
    "cifar",
    (3, 32, 32),
    {"block_out_channels": (128, 256, 256, 256), "layers_per_block": 2, "attention_levels": (1,), "dropout": 0.1},
    {"block_out_channels": (64, 128, 128, 128), "layers_per_block": 1, "attention_levels": (1,), "dropout": 0.1},
    {"cpu": (16,), "cuda": (64, 256, 512)},
    1.8,
)
NETS = {nets.name: nets for nets in (DIGITS, CIFAR)}


@dataclass(frozen=True)
class Problem:
    """One kind of training step at one batch size. Everything it gives out is a pure function of its fields."""

    nets: Nets
    work: Work
    batch: int
    device: torch.device
    images: int = 0
    """Of the data; 0: 512, or a batch where that is more."""

    @property
    def aim(self) -> float | None:
        """Ratio over the straightforward loop that the library's step should reach; None where none was set."""
        if self.work != "distil":
            return None
        return {"cpu": self.nets.cpu_aim, "cuda": CUDA_AIM.get(self.batch)}.get(self.device.type)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.create("cosine", 1000)

    @cached_property
    def data(self) -> ImageData:
        """Smooth random images: they decode at about the speed of photographs, and no data set is needed."""
        generator = torch.Generator().manual_seed(0)
        channels, size, _ = self.nets.sample_shape
        count = self.images or max(512, self.batch)
        coarse = torch.rand((count, channels, 4, 4), generator=generator)
        pixels = interpolate(coarse, size=(size, size), mode="bilinear").mul(255).to(torch.uint8)
        labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
        return ImageData("synthetic", "train", pixels, labels, tuple(map(str, range(NUM_CLASSES))))

    def curriculum(self) -> Curriculum:
        return Curriculum(self.schedule, CURRICULUM).freeze()

    def teacher(self) -> nn.Module:
        """The teacher's network on the device; random weights cost what trained ones do."""
        return self._build(self.nets.teacher, seed=1)

    def trained(self) -> nn.Module:
        """The network that the step trains: the student, or the teacher itself where the work is ``train``."""
        return self._build(self.nets.student, seed=2) if self.work == "distil" else self.teacher()

    def _build(self, options: Mapping[str, Any], seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build(sample_shape=self.nets.sample_shape, num_classes=NUM_CLASSES, **options)
        return network.to(self.device)

    def settings(self, **changed: Any) -> TrainSettings:
        """The library's defaults for speed; an endless run at a constant learning rate."""
        fixed = {"images": self.batch * 10**6, "batch_size": self.batch, "lr": 2e-4, "decay": "none"}
        return TrainSettings(**{**fixed, "weight_decay": 0.001, "ema_decay": 0.999, **changed})
