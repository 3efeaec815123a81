"""``load_data``: open, number the classes, split, settle the form, and only then decode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ..dataset import ImageData
from .folder import open_folder
from .labels import chosen_classes, one_numbering
from .npz import open_npz
from .parts import ArrayPart, BadImages, Part
from .pixels import Looks, PixelFormat, Pixels
from .spec import DataSpec, Location, files_of, inside, locate
from .splits import DataSplits, Index, class_ranks, stratified_split, stratified_subset
from .tables import open_hub, open_parquet

HELD_OUT = ("val", "test")
Plan = dict[str, dict[str, Index]]
"""Split -> part it is read from -> positions there."""


def load_data(spec: DataSpec, cache_dir: str | Path | None = None) -> DataSplits:
    """The images of ``spec`` in memory, as three splits of one form.

    Splits that the source has are kept, in its order; a missing one is carved off the training images, stratified.
    Which image goes where follows from the labels and ``spec.split_seed`` alone: leaving classes or their names out
    moves no image from one split to another. With ``shots`` all images that are not trained on are for testing; of
    data that has no others the test split is empty.

    Args:
        cache_dir: where ``hub:`` downloads go; None: the default of ``datasets``.

    Raises:
        InputError: whatever is wrong with the spec or the data; the field is ``data.source``, ``data.size``, ...
    """
    home = locate(spec.source, "data.source")
    parts = _open(home, spec, Path(cache_dir) if cache_dir else None)
    source_labels, source_names = one_numbering(parts, spec)
    labels, class_names = chosen_classes(source_labels, source_names, spec)
    plan = _plan(source_labels, labels, class_names, spec)
    form = _form(parts, plan, spec)
    pieces: dict[str, list[tuple[Pixels, Index]]] = {split: [] for split in plan}
    skipped: list[str] = []
    for name, part in parts.items():
        chosen = {split: where[name] for split, where in plan.items() if name in where}
        images, bad = _decoded(part, np.concatenate(list(chosen.values())), form, spec)
        skipped += list(bad.values())
        start = 0
        for split, index in chosen.items():
            # Splits are views of one array, unless images were left out.
            keep = np.array([row not in bad for row in range(start, start + len(index))], bool) if bad else None
            own, numbers = images[start : start + len(index)], labels[name][index]
            start += len(index)
            if keep is not None:
                own, numbers = own[keep], numbers[keep]
            pieces[split].append((own, numbers))
    title = spec.name or _title(home)
    splits = {split: ImageData(title, split, *_joined(found), class_names) for split, found in pieces.items()}
    if not len(splits["train"]):
        raise InputError("data.source", spec.source, "check the files", problem="has no readable training image")
    if skipped and (empty := sorted(set(range(len(class_names))) - set(splits["train"].labels.tolist()))):
        problem = f"has no readable training image of class {class_names[empty[0]]!r}"
        raise InputError("data.source", spec.source, "check the files, or leave the class out", problem=problem)
    labelled = all(part.labelled for part in parts.values())
    return DataSplits(**splits, spec=spec, skipped=tuple(skipped), labelled=labelled)


def whole_source(data: DataSplits) -> DataSplits:
    """All images and classes of the source that ``data`` was chosen from, in the same form, by ``split_seed``; itself
    where no class, label or image was left out (``classes``, ``unlabelled``, ``shots``). A source without labels of
    its own stays one class; of its training images none are held out: they may be too few to split."""
    spec = data.spec
    if spec is None or not (spec.relabelled or data.few_shot):
        return data
    channels, size, _ = data.shape
    every: dict[str, Any] = {"classes": None, "unlabelled": False, "shots": None, "size": size, "channels": channels}
    if not data.labelled:
        every |= {"unlabelled": True, "val_fraction": 0.0, "test_fraction": 0.0}
    return load_data(spec.model_copy(update=every))


def digits() -> ArrayPart:
    """The 1,797 handwritten digits that come with scikit-learn: (8, 8) grey, 0..16 brought to 0..255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    return ArrayPart(images, bunch.target.astype(np.int64), tuple(map(str, range(10))), "digits")


def _open(home: Location, spec: DataSpec, cache_dir: Path | None) -> dict[str, Part]:
    """The source's parts by split, with those that ``data.train`` and ``data.test`` name in their place."""
    if home.kind == "hub":
        return open_hub(home, spec, cache_dir)
    openers: Mapping[str, Callable[[Location], dict[str, Part]]] = {
        "digits": lambda _: {"train": digits()},
        "folder": lambda where: open_folder(where, spec.unlabelled),
        "npz": lambda where: open_npz(where, spec),
        "parquet": lambda where: open_parquet(where, spec),
        "hub": lambda where: open_hub(where, spec.model_copy(update={"train": None, "test": None}), cache_dir),
    }
    named = {split: text for split in ("train", "test") if (text := getattr(spec, split)) is not None}
    if named and home.kind == "digits":
        split, text = next(iter(named.items()))
        raise InputError(
            f"data.{split}", text, "leave it out", problem="does not go with digits, which come in one piece"
        )
    if "train" in named and not Path(home.path).expanduser().is_dir():
        mend = "leave it out, or make data.source the folder that holds the parts"
        raise InputError("data.train", spec.train, mend, problem="does not go with a source that names files")
    parts = {} if "train" in named else openers[home.kind](home)
    for split, text in named.items():
        where = inside(home, text, f"data.{split}")
        found = openers[where.kind](where)
        parts[split] = found[split] if split in found else found["train"]
    for split in HELD_OUT:
        shared = parts["train"].origins & parts[split].origins if split in parts else frozenset()
        if shared:
            mend = "name other images, and the training ones by data.train"
            raise InputError(f"data.{split}", min(shared), mend, problem="is among the training images too")
    return parts


def _plan(
    source: Mapping[str, Index], labels: Mapping[str, Index], class_names: tuple[str, ...], spec: DataSpec
) -> Plan:
    """Which image goes where.

    Args:
        source: labels of each part as the source has them; splits and ``limit`` are stratified by these.
        labels: those after the choice of classes, -1 for images that are left out.
    """
    plan = _split(source, labels, spec) if spec.shots is None else _few(labels, class_names, spec.shots, spec)
    if spec.limit is not None:
        for split in plan if spec.shots is None else ("test",):
            where = plan[split]
            together = np.concatenate([source[part][index] for part, index in where.items()])
            keep = np.isin(np.arange(len(together)), stratified_subset(together, spec.limit, spec.split_seed))
            ends = np.cumsum([len(index) for index in where.values()])[:-1]
            own = np.split(keep, ends)
            plan[split] = {part: index[k] for (part, index), k in zip(where.items(), own, strict=True)}
    return plan


def _split(source: Mapping[str, Index], labels: Mapping[str, Index], spec: DataSpec) -> Plan:
    fractions = {s: 0.0 if s in source else float(getattr(spec, f"{s}_fraction")) for s in HELD_OUT}
    train, *carved = stratified_split(source["train"], **fractions, seed=spec.split_seed)
    plan = {"train": {"train": train}}
    for split, positions in zip(HELD_OUT, carved, strict=True):
        plan[split] = {split: np.arange(len(source[split]))} if split in source else {"train": positions}
    return {
        split: {part: index[labels[part][index] >= 0] for part, index in where.items()} for split, where in plan.items()
    }


def _few(labels: Mapping[str, Index], class_names: tuple[str, ...], shots: int, spec: DataSpec) -> Plan:
    """``shots`` images of each class to train on, from the source's training part; all others are for testing, and
    there may be none.

    Raises:
        InputError: a class of fewer images.
    """
    every = {part: np.flatnonzero(own >= 0) for part, own in labels.items()}
    train = every["train"]
    numbers = labels["train"][train]
    counts = np.bincount(numbers, minlength=len(class_names))
    least = int(counts.argmin())
    if counts[least] < shots:
        problem = f"is more than the training images of class {class_names[least]}"
        known = int(counts[least])
        mend = f"there is 1; set data.shots={known}" if known == 1 else f"there are {known}"
        mend += f"; set data.shots={known}, or fewer" if known > 1 else ""
        mend += ", or leave data.shots out"
        raise InputError("data.shots", shots, mend, problem=problem)
    few = class_ranks(numbers, spec.split_seed) < shots
    every["train"] = train[~few]
    return {"train": {"train": train[few]}, "val": {"train": train[:0]}, "test": every}


def _joined(pieces: list[tuple[Pixels, Index]]) -> tuple[Tensor, Tensor]:
    """Images and labels as tensors; those of one part stay a view."""
    if len(pieces) == 1:
        images, labels = pieces[0]
    else:
        images, labels = (np.concatenate(each) for each in zip(*pieces, strict=True))
    return torch.from_numpy(images), torch.from_numpy(labels)


def _form(parts: Mapping[str, Part], plan: Plan, spec: DataSpec) -> PixelFormat:
    """The one form of all splits. Images are looked at only for what the spec leaves open."""
    looks = Looks()
    if spec.size is None or spec.channels is None or spec.crop == "none":
        for where in plan.values():
            for part, index in where.items():
                if len(index):
                    parts[part].survey(index, looks, BadImages(spec.skip_bad))
        if not looks.sizes:
            raise InputError("data.source", spec.source, "check the files", problem="has no readable image")
    return looks.settle(spec)


def _decoded(part: Part, index: Index, form: PixelFormat, spec: DataSpec) -> tuple[Pixels, dict[int, str]]:
    """(n, C, S, S) of the images ``index``, and which rows hold none because the image is unreadable."""
    images, bad = np.empty((len(index), *form.shape), np.uint8), BadImages(spec.skip_bad)
    if len(index):
        part.read(index, np.arange(len(index)), form, images, bad)
    return images, bad.rows


def _title(home: Location) -> str:
    """A short name for reports."""
    if home.kind == "digits":
        return "digits"
    if home.kind == "hub":
        return home.path.rstrip("/").split("/")[-1]
    path = Path(home.path).expanduser()
    if home.kind == "folder" or path.is_dir():
        return path.resolve().name
    files = files_of(home)
    return files[0].stem if len(files) == 1 else files[0].resolve().parent.name
