"""What samples are compared with: real images, as statistics and as single points in an extractor's features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from .features import Extractor, check_source_shape, extract
from .frechet import FeatureStats, frechet_estimate
from .neighbours import KernelDistance, Manifold, precision_recall
from .pixels import pixel_distance, pixel_stats
from .processes import gather_rows, share
from .results import Estimate, Protocol
from .settings import EvalSettings

if TYPE_CHECKING:
    from ..data.dataset import ImageData
    from ..data.sources import DataSplits


SLACK = 1e-5
"""Of balls around the shots and around what may be copies of them: float32 features of one image differ in their last
digits from batch to batch."""


class Reference:
    """A set of real images and the figures of samples beside it.

    The shots of a few-shot model may be all there is. Figures that so few images cannot give are null: a single image
    has no covariance, kernel distance or neighbour; with fewer than four the neighbour of precision and recall is
    the farthest there is.

    Args:
        images: of all processes; each reads its share.
        alone: these are the shots, and there are no other images of their domain.
    """

    def __init__(self, images: ImageData, extractor: Extractor, settings: EvalSettings, alone: bool = False) -> None:
        self.images, self._settings, self._alone = images, settings, alone
        self.stats, self._points = read_statistics(images.images, extractor, settings)
        known = len(self._points)
        self.neighbours = min(settings.neighbours, known - 1)
        """k of precision and recall; 0 where there is none."""
        self._slack = SLACK if alone else 0.0
        self._manifold = Manifold(self._points, self.neighbours, slack=self._slack) if self.neighbours else None
        self._kernel_distance = KernelDistance(self._points) if known > 1 else None
        self.pixels = pixel_stats(images.images)
        """Of the pixels themselves; None where they are too many."""

    def measure(self, features: Tensor, images: Tensor) -> dict[str, Estimate]:
        """The figures of all processes' samples by their names in ``ScalePoint``.

        Args:
            features: (N, dim) of all samples.
            images: (n, C, H, W) uint8, this process's.
        """
        if self._manifold is None or self._kernel_distance is None:
            return {"fd": Estimate(value=None)}
        pixels = pixel_distance(images, self.pixels)
        points = features[: self._settings.neighbour_points]
        fake = Manifold(points, self.neighbours, slack=self._slack)
        near = precision_recall(self._points, points, real_manifold=self._manifold, fake_manifold=fake)
        return {
            "fd": frechet_estimate(features, self.stats),
            "kid": self._kernel_distance.estimate(points),
            "precision": near.precision,
            "recall": near.recall,
            **({"fd_pixels": pixels} if pixels is not None else {}),
        }

    def described(self) -> str:
        """In words, for the protocol."""
        number = "1 image" if len(self.images) == 1 else f"{len(self.images)} images"
        told = f"{self.images.name} {self.images.split}, {number}"
        if not self._alone:
            return told
        told += ": the very images that were trained on, for there are no others of the domain"
        few = self.neighbours < self._settings.neighbours
        return told + (f"; k = {self.neighbours} in precision and recall" if few and self.neighbours else "")


def floors(
    test: Tensor, features: Tensor, reference: Reference, few: bool
) -> tuple[Estimate | None, Estimate | None, str]:
    """What real images score, in features and in pixels, and which ones.

    Args:
        test: (N, C, H, W) uint8 and ``features`` (N, dim) of all processes' test images; there may be none.
        few: the test images are the reference itself, so one half of them is measured against the other.
    """
    if few and not len(test):
        return None, None, "none: there are no images of the domain but those trained on"
    told = str(Protocol.model_fields["floor_of"].default)
    if few:
        (one, other), (test, rest) = halves(features), halves(test)
        told = f"half of the test images against the other half, {len(one)} and {len(other)}"
        features, stats, pixels = one, FeatureStats.of(other), pixel_stats(rest)
    else:
        stats, pixels = reference.stats, reference.pixels
    if len(test) < 2:
        return None, None, told
    mine = share(len(test))
    return frechet_estimate(features, stats), pixel_distance(test[mine.start : mine.stop], pixels), told


def halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, ...) in two halves, drawn once and for all: the order of the files may mean something."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order[: len(rows) // 2]], rows[order[len(rows) // 2 :]]


def read_statistics(images: Tensor, extractor: Extractor, settings: EvalSettings) -> tuple[FeatureStats, Tensor]:
    """Statistics of all images' features and a fixed random choice of the features themselves.

    Streamed: no process holds more features than a batch and the choice.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen = order[: settings.neighbour_points].sort().values
    mine, size = share(len(images)), settings.batch_size
    stats = FeatureStats(extractor.info.dim)
    kept = [torch.empty(0, extractor.info.dim)]
    for start in range(mine.start, mine.stop, size):
        stop = min(start + size, mine.stop)
        rows = extract(extractor, images[start:stop], size)
        stats.update(rows)
        kept.append(rows[chosen[(chosen >= start) & (chosen < stop)] - start])
    return stats.all_reduce(), gather_rows(torch.cat(kept))


def check_reference(data: DataSplits, few: bool, source: ImageData | None, neighbours: int) -> None:
    """Raises InputError where the images are too few to be a reference, or ``source`` does not fit the data."""
    reference = data.test if few else data.train
    alone = few and not len(data.test)
    if len(reference) < 2 * (neighbours + 1) and not alone:
        word, mend = "test" if few else "training", "use more images"
        if few and data.num_classes == 1:
            mend += f", or train on all of them: data.shots={len(data.train) + len(data.test)}"
        raise InputError("data", f"{data.name} with {len(reference)} {word} images", mend)
    if source is not None and not few:
        mend = "leave it out, or give data.shots"
        raise InputError("evaluation.source", source.name, mend, problem="goes with few-shot data only")
    if source is not None:
        check_source_shape(source, data)
    if source is not None and len(source) < 2:
        raise InputError("evaluation.source", f"{source.name} with {len(source)} images", "use more images")
