"""How varied the samples of a model of a few images are, and whether they are copies of those.

Uni-DAD and CRDI report intra-cluster diversity (Ojha et al., 2104.06820): every sample goes to its nearest of the few
images, and the mean distance of pairs is taken within each of these clusters, so that a model that only jumps between
copies of the few is not called varied. Their code (unidad.md 4) has three defects, which ``crdi_compat`` repeats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .distances import Distance, check_uint8
from .intervals import from_error, mean_interval, proportion
from .results import Estimate

PROTOCOL = "intra-cluster/1"
CRDI = "intra-cluster/crdi"
CRDI_CLUSTERS = 10
PER_CLUSTER = 100
NEAR = 0.05
"""The quantile of real images' distance to the few up to which a sample counts as a copy."""


@dataclass(frozen=True)
class Diversity:
    """Mean distance of pairs within clusters; a null value where no cluster has two members."""

    value: Estimate
    sizes: tuple[int, ...]
    """Samples of each cluster, in the order of the anchors, before the cut at ``per_cluster``."""
    protocol: str = PROTOCOL

    @property
    def empty(self) -> int:
        """Clusters without a sample."""
        return sum(size == 0 for size in self.sizes)

    @property
    def singletons(self) -> int:
        """Clusters of one sample, which has no partner."""
        return sum(size == 1 for size in self.sizes)


def intra_cluster_diversity(
    samples: Tensor,
    anchors: Tensor,
    distance: Distance,
    *,
    per_cluster: int = PER_CLUSTER,
    crdi_compat: bool = False,
    level: float = 0.95,
) -> Diversity:
    """Diversity of samples (N, C, H, W) within the clusters of their nearest anchor (M > 0, C, H, W), both uint8.

    Clusters of one sample or none have no pairs: they are left out of the mean and counted in the result.

    Args:
        per_cluster: members looked at, the first by index.
        crdi_compat: the published protocol with its defects, for comparison with published numbers and nothing else:
            (1) samples are brought to [0, 1] where the anchors are, rightly, on [-1, 1], so they are compared at half
            contrast; (2) there are always ten clusters: with fewer anchors the sum is still divided by ten, and of
            more anchors (never published) the clusters beyond the tenth are left out; (3) clusters without pairs
            count as 0.

    Raises:
        ValueError: images that are not uint8, no anchor, or ``per_cluster`` under 2.
    """
    check_uint8(samples)
    points = distance.of(samples.float() / 255) if crdi_compat else distance.points(samples)
    return cluster_diversity(
        points, distance.points(anchors), distance, per_cluster=per_cluster, crdi_compat=crdi_compat, level=level
    )


def cluster_diversity(
    points: Tensor,
    anchors: Tensor,
    distance: Distance,
    *,
    per_cluster: int = PER_CLUSTER,
    crdi_compat: bool = False,
    level: float = 0.95,
) -> Diversity:
    """``intra_cluster_diversity`` of ``distance.points``: defects 2 and 3 with ``crdi_compat``, not the first.

    The interval is the jackknife's: how the value changes where one sample is left out. That of a cluster of two takes
    the whole cluster with it.
    """
    if not len(anchors) or per_cluster < 2:
        raise ValueError(f"{len(anchors)} anchors and {per_cluster} members a cluster; at least 1 and 2 are needed")
    near = nearest(points, anchors, distance)[1]
    counts = near.bincount(minlength=len(anchors))
    sizes = tuple(counts.tolist())
    if crdi_compat:
        sizes = (sizes + (0,) * CRDI_CLUSTERS)[:CRDI_CLUSTERS]
    means, left_out = [], []
    for cluster, size in enumerate(sizes):
        if size < 2:
            continue
        members = points[near == cluster][:per_cluster]
        table, m = distance.between(members, members), len(members)
        own = (table.sum(1) - table.diagonal()) / (m - 1)
        means.append(float(own.mean()))
        left_out.append((m * means[-1] - 2 * own) / (m - 2) if m > 2 else None)
    clusters = len(sizes) if crdi_compat else len(means)
    value = sum(means) / clusters if clusters else math.nan
    error = _jackknife(means, left_out, clusters, fixed=crdi_compat)
    estimate = from_error(value, error, level=level, floor=0.0)
    return Diversity(estimate, sizes, CRDI if crdi_compat else PROTOCOL)


def _jackknife(means: list[float], left_out: list[Tensor | None], clusters: int, *, fixed: bool) -> float:
    """Standard error of ``sum(means) / clusters`` by leaving each sample out once.

    Args:
        left_out: of each cluster, its mean without each of its members; None of a cluster of two, which then has none.
        fixed: whether a cluster without a mean counts as 0, or not at all.
    """
    if not clusters or (clusters == 1 and not fixed and left_out == [None]):
        return math.nan
    variance, total = 0.0, sum(means)
    for mean, without in zip(means, left_out, strict=True):
        if without is not None:
            variance += float(((without - mean) / clusters).square().sum())
        elif fixed:
            variance += 2 * (mean / clusters) ** 2
        elif clusters > 1:
            variance += 2 * ((total - mean) / (clusters - 1) - total / clusters) ** 2
    return math.sqrt(variance)


def nearest(points: Tensor, anchors: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
    """(N,) float64 distance of each point to its nearest anchor, and (N,) which; the first of equally near ones."""
    found = distance.between(points, anchors).min(1)
    return found.values, found.indices


def nearest_other(points: Tensor, distance: Distance) -> Tensor:
    """(N,) float64 distance of each point to the nearest of the others, equal ones among them; (0,) of a single one."""
    if len(points) < 2:
        return torch.empty(0, dtype=torch.float64)
    return distance.between(points, points).fill_diagonal_(torch.inf).min(1).values


def apart(shots: Tensor, distance: Distance) -> Tensor:
    """(M,) ``nearest_other`` of images (N, C, H, W) uint8 that differ: a picture that is there twice is one, or
    perfect copies would be no copies, as none is nearer than 0."""
    different = torch.unique(shots.flatten(1), dim=0).view(-1, *shots.shape[1:])
    return nearest_other(distance.points(different), distance)


@dataclass(frozen=True)
class Memorisation:
    """How near samples lie to the images trained on, beside fresh real images."""

    ratio: Estimate
    """Mean distance to the nearest shot over that of held-out real images: 0 copies, about 1 fresh images."""
    share: Estimate
    """Share of samples no farther from a shot than ``NEAR`` of the held-out images are: ``NEAR`` is chance."""


def memorisation(samples: Tensor, shots: Tensor, held_out: Tensor, distance: Distance) -> Memorisation:
    """Nearest-shot distances of samples beside those of held-out real images, all (n, C, H, W) uint8.

    In the spirit of authenticity (Alaa et al., 2102.08921), whose yardstick, how far a training image is from the
    next one, says little with a few of them: here held-out images of the same domain are the yardstick. Where there
    are none, it is all there is; where all shots are one picture nothing is known, and both figures are null.

    Raises:
        ValueError: images that are not uint8.
    """
    anchors = distance.points(shots)
    others = len(held_out) > 0
    real = nearest(distance.points(held_out), anchors, distance)[0] if others else apart(shots, distance)
    return nearness(nearest(distance.points(samples), anchors, distance)[0], real)


def nearness(samples: Tensor, real: Tensor, quantile: float = NEAR) -> Memorisation:
    """``memorisation`` from (N,) and (M,) distances to the nearest shot; intervals over the samples, the real given.
    Null where there are no real ones."""
    if not len(real):
        return Memorisation(Estimate(value=None), Estimate(value=None))
    mean, bound = float(real.mean()), float(torch.quantile(real, quantile))
    ratio = mean_interval(samples / mean) if mean > 0 else Estimate(value=None)
    return Memorisation(ratio, proportion(int((samples <= bound).sum()), len(samples)))
