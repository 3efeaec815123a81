"""``folder:ROOT``: ROOT/class/image.png, or ROOT/{train,val,test}/class/image.png; unlabelled, ROOT/image.png too."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...errors import InputError
from .parts import EncodedPart, Part
from .pixels import Blob
from .spec import Location

EXTENSIONS = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
)
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Folder (or hub) name -> split."""


class FolderPart(EncodedPart):
    """One sub-folder a class. Labels are the folder names; images are in the order of class, then file name."""

    def __init__(self, root: Path, field: str, unlabelled: bool) -> None:
        self.labelled = not (unlabelled and is_flat(root))
        classes = _folders(root) if self.labelled else [root]
        if not classes:
            stray = "holds images but no class folders" if _images(root) else "holds no class folders"
            mend = f"put each class's images in a folder of its own, {root.name}/CLASS/, or set data.unlabelled=true"
            raise InputError(field, str(root), mend, problem=stray)
        self.files: list[Path] = []
        labels: list[str] = []
        for folder in classes:
            found = _images(folder)
            if not found:
                problem = "is a class folder without images"
                raise InputError(field, str(folder), "remove it, or put images straight into it", problem=problem)
            self.files += found
            labels += [folder.name] * len(found)
        self.labels = np.array(labels)
        self.origins = frozenset(str(folder.resolve()) for folder in classes)

    def blob(self, i: int) -> Blob:
        return self.files[i]

    def where(self, i: int) -> str:
        return str(self.files[i])


def open_folder(where: Location, unlabelled: bool = False) -> dict[str, Part]:
    """The parts of a folder: by its split folders where it has them, else one part, ``train``.

    Args:
        unlabelled: images right inside a folder are wanted too, without folders for their classes.
    """
    root = Path(where.path).expanduser()
    if not root.exists():
        raise InputError(where.field, str(root), "check the path", problem="does not exist")
    if not root.is_dir():
        raise InputError(where.field, str(root), "give the folder that holds the class folders", problem="is a file")
    try:
        return _parts_of(root, where.field, unlabelled)
    except OSError as error:
        raise InputError(where.field, str(root), "check its permissions", problem=f"cannot be read ({error})") from None


def _parts_of(root: Path, field: str, unlabelled: bool) -> dict[str, Part]:
    inner = _folders(root)
    # A class may be called "train": only a folder of folders is a split.
    splits = [f for f in inner if f.name in SPLITS and (_folders(f) or (unlabelled and is_flat(f)))]
    if not splits:
        return {"train": FolderPart(root, field, unlabelled)}
    others = [folder.name for folder in inner if folder not in splits]
    parts: dict[str, Part] = {}
    for folder in splits:
        split = SPLITS[folder.name]
        if split in parts or others:
            clash = f"{folder.name} beside {others[0]}" if others else f"two {split} folders"
            mend = "leave train, val and test folders only, or name the parts by data.train and data.test"
            raise InputError(field, str(root), mend, problem=f"holds {clash}")
        parts[split] = FolderPart(folder, field, unlabelled)
    if "train" not in parts:
        mend = "name the folder with the training images train, or give it as data.train"
        raise InputError(field, str(root), mend, problem=f"holds {splits[0].name} but no train folder")
    return parts


def is_flat(folder: Path) -> bool:
    """Whether images lie right inside a folder, and no folders."""
    return folder.is_dir() and not _folders(folder) and bool(_images(folder))


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """Files with an image's extension, hidden ones left out."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in EXTENSIONS and not entry.name.startswith(".") and entry.is_file()
    )
