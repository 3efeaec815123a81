"""The one in-memory form of a data set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images (N, C, H, W) uint8 and labels (N,) int64 of one split."""

    name: str
    split: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    dtype: ClassVar[torch.dtype] = torch.uint8

    def __post_init__(self) -> None:
        if self.images.dtype != self.dtype or self.images.ndim != 4:
            raise ValueError(f"images must be (N, C, H, W) {str(self.dtype).removeprefix('torch.')}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError("labels must be (N,) int64, one an image")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        c, h, w = self.images.shape[1:]
        return int(c), int(h), int(w)

    def subset(self, index: Tensor, split: str | None = None) -> ImageData:
        return replace(self, split=split or self.split, images=self.images[index], labels=self.labels[index])

    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) over shape, pixels and labels."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class LatentData(ImageData):
    """What an autoencoder makes of images: (N, C, h, w) float32 of any range, in the place of pixels."""

    dtype = torch.float32


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float in [-1, 1] -> uint8 0..255, rounded to nearest."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
