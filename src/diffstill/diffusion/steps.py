"""Single deterministic steps between noise levels, and the one-step target that a longer way implies."""

from __future__ import annotations

from torch import Tensor


def ddim_step(x0: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, alpha_u: Tensor, sigma_u: Tensor) -> Tensor:
    """From ``x_t`` to the noise level of u with the clean-image estimate ``x0`` (Song et al., 2010.02502, Eq. 12).

    Deterministic: ``x_u = alpha_u x0 + sigma_u (x_t - alpha_t x0) / sigma_t``; all tensors broadcast.
    """
    return alpha_u * x0 + sigma_u * (x_t - alpha_t * x0) / sigma_t


def one_step_target(
    x_t: Tensor, x_u: Tensor, alpha_t: Tensor, sigma_t: Tensor, alpha_u: Tensor, sigma_u: Tensor
) -> Tensor:
    """The clean-image estimate with which one ``ddim_step`` from ``x_t`` lands on ``x_u`` (Salimans & Ho, 2202.00512).

    ``(x_u - r x_t) / (alpha_u - r alpha_t)`` with ``r = sigma_u / sigma_t``; u is less noisy than t.
    """
    ratio = sigma_u / sigma_t
    return (x_u - ratio * x_t) / (alpha_u - ratio * alpha_t)
