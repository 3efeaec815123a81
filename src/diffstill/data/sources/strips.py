"""The strip format: lossless WebP strips in an .npz file, far smaller than plain arrays and as exact.

Keys: ``webp`` (uint8, WebP images end to end), ``offsets`` (where each begins, and the end of the last) and ``labels``.
A strip is W wide and n W high: n square images one below the other. WebP knows no grey, so images whose three channels
are equal throughout count as grey.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from PIL import Image

from ...errors import InputError
from .npzfile import NpzFile
from .parts import BadImages, BlockPart, in_threads
from .pixels import Looks, Pixels, is_grey
from .splits import Index

SAMPLED = 4
"""Strips decoded to tell grey from colour; the others are checked when they are read."""


class StripPart(BlockPart):
    """The images of one strip file."""

    def __init__(self, file: NpzFile, label_key: str) -> None:
        self.file = file
        self.origins = frozenset({f"{file.path.resolve()}:webp"})
        self.labels, self.class_names = file.labels(label_key), file.class_names(label_key)
        with file.guarded():
            widths, heights = zip(*(Image.open(io.BytesIO(strip)).size for strip in self._strips()), strict=True)
        self.side: int = widths[0]
        counts, rest = np.divmod(heights, self.side)
        if len(set(widths)) > 1 or rest.any():
            problem = "holds strips that are not square images one below the other"
            raise InputError(file.field, file.name("webp"), "make each strip W wide and n*W high", problem=problem)
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        if self.starts[-1] != len(self.labels):
            problem = f"holds {self.starts[-1]} images and {len(self.labels)} labels"
            raise InputError(file.field, str(file.path), "give every image one label", problem=problem)

    def survey(self, index: Index, looks: Looks, bad: BadImages) -> None:
        held = self._held(index)
        sample = held[np.unique(np.linspace(0, len(held) - 1, SAMPLED).astype(int))]
        colour = not all(is_grey(block) for _, block in self._decoded(sample))
        looks.add((self.side, self.side), colour, str(self.file.path))

    def blocks(self, index: Index) -> Iterator[tuple[int, Pixels]]:
        return self._decoded(self._held(index))

    def _held(self, index: Index) -> Index:
        """The strips that hold images of ``index``."""
        return np.unique(np.searchsorted(self.starts, index, side="right") - 1)

    def _decoded(self, which: Index) -> Iterator[tuple[int, Pixels]]:
        strips = self._strips()

        def decode(k: int) -> tuple[int, Pixels]:
            with self.file.guarded(), Image.open(io.BytesIO(strips[k])) as image:
                pixels = np.asarray(image.convert("RGB"))
            return int(self.starts[k]), pixels.reshape(-1, self.side, self.side, 3)

        yield from in_threads(decode, which.tolist())

    def _strips(self) -> list[bytes]:
        content, offsets = self.file.array("webp"), self.file.array("offsets")
        if (
            content.dtype != np.uint8
            or content.ndim != 1
            or offsets.dtype.kind not in "iu"
            or offsets.ndim != 1
            or len(offsets) < 2
            or (np.diff(offsets.astype(np.int64)) <= 0).any()
            or offsets[0] < 0
            or offsets[-1] > len(content)
        ):
            problem = "does not cut webp (1-d uint8) into strips"
            mend = "store ascending integers: where each strip begins, and the end of the last"
            raise InputError(self.file.field, self.file.name("offsets"), mend, problem=problem)
        return [content[a:b].tobytes() for a, b in pairwise(offsets.tolist())]
