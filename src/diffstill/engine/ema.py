"""Exponential moving average of a network's weights, kept as a separate, never compiled copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .state import load_own, own_state


class Ema:
    """``ema <- d ema + (1 - d) weights`` with ``d = min(decay, (1 + n) / (10 + n))`` at update n (cap optional)."""

    def __init__(self, network: nn.Module, decay: float, cap: bool = True) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay, self.cap, self.updates = decay, cap, 0
        theirs = {id(p) for p in network.parameters()}
        # A network may share weights with others (LoRA's base): its copy shares them too, and they never change.
        self._shared = {name for name, p in self.network.named_parameters() if id(p) in theirs}
        self._mine: list[Tensor] = list(self._averaged(self.network))
        self._buffers = list(self.network.buffers())

    def rate(self) -> float:
        """The decay that the next update uses."""
        n = self.updates + 1
        return min(self.decay, (1 + n) / (10 + n)) if self.cap else self.decay

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        theirs = [p.detach() for p in self._averaged(network)]
        rate = self.rate()
        torch._foreach_lerp_(self._mine, theirs, 1 - rate)
        for mine, other in zip(self._buffers, network.buffers(), strict=True):
            mine.copy_(other)
        self.updates += 1

    def _averaged(self, network: nn.Module) -> Iterator[nn.Parameter]:
        named = network.named_parameters()
        return (p for name, p in named if name not in self._shared and p.is_floating_point())

    def state(self) -> dict[str, Tensor]:
        """What is its own."""
        return own_state(self.network, self._shared)

    def load(self, tensors: dict[str, Tensor], updates: int) -> None:
        load_own(self.network, self._shared, tensors)
        self.updates = updates
