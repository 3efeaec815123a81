"""Ratios in one run: every candidate is timed in turns with the baseline, so slow drifts of the machine cancel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

Clock = Literal["wall", "cpu"]
"""``cpu`` counts the process's own CPU seconds: for a busy machine, with one thread."""


class Timed(Protocol):
    """Work that is timed: ``prepare`` sets what is global, untimed; a call is one unit of work."""

    def prepare(self) -> None: ...

    def __call__(self) -> None: ...


@dataclass(frozen=True)
class Round:
    """One turn: the baseline before and after (mean of both), the candidate between; seconds a unit of work."""

    baseline_s: float
    seconds: float
    ratio: float
    """``baseline_s / seconds``: above 1 the candidate is faster."""


@dataclass(frozen=True)
class Spread:
    """Of the rounds' ratios."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


class Stopwatch:
    """Times units of work on a device by a clock."""

    def __init__(self, device: torch.device, clock: Clock = "wall") -> None:
        self.device = device
        self._now: Callable[[], float] = time.perf_counter if clock == "wall" else time.process_time

    def seconds(self, work: Timed, count: int) -> float:
        """Seconds a unit over ``count`` units, the device's queue drained before and after."""
        work.prepare()
        self._drain()
        began = self._now()
        for _ in range(count):
            work()
        self._drain()
        return (self._now() - began) / count

    def against(self, baseline: Timed, candidate: Timed, rounds: int, count: int, warm: int = 1) -> list[Round]:
        """Rounds of A B A B ... A, where each B is compared with the mean of the A before and the A after it.

        Args:
            count: units of work a turn.
            warm: units of the candidate that are run first and not counted (compilation, autotuning, caches).
        """
        self.seconds(candidate, warm)
        before = self.seconds(baseline, count)
        made = []
        for _ in range(rounds):
            mine = self.seconds(candidate, count)
            after = self.seconds(baseline, count)
            mean = (before + after) / 2
            made.append(Round(mean, mine, mean / mine))
            before = after
        return made

    def _drain(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
