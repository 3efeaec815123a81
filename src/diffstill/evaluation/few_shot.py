"""Figures of a model made from a few images: diversity, memorisation and forgetting, beside those of real images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .distances import Distance, FeatureDistance
from .diversity import NEAR, PER_CLUSTER, PROTOCOL, apart, cluster_diversity, nearest, nearness
from .features import Extractor
from .frechet import FeatureStats, frechet_estimate
from .intervals import pool
from .processes import gather_rows, share
from .results import EACH_OTHER, HELD_OUT, NOTHING, Estimate, FewShot, FewShotProtocol

if TYPE_CHECKING:
    from ..data.dataset import ImageData


class FewShotFigures:
    """Measures samples against the few images (the shots), held-out images of their domain and the source's.

    Without held-out images nothing is known of how varied the domain is, and copies are told by how near the shots
    lie to each other; of a single one not even that.

    Args:
        held_out: none, where the shots are all the images there are.
        features: (N, dim) of ``held_out``, in its order.
        source: the source domain's images and the statistics of their features.
    """

    def __init__(
        self,
        shots: ImageData,
        held_out: ImageData,
        features: Tensor,
        extractor: Extractor,
        distance: Distance,
        source: tuple[ImageData, FeatureStats] | None = None,
    ) -> None:
        self.shots, self._extractor, self._distance = shots, extractor, distance
        self._anchors = distance.points(shots.images)
        self._source, near_of = source[1] if source else None, HELD_OUT
        self._real_source: Estimate | None = None
        if len(held_out):
            mine = share(len(held_out))
            real = self._points(held_out.images[mine.start : mine.stop], features)
            # Files may be sorted; the members of a cluster that are looked at are the first ones.
            real = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]
            self._real_near = nearest(real, self._anchors, distance)[0]
            self._real_diversity = cluster_diversity(real, self._anchors, distance).value
            self._real_source = frechet_estimate(features, source[1]) if source else None
        else:
            self._real_near = apart(shots.images, distance)
            self._real_diversity = Estimate(value=None)
            near_of = EACH_OTHER if len(self._real_near) else NOTHING
        self.protocol = FewShotProtocol(
            shots=len(shots),
            shots_sha256=shots.fingerprint(),
            diversity=PROTOCOL,
            per_cluster=PER_CLUSTER,
            near=NEAR,
            near_of=near_of,
            distance=distance.name,
            distance_sha256=distance.sha256,
            source=f"{source[0].name} {source[0].split}, {len(source[0])} images" if source else None,
            source_sha256=source[0].fingerprint() if source else "",
        )

    def measure(self, images: Tensor, features: Tensor) -> FewShot:
        """The figures of one set of samples.

        Args:
            images: (n, C, H, W) uint8, this process's.
            features: (N, dim) of all images.
        """
        points = self._points(images, features)
        diversity = cluster_diversity(points, self._anchors, self._distance)
        copies = nearness(nearest(points, self._anchors, self._distance)[0], self._real_near)
        return FewShot(
            diversity=diversity.value,
            real_diversity=self._real_diversity,
            diversity_share=_over(diversity.value, self._real_diversity.value),
            empty_clusters=diversity.empty,
            singleton_clusters=diversity.singletons,
            cluster_sizes=list(diversity.sizes),
            memorised=copies.share,
            nearest_ratio=copies.ratio,
            source_fd=frechet_estimate(features, self._source) if self._source else None,
            target_source_fd=self._real_source,
        )

    def nearest(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """For images (n, C, H, W) uint8: (n,) the distance to the nearest shot, in units of the mean one of the
        protocol's ``near_of``, or as it is where that is nothing, and (n,) which shot that is. For one process alone.
        """
        found, which = nearest(self._distance.points(images), self._anchors, self._distance)
        return found / self._real_near.mean() if len(self._real_near) else found, which

    def _points(self, images: Tensor, features: Tensor) -> Tensor:
        """Points of all processes' images; features that are there already are not extracted again."""
        known = isinstance(self._distance, FeatureDistance) and self._distance.extractor is self._extractor
        return features if known else gather_rows(self._distance.points(images))


def pooled(found: Sequence[FewShot]) -> FewShot:
    """One block from one block a sampling seed: estimates are pooled as all others, clusters counted together."""
    first = found[0]
    source = [each.source_fd for each in found if each.source_fd is not None]
    return FewShot(
        diversity=pool([each.diversity for each in found]),
        real_diversity=first.real_diversity,
        diversity_share=pool([each.diversity_share for each in found]),
        empty_clusters=sum(each.empty_clusters for each in found) / len(found),
        singleton_clusters=sum(each.singleton_clusters for each in found) / len(found),
        cluster_sizes=[sum(sizes) for sizes in zip(*(each.cluster_sizes for each in found), strict=True)],
        memorised=pool([each.memorised for each in found]),
        nearest_ratio=pool([each.nearest_ratio for each in found]),
        source_fd=pool(source) if source else None,
        target_source_fd=first.target_source_fd,
    )


def repeated(shots: ImageData, count: range) -> Tensor:
    """Images ``count`` (n, C, H, W) of the endless repetition of the shots, with the labels that samples have: image
    i is a shot of class ``i mod num_classes``, the shots of a class in turn."""
    places = [torch.nonzero(shots.labels == label).flatten().tolist() for label in range(shots.num_classes)]
    places = [found for found in places if found]
    index = [(own := places[i % len(places)])[i // len(places) % len(own)] for i in count]
    return shots.images[torch.tensor(index, dtype=torch.int64)]


def _over(found: Estimate, whole: float | None) -> Estimate:
    if not whole:
        return Estimate(value=None)
    value, low, high = (None if x is None else x / whole for x in (found.value, found.low, found.high))
    return Estimate(value=value, low=low, high=high, level=found.level)
