"""Single steps between noise levels, and the one-step targets that a longer way implies."""

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


def one_step_noise(
    x_t: Tensor, x_u: Tensor, alpha_t: Tensor, sigma_t: Tensor, alpha_u: Tensor, sigma_u: Tensor
) -> Tensor:
    """The noise estimate with which one ``ddim_step`` from ``x_t`` lands on ``x_u`` (guided.md 4).

    ``(x_u - r x_t) / (sigma_u - r sigma_t)`` with ``r = alpha_u / alpha_t``: the form of ``one_step_target`` for steps
    from a clean image up, where its own is singular.
    """
    ratio = alpha_u / alpha_t
    return (x_u - ratio * x_t) / (sigma_u - ratio * sigma_t)


def noising_kernel(alpha_k: float, sigma_k: float, alpha_u: float, sigma_u: float) -> tuple[float, float]:
    """``(factor, spread)`` of the forward process from noise level k up to u: ``z_u = factor z_k + spread eps``.

    ``spread^2 = sigma_u^2 - (alpha_u / alpha_k)^2 sigma_k^2``, which also holds for a clean k (guided.md 3).
    """
    factor = alpha_u / alpha_k
    return factor, max(sigma_u**2 - factor**2 * sigma_k**2, 0.0) ** 0.5
