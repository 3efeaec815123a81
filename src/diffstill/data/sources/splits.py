"""Stratified splitting, and the three splits together.

The shuffle sorts by a hash of (seed, position), so a split depends on no library's random generator and stays the
same across versions of numpy and torch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError, counted
from ..dataset import ImageData
from .spec import DataSpec

Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class DataSplits:
    """Train, validation and test images of one data set, in one form (C, H, W) and with one list of classes."""

    train: ImageData
    val: ImageData
    test: ImageData
    spec: DataSpec | None = None
    skipped: tuple[str, ...] = ()
    """Unreadable images left out (``skip_bad``), each with the reason."""
    labelled: bool = True
    """Whether the source says which class an image is of; of a flat folder it does not."""

    @property
    def name(self) -> str:
        return self.train.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.train.shape

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        return self.train.num_classes

    @property
    def few_shot(self) -> bool:
        """Whether the training images are a few chosen ones, and all others, if there are any, are for testing
        (``data.shots``)."""
        return self.spec is not None and self.spec.shots is not None

    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) over the three splits' fingerprints and the class names."""
        parts = (self.train, self.val, self.test)
        text = "\n".join([*(part.fingerprint() for part in parts), *self.class_names])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def left_out(self) -> str | None:
        """What is said about unreadable images; None where there were none."""
        if not self.skipped:
            return None
        return (
            f"{counted(len(self.skipped), 'unreadable image')} left out (data.skip_bad), the first: {self.skipped[0]}"
        )


def stratified_split(labels: Index, val: float, test: float, seed: int) -> tuple[Index, Index, Index]:
    """Positions of the train, validation and test images, each ascending: a partition of ``range(len(labels))``.

    The held-out splits get ``ceil(fraction * N)`` images, shared out over the classes by largest remainder: every
    class is within one image of its share. Train keeps at least one image of each class, so where many classes have
    a single image the held-out splits are smaller than asked.

    Args:
        labels: (N,) from 0.
        val, test: fractions in [0, 1) of all N; 0 gives an empty split.

    Raises:
        InputError: a fraction above 0 would leave its split empty.
    """
    n, counts = len(labels), np.bincount(labels) if len(labels) else np.zeros(1, np.int64)
    totals = {"val": _ceil(val * n), "test": _ceil(test * n)}
    takes = {"val": np.zeros_like(counts), "test": np.zeros_like(counts)}
    if sum(totals.values()) < n:
        room = np.maximum(counts - 1, 0)
        # The other split's whole share is kept free, so that the odd image of one never takes it.
        takes["test"] = apportion(counts, totals["test"], room - counts * totals["val"] // n)
        takes["val"] = apportion(counts, totals["val"], room - takes["test"])
    for split, fraction in (("test", test), ("val", val)):
        if fraction > 0 and takes[split].sum() == 0:
            mend = f"add images, or set data.{split}_fraction to 0"
            problem = f"of {n} images in {np.count_nonzero(counts)} classes leaves none to hold out"
            raise InputError(f"data.{split}_fraction", fraction, mend, problem=problem)
    rank = class_ranks(labels, seed)
    held_test = takes["test"][labels]
    held = held_test + takes["val"][labels]
    in_test, in_train = rank < held_test, rank >= held
    return np.flatnonzero(in_train), np.flatnonzero(~in_train & ~in_test), np.flatnonzero(in_test)


def stratified_subset(labels: Index, size: int, seed: int) -> Index:
    """Ascending positions of ``min(size, N)`` images, each class within one of its share."""
    if size >= len(labels):
        return np.arange(len(labels))
    counts = np.bincount(labels)
    return np.flatnonzero(class_ranks(labels, seed) < apportion(counts, size, counts)[labels])


def apportion(counts: Index, total: int, room: Index) -> Index:
    """Shares ``total`` among classes in proportion to ``counts`` by largest remainder, at most ``room`` each."""
    if total == 0:
        return np.zeros_like(counts)
    whole = int(counts.sum())
    take = np.minimum(counts * total // whole, room)
    by_remainder = np.argsort(-(counts * total % whole), kind="stable")
    open_classes = by_remainder[(take < room)[by_remainder]]
    take[open_classes[: total - int(take.sum())]] += 1
    return take


def class_ranks(labels: Index, seed: int) -> Index:
    """(N,) each image's place, from 0, in a seeded shuffle of its class."""
    order = np.lexsort((_hashes(len(labels), seed), labels))
    starts = np.concatenate([[0], np.cumsum(np.bincount(labels))])
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - starts[labels[order]]
    return ranks


def _hashes(n: int, seed: int) -> NDArray[np.uint64]:
    """The first ``n`` outputs of SplitMix64 (Steele, Lea and Flood 2014) started at a scrambled ``seed``."""

    def mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    gamma = np.uint64(0x9E3779B97F4A7C15)
    return mix(mix(np.full(1, seed, np.uint64) + gamma) + np.arange(1, n + 1, dtype=np.uint64) * gamma)


def _ceil(x: float) -> int:
    """Ceiling that forgives a float error (0.1 * 30 is 3)."""
    return math.ceil(x - 1e-9)
