"""``load_data``: open, number the classes, split, settle the form, and only then decode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from ...errors import InputError
from ..dataset import ImageData
from .folder import open_folder
from .labels import one_numbering
from .npz import open_npz
from .parts import ArrayPart, BadImages, Part
from .pixels import Looks, PixelFormat, Pixels
from .spec import DataSpec, Location, files_of, inside, locate
from .splits import DataSplits, Index, stratified_split, stratified_subset
from .tables import open_hub, open_parquet

HELD_OUT = ("val", "test")


def load_data(spec: DataSpec, cache_dir: str | Path | None = None) -> DataSplits:
    """The images of ``spec`` in memory, as three splits of one form.

    Splits that the source has are kept, in its order; a missing one is carved off the training images, stratified.
    Which image goes where follows from the labels and ``spec.split_seed`` alone.

    Args:
        cache_dir: where ``hub:`` downloads go; None: the default of ``datasets``.

    Raises:
        InputError: whatever is wrong with the spec or the data; the field is ``data.source``, ``data.size``, ...
    """
    home = locate(spec.source, "data.source")
    parts = _open(home, spec, Path(cache_dir) if cache_dir else None)
    labels, class_names = one_numbering(parts, spec)
    plan = _plan(labels, spec)
    form = _form(parts, plan, spec)
    title, splits, skipped = spec.name or _title(home), {}, []
    for name, part in parts.items():
        chosen = {split: index for split, (source, index) in plan.items() if source == name}
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
            splits[split] = ImageData(title, split, torch.from_numpy(own), torch.from_numpy(numbers), class_names)
    if not len(splits["train"]):
        raise InputError("data.source", spec.source, "check the files", problem="has no readable training image")
    return DataSplits(**splits, spec=spec, skipped=tuple(skipped))


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
        "folder": open_folder,
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


def _plan(labels: Mapping[str, Index], spec: DataSpec) -> dict[str, tuple[str, Index]]:
    """Split -> (part it is read from, positions there)."""
    fractions = {s: 0.0 if s in labels else float(getattr(spec, f"{s}_fraction")) for s in HELD_OUT}
    train, *carved = stratified_split(labels["train"], **fractions, seed=spec.split_seed)
    plan = {"train": ("train", train)}
    for split, positions in zip(HELD_OUT, carved, strict=True):
        plan[split] = (split, np.arange(len(labels[split]))) if split in labels else ("train", positions)
    if spec.limit is not None:
        for split, (part, index) in plan.items():
            plan[split] = part, index[stratified_subset(labels[part][index], spec.limit, spec.split_seed)]
    return plan


def _form(parts: Mapping[str, Part], plan: Mapping[str, tuple[str, Index]], spec: DataSpec) -> PixelFormat:
    """The one form of all splits. Images are looked at only for what the spec leaves open."""
    looks = Looks()
    if spec.size is None or spec.channels is None or spec.crop == "none":
        for part, index in plan.values():
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
