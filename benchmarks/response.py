"""Draws docs/pictures/guidance-response.png: what turning the guidance scale does to teacher and students.

    python benchmarks/response.py

Left, the share of samples of the class asked for; right, how far they move in features from where they were at s = 1,
at the same noise. From benchmarks/results/cascade-digits-grid.json: means over the seeds, bars half a 95% t-interval.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tables import CASCADE, ROOT, chain_models

MODELS = {
    "teacher": ("teacher, 100 NFE", "#222222", "o"),
    "full-4": ("4 steps at full size", "#2a6fbb", "s"),
    "steps-4": ("4 steps, 1/6 of the size", "#d1495b", "D"),
    "stochastic-4": ("4 stochastic steps at full size", "#3b9c6b", "^"),
    "teacher@2": ("teacher in 2 guided steps, 4 NFE", "#999999", "v"),
}
PANELS = {
    "class_agreement": "samples of the class asked for",
    "response": "distance in features from s = 1, same noise",
}


LIMITS: dict[str, tuple[float, float]] = {"class_agreement": (0.94, 1.003), "response": (0.0, 2.8)}


def points(model: dict[str, Any], quantity: str) -> list[tuple[float, float, float]]:
    """(scale, mean, half an interval), ascending."""
    found = []
    for figure, told in model["figures"].items():
        scale = re.fullmatch(rf"s=([\d.]+) {quantity}", figure)
        if scale and told["mean"]["value"] is not None:
            mean = told["mean"]
            found.append((float(scale[1]), mean["value"], (mean["high"] - mean["low"]) / 2 if mean["low"] else 0.0))
    return sorted([*found, (1.0, 0.0, 0.0)] if quantity == "response" else found)


def draw(out: Path) -> None:
    models = chain_models(CASCADE)
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    for axes, (quantity, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for name, (label, colour, marker) in MODELS.items():
            x, y, half = zip(*points(models[name], quantity), strict=True)
            axes.errorbar(x, y, yerr=half, label=label, color=colour, marker=marker, markersize=4.5, capsize=2)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xticks([1, 1.3, 2, 3, 5], ["1", "1.3", "2", "3", "5"])
        axes.set_ylim(*LIMITS[quantity])
        axes.set_xlabel("guidance scale", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.7)
    figure.axes[1].legend(frameon=False, fontsize=8.5)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    draw(ROOT / "docs" / "pictures" / "guidance-response.png")
