"""Feature taps by forward hooks (removed even after an exception), projectors that bridge widths, heads that judge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from .adapters import family_of, unwrap
from .denoiser import Denoiser

Taps = Literal["all", "blocks", "last"] | int | tuple[str, ...]
"""Which of a network's encoder taps: all; the coarser blocks; the last; the last so many; or by name."""


class _Reached(Exception):
    """The last stage that was asked for has been run; what follows is not needed."""


@contextmanager
def tapped(
    network: nn.Module, on: bool = True, stages: Mapping[str, nn.Module] | None = None, stop_at: str | None = None
) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of the network's named stages during forwards inside the block.

    Hooks sit on the unwrapped module, so they survive DDP; blocks that return ``(hidden, skips)`` give the hidden.

    Args:
        stages: which; None: all of the family's.
        stop_at: a stage after which the forward is broken off, with the block.
    """
    features: dict[str, Tensor] = {}
    handles = []
    if on:
        inner = unwrap(network)

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                features[name] = output[0] if isinstance(output, tuple) else output
                if name == stop_at:
                    raise _Reached

            return hook

        named = family_of(inner).stages(inner) if stages is None else stages
        handles = [stage.register_forward_hook(keep(name)) for name, stage in named.items()]
    try:
        yield features
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()


class Projector(nn.Module):
    """1x1 convolutions from the student's feature widths to the teacher's; trained with the student, never exported."""

    def __init__(self, widths: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.keys = {name: name.replace(".", "_") for name in widths}
        self.layers = nn.ModuleDict(
            {self.keys[name]: nn.Conv2d(student, teacher, 1) for name, (student, teacher) in widths.items()}
        )

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.layers[key](features[name]) for name, key in self.keys.items()}


def encoder_taps(network: nn.Module) -> dict[str, nn.Module]:
    """The encoder's blocks and the middle by name; empty for a family that has none."""
    inner = unwrap(network)
    return family_of(inner).taps(inner)


def encoder_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The encoder's stages after their downsampling and the middle by name: a coarser choice of taps."""
    inner = unwrap(network)
    return family_of(inner).blocks(inner)


def chosen_taps(network: nn.Module, asked: Taps) -> tuple[str, ...]:
    """The names of the taps that are asked for, in the network's order; none where it has no encoder.

    Raises:
        InputError: the network has no tap of a name.
    """
    known = tuple(encoder_taps(network))
    if asked == "all":
        return known
    if asked == "blocks":
        return tuple(encoder_blocks(network))
    if asked == "last" or isinstance(asked, int):
        return known[-1:] if asked == "last" else known[-asked:]
    for name in asked:
        if known and name not in known:
            raise InputError("method.taps", name, f"use of {', '.join(known)}")
    return tuple(name for name in known if name in asked)


def encode_features(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, labels: Tensor, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """Outputs (B, C, h, w) float32 of the taps ``names``; what follows after the last of them is not run."""
    taps = encoder_blocks(denoiser.network) | encoder_taps(denoiser.network)
    plain = denoiser.with_network(unwrap(denoiser.network))
    with tapped(plain.network, stages={name: taps[name] for name in names}, stop_at=names[-1]) as features:
        plain(x_t, t, labels)
    return {name: feature.float() for name, feature in features.items()}


class Heads(nn.Module):
    """Small classifiers on a network's features, one a tap: logits (B, places) each, without mixing samples.

    Args:
        shapes: tap -> (C, h, w) of its features.
        kind: ``linear``, a 1x1 convolution to one channel (Uni-DAD); ``conv``, two strided convolutions with norm
            before it (DMD2's head on the bottleneck, smaller where the features are).
        pool: ``global`` averages the places into one; ``patch`` keeps them.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int, int]],
        kind: Literal["linear", "conv"] = "linear",
        pool: Literal["global", "patch"] = "global",
    ) -> None:
        super().__init__()
        self.pool = pool
        make = _conv_head if kind == "conv" else _linear_head
        self.names = tuple(shapes)
        self.layers = nn.ModuleList(make(*shape) for shape in shapes.values())

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        logits = [layer(features[name]).flatten(1) for name, layer in zip(self.names, self.layers, strict=True)]
        return [z.mean(1, keepdim=True) for z in logits] if self.pool == "global" else logits


def _linear_head(channels: int, height: int, width: int) -> nn.Module:
    return nn.Conv2d(channels, 1, 1)


def _conv_head(channels: int, height: int, width: int) -> nn.Module:
    layers: list[nn.Module] = []
    side = min(height, width)
    for stride in (2, 4):
        kernel = min(4, side)
        step = min(stride, kernel)
        padding = 1 if kernel == 4 and stride == 2 else 0
        layers += [
            nn.Conv2d(channels, channels, kernel, step, padding),
            nn.GroupNorm(math.gcd(channels, max(1, channels // 8)), channels),
            nn.SiLU(),
        ]
        side = (side + 2 * padding - kernel) // step + 1
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))


def feature_shapes(denoiser: Denoiser, names: tuple[str, ...]) -> dict[str, tuple[int, int, int]]:
    """Tap -> (C, h, w) of its features, by one forward on a blank image."""
    device = denoiser.device
    x = torch.zeros((1, *denoiser.sample_shape), device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    with denoiser.evaluating():
        found = encode_features(denoiser, x, zero, zero, names)
    return {name: tuple(found[name].shape[1:]) for name in names}  # type: ignore[misc]
