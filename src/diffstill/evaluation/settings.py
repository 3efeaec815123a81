"""How a model is measured: the settings of the protocol."""

from __future__ import annotations

from dataclasses import dataclass

from ..diffusion.guidance import GuidanceSchedule, parse_guidance
from ..diffusion.sampling import ClipMode
from ..errors import InputError


@dataclass(frozen=True)
class EvalSettings:
    """How a model is measured; equal settings, equal protocol."""

    samples: int = 1000
    """Generated images a seed and guidance setting; distances are biased upward at small numbers, alike for all."""
    steps: int = 50
    guidance: tuple[str, ...] = ("1", "1.5", "2", "3", "4", "tag:1,4,5")
    seeds: tuple[int, ...] = (0,)
    """Sampling seeds. From three on, intervals come from their spread."""
    pairs: int = 2000
    """Held-out (x_t, t, y) for guidance fidelity."""
    batch_size: int = 500
    clip: ClipMode = "recompute"
    neighbours: int = 3
    """k of precision and recall."""
    neighbour_points: int = 10_000
    """Points a side at most for precision, recall and KID, whose cost grows with their square."""
    bootstrap: int = 200
    cost_batches: tuple[int, ...] = (1, 64)
    cost_seconds: float = 4.0
    """Time for the latency runs of one batch size; two runs are made in any case."""

    def __post_init__(self) -> None:
        least = dict.fromkeys(("steps", "pairs", "batch_size", "neighbours"), 1)
        least |= dict.fromkeys(("samples", "neighbour_points"), 2 * (self.neighbours + 1))
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"evaluation.{name}", getattr(self, name), f"use {low} or more")
        for name in ("guidance", "seeds"):
            if not getattr(self, name):
                raise InputError(f"evaluation.{name}", getattr(self, name), "give at least one")
        try:
            self.schedules()
        except ValueError as error:
            raise InputError("evaluation.guidance", list(self.guidance), str(error)) from None

    def schedules(self) -> list[GuidanceSchedule]:
        """The guidance settings, parsed."""
        return [parse_guidance(text) for text in self.guidance]
