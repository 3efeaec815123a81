"""diffusers' ``UNet2DModel`` with class labels (the networks of DASH, dash.md 2.4) or without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import UNet2DModel
from torch import Tensor, nn

from .base import Family, unwrap

FORM = (
    "act_fn",
    "center_input_sample",
    "freq_shift",
    "flip_sin_to_cos",
    "downsample_padding",
    "mid_block_scale_factor",
    "norm_eps",
)
"""What a recipe does not say and a foreign teacher may have otherwise: a student that inherits takes it over."""


def build(
    *,
    sample_shape: tuple[int, int, int],
    num_classes: int,
    block_out_channels: Sequence[int],
    layers_per_block: int = 2,
    attention_levels: Sequence[int] = (),
    norm_num_groups: int = 32,
    attention_head_dim: int | None = None,
    dropout: float = 0.0,
) -> UNet2DModel:
    """A class-conditional U-Net with the paper's details (padding, embeddings) and a null row at ``num_classes``.

    One class says nothing: the network is unconditional then.

    ``attention_levels``: indices of the resolution levels with self-attention (0 = full resolution).
    ``attention_head_dim=None``: one head over all channels, as in the paper.
    """
    channels, height, width = sample_shape
    levels = len(block_out_channels)
    if levels == 0 or any(c <= 0 or c % norm_num_groups for c in block_out_channels):
        raise ValueError(
            f"block_out_channels {list(block_out_channels)} must be multiples of norm_num_groups {norm_num_groups}"
        )
    if norm_num_groups in block_out_channels:
        # Group norm of single channels removes what the embedding adds to each of them.
        mend = f"norm_num_groups {norm_num_groups} leaves one channel a group at width {norm_num_groups}"
        raise ValueError(f"{mend}, which is blind to label and timestep there; use fewer groups or more channels")
    if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
        raise ValueError(f"image size {height}x{width} must be divisible by {2 ** (levels - 1)} for {levels} levels")
    if any(not 0 <= level < levels for level in attention_levels):
        raise ValueError(f"attention_levels {list(attention_levels)} must lie in 0..{levels - 1}")
    down = ["AttnDownBlock2D" if level in attention_levels else "DownBlock2D" for level in range(levels)]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(block_out_channels),
        layers_per_block=layers_per_block,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        norm_num_groups=norm_num_groups,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        dropout=dropout,
        attention_head_dim=attention_head_dim,
        num_class_embeds=num_classes + 1 if num_classes > 1 else None,
    )


def in_form_of(teacher: nn.Module, student: nn.Module) -> nn.Module:
    """The student, or one built anew where its teacher differs in ``FORM``."""
    big, small = unwrap(teacher), unwrap(student)
    if not (isinstance(big, UNet2DModel) and isinstance(small, UNet2DModel)):
        return student
    form = {name: big.config[name] for name in FORM}
    if all(small.config[name] == value for name, value in form.items()):
        return student
    made: nn.Module = type(small).from_config({**small.config, **form})
    return made


def call(network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    inner: Any = unwrap(network)
    known = None if inner.class_embedding is None else labels
    # Of a learned variance (guided-diffusion's networks) only the mean, the first half, is used.
    return network(x_t, t, class_labels=known, return_dict=False)[0][:, : x_t.shape[1]]


def stages(network: Any) -> dict[str, nn.Module]:
    """Outputs of the down stages, the middle and the up stages, and ``last``: what enters the last convolution.

    Down blocks return (hidden, skips).
    """
    named: dict[str, nn.Module] = {f"down.{i}": block for i, block in enumerate(network.down_blocks)}
    named |= {"mid": network.mid_block} if network.mid_block is not None else {}
    named |= {f"up.{i}": block for i, block in enumerate(network.up_blocks)}
    named["last"] = network.conv_act
    return named


def taps(network: Any) -> dict[str, nn.Module]:
    """Every input block and the middle: the first convolution, each residual layer (with its attention, where it has
    one), each downsampling, the middle."""
    named: dict[str, nn.Module] = {"in": network.conv_in}
    for i, block in enumerate(network.down_blocks):
        after = list(getattr(block, "attentions", None) or block.resnets)
        named |= {f"down.{i}.{j}": layer for j, layer in enumerate(after)}
        named |= {f"down.{i}.down": layer for layer in (getattr(block, "downsamplers", None) or [])}
    named |= {"mid": network.mid_block} if network.mid_block is not None else {}
    return named


def blocks(network: Any) -> dict[str, nn.Module]:
    """The down stages and the middle."""
    return {name: block for name, block in stages(network).items() if name == "mid" or name.startswith("down.")}


def last(network: Any) -> nn.Module:
    made: nn.Module = network.conv_out
    return made


UNET2D = Family(
    name="unet2d",
    network_class=UNet2DModel,
    call=call,
    build=build,
    stages=stages,
    taps=taps,
    blocks=blocks,
    last=last,
    options={
        "block_out_channels": None,
        "layers_per_block": 2,
        "attention_levels": (),
        "norm_num_groups": 32,
        "attention_head_dim": None,
        "dropout": 0.0,
    },
)
