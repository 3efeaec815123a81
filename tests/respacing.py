"""SFDDM's released schedule, one Gaussian on it, and the law of what an affine chain makes of noise."""

from __future__ import annotations

from typing import Any

import torch

from diffstill.analytic import GaussianMixtureWorld, analytic_denoiser
from diffstill.diffusion.guidance import Constant
from diffstill.diffusion.sampling import ddim_sample
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.models.denoiser import Denoiser

T = 1024
IRREGULAR = [0, 64, 128, 192, 496, 500, 504, 508, 512, 516, 520, 524, 528, 832, 896, 960]


def sigmoid_schedule() -> NoiseSchedule:
    """The released one: not diffusers' "sigmoid", in which beta itself is a sigmoid."""
    grid = torch.sigmoid(torch.arange(T + 1, dtype=torch.float64) / T * 6 - 3)
    abar = (grid[-1] - grid) / (grid[-1] - grid[0])
    return NoiseSchedule("sigmoid", (1 - abar[1:] / abar[:-1]).clamp(max=0.999))


SIGMOID = sigmoid_schedule()
WORLD = GaussianMixtureWorld.single_gaussians(torch.tensor([0.3]).view(1, 1, 1, 1), std=0.5)
EXACT = analytic_denoiser(WORLD, SIGMOID)


def law(run: Any) -> tuple[float, float]:
    """Mean and standard deviation of what an affine map makes of N(0, 1)."""
    low, high = run(torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)).flatten().tolist()
    return low, abs(high - low)


def ddim_law(model: Denoiser) -> tuple[float, float]:
    steps = model.schedule.T
    labels = torch.zeros(2, dtype=torch.int64)
    return law(
        lambda z: ddim_sample(
            lambda x, t, s: model.guided(x, t, labels, s),
            z,
            model.schedule,
            Constant(1.0),
            steps=steps,
            clip="none",
        )
    )
