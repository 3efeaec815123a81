"""Methods by kind, and a bench for one beside a larger teacher."""

from __future__ import annotations

from typing import Any

from diffstill.checks.bench import Bench, tiny_denoiser
from diffstill.diffusion.prediction import PredictionType
from diffstill.methods import METHODS

DISTILLERS = ("composite", "conditional", "dash", "fitnets", "gap", "sfddm", "single-head")
OTHER_NETWORKS = ("guided", "progressive", "encoder", "unidad")


def bench(name: str, kind: PredictionType = "epsilon", **options: Any) -> Bench:
    teacher = tiny_denoiser((8, 16), 1)
    teacher.prediction_type = kind
    return Bench(METHODS[name], options, teacher=teacher)
