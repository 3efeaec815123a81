"""Pipeline folders that others wrote with plain diffusers: read as diffusers reads them, or refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
)
from folders import edit
from safetensors.torch import load_file, save_file

from diffstill.errors import InputError
from diffstill.jobs.build import build_student
from diffstill.models.adapters import family_of
from diffstill.models.denoiser import identity
from diffstill.models.folder import load_model
from diffstill.models.students import student_for_ratio
from diffstill.recipe import MethodSpec, NetworkSpec

TABLE = {"trained_betas": torch.linspace(1e-4, 0.02, 100).tolist(), "num_train_timesteps": 100}


def network(**options: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        **{
            "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32),
            "layers_per_block": 1, "norm_num_groups": 8, "num_class_embeds": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **options,
        }
    )  # fmt: skip


def saved(folder: Path, made: UNet2DModel | None = None, scheduler: Any = None) -> Path:
    DDPMPipeline(made or network(), scheduler or DDPMScheduler(100)).save_pretrained(folder)
    return folder


def predicted(made: Any) -> torch.Tensor:
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = made.eval()(x, torch.tensor([0, 40, 99]), class_labels=torch.tensor([0, 2, 3])).sample
    return found


def test_the_flat_layout_and_the_old_names_of_attention_are_read(tmp_path: Path) -> None:
    """As google/ddpm-* are: network and scheduler beside the index, and query, key, value, proj_attn."""
    folder = saved(tmp_path / "old")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    renamed = {}
    for name, tensor in state.items():
        for new, old in names.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor
    assert renamed.keys() != state.keys()
    save_file(renamed, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    shutil.move(folder / "unet/config.json", folder / "config.json")
    edit(folder / "config.json", lambda c: c.update(_class_name="UNet2DModel"))
    shutil.move(folder / "scheduler/scheduler_config.json", folder / "scheduler_config.json")
    shutil.rmtree(folder / "unet")
    shutil.rmtree(folder / "scheduler")
    plain = UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
    assert torch.equal(predicted(load_model(folder).denoiser.network), predicted(plain))
    assert torch.equal(predicted(plain), predicted(network()))


def custom(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["my_unet", "UNet2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))


def variant(folder: Path) -> None:
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))


@pytest.mark.parametrize(
    ("options", "scheduler", "change", "told"),
    [
        ({"class_embed_type": "timestep"}, None, None, "embeds its labels by class_embed_type='timestep'"),
        ({"class_embed_type": "identity"}, None, None, "embeds its labels by class_embed_type='identity'"),
        ({"num_class_embeds": 1}, None, None, "has one label row: too few for a class"),
        ({}, DDIMScheduler(**TABLE, rescale_betas_zero_snr=True), None, "not those of its betas: rescaled or shifted"),
        ({}, CogVideoXDDIMScheduler(100), None, "not those of its betas: rescaled or shifted"),
        ({}, EulerDiscreteScheduler(100, timestep_type="continuous"), None, "another notion of time"),
        ({}, DPMSolverMultistepScheduler(100, use_flow_sigmas=True), None, "another notion of time"),
        ({}, None, custom, "unet my_unet.UNet2DModel; give a UNet2DModel"),
        ({}, None, variant, "has the weights of a variant alone (diffusion_pytorch_model.fp16.safetensors)"),
    ],
)  # fmt: skip
def test_what_would_be_read_wrongly_is_refused(
    options: dict[str, Any], scheduler: Any, change: Callable[[Path], None] | None, told: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "foreign", network(**options), scheduler)
    if change is not None:
        change(folder)
    with pytest.raises(InputError) as caught:
        load_model(folder)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}),
        ("model_index.json", {"num_classes": 4, "guided": False}),
        ("model_index.json", {"num_classes": 3, "guided": False}),
    ],
)
def test_another_reading_of_the_same_weights_is_another_model(
    file: str, change: dict[str, Any], tmp_path: Path
) -> None:
    folder = saved(tmp_path / "model")
    before = load_model(folder)
    assert identity(before.denoiser, before.guided) == identity(load_model(folder).denoiser)
    edit(folder / file, lambda config: config.update(change))
    after = load_model(folder)
    assert identity(after.denoiser, after.guided) != identity(before.denoiser, before.guided)


@pytest.mark.parametrize("ratio", [2.0, 3.0])
@pytest.mark.parametrize(
    "options", [{"mid_block_type": None}, {"resnet_time_scale_shift": "scale_shift"}, {"norm_num_groups": 16}]
)
def test_a_ratio_is_of_the_teachers_own_parameters(options: dict[str, Any], ratio: float, tmp_path: Path) -> None:
    made = network(**{"block_out_channels": (32, 64), **options})
    teacher = load_model(saved(tmp_path / "teacher", made)).denoiser
    spec = NetworkSpec.model_validate({"family": "teacher", "ratio": ratio, "init": "fresh"})
    student = build_student(spec, MethodSpec(name="dash"), teacher, 0)
    count = [sum(p.numel() for p in each.network.parameters()) for each in (teacher, student)]
    assert ratio <= count[0] / count[1] < 1.6 * ratio
    assert student_for_ratio(made.config, ratio, 10**9) != student_for_ratio(made.config, ratio)


def test_a_network_without_a_middle_has_no_tap_there(tmp_path: Path) -> None:
    teacher = load_model(saved(tmp_path / "teacher", network(mid_block_type=None))).denoiser
    family = family_of(teacher.network)
    for named in (family.stages(teacher.network), family.taps(teacher.network)):
        assert "mid" not in named
        assert all(isinstance(module, torch.nn.Module) for module in named.values())


def test_inherited_attention_keeps_its_groups(tmp_path: Path) -> None:
    teacher = load_model(saved(tmp_path / "teacher", network(attn_norm_num_groups=4))).denoiser
    spec = NetworkSpec.model_validate(
        {"family": "unet2d", "block_out_channels": [16, 32], "layers_per_block": 1, "attention_levels": [1],
         "norm_num_groups": 8, "init": "inherit"}
    )  # fmt: skip
    with pytest.raises(InputError, match=r"attn_norm_num_groups.*must equal the teacher's 4"):
        build_student(spec, MethodSpec(name="dash"), teacher, 0)
