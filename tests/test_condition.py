"""``UNet2DConditionModel`` with class labels: its own input takes the guidance scale, in our code and in diffusers'."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from diffstill.diffusion.guidance import Constant
from diffstill.diffusion.sampling import image_noise
from diffstill.diffusion.scale import scale_features
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.errors import InputError
from diffstill.evaluation.sampling import sample_images
from diffstill.jobs.build import build_student
from diffstill.models.adapters import FAMILIES, family_of
from diffstill.models.denoiser import Denoiser
from diffstill.models.folder import load_model, save_model
from diffstill.models.lineage import Lineage
from diffstill.recipe import MethodSpec, NetworkSpec

SHAPE = (1, 8, 8)


def network(**options: object) -> torch.nn.Module:
    given = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_levels": [1]}
    torch.manual_seed(0)
    return FAMILIES["unet2d_condition"].build(sample_shape=SHAPE, num_classes=3, **{**given, **options})


def teacher() -> Denoiser:
    return Denoiser(network(), NoiseSchedule.create("cosine", 1000), 3, SHAPE, "v_prediction").freeze()


def points() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.arange(4) * 300, torch.arange(4)


def test_the_features_are_those_of_latent_consistency_models() -> None:
    """Sines and cosines of 1000 w at frequencies 1 .. 1/10000, where w = s - 1."""
    found = scale_features(torch.tensor([1.0, 3.0]), 6)
    w = 2.0
    rates = (1000.0, 10.0, 0.1)
    wanted = [[0.0] * 3 + [1.0] * 3, [math.sin(w * r) for r in rates] + [math.cos(w * r) for r in rates]]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=2e-4)
    octaves = scale_features(torch.tensor([3.0]), 6, "fourier")
    angles = [math.pi / 8 * w * 2**k for k in (0, 3.5, 7)]
    wanted = [[f(a) for f in (math.sin, math.cos) for a in angles]]
    torch.testing.assert_close(octaves, torch.tensor(wanted), rtol=0, atol=1e-4)


def test_stage_one_of_such_a_teacher_starts_as_the_conditional_teacher_at_every_scale() -> None:
    big = teacher()
    made = build_student(NetworkSpec(family="teacher"), MethodSpec(name="guided"), big, 0)
    assert family_of(made.network).name == "unet2d_condition"
    assert made.takes_scale
    x, t, y = points()
    for scale in (1.0, 2.0, 5.0):
        torch.testing.assert_close(made.guided(x, t, y, scale), big(x, t, y), rtol=1e-5, atol=1e-5)
    out = made.guided(x, t, y, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    out.sum().backward()
    projection = made.network.time_embedding.cond_proj.weight  # type: ignore[union-attr]
    assert bool(projection.grad.any())  # type: ignore[union-attr]


def test_only_lcm_features_fit_its_input() -> None:
    spec = NetworkSpec.model_validate({"family": "teacher", "guidance_embed_type": "fourier"})
    with pytest.raises(InputError, match="takes lcm features"):
        build_student(spec, MethodSpec(name="guided"), teacher(), 0)


def test_plain_diffusers_draws_the_same(tmp_path: Path) -> None:
    model = Denoiser(network(time_cond_proj_dim=16), NoiseSchedule.create("cosine", 1000), 3, SHAPE, "v_prediction")
    torch.nn.init.normal_(model.network.time_embedding.cond_proj.weight)  # type: ignore[union-attr, arg-type]
    model.scale_range = (1.0, 4.0)
    save_model(model, tmp_path / "model", lineage=Lineage.new("tiny", "guided"), class_names=["a", "b", "c"])
    loaded = load_model(tmp_path / "model")
    assert loaded.denoiser.scale_range == (1.0, 4.0)
    assert not (tmp_path / "model" / "unet" / "guided_unet.py").exists()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    labels, noise = torch.tensor([0, 1, 2]), image_noise(SHAPE, 3, 0, 3)
    drawn = {}
    for scale in (1.0, 3.0):
        theirs = pipe(labels, guidance_scale=scale, num_inference_steps=5, latents=noise, output_type="pt").images
        ours = sample_images(loaded.denoiser, 3, guidance=Constant(scale), steps=5, seed=3, labels=labels)
        assert ((theirs * 255).round().int() - ours.int()).abs().max() <= 1
        drawn[scale] = theirs
    assert (drawn[1.0] - drawn[3.0]).abs().max() > 0.01, "the dial turns"
    with pytest.raises(ValueError, match="this model was trained for 1 to 4"):
        pipe(labels, guidance_scale=6.0)


def test_without_the_input_it_has_two_branches(tmp_path: Path) -> None:
    big = teacher()
    save_model(big, tmp_path / "model", lineage=Lineage.new("tiny", "supervised"), class_names=["a", "b", "c"])
    loaded = load_model(tmp_path / "model").denoiser
    x, t, y = points()
    with big.evaluating(), loaded.evaluating():
        for mine, theirs in zip(big.branches(x, t, y), loaded.branches(x, t, y), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert loaded.scale_range is None
