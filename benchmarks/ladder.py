"""The speed ladder: rung after rung on top of the straightforward loop, each kept only where it does not cost."""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import held_memory, peak_memory_mb
from problem import Problem
from product import LibraryStep, exact
from step import Flops, Step, Switches, step_flops
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
    """Why nothing was measured; beside a ratio, what failed after it."""
    loss_difference: float | None = None
    """Relative, to the library's float32 loss at the same batch; a bf16 rung shows its rounding here."""
    ratio: Spread | None = None
    step_s: float | None = None
    images_per_s: float | None = None
    rounds: list[Round] = field(default_factory=list)
    peak_memory_mb: float | None = None
    """Peak of the device memory of this step's tensors, weights and data included, in 10^6 bytes.

    Measured in an untimed turn after the rounds. The baseline lives on the device meanwhile, at rest: all that was
    held before this step was built is taken off. The pools of CUDA graphs count in full; what the allocator keeps
    for reuse, and CUDA's own context, do not. None on devices that do not tell."""
    dtype: str | None = None
    """``bf16`` or ``fp32``: in which more than half of the step's FLOPs are done, the teacher's included. Of the
    library's step: what its settings resolve to on this device."""
    utilisation: float | None = None
    """FLOPs of the step a second, over the device's rate of large matrix products of ``dtype``."""
    process: int = 1
    """Which process of a resumed run measured this. Its baseline was timed in that process, too: a ratio never has
    its two halves in different ones."""

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Result:
        """From what ``asdict`` made of one."""
        ratio = None if plain["ratio"] is None else Spread(**plain["ratio"])
        return cls(**{**plain, "ratio": ratio, "rounds": [Round(**turn) for turn in plain["rounds"]]})


@dataclass
class Begun:
    """A ladder of which some rungs are measured: what a later process needs to go on with the next one."""

    nets: str
    work: str
    batch: int
    units_per_turn: int
    rungs: list[Result] = field(default_factory=list)

    def standing(self) -> tuple[Switches, float]:
        """What was kept so far, and its ratio."""
        kept = [(rung.switches, rung.ratio.median) for rung in self.rungs if rung.kept and rung.ratio]
        return (Switches(**kept[-1][0]), kept[-1][1]) if kept else (Switches(), 1.0)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Begun:
        """From what ``asdict`` made of one."""
        return cls(**{**plain, "rungs": [Result.of(rung) for rung in plain["rungs"]]})


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
    baseline_peak_memory_mb: float | None = None
    """As a result's; nothing else is held then but the batch at which losses are compared."""
    baseline_utilisation: float | None = None
    """As a result's, in ``fp32``."""
    flops_step: float | None = None
    """Of the straightforward step."""
    flops_teacher: float | None = None
    """The teacher's part of them."""

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Ladder:
        """From what ``asdict`` made of one."""
        rungs = [Result.of(rung) for rung in plain["rungs"]]
        return cls(**{**plain, "rungs": rungs, "library": Result.of(plain["library"])})


@dataclass(frozen=True)
class Bench:
    """What measures: one process on one machine."""

    runtime: Runtime
    watch: Stopwatch
    rates: Mapping[str, float | None]
    """Of ``machine.matrix_rate``."""
    process: int = 1
    """Counted from 1 over the processes of a resumed run."""

    @property
    def device(self) -> torch.device:
        return self.watch.device

    def utilisation(self, flops: float, seconds: float, dtype: str) -> float | None:
        """Share of the device's matrix rate; None where that rate is not known."""
        rate = self.rates.get(dtype)
        return None if rate is None else flops / seconds / rate


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int
    turn_s: float
    """Seconds a turn should take: steps are repeated to fill them."""
    compile: bool = True
    by_hand: bool = True
    """Whether to measure the rungs, or the library's own step alone."""


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
        *([Rung("TF32 matrix products", {"autotune": True})] if problem.device.type == "cuda" else []),
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
    bench: Bench,
    effort: Effort,
    *,
    host_together: bool = False,
    begun: Begun | None = None,
    keep: Callable[[Begun], None] = lambda begun: None,
    say: Callable[[Result], None] = lambda result: None,
) -> Ladder:
    """Measures the whole ladder, or what is left of one.

    Args:
        begun: of an earlier process: its rungs are taken as they are. The baseline is timed anew beside the others.
        keep: called after every rung with all that a later process needs to go on from there.

    Raises:
        AssertionError: where the straightforward loop and the library do not compute the same loss in float32.
    """
    watch = bench.watch
    batch, truth = _reference(problem, bench.runtime)
    _clean(bench.device)
    resident = held_memory(bench.device)
    baseline = Step(problem, Switches())
    with exact():
        difference = abs(baseline.loss_on(batch) - truth) / abs(truth)
    assert difference < SAME_LOSS, f"the straightforward loop's loss differs from the library's by {difference:.1e}"

    seconds = watch.seconds(baseline, 1)  # the first step allocates and tunes
    seconds = min(seconds, watch.seconds(baseline, 1))
    memory = peak_memory_mb(bench.device, partial(watch.seconds, baseline, 1), resident)
    if begun is None:
        units = max(1, round(effort.turn_s / seconds))
        begun = Begun(problem.nets.name, problem.work, problem.batch, units)
    race = _Race(baseline, bench, effort.rounds, begun.units_per_turn, step_flops(problem))

    rungs = rungs_of(problem, host_together) if effort.by_hand else []
    for rung in rungs[len(begun.rungs) :]:
        kept, best = begun.standing()
        on = replace(kept, **rung.switches)
        result = Result(rung.name, asdict(on), optional=rung.optional, process=bench.process)
        result.skipped = unavailable(rung, problem.device, effort)
        if result.skipped is None:
            race.run(result, partial(_hand, problem, on, batch, truth))
        result.kept = bool(result.ratio and not rung.optional and result.ratio.median >= best * (1 - TOLERANCE))
        begun.rungs.append(result)
        keep(begun)
        say(result)
    library = Result("diffstill (default settings)", process=bench.process)
    with tempfile.TemporaryDirectory() as folder:
        race.run(library, partial(_product, problem, bench.runtime, Path(folder), batch, truth))
    say(library)
    return race.ladder(begun, library, memory)


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
    bf16: bool
    teacher_bf16: bool
    reuse: int = 1


def _hand(problem: Problem, on: Switches, batch: Batch, truth: float) -> _Built:
    step = Step(problem, on)
    with exact():
        difference = abs(step.loss_on(batch) - truth) / abs(truth)
    step.prepare()  # so that what is compiled for the check is what runs
    fault = step.compile(batch)
    if fault is not None:
        raise RuntimeError(fault)
    return _Built(step, difference, on.bf16, on.teacher_bf16, on.reuse)


def _product(problem: Problem, runtime: Runtime, folder: Path, batch: Batch, truth: float) -> _Built:
    torch.compiler.reset()
    step = LibraryStep(problem, runtime, folder)
    with exact():
        difference = abs(step.loss_on(batch) - truth) / abs(truth)
    return _Built(step, difference, step.bf16, step.teacher_bf16, step.settings.teacher_reuse)


def _reference(problem: Problem, runtime: Runtime) -> tuple[Batch, float]:
    """The library's first batch and its float32 loss."""
    with tempfile.TemporaryDirectory() as folder, exact():
        plain = {"precision": "fp32", "teacher_precision": "fp32", "compile": False}
        library = LibraryStep(problem, runtime, Path(folder), **plain)
        batch = library.batch()
        return batch, library.loss_on(batch)


@dataclass(frozen=True)
class _Race:
    """Candidates against one baseline."""

    baseline: Step
    bench: Bench
    rounds: int
    units: int
    flops: Flops
    """Of the baseline's step."""

    def run(self, result: Result, build: Callable[[], _Built]) -> None:
        """Fills in a result. A rung that fails on this machine (a kernel missing, no memory) is recorded, not fatal."""
        resident = held_memory(self.bench.device)
        try:
            self._measure(result, build(), resident)
        except Exception as error:  # compilers and CUDA raise whatever their parts raise
            result.skipped = f"failed: {' '.join(str(error).split())[:200] or type(error).__name__}"
        _clean(self.bench.device)

    def _measure(self, result: Result, made: _Built, resident: int) -> None:
        watch = self.bench.watch
        result.loss_difference = made.loss_difference
        # Turns of whole reuse periods; two of them to warm up, since compiled CUDA graphs record in their second step.
        count = -(-self.units // made.reuse) * made.reuse
        result.rounds = watch.against(self.baseline, made.work, self.rounds, count, warm=2 * made.reuse)
        result.ratio = Spread.of([turn.ratio for turn in result.rounds])
        result.step_s = statistics.median(turn.seconds for turn in result.rounds)
        result.images_per_s = self.baseline.problem.batch / result.step_s
        flops = self.flops.reusing(made.reuse)
        result.dtype = flops.dtype(bf16=made.bf16, teacher_bf16=made.teacher_bf16)
        result.utilisation = self.bench.utilisation(flops.step, result.step_s, result.dtype)
        turn = partial(watch.seconds, made.work, max(2, made.reuse))
        result.peak_memory_mb = peak_memory_mb(self.bench.device, turn, resident)

    def ladder(self, begun: Begun, library: Result, memory: float | None) -> Ladder:
        typical = statistics.median(r.baseline_s for result in (*begun.rungs, library) for r in result.rounds)
        return Ladder(
            begun.nets,
            begun.work,
            begun.batch,
            begun.units_per_turn,
            typical,
            begun.rungs,
            library,
            self.baseline.problem.aim,
            baseline_peak_memory_mb=memory,
            baseline_utilisation=self.bench.utilisation(self.flops.step, typical, "fp32"),
            flops_step=self.flops.step,
            flops_teacher=self.flops.teacher,
        )


def _clean(device: torch.device) -> None:
    """Lets go of what a finished step leaves behind, so that it takes no memory from the next."""
    gc.collect()
    if device.type == "cuda":
        torch.compiler.reset()  # compiled code keeps CUDA graphs, and their memory, alive
        torch.cuda.empty_cache()
