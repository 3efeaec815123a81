"""Closed-form networks and tiny data sets for the tests of the evaluation room."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffstill.data.dataset import ImageData, to_float
from diffstill.data.sources import DataSplits
from diffstill.diffusion.guidance import guide
from diffstill.diffusion.prediction import PredictionType, to_x0
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.models.adapters import unet2d
from diffstill.models.denoiser import Denoiser

SHAPE = (1, 4, 4)
CLASSES = 3
SCHEDULE = NoiseSchedule.create("cosine", 100)


class LabelAffine(nn.Module):
    """eps(x_t, t, y) = scale[y] * x_t + shift[y]; the last row is the null branch."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.scale[labels].view(-1, 1, 1, 1) * x_t + self.shift[labels]


class Rescaled(nn.Module):
    """A network whose guidance gap is ``factor`` times another's: the null branch is kept."""

    def __init__(self, inner: nn.Module, factor: float, null_label: int) -> None:
        super().__init__()
        self.inner, self.factor, self.null_label = inner, factor, null_label

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        null = self.inner(x_t, t, torch.full_like(labels, self.null_label))
        return guide(self.inner(x_t, t, labels), null, self.factor)


class Shifted(nn.Module):
    """A network with constant images added to its two branches."""

    def __init__(self, inner: nn.Module, cond: Tensor, null: Tensor, null_label: int) -> None:
        super().__init__()
        self.inner, self.cond, self.null, self.null_label = inner, cond, null, null_label

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        is_null = (labels == self.null_label).view(-1, 1, 1, 1)
        return self.inner(x_t, t, labels) + torch.where(is_null, self.null, self.cond)


class Empirical(nn.Module):
    """The optimal eps for a finite set of images, by class and for all of them (null): samples are the images."""

    def __init__(self, data: ImageData, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.register_buffer("images", to_float(data.images).flatten(1))
        self.register_buffer("labels", data.labels)
        self.unused = nn.Parameter(torch.zeros(1))
        self.schedule, self.null_label = schedule, data.num_classes

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        alpha, sigma = self.schedule.at(t, 2)
        x = x_t.flatten(1)
        logits = -torch.cdist(x, alpha[0] * self.images).square() / (2 * sigma**2)
        other = (self.labels[None] != labels[:, None]) & (labels[:, None] != self.null_label)
        x0 = logits.masked_fill(other, -torch.inf).softmax(1) @ self.images
        return ((x - alpha * x0) / sigma).view_as(x_t)


class AsKind(nn.Module):
    """An epsilon network that answers as another prediction type."""

    def __init__(self, inner: nn.Module, kind: PredictionType, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.inner, self.kind, self.schedule = inner, kind, schedule

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        eps = self.inner(x_t, t, labels)
        alpha, sigma = self.schedule.at(t, x_t.ndim)
        x0 = to_x0(eps, x_t, alpha, sigma, "epsilon")
        return x0 if self.kind == "sample" else alpha * eps - sigma * x0


def denoiser(network: nn.Module, kind: PredictionType = "epsilon", schedule: NoiseSchedule = SCHEDULE) -> Denoiser:
    return Denoiser(network, schedule, CLASSES, SHAPE, kind)


def affine_teacher(seed: int = 0, spread: float = 0.3) -> Denoiser:
    generator = torch.Generator().manual_seed(seed)
    scale = 0.5 + spread * torch.randn(CLASSES + 1, generator=generator)
    return denoiser(LabelAffine(scale, spread * torch.randn(CLASSES + 1, *SHAPE, generator=generator)))


def tiny_unet(
    shape: tuple[int, int, int] = (1, 8, 8), classes: int = CLASSES, width: int = 8, seed: int = 0
) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = unet2d.build(
            sample_shape=shape,
            num_classes=classes,
            block_out_channels=(width, 2 * width),
            layers_per_block=1,
            norm_num_groups=4,
            attention_levels=(1,),
        )
    return Denoiser(network, SCHEDULE, classes, shape)


def noise_data(count: int = 60, seed: int = 0, shape: tuple[int, int, int] = SHAPE, split: str = "test") -> ImageData:
    """Random pixels, labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    return ImageData("noise", split, images, torch.arange(count) % CLASSES, tuple("abc"))


def bars(count: int, seed: int, split: str, name: str = "bars") -> ImageData:
    """8x8 images of three classes a small network tells apart: horizontal, vertical and diagonal bars, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    phase = torch.randint(0, 4, (count, 1, 1), generator=generator)
    ramps = torch.stack([row, column, row + column])[labels] + phase
    pixels = 200.0 * (ramps % 4 < 2) + 40 * torch.rand(count, 8, 8, generator=generator)
    return ImageData(name, split, pixels.round().to(torch.uint8)[:, None], labels, tuple("abc"))


def bars_splits(train: int = 120, held_out: int = 45) -> DataSplits:
    return DataSplits(bars(train, 0, "train"), bars(held_out, 1, "val"), bars(held_out, 2, "test"))
