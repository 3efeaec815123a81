"""The pages: one run, several runs, an arena. Each is one self-contained HTML file without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .. import __version__
from ..disk import write_text
from ..evaluation.results import Estimate, ModelEvaluation, Protocol
from ..yaml_text import write_yaml
from . import arena_views, compare, curves, few_shot, frontier, plots, views, words
from .arena import ArenaResult
from .receipt import DataSummary, Environment, Receipt

ROOM = Path(__file__).parent
Facts = list[tuple[str, str]]


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOM),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _write(template: str, out: str | Path, title: str, **content: Any) -> Path:
    css = Markup((ROOM / "style.css").read_text(encoding="utf-8"))
    html = _templates().get_template(template).render(title=title, css=css, version=__version__, **content)
    write_text(Path(out), html)
    return Path(out)


def _yaml(recipe: Mapping[str, Any]) -> str:
    return write_yaml(dict(recipe), sort_keys=True) if recipe else ""


def write_report(receipt: Receipt, run_dir: str | Path, out: str | Path) -> Path:
    """Write the page of one run.

    Args:
        receipt: what was measured; parts that are missing leave their section out.
        run_dir: where the receipt's pictures and logs lie.
        out: the HTML file.

    A model's picture ``grid`` shows samples at its best guidance, a row a class; ``sweep:<guidance>`` a few samples at
    that setting. All models and settings are to start from the same noise.
    """
    run_dir, models, subject = Path(run_dir), receipt.models, receipt.subject
    # Repeated shots are at 0 from themselves: a level that says nothing, and leaves no room for what is above it.
    levels = {} if words.alone(receipt.protocol) else receipt.baselines
    columns, sweep_rows = views.sweep_pictures(models, run_dir)
    grids = [
        (role, views.picture(run_dir, m.images.get("grid"), f"samples of the {role}")) for role, m in models.items()
    ]
    return _write(
        "page.html.j2",
        out,
        receipt.name,
        receipt=receipt,
        kicker=f"{receipt.kind} \u00b7 {receipt.data.name} \u00b7 seed {receipt.seed} \u00b7 {receipt.created[:10]}",
        verdict=words.verdict(receipt),
        beside=[] if receipt.kind == "chain" else words.beside(receipt),
        tone=words.guidance_state(subject[1].fidelity)[0] if subject and subject[1].fidelity else "",
        tiles=views.tiles(receipt),
        grids=[(role, found) for role, found in grids if found],
        sweep_columns=columns,
        sweep_rows=sweep_rows if _turned(models) else [],
        wide=any(p.width > 2 * p.height for _, row in sweep_rows for p in row if p),
        metric=_metric(receipt),
        frontier_plots=frontier.frontier_plots(models, _metric(receipt), run_dir, levels)
        if receipt.kind == "chain"
        else [],
        few=few_shot.few_images(receipt, run_dir),
        stages=frontier.chain_table(models, _metric(receipt)) if receipt.kind == "chain" and models else None,
        tables=_tables(receipt),
        details=_details(receipt.protocol, receipt.data, receipt.environment),
        recipe=_yaml(receipt.recipe),
        **_report_plots(receipt, run_dir),
    )


def _report_plots(receipt: Receipt, run_dir: Path) -> dict[str, list[Markup | None]]:
    models, subject = _line(receipt), receipt.subject
    teacher = receipt.teacher.cost if receipt.teacher else None
    student = subject[1].cost if subject and subject[0] != receipt.teacher_role else None
    beside = plots.frontier(_costs(models), f"Best {_metric(receipt)} against cost")
    logs = [(t, curves.read_log(_inside(run_dir, t.curve), t.name)) for t in receipt.training]
    return {
        "sweep_plots": _sweep_plots(models, receipt.protocol) if _turned(models) else [],
        "fidelity_plots": [*_fidelity_plots(models, "timestep"), *_fidelity_plots(models, "class")],
        "cost_plots": [plots.cost_bars(teacher, student), beside] if teacher and student else [],
        "training_plots": [
            *(curves.loss_curves(log.losses, f"Loss: {t.name} ({t.method})") for t, log in logs),
            *(curves.loss_curves(log.norms, f"Gradient norms at the image: {t.name}") for t, log in logs),
            *(curves.probe_curves(log.probe, f"Guidance while training: {t.name}") for t, log in logs),
            plots.curriculum({t.name: t.curriculum for t in receipt.training}),
        ],
    }


def _line(receipt: Receipt) -> dict[str, ModelEvaluation]:
    """What is drawn together: all models, or of a chain the line that leads to its result."""
    if receipt.kind != "chain" or receipt.subject is None:
        return receipt.models
    parents = {ancestor.name: ancestor.parent for ancestor in receipt.lineage}
    name: str | None = receipt.subject[0]
    line = {name}
    while (name := parents.get(name or "")) is not None and name not in line:
        line.add(name)
    return {name: model for name, model in receipt.models.items() if name in line}


def _tables(receipt: Receipt) -> list[views.Table]:
    fidelities = {role: m.fidelity for role, m in receipt.models.items() if m.fidelity is not None}
    return [
        views.sweep_table(receipt.models, _metric(receipt)),
        *(
            views.fidelity_table(f"Guidance fidelity of the {role}", chain([f.overall], f.by_timestep, f.by_class))
            for role, f in fidelities.items()
        ),
        views.cost_table(receipt.models),
        views.subject_table(receipt.models),
        views.training_table(receipt),
        views.lineage_table(receipt),
    ]


def _details(protocol: Protocol | None, data: DataSummary, environment: Environment) -> list[tuple[str, Facts]]:
    told: list[tuple[str, Facts]] = [("Protocol", views.protocol_facts(protocol))] if protocol else []
    return [*told, ("Data", views.data_facts(data)), ("Environment", views.environment_facts(environment))]


def _metric(receipt: Receipt) -> str:
    return words.metric(receipt.protocol)


def _inside(run_dir: Path, relative: str | None) -> Path:
    """``relative`` within the run folder; the folder itself (no file) where it leads elsewhere."""
    path = (run_dir / (relative or "")).resolve()
    return path if path.is_relative_to(run_dir.resolve()) else run_dir


def _costs(models: Mapping[str, ModelEvaluation]) -> dict[str, tuple[float, Estimate]]:
    return {name: (cost, m.best.fd) for name, m in models.items() if m.best and (cost := frontier.best_flops(m))}


def _turned(models: Mapping[str, ModelEvaluation]) -> bool:
    """Whether any model was measured at several settings; else there is no dial to show."""
    return any(len(model.sweep) > 1 for model in models.values())


def _sweep_plots(models: Mapping[str, ModelEvaluation], protocol: Protocol | None) -> list[Markup | None]:
    metric, floor = words.metric(protocol), protocol.floor if protocol else None
    name = "halves of the real images" if protocol and protocol.few_shot else "real test images"
    return [
        plots.sweep(models, "fd", f"{metric} over guidance", floor, name),
        plots.sweep(models, "class_agreement", "Class agreement over guidance"),
        plots.sweep(models, "response", "What the dial does: distance in features from the first setting"),
    ]


def _fidelity_plots(models: Mapping[str, ModelEvaluation], by: str) -> list[Markup | None]:
    found = {name: m.fidelity for name, m in models.items() if m.fidelity is not None}
    return [plots.fidelity_bins(found, part, f"Gap {part} by {by}", by=by) for part in ("ratio", "cosine")]


def write_comparison(receipts: Sequence[tuple[str | Path, Receipt]], out: str | Path) -> Path:
    """Write one page that compares runs.

    Args:
        receipts: (run folder or receipt file, receipt), two or more.
        out: the HTML file.

    Raises:
        InputError: fewer than two, or distances from different extractors or references. Other differences of
            protocol are warned of at the top of the page.
    """
    runs = compare.named_runs(receipts)
    warnings = compare.comparability(runs)
    teachers = compare.teachers(runs)
    models = teachers | {run.name: run.model for run in runs if run.model is not None}
    protocol = next((run.receipt.protocol for run in runs if run.receipt.protocol), None)
    metric = words.metric(protocol)
    grids = [(run.name, run.model.images.get("grid") if run.model else None, run.folder) for run in runs]
    pictures = [(name, views.picture(folder, path, f"samples of {name}")) for name, path, folder in grids]
    against_cost = plots.frontier(_costs(models), f"Best {metric} against cost", frozenset(teachers))
    return _write(
        "compare.html.j2",
        out,
        " \u00b7 ".join(run.name for run in runs),
        warnings=warnings,
        lead=compare.lead(runs, metric),
        table=compare.verdict_table(models, metric),
        grids=[(name, found) for name, found in pictures if found],
        quality_plots=[*_sweep_plots(models, protocol), against_cost],
        fidelity_plots=_fidelity_plots(models, "timestep"),
        runs=[
            {"name": run.name, "verdict": " ".join(words.verdict(run.receipt)), "facts": _facts(run.receipt)}
            for run in runs
        ],
    )


def _facts(receipt: Receipt) -> Facts:
    details = _details(receipt.protocol, receipt.data, receipt.environment)
    return [fact for _, facts in details for fact in facts]


def write_arena(arena: ArenaResult, out: str | Path, run_dir: str | Path | None = None) -> Path:
    """Write the page of an arena; its pictures lie in ``run_dir``, by default beside the page."""
    folder, metric = Path(run_dir) if run_dir else Path(out).parent, arena.protocol.extractor.name
    reference = arena.arm(arena.reference)
    settings, strips = arena_views.strips(arena, folder)
    counts = {len(arm.at(budget)) for arm in arena.arms for budget in arena.budgets() if arm.at(budget)}
    seeds = " to ".join(str(count) for count in sorted({min(counts, default=0), max(counts, default=0)}))
    return _write(
        "arena.html.j2",
        out,
        f"Arena: {len(arena.arms)} ways to a smaller student",
        kicker=f"arena \u00b7 {arena.data.name} \u00b7 training seeds an arm: {seeds}",
        lead=arena_views.lead(arena),
        warnings=[
            f"{arm.label}: the gap ratio fell under 0.5 in {alarms} of {len(arm.at(budget))} trainings."
            for budget in arena.budgets()[:1]
            for arm in arena.arms
            if (alarms := sum(seed.collapse_alarm for seed in arm.at(budget)))
        ],
        metric=metric,
        own=reference.label if reference else None,
        budgets=[arena_views.section(arena, budget) for budget in arena.budgets()],
        settings=settings,
        strips=strips,
        paper=arena_views.PAPER,
        notes=arena.notes,
        details=_details(arena.protocol, arena.data, arena.environment),
        recipe=_yaml(arena.recipe),
    )
