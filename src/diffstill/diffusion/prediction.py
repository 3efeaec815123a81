"""Conversions between what a network predicts: ``epsilon``, ``sample`` (x0) and ``v_prediction`` (Salimans & Ho)."""

from __future__ import annotations

from typing import Literal, Union

from torch import Tensor

PredictionType = Literal["epsilon", "sample", "v_prediction"]
Level = Union[Tensor, float]  # noqa: UP007 (travels to older Pythons)
"""A signal or noise scale: a number, or a tensor that broadcasts."""
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "sample", "v_prediction")


def to_x0(prediction: Tensor, x_t: Tensor, alpha: Level, sigma: Level, kind: PredictionType) -> Tensor:
    """Clean-image estimate. All tensors broadcast; ``alpha`` and ``sigma`` are the schedule's values at t."""
    if kind == "epsilon":
        return (x_t - sigma * prediction) / alpha
    if kind == "sample":
        return prediction
    if kind == "v_prediction":
        return alpha * x_t - sigma * prediction
    raise ValueError(f"unknown prediction type {kind!r}; one of {', '.join(PREDICTION_TYPES)}")


def to_epsilon(prediction: Tensor, x_t: Tensor, alpha: Level, sigma: Level, kind: PredictionType) -> Tensor:
    """Noise estimate. Division by ``sigma`` for ``sample`` predictions: exact down to the schedule's first timestep."""
    if kind == "epsilon":
        return prediction
    if kind == "sample":
        return (x_t - alpha * prediction) / sigma
    if kind == "v_prediction":
        return alpha * prediction + sigma * x_t
    raise ValueError(f"unknown prediction type {kind!r}; one of {', '.join(PREDICTION_TYPES)}")


def target(x0: Tensor, noise: Tensor, alpha: Level, sigma: Level, kind: PredictionType) -> Tensor:
    """What a network of this kind is trained to output: eps, x0, or ``v = alpha eps - sigma x0``."""
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return x0
    if kind == "v_prediction":
        return alpha * noise - sigma * x0
    raise ValueError(f"unknown prediction type {kind!r}; one of {', '.join(PREDICTION_TYPES)}")
