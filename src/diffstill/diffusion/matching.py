"""Distribution matching: the direction in which a generator's images should move, and a loss that moves them there.

DMD (Yin et al., 2311.18828), DMD2 (2405.14867), Uni-DAD (2511.18281); unidad.md 2.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Normalizer = Literal["teacher", "critic", "noisy", "none"]
"""What the direction is divided by, per sample: the mean absolute error of the teacher's estimate (DMD2, Uni-DAD's
code), that of the critic's (as the paper prints it), the teacher's against the noisy image (the released
personalisation code), or nothing."""


def matching_gradient(
    x: Tensor,
    x0_critic: Tensor,
    x0_teacher: Tensor,
    normalizer: Normalizer = "teacher",
    *,
    x_t: Tensor | None = None,
    ratio: Tensor | None = None,
) -> Tensor:
    """``(x0_critic - x0_teacher) / w`` (B, ...): images move against it, towards what the teacher finds likely.

    The critic's clean-image estimate minus the teacher's is ``sigma/alpha (eps_teacher - eps_critic)``, the score of
    the generator's images minus the teacher's, up to a positive factor. What is not finite counts as zero.

    Args:
        x: (B, ...) generated images, on which ``x_t`` was made.
        x_t: the noisy images, for ``noisy``.
        ratio: noise-to-signal ratio (B, 1, ...) at ``x_t``, for ``critic``, whose ``w`` is the critic's mean absolute
            error divided by it: in noise estimates, ``ratio (eps_teacher - eps_critic) / mean |eps - eps_critic|``.

    Raises:
        ValueError: an unknown normalizer, or ``critic`` without ``ratio``.
    """
    direction = x0_critic - x0_teacher
    if normalizer == "none":
        return direction
    against, where, scale = x0_teacher, x, x.new_ones(())
    if normalizer == "critic":
        if ratio is None:
            raise ValueError("critic needs the noise-to-signal ratio")
        against, scale = x0_critic, ratio
    elif normalizer == "noisy":
        where = x if x_t is None else x_t
    elif normalizer != "teacher":
        raise ValueError(f"unknown normalizer {normalizer!r}; one of teacher, critic, noisy, none")
    error = (where - against).abs().flatten(1).mean(1).clamp(min=1e-8).view(-1, *[1] * (x.ndim - 1))
    return (scale * direction / error).nan_to_num(0.0, 0.0, 0.0)


def matching_loss(gradient: Tensor) -> Tensor:
    """``1/2 mean(g^2)``, a scalar: the value of the loss whose gradient in ``x`` is ``g / numel`` (unidad.md 2)."""
    return 0.5 * gradient.square().mean()


def dual_domain(a: float, source: Tensor | None, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(loss, dloss/dx)`` of two domains' gradients: ``(1 - a) L_source + a L_target``.

    The student's fixed point is a product of the two diffused distributions, not a mixture (unidad.md 2).

    Args:
        a: weight of the target domain in [0, 1]; at an end the other gradient may be None, and is not looked at.

    Raises:
        ValueError: ``a`` outside [0, 1], or a gradient with weight that is missing.
    """
    if not 0 <= a <= 1:
        raise ValueError(f"a = {a:g} must lie in [0, 1]")
    parts = [(weight, g) for weight, g in ((1 - a, source), (a, target)) if weight > 0]
    if any(g is None for _, g in parts):
        raise ValueError("a gradient that has weight is missing")
    known = [(weight, g) for weight, g in parts if g is not None]
    loss = sum((weight * matching_loss(g) for weight, g in known[1:]), start=known[0][0] * matching_loss(known[0][1]))
    slope = sum((weight * g for weight, g in known[1:]), start=known[0][0] * known[0][1])
    return loss, slope / slope.numel()


def tied(x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """A scalar of exactly the given value whose gradient in ``x`` is exactly ``slope``."""
    return value.detach() + ((x - x.detach()) * slope.detach()).sum()
