"""Inherited students: parameter counts of the paper, exact sub-networks, and refusals that name the field."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from students import DASH, TEACHER, small
from torch import Tensor

from diffstill.data.sources import load_data
from diffstill.errors import InputError
from diffstill.jobs.distill import blank_teacher, prepare_student
from diffstill.models.adapters import dit, unet2d
from diffstill.models.denoiser import Denoiser
from diffstill.models.lineage import weights_sha256
from diffstill.models.students import inherit, keep_channels
from diffstill.recipe import DistillRecipe, load_recipe


@pytest.mark.parametrize(
    ("classes", "options", "expected"),
    [
        (10, TEACHER, 35_751_939),
        (10, DASH, 6_082_627),
        (100, TEACHER, 35_798_019),
        (100, DASH, 6_105_667),
        (10, {**DASH, "layers_per_block": 2}, 8_954_883),
    ],
)
def test_parameter_counts_of_the_paper(classes: int, options: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        network = unet2d.build(sample_shape=(3, 32, 32), num_classes=classes, dropout=0.1, **options)
    assert sum(p.numel() for p in network.parameters()) == expected


# ------------------------------------------------------------------------------------------------ exact sub-networks


@pytest.mark.parametrize("select", ["first", "magnitude"])
@pytest.mark.parametrize("heads", [None, 8])
def test_the_same_architecture_inherits_bit_identical_weights(select: Any, heads: int | None) -> None:
    teacher, student = small(attention_head_dim=heads), small(attention_head_dim=heads, dropout=0.1)
    before = weights_sha256(teacher)
    report = inherit(teacher, student, select=select)
    assert weights_sha256(student) == weights_sha256(teacher) == before
    assert report.left_out == ()
    assert report.parameters == report.teacher_parameters == sum(p.numel() for p in teacher.parameters())


def exact_unet(widths: tuple[int, int], groups: int, heads: int | None, seed: int) -> UNet2DModel:
    # freq_shift 0: the frequencies of half as many time features are every other one of the teacher's.
    torch.manual_seed(seed)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=groups,
        attention_head_dim=heads,
        freq_shift=0,
        flip_sin_to_cos=False,
        num_class_embeds=4,
    )
    for parameter in network.parameters():  # no zeros and ones left over from the initialisation
        parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    return network.double().eval()


def half(width: int, upper: bool) -> Tensor:
    return torch.arange(width // 2) + (width // 2 if upper else 0)


def silence_half(network: UNet2DModel, upper: bool) -> None:
    """Zeroes everything that writes into one half of the channels, everywhere; what reads them stays random."""

    concatenated = {
        f"up_blocks.{block}.resnets.{j}.norm1": widths
        for block, parts in enumerate([[(48, 48), (48, 48), (48, 24)], [(48, 24), (24, 24), (24, 24)]])
        for j, widths in enumerate(parts)
    }
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            layer = name.rsplit(".", 1)[0]
            if layer == "conv_out":
                continue
            if layer == "class_embedding":
                parameter[:, half(parameter.shape[1], upper)] = 0
            elif "norm" in layer:
                if name.endswith("bias"):
                    hidden, skip = concatenated.get(layer, (len(parameter), 0))
                    parameter[torch.cat([half(hidden, upper), hidden + half(skip, upper)])] = 0
            else:
                parameter[half(len(parameter), upper)] = 0
        network.time_embedding.linear_1.weight[:, 1::2] = 0


@pytest.mark.parametrize(("select", "dead_upper"), [("first", True), ("magnitude", True), ("magnitude", False)])
@pytest.mark.parametrize("heads", [None, 12])
def test_a_student_of_the_living_channels_computes_the_teachers_function(
    select: Any, dead_upper: bool, heads: int | None
) -> None:
    # Widths and groups such that every group of every norm, concatenated ones too, is wholly alive or wholly dead.
    teacher, student = exact_unet((24, 48), 12, heads, seed=0), exact_unet((12, 24), 6, heads, seed=1)
    silence_half(teacher, dead_upper)
    report = inherit(teacher, student, select=select)
    assert [kept.tolist() for kept in report.channels] == [half(w, not dead_upper).tolist() for w in (24, 48)]
    x, t, y = torch.randn(4, 1, 8, 8).double(), torch.tensor([0, 3, 500, 999]), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        of_teacher = teacher(x, t, class_labels=y).sample
        of_student = student(x, t, class_labels=y).sample
    assert of_teacher.std() > 0.1
    # The sinusoids are computed in float32 by both.
    torch.testing.assert_close(of_student, of_teacher, rtol=0, atol=1e-5)


def test_dropped_layers_count_as_the_identity() -> None:
    teacher = small(layers_per_block=2, block_out_channels=(16, 32, 32))
    for parameter in teacher.parameters():
        parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    student = small(layers_per_block=1, block_out_channels=(16, 32, 32))
    with torch.no_grad():
        for block in (*teacher.down_blocks, *teacher.up_blocks):
            dropped = block.resnets[1]
            dropped.conv2.weight.zero_(), dropped.conv2.bias.zero_()
            if dropped.conv_shortcut is not None:  # decoder: pass the hidden stream on, ignore the skip
                dropped.conv_shortcut.weight.zero_(), dropped.conv_shortcut.bias.zero_()
                out = dropped.conv_shortcut.out_channels
                dropped.conv_shortcut.weight[:, :out, 0, 0] = torch.eye(out)
            if hasattr(block, "attentions"):
                block.attentions[1].to_out[0].weight.zero_(), block.attentions[1].to_out[0].bias.zero_()
    report = inherit(teacher, student)
    assert any(name.startswith("down_blocks.0.resnets.1.") for name in report.left_out)
    assert not any(name.startswith("up_blocks.0.resnets.2.") for name in report.left_out)
    x, t, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 3, 500, 999]), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        torch.testing.assert_close(
            student(x, t, class_labels=y).sample, teacher(x, t, class_labels=y).sample, rtol=0, atol=1e-5
        )


def test_a_new_shortcut_stands_for_the_teachers_identity() -> None:
    teacher, student = small(block_out_channels=(32, 32)), small(block_out_channels=(16, 24))
    report = inherit(teacher, student, select="magnitude")
    shortcut = student.down_blocks[1].resnets[0].conv_shortcut
    x = torch.randn(2, 32, 4, 4)
    full = torch.zeros(2, 32, 4, 4)
    full[:, report.channels[0]] = x[:, report.channels[0]]
    torch.testing.assert_close(shortcut(x[:, report.channels[0]]), full[:, report.channels[1]], rtol=0, atol=0)


def test_a_teachers_shortcut_without_a_place_is_reported() -> None:
    report = inherit(small(block_out_channels=(16, 32)), small(block_out_channels=(16, 16)))
    assert "down_blocks.1.resnets.0.conv_shortcut.weight" in report.left_out


@settings(max_examples=25, deadline=None)
@given(
    widths=st.tuples(st.sampled_from([8, 16, 24]), st.sampled_from([8, 16, 24])),
    layers=st.integers(1, 2),
    attention=st.booleans(),
    groups=st.sampled_from([4, 8]),
    select=st.sampled_from(["first", "magnitude"]),
)
def test_any_smaller_student_inherits_every_weight(
    widths: tuple[int, int], layers: int, attention: bool, groups: int, select: Any
) -> None:
    assume(groups not in widths)
    teacher = small(block_out_channels=(24, 24), layers_per_block=2)
    student = small(
        block_out_channels=widths, layers_per_block=layers, attention_levels=[1] * attention, norm_num_groups=groups
    )
    for parameter in student.parameters():
        parameter.data.fill_(float("nan"))
    before = weights_sha256(teacher)
    inherit(teacher, student, select=select)
    assert weights_sha256(teacher) == before
    with torch.no_grad():
        out = student(torch.randn(1, 1, 8, 8), 5, class_labels=torch.tensor([3])).sample
    assert bool(out.isfinite().all())


# ----------------------------------------------------------------------------------------------------- kept channels


@given(
    groups=st.sampled_from([1, 2, 4, 8]),
    kept_groups=st.sampled_from([1, 2, 4, 8]),
    data=st.data(),
)
def test_kept_channels_are_sorted_and_groups_do_not_mix(groups: int, kept_groups: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 6))
    kept_size = data.draw(st.integers(1, max(1, groups * size // kept_groups)))
    count = min(kept_groups * kept_size, groups * size)
    if count % kept_groups:
        return
    seed = data.draw(st.integers(0, 9))
    score = torch.rand(groups * size, generator=torch.Generator().manual_seed(seed))
    kept = keep_channels(score, count, groups, kept_groups)
    assert len(kept) == count
    assert bool((kept.diff() > 0).all())
    n = min(groups, kept_groups)
    if count // n <= size and (count // n) % (count // kept_groups) == 0:
        origin = (kept // size).reshape(kept_groups, -1)
        assert bool((origin == origin[:, :1]).all())
    if count == groups * size:
        assert torch.equal(kept, torch.arange(count))


def test_without_groups_the_highest_scores_are_kept() -> None:
    assert keep_channels(torch.tensor([5.0, 1.0, 4.0, 2.0]), 2).tolist() == [0, 2]


def test_magnitude_keeps_the_channels_with_the_largest_filters() -> None:
    teacher = small(block_out_channels=(16, 16), norm_num_groups=1)
    student = small(block_out_channels=(4, 4), norm_num_groups=1)
    loud = [1, 6, 7, 12]
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith(("conv2.weight", "to_out.0.weight", "conv_shortcut.weight")):
                parameter[loud] += torch.sign(parameter[loud])
    report = inherit(teacher, student, select="magnitude")
    assert report.channels[0].tolist() == loud
    assert torch.equal(student.conv_in.weight, teacher.conv_in.weight[loud])
    assert torch.equal(student.conv_out.weight, teacher.conv_out.weight[:, loud])


def test_the_input_convolution_counts_as_a_writer_of_the_finest_stream() -> None:
    teacher, student = small(norm_num_groups=1), small(block_out_channels=(8, 32), norm_num_groups=1)
    loud = list(range(1, 16, 2))
    with torch.no_grad():
        teacher.conv_in.weight[loud] += 100
    assert inherit(teacher, student, select="magnitude").channels[0].tolist() == loud


def test_attention_heads_are_kept_whole() -> None:
    teacher = small(attention_head_dim=8)
    student = small(block_out_channels=(8, 16), attention_head_dim=8, norm_num_groups=4)
    with torch.no_grad():
        attention = teacher.mid_block.attentions[0]
        for layer in (attention.to_q, attention.to_k, attention.to_v):
            layer.weight[8:16] += torch.sign(layer.weight[8:16])  # the second head is the loudest,
            layer.weight[16:24] += 0.5 * torch.sign(layer.weight[16:24])  # the third comes next,
            layer.weight[::8] += 3 * torch.sign(layer.weight[::8])  # single channels are louder still
    stream = inherit(teacher, student, select="magnitude").channels[1]
    assert torch.equal(student.mid_block.attentions[0].to_v.weight, attention.to_v.weight[8:24][:, stream])


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"block_out_channels": (16, 40)},
            "student.block_out_channels: (16, 40) is not usable; "
            "it is wider than the teacher's [16, 32]: to inherit, stay within them, or use student.init=fresh",
        ),
        (
            {"block_out_channels": (16, 32, 32)},
            "student.block_out_channels: (16, 32, 32) is not usable; "
            "to inherit, give 2 levels as the teacher's [16, 32]",
        ),
        (
            {"layers_per_block": 3},
            "student.layers_per_block: 3 is not usable; to inherit, stay within the teacher's 2",
        ),
        (
            {"attention_levels": [0, 1]},
            "student.down_block_types: ('AttnDownBlock2D', 'AttnDownBlock2D') is not usable; "
            "to inherit, put attention only where the teacher has it: ['DownBlock2D', 'AttnDownBlock2D']",
        ),
    ],
)
def test_a_student_beyond_its_teacher_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        inherit(small(), small(**options))
    assert str(caught.value) == message


def test_other_vocabularies_and_families_are_refused() -> None:
    other = unet2d.build(sample_shape=(1, 8, 8), num_classes=5, block_out_channels=(16, 32), norm_num_groups=8)
    with pytest.raises(InputError, match=r"^student.num_class_embeds: 6 .*must equal the teacher's 4$"):
        inherit(small(), other)
    transformer = dit.build(sample_shape=(1, 8, 8), num_classes=3, num_layers=1, num_attention_heads=1)
    with pytest.raises(InputError, match=r"^student: 'dit' cannot inherit; use unet2d, or a fresh student$"):
        inherit(small(), transformer)
    with pytest.raises(InputError, match=r"^teacher: 'dit' cannot be inherited from"):
        inherit(transformer, small())


def plain_folder(folder: Path, **options: Any) -> UNet2DModel:
    """A pipeline of plain diffusers, its network by diffusers' defaults, for digits."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        **options,
    )
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    return network


def prepared(folder: Path, widths: str, *overrides: str) -> Denoiser:
    asked = [f"teacher.model={folder}", "student.init=inherit", f"student.block_out_channels={widths}", *overrides]
    recipe = load_recipe("digits-dash", ["data.limit=100", "method.curriculum=none", *asked])
    assert isinstance(recipe, DistillRecipe)
    data = load_data(recipe.data)
    return prepare_student(recipe, data, blank_teacher(recipe, data))[0]


def test_a_student_takes_over_the_form_of_a_plain_diffusers_teacher(tmp_path: Path) -> None:
    teacher = plain_folder(tmp_path, num_class_embeds=11)
    student = prepared(tmp_path, "[16, 32]", "student.layers_per_block=2", "student.attention_head_dim=8")
    network: Any = student.network
    assert weights_sha256(network) == weights_sha256(teacher)
    assert (network.config.freq_shift, network.config.downsample_padding, network.config.norm_eps) == (0, 1, 1e-5)
    before = torch.get_rng_state()
    small = prepared(tmp_path, "[16, 16]")
    assert torch.equal(torch.get_rng_state(), before), (
        "it is drawn from the recipe's seed, not from the caller's generator"
    )
    assert all(torch.isfinite(value).all() for value in small.network.state_dict().values())


def test_a_refused_student_is_left_alone() -> None:
    student = small(layers_per_block=3)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(InputError):
        inherit(small(), student)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
