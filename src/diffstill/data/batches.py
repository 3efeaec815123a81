"""Which images a step sees: a pure function of (seed, images_seen), so resume needs no sampler or generator state."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from .dataset import ImageData


def stream_seed(*keys: object) -> int:
    """A 63-bit seed from any printable keys: independent streams for every (seed, purpose, images_seen)."""
    digest = hashlib.blake2b("\x1f".join(map(str, keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The permutation of 0..count-1 that epoch ``epoch`` walks through, (count,) int64."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(stream_seed(seed, "order", epoch)))


def batch_indices(count: int, seed: int, images_seen: int, batch: int) -> Tensor:
    """Indices (batch,) int64 of the images at positions ``images_seen .. images_seen + batch - 1`` of the endless
    concatenation of epochs. Every image comes once an epoch; batches may span epochs and exceed the data set."""
    parts: list[Tensor] = []
    position, left = images_seen, batch
    while left > 0:
        epoch, offset = divmod(position, count)
        part = epoch_order(count, seed, epoch)[offset : offset + left]
        parts.append(part)
        position += len(part)
        left -= len(part)
    return torch.cat(parts)


class ImageStore:
    """Images and labels where the step needs them: on the device when they fit, else in host memory.

    Args:
        resident_limit: bytes up to which the images are kept on an accelerator (CIFAR is 150 MB).
    """

    def __init__(self, data: ImageData, device: torch.device, resident_limit: int = 2 << 30) -> None:
        self.device = device
        self.resident = device.type == "cpu" or data.images.nbytes <= resident_limit
        where = device if self.resident else torch.device("cpu")
        self.images, self.labels = data.images.to(where), data.labels.to(where)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) as they are stored and labels (B,) int64 on the device."""
        if self.device.type != "cpu" and self.resident:
            # One copy for images and labels; from pinned memory it does not wait for the device.
            index = index.pin_memory() if self.device.type == "cuda" else index
            index = index.to(self.device, non_blocking=True)
        images, labels = self.images[index], self.labels[index]
        if not self.resident:
            images, labels = images.pin_memory(), labels.pin_memory()
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
