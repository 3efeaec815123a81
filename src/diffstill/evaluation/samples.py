"""Samples on disk: the very images that figures were measured on, so that anyone can measure them again."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ..disk import sync
from ..errors import InputError


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
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
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
