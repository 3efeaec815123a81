"""The ``data:`` section of a recipe, and the reading of its ``source``."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ...errors import InputError

KINDS = ("digits", "folder", "npz", "parquet", "hub")
HOW = "use digits, folder:PATH, npz:PATH, parquet:PATH, hub:NAME, or the path of a folder, .npz or .parquet file"


class DataSpec(BaseModel):
    """Which images, in which form, split how. ``load_data`` turns it into three splits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(description="digits | folder:PATH | npz:PATH[,PATH..] | parquet:PATH[,..] | hub:NAME | a path")
    name: str | None = Field(None, description="what reports call the data; None: taken from the source")
    train: str | None = Field(None, description="training part: hub split, sub-folder or files inside the source")
    test: str | None = Field(None, description="test part: hub split, sub-folder, files, or another KIND:PATH")
    size: int | None = Field(None, description="side of the square images in pixels; None: as they are")
    channels: Literal[1, 3] | None = Field(None, description="1 grey, 3 RGB; None: as they are")
    crop: Literal["center", "none"] = Field("center", description="non-square images: centre-crop, or refuse")
    resample: Literal["lanczos", "bicubic", "bilinear", "box", "nearest"] = "lanczos"
    flip: bool = Field(False, description="mirror at random in training (applied by the engine)")
    image_key: str | None = Field(None, description="npz key or table column of the images; None: recognised")
    label_key: str | None = Field(None, description="npz key or table column of the labels; None: recognised")
    layout: Literal["NHWC", "NCHW"] | None = Field(None, description="of 4-d npz arrays; None: from the shape")
    class_names: tuple[str, ...] | None = Field(
        None, description="names by label number; of labels that are names already, their order"
    )
    classes: tuple[str, ...] | None = Field(
        None, description="keep these classes, by name and in this order, or with -NAME all but these"
    )
    unlabelled: bool = Field(False, description="all images are of one class, called image")
    shots: int | None = Field(
        None,
        description="few-shot: train on so many images a class, test on all others, if there are any; val_fraction and "
        "test_fraction do not act, and limit acts on the test split alone",
    )
    skip_bad: bool = Field(False, description="leave unreadable images out and count them, instead of stopping")
    val_fraction: float = Field(0.1, description="of the training source, where there is no validation split")
    test_fraction: float = Field(0.2, description="of the training source, where there is no test split")
    split_seed: int = Field(0, description="decides which images are carved off, and which `limit` and `shots` keep")
    limit: int | None = Field(None, description="images kept of each split, stratified: for smoke runs")

    @field_validator("classes", mode="before")
    @classmethod
    def _as_names(cls, value: Any) -> Any:
        if isinstance(value, (str, int)):
            value = [value]
        if not isinstance(value, (list, tuple)):
            return value
        # Names that are numbers (digits) come out of YAML as numbers.
        return tuple(str(name) if type(name) is int else name for name in value)

    @model_validator(mode="after")
    def _ranges(self) -> DataSpec:
        if not self.source.strip():
            raise InputError("data.source", self.source, HOW)
        for field in ("size", "limit", "shots"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise InputError(f"data.{field}", value, "use a whole number from 1, or leave it out")
        if not 0 <= self.split_seed < 2**63:
            raise InputError("data.split_seed", self.split_seed, "use a whole number from 0")
        for field in ("val_fraction", "test_fraction"):
            value = getattr(self, field)
            if not 0 <= value < 1:
                raise InputError(f"data.{field}", value, "use a number from 0 up to, not including, 1")
        if self.val_fraction + self.test_fraction >= 1:
            mend = f"with data.val_fraction={self.val_fraction} nothing is left to train on; lower one of them"
            raise InputError("data.test_fraction", self.test_fraction, mend)
        names = self.class_names
        if names is not None and (not names or len(set(names)) < len(names)):
            raise InputError("data.class_names", list(names), "give every class one name of its own")
        if self.classes is not None:
            if not self.classes or len(set(self.classes)) < len(self.classes):
                raise InputError("data.classes", list(self.classes), "name one class or more, each once")
            if len({name.startswith("-") for name in self.classes}) > 1:
                mend = "name the classes to keep, or with - before each name those to leave out"
                raise InputError("data.classes", list(self.classes), mend, problem="mixes the two")
        return self

    @property
    def relabelled(self) -> bool:
        """Whether labels mean something else than in the source."""
        return self.classes is not None or self.unlabelled

    @classmethod
    def parse(cls, text: str) -> DataSpec:
        """The spec of a command line's ``--data TEXT``; raises ``InputError`` when no kind of source fits."""
        spec = cls(source=text)
        locate(spec.source, "data.source")
        return spec


@dataclass(frozen=True)
class Location:
    """A source's kind and what follows the colon: path(s) or a hub name."""

    kind: str
    path: str
    field: str
    """The spec's field it came from, for error messages."""


def locate(text: str, field: str) -> Location:
    """Reads ``KIND:REST``; a bare existing path is recognised by what it is."""
    text = text.strip()
    kind, colon, rest = text.partition(":")
    if text == "digits":
        return Location("digits", "", field)
    if colon and kind in KINDS[1:]:
        if not rest:
            raise InputError(field, text, f"give what follows the colon, as in {kind}:data/images")
        return Location(kind, rest, field)
    found = _matches(text)
    if not found:
        raise InputError(field, text, HOW, problem="is neither a kind of source nor an existing path")
    kinds = {_kind_of(path) for path in found}
    if len(kinds) > 1 or None in kinds:
        raise InputError(field, text, HOW, problem="is not recognised by its file name")
    return Location(kinds.pop() or "", text, field)


def _kind_of(path: Path) -> str | None:
    if not path.is_dir():
        return {".npz": "npz", ".parquet": "parquet"}.get(path.suffix.lower())
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return "hub"
    return next((kind for kind in ("npz", "parquet") if any(path.glob(f"*.{kind}"))), "folder")


def _pieces(text: str) -> list[str]:
    """A comma-separated list taken apart; an existing path is one piece, commas and all."""
    if Path(text).expanduser().exists():
        return [text]
    return [piece.strip() for piece in text.split(",") if piece.strip()]


def _matches(text: str, root: Path | None = None) -> list[Path]:
    """Existing paths named by a list of paths and globs (below ``root``, where given); each once, globs sorted."""
    found: dict[Path, None] = {}
    for piece in _pieces(text):
        path = Path(piece).expanduser() if root is None else root / piece
        hits = [path] if path.exists() else sorted(Path(hit) for hit in glob.glob(piece, root_dir=root))
        found.update(dict.fromkeys(hits if root is None else [root / hit for hit in hits]))
    return list(found)


def files_of(where: Location) -> list[Path]:
    """The files of an ``npz:`` or ``parquet:`` source: listed, globbed, or all those of a folder."""
    files: dict[Path, None] = {}
    for piece in _pieces(where.path):
        found = _matches(piece)
        if not found:
            raise InputError(where.field, piece, "check the path", problem="does not exist")
        for path in found:
            within = sorted(path.glob(f"*.{where.kind}")) if path.is_dir() else [path]
            if not within:
                raise InputError(where.field, str(path), "check the path", problem=f"holds no .{where.kind} file")
            files.update(dict.fromkeys(within))
    return list(files)


def inside(home: Location, text: str, field: str) -> Location:
    """Where ``data.train`` or ``data.test`` points: into the source's folder, else to a source of its own."""
    if text.partition(":")[0] in KINDS and ":" in text:
        return locate(text, field)
    base = Path(home.path).expanduser()
    found = _matches(text, base) if base.is_dir() else []
    return Location(home.kind, ",".join(map(str, found)) or text, field)
