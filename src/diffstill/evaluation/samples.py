"""Samples on disk: the very images that figures were measured on, so that anyone can measure them again."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ..disk import sync
from ..errors import InputError

PIECE = 1000
"""Images that are drawn before they are kept."""


def write_samples(path: Path, images: Tensor, labels: Tensor, made: Mapping[str, Any] | None = None) -> None:
    """An ``.npz`` of ``images`` (N, C, H, W) uint8 and ``labels`` (N,) int64, which ``npz:`` data sources read too.

    Written whole or not at all.

    Args:
        made: JSON-able facts of how they were made, kept beside them as text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    facts = np.frombuffer(json.dumps(made or {}, sort_keys=True).encode(), np.uint8)
    try:
        with beside.open("wb") as file:
            np.savez(file, images=images.numpy(), labels=labels.numpy(), made=facts)
        sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_samples(path: Path) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """What ``write_samples`` wrote: images, labels, facts.

    Raises:
        InputError: a file that is missing, damaged or of another kind.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
            made = json.loads(file["made"].tobytes())
        if images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
            raise ValueError(f"images {tuple(images.shape)} {images.dtype}, labels {tuple(labels.shape)}")
    except (OSError, TypeError, ValueError, KeyError, EOFError, BadZipFile) as error:
        problem = f"holds no samples ({' '.join(str(error).split())[:120]})"
        raise InputError("samples", str(path), "give a file that diffstill wrote", problem=problem) from None
    return images, labels, made


class SampleStore:
    """A folder of samples, one file a model, setting, seed and process. What is there is not drawn again, so that an
    evaluation which was stopped goes on where it was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, made: Mapping[str, Any]) -> Path:
        """Readable to people, and different for whatever differs in ``made``."""
        digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:8]
        readable = re.sub(r"[^\w.@-]+", "-", f"{name}-{made.get('guidance', '')}").strip("-")
        return self.folder / f"{readable}-{digest}.npz"

    def held(self, name: str, made: Mapping[str, Any]) -> Tensor | None:
        """The images of an earlier call with the same facts; None where there are none, or a file is damaged."""
        path = self.path(name, made)
        if not path.exists():
            return None
        try:
            images, _, facts = read_samples(path)
        except InputError:
            return None
        return images if facts == made else None

    def keep(self, name: str, made: Mapping[str, Any], images: Tensor, labels: Tensor) -> None:
        write_samples(self.path(name, made), images, labels, made)

    def drawn(self, name: str, made: Mapping[str, Any], draw: Callable[[int, int], Tensor], labels: Tensor) -> Tensor:
        """The images ``made["first"]`` and on, one for each of ``labels`` (N,): drawn a piece at a time, each kept
        until the whole is, so that a call that is stopped loses one piece.

        Args:
            draw: (first, count) -> images.
        """
        pieces, places = [], []
        for start in range(0, len(labels), PIECE):
            count = min(PIECE, len(labels) - start)
            part = {**made, "first": made["first"] + start, "count": count}
            images = self.held(f"{name}-part", part)
            if images is None:
                images = draw(part["first"], count)
                if count < len(labels):
                    self.keep(f"{name}-part", part, images, labels[start : start + count])
            pieces.append(images)
            places.append(self.path(f"{name}-part", part))
        whole = torch.cat(pieces) if pieces else draw(made["first"], 0)
        self.keep(name, made, whole, labels)
        for place in places:
            place.unlink(missing_ok=True)
        return whole
