"""What an arena's page says: the sentence at the top, a section a budget, the paper's table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import arena_plots, views, words
from .arena import COLUMNS, OVERVIEW, ArenaResult, Budget, best_fd, fidelity, rows

PAPER = views.Table(
    "CIFAR-10 and CIFAR-100 as published",
    ["model", "parameters", "FID C10", "FID C100", "gap ratio C10", "gap ratio C100"],
    [
        ["Teacher", "35.8 M", "5.47 \u00b1 0.04", "6.80 \u00b1 0.05", "1", "1"],
        ["DASH", "6.1 M", "8.87 \u00b1 0.12", "10.47 \u00b1 0.16", "0.91", "0.89"],
        ["Gap matching", "6.1 M", "11.42 \u00b1 0.18", "18.46 \u00b1 0.33", "0.81", "0.78"],
        ["FitNets", "6.1 M", "12.84 \u00b1 0.21", "19.47 \u00b1 0.35", "0.63", "0.61"],
        ["Composite, many scales", "6.1 M", "13.67 \u00b1 0.19", "19.13 \u00b1 0.37", "0.75", "0.71"],
        ["Composite, one scale", "6.1 M", "13.84 \u00b1 0.22", "20.84 \u00b1 0.37", "0.68", "0.65"],
        [
            "Single head, no guidance",
            "8.99 M",
            "16.78 \u00b1 0.25",
            "23.50 \u00b1 0.47",
            words.MISSING,
            words.MISSING,
        ],
        ["Magnitude pruning", "8.95 M", "18.04 \u00b1 0.33", "24.48 \u00b1 0.43", "0.71", "0.66"],
        [
            "Student from scratch",
            "6.1 M",
            "20.47 \u00b1 0.31",
            "26.14 \u00b1 0.44",
            words.MISSING,
            words.MISSING,
        ],
        ["Conditional only", "6.1 M", "22.31 \u00b1 0.46", "27.83 \u00b1 0.59", "0.09", "0.08"],
    ],
)
GAP = fidelity("gap_mse", 1000)
BUDGETS: dict[Budget, tuple[str, str]] = {
    "equal_steps": ("At equal steps", "Every arm trained for the same number of steps on the same images."),
    "equal_seconds": (
        "At equal time",
        "Every arm trained for the same time, which counts its own passes and its share of the teacher\u2019s.",
    ),
}


def lead(arena: ArenaResult) -> str:
    """Who is best at each budget, and how sure that is."""
    metric, best, said = arena.protocol.extractor.name, arena.teacher.best, []
    reference = arena.arm(arena.reference)
    for budget in arena.budgets():
        arms = arena.ranked(budget)
        mean = arms[0].mean(best_fd, budget)
        if mean.value is None:
            continue
        text = f"{BUDGETS[budget][0]}, {arms[0].label} reaches the lowest {metric}, {words.estimate(mean)}"
        paired = [arena.paired(arm, best_fd, budget) for arm in arms]
        spans = [(e.low, e.high) for e in paired if e is not None and e.low is not None and e.high is not None]
        if reference is not None and spans:
            who = "it" if reference is arms[0] else reference.label
            better, worse = sum(low > 0 for low, _ in spans), sum(high < 0 for _, high in spans)
            counts = f"better than {better} and worse than {worse} of {len(spans)} others"
            text += f"; beyond the seeds\u2019 scatter {who} is {counts}"
        said.append(text + ".")
        gaps = [(found.value, arm.label) for arm in arms if (found := arm.mean(GAP, budget)).value is not None]
        if gaps:
            error, label = min(gaps)
            told = f"{words.number(error)} (MSE \u00d7\u202f1000)"
            said.append(f"{label} has the smallest error of the guidance gap, {told}.")
    if best is not None and said:
        said.append(f"The teacher scores {words.number(best.fd.value)}.")
    return " ".join(said) or "No arm has been measured."


def strips(arena: ArenaResult, run_dir: Path) -> tuple[list[str], list[tuple[str, list[views.Picture | None]]]]:
    """(settings, rows of (arm, its pictures)): one seed of each arm at no guidance, at the teacher's best and at the
    strongest constant; the same noise everywhere. ``grid`` alone where an arena kept no ``sweep:`` pictures."""
    models = {"Teacher": arena.teacher}
    for budget in arena.budgets()[:1]:
        models |= {arm.label: arm.at(budget)[0].evaluation for arm in arena.ranked(budget)}
    settings = [point.guidance for point in arena.teacher.sweep]
    scales = sorted((g for g in settings if words.constant_scale(g) is not None), key=float)
    best = arena.teacher.best
    wanted = {*scales[:1], *scales[-1:], *([best.guidance] if best else [])}
    keys = [(f"sweep:{g}", words.guidance_name(g)) for g in settings if g in wanted]
    if not any(key in model.images for model in models.values() for key, _ in keys):
        keys = [("grid", "at its best guidance")]
    rows = [
        (label, [views.picture(run_dir, model.images.get(key), f"{label}, {name}") for key, name in keys])
        for label, model in models.items()
    ]
    return [name for _, name in keys], [(label, found) for label, found in rows if any(found)]


def section(arena: ArenaResult, budget: Budget) -> dict[str, Any]:
    """The plots and the table of one budget."""
    title, caption = BUDGETS[budget]
    ideals = {"gap ratio": 1.0, "cosine": 1.0}
    shown = [(name, metric) for name, metric in COLUMNS if not name.startswith("null")]
    return {
        "title": title,
        "caption": caption,
        "headline": arena_plots.headline(arena, budget),
        "multiples": arena_plots.small_multiples(arena, budget),
        "fidelity": [arena_plots.dots(arena, metric, name, budget, ideals.get(name)) for name, metric in shown],
        "tables": _tables(arena, budget),
    }


def _tables(arena: ArenaResult, budget: Budget) -> list[views.Table]:
    """The arena's one table in three that fit a page."""
    header, body = rows(arena, budget)
    metric, own = arena.protocol.extractor.name, len(header) - len(COLUMNS)
    parts = {
        metric: (
            1,
            OVERVIEW,
            "Mean over training seeds \u00b1 half a 95\u202f% t-interval. Best: each seed at the guidance that its "
            f"sisters choose (the teacher at its own best). \u0394: minus {arena.reference}, paired by seed, not "
            "corrected for many comparisons.",
        ),
        f"{metric} at each guidance": (OVERVIEW, own, ""),
        "Guidance fidelity": (
            own,
            len(header),
            "Against the teacher, at identical images, noise, timesteps and labels.",
        ),
    }
    made = [
        views.Table(name, [header[0], *header[start:end]], [[row[0], *row[start:end]] for row in body], 1, note)
        for name, (start, end, note) in parts.items()
    ]
    return [table.without_empty_columns() for table in made]
