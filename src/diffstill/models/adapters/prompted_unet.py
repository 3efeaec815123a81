"""A text-conditioned ``UNet2DConditionModel`` whose labels are prompts: the rows of a table of their embeddings."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from . import unet2d
from .base import Family


class PromptedUNet(nn.Module):
    """``(x_t, t, labels) -> prediction`` by a U-Net that is shown row ``labels`` of ``table``.

    Which prompt a model sees is thus a matter of its table, and no method need know of text. With adapters (LoRA) in
    its U-Net, they alone are its trainable weights, and its copies have adapters of their own over the same base.

    Args:
        unet: with cross-attention.
        table: (P + 1, tokens, width) embeddings of P prompts; the last row is the negative prompt, the null label.
    """

    table: Tensor

    def __init__(self, unet: nn.Module, table: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("table", table)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        made: Tensor = self.unet(x_t, t, self.table[labels], return_dict=False)[0]
        return made

    @property
    def adapted(self) -> bool:
        """Whether the U-Net carries adapters."""
        return bool(getattr(self.unet, "peft_config", None))

    def adapters(self) -> list[nn.Parameter]:
        return [p for name, p in self.unet.named_parameters() if ".lora_" in name]

    def requires_grad_(self, requires_grad: bool = True) -> PromptedUNet:
        """Of an adapted network: of the adapters; the base is shared and stays frozen."""
        if not self.adapted:
            return super().requires_grad_(requires_grad)
        for parameter in self.adapters():
            parameter.requires_grad_(requires_grad)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptedUNet:
        unet = sharing_copy(self.unet, keep=self.adapters(), memo=memo) if self.adapted else None
        return PromptedUNet(unet or copy.deepcopy(self.unet, memo), self.table.clone())

    def with_adapters(self, config: Any, seed: int) -> PromptedUNet:
        """The same prediction with LoRA adapters over this network's own weights, which are shared and frozen.

        Args:
            config: a ``peft.LoraConfig``.
            seed: of their first values.
        """
        unet: Any = sharing_copy(self.unet)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet.add_adapter(config)
        return PromptedUNet(unet, self.table).requires_grad_(True)


def sharing_copy(module: nn.Module, keep: list[nn.Parameter] | None = None, memo: dict[int, Any] | None = None) -> Any:
    """A module of the same structure that holds the very same parameters, but for copies of those in ``keep``."""
    own = {id(p) for p in keep or ()}
    memo = {} if memo is None else memo
    memo |= {id(p): p for p in module.parameters() if id(p) not in own}
    return copy.deepcopy(module, memo)


def _of_unet(tell: Any) -> Any:
    return lambda network: tell(network.unet)


PROMPTED_UNET = Family(
    name="prompted_unet",
    network_class=PromptedUNet,
    stages=_of_unet(unet2d.stages),
    taps=_of_unet(unet2d.taps),
    blocks=_of_unet(unet2d.blocks),
    last=_of_unet(unet2d.last),
)
