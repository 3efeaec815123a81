"""The frontier of a chain: what each stage costs against what it keeps, every artefact a point with its picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image, UnidentifiedImageError

from ..evaluation.results import Estimate, ModelEvaluation
from . import words
from .plots import errorbar
from .svg import INK, LINE, MUTED, SERIES, Panel, plain
from .views import Table

SHOWN = 4
"""Images of a stage's picture: the first of its row at its best guidance."""
AGAIN = "@"
"""In the name of what is the first model again, in few steps."""
LOG_BEYOND = 4.0
"""Values that span more than this factor are drawn on a log axis."""
ROOM = (34.0, 46.0)
"""Points of the drawing (1/72 inch) that a picture needs to itself, sideways and upwards."""
CROWD = 3
"""Points above each other whose names stand beside them."""
LINE_HEIGHT = 13.0
"""Of names that stand above each other, in the drawing's units."""
Quality = Callable[[ModelEvaluation], Estimate | None]


def gap_error(model: ModelEvaluation) -> Estimate | None:
    """Mean squared error of the guidance gap in units of the first model's own gap: 0 the same, 1 no gap at all."""
    if model.fidelity is None or not model.fidelity.teacher_gap_rms:
        return None
    found, unit = model.fidelity.overall.gap_mse, model.fidelity.teacher_gap_rms**2
    value, low, high = (None if v is None else v / unit for v in (found.value, found.low, found.high))
    return Estimate(value=value, low=low, high=high)


def frontier_plots(
    models: Mapping[str, ModelEvaluation],
    metric: str,
    run_dir: Path,
    baselines: Mapping[str, ModelEvaluation] | None = None,
) -> list[Markup | None]:
    """FLOPs an image (log) against the best distance, and against the error of the guidance gap.

    Args:
        baselines: what costs nothing, drawn as a dashed line at its distance.
    """
    levels = {name: m.best.fd.value for name, m in (baselines or {}).items() if m.best and m.best.fd.value}
    return [
        _plot(models, f"Best {metric} against cost", lambda m: m.best.fd if m.best else None, run_dir, levels),
        _plot(models, "Error of the guidance gap against cost", gap_error, run_dir),
    ]


def best_flops(model: ModelEvaluation) -> float | None:
    """FLOPs an image at the guidance of the best distance: at s = 1 a model of two passes a step needs one."""
    return model.best.nfe * model.cost.flops_forward if model.best and model.cost else None


def _plot(
    models: Mapping[str, ModelEvaluation],
    title: str,
    quality: Quality,
    run_dir: Path,
    levels: Mapping[str, float] | None = None,
) -> Markup | None:
    measured = [(name, m, quality(m)) for name, m in models.items()]
    guided = quality is gap_error
    costs = {name: m.cost.flops_image if m.cost and guided else best_flops(m) for name, m in models.items()}
    found = [(name, m, cost, q.value, q) for name, m, q in measured if (cost := costs[name]) and q and q.value]
    if len(found) < 2:
        return None
    panel = Panel(title, "FLOPs an image", size=(9.8, 4.8))
    values = [value for *_, value, _ in found]
    for number, (name, _, flops, _, q) in enumerate(found):
        first = number == 0 and quality is not gap_error
        colour = INK if first else MUTED if AGAIN in name else SERIES[0]
        errorbar(panel, [flops], [q], marker="o", color=colour, markersize=6)
    panel.log_axis("x", written=words.tick)
    for name, level in (levels or {}).items():
        text = f"{name} {words.number(level)}"
        panel.level(level, text)
        right: Any = {"xycoords": panel.axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "right"}
        panel.axes.annotate(plain(text), (1, level), (0, 4), fontsize=8.5, color=MUTED, **right)
        values.append(level)
    low, high = min(values), max(values)
    if high > LOG_BEYOND * low:
        panel.axes.set_ylim(low / 1.6, high * 1.9)
        panel.log_axis("y")
    else:
        panel.axes.set_ylim(bottom=0, top=1.4 * high)
    panel.axes.margins(x=0.12)
    places = panel.axes.transData.transform([(flops, value) for _, _, flops, value, _ in found]).tolist()
    heights = names_beside(places)
    middle = panel.axes.transAxes.transform((0.5, 0.5))[0]
    taken: list[tuple[float, float]] = []
    for number, (name, model, flops, value, _) in enumerate(found):
        x, y = places[number]
        if number in heights:
            right = x < middle
            _name_beside(panel, name, (flops, value), (12 if right else -12, heights[number] - y), right)
            continue
        free = all(abs(x - other) > ROOM[0] or abs(y - height) > ROOM[1] for other, height in taken)
        pixels = _thumbnail(model, run_dir) if free and AGAIN not in name else None
        if pixels is not None:
            taken.append((float(x), float(y)))
        _label(panel, name, (flops, value), pixels)
    return panel.svg()


def names_beside(places: Sequence[Sequence[float]]) -> dict[int, float]:
    """Points of which several lie above each other, so that names and pictures above them would cover one another, and
    the heights at which their names stand beside them: ``LINE_HEIGHT`` apart, as near to the points as that allows.

    Args:
        places: (x, y) of the points, in the units of the drawing.
    """
    heights: dict[int, float] = {}
    for x, _ in places:
        column = sorted(
            (i for i, (other, _) in enumerate(places) if abs(other - x) <= ROOM[0]), key=lambda i: places[i][1]
        )
        if len(column) < CROWD or column[0] in heights:
            continue
        # Least squares under a least distance: the means of blocks that would be out of order (isotonic regression).
        blocks: list[list[float]] = []
        for place, i in enumerate(column):
            blocks.append([places[i][1] - LINE_HEIGHT * place])
            while len(blocks) > 1 and sum(blocks[-2]) * len(blocks[-1]) > sum(blocks[-1]) * len(blocks[-2]):
                blocks[-2:] = [blocks[-2] + blocks[-1]]
        level = [sum(block) / len(block) for block in blocks for _ in block]
        heights |= {i: level[place] + LINE_HEIGHT * place for place, i in enumerate(column)}
    return heights


def _name_beside(panel: Panel, name: str, place: tuple[float, float], shift: tuple[float, float], right: bool) -> None:
    """The stage's name at the end of a thin line."""
    line = {"arrowstyle": "-", "color": LINE, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
    text = panel.axes.annotate(plain(name), place, shift, textcoords="offset pixels", va="center", arrowprops=line)
    text.set(ha="left" if right else "right", fontsize=8.5, color=MUTED if AGAIN in name else INK)
    text.set_in_layout(False)


def _label(panel: Panel, name: str, place: tuple[float, float], pixels: Any) -> None:
    """The stage's name and a few of its samples above its point; the name alone below it where they have no room."""
    shown = pixels is not None
    text = panel.axes.annotate(
        plain(name), place, (0, 44) if shown else (0, -13), textcoords="offset points", ha="center", fontsize=8.5,
        color=MUTED if AGAIN in name else INK,
    )  # fmt: skip
    if shown:
        image = OffsetImage(pixels, zoom=30 / pixels.shape[0], interpolation="nearest")
        where: Any = {"xybox": (0, 27), "boxcoords": "offset points", "frameon": False, "pad": 0}
        panel.axes.add_artist(box := AnnotationBbox(image, place, **where))
        box.set_in_layout(False)
    text.set_in_layout(False)


def _thumbnail(model: ModelEvaluation, run_dir: Path) -> Any:
    """The first images of the model's row at its best guidance, two by two, (H, W, 3) uint8; None where it has none."""
    relative = model.images.get(f"sweep:{model.best.guidance}") if model.best else None
    path = (run_dir / (relative or "")).resolve()
    if not relative or not path.is_relative_to(run_dir.resolve()) or not path.is_file():
        return None
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            strip = np.asarray(opened.convert("RGB"))
    except (UnidentifiedImageError, OSError):
        return None
    side = strip.shape[0]
    tiles = [strip[:, start : start + side] for start in range(0, strip.shape[1] - side + 1, side + 3)][:SHOWN]
    if len(tiles) < SHOWN:
        return None
    half = SHOWN // 2
    return np.concatenate([np.concatenate(tiles[:half], 1), np.concatenate(tiles[half:], 1)], 0)


def chain_table(models: Mapping[str, ModelEvaluation], metric: str) -> Table:
    """A row a stage: what it costs, how far its samples are, how much of the guidance is left."""
    first = next(iter(models.values()))
    header = ["stage", "method", "sampler", "parameters", "steps", "NFE", "FLOPs an image", "fewer"]
    header += [f"best {metric}", "at s", "against the first", "class agreement", "gap ratio", "gap cosine"]
    header += ["one image", "many"]
    return Table("Stage by stage", header, [_row(name, m, first) for name, m in models.items()], names=3)


def _row(name: str, m: ModelEvaluation, first: ModelEvaluation) -> list[str]:
    cost, best, overall = m.cost, m.best, m.fidelity.overall if m.fidelity else None
    start = first.best.fd.value if first.best else None
    latency = {item.batch: item for item in cost.latency} if cost else {}
    many = latency.get(max(latency, default=0))
    share = best.fd.value / start if best and best.fd.value is not None and start else None
    return [
        name,
        m.method,
        m.sampler,
        words.si(cost.parameters) if cost else words.MISSING,
        str(m.steps or ""),
        str(cost.nfe) if cost else words.MISSING,
        words.si(cost.flops_image) if cost else words.MISSING,
        (words.times(first.cost.flops_image, cost.flops_image) or "") if cost and first.cost else words.MISSING,
        words.estimate(best.fd) if best else words.MISSING,
        words.short_guidance(best.guidance) if best else words.MISSING,
        f"{share:.2f}" if share is not None else words.MISSING,
        words.percent(best.class_agreement.model_copy(update={"low": None})) if best and best.class_agreement else "",
        words.number(overall.ratio.value, 2) if overall else "",
        words.number(overall.cosine.value, 2) if overall else "",
        words.seconds(latency[1].median_s) if 1 in latency else words.MISSING,
        f"{words.seconds(many.median_s)} for {many.batch}" if many and many.batch != 1 else words.MISSING,
    ]
