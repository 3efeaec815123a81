"""A ``UNet2DModel`` that takes the guidance scale as an input. Its text travels inside model folders (``unet/``).

It must run on torch and diffusers alone; the features of the scale are written into the same file.
"""

from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..diffusion.scale import scale_features


class LabelAndScaleEmbedding(nn.Embedding):
    """Label table plus a projection of the guidance scale, without bias and zero at first: a fresh one is the table."""

    def __init__(self, labels: int, width: int, dim: int, kind: str) -> None:
        super().__init__(labels, width)
        self.dim, self.kind = dim, kind
        self.scale = nn.Linear(dim, width, bias=False)
        nn.init.zeros_(self.scale.weight)

    def forward(self, given: Any) -> torch.Tensor:
        labels, scale = given
        features = scale_features(scale, self.dim, self.kind).to(self.scale.weight.dtype)
        return super().forward(labels) + self.scale(features)


class GuidedUNet2DModel(UNet2DModel):
    """``UNet2DModel`` with the guidance scale as an input, embedded beside the label (Meng et al., 2210.03142).

    Its parameters are those of ``UNet2DModel``, whose names they keep, and ``class_embedding.scale.weight``.

    Args:
        guidance_embed_dim: number of features of the scale, even.
        guidance_embed_type: ``lcm`` or ``fourier`` (``scale_features``).
    """

    @register_to_config
    def __init__(
        self,
        sample_size: Any = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: Any = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Any = ("DownBlock2D", "AttnDownBlock2D"),
        mid_block_type: Any = "UNetMidBlock2D",
        up_block_types: Any = ("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: Any = (224, 448),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: Any = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: Any = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: Any = None,
        num_class_embeds: Any = None,
        num_train_timesteps: Any = None,
        guidance_embed_dim: int = 64,
        guidance_embed_type: str = "lcm",
    ) -> None:
        own = {"own", "self", "__class__", "guidance_embed_dim", "guidance_embed_type"}
        super().__init__(**{name: value for name, value in locals().items() if name not in own})
        if class_embed_type is not None or not num_class_embeds:
            raise ValueError("a guidance-conditioned U-Net needs num_class_embeds and no other class_embed_type")
        if guidance_embed_dim < 2 or guidance_embed_dim % 2:
            raise ValueError(f"guidance_embed_dim {guidance_embed_dim} must be an even number of 2 or more")
        if guidance_embed_type not in ("lcm", "fourier"):
            raise ValueError(f"guidance_embed_type {guidance_embed_type!r} is not known; use lcm or fourier")
        # UNet2DModel's config was registered with its own arguments alone.
        self.register_to_config(guidance_embed_dim=guidance_embed_dim, guidance_embed_type=guidance_embed_type)
        width: int = time_embedding_dim or block_out_channels[0] * 4
        self.class_embedding = LabelAndScaleEmbedding(num_class_embeds, width, guidance_embed_dim, guidance_embed_type)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Any,
        class_labels: Any = None,
        guidance_scale: Any = 1.0,
        return_dict: bool = True,
    ) -> Any:
        """As ``UNet2DModel``, at a guidance scale: a number, or (B,). 1, purely conditional, where none is given."""
        if class_labels is None:
            raise ValueError("class_labels: give one label an image")
        scale = torch.as_tensor(guidance_scale, device=sample.device, dtype=torch.float32).expand(len(sample))
        return super().forward(sample, timestep, class_labels=(class_labels, scale), return_dict=return_dict)
