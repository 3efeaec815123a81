"""Labels as found, checked; and the one numbering of the classes over all parts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from .parts import Part
from .spec import DataSpec
from .splits import Index

UNLABELLED = "image"
"""The one class of data that says nothing of classes."""


def checked_labels(raw: NDArray[Any], where: str, field: str) -> NDArray[Any]:
    """(N,) or (N, 1) raw labels as (N,) int64 from 0, or as strings.

    Raises:
        InputError: floats (NaN among them), objects, one-hot rows, missing or negative labels.
    """
    if raw.ndim == 2 and raw.shape[1] == 1:
        raw = raw[:, 0]
    if raw.ndim != 1:
        mend = "store one class number an image (argmax of one-hot rows)"
        raise InputError(field, where, mend, problem=f"has labels of shape {raw.shape}")
    if raw.dtype.kind == "U":
        return raw
    if raw.dtype.kind not in "iu":
        mend = "store integer class numbers from 0, or class names"
        missing = raw.dtype.kind == "f" and bool(np.isnan(raw).any())
        raise InputError(field, where, mend, problem=f"has {'missing (NaN)' if missing else raw.dtype} labels")
    if len(raw) and raw.min() < 0:
        first = int(np.flatnonzero(raw < 0)[0])
        mend = "number the classes from 0; a split published without labels cannot be used"
        raise InputError(field, where, mend, problem=f"has the negative label {raw[first]} at image {first}")
    if len(raw) and raw.max() > np.iinfo(np.int32).max:
        raise InputError(field, where, "number the classes from 0", problem=f"has the label {raw.max()}")
    return raw.astype(np.int64)


def one_numbering(parts: Mapping[str, Part], spec: DataSpec) -> tuple[dict[str, Index], tuple[str, ...]]:
    """Integer labels of each part under one list of class names, the training part's.

    Raises:
        InputError: a class in a held-out part that training lacks by name, or labels that do not fit the names.
    """
    train = parts["train"]
    names = spec.class_names or train.class_names
    if train.labels.dtype.kind == "U":
        names = spec.class_names or tuple(np.unique(train.labels).tolist())
    elif spec.class_names and train.class_names and len(spec.class_names) != len(train.class_names):
        problem = f"names {len(spec.class_names)} classes where the source has {len(train.class_names)}"
        raise InputError("data.class_names", list(spec.class_names), "name them all, in order", problem=problem)
    labels = {split: _numbered(part, train, names, split) for split, part in parts.items()}
    if names is None:
        names = _counted(np.concatenate(list(labels.values())))
    for split, numbers in labels.items():
        if len(numbers) and numbers.max() >= len(names):
            problem = f"has the label {numbers.max()} where there are {len(names)} class names"
            mend = "number the classes from 0, or name them all in data.class_names"
            raise InputError(_field(split), split, mend, problem=problem)
    return labels, names


def chosen_classes(
    labels: Mapping[str, Index], names: tuple[str, ...], spec: DataSpec
) -> tuple[dict[str, Index], tuple[str, ...]]:
    """Labels and names after ``data.classes`` and ``data.unlabelled``; the label of an image that is left out is -1.

    Raises:
        InputError: a name that is no class, or no class left.
    """
    kept = _kept(names, spec.classes)
    number = np.full(len(names), -1, np.int64)
    number[kept] = 0 if spec.unlabelled else np.arange(len(kept))
    named = (UNLABELLED,) if spec.unlabelled else tuple(names[k] for k in kept)
    return {split: number[own] for split, own in labels.items()}, named


def _kept(names: tuple[str, ...], asked: tuple[str, ...] | None) -> list[int]:
    if asked is None:
        return list(range(len(names)))
    without = asked[0].startswith("-")
    found = []
    for name in (word[1:] if without else word for word in asked):
        if name not in names:
            near = difflib.get_close_matches(name, names, 3) or names[:10]
            mend = f"use some of: {', '.join(near)}; or all, by data.classes=null"
            raise InputError("data.classes", name, mend, problem="is no class of the data")
        found.append(names.index(name))
    if not without:
        return found
    if len(found) == len(names):
        raise InputError("data.classes", list(asked), "keep one or more", problem="leaves no class")
    return [k for k in range(len(names)) if k not in found]


def _numbered(part: Part, train: Part, names: tuple[str, ...] | None, split: str) -> Index:
    """The part's labels in training's numbering; classes are matched by name where both sides have names."""
    train_is_named = train.labels.dtype.kind == "U"
    reference = names if train_is_named else train.class_names
    if part.labels.dtype.kind == "U":
        own, inverse = np.unique(part.labels, return_inverse=True)
        mine = tuple(own.tolist())
    else:
        mine, inverse = part.class_names or (), part.labels
    if (train_is_named and not mine) or (part.labels.dtype.kind == "U" and reference is None):
        mend = "give all splits numbers, or all splits names"
        raise InputError(_field(split), split, mend, problem="and the training images do not both have class names")
    if not mine or reference is None or (part is train and not train_is_named) or mine == reference:
        return inverse
    if len(inverse) and inverse.max() >= len(mine):
        problem = f"has the label {inverse.max()} where there are {len(mine)} class names"
        raise InputError(_field(split), split, "number the classes from 0", problem=problem)
    place = {name: i for i, name in enumerate(reference)}
    numbers = np.array([place.get(name, -1) for name in mine], np.int64)[inverse]
    if len(numbers) and numbers.min() < 0:
        stranger = mine[int(inverse[int(np.argmin(numbers))])]
        known = ", ".join(reference[:5]) + (", ..." if len(reference) > 5 else "")
        mend = "spell classes alike in every split, or leave it out"
        raise InputError(_field(split), stranger, mend, problem=f"is not one of the training classes ({known})")
    return numbers


def _counted(labels: Index) -> tuple[str, ...]:
    """Names "0".."K-1" for labels without names; refuses a numbering that is plainly none."""
    found = np.unique(labels)
    classes = int(found[-1]) + 1 if len(found) else 0
    if len(found) and (found[0] != 0 or 2 * len(found) < classes):
        problem = f"numbers {len(found)} classes from {found[0]} to {found[-1]}"
        mend = "number them 0, 1, 2, .. or give data.class_names, one name a number"
        raise InputError("data.source", "labels", mend, problem=problem)
    return tuple(str(i) for i in range(classes))


def _field(split: str) -> str:
    return "data.test" if split == "test" else "data.source"
