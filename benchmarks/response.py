"""Draws docs/pictures/guidance-*.png: what turning the guidance scale does to teacher and students.

    python benchmarks/response.py

From the chains' files under benchmarks/results/: means over the seeds, bars half a 95% t-interval. The response is how
far samples move in features from where they were at s = 1, at the same noise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from tables import CASCADE, NATURAL_FILE, ROOT, chain_models


@dataclass(frozen=True)
class Panel:
    """One quantity of a model's sweep over the scale."""

    quantity: str
    title: str
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Picture:
    """Some models of a chain's file, side by side."""

    file: str
    models: dict[str, tuple[str, str, str]]
    """Name -> label, colour, marker."""
    panels: tuple[Panel, ...]


TEACHER, SMALL, FEW, STRIDED = ("#222222", "o"), ("#2a6fbb", "s"), ("#d1495b", "D"), ("#999999", "v")
AGREEMENT = "samples of the class asked for"
RESPONSE = Panel("response", "distance in features from s = 1, same noise", (0.0, 2.8))
PICTURES = {
    "guidance-response": Picture(
        CASCADE,
        {
            "teacher": ("teacher, 100 NFE", *TEACHER),
            "full-4": ("4 steps at full size", *SMALL),
            "steps-4": ("4 steps, 1/6 of the size", *FEW),
            "stochastic-4": ("4 stochastic steps at full size", "#3b9c6b", "^"),
            "teacher@2": ("teacher in 2 guided steps, 4 NFE", *STRIDED),
        },
        (Panel("class_agreement", AGREEMENT, (0.94, 1.003)), RESPONSE),
    ),
    "guidance-natural": Picture(
        NATURAL_FILE,
        {
            "teacher": ("teacher, 50 NFE", *TEACHER),
            "small": ("1/6 of the size, 50 NFE", *SMALL),
            "steps-4": ("1/6 of the size, 4 NFE", *FEW),
            "steps-1": ("1/6 of the size, 1 NFE", "#e8a33d", "^"),
            "teacher@4": ("teacher in 4 guided steps, 8 NFE", *STRIDED),
        },
        (Panel("fd", "FD-cifar10, lower is better"), Panel("class_agreement", AGREEMENT, (0.2, 1.0))),
    ),
}


def points(model: dict[str, Any], quantity: str) -> list[tuple[float, float, float]]:
    """(scale, mean, half an interval), ascending."""
    found = []
    for figure, told in model["figures"].items():
        scale = re.fullmatch(rf"s=([\d.]+) {quantity}", figure)
        if scale and told["mean"]["value"] is not None:
            mean = told["mean"]
            found.append((float(scale[1]), mean["value"], (mean["high"] - mean["low"]) / 2 if mean["low"] else 0.0))
    return sorted([*found, (1.0, 0.0, 0.0)] if quantity == "response" else found)


def draw(name: str) -> None:
    made = PICTURES[name]
    models = chain_models(made.file)
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(made.panels)), made.panels, strict=True):
        for model, (label, colour, marker) in made.models.items():
            x, y, half = zip(*points(models[model], panel.quantity), strict=True)
            axes.errorbar(x, y, yerr=half, label=label, color=colour, marker=marker, markersize=4.5, capsize=2)
        axes.set_title(panel.title, loc="left", fontsize=10)
        axes.set_xticks(x, [f"{scale:g}" for scale in x])
        axes.set_ylim(*(panel.limits or (0.0, None)))
        axes.set_xlabel("guidance scale", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.7)
    figure.axes[1].legend(frameon=False, fontsize=8.5)
    figure.savefig(ROOT / "docs" / "pictures" / f"{name}.png", dpi=110)


if __name__ == "__main__":
    for picture in PICTURES:
        draw(picture)
