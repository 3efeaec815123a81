"""The speed ladder: rung after rung on top of the straightforward loop, each kept only where it does not cost."""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from problem import Problem
from product import LibraryStep, exact
from step import Step, Switches
from timing import Round, Spread, Stopwatch

from diffstill.engine.compiled import has_compiler
from diffstill.engine.runtime import Runtime, native_bf16
from diffstill.methods.base import Batch

SAME_LOSS = 1e-4
"""Largest relative difference between the losses of two float32 steps that do the same work."""
TOLERANCE = 0.02
"""A rung is kept unless it makes the step slower by more than this share, which is about the noise of a median."""
HOST = {"foreach_ema": True, "fused": True, "resident": True, "no_sync": True}


@dataclass(frozen=True)
class Rung:
    """One change on top of what was kept so far."""

    name: str
    switches: dict[str, Any]
    optional: bool = False
    """Changes what is learned: its price in quality is measured elsewhere, and it is never kept here."""


@dataclass
class Result:
    """What was measured of a rung, relative to the straightforward loop."""

    name: str
    switches: dict[str, Any] = field(default_factory=dict)
    """All that was on, kept rungs included."""
    kept: bool = False
    optional: bool = False
    skipped: str | None = None
    """Why nothing was measured."""
    loss_difference: float | None = None
    """Relative, to the library's float32 loss at the same batch; a bf16 rung shows its rounding here."""
    ratio: Spread | None = None
    step_s: float | None = None
    images_per_s: float | None = None
    rounds: list[Round] = field(default_factory=list)


@dataclass
class Ladder:
    """All rungs of one problem."""

    nets: str
    work: str
    batch: int
    units_per_turn: int
    baseline_step_s: float
    rungs: list[Result]
    library: Result
    """The library's own step with its default settings."""
    aim: float | None = None


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int
    turn_s: float
    """Seconds a turn should take: steps are repeated to fill them."""
    compile: bool = True


def rungs_of(problem: Problem, host_together: bool) -> list[Rung]:
    """The ladder of a problem. ``channels_last`` comes after bf16, since on a CPU its worth depends on the dtype.

    Args:
        host_together: one rung for EMA, optimizer, data and syncs, where they are a small part of long steps.
    """
    distil = problem.work == "distil"
    host = (
        [Rung("EMA, optimizer, data, syncs", HOST)]
        if host_together
        else [
            Rung("foreach EMA", {"foreach_ema": True}),
            Rung("fused AdamW", {"fused": True}),
            Rung("device-resident uint8 data", {"resident": True}),
            Rung("no host sync", {"no_sync": True}),
        ]
    )
    graphs = {"compile": "reduce-overhead"} | ({"teacher_compile": "reduce-overhead"} if distil else {})
    return [
        *([Rung("batched branches", {"batched": True})] if distil else []),
        *host,
        *([Rung("TF32, autotuned kernels", {"autotune": True})] if problem.device.type == "cuda" else []),
        *([Rung("bf16 teacher", {"teacher_bf16": True})] if distil else []),
        Rung("bf16 student" if distil else "bf16", {"bf16": True}),
        Rung("channels_last", {"channels_last": True}),
        *([Rung("compiled teacher", {"teacher_compile": "default"})] if distil else []),
        Rung("compiled student" if distil else "compile", {"compile": "default"}),
        *([Rung("CUDA graphs", graphs)] if problem.device.type == "cuda" else []),
        *([Rung("teacher reuse x2", {"reuse": 2}, optional=True)] if distil else []),
    ]


def climb(
    problem: Problem,
    runtime: Runtime,
    watch: Stopwatch,
    effort: Effort,
    *,
    host_together: bool = False,
    say: Callable[[Result], None] = lambda result: None,
) -> Ladder:
    """Measures the whole ladder.

    Raises:
        AssertionError: where the straightforward loop and the library do not compute the same loss in float32.
    """
    baseline = Step(problem, Switches())
    batch, truth = _reference(problem, runtime)
    with exact():
        difference = abs(baseline.loss_on(batch) - truth) / abs(truth)
    assert difference < SAME_LOSS, f"the straightforward loop's loss differs from the library's by {difference:.1e}"

    seconds = watch.seconds(baseline, 1)  # the first step allocates and tunes
    seconds = min(seconds, watch.seconds(baseline, 1))
    units = max(1, round(effort.turn_s / seconds))

    results: list[Result] = []
    kept, best = Switches(), 1.0
    for rung in rungs_of(problem, host_together):
        on = replace(kept, **rung.switches)
        result = Result(rung.name, asdict(on), optional=rung.optional)
        result.skipped = unavailable(rung, problem.device, effort)
        if result.skipped is None:
            _measure(result, partial(_hand, problem, on, batch, truth), baseline, watch, effort.rounds, units)
        if result.ratio and not rung.optional and result.ratio.median >= best * (1 - TOLERANCE):
            result.kept, kept, best = True, on, result.ratio.median
        results.append(result)
        say(result)
    with tempfile.TemporaryDirectory() as folder:
        library = Result("diffstill (default settings)")
        _measure(
            library,
            partial(_product, problem, runtime, Path(folder), batch, truth),
            baseline,
            watch,
            effort.rounds,
            units,
        )
        say(library)
    typical = statistics.median(r.baseline_s for result in (*results, library) for r in result.rounds)
    aim = problem.nets.aim.get(problem.device.type) if problem.work == "distil" else None
    return Ladder(problem.nets.name, problem.work, problem.batch, units, typical, results, library, aim)


def unavailable(rung: Rung, device: torch.device, effort: Effort) -> str | None:
    """Why a rung cannot or should not be measured here; None where it can."""
    if (rung.switches.get("teacher_bf16") or rung.switches.get("bf16")) and not native_bf16(device):
        return "the device has no native bf16"
    if rung.switches.get("compile") or rung.switches.get("teacher_compile"):
        if not effort.compile:
            return "switched off"
        if not has_compiler(device):
            return "no C++ compiler"
    return None


@dataclass
class _Built:
    work: Step | LibraryStep
    loss_difference: float
    reuse: int = 1


def _hand(problem: Problem, on: Switches, batch: Batch, truth: float) -> _Built:
    step = Step(problem, on)
    with exact():
        difference = abs(step.loss_on(batch) - truth) / abs(truth)
    fault = step.compile(batch)
    if fault is not None:
        raise RuntimeError(fault)
    return _Built(step, difference, on.reuse)


def _product(problem: Problem, runtime: Runtime, folder: Path, batch: Batch, truth: float) -> _Built:
    torch.compiler.reset()
    step = LibraryStep(problem, runtime, folder)
    with exact():
        difference = abs(step.loss_on(batch) - truth) / abs(truth)
    return _Built(step, difference)


def _reference(problem: Problem, runtime: Runtime) -> tuple[Batch, float]:
    """The library's first batch and its float32 loss."""
    with tempfile.TemporaryDirectory() as folder, exact():
        plain = {"precision": "fp32", "teacher_precision": "fp32", "compile": False}
        library = LibraryStep(problem, runtime, Path(folder), **plain)
        batch = library.batch()
        return batch, library.loss_on(batch)


def _measure(
    result: Result, build: Callable[[], _Built], baseline: Step, watch: Stopwatch, rounds: int, units: int
) -> None:
    """Fills in a result. A rung that fails on this machine (a kernel missing, no memory) is recorded, not fatal."""
    try:
        made = build()
        result.loss_difference = made.loss_difference
        # Turns of whole reuse periods; two warm steps, since compiled CUDA graphs record in the second.
        count = -(-units // made.reuse) * made.reuse
        result.rounds = watch.against(baseline, made.work, rounds, count, warm=max(2, made.reuse))
        result.ratio = Spread.of([turn.ratio for turn in result.rounds])
        result.step_s = statistics.median(turn.seconds for turn in result.rounds)
        result.images_per_s = baseline.problem.batch / result.step_s
        del made
    except Exception as error:  # compilers and CUDA raise whatever their parts raise
        result.skipped = f"failed: {' '.join(str(error).split())[:200] or type(error).__name__}"
    gc.collect()
    if watch.device.type == "cuda":
        torch.cuda.empty_cache()
