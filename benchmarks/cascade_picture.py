"""One image of each class by the models of a cascade, at several scales: docs/pictures/natural.png.

    python benchmarks/cascade_picture.py runs/cascade --teacher runs/teacher/model --out docs/pictures/natural.png

The run is the folder of a chain. All images of a column start from the same noise; ``--teacher`` names the model that
the chain starts from, where it is none of its stages.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from diffstill.diffusion.guidance import Constant
from diffstill.evaluation.sampling import sample_images
from diffstill.models.denoiser import Denoiser
from diffstill.models.folder import load_model

WAYS = {
    "teacher, 25 guided steps": ("teacher", 25),
    "1/6 of the size, 25 guided steps": ("small", 25),
    "1/6 of the size, 4 steps": ("steps-4", 4),
    "1/6 of the size, 1 step": ("steps-1", 1),
    "teacher in 4 guided steps": ("teacher", 4),
}
"""Row -> stage of the chain and its steps."""
SCALES = (1.0, 2.0, 4.0)


def model_of(run: Path, stage: str, teacher: Path | None) -> Denoiser:
    if stage == "teacher" and teacher is not None:
        return load_model(teacher, "cpu").denoiser
    (folder,) = (
        path for path in (run / "stages").glob(f"{stage}-*/model") if path.parent.name.rpartition("-")[0] == stage
    )
    return load_model(folder, "cpu").denoiser


def strip(images: Tensor) -> np.ndarray:
    """(H, N (W + 1), 3): side by side, a white line between."""
    padded = [np.pad(image.permute(1, 2, 0).numpy(), ((0, 0), (0, 1), (0, 0)), constant_values=255) for image in images]
    return np.concatenate(padded, axis=1)


def draw(run: Path, teacher: Path | None, out: Path, seed: int) -> None:
    figure, axes = plt.subplots(len(WAYS), len(SCALES), figsize=(2.4 + 3.6 * len(SCALES), 0.42 * len(WAYS) + 0.35))
    for row, (label, (stage, steps)) in zip(axes, WAYS.items(), strict=True):
        model = model_of(run, stage, teacher)
        for axis, scale in zip(row, SCALES, strict=True):
            shown = sample_images(model, model.num_classes, guidance=Constant(scale), steps=steps, seed=seed)
            axis.imshow(strip(shown), interpolation="nearest")
            axis.axis("off")
        row[0].text(-0.02, 0.5, label, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
    for axis, scale in zip(axes[0], SCALES, strict=True):
        axis.set_title(f"s = {scale:g}", fontsize=10)
    left = 2.4 / (2.4 + 3.6 * len(SCALES))
    figure.subplots_adjust(left=left, right=0.998, top=0.88, bottom=0.01, wspace=0.03, hspace=0.05)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    draw(asked.run, asked.teacher, asked.out, asked.seed)


if __name__ == "__main__":
    main()
