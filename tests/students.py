"""The networks of DASH, and a small one of their form."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DModel

from diffstill.models.adapters import unet2d

TEACHER: dict[str, Any] = {"block_out_channels": (128, 256, 256, 256), "layers_per_block": 2, "attention_levels": [1]}
DASH: dict[str, Any] = {"block_out_channels": (64, 128, 128, 128), "layers_per_block": 1, "attention_levels": [1]}


def small(**options: Any) -> UNet2DModel:
    given = {"block_out_channels": (16, 32), "attention_levels": [1], "norm_num_groups": 8, **options}
    return unet2d.build(sample_shape=(1, 8, 8), num_classes=3, **given).eval()
