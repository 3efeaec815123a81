"""Training curves: reading a run's ``log.jsonl`` and drawing it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from . import words
from .svg import INK, SERIES, Panel, plain

MOST_POINTS = 600
"""Drawn a curve; more would only make the page heavy."""
NOT_LOSSES = frozenset({"images", "step", "lr", "pixel", "gan_weight"})
AT_IMAGE = ("dmd_norm", "gan_norm")
"""Gradient norms at the generated images, which tell how matching and GAN balance."""

Points = dict[float, float]
"""Images seen -> value."""


@dataclass
class TrainingLog:
    """What one arm logged: the loss (``"loss"``) with its parts, and the guidance probe (``ratio``, ``cosine``)."""

    losses: dict[str, Points] = field(default_factory=dict)
    probe: dict[str, Points] = field(default_factory=dict)
    norms: dict[str, Points] = field(default_factory=dict)
    """Of a few-step generator: ``AT_IMAGE``."""


def read_log(log: Path, arm: str) -> TrainingLog:
    """The curves of ``arm``; where the log names other arms only, those of its first (a log of one training).

    Lines that are cut short are passed over, values that are not finite are left out; where a count of images occurs
    twice, the later line counts. A missing file gives no curve.
    """
    arms: dict[str, TrainingLog] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or not _is_number(record.get("images")):
            continue
        event = record.get("event")
        if event == "probe":
            _add(arms.setdefault(str(record.get("arm")), TrainingLog()).probe, record)
        elif event is None and _is_number(record.get("loss")):
            _add(arms.setdefault(str(record.get("arm")), TrainingLog()).losses, record)
    for arm_log in arms.values():
        arm_log.norms = {name: arm_log.losses.pop(name) for name in AT_IMAGE if name in arm_log.losses}
    return arms.get(arm) or next(iter(arms.values()), TrainingLog())


def _add(series: dict[str, Points], record: Mapping[str, Any]) -> None:
    for name, value in record.items():
        aside = name in NOT_LOSSES or name.endswith(("grad_norm", "_loss"))
        if not aside and _is_number(value):
            series.setdefault(name, {})[record["images"]] = value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _line(points: Points) -> tuple[np.ndarray, np.ndarray]:
    x = sorted(points)
    return np.array(x, dtype=float), np.array([points[place] for place in x], dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential average over about a fiftieth of the curve, without a bias towards 0 at the start."""
    keep = 1 - 1 / max(1.0, len(values) / 50)
    total = weight = 0.0
    out = np.empty(len(values))
    for i, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        out[i] = total / weight
    return out


def _images_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.tick(value)))


def loss_curves(losses: Mapping[str, Points], title: str) -> Markup | None:
    """Loss and its parts (or norms) over images seen, on a log axis: smoothed, the raw values faint behind."""
    drawn = {name: _line({x: v for x, v in points.items() if v > 0}) for name, points in losses.items()}
    drawn = {name: line for name, line in drawn.items() if len(line[0]) > 1}
    if len(drawn) == 2 and "loss" in drawn:  # a loss of one part is that part
        drawn = {"loss": drawn["loss"]}
    if not drawn:
        return None
    panel = Panel(title, "images seen")
    series = iter(SERIES * len(drawn))
    for name, (x, y) in drawn.items():
        thin = slice(None, None, -(-len(x) // MOST_POINTS))
        colour = INK if name == "loss" and len(drawn) > 1 else next(series)
        panel.axes.plot(x[thin], y[thin], color=colour, alpha=0.22, linewidth=0.8)
        label = "total" if name == "loss" else name.replace("_", " ")
        panel.axes.plot(x[thin], smooth(y)[thin], color=colour, linewidth=1.8, label=plain(label))
    panel.log_axis("y")
    _images_axis(panel.axes)
    panel.legend()
    return panel.svg()


def probe_curves(probe: Mapping[str, Points], title: str) -> Markup | None:
    """Gap ratio and cosine of the EMA student while it trained; under the dashed line guidance has collapsed."""
    drawn = {name: _line(probe[name]) for name in ("ratio", "cosine") if len(probe.get(name, ())) > 1}
    if not drawn:
        return None
    panel = Panel(title, "images seen")
    for (name, (x, y)), colour, marker in zip(drawn.items(), SERIES, "os", strict=False):
        panel.axes.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=1.8, label=f"gap {name}")
    panel.axes.set_ylim(bottom=min(0.0, *(y.min() for _, y in drawn.values())))
    panel.axes.set_ylim(top=max(1.1, panel.axes.get_ylim()[1]))
    panel.level(0.5, "collapsed under this ratio")
    _images_axis(panel.axes)
    panel.legend()
    return panel.svg()
