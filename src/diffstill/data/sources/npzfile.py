"""An .npz file opened without pickle: the headers of its arrays at once, their content when asked for."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ...errors import InputError
from .labels import checked_labels

BLOCK_BYTES = 1 << 25
LABEL_KEYS = ("labels", "label", "y", "Y", "targets", "target", "arr_1")


@dataclass(frozen=True)
class Entry:
    """The header of one array."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int
    """Bytes before the first value."""


class NpzFile:
    """Raises ``InputError`` under ``field`` for whatever is wrong with the file."""

    def __init__(self, path: Path, field: str) -> None:
        self.path, self.field = path, field
        self.entries: dict[str, Entry] = {}
        with self.guarded(), zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as file:
                        self.entries[name.removesuffix(".npy")] = _header(file)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turns what a damaged file raises into one line."""
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, struct.error, OSError, ValueError, EOFError) as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            mend = "write it again with np.savez(path, images=.., labels=..)"
            raise InputError(self.field, str(self.path), mend, problem=f"cannot be read ({reason})") from None

    def name(self, key: str) -> str:
        """How messages name an array."""
        return f"{self.path}:{key}"

    def entry(self, key: str) -> Entry:
        """The header of an array that may be opened."""
        found = self.entries[key]
        if found.dtype.hasobject:
            problem = "is an array of pickled objects, which is never opened"
            mend = "store plain arrays: uint8 images, integer labels"
            raise InputError(self.field, self.name(key), mend, problem=problem)
        return found

    def array(self, key: str) -> NDArray[Any]:
        self.entry(key)
        with self.guarded(), np.load(self.path, allow_pickle=False) as archive:
            value: NDArray[Any] = archive[key]
        return value

    def blocks(self, key: str, index: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(first row, rows) of a uint8 array, leaving out blocks without a row of the ascending ``index``."""
        entry = self.entry(key)
        if entry.fortran:
            yield 0, self.array(key)
            return
        count, *rest = entry.shape
        each = int(np.prod(rest))
        step = max(1, BLOCK_BYTES // each)
        with self.guarded(), zipfile.ZipFile(self.path) as archive, archive.open(f"{key}.npy") as file:
            file.read(entry.offset)
            for start in range(0, count, step):
                stop = min(start + step, count)
                low, high = np.searchsorted(index, [start, stop])
                if low == len(index):
                    break
                # What is left out is read, too: from Python 3.12 on a seek would end the check of the archive's CRC.
                content = file.read((stop - start) * each)
                if low < high:
                    yield start, np.frombuffer(content, np.uint8).reshape(stop - start, *rest)

    def labels(self, key: str) -> NDArray[Any]:
        return checked_labels(self.array(key), self.name(key), self.field)

    def class_names(self, label_key: str) -> tuple[str, ...] | None:
        """The key ``class_names``, where it belongs to these labels: not to, say, coarse ones beside the usual ones."""
        usual = [key for key in LABEL_KEYS if key in self.entries]
        if "class_names" not in self.entries or (usual and label_key not in usual):
            return None
        names = self.array("class_names")
        if names.ndim != 1 or names.dtype.kind != "U":
            problem = f"is {names.dtype} of shape {names.shape}"
            raise InputError(self.field, self.name("class_names"), "store a 1-d array of strings", problem=problem)
        if len(set(names.tolist())) < len(names):
            raise InputError(self.field, self.name("class_names"), "give each class its own", problem="repeats a name")
        return tuple(names.tolist())


def _header(file: IO[bytes]) -> Entry:
    read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return Entry(shape, fortran, dtype, file.tell())
