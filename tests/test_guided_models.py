"""Networks that take the guidance scale, as models: inherited, saved, loaded, and sampled by diffusers alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import assert_same, one_line
from rounds import plain_diffusers
from torch import Tensor, nn
from worlds import generator

from diffstill.diffusion.guidance import TAG, Constant, GuidanceSchedule
from diffstill.diffusion.sampling import count_nfe, ddim_sample, image_noise
from diffstill.diffusion.schedule import NoiseSchedule, spaced_indices
from diffstill.errors import InputError
from diffstill.evaluation.sampling import sample_images
from diffstill.jobs.build import build_student
from diffstill.models.adapters import FAMILIES, family_of
from diffstill.models.denoiser import Denoiser
from diffstill.models.folder import load_model, save_model
from diffstill.models.lineage import Lineage
from diffstill.models.students import inherit
from diffstill.pipelines.guided_unet import GuidedUNet2DModel
from diffstill.recipe import MethodSpec, NetworkSpec, load_recipe

NAMES = ["a", "b", "c"]

# -------------------------------------------------------------------------------------------------- inheritance


def unet(family: str, widths: tuple[int, int], seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    made: Any = FAMILIES[family].build(
        sample_shape=(1, 8, 8),
        num_classes=3,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=4,
        **options,
    )
    if family == "guided_unet2d":
        nn.init.normal_(made.class_embedding.scale.weight)
    return made.eval()


def test_a_narrower_student_of_a_plain_teacher_begins_without_effect_of_the_scale() -> None:
    teacher = unet("unet2d", (16, 24), 0)
    scaled, plain = unet("guided_unet2d", (8, 16), 1), unet("unet2d", (8, 16), 2)
    for student in (scaled, plain):
        inherit(teacher, student)
    assert not scaled.class_embedding.scale.weight.any()
    x, t, y = torch.randn(3, 1, 8, 8, generator=generator(0)), torch.tensor([0, 500, 999]), torch.arange(3)
    with torch.no_grad():
        wanted = plain(x, t, class_labels=y).sample
        for scale in (1.0, 4.0, torch.tensor([1.0, 2.0, 3.0])):
            torch.testing.assert_close(scaled(x, t, y, scale).sample, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("select", ["first", "magnitude"])
def test_a_narrower_student_keeps_the_scales_of_the_channels_it_keeps(select: Any) -> None:
    teacher, student = unet("guided_unet2d", (16, 24), 0), unet("guided_unet2d", (8, 16), 1)
    inherit(teacher, student, select=select)
    table, mine = teacher.class_embedding, student.class_embedding
    kept = [int((column == table.weight.T).all(1).nonzero()) for column in mine.weight.T]
    assert len(set(kept)) == 32
    assert (kept == list(range(32))) == (select == "first")
    assert torch.equal(mine.scale.weight, table.scale.weight[kept])
    same = unet("guided_unet2d", (16, 24), 2)
    inherit(teacher, same, select=select)
    assert_same(same.state_dict(), teacher.state_dict())


def test_students_that_read_the_scale_otherwise_inherit_nothing() -> None:
    teacher = unet("guided_unet2d", (16, 24), 0)
    for options in ({"guidance_embed_dim": 32}, {"guidance_embed_type": "fourier"}):
        with pytest.raises(InputError, match=r"^student\.guidance_embed_\w+: .* it must equal the teacher's"):
            inherit(teacher, unet("guided_unet2d", (8, 16), 1, **options))


def test_a_student_of_a_teacher_that_takes_the_scale_knows_its_range() -> None:
    teacher = student().freeze()
    made = build_student(NetworkSpec(family="teacher"), MethodSpec(name="progressive"), teacher, seed=0)
    assert made.scale_range == (1.0, 4.5)
    for method in ("dash", "sfddm", "composite"):  # they train its answers at two scales, at most
        with pytest.raises(InputError, match=f"method.name: '{method}' does not teach a student every scale"):
            build_student(NetworkSpec(family="teacher"), MethodSpec(name=method), teacher, seed=0)


# --------------------------------------------------------------------------------------------- saved and loaded


def student(embed: str = "lcm", few: bool = False) -> Denoiser:
    """A random network whose answers change much with the scale; ``few``: as a student of 5 steps."""
    network = unet("guided_unet2d", (8, 16), 0, guidance_embed_type=embed, guidance_embed_dim=8)
    network.class_embedding.weight.data *= 2
    model = Denoiser(network, NoiseSchedule.create("cosine"), 3, (1, 8, 8), "v_prediction")
    model.scale_range = (1.0, 4.5)
    if not few:
        return model
    fewer = model.respaced(spaced_indices(1000, 5, "trailing"))
    made = Denoiser(network, fewer.schedule, 3, (1, 8, 8), "v_prediction")
    made.time_index, made.scale_range, made.sampler = fewer.time_index, (1.0, 4.5), "stochastic"
    return made


MODELS: dict[str, Callable[[], Denoiser]] = {
    "lcm": student,
    "fourier": lambda: student("fourier"),
    "few": lambda: student(few=True),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("guided")
    for name, make in MODELS.items():
        lineage = Lineage.new(name, "guided")
        save_model(make(), root / name, lineage=lineage, class_names=NAMES, default_guidance="1.5")
    return root


@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_that_takes_the_scale_comes_back(saved: Path, name: str) -> None:
    model, loaded = MODELS[name](), load_model(saved / name)
    back = loaded.denoiser
    assert isinstance(back.network, GuidedUNet2DModel)
    assert_same(back.network.state_dict(), model.network.state_dict())
    assert (back.scale_range, back.sampler, loaded.guided) == ((1.0, 4.5), model.sampler, True)
    assert (back.num_classes, back.prediction_type) == (3, "v_prediction")
    assert torch.equal(back.schedule.betas, model.schedule.betas)
    assert (back.time_index is None) == (model.time_index is None)
    if back.time_index is not None:
        assert back.time_index.tolist() == [199, 399, 599, 799, 999]
    index = json.loads((saved / name / "model_index.json").read_text())
    assert index["guidance_range"] == {"low": 1.0, "high": 4.5}
    assert index["unet"] == ["guided_unet", "GuidedUNet2DModel"]
    x, t, labels = torch.randn(3, 1, 8, 8, generator=generator(0)), torch.tensor([0, 2, 4]), torch.arange(3)
    scale = torch.tensor([1.0, 2.0, 4.5])
    with model.evaluating(), back.evaluating():
        mine, theirs = (m.guided(x, t, labels, scale) for m in (model, back))
    assert torch.equal(mine, theirs)


def test_a_plain_model_has_no_range(tmp_path: Path) -> None:
    model = Denoiser(unet("unet2d", (8, 16), 0), NoiseSchedule.create("cosine"), 3, (1, 8, 8))
    save_model(model, tmp_path / "m", lineage=Lineage.new("m", "dash"), class_names=NAMES)
    assert load_model(tmp_path / "m").denoiser.scale_range is None
    assert not list((tmp_path / "m" / "unet").glob("*.py"))


@pytest.mark.parametrize(
    "broken",
    [None, {}, [1, 5], {"low": 1}, {"low": 5, "high": 1}, {"low": 2, "high": 2}, {"low": "1", "high": 5},
     {"low": True, "high": 5}, {"low": 1, "high": float("nan")}, {"low": 1, "high": float("inf")}, "1,5"],
)  # fmt: skip
def test_a_damaged_range_is_refused_in_one_line(saved: Path, tmp_path: Path, broken: Any) -> None:
    folder = Path(shutil.copytree(saved / "lcm", tmp_path / "m"))
    index = json.loads((folder / "model_index.json").read_text())
    index["guidance_range"] = broken
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="guidance_range") as told:
        load_model(folder)
    one_line(told.value)


def test_a_range_that_is_missing_and_a_scale_input_that_is_missing_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "lcm", tmp_path / "m"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "guidance_range"}))
    with pytest.raises(InputError, match=r"takes the guidance scale and has a guidance_range of None; .*again"):
        load_model(folder)
    index["unet"] = ["diffusers", "UNet2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"has unknown weights class_embedding\.scale\.weight") as told:
        load_model(folder)
    one_line(told.value)


RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {"guidance_scale": 1.0},
    "strong": {"guidance_scale": 4.5},
    "tag": {"guidance_schedule": "tag:1,4,5"},
    "too much": {"guidance_scale": 4.6},
    "too little": {"guidance_scale": 0.5},
    "tag beyond": {"guidance_schedule": "tag:1,9,50"},
}
GUIDANCE: dict[str, GuidanceSchedule] = {
    "default": Constant(1.5), "plain": Constant(1.0), "strong": Constant(4.5), "tag": TAG(1, 4, 5),
}  # fmt: skip


def own_samples(model: Denoiser, guidance: GuidanceSchedule, labels: Tensor, steps: int) -> Tensor:
    with model.evaluating():
        drawn = ddim_sample(
            lambda x, t, s: model.guided(x, t, labels, s),
            image_noise(model.sample_shape, 11, 0, len(labels)),
            model.schedule,
            guidance,
            steps=steps,
            prediction_type="v_prediction",
        )
    return (drawn / 2 + 0.5).clamp(0, 1)


def test_plain_diffusers_draws_the_same_pixels_at_every_scale_as_a_stranger(saved: Path) -> None:
    labels, steps = [0, 1, 2, 1], 7
    runs = {name: {"num_inference_steps": steps, **options} for name, options in RUNS.items()}
    found = plain_diffusers(saved, ["lcm", "fourier"], labels, 11, runs)
    for name in ("lcm", "fourier"):
        model = load_model(saved / name).denoiser
        for run, guidance in GUIDANCE.items():
            theirs = torch.from_numpy(found[f"{name}/{run}"]).permute(0, 3, 1, 2)
            assert theirs.std() > 0.1
            ours = own_samples(model, guidance, torch.tensor(labels), steps)
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
        for first, second in (("default", "plain"), ("plain", "strong"), ("strong", "tag")):
            assert np.abs(found[f"{name}/{first}"] - found[f"{name}/{second}"]).max() > 0.05
        told = {run: str(found[f"{name}/{run}"]) for run in ("too much", "too little", "tag beyond")}
        assert told["too much"] == "guidance 4.6 reaches 4.6; this model was trained for 1 to 4.5"
        assert told["too little"] == "guidance 0.5 reaches 0.5; this model was trained for 1 to 4.5"
        assert told["tag beyond"].startswith("guidance tag:1,9,50 reaches 9; this model was trained for")


def test_a_scale_costs_one_evaluation_a_step() -> None:
    model, rows = student(few=True), []
    handle = model.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    sample_images(model, 3, guidance=Constant(3.0), steps=5)
    handle.remove()
    assert rows == [3] * 5
    assert count_nfe(Constant(3.0), 1000, 50, one_pass=model.takes_scale) == 50
    assert count_nfe(Constant(3.0), 1000, 50) == 100
    assert family_of(model.network).takes_scale


def test_a_network_that_takes_the_scale_cannot_be_trained_from_data_alone() -> None:
    with pytest.raises(InputError, match="the guidance scale as an input needs a teacher"):
        load_recipe("digits-teacher-v", ["network.family=guided_unet2d", "network.block_out_channels=[16, 24]"])
