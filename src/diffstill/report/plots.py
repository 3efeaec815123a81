"""The plots of a receipt, each a function from results to one inline SVG, or None where there is nothing to draw."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ..evaluation.results import Cost, Estimate, Fidelity, ModelEvaluation, ScalePoint
from . import words
from .svg import INK, LINE, MUTED, SERIES, Panel, plain

LOG_BEYOND = 12.0
"""Positive values that span more than this factor are drawn on a log axis."""
MARKERS = "osD^vPXh"


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each model: the teacher in ink, every other name the next of the series."""
    others = [name for name in names if name != "teacher"]
    found: dict[str, dict[str, Any]] = {"teacher": {"color": INK, "marker": "o"}}
    for i, name in enumerate(others):
        found[name] = {"color": SERIES[i % len(SERIES)], "marker": MARKERS[(i + 1) % len(MARKERS)]}
    return {name: found[name] for name in names}


def errorbar(
    panel: Panel, x: Sequence[float], values: Sequence[Estimate], *, horizontal: bool = False, **style: Any
) -> None:
    """Points with their intervals; those without a value are left out."""
    known = [(place, e.value, e) for place, e in zip(x, values, strict=True) if e.value is not None]
    if not known:
        return
    # An interval that does not hold its own point estimate (a biased bootstrap) is drawn one-sided.
    below = [max(0.0, v - (v if e.low is None else e.low)) for _, v, e in known]
    above = [max(0.0, (v if e.high is None else e.high) - v) for _, v, e in known]
    settings: dict[str, Any] = {
        "markersize": 5,
        "capsize": 2.5,
        "elinewidth": 1,
        "linewidth": 1.8,
        "zorder": 3,
    }
    places, points, bars = [k[0] for k in known], [k[1] for k in known], np.array([below, above])
    if horizontal:
        panel.axes.errorbar(points, places, xerr=bars, **(settings | style))
    else:
        panel.axes.errorbar(places, points, yerr=bars, **(settings | style))


def spans_decades(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > LOG_BEYOND


def sweep(
    models: Mapping[str, ModelEvaluation],
    quantity: str,
    title: str,
    floor: Estimate | None = None,
    floor_name: str = "real test images",
) -> Markup | None:
    """``quantity`` (a field of ``ScalePoint``) against the guidance scale, a line a model, with intervals.

    Schedules (TAG, intervals) have no one scale: they stand right of the constants, as points.

    Args:
        floor: the same quantity for real test images, drawn as a dashed line.
    """
    panel = Panel(title, "guidance scale")
    places = _guidance_places(panel, [point.guidance for model in models.values() for point in model.sweep])
    shown: list[float] = []
    lows: list[float] = []
    for (name, style), model in zip(styles(list(models)).items(), models.values(), strict=True):
        found = [(p.guidance, e) for p in model.sweep if (e := getattr(p, quantity)) is not None]
        shown += [e.value for _, e in found if e.value is not None]
        lows += [e.low for _, e in found if e.low is not None]
        constant = sorted((places[g], i) for i, (g, _) in enumerate(found) if words.constant_scale(g) is not None)
        errorbar(panel, [x for x, _ in constant], [found[i][1] for _, i in constant], label=plain(name), **style)
        named = [(places[g], e) for g, e in found if words.constant_scale(g) is None]
        style |= {} if constant else {"label": plain(name)}
        errorbar(panel, [x for x, _ in named], [e for _, e in named], linestyle="", **style)
    if not shown:
        return None
    if floor is not None and floor.value is not None:
        panel.level(floor.value, f"{floor_name} {words.number(floor.value)}")
    if quantity == "class_agreement":  # a share, most often near 1: from the tenth below the lowest
        bottom = max(0.0, math.floor(10 * min(shown + lows)) / 10)
        panel.axes.set_ylim(bottom, 1 + 0.04 * (1 - bottom))
    elif spans_decades(shown):
        panel.log_axis("y")
    else:
        panel.axes.set_ylim(bottom=0)
    panel.legend()
    return panel.svg()


def quality_against(
    points: Mapping[str, ScalePoint], quantity: str, title: str, real: tuple[float, Estimate] | None = None
) -> Markup | None:
    """The distance of each row of few-shot data against a share (a field of ``FewShot``), a point a row.

    Args:
        real: share and distance of real images.
    """
    panel = Panel(title, {"memorised": "share of copies", "diversity_share": "share of the real diversity"}[quantity])
    named = _measured(points, quantity)
    if not named:
        return None
    for (name, style), (share, fd) in zip(styles(list(named)).items(), named.values(), strict=True):
        value = share.value or 0.0
        low, high = (value if end is None else end for end in (share.low, share.high))
        sides = [[max(0.0, value - low)], [max(0.0, high - value)]]
        errorbar(panel, [value], [fd], xerr=sides, linestyle="", label=plain(name), **style)
    shares, distances = ([both[i].value or 0.0 for both in named.values()] for i in (0, 1))
    if real is not None and real[1].value is not None:
        name = f"real images {words.number(real[1].value)}"
        errorbar(panel, [real[0]], [real[1]], linestyle="", label=name, color=MUTED, marker="*", markersize=9)
        distances.append(real[1].value)
    panel.axes.set_xlim(-0.03, max(1.03, 1.08 * max(shares)))
    if spans_decades(distances):
        panel.log_axis("y")
    else:
        panel.axes.set_ylim(bottom=0)
    panel.legend()
    return panel.svg()


def _measured(points: Mapping[str, ScalePoint], quantity: str) -> dict[str, tuple[Estimate, Estimate]]:
    """Row -> (the share, the distance), of rows that have both."""
    found = {name: (getattr(p.few_shot, quantity), p.fd) for name, p in points.items() if p.few_shot is not None}
    return {name: both for name, both in found.items() if None not in (both[0].value, both[1].value)}


def _guidance_places(panel: Panel, settings: Sequence[str]) -> dict[str, float]:
    """Where each guidance setting stands on the x axis; draws the ticks."""
    scales = {g: s for g in settings if (s := words.constant_scale(g)) is not None}
    schedules = list(dict.fromkeys(g for g in settings if g not in scales))
    low, high = min(scales.values(), default=0.0), max(scales.values(), default=0.0)
    step = max(high - low, 1.0) / 4
    places = scales | {g: high + (i + 1) * step for i, g in enumerate(schedules)}
    labels = [plain(words.short_guidance(g)) for g in places]
    panel.axes.set_xticks(list(places.values()), labels)
    if scales and schedules:
        panel.axes.axvline(high + step / 2, color=LINE, linewidth=1, zorder=1)
    return places


def fidelity_bins(
    models: Mapping[str, Fidelity], quantity: str, title: str, *, by: str = "timestep", ideal: float = 1.0
) -> Markup | None:
    """``quantity`` (``ratio``, ``cosine``, ``gap_mse`` ...) in each bin ``by`` timestep or class, a series a model;
    a dashed line at ``ideal`` shows where a perfect student lies."""
    bins = {name: getattr(fidelity, f"by_{by}") for name, fidelity in models.items()}
    labels = list(dict.fromkeys(b.label for part in bins.values() for b in part))
    if not labels:
        return None
    panel = Panel(title, "timestep (0 is the clean image)" if by == "timestep" else "class")
    for name, style in styles(list(bins)).items():
        places, values = (
            [labels.index(b.label) for b in bins[name]],
            [getattr(b, quantity) for b in bins[name]],
        )
        errorbar(panel, places, values, linestyle="-" if by == "timestep" else "", label=plain(name), **style)
    low, high = panel.axes.get_ylim()
    panel.axes.set_ylim(bottom=min(0.0, low), top=max(1.12 * ideal, high))
    panel.level(ideal, "teacher")
    short = [plain(re.sub(r"^(t|class)\s+", "", label)) for label in labels]
    panel.category_ticks(short)
    panel.legend()
    return panel.svg()


def curriculum(weights: Mapping[str, Sequence[float]]) -> Markup | None:
    """Effective loss weight per timestep, as a fraction of t / T; 1 is what uniform weights give."""
    names: dict[tuple[float, ...], list[str]] = {}
    for name, values in weights.items():
        names.setdefault(tuple(values), []).append(name)
    names.pop((), None)
    if not names:
        return None
    panel = Panel("Loss weight by timestep", "t / T (0 is the clean image)")
    # A curriculum that a student took over from its teacher is one line with two names.
    for (values, shared), colour in zip(names.items(), SERIES * len(names), strict=False):
        edges = np.linspace(0, 1, len(values) + 1)
        panel.axes.stairs(values, edges, color=colour, linewidth=1.8, label=plain(", ".join(shared)), baseline=None)
    panel.level(1.0, "uniform")
    panel.axes.set_ylim(bottom=0, top=1.25 * max(1.0, *(max(values) for values in names)))
    panel.legend()
    return panel.svg()


def cost_rows(teacher: Cost, student: Cost) -> list[tuple[str, float, float, Callable[[float], str]]]:
    """(what, the teacher's, the student's, how it is written), for each cost that both have."""
    rows: list[tuple[str, float, float, Callable[[float], str]]] = [
        ("parameters", teacher.parameters, student.parameters, words.si),
        ("FLOPs an image", teacher.flops_image, student.flops_image, words.si),
        ("file size", teacher.size_mb, student.size_mb, lambda mb: f"{words.number(mb)}{words.THIN}MB"),
    ]
    mine = {item.batch: item.median_s for item in student.latency}
    return rows + [
        (f"batch of {item.batch}", item.median_s, mine[item.batch], words.seconds)
        for item in teacher.latency
        if item.batch in mine
    ]


def cost_bars(teacher: Cost, student: Cost) -> Markup:
    """Each cost of the student beside its teacher's, relative to the larger of the two, with the ratio."""
    rows = cost_rows(teacher, student)
    panel = Panel("Cost: teacher above, student below", size=(4.9, 0.55 * len(rows) + 0.55), note="Cost")
    axes = panel.axes
    for i, (_, theirs, ours, write) in enumerate(rows):
        longest = max(theirs, ours) or 1.0
        for value, place, colour in ((theirs, i - 0.17, MUTED), (ours, i + 0.17, SERIES[0])):
            axes.barh(place, value / longest, 0.3, color=colour)
            panel.mark(write(value), (value / longest, place), (4, 0))
        ratio = words.times(theirs, ours)
        if ratio:
            axes.annotate(ratio, (1.42, i), ha="right", va="center", fontsize=11, fontweight="bold", color=INK)
    axes.set_yticks(range(len(rows)), [what for what, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.42)
    panel.bare()
    return panel.svg()


def frontier(
    points: Mapping[str, tuple[float, Estimate]], title: str, teachers: frozenset[str] = frozenset({"teacher"})
) -> Markup | None:
    """Quality against cost, a named dot a model: (FLOPs an image, distance); down and left is better."""
    drawn = {name: (cost, fd) for name, (cost, fd) in points.items() if fd.value is not None and cost > 0}
    if not drawn:
        return None
    panel = Panel(title, "FLOPs an image")
    # The teachers share the ink; the others keep the colours they have in the plots beside this one.
    looks = styles([name for name in points if name not in teachers])
    for name, (cost, fd) in drawn.items():
        errorbar(panel, [cost], [fd], **(looks.get(name, {"color": INK, "marker": "o"}) | {"markersize": 7}))
        panel.mark(plain(name), (cost, fd.value or 0.0), (8, 5), colour=INK)
    if spans_decades([fd.value or 0.0 for _, fd in drawn.values()]):
        panel.log_axis("y")
    else:
        panel.axes.set_ylim(bottom=0)
    panel.log_axis("x", written=words.tick)
    panel.axes.margins(x=0.25)
    return panel.svg()
