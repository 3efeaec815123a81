"""Images and files of images that the tests of the data sources share."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffstill.data.sources import DataSpec, DataSplits, load_data
from diffstill.errors import InputError

WHOLE = {"val_fraction": 0.0, "test_fraction": 0.0}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def load(source: object, **options: object) -> DataSplits:
    return load_data(DataSpec(source=str(source), **options))


def refused(source: object, **options: object) -> InputError:
    with pytest.raises(InputError) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def save(path: Path, images: np.ndarray, mode: str | None = None, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(images)
    (image.convert(mode) if mode else image).save(path, **options)


def class_folders(root: Path, classes: dict[str, int], side: int = 6) -> np.ndarray:
    """PNG noise; returns the images in the order of class name, then file name."""
    images = noise(sum(classes.values()), side, side, 3)
    rest = iter(images)
    for name in sorted(classes):
        for i in range(classes[name]):
            save(root / name / f"{i:03d}.png", next(rest))
    return images


def nhwc(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def write_strips(path: Path, images: np.ndarray, labels: np.ndarray, per_strip: int, **extra: object) -> None:
    encoded = []
    for start in range(0, len(images), per_strip):
        strip = images[start : start + per_strip]
        file = io.BytesIO()
        Image.fromarray(strip.reshape(-1, *strip.shape[2:])).save(file, "WEBP", lossless=True, exact=True)
        encoded.append(file.getvalue())
    offsets = np.cumsum([0, *map(len, encoded)])
    np.savez(path, webp=np.frombuffer(b"".join(encoded), np.uint8), offsets=offsets, labels=labels, **extra)
