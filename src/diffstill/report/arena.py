"""The arena: several methods, the same teacher, data, steps and seeds; means with intervals over training seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from ..evaluation.intervals import t_interval
from ..evaluation.results import Estimate, ModelEvaluation, Protocol, Result
from . import words
from .receipt import DataSummary, Document, Environment

Budget = Literal["equal_steps", "equal_seconds"]


class ArmSeed(Result):
    """One training of one arm."""

    seed: int
    steps: int
    images_seen: int
    seconds: float = Field(description="own training time and the share of the teacher passes it needs")
    evaluation: ModelEvaluation
    budget: Budget = "equal_steps"
    collapse_alarm: bool = Field(False, description="the gap ratio fell under 0.5 while training")
    chosen: str | None = Field(
        None, description="the guidance of this seed's best figure: lowest mean distance over the arm's other seeds"
    )


class ArenaArm(Result):
    """One method, trained from several seeds.

    The guidance a seed is judged at is chosen by the other seeds of the same budget (by itself where it is alone); they
    are sampled from the same noise.
    """

    name: str
    method: str
    label: str
    parameters: int
    seeds: list[ArmSeed]

    @model_validator(mode="after")
    def _choose(self) -> ArenaArm:
        for seed in self.seeds:
            others = [other for other in self.at(seed.budget) if other is not seed]
            seed.chosen = _lowest(others or [seed])
        return self

    def at(self, budget: Budget) -> list[ArmSeed]:
        return [seed for seed in self.seeds if seed.budget == budget]

    def mean(self, metric: Metric, budget: Budget = "equal_steps") -> Estimate:
        """Mean and t-interval over the seeds; no value where a seed has none (a diverged seed is not dropped)."""
        return t_interval([metric(seed) for seed in self.at(budget)])


Metric = Callable[[ArmSeed], "float | None"]


def _lowest(seeds: Sequence[ArmSeed]) -> str | None:
    """The guidance with the lowest mean distance; None where no guidance was measured in every seed."""
    settings = [point.guidance for point in seeds[0].evaluation.sweep]
    means = {g: t_interval([fd_at(g)(seed) for seed in seeds]).value for g in settings}
    known = {g: mean for g, mean in means.items() if mean is not None}
    return min(known, key=lambda g: known[g]) if known else None


def best_fd(seed: ArmSeed) -> float | None:
    """The Frechet distance at the guidance that the arm's other seeds choose."""
    return None if seed.chosen is None else fd_at(seed.chosen)(seed)


def fd_at(guidance: str) -> Metric:
    """The Frechet distance at one guidance setting."""

    def metric(seed: ArmSeed) -> float | None:
        return next((p.fd.value for p in seed.evaluation.sweep if p.guidance == guidance), None)

    return metric


def fidelity(part: str, factor: float = 1.0) -> Metric:
    """``ratio``, ``cosine``, ``gap_mse``, ``cond_mse``, ``null_mse`` or ``best_rescale`` over all held-out pairs,
    times ``factor``."""

    def metric(seed: ArmSeed) -> float | None:
        found = seed.evaluation.fidelity
        if found is None:
            return None
        value: Estimate = getattr(found.overall, part)
        return None if value.value is None else factor * value.value

    return metric


def seconds(seed: ArmSeed) -> float | None:
    """Training time with its share of the teacher passes."""
    return seed.seconds


class ArenaResult(Document):
    """``arena.json``: what the arms reached, seed by seed."""

    file_name = "arena.json"

    schema_id: Literal["diffstill-arena/1"] = "diffstill-arena/1"
    recipe: dict[str, Any] = {}
    data: DataSummary
    environment: Environment
    protocol: Protocol
    teacher: ModelEvaluation
    arms: list[ArenaArm]
    reference: str = Field("dash", description="name of the arm that paired differences are taken against")
    notes: list[str] = []

    def arm(self, name: str) -> ArenaArm | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    def budgets(self) -> list[Budget]:
        """The budgets at which anything was run, equal steps first."""
        known: tuple[Budget, ...] = ("equal_steps", "equal_seconds")
        return [budget for budget in known if any(arm.at(budget) for arm in self.arms)]

    def ranked(self, budget: Budget = "equal_steps", metric: Metric = best_fd) -> list[ArenaArm]:
        """The arms that ran at ``budget``, lowest mean first, arms without a mean last."""

        def key(arm: ArenaArm) -> tuple[bool, float, str]:
            value = arm.mean(metric, budget).value
            return value is None, value or 0.0, arm.name

        return sorted((arm for arm in self.arms if arm.at(budget)), key=key)

    def paired(self, arm: ArenaArm, metric: Metric, budget: Budget = "equal_steps") -> Estimate | None:
        """Mean of ``arm - reference`` over the seeds both ran, with its t-interval; None for the reference itself.

        Pairing by seed removes what the seeds share (data order, noise, initialisation of equal networks).
        """
        reference = self.arm(self.reference)
        if reference is None or reference.name == arm.name:
            return None
        base = {seed.seed: metric(seed) for seed in reference.at(budget)}
        pairs = [(metric(seed), base[seed.seed]) for seed in arm.at(budget) if seed.seed in base]
        if not pairs:
            return None
        return t_interval([None if a is None or b is None else a - b for a, b in pairs])


COLUMNS: tuple[tuple[str, Metric], ...] = (
    ("gap ratio", fidelity("ratio")),
    ("cosine", fidelity("cosine")),
    ("gap MSE \u00d7\u202f1000", fidelity("gap_mse", 1000)),
    ("cond MSE \u00d7\u202f1000", fidelity("cond_mse", 1000)),
    ("null MSE \u00d7\u202f1000", fidelity("null_mse", 1000)),
)
"""Fidelity columns of every arena table, in order: the last ones."""
OVERVIEW = 7
"""Columns before the distances at each guidance."""


def rows(arena: ArenaResult, budget: Budget = "equal_steps") -> tuple[list[str], list[list[str]]]:
    """(header, rows of formatted cells) of the arena's table, the teacher first, then the arms from best to worst."""
    settings = [p.guidance for p in arena.teacher.sweep]
    header = ["model", "parameters", "seeds \u00d7 steps", "training", f"best {arena.protocol.extractor.name}", "at"]
    header += [f"\u0394 {arena.reference}", *(words.guidance_name(g) for g in settings)]
    header += [name for name, _ in COLUMNS]
    body = [_teacher_row(arena, settings)]
    for arm in arena.ranked(budget):
        ran = arm.at(budget)
        at = ", ".join(dict.fromkeys(words.short_guidance(seed.chosen) for seed in ran if seed.chosen))
        steps = " ".join(dict.fromkeys(words.count(seed.steps) for seed in ran))
        body.append(
            [arm.label, words.count(arm.parameters), f"{len(ran)} \u00d7 {steps}"]
            + [words.seconds(arm.mean(seconds, budget).value)]
            + [words.plus_minus(arm.mean(best_fd, budget)), at or words.MISSING]
            + [words.plus_minus(arena.paired(arm, best_fd, budget), signed=True)]
            + [words.plus_minus(arm.mean(fd_at(g), budget)) for g in settings]
            + [words.plus_minus(arm.mean(metric, budget)) for _, metric in COLUMNS]
        )
    return header, body


def _teacher_row(arena: ArenaResult, settings: Sequence[str]) -> list[str]:
    teacher, best = arena.teacher, arena.teacher.best
    size = words.count(teacher.cost.parameters) if teacher.cost else words.MISSING
    fd, at = (words.number(best.fd.value), words.short_guidance(best.guidance)) if best else (words.MISSING,) * 2
    sweep = {p.guidance: words.number(p.fd.value) for p in teacher.sweep}
    return ["Teacher", size, "", "", fd, at, "", *(sweep[g] for g in settings), "1", "1", "0", "0", "0"]


def markdown_table(arena: ArenaResult, budget: Budget = "equal_steps") -> str:
    """The arena's table as GitHub Markdown, for the documentation."""
    return words.markdown(*rows(arena, budget))
