"""Class-conditional Gaussian mixtures: every quantity a diffusion model approximates, in closed form.

Diffusion keeps a mixture a mixture. If component k of the data is ``N(mu_k, C_k)``, then at noise level (alpha, sigma)
it is ``N(alpha mu_k, alpha^2 C_k + sigma^2 I)``. So density, score, optimal epsilon, x0 and v, the class posterior and
the guidance gap are exact at every timestep, on both branches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..diffusion.guidance import guidance_gap, guide
from ..diffusion.prediction import PredictionType, target


class Levels(Protocol):
    """What a world needs of a noise schedule; ``NoiseSchedule`` has it, and so may a continuous-time one."""

    def at(self, t: Tensor, ndim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``(alpha_t, sigma_t)``, each (B, 1, ...) with ``ndim`` dims."""


class _Noised(NamedTuple):
    """The mixture at noise level (alpha, sigma), seen from x_t."""

    log_joint: Tensor
    """(B, K): log of component probability (given the label) times component density at x_t."""
    offset: Tensor
    """(B, K, D): x_t - alpha mu_k along the component's axes."""
    variance: Tensor
    """(B, K, D): along the same axes."""
    alpha: Tensor
    """(B, 1, 1)."""
    sigma: Tensor
    """(B, 1, 1)."""


class GaussianMixtureWorld(nn.Module):
    """Data of ``num_classes`` classes, each a mixture of Gaussians; the null branch is the mixture over classes.

    Everywhere: ``x_t`` is (B, *sample_shape) of any float dtype, ``t`` is (B,) int64, ``labels`` is (B,) int64 in
    0..num_classes where ``num_classes`` means null, and ``labels=None`` means null for the whole batch. The arithmetic
    is float64; results have the dtype of ``x_t``. Everything is differentiable in ``x_t``.

    It is a module only so that its tables follow ``.to(device)`` and ``state_dict()``. The means are a (frozen)
    parameter: unfreeze them, and a network around the world is a student that can reach the truth exactly.

    Args:
        means: (K, D), one row a component.
        covariances: (K,) variances, (K, D) diagonals or (K, D, D) full matrices; positive semi-definite.
        component_classes: (K,) int64, the class of each component; every class 0..max has at least one.
        weights: (K,) positive, normalised within each class; equal by default.
        class_prior: (num_classes,) positive, normalised; uniform by default.
        sample_shape: shape of one sample, of D numbers; (D, 1, 1) by default.

    Raises:
        ValueError: for tables that do not fit together.
    """

    means: nn.Parameter
    variances: Tensor
    """(K, D) variances along the axes of ``rotations``."""
    rotations: Tensor | None
    """(K, D, D) orthogonal, columns are the principal axes; None where the axes are the coordinates."""
    log_weights: Tensor
    """(num_classes + 1, K): log-probability of each component given a label; the last row is null."""
    log_prior: Tensor
    """(num_classes,)."""

    def __init__(
        self,
        means: Tensor,
        covariances: Tensor,
        component_classes: Tensor,
        weights: Tensor | None = None,
        class_prior: Tensor | None = None,
        sample_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if means.ndim != 2:
            raise ValueError(f"means must be (K, D), not {tuple(means.shape)}")
        K, D = means.shape
        self.sample_shape = tuple(sample_shape) if sample_shape is not None else (D, 1, 1)
        if math.prod(self.sample_shape) != D:
            raise ValueError(f"sample_shape {self.sample_shape} does not hold the {D} numbers of a mean")
        self.num_classes = int(component_classes.max()) + 1
        self.means = nn.Parameter(means.detach().double().clone(), requires_grad=False)
        variances, rotations = _principal_axes(covariances, K, D)
        self.register_buffer("variances", variances)
        self.register_buffer("rotations", rotations)
        within = torch.ones(K) if weights is None else weights
        prior = torch.ones(self.num_classes) if class_prior is None else class_prior
        log_prior, log_weights = _label_tables(component_classes, within.double(), prior.double())
        self.register_buffer("log_prior", log_prior)
        self.register_buffer("log_weights", log_weights)

    @classmethod
    def single_gaussians(
        cls, means: Tensor, std: float | Tensor = 0.5, class_prior: Tensor | None = None
    ) -> GaussianMixtureWorld:
        """One isotropic Gaussian a class: ``means`` (num_classes, *sample_shape), ``std`` one number or (num_classes,).

        The conditional branch is then affine in x_t; with equal ``std`` and one class so is every DDIM step.
        """
        count = means.shape[0]
        variances = torch.as_tensor(std, dtype=torch.float64).square().expand(count)
        return cls(means.flatten(1), variances, torch.arange(count), None, class_prior, means.shape[1:])

    @classmethod
    def ring(
        cls, num_classes: int = 4, components_per_class: int = 2, radius: float = 0.7, std: float = 0.1
    ) -> GaussianMixtureWorld:
        """Equal Gaussians evenly on a circle in 2-D, sample shape (2, 1, 1); neighbours are of different classes."""
        count = num_classes * components_per_class
        angles = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
        means = radius * torch.stack([angles.cos(), angles.sin()], dim=1)
        variances = torch.full((count,), std**2, dtype=torch.float64)
        return cls(means, variances, torch.arange(count) % num_classes)

    @property
    def null_label(self) -> int:
        return self.num_classes

    def draw_labels(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count,) int64 classes from the class prior."""
        return torch.multinomial(self.log_prior.exp(), count, replacement=True, generator=generator)

    def sample(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Clean data (B, *sample_shape) float64; null labels draw from the mixture over classes."""
        component = torch.multinomial(self.log_weights[labels].exp(), 1, generator=generator)[:, 0]
        noise = torch.randn(len(labels), self.means.shape[1], dtype=torch.float64, generator=generator)
        noise = noise.to(self.means.device) * self.variances[component].sqrt()
        if self.rotations is not None:
            noise = torch.einsum("bij,bj->bi", self.rotations[component], noise)
        return (self.means[component] + noise).reshape(-1, *self.sample_shape)

    def log_density(self, x_t: Tensor, t: Tensor, schedule: Levels, labels: Tensor | None = None) -> Tensor:
        """(B,) float64 ``log p_t(x_t | y)``, or ``log p_t(x_t)`` where the label is null."""
        return self._noised(x_t, t, schedule, labels).log_joint.logsumexp(1)

    def class_posterior(self, x_t: Tensor, t: Tensor, schedule: Levels) -> Tensor:
        """(B, num_classes) float64 ``p(y | x_t)``."""
        membership = self.log_weights[: self.num_classes].isfinite().double()
        return self._noised(x_t, t, schedule, None).log_joint.softmax(1) @ membership.T

    def prediction(
        self,
        x_t: Tensor,
        t: Tensor,
        schedule: Levels,
        labels: Tensor | None = None,
        kind: PredictionType = "epsilon",
    ) -> Tensor:
        """What the optimal network of this prediction type outputs: ``E[target | x_t, y]``, (B, *sample_shape)."""
        at = self._noised(x_t, t, schedule, labels)
        share = at.log_joint.softmax(1)[:, :, None]
        whitened = at.offset / at.variance
        # Each from its own formula, so that neither divides by a small alpha or sigma.
        eps = (share * at.sigma * self._rotate(whitened)).sum(1)
        x0 = (share * (self.means + self._rotate(at.alpha * self.variances * whitened))).sum(1)
        out = target(x0, eps, at.alpha[:, 0], at.sigma[:, 0], kind)
        return out.reshape(x_t.shape).to(x_t.dtype)

    def epsilon(self, x_t: Tensor, t: Tensor, schedule: Levels, labels: Tensor | None = None) -> Tensor:
        """``E[eps | x_t, y]``."""
        return self.prediction(x_t, t, schedule, labels, "epsilon")

    def x0(self, x_t: Tensor, t: Tensor, schedule: Levels, labels: Tensor | None = None) -> Tensor:
        """``E[x_0 | x_t, y]``."""
        return self.prediction(x_t, t, schedule, labels, "sample")

    def v(self, x_t: Tensor, t: Tensor, schedule: Levels, labels: Tensor | None = None) -> Tensor:
        """``E[alpha eps - sigma x_0 | x_t, y]``."""
        return self.prediction(x_t, t, schedule, labels, "v_prediction")

    def score(self, x_t: Tensor, t: Tensor, schedule: Levels, labels: Tensor | None = None) -> Tensor:
        """``grad log p_t(x_t | y) = -epsilon / sigma_t``."""
        _, sigma = schedule.at(t, x_t.ndim, torch.float64)
        return (-self.epsilon(x_t.double(), t, schedule, labels) / sigma).to(x_t.dtype)

    def gap(self, x_t: Tensor, t: Tensor, schedule: Levels, labels: Tensor, kind: PredictionType = "epsilon") -> Tensor:
        """True guidance gap cond - null; for epsilon it is ``-sigma_t grad log p(y | x_t)``."""
        cond = self.prediction(x_t, t, schedule, labels, kind)
        return guidance_gap(cond, self.prediction(x_t, t, schedule, None, kind))

    def guided_epsilon(self, x_t: Tensor, t: Tensor, schedule: Levels, labels: Tensor, scale: float | Tensor) -> Tensor:
        """Classifier-free guided epsilon at ``guidance_scale`` (1 is purely conditional)."""
        cond = self.epsilon(x_t, t, schedule, labels)
        return guide(cond, self.epsilon(x_t, t, schedule), scale)

    def _noised(self, x_t: Tensor, t: Tensor, schedule: Levels, labels: Tensor | None) -> _Noised:
        alpha, sigma = schedule.at(t, 3, torch.float64)
        offset = x_t.double().flatten(1)[:, None] - alpha * self.means
        if self.rotations is not None:
            offset = torch.einsum("kij,bki->bkj", self.rotations, offset)
        variance = alpha**2 * self.variances + sigma**2
        log_density = -0.5 * (offset**2 / variance + (2 * math.pi * variance).log()).sum(2)
        rows = torch.full_like(t, self.null_label) if labels is None else labels
        return _Noised(log_density + self.log_weights[rows], offset, variance, alpha, sigma)

    def _rotate(self, along_axes: Tensor) -> Tensor:
        if self.rotations is None:
            return along_axes
        return torch.einsum("kij,bkj->bki", self.rotations, along_axes)


def _principal_axes(covariances: Tensor, K: int, D: int) -> tuple[Tensor, Tensor | None]:
    """Variances (K, D) and the axes they lie along, of isotropic, diagonal or full covariances."""
    table = covariances.detach().double()
    rotations = None
    if table.shape == (K,):
        table = table[:, None].expand(K, D).clone()
    elif table.shape == (K, D, D):
        if not torch.allclose(table, table.mT):
            raise ValueError("full covariances must be symmetric")
        table, rotations = torch.linalg.eigh(table)
    elif table.shape != (K, D):
        raise ValueError(f"covariances must be (K,), (K, D) or (K, D, D) with K={K}, D={D}, not {tuple(table.shape)}")
    if bool((table < -1e-12).any()):
        raise ValueError("covariances must be positive semi-definite")
    return table.clamp(min=0), rotations


def _label_tables(classes: Tensor, weights: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Log class prior (num_classes,) and log component probabilities given each label (num_classes + 1, K)."""
    num_classes = int(classes.max()) + 1
    if weights.shape != classes.shape or prior.shape != (num_classes,):
        raise ValueError(f"weights must be one a component ({len(classes)}), class_prior one a class ({num_classes})")
    if bool((weights <= 0).any()) or bool((prior <= 0).any()):
        raise ValueError("weights and class_prior must be positive")
    prior = prior / prior.sum()
    given_class = weights * (classes == torch.arange(num_classes)[:, None])
    totals = given_class.sum(1, keepdim=True)
    if bool((totals == 0).any()):
        raise ValueError("every class needs at least one component")
    given_class = given_class / totals
    return prior.log(), torch.cat([given_class, prior[None] @ given_class]).log()
