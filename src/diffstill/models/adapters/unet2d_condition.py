"""diffusers' ``UNet2DConditionModel`` with class labels; it has an input for the guidance scale of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ...diffusion.scale import scale_features
from . import unet2d
from .base import Family, unwrap


def build(
    *,
    sample_shape: tuple[int, int, int],
    num_classes: int,
    block_out_channels: Sequence[int],
    time_cond_proj_dim: int | None = None,
    **unet: Any,
) -> UNet2DConditionModel:
    """The blocks that the ``unet2d`` family would build, without cross-attention, with a null row at ``num_classes``.

    ``time_cond_proj_dim``: number of features of the guidance scale; None: it takes none.
    """
    # Built once as the other family, which refuses what does not fit and knows the details.
    config = unet2d.build(
        sample_shape=sample_shape, num_classes=num_classes, block_out_channels=block_out_channels, **unet
    ).config
    made = UNet2DConditionModel(
        **{name: config[name] for name in _SHARED},
        mid_block_type="UNetMidBlock2D",
        attention_head_dim=config.attention_head_dim or tuple(block_out_channels),  # one head over all channels
        cross_attention_dim=8,  # of no block, and some number must be given
        time_cond_proj_dim=time_cond_proj_dim,
    )
    if time_cond_proj_dim is not None:
        nn.init.zeros_(made.time_embedding.cond_proj.weight)
    return made


_SHARED = (
    "sample_size",
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "up_block_types",
    "norm_num_groups",
    "norm_eps",
    "downsample_padding",
    "flip_sin_to_cos",
    "freq_shift",
    "dropout",
    "num_class_embeds",
)


def with_scale_input(plain: Any, guidance_embed_dim: int, guidance_embed_type: str = "lcm") -> UNet2DConditionModel:
    """The same network with the guidance scale as an input that has no effect until it is trained."""
    if guidance_embed_type != "lcm":
        raise ValueError(f"guidance_embed_type {guidance_embed_type!r}: a UNet2DConditionModel takes lcm features")
    config = {name: value for name, value in plain.config.items() if not name.startswith("_")}
    made = UNet2DConditionModel(**{**config, "time_cond_proj_dim": guidance_embed_dim})
    nn.init.zeros_(made.time_embedding.cond_proj.weight)
    made.load_state_dict({**made.state_dict(), **plain.state_dict()}, strict=True)
    return made


def call(network: Any, x_t: Tensor, t: Tensor, labels: Tensor, scale: Tensor | None = None) -> Tensor:
    config: Any = unwrap(network).config
    dim, width = config.time_cond_proj_dim, config.cross_attention_dim
    shown = None
    if dim is not None:
        shown = scale_features(torch.ones(len(x_t), device=x_t.device) if scale is None else scale, dim)
    # A network with cross-attention is told nothing by it: one token of zeros.
    token = x_t.new_zeros(len(x_t), 1, width if isinstance(width, int) else width[0])
    made: Tensor = network(x_t, t, token, class_labels=labels, timestep_cond=shown, return_dict=False)[0]
    return made


UNET2D_CONDITION = Family(
    name="unet2d_condition",
    network_class=UNet2DConditionModel,
    call=call,
    takes_scale=lambda network: getattr(network, "config", {}).get("time_cond_proj_dim") is not None,
    build=build,
    stages=unet2d.stages,
    taps=unet2d.taps,
    blocks=unet2d.blocks,
    last=unet2d.last,
    options={**unet2d.UNET2D.options, "time_cond_proj_dim": None},
)
