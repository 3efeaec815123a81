"""Feature taps by forward hooks (removed even after an exception) and the projectors that bridge widths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .adapters import family_of, unwrap


@contextmanager
def tapped(network: nn.Module, on: bool = True) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of the network's named stages during forwards inside the block.

    Hooks sit on the unwrapped module, so they survive DDP; blocks that return ``(hidden, skips)`` give the hidden.
    """
    features: dict[str, Tensor] = {}
    handles = []
    if on:
        inner = unwrap(network)

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                features[name] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [stage.register_forward_hook(keep(name)) for name, stage in family_of(inner).stages(inner).items()]
    try:
        yield features
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
