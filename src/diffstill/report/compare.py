"""Whether the numbers of several receipts may stand in one table, and the pieces of that table's page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..evaluation.results import Estimate, ModelEvaluation, Protocol
from . import words
from .receipt import Receipt
from .views import Table, thousandfold

DECISIVE = ("extractor", "reference_sha256")
"""Where these differ, distances live in different spaces: they are not drawn in one plot."""


@dataclass(frozen=True)
class Run:
    """One receipt of a comparison, under a name that no other run has."""

    name: str
    folder: Path
    receipt: Receipt

    @property
    def model(self) -> ModelEvaluation | None:
        return self.receipt.subject[1] if self.receipt.subject else None


def named_runs(receipts: Sequence[tuple[str | Path, Receipt]]) -> list[Run]:
    """Runs in the given order; receipts of one name are told apart by their folders.

    Raises:
        InputError: fewer than two receipts.
    """
    if len(receipts) < 2:
        raise InputError("runs", len(receipts), "give two or more run folders", problem="receipt is not a comparison")
    folders = [path if path.is_dir() else path.parent for path in (Path(path) for path, _ in receipts)]
    names = [receipt.name for _, receipt in receipts]
    names = [n if names.count(n) == 1 else f"{n} ({f.name})" for n, f in zip(names, folders, strict=True)]
    names = [n if names.count(n) == 1 else f"{n} #{names[: i + 1].count(n)}" for i, n in enumerate(names)]
    return [Run(n, f, receipt) for n, f, (_, receipt) in zip(names, folders, receipts, strict=True)]


def protocol_differences(protocols: Sequence[Protocol]) -> dict[str, list[str]]:
    """Fields in which the protocols differ, each with its distinct values. The floor is a result, not a setting."""
    dumped: list[dict[str, Any]] = [p.settings() for p in protocols]
    for told in dumped:
        told |= {f"few_shot.{field}": value for field, value in (told.pop("few_shot") or {}).items()}
    found = {}
    for field in dict.fromkeys(field for told in dumped for field in told):
        values = list(dict.fromkeys(_shown(told.get(field)) for told in dumped))
        if len(values) > 1:
            found[field] = values
    return found


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['name']} ({value['sha256'][:8]}, resize {value['resize']})"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def comparability(runs: Sequence[Run]) -> list[str]:
    """Warnings about what is not equal between the runs.

    Raises:
        InputError: the distances were measured with another extractor or against other reference images.
    """
    measured = [run for run in runs if run.receipt.protocol is not None]
    differing = protocol_differences([run.receipt.protocol for run in measured if run.receipt.protocol])
    decisive = [field for field in DECISIVE if field in differing]
    if decisive:
        shown = "; ".join(f"{field} = {' / '.join(differing[field])}" for field in decisive)
        mend = "compare runs with one extractor and one reference, or evaluate them again with `diffstill eval`"
        raise InputError("protocol", shown, mend, problem="differs between the runs")
    warnings = [
        f"The protocols differ in {field}: {' / '.join(values)}. The numbers are not strictly comparable."
        for field, values in differing.items()
    ]
    warnings += [
        f"{run.name}: there are no images of its domain but those it was trained on, and its distance is to these: "
        "a low one is a copy."
        for run in measured
        if run.receipt.protocol and run.receipt.protocol.few_shot and run.receipt.protocol.few_shot.alone
    ]
    silent = [run.name for run in runs if run.receipt.protocol is None]
    if silent:
        warnings.append(f"Not evaluated, so without numbers: {', '.join(silent)}.")
    warnings += [f"{run.name}: {warning}" for run in runs for warning in run.receipt.warnings]
    return warnings


def teachers(runs: Sequence[Run]) -> dict[str, ModelEvaluation]:
    """The distinct teachers, by weights: one is called ``teacher``, more are named after their runs."""
    found: dict[str, tuple[str, ModelEvaluation]] = {}
    for run in runs:
        teacher = run.receipt.teacher
        if teacher is not None and teacher is not run.model:
            found.setdefault(teacher.sha256 or run.name, (run.name, teacher))
    if len(found) == 1:
        return {"teacher": next(iter(found.values()))[1]}
    return {f"teacher of {name}": teacher for name, teacher in found.values()}


def verdict_table(models: dict[str, ModelEvaluation], metric: str) -> Table:
    """A row a model, the best distance first."""

    def key(item: tuple[str, ModelEvaluation]) -> float:
        best = item[1].best
        return float("inf") if best is None or best.fd.value is None else best.fd.value

    header = ["model", "method", "parameters", "FLOPs an image", f"best {metric}", "at", "class agreement"]
    header += ["gap ratio", "cosine", "gap MSE \u00d7\u202f1000", "guidance"]
    rows = []
    for name, model in sorted(models.items(), key=key):
        best, cost, overall = model.best, model.cost, model.fidelity.overall if model.fidelity else None
        state = words.guidance_state(model.fidelity)[1].partition(" (")[0] if model.fidelity else words.MISSING
        size = [words.count(cost.parameters), words.si(cost.flops_image)] if cost else [words.MISSING] * 2
        quality = [words.MISSING] * 3
        if best is not None:
            quality = [
                words.estimate(best.fd),
                words.short_guidance(best.guidance),
                words.percent(best.class_agreement),
            ]
        gap: list[Estimate | None] = [None] * 3
        if overall is not None:
            gap = [overall.ratio, overall.cosine, thousandfold(overall.gap_mse)]
        state = state.removeprefix("Guidance ").removeprefix("has ").removeprefix("is ")
        rows.append([name, model.method or words.MISSING, *size, *quality, *map(words.estimate, gap), state])
    return Table(
        "From best to worst", header, rows, 2, "Brackets: two-sided 95\u202f% intervals."
    ).without_empty_columns()


def lead(runs: Sequence[Run], metric: str) -> str:
    """Which run is best, and in which ones guidance lives."""
    ranked = sorted(
        (model.best.fd.value, run.name, words.guidance_name(model.best.guidance))
        for run in runs
        if (model := run.model) is not None and model.best is not None and model.best.fd.value is not None
    )
    if not ranked:
        return "Nothing has been measured yet."
    value, name, at = ranked[0]
    said = [f"Of {len(runs)} runs, {name} has the lowest {metric}: {words.number(value)} ({at})."]
    found = [(run.name, run.model.fidelity) for run in runs if run.model is not None and run.model.fidelity is not None]
    for name, fidelity in found:
        state = words.guidance_state(fidelity)[1]
        said.append(f"In {name} {state[0].lower()}{state[1:]}")
    return " ".join(said)
