"""One small adapter a model family: how to build it from a recipe, call it, and name its feature stages."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import guided_unet2d, unet2d_condition
from .base import Family, unwrap
from .dit import DIT
from .guided_unet2d import GUIDED_UNET2D
from .prompted_unet import PROMPTED_UNET
from .unet2d import UNET2D
from .unet2d_condition import UNET2D_CONDITION

FAMILIES: dict[str, Family] = {family.name: family for family in (GUIDED_UNET2D, UNET2D, UNET2D_CONDITION, DIT)}
"""The special before the general: the first whose class a network is an instance of is its family."""
NOT_BUILT = (PROMPTED_UNET,)
"""Families whose networks are loaded and never built from a recipe."""


def family_of(network: nn.Module) -> Family:
    """The adapter of a network; networks of unknown class are called as ``network(x_t, t, labels)``."""
    inner = unwrap(network)
    for family in (*NOT_BUILT, *FAMILIES.values()):
        if isinstance(inner, family.network_class):
            return family
    return Family(name=type(inner).__name__, network_class=type(inner))


def with_scale_input(network: nn.Module, **options: Any) -> nn.Module:
    """The same network, weights included, with the guidance scale as an input that has no effect until it is trained.

    Raises:
        ValueError: a family that cannot take it, or options that do not fit.
    """
    family = family_of(network).name
    if family == "unet2d":
        return guided_unet2d.with_scale_input(network, **options)
    if family == "unet2d_condition":
        return unet2d_condition.with_scale_input(network, **options)
    raise ValueError(f"a {family} network cannot take the guidance scale; use a teacher of the unet2d family")


__all__ = ["FAMILIES", "Family", "family_of", "unwrap", "with_scale_input"]
