"""Figures over several seeds, as ``chains.py`` writes them, and how a table shows one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffstill.evaluation.results import Estimate
from diffstill.report import words

RESULTS = Path(__file__).parent / "results"


def scaled(estimate: dict[str, Any], factor: float) -> Estimate:
    parts = {key: None if estimate[key] is None else factor * estimate[key] for key in ("value", "low", "high")}
    return Estimate(**parts, level=estimate["level"])


def chain_models(file: str) -> dict[str, Any]:
    """The models of a chain over several seeds, as ``chains.py`` writes them."""
    found: dict[str, Any] = json.loads((RESULTS / file).read_text(encoding="utf-8"))["models"]
    return found


def cell(model: dict[str, Any], figure: str, factor: float = 1) -> str:
    """Mean over the seeds with half a 95% t-interval; a dash where it was not measured."""
    found = model["figures"].get(figure)
    return words.plus_minus(scaled({**found["mean"], "level": 0.95}, factor)) if found else words.MISSING
