"""Where a discriminator looks, the heads that judge there, and what they may not see (unidad.md 2)."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from worlds import generator

from diffstill.checks.bench import tiny_denoiser
from diffstill.diffusion.adversarial import discriminator_loss, generator_loss
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.models.adapters import FAMILIES
from diffstill.models.denoiser import Denoiser
from diffstill.models.features import Heads, encode_features, encoder_taps, feature_shapes, tapped

# -------------------------------------------------------------------------------------------------------------- taps


def unet(family: str = "unet2d", **options: Any) -> Denoiser:
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_levels": [1],
        **options,
    }
    network = FAMILIES[family].build(sample_shape=(1, 8, 8), num_classes=3, **made)
    return Denoiser(network, NoiseSchedule.create("linear"), 3, (1, 8, 8))


def inputs(count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(count, 1, 8, 8, generator=generator(3))
    return x, torch.arange(count) * 300, torch.arange(count) % 3


SMALL = {
    "in": (8, 8, 8),
    "down.0.0": (8, 8, 8),
    "down.0.down": (8, 4, 4),
    "down.1.0": (16, 4, 4),
    "mid": (16, 4, 4),
}


@pytest.mark.parametrize("family", ["unet2d", "unet2d_condition"])
def test_every_input_block_and_the_middle_is_tapped_in_order(family: str) -> None:
    model = unet(family)
    assert tuple(encoder_taps(model.network)) == tuple(SMALL)
    assert feature_shapes(model, tuple(SMALL)) == SMALL
    deep = unet(family, layers_per_block=2, attention_levels=())
    wanted = ("in", "down.0.0", "down.0.1", "down.0.down", "down.1.0", "down.1.1", "mid")
    assert tuple(encoder_taps(deep.network)) == wanted


@pytest.mark.parametrize("family", ["unet2d", "unet2d_condition"])
def test_taps_are_the_skips_of_the_encoder_and_the_middles_output(family: str) -> None:
    """Where a layer has attention, it is what comes after it: what the decoder is given."""
    model = unet(family)
    network: Any = model.network.eval()
    skips: list[Tensor] = []
    found: dict[str, Tensor] = {}

    def keep_skips(module: nn.Module, args: Any, output: Any) -> None:
        skips.extend(output[1])

    def keep_middle(module: nn.Module, args: Any, output: Any) -> None:
        found["mid"] = output

    for block in network.down_blocks:
        block.register_forward_hook(keep_skips)
    network.mid_block.register_forward_hook(keep_middle)
    with torch.no_grad():
        network_in = network.conv_in(inputs()[0])
        model(*inputs())
    found |= dict(zip(("down.0.0", "down.0.down", "down.1.0"), skips, strict=True)) | {"in": network_in}
    with torch.no_grad():
        features = encode_features(model, *inputs(), tuple(SMALL))
    assert tuple(features) == tuple(SMALL)
    for name, feature in features.items():
        torch.testing.assert_close(feature, found[name], rtol=0, atol=0)


def test_the_network_of_guided_diffusion_has_nineteen() -> None:
    """256 pixels: channel_mult 1, 1, 2, 2, 4, 4 and two residual layers a level; built here an eighth as wide."""
    widths = tuple(32 * m for m in (1, 1, 2, 2, 4, 4))
    down = ["DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"]
    network = diffusers.UNet2DModel(
        sample_size=64,
        in_channels=3,
        out_channels=6,
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        norm_num_groups=8,
    ).eval()
    model = Denoiser(network, NoiseSchedule.create("linear"), 1, (3, 64, 64))
    names = tuple(encoder_taps(network))
    assert len(names) == 19
    shapes = feature_shapes(model, names)
    channels = [32, 32, 32, 32, 32, 32, 32, 64, 64, 64, 64, 64, 64, 128, 128, 128, 128, 128, 128]
    assert [shape[0] for shape in shapes.values()] == channels
    sides = [64, 64, 64, 32, 32, 32, 16, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2, 2]
    assert [shape[1] for shape in shapes.values()] == sides
    heads = Heads(shapes)
    assert sum(p.numel() for p in heads.parameters()) == sum(channels) + 19
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64, generator=generator(0))
        labels = torch.zeros(2, dtype=torch.int64)
        found = heads(encode_features(model, x, torch.tensor([10, 900]), labels, names))
    assert [z.shape for z in found] == [(2, 1)] * 19


def test_a_stable_diffusion_like_network_is_tapped_too() -> None:
    network = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    model = Denoiser(network, NoiseSchedule.create("scaled_linear"), 1, (4, 16, 16))
    names = ("in", "down.0.0", "down.0.down", "down.1.0", "mid")
    assert tuple(encoder_taps(network)) == names
    assert [shape[0] for shape in feature_shapes(model, names).values()] == [8, 8, 8, 16, 16]


def calls(network: nn.Module, names: tuple[str, ...]) -> dict[str, int]:
    counted = dict.fromkeys(names, 0)

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            counted[name] += 1

        return hook

    for name in names:
        network.get_submodule(name).register_forward_hook(count(name))
    return counted


def test_what_follows_the_last_tap_is_not_run() -> None:
    model = unet()
    parts = ("conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1", "conv_out")
    counted = calls(model.network, parts)
    encode_features(model, *inputs(), tuple(SMALL))
    assert list(counted.values()) == [1, 1, 1, 1, 0, 0, 0]
    encode_features(model, *inputs(), ("in", "down.0.0"))
    assert list(counted.values()) == [2, 1, 1, 1, 0, 0, 0], "broken off inside the first block"


def no_hooks(network: nn.Module) -> bool:
    return not any(module._forward_hooks for module in network.modules())


def test_no_hook_stays_also_after_an_exception() -> None:
    model = unet()
    network: Any = model.network
    encode_features(model, *inputs(), tuple(SMALL))
    feature_shapes(model, ("mid",))
    assert no_hooks(network)
    network.mid_block.forward = None  # calling it fails
    with pytest.raises(TypeError):
        encode_features(model, *inputs(), tuple(SMALL))
    assert no_hooks(network)
    with pytest.raises(ZeroDivisionError), tapped(network):
        raise ZeroDivisionError
    assert no_hooks(network)


def test_looking_is_differentiable_in_the_image_and_keeps_modes() -> None:
    model = unet()
    was = [module.training for module in model.network.modules()]
    x, t, labels = inputs()
    x.requires_grad_()
    features = encode_features(model, x, t, labels, ("mid",))
    features["mid"].square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    feature_shapes(model, ("mid",))
    assert [module.training for module in model.network.modules()] == was


# ------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_zero_heads_know_nothing(kind: Any) -> None:
    """D-loss 2 ln 2 and G-loss ln 2 a head."""
    heads = Heads(SMALL, kind)
    for parameter in heads.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        found = heads(encode_features(unet(), *inputs(), tuple(SMALL)))
    assert [z.shape for z in found] == [(3, 1)] * 5
    for aggregation, count in (("mean", 1), ("sum", 5), ("logit", 1)):
        assert float(discriminator_loss(found, found, "bce", aggregation)) == pytest.approx(2 * math.log(2) * count)
        assert float(generator_loss(found, "bce", aggregation)) == pytest.approx(math.log(2) * count)


def test_a_linear_head_is_linear_on_the_pooled_features() -> None:
    shapes = {"a": (5, 4, 4), "b": (3, 2, 2)}
    features = {"b": torch.randn(6, 3, 2, 2), "a": torch.randn(6, 5, 4, 4), "other": torch.randn(6, 1, 1, 1)}
    pooled, patches = Heads(shapes), Heads(shapes, pool="patch")
    patches.load_state_dict(pooled.state_dict())
    assert sum(p.numel() for p in pooled.parameters()) == 5 + 1 + 3 + 1
    with torch.no_grad():
        found, placed = pooled(features), patches(features)
    for z, place, name, layer in zip(found, placed, shapes, pooled.layers, strict=True):
        wanted = features[name].mean((2, 3)) @ layer.weight.detach().flatten() + layer.bias.detach()
        torch.testing.assert_close(z[:, 0], wanted)
        assert place.shape == (6, math.prod(shapes[name][1:]))
        torch.testing.assert_close(place.mean(1), wanted)


@pytest.mark.parametrize("shape", [(24, 1, 1), (8, 2, 2), (16, 3, 5), (24, 4, 4), (8, 16, 16), (512, 8, 8)])
@pytest.mark.parametrize("pool", ["global", "patch"])
def test_the_convolutional_head_fits_any_bottleneck(shape: tuple[int, int, int], pool: Any) -> None:
    heads = Heads({"mid": shape}, "conv", pool)
    assert [type(m).__name__ for m in heads.layers[0]] == ["Conv2d", "GroupNorm", "SiLU"] * 2 + ["Conv2d"]
    (found,) = heads({"mid": torch.randn(2, *shape)})
    assert found.shape[0] == 2
    assert found.shape[1] == 1 or pool == "patch"
    assert bool(found.isfinite().all())


def test_the_bottleneck_of_dmd2_is_seen_whole() -> None:
    """8 x 8: kernel 4 and stride 2, then kernel 4 and stride 4, then one logit."""
    convs = [m for m in Heads({"mid": (512, 8, 8)}, "conv").layers[0] if isinstance(m, nn.Conv2d)]
    assert [(m.kernel_size[0], m.stride[0]) for m in convs] == [(4, 2), (4, 4), (1, 1)]
    (found,) = Heads({"mid": (512, 8, 8)}, "conv", "patch")({"mid": torch.randn(1, 512, 8, 8)})
    assert found.shape == (1, 1)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("pool", ["global", "patch"])
def test_a_logit_depends_on_its_own_image_alone(kind: Any, pool: Any) -> None:
    """Through encoder and heads, in train mode: no statistics of the batch."""
    model = tiny_denoiser((8, 16), 1)
    taps = tuple(encoder_taps(model.network))
    heads = Heads(feature_shapes(model, taps), kind, pool).train()
    model.network.train()
    x, t, labels = inputs()
    x.requires_grad_()
    logit = torch.stack([z[1].sum() for z in heads(encode_features(model, x, t, labels, taps))]).sum()
    (slope,) = torch.autograd.grad(logit, x)
    assert bool(slope[1].any())
    assert not bool(slope[[0, 2]].any())
