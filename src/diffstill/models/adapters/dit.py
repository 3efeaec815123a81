"""diffusers' ``DiTTransformer2DModel`` on pixels or latents."""

from __future__ import annotations

from typing import Any

from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from .base import Family


def build(
    *,
    sample_shape: tuple[int, int, int],
    num_classes: int,
    num_layers: int = 6,
    num_attention_heads: int = 4,
    attention_head_dim: int = 32,
    patch_size: int = 2,
    dropout: float = 0.0,
) -> DiTTransformer2DModel:
    """A DiT whose label table has the null row at ``num_classes``; its own label dropout is never used."""
    channels, height, width = sample_shape
    if height != width:
        raise ValueError(f"DiT takes square images, not {height}x{width}")
    if height % patch_size:
        raise ValueError(f"image size {height} must be divisible by patch_size {patch_size}")
    model = DiTTransformer2DModel(
        num_attention_heads=num_attention_heads,
        attention_head_dim=attention_head_dim,
        in_channels=channels,
        out_channels=channels,
        num_layers=num_layers,
        dropout=dropout,
        sample_size=height,
        patch_size=patch_size,
        num_embeds_ada_norm=num_classes,
    )
    _label_dropout_off(model)
    return model


def _label_dropout_off(model: Any) -> None:
    # DiT drops labels by itself in train mode; label dropout belongs to the method, per sample and reproducible.
    for module in model.modules():
        if hasattr(module, "dropout_prob") and hasattr(module, "token_drop"):
            module.dropout_prob = 0.0


def call(network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    _label_dropout_off(network)
    return network(x_t, timestep=t, class_labels=labels, return_dict=False)[0]


def stages(network: Any) -> dict[str, nn.Module]:
    """Outputs of the blocks, and ``last``: the normalised output of the last one."""
    return {f"block.{i}": block for i, block in enumerate(network.transformer_blocks)} | {"last": network.norm_out}


DIT = Family(
    name="dit",
    network_class=DiTTransformer2DModel,
    call=call,
    build=build,
    stages=stages,
    options={
        "num_layers": 6,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "patch_size": 2,
        "dropout": 0.0,
    },
)
