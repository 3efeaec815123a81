"""Losses of a discriminator with one or many heads, and of the generator that it judges (unidad.md 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

GanLoss = Literal["bce", "hinge", "lsgan", "wgan"]
Aggregation = Literal["mean", "sum", "logit"]
"""How heads are put together: the mean of their losses (whatever their number), the sum of them (the paper's), or the
loss of their mean logit (the released code: one confident head silences the others)."""
Logits = Sequence[Tensor]
"""One tensor (B, places) a head; a pooled head has one place."""


def discriminator_loss(real: Logits, fake: Logits, kind: GanLoss = "bce", aggregation: Aggregation = "mean") -> Tensor:
    """Scalar: the loss on real images plus that on generated ones."""
    on_real: dict[GanLoss, Callable[[Tensor], Tensor]] = {
        "bce": lambda z: F.softplus(-z),
        "hinge": lambda z: F.relu(1 - z),
        "lsgan": lambda z: (z.sigmoid() - 1).square(),
        "wgan": lambda z: -z,
    }
    on_fake: dict[GanLoss, Callable[[Tensor], Tensor]] = {
        "bce": F.softplus,
        "hinge": lambda z: F.relu(1 + z),
        "lsgan": lambda z: z.sigmoid().square(),
        "wgan": lambda z: z,
    }
    return _aggregated(real, on_real[kind], aggregation) + _aggregated(fake, on_fake[kind], aggregation)


def generator_loss(fake: Logits, kind: GanLoss = "bce", aggregation: Aggregation = "mean") -> Tensor:
    """Scalar, non-saturating: small where generated images are taken for real."""
    forms: dict[GanLoss, Callable[[Tensor], Tensor]] = {
        "bce": lambda z: F.softplus(-z),
        "hinge": lambda z: -z,
        "lsgan": lambda z: (z.sigmoid() - 1).square(),
        "wgan": lambda z: -z,
    }
    return _aggregated(fake, forms[kind], aggregation)


def mean_logit(logits: Logits) -> Tensor:
    """(B,) mean over heads of each one's mean over places."""
    return torch.stack([z.flatten(1).mean(1) for z in logits]).mean(0)


def _aggregated(logits: Logits, form: Callable[[Tensor], Tensor], aggregation: Aggregation) -> Tensor:
    if aggregation == "logit":
        return form(mean_logit(logits)).mean()
    losses = torch.stack([form(z).mean() for z in logits])
    return losses.sum() if aggregation == "sum" else losses.mean()


def r1_penalty(score: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """``1/2 mean |d score / d real|^2``, a scalar with graph (Mescheder et al., 1801.04406): times gamma in the loss.

    Args:
        score: (B, ...) images to (B,) scores, without mixing samples.
    """
    return 0.5 * _slopes(score, real).square().mean()


def gradient_penalty(score: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """``mean (|d score / d x| - 1)^2`` at ``x = share real + (1 - share) fake``, share (B,) in [0, 1] (1704.00028)."""
    place = share.view(-1, *[1] * (real.ndim - 1))
    return (_slopes(score, place * real + (1 - place) * fake) - 1).square().mean()


def _slopes(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(B,) norms of the score's gradient in each image, with graph."""
    leaf = x.detach().requires_grad_()
    # Fused attention has no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        (slope,) = torch.autograd.grad(score(leaf).sum(), leaf, create_graph=True)
    # The square root has no slope at zero.
    return slope.flatten(1).square().sum(1).add(1e-16).sqrt()


def per_image(slope: Tensor) -> Tensor:
    """Mean squared norm of each image's gradient, a scalar that does not depend on how many there are.

    Args:
        slope: (B, ...) gradient of a mean over the B images.
    """
    return slope.square().sum() * len(slope)


def measured_norms(kept: Tensor, squares: Tensor, span: int, always: bool) -> Tensor:
    """What is known of two gradients' norms after one more update.

    Args:
        kept: (3,) sums of the squared norms of the one and of the other, and the number of updates.
        squares: (2,) squared norms at this update, which does not count where one of them is zero.
        span: the first so many updates count, or with ``always`` all, the last so many the most: a sum fades by
            ``1 - 1 / span`` an update.
    """
    counts = squares.sign().prod()[None]
    more = torch.cat([squares * counts, counts])
    if not always:
        return kept + more * (kept[2] < span)
    fade = torch.cat([1 - counts / span, 1 - counts / span, torch.ones_like(counts)])
    return kept * fade + more


def balanced_weight(kept: Tensor, weight: float, share: float, span: int) -> Tensor:
    """The second gradient's weight, a scalar, that makes its norm ``share`` times the first's; ``weight`` before
    ``span`` updates are known. In the root mean square over what ``measured_norms`` kept."""
    one, other, count = kept
    balanced = share * (one / other.clamp(min=1e-30)).sqrt()
    return torch.where(count < span, torch.full_like(balanced, weight), balanced).float()
