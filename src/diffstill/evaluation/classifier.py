"""A small classifier trained on the data set itself: features for data that Inception has never seen the like of.

It is trained on the training split only, from a fixed seed, so two runs on one data set measure with one network;
its weights' hash is part of every protocol. Its numbers are Frechet distances in *its* features, never FIDs.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.dataset import ImageData, to_float
from ..models.denoiser import measuring
from ..models.lineage import weights_sha256
from .processes import broadcast_module, process_index, sum_over_processes

if TYPE_CHECKING:
    from ..data.sources import DataSplits

ARCHITECTURE = "resnet-gn-1"
"""Part of the cache key: change it whenever the network or its training changes."""
FEATURES = 64
SEED = 0


class _Block(nn.Module):
    """Two 3x3 convolutions with a residual path; halves the resolution when ``stride`` is 2."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, outside)
        self.skip = nn.Identity() if (inside, stride) == (outside, 1) else nn.Conv2d(inside, outside, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x)))))
        return F.silu(hidden + self.skip(x))


class Classifier(nn.Module):
    """Residual blocks down to about 4x4, a 2x2 pool that keeps coarse layout, 64 features, one linear layer.

    Args:
        shape: (C, H, W) of the images.
        num_classes: number of logits.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        halvings = max(0, (min(height, width) // 4).bit_length() - 1)
        widths = [32 * 2 ** min(level, 2) for level in range(halvings + 1)]
        self.stem = nn.Conv2d(channels, widths[0], 3, 1, 1)
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.blocks = nn.Sequential(*[_Block(a, b, 2 if i else 1) for i, (a, b) in enumerate(pairs)])
        self.embed = nn.Linear(4 * widths[-1], FEATURES)
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """(B, 64) float32 of images (B, C, H, W) float in [-1, 1]."""
        pooled = F.adaptive_avg_pool2d(self.blocks(F.silu(self.stem(images))), 2)
        return F.silu(self.embed(pooled.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        return self.head(self.features(images))


@dataclass(frozen=True)
class Trained:
    """A classifier in eval mode and its accuracy on the held-out test images (None where there are none)."""

    network: Classifier
    accuracy: float | None


def train_classifier(
    data: DataSplits,
    device: torch.device,
    *,
    seed: int = SEED,
    epochs: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Trained:
    """Trains on ``data.train`` alone: AdamW, one-cycle, label smoothing 0.1, shifts of up to 1/8 and pixel noise.

    On a CPU, the same thread count and torch give the same weights; no global random state is read or changed.

    Args:
        epochs: None chooses about 30,000 images for small sets and 10 epochs for large ones.
        progress: called with the share of the training that is done, in [0, 1], before it and after each step.
    """
    tell = progress or (lambda done: None)
    train, batch = data.train, 128
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(data.shape, data.num_classes).to(device)
    epochs = epochs or min(60, max(10, 30_000 // len(train)))
    per_epoch = -(-len(train) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * per_epoch, pct_start=0.2)
    tell(0.0)
    for epoch in range(epochs):
        for step, index in enumerate(torch.randperm(len(train), generator=generator).split(batch), start=1):
            images = _augment(to_float(train.images[index]), generator).to(device)
            loss = F.cross_entropy(network(images), train.labels[index].to(device), label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            tell((epoch + step / per_epoch) / epochs)
    network.eval().requires_grad_(False)
    return Trained(network, accuracy(network, data.test, device))


def accuracy(network: nn.Module, data: ImageData, device: torch.device, batch: int = 512) -> float | None:
    """Share of ``data`` classified right, in [0, 1]; None for an empty split."""
    if len(data) == 0:
        return None
    right = 0
    with measuring(device):
        for images, labels in zip(data.images.split(batch), data.labels.split(batch), strict=True):
            right += int((network(to_float(images).to(device)).argmax(1).cpu() == labels).sum())
    return right / len(data)


def cached_classifier(
    data: DataSplits,
    cache_dir: Path,
    device: torch.device,
    *,
    seed: int = SEED,
    progress: Callable[[float], None] | None = None,
) -> Trained:
    """The classifier of this data set from the cache, or trained now and put there.

    The file is named by data, architecture and seed and written atomically; a damaged one is replaced. With several
    processes, process 0 does the work and the others receive its weights. ``progress`` is ``train_classifier``'s.
    """
    path = cache_dir / f"classifier-{data.fingerprint()}-{ARCHITECTURE}-{seed}.safetensors"
    if process_index() == 0:
        trained = _load(path, data)
        if trained is None:
            trained = train_classifier(data, device, seed=seed, progress=progress)
            with suppress(OSError):  # a cache that cannot be written costs seconds next time, not this evaluation
                _save(path, trained)
    else:
        trained = Trained(Classifier(data.shape, data.num_classes).eval().requires_grad_(False), None)
    network = trained.network.to(device)
    broadcast_module(network)
    known = trained.accuracy if trained.accuracy is not None else -1.0
    told = float(sum_over_processes(torch.tensor(known if process_index() == 0 else 0.0, dtype=torch.float64)))
    return Trained(network, told if told >= 0 else None)


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts each image by up to 1/8 of its side (edges repeated) and adds pixel noise of sd 0.05."""
    n, _, height, width = images.shape
    reach = max(1, min(height, width) // 8)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * reach + 1, (2, n), generator=generator)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    channels = torch.arange(images.shape[1])[None, :, None, None]
    shifted = padded[torch.arange(n)[:, None, None, None], channels, rows, columns]
    return shifted + 0.05 * torch.randn(shifted.shape, generator=generator)


def _save(path: Path, trained: Trained) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in trained.network.state_dict().items()}
    facts = {"accuracy": trained.accuracy, "architecture": ARCHITECTURE, "sha256": weights_sha256(trained.network)}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        beside = Path(folder) / path.name
        save_file(tensors, beside, metadata={"diffstill": json.dumps(facts)})
        os.replace(beside, path)


def _load(path: Path, data: DataSplits) -> Trained | None:
    """None where the file is missing, damaged, or does not hold what its name says."""
    network = Classifier(data.shape, data.num_classes)
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["diffstill"])
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        share = facts["accuracy"]
        intact = weights_sha256(network) == facts["sha256"] and (share is None or 0 <= share <= 1)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
        return None
    return Trained(network.eval().requires_grad_(False), share) if intact else None
