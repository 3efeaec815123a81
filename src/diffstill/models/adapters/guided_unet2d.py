"""``UNet2DModel`` with the guidance scale as an input (pipelines/guided_unet.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...pipelines.guided_unet import GuidedUNet2DModel
from . import unet2d
from .base import Family

OPTIONS = {"guidance_embed_dim": 64, "guidance_embed_type": "lcm"}


def build(
    *,
    sample_shape: tuple[int, int, int],
    num_classes: int,
    guidance_embed_dim: int = 64,
    guidance_embed_type: str = "lcm",
    **unet: Any,
) -> GuidedUNet2DModel:
    """As the ``unet2d`` family builds it, with the scale beside the label."""
    if num_classes == 1:
        raise ValueError("images of one class have no guidance scale; use family: unet2d")
    plain = unet2d.build(sample_shape=sample_shape, num_classes=num_classes, **unet)
    return with_scale_input(plain, guidance_embed_dim=guidance_embed_dim, guidance_embed_type=guidance_embed_type)


def with_scale_input(plain: Any, **options: Any) -> GuidedUNet2DModel:
    """A ``UNet2DModel`` as one that takes the scale and, until it is trained, answers alike at every scale."""
    config = {name: value for name, value in plain.config.items() if not name.startswith("_")}
    made = GuidedUNet2DModel(**config, **options)
    made.load_state_dict({**made.state_dict(), **plain.state_dict()}, strict=True)
    return made


def call(network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor, scale: Tensor | None = None) -> Tensor:
    s = 1.0 if scale is None else scale
    return network(x_t, t, class_labels=labels, guidance_scale=s, return_dict=False)[0][:, : x_t.shape[1]]


GUIDED_UNET2D = Family(
    name="guided_unet2d",
    network_class=GuidedUNet2DModel,
    call=call,
    takes_scale=lambda network: True,
    build=build,
    stages=unet2d.stages,
    taps=unet2d.taps,
    blocks=unet2d.blocks,
    last=unet2d.last,
    options={**unet2d.UNET2D.options, **OPTIONS},
)
