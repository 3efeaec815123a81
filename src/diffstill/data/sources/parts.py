"""A part: one split (or file) of a source, its labels known and its images not yet decoded.

Labels come first, so that splitting and ``limit`` decide which images are decoded at all; each image is then
written straight into its place in the one array that holds the data set.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from .pixels import Blob, Looks, PixelFormat, Pixels, decode, look
from .splits import Index

T = TypeVar("T")
R = TypeVar("R")
WINDOW = 256
"""Images in flight between threads and array: bounds the memory of encoded data."""


def in_threads(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results in order. Items are drawn in the calling thread, a window at a time (Pillow decodes without the GIL)."""
    rest = iter(items)
    while window := list(islice(rest, WINDOW)):
        # No pool is open while a result is out: that of an iterator given up halfway would be joined by the garbage
        # collector, and where that runs inside the start of another thread the two wait for each other for ever.
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            results = list(pool.map(work, window))
        yield from results


class BadImages:
    """Unreadable images: the first one ends the loading, unless they are to be skipped."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.rows: dict[int, str] = {}
        """Row of the array -> which image, and why."""

    def add(self, row: int, where: str, why: Exception) -> None:
        reason = f"{type(why).__name__}: {why}".split("\n")[0]
        if not self.skip:
            mend = "replace or remove it, or set data.skip_bad to true to leave such images out"
            raise InputError("data.source", where, mend, problem=f"is not a readable image ({reason})")
        self.rows[row] = f"{where} ({reason})"


class Part(ABC):
    """Labelled images of one split.

    Attributes:
        labels: (N,) int64 from 0, or (N,) strings that name the classes.
        class_names: the names of integer labels, where the source has them.
        origins: resolved files or folders that the images lie in, to notice a test set that overlaps the training set.
        labelled: whether the source says which class an image is of.
    """

    labels: NDArray[Any]
    class_names: tuple[str, ...] | None = None
    origins: frozenset[str] = frozenset()
    labelled: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def survey(self, index: Index, looks: Looks, bad: BadImages) -> None:
        """Adds what the images ``index`` look like to ``looks``, as cheaply as the format allows."""

    @abstractmethod
    def read(self, index: Index, rows: Index, form: PixelFormat, out: Pixels, bad: BadImages) -> None:
        """Writes image ``index[k]`` to ``out[rows[k]]``; ``out`` is (>= n, C, S, S) of ``form``."""


class EncodedPart(Part):
    """Images that are encoded one by one: files, or bytes in a table."""

    @abstractmethod
    def blob(self, i: int) -> Blob:
        """Image ``i`` as encoded. Called with ascending ``i``."""

    @abstractmethod
    def where(self, i: int) -> str:
        """How messages name image ``i``."""

    def survey(self, index: Index, looks: Looks, bad: BadImages) -> None:
        for _, where, found in self._each(index, np.arange(len(index)), look, bad):
            looks.add(*found, where)

    def read(self, index: Index, rows: Index, form: PixelFormat, out: Pixels, bad: BadImages) -> None:
        for row, _, pixels in self._each(index, rows, lambda blob: decode(blob, form), bad):
            out[row] = pixels

    def _each(
        self, index: Index, rows: Index, work: Callable[[Blob], R], bad: BadImages
    ) -> Iterator[tuple[int, str, R]]:
        """(row, name, result) of the images that ``work`` gets through; the others go to ``bad``."""

        def attempt(blob: Blob | Exception) -> R | Exception:
            if isinstance(blob, Exception):
                return blob
            try:
                return work(blob)
            except InputError:
                raise
            except Exception as error:  # a broken file makes Pillow's decoders raise almost anything
                return error

        order = np.argsort(index, kind="stable")
        results = in_threads(attempt, (self._blob_or_error(int(i)) for i in index[order]))
        for row, i, result in zip(rows[order].tolist(), index[order].tolist(), results, strict=True):
            if isinstance(result, Exception):
                bad.add(row, self.where(i), result)
            else:
                yield row, self.where(i), result

    def _blob_or_error(self, i: int) -> Blob | Exception:
        try:
            return self.blob(i)
        except (OSError, ValueError) as error:
            return error


class BlockPart(Part):
    """Images that come as arrays (n, H, W, C), a block at a time."""

    @abstractmethod
    def blocks(self, index: Index) -> Iterator[tuple[int, Pixels]]:
        """(position of the first image, block) of the blocks that hold an image of the ascending ``index``."""

    def read(self, index: Index, rows: Index, form: PixelFormat, out: Pixels, bad: BadImages) -> None:
        order = np.argsort(index, kind="stable")
        ascending = index[order]
        for start, block in self.blocks(ascending):
            low, high = np.searchsorted(ascending, [start, start + len(block)])
            out[rows[order[low:high]]] = form.fit_block(block[ascending[low:high] - start])


class ArrayPart(BlockPart):
    """Images in memory, (N, H, W, C) uint8."""

    def __init__(self, images: Pixels, labels: Index, class_names: tuple[str, ...] | None, where: str) -> None:
        self.images, self.labels, self.class_names, self.where = images, labels, class_names, where

    def survey(self, index: Index, looks: Looks, bad: BadImages) -> None:
        _, height, width, channels = self.images.shape
        looks.add((width, height), channels == 3, self.where)

    def blocks(self, index: Index) -> Iterator[tuple[int, Pixels]]:
        yield 0, self.images


class JoinedPart(Part):
    """Parts one after another, as one."""

    def __init__(self, parts: list[Part], field: str) -> None:
        self.parts = parts
        names = {part.class_names for part in parts} - {None}
        kinds = {part.labels.dtype.kind for part in parts}
        if len(names) > 1 or len(kinds) > 1:
            mend = "give files that number or name their classes alike"
            raise InputError(field, sorted(self.origins_of(parts)), mend, problem="do not agree on the classes")
        self.class_names = names.pop() if names else None
        self.labels = np.concatenate([part.labels for part in parts])
        self.origins = self.origins_of(parts)
        self.starts = np.cumsum([0, *map(len, parts)])

    @staticmethod
    def origins_of(parts: list[Part]) -> frozenset[str]:
        empty: frozenset[str] = frozenset()
        return empty.union(*(part.origins for part in parts))

    def survey(self, index: Index, looks: Looks, bad: BadImages) -> None:
        for part, inner, _ in self._each(index, index):
            part.survey(inner, looks, bad)

    def read(self, index: Index, rows: Index, form: PixelFormat, out: Pixels, bad: BadImages) -> None:
        for part, inner, at in self._each(index, rows):
            part.read(inner, at, form, out, bad)

    def _each(self, index: Index, rows: Index) -> Iterator[tuple[Part, Index, Index]]:
        for part, start in zip(self.parts, self.starts, strict=False):
            mine = (index >= start) & (index < start + len(part))
            if mine.any():
                yield part, index[mine] - start, rows[mine]


def join(parts: list[Part], field: str) -> Part:
    """The parts as one; a single part stays itself."""
    return parts[0] if len(parts) == 1 else JoinedPart(parts, field)
