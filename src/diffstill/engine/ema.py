"""Exponential moving average of a network's weights, kept as a separate, never compiled copy."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """``ema <- d ema + (1 - d) weights`` with ``d = min(decay, (1 + n) / (10 + n))`` at update n (cap optional)."""

    def __init__(self, network: nn.Module, decay: float, cap: bool = True) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay, self.cap, self.updates = decay, cap, 0
        self._mine: list[Tensor] = [p for p in self.network.parameters() if p.is_floating_point()]
        self._buffers = list(self.network.buffers())

    def rate(self) -> float:
        """The decay that the next update uses."""
        n = self.updates + 1
        return min(self.decay, (1 + n) / (10 + n)) if self.cap else self.decay

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        theirs = [p.detach() for p in network.parameters() if p.is_floating_point()]
        rate = self.rate()
        torch._foreach_lerp_(self._mine, theirs, 1 - rate)
        for mine, other in zip(self._buffers, network.buffers(), strict=True):
            mine.copy_(other)
        self.updates += 1

    def state(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def load(self, tensors: dict[str, Tensor], updates: int) -> None:
        self.network.load_state_dict(tensors, strict=True)
        self.updates = updates
