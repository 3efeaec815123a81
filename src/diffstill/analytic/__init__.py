"""Worlds whose optimal denoiser is known in closed form: losses, samplers and metrics are tested against them."""

from .denoisers import AffineStudent, AnalyticNetwork, MLPStudent, PerturbedNetwork, analytic_denoiser, perturbed
from .worlds import GaussianMixtureWorld

__all__ = [
    "AffineStudent",
    "AnalyticNetwork",
    "GaussianMixtureWorld",
    "MLPStudent",
    "PerturbedNetwork",
    "analytic_denoiser",
    "perturbed",
]
