"""Rows of samples of few-shot chains, one column per target: docs/pictures/few-shot-fashion.png.

    python benchmarks/few_shot_picture.py runs/near runs/far --also runs/near-fixed runs/far-fixed --out few-shot.png

A run is the folder of a chain (``few-shot-fashion``, ``few-shot-fashion-far``); ``--also`` names, in the same order,
runs whose Uni-DAD students are shown in a last row. Every row draws the same noise.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from torch import Tensor

from diffstill.data.sources import load_data
from diffstill.diffusion.guidance import Constant
from diffstill.evaluation.sampling import sample_images
from diffstill.models.folder import load_model
from diffstill.recipe import ChainRecipe
from diffstill.recipe.loading import parse_recipe

COUNT = 10
"""Images in a row."""
WAYS = {
    "fine-tuning, {} steps": "finetune",
    "fine-tuning, then DMD2, one step": "finetune-then-dmd2",
    "Uni-DAD, one step": "unidad",
}
"""Row -> stage of the chain."""
ALSO = "Uni-DAD, one step, fixed weight"


@dataclass(frozen=True)
class Column:
    title: str
    rows: dict[str, Tensor]
    """Label -> images (COUNT, 1, H, W) uint8."""


def drawn(run: Path, stage: str, steps: int) -> Tensor:
    """What a stage's model draws, in its own number of steps or in ``steps``."""
    (folder,) = (
        path for path in (run / "stages").glob(f"{stage}-*/model") if path.parent.name.rpartition("-")[0] == stage
    )
    model = load_model(folder, "cpu").denoiser
    steps = steps if model.sampler == "ddim" else model.schedule.T
    return sample_images(model, COUNT, guidance=Constant(1.0), steps=steps, batch_size=COUNT, guided=False)


def column(run: Path, also: Path | None) -> Column:
    recipe = parse_recipe(yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")))
    assert isinstance(recipe, ChainRecipe), f"{run} is no chain"
    data, steps = load_data(recipe.data), recipe.evaluation.steps
    rows = {"the ten images": data.train.images[:COUNT], "other real ones": data.test.images[:COUNT]}
    rows |= {label.format(steps): drawn(run, stage, steps) for label, stage in WAYS.items()}
    if also is not None:
        rows[ALSO] = drawn(also, "unidad", steps)
    return Column(", ".join(recipe.data.classes or ()), rows)


def strip(images: Tensor) -> np.ndarray:
    """(H, N (W + 1)): side by side, a white line between."""
    padded = [np.pad(image[0].numpy(), ((0, 0), (0, 1)), constant_values=255) for image in images]
    return np.concatenate(padded, axis=1)


def show(columns: list[Column], out: Path) -> None:
    labels = list(columns[0].rows)
    figure, axes = plt.subplots(
        len(labels), len(columns), figsize=(2.7 + 4.6 * len(columns), 0.5 * len(labels) + 0.4), squeeze=False
    )
    for across, made in enumerate(columns):
        for down, label in enumerate(labels):
            axis: Axes = axes[down][across]
            axis.axis("off")
            axis.imshow(strip(made.rows[label]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            if across == 0:
                axis.text(-0.02, 0.5, label, transform=axis.transAxes, ha="right", va="center", fontsize=10)
        axes[0][across].set_title(made.title, fontsize=12)
    left = 2.7 / (2.7 + 4.6 * len(columns))
    figure.subplots_adjust(left=left, right=0.995, top=0.9, bottom=0.01, wspace=0.03, hspace=0.05)
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--also", nargs="*", type=Path, default=[])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    also = asked.also or [None] * len(asked.runs)
    if len(also) != len(asked.runs):
        parser.error(f"--also: {len(also)} runs, and {len(asked.runs)} to stand beside")
    torch.manual_seed(0)
    show([column(run, beside) for run, beside in zip(asked.runs, also, strict=True)], asked.out)


if __name__ == "__main__":
    main()
