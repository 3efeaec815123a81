"""``npz:PATH[,PATH...]``: plain arrays (or strips: see ``strips``). Nothing is ever unpickled.

Images are uint8 (N, H, W, C), (N, C, H, W) or (N, H, W); labels integers or strings, (N,) or (N, 1). One file may hold
several splits (``x_train`` and ``y_train``, ``test_images`` and ``test_labels``, ...).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...errors import InputError
from .folder import SPLITS
from .npzfile import LABEL_KEYS, NpzFile
from .parts import BadImages, BlockPart, Part, join
from .pixels import Looks, Pixels
from .spec import DataSpec, Location, files_of
from .splits import Index
from .strips import StripPart

IMAGE_KEYS = ("images", "image", "x", "X", "data", "arr_0")


class NpzPart(BlockPart):
    """An image array inside an .npz file, read a block at a time."""

    def __init__(self, file: NpzFile, image_key: str, label_key: str | None, layout: str | None) -> None:
        self.file, self.key = file, image_key
        self.origins = frozenset({f"{file.path.resolve()}:{image_key}"})
        self.axes = _channels_last(file, image_key, layout)
        shape = file.entry(image_key).shape
        if label_key is None:
            self.labels, self.labelled = np.zeros(shape[0], np.int64), False
        else:
            self.labels, self.class_names = file.labels(label_key), file.class_names(label_key)
        if shape[0] != len(self.labels):
            problem = f"holds {shape[0]} images and {len(self.labels)} labels"
            raise InputError(file.field, str(file.path), "give every image one label", problem=problem)
        self.height, self.width, self.channels = [(*shape, 1)[axis] for axis in self.axes[1:]]

    def survey(self, index: Index, looks: Looks, bad: BadImages) -> None:
        looks.add((self.width, self.height), self.channels == 3, str(self.file.path))

    def blocks(self, index: Index) -> Iterator[tuple[int, Pixels]]:
        for start, block in self.file.blocks(self.key, index):
            yield start, (block[..., None] if block.ndim == 3 else block).transpose(self.axes)


def open_npz(where: Location, spec: DataSpec) -> dict[str, Part]:
    """The parts of one or several .npz files; those of one split are joined in the order given."""
    collected: dict[str, list[Part]] = {}
    for split, files in by_split(files_of(where), where.field).items():
        for path in files:
            found = _parts_of(NpzFile(path, where.field), spec)
            for inner, part in found.items():
                collected.setdefault(inner if len(found) > 1 else split, []).append(part)
    return {split: join(parts, where.field) for split, parts in collected.items()}


def by_split(files: list[Path], field: str) -> dict[str, list[Path]]:
    """Files grouped by the word train, val or test in their names; all ``train`` where no two groups arise.

    Raises:
        InputError: some names say test (or val) and others nothing: joining them would train on test images.
    """
    groups: dict[str, list[Path]] = {}
    for path in files:
        words = [SPLITS[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in SPLITS]
        groups.setdefault(words[-1] if words else "", []).append(path)
    if len(groups) == 1 or groups.keys() == {"train", ""}:
        return {"train": files}
    if "train" not in groups or "" in groups:
        unclear = groups.get("", files)[0]
        mend = "name the files apart by data.train and data.test"
        raise InputError(
            field, str(unclear), mend, problem="lies beside held-out files without saying train, val or test"
        )
    return groups


def _parts_of(file: NpzFile, spec: DataSpec) -> dict[str, Part]:
    """The file's splits; ``train`` alone where the file has one pair of images and labels."""
    if spec.image_key is None and {"webp", "offsets"} <= file.entries.keys():
        return {"train": StripPart(file, _key(file, spec.label_key, LABEL_KEYS, "label"))}
    pairs = {} if spec.image_key or spec.label_key else _split_pairs(file)
    if not pairs:
        image = _key(file, spec.image_key, IMAGE_KEYS, "image")
        if spec.unlabelled and spec.label_key is None and not set(LABEL_KEYS) & file.entries.keys():
            return {"train": NpzPart(file, image, None, spec.layout)}
        pairs = {"train": (image, _key(file, spec.label_key, LABEL_KEYS, "label"))}
    return {split: NpzPart(file, image, label, spec.layout) for split, (image, label) in pairs.items()}


def _split_pairs(file: NpzFile) -> dict[str, tuple[str, str]]:
    """Split -> (image key, label key) of names such as ``x_train`` or ``train_images``."""

    def named(word: str, keys: tuple[str, ...]) -> str | None:
        names = (name for key in keys for name in (f"{key}_{word}", f"{word}_{key}"))
        return next((name for name in names if name in file.entries), None)

    found = {split: (named(word, IMAGE_KEYS), named(word, LABEL_KEYS)) for word, split in SPLITS.items()}
    pairs = {split: (image, label) for split, (image, label) in found.items() if image and label}
    return pairs if "train" in pairs else {}


def _key(file: NpzFile, given: str | None, known: tuple[str, ...], what: str) -> str:
    candidates = (given,) if given else known
    found = next((key for key in candidates if key in file.entries), None)
    if found is None:
        mend = f"set data.{what}_key to one of its keys: {', '.join(file.entries) or 'it has none'}"
        wanted = f"has no key {given}" if given else f"has none of the {what} keys {', '.join(known)}"
        raise InputError(file.field, str(file.path), mend, problem=wanted)
    return found


def _channels_last(file: NpzFile, key: str, layout: str | None) -> tuple[int, int, int, int]:
    """The axes that bring an array (a grey one with a last axis added) to NHWC, from its header alone."""
    entry, name = file.entry(key), file.name(key)
    if entry.dtype != np.uint8:
        mend = "store uint8 from 0 to 255, for floats in [0, 1] as np.rint(x * 255).astype(np.uint8)"
        raise InputError(file.field, name, mend, problem=f"holds {entry.dtype} values")
    shape = entry.shape
    if 0 in shape or len(shape) not in (3, 4):
        problem = f"has the shape {shape}"
        raise InputError(file.field, name, "store images as (N, H, W, C), (N, C, H, W) or (N, H, W)", problem=problem)
    if len(shape) == 3:
        return 0, 1, 2, 3
    fits = [name for name, axis in (("NHWC", 3), ("NCHW", 1)) if shape[axis] in (1, 3)]
    if layout in fits:
        fits = [layout]
    elif not fits or layout:
        problem = f"has the shape {shape}, without 1 or 3 channels{f' as {layout}' if layout else ''}"
        raise InputError(file.field, name, "store grey or RGB images as NHWC or NCHW", problem=problem)
    if len(fits) > 1:
        problem = f"does not follow from the shape {shape} of {name}"
        raise InputError("data.layout", None, "set it to NHWC or NCHW", problem=problem)
    return (0, 1, 2, 3) if fits == ["NHWC"] else (0, 2, 3, 1)
