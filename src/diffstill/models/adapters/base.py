"""What an adapter says about a model family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


def unwrap(network: nn.Module) -> nn.Module:
    """The module itself beneath ``torch.compile`` and DistributedDataParallel."""
    while True:
        inner: Any = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        if not isinstance(inner, nn.Module):
            return network
        network = inner


def _plain_call(network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor, *scale: Tensor) -> Tensor:
    return network(x_t, t, labels, *scale)


def _never(network: nn.Module) -> bool:
    return False


def _no_stages(network: nn.Module) -> dict[str, nn.Module]:
    return {}


def _no_last(network: nn.Module) -> None:
    return None


def _no_build(**kwargs: Any) -> nn.Module:
    raise TypeError("this family cannot be built from a recipe")


@dataclass(frozen=True)
class Family:
    """A model family. ``stages`` names the modules whose outputs are feature maps, from input to output."""

    name: str
    network_class: type[nn.Module]
    call: Callable[..., Tensor] = _plain_call
    """``call(network, x_t, t, labels)``, and ``scale`` (B,) last where the network takes it."""
    takes_scale: Callable[[nn.Module], bool] = _never
    """Whether the guidance scale is an input of a network."""
    build: Callable[..., nn.Module] = _no_build
    """``build(sample_shape=, num_classes=, **recipe_options)``; ValueError names the option that does not fit."""
    stages: Callable[[nn.Module], dict[str, nn.Module]] = _no_stages
    options: dict[str, Any] = field(default_factory=dict)
    """Recipe options and their defaults."""
    taps: Callable[[nn.Module], dict[str, nn.Module]] = _no_stages
    """The encoder's blocks and the middle one, from input to output: where a discriminator may look. After the last of
    them the decoder follows."""
    blocks: Callable[[nn.Module], dict[str, nn.Module]] = _no_stages
    """A coarser choice of taps: the encoder's stages, each after its downsampling, and the middle."""
    last: Callable[[nn.Module], nn.Module | None] = _no_last
    """The layer that makes the prediction, whose rounding is the prediction's."""
