"""``parquet:PATH`` and ``hub:NAME``: tables with an image and a label column. pyarrow and datasets are optional."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError, install
from .folder import SPLITS
from .labels import checked_labels
from .npz import by_split
from .parts import EncodedPart, Part, join
from .pixels import Blob
from .spec import DataSpec, Location, files_of

IMAGE_COLUMNS = ("image", "img", "images", "picture", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls", "y")


class ParquetPart(EncodedPart):
    """One .parquet file: encoded images as bytes or as struct {bytes, path}; labels integers or strings."""

    def __init__(self, path: Path, spec: DataSpec, field: str) -> None:
        arrow, parquet = _pyarrow(field)
        self.path = path
        self.origins = frozenset({str(path.resolve())})
        try:
            self.file = parquet.ParquetFile(path)
            types = {column.name: column.type for column in self.file.schema_arrow}
            pictures = [name for name, kind in types.items() if _holds_bytes(kind, arrow.types)]
            self.column = choose("image", pictures, list(types), IMAGE_COLUMNS, spec.image_key, str(path))
            others = [name for name in types if name != self.column]
            label = choose("label", others, others, LABEL_COLUMNS, spec.label_key, str(path))
            values = self.file.read(columns=[label]).column(label)
        except (OSError, arrow.ArrowException) as error:
            problem = f"cannot be read as parquet ({error})".split("\n")[0]
            raise InputError(field, str(path), "check the file, or write it again", problem=problem) from None
        integers = arrow.types.is_integer(values.type)
        raw = values.to_numpy() if integers else np.array(values.to_pylist())
        self.labels = checked_labels(raw, f"{path}:{label}", field)
        self.class_names = _hf_class_names(self.file.schema_arrow.metadata, label)
        counts = [self.file.metadata.row_group(g).num_rows for g in range(self.file.num_row_groups)]
        self.starts = np.cumsum([0, *counts])
        self.group = -1
        self.values: Any = None

    def blob(self, i: int) -> Blob:
        group = int(np.searchsorted(self.starts, i, side="right")) - 1
        if group != self.group:
            self.values = None  # freed before the next group is read
            self.group, self.values = group, self.file.read_row_group(group, columns=[self.column]).column(0)
        return _content(self.values[i - int(self.starts[group])].as_py())

    def where(self, i: int) -> str:
        return f"{self.path} row {i}"


class HubPart(EncodedPart):
    """One split of a ``datasets`` dataset."""

    def __init__(self, dataset: Any, split: str, name: str, spec: DataSpec, field: str) -> None:
        import datasets

        self.name = f"{name} {split}"
        features = dataset.features
        pictures = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
        self.column = choose("image", pictures, list(features), IMAGE_COLUMNS, spec.image_key, self.name)
        others = [key for key in features if key not in pictures]
        label = choose("label", others, others, LABEL_COLUMNS, spec.label_key, self.name)
        self.labels = checked_labels(np.array(dataset[label][:]), f"{self.name}:{label}", field)
        names = getattr(features[label], "names", None)
        self.class_names = tuple(names) if names else None
        self.dataset = dataset.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))

    def blob(self, i: int) -> Blob:
        return _content(self.dataset[i][self.column])

    def where(self, i: int) -> str:
        return f"{self.name} row {i}"


def open_parquet(where: Location, spec: DataSpec) -> dict[str, Part]:
    """The parts of one or several .parquet files, grouped by the word train, val or test in their names."""
    groups = by_split(files_of(where), where.field)
    return {
        split: join([ParquetPart(path, spec, where.field) for path in files], where.field)
        for split, files in groups.items()
    }


def open_hub(where: Location, spec: DataSpec, cache_dir: Path | None) -> dict[str, Part]:
    """The splits of a hub data set or of a ``save_to_disk`` folder; ``data.train`` and ``data.test`` name them."""
    splits = _load(where, cache_dir)
    wanted: dict[str, tuple[str, str]] = {}
    for name in splits:
        if name in SPLITS:
            wanted.setdefault(SPLITS[name], (name, where.field))
    if len(splits) == 1:
        wanted = {"train": (next(iter(splits)), where.field)}
    for split, chosen in (("train", spec.train), ("test", spec.test)):
        if chosen is not None:
            wanted = {k: v for k, v in wanted.items() if v[0] != chosen or k == "train"}
            wanted[split] = (chosen, f"data.{split}")
    if "train" not in wanted:
        mend = f"set data.train to one of its splits: {', '.join(splits)}"
        raise InputError(where.field, where.path, mend, problem="has no split called train")
    for split, (name, field) in wanted.items():
        if name not in splits:
            mend = f"use one of: {', '.join(splits)}"
            raise InputError(field, name, mend, problem=f"is not a split of {where.path}")
        if split != "train" and name == wanted["train"][0]:
            raise InputError(field, name, "name another split", problem="is the training split too")
    return {s: HubPart(splits[name], name, where.path, spec, field) for s, (name, field) in wanted.items()}


def choose(
    what: str, fitting: list[str], columns: list[str], known: tuple[str, ...], given: str | None, where: str
) -> str:
    """The image or label column: the one given, else the first known name, else the only one whose type fits."""
    if given is not None and given in fitting:
        return given
    found = [name for name in known if name in fitting] or (fitting if len(fitting) == 1 else [])
    if given is not None or not found:
        fault = f"is not an {what} column of {where}" if given in columns else f"is not found in {where}"
        fault = fault.replace("an label", "a label")
        mend = f"use one of: {', '.join(fitting)}" if fitting else f"{where} has no column with {what}s"
        raise InputError(f"data.{what}_key", given, mend, problem=fault)
    return found[0]


def _content(value: Any) -> Blob:
    """The encoded image in a table's cell."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or (Path(value["path"]) if value.get("path") else None)
    if value is None:
        raise ValueError("the cell is empty")
    blob: Blob = value
    return blob


def _holds_bytes(kind: Any, types: Any) -> bool:
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _hf_class_names(metadata: Mapping[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """The names that ``datasets`` keeps in a parquet file's schema."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(feature["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _pyarrow(field: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        mend = install("parquet")
        raise InputError(field, "parquet", mend, problem="needs pyarrow, which is not installed") from None
    return pyarrow, pyarrow.parquet


def _load(where: Location, cache_dir: Path | None) -> dict[str, Any]:
    try:
        import datasets
    except ImportError:
        mend = install("data")
        raise InputError(
            where.field, f"hub:{where.path}", mend, problem="needs datasets, which is not installed"
        ) from None
    local = Path(where.path).expanduser()
    try:
        if local.is_dir():
            loaded = datasets.load_from_disk(str(local))
        else:
            loaded = datasets.load_dataset(where.path, cache_dir=str(cache_dir) if cache_dir else None)
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        mend = "check the name and the network, or give a folder written by save_to_disk"
        raise InputError(where.field, f"hub:{where.path}", mend, problem=f"cannot be loaded ({reason})") from None
    return dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
