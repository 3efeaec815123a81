"""Tiny model folders, and a disk that is full."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.methods.curriculum import Curriculum
from diffstill.models.adapters import unet2d
from diffstill.models.denoiser import Denoiser
from diffstill.models.folder import save_model
from diffstill.models.lineage import Lineage

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
NAMES = ["zero", "one", "two"]


def denoiser(schedule: str = "cosine", T: int = 1000, kind: Any = "epsilon", **options: Any) -> Denoiser:
    torch.manual_seed(0)
    given = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, **options}
    network = unet2d.build(sample_shape=(1, 8, 8), num_classes=3, **given)
    return Denoiser(network, NoiseSchedule.create(schedule, T), 3, (1, 8, 8), kind)


def save(model: Denoiser, folder: Path, **options: Any) -> Lineage:
    lineage = options.pop("lineage", None) or Lineage.new("tiny", "supervised")
    return save_model(model, folder, lineage=lineage, **{"class_names": NAMES, **options})


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def whole(folder: Path) -> Path:
    """A model folder with everything in it that one can have."""
    model = denoiser()
    curriculum = Curriculum(model.schedule)
    save(model, folder, curriculum=curriculum.table(), curriculum_meta=curriculum.meta())
    return folder


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files can grow no further than ``size`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
