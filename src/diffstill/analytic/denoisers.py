"""Networks for analytic worlds: the exact teacher, a teacher with known errors, and small learnable students."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..diffusion.prediction import PredictionType
from ..diffusion.schedule import NoiseSchedule
from ..models.adapters import family_of
from ..models.denoiser import Denoiser
from .worlds import GaussianMixtureWorld


class AnalyticNetwork(nn.Module):
    """The optimal network of a world, called like any other: ``(x_t, t, labels) -> prediction``, null included."""

    def __init__(
        self, world: GaussianMixtureWorld, schedule: NoiseSchedule, prediction_type: PredictionType = "epsilon"
    ) -> None:
        super().__init__()
        self.world = world
        self.schedule = schedule
        self.prediction_type = prediction_type

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.world.prediction(x_t, t, self.schedule, labels, self.prediction_type)


class PerturbedNetwork(nn.Module):
    """A frozen network plus a learnable error per label: the student whose branch errors are known exactly.

    Args:
        network: what is perturbed; its parameters are frozen.
        errors: (num_classes + 1, *sample_shape), added to the prediction by label; the last row is the null branch's.
    """

    def __init__(self, network: nn.Module, errors: Tensor) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.errors = nn.Parameter(errors.detach().clone())

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        clean = family_of(self.network).call(self.network, x_t, t, labels)
        return clean + self.errors[labels].to(clean.dtype)


class AffineStudent(nn.Module):
    """An affine map of x_t for every label (null included) and timestep bin; starts near the identity.

    With ``bins = T`` it can be exact where a branch is one Gaussian; elsewhere it is a student of too little capacity.
    """

    def __init__(self, num_classes: int, sample_shape: tuple[int, ...], T: int, bins: int = 16) -> None:
        super().__init__()
        D = math.prod(sample_shape)
        self.T, self.bins = T, bins
        self.weight = nn.Parameter(torch.eye(D) + 0.1 * torch.randn(bins, num_classes + 1, D, D))
        self.bias = nn.Parameter(0.1 * torch.randn(bins, num_classes + 1, D))

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        bin_ = t * self.bins // self.T
        out = torch.einsum("bij,bj->bi", self.weight[bin_, labels], x_t.flatten(1)) + self.bias[bin_, labels]
        return out.reshape(x_t.shape)


class MLPStudent(nn.Module):
    """A small residual MLP of x_t, a sinusoidal time embedding and a label embedding with the null row."""

    def __init__(
        self, num_classes: int, sample_shape: tuple[int, ...], T: int, width: int = 64, depth: int = 2
    ) -> None:
        super().__init__()
        D = math.prod(sample_shape)
        self.T = T
        self.register_buffer("frequencies", 2.0 ** torch.arange(6) * math.pi / 2, persistent=False)
        self.time = nn.Linear(12, width)
        self.label_embedding = nn.Embedding(num_classes + 1, width)
        self.stem = nn.Linear(D, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth)
        )
        self.head = nn.Linear(width, D)

    frequencies: Tensor

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        phase = (t[:, None] / self.T) * self.frequencies
        hidden = self.stem(x_t.flatten(1))
        condition = self.time(torch.cat([phase.sin(), phase.cos()], dim=1)) + self.label_embedding(labels)
        for block in self.blocks:
            hidden = hidden + block(hidden + condition)
        return x_t + self.head(nn.functional.silu(hidden + condition)).reshape(x_t.shape)


def analytic_denoiser(
    world: GaussianMixtureWorld, schedule: NoiseSchedule, prediction_type: PredictionType = "epsilon"
) -> Denoiser:
    """The world's optimal network as a frozen ``Denoiser``: a perfect teacher, at no training cost.

    Raises:
        ValueError: unless the world's samples are (C, H, W).
    """
    if len(world.sample_shape) != 3:
        raise ValueError(f"a Denoiser's samples are (C, H, W); this world's are {world.sample_shape}")
    channels, height, width = world.sample_shape
    network = AnalyticNetwork(world, schedule, prediction_type)
    return Denoiser(network, schedule, world.num_classes, (channels, height, width), prediction_type).freeze()


def perturbed(denoiser: Denoiser, cond_error: float | Tensor, null_error: float | Tensor) -> Denoiser:
    """``denoiser`` with constant errors on its branches, each a number or broadcastable to (C, H, W).

    The errors are the parameter ``network.errors`` of the result, so they can also be learned away.
    """
    shape = denoiser.sample_shape
    cond, null = (torch.as_tensor(error).expand(shape) for error in (cond_error, null_error))
    errors = torch.stack([*[cond] * denoiser.num_classes, null]).to(denoiser.device)
    return denoiser.with_network(PerturbedNetwork(denoiser.network, errors.float()))
