"""The plots of an arena: arms beside each other, means and t-intervals over seeds, every seed shown."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten

import numpy as np
from markupsafe import Markup

from ..evaluation.results import Estimate
from . import words
from .arena import ArenaArm, ArenaResult, Budget, Metric, best_fd, fd_at
from .plots import errorbar, spans_decades
from .svg import INK, LINE, MUTED, SERIES, Panel, plain


def _rows(panel: Panel, arms: Sequence[ArenaArm], metric: Metric, budget: Budget, reference: str) -> list[float]:
    """An arm a row, the first on top: its seeds faint, its mean with interval. Returns every value drawn."""
    values = [[v for seed in arm.at(budget) if (v := metric(seed)) is not None] for arm in arms]
    for row, (arm, found) in enumerate(zip(arms, values, strict=True)):
        colour = SERIES[0] if arm.name == reference else MUTED
        panel.axes.plot(found, [row] * len(found), "|", color=colour, alpha=0.6, markersize=9, zorder=2)
        errorbar(panel, [row], [arm.mean(metric, budget)], horizontal=True, color=colour, marker="o", linestyle="")
    panel.axes.set_yticks(range(len(arms)), [plain(arm.label) for arm in arms])
    panel.axes.set_ylim(len(arms) - 0.4, -0.6)
    panel.axes.tick_params(axis="y", length=0, labelcolor=INK)
    panel.axes.grid(False)
    panel.axes.grid(axis="x", color=LINE, linewidth=0.7)
    panel.axes.spines["left"].set_visible(False)
    return [value for found in values for value in found]


def headline(arena: ArenaResult, budget: Budget = "equal_steps") -> Markup | None:
    """Best Frechet distance of each arm as bars from 0 (dots on a log axis where one arm is many times worse)."""
    arms = arena.ranked(budget)
    if not arms:
        return None
    panel = Panel("", f"best {arena.protocol.extractor.name} over the guidance sweep (lower is better)",
                  size=(9.6, 0.42 * len(arms) + 1.1), note=f"Best distance by arm, {budget}")  # fmt: skip
    shown = _rows(panel, arms, best_fd, budget, arena.reference)
    best, floor = arena.teacher.best, arena.protocol.floor
    lines = [e.value for e in (best.fd if best else None, floor) if e is not None and e.value]
    means = [arm.mean(best_fd, budget) for arm in arms]
    if spans_decades(shown):
        panel.axes.set_xlim(left=min([*shown, *lines]) / 1.3)
        panel.log_axis("x")
    else:
        colours = [SERIES[0] if arm.name == arena.reference else MUTED for arm in arms]
        panel.axes.barh(range(len(arms)), [e.value or 0 for e in means], 0.62, color=colours, alpha=0.3)
        panel.axes.set_xlim(left=0)
    for row, found in enumerate(means):
        end = max([v for v in (found.value, found.high) if v is not None], default=0.0)
        panel.mark(words.plus_minus(found), (end, row), (9, 0))
    panel.axes.set_xlim(right=panel.axes.get_xlim()[1] * 1.22)
    if best is not None and best.fd.value is not None:
        panel.upright(best.fd.value, f"teacher {words.number(best.fd.value)}", "left")
    if floor is not None and floor.value is not None:
        panel.upright(floor.value, f"real {words.number(floor.value)}", "right")
    return panel.svg()


def dots(
    arena: ArenaResult, metric: Metric, title: str, budget: Budget = "equal_steps", ideal: float | None = None
) -> Markup | None:
    """One metric, an arm a row in the headline's order; a dashed line at ``ideal``."""
    arms = arena.ranked(budget)
    panel = Panel(title, size=(4.9, 0.32 * len(arms) + 0.95), note=f"{title}, {budget}", headroom=20)
    shown = _rows(panel, arms, metric, budget, arena.reference)
    if not shown:
        return None
    if ideal is not None:
        panel.upright(ideal, "teacher")
    if spans_decades(shown):
        panel.log_axis("x")
    elif min(shown) >= 0:
        panel.axes.set_xlim(left=0)
    return panel.svg()


def small_multiples(arena: ArenaResult, budget: Budget = "equal_steps") -> list[Markup]:
    """Distance against guidance, a small panel an arm, in the headline's order: this arm strong, all others faint,
    the teacher dashed; one scale for all."""
    settings = [p.guidance for p in arena.teacher.sweep]
    arms = arena.ranked(budget)
    settings += [p.guidance for arm in arms for seed in arm.at(budget) for p in seed.evaluation.sweep]
    settings = list(dict.fromkeys(settings))
    lines = {arm.name: [arm.mean(fd_at(g), budget) for g in settings] for arm in arms}
    teacher = [next((p.fd for p in arena.teacher.sweep if p.guidance == g), Estimate(value=None)) for g in settings]
    values = [v for line in [teacher, *lines.values()] for e in line for v in (e.value, e.high) if v is not None]
    if not values:
        return []
    drawn = []
    for arm in arms:
        panel = Panel(
            shorten(arm.label, 34, placeholder=" ..."),
            size=(3.1, 2.3),
            note=f"{arm.label}: distance by guidance, {budget}",
        )
        for other in lines.values():
            panel.axes.plot(range(len(settings)), _heights(other), color=LINE, linewidth=1.2, zorder=1)
        panel.axes.plot(range(len(settings)), _heights(teacher), color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        colour = SERIES[0] if arm.name == arena.reference else SERIES[1]
        errorbar(panel, range(len(settings)), lines[arm.name], color=colour, marker="o", markersize=4)
        panel.category_ticks([plain(words.short_guidance(g)) for g in settings])
        if spans_decades(values):
            panel.axes.set_ylim(min(values) / 1.3, max(values) * 1.3)
            panel.log_axis("y")
        else:
            panel.axes.set_ylim(0, 1.1 * max(values))
        drawn.append(panel.svg())
    return drawn


def _heights(line: Sequence[Estimate]) -> np.ndarray:
    return np.array([np.nan if e.value is None else e.value for e in line])
