"""Respaced schedules and models against closed-form chains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from respacing import EXACT, IRREGULAR, SIGMOID, T, ddim_law

from diffstill.checks.bench import tiny_denoiser
from diffstill.diffusion.guidance import Constant
from diffstill.diffusion.sampling import ddim_sample
from diffstill.diffusion.schedule import NoiseSchedule, spaced_indices
from diffstill.jobs.build import Teacher, build_student
from diffstill.jobs.finish import teacher_subjects
from diffstill.models.adapters import unwrap
from diffstill.models.denoiser import Denoiser
from diffstill.recipe import EvaluationSpec, MethodSpec, NetworkSpec


@pytest.mark.parametrize(("init", "known"), [("inherit", True), ("magnitude", True), ("fresh", False)])
def test_inherited_weights_are_asked_at_the_timesteps_they_know(init: str, known: bool) -> None:
    teacher = tiny_denoiser((8, 16), 0).freeze()
    few = teacher.respaced(spaced_indices(teacher.schedule.T, 4, "trailing"))
    shape = {"block_out_channels": [8, 16], "layers_per_block": 1, "attention_levels": [], "norm_num_groups": 4}
    spec = NetworkSpec.model_validate({"family": "unet2d", "init": init, **shape})
    student = build_student(spec, MethodSpec(name="dash"), few, seed=0)
    assert (student.time_index is not None) == known
    if init != "inherit":
        return
    for name, value in unwrap(student.network).state_dict().items():
        value.copy_(unwrap(teacher.network).state_dict()[name])
    x, t, labels = torch.randn(4, *teacher.sample_shape), torch.arange(4), torch.arange(4) % teacher.num_classes
    student.network.eval()
    with torch.no_grad():
        torch.testing.assert_close(student(x, t, labels), few(x, t, labels))


def test_the_whole_teacher_beside_a_student_of_fewer_steps_begins_at_noise() -> None:
    for length, steps in ((1000, 50), (128, 128)):
        model = tiny_denoiser((8, 16), 0)
        whole = Denoiser(model.network, NoiseSchedule.create("cosine", length), model.num_classes, model.sample_shape)
        teacher = Teacher(whole.respaced(spaced_indices(length, 4, "trailing")), None, None, None)
        found = teacher_subjects(teacher, EvaluationSpec(steps=4))
        assert [(subject.role, subject.steps) for subject in found] == [("teacher", steps), ("strided-teacher", None)]


def test_the_released_schedule_has_its_known_levels() -> None:
    known = {0: 0.999707, 64: 0.97736, 256: 0.84989, 512: 0.49838, 896: 0.05239, 1016: 0.002086}
    for t, value in known.items():
        assert SIGMOID.alphas_cumprod[t].item() == pytest.approx(value, rel=3e-4)


def test_sixteen_leading_steps_have_their_known_ratios() -> None:
    known = [
        *(0.999707, 0.977649, 0.968418, 0.955896, 0.939360, 0.918274, 0.892514, 0.862565),
        *(0.829511, 0.794694, 0.759065, 0.722390, 0.682316, 0.632714, 0.558767, 0.416553),
    ]
    respaced = SIGMOID.respace(spaced_indices(T, 16))
    torch.testing.assert_close(1 - respaced.betas, torch.tensor(known, dtype=torch.float64), atol=1e-6, rtol=0)


@given(st.sets(st.integers(0, T - 1), min_size=1, max_size=60))
@settings(max_examples=40, deadline=None)
def test_any_increasing_indices_keep_their_noise_levels(chosen: set[int]) -> None:
    indices = sorted(chosen)
    respaced = SIGMOID.respace(indices)
    torch.testing.assert_close(respaced.alphas_cumprod, SIGMOID.alphas_cumprod[indices], rtol=1e-8, atol=0)
    gaps = [torch.prod(1 - SIGMOID.betas[a + 1 : b + 1]) for a, b in zip([-1, *indices], indices, strict=False)]
    torch.testing.assert_close(1 - respaced.betas, torch.stack(gaps), rtol=1e-8, atol=0)


def test_all_indices_give_the_schedule_back() -> None:
    torch.testing.assert_close(SIGMOID.respace(range(T)).betas, SIGMOID.betas, rtol=1e-9, atol=1e-14)


def test_the_posterior_is_that_of_the_teachers_chain() -> None:
    """Bayes' rule on the teacher's chain, index 512 -> 256: q(x_256 | x_512, x_0)."""
    abar = SIGMOID.alphas_cumprod
    between = torch.prod(1 - SIGMOID.betas[257:513])
    prior, noise = 1 - abar[256], 1 - between
    precision = 1 / prior + between / noise
    bayes = [abar[256].sqrt() / prior / precision, between.sqrt() / noise / precision, 1 / precision]
    respaced = SIGMOID.respace([256, 512])
    b, before = respaced.betas[1], respaced.alphas_cumprod[0]
    closed = [before.sqrt() * b, (1 - b).sqrt() * (1 - before), b * (1 - before)]
    closed = [term / (1 - respaced.alphas_cumprod[1]) for term in closed]
    for mine, theirs, known in zip(closed, bayes, (0.760111, 0.229165, 0.123771), strict=True):
        assert mine.item() == pytest.approx(theirs.item(), rel=1e-10)
        assert mine.item() == pytest.approx(known, abs=2e-6)


def test_spacings() -> None:
    assert spaced_indices(1024, 4) == [0, 256, 512, 768]
    assert spaced_indices(1024, 4, "trailing") == [255, 511, 767, 1023]
    assert spaced_indices(1024, 1, "trailing") == [1023]
    assert spaced_indices(1024, 100) == [int(10.24 * i) for i in range(100)], "the released list for 100 steps"
    assert spaced_indices(10, 10) == spaced_indices(10, 10, "trailing") == list(range(10))


@given(length=st.integers(2, 300), data=st.data())
@settings(max_examples=60, deadline=None)
def test_spacings_are_increasing_and_reach_their_end(length: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(2, length))
    leading, trailing = spaced_indices(length, steps), spaced_indices(length, steps, "trailing")
    assert (leading[0], trailing[-1]) == (0, length - 1)
    for found in (leading, trailing):
        assert len(set(found)) == steps
        assert found == sorted(found)
        assert 0 <= found[0] <= found[-1] < length


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([], "non-empty increasing"), ([3, 2], "increasing"), ([1, 1], "increasing"),
        ([-1, 2], r"must lie in 0\.\.1023"), ([0, 1024], r"must lie in 0\.\.1023"),
    ],
)  # fmt: skip
def test_indices_that_cannot_be_are_refused(bad: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SIGMOID.respace(bad)


def test_spacings_that_cannot_be_are_refused() -> None:
    for steps in (0, 1025):
        with pytest.raises(ValueError, match=rf"steps {steps} must lie in 1\.\.1024"):
            spaced_indices(T, steps)
    with pytest.raises(ValueError, match="returns the noise; use trailing"):
        spaced_indices(T, 1)


# ------------------------------------------------------------------------------------- the strided teacher as a model


@pytest.mark.parametrize(
    ("steps", "spacing", "mean", "std"),
    [
        (1024, "leading", 0.299919, 0.498865), (128, "leading", 0.293236, 0.493712),
        (100, "leading", 0.291908, 0.492208), (32, "leading", 0.285780, 0.477643),
        (8, "leading", 0.270835, 0.424739), (2, "leading", 0.236283, 0.300854),
        (128, "trailing", 0.299920, 0.492241), (8, "trailing", 0.299934, 0.407601),
        (2, "trailing", 0.299968, 0.200027), (1, "trailing", 0.300000, 0.000135),
    ],
)  # fmt: skip
def test_the_strided_teachers_law_is_the_closed_form(steps: int, spacing: Any, mean: float, std: float) -> None:
    found = ddim_law(EXACT.respaced(spaced_indices(T, steps, spacing)))
    assert found == (pytest.approx(mean, abs=1e-5), pytest.approx(std, abs=1e-5))


def test_an_irregular_chain_too() -> None:
    assert ddim_law(EXACT.respaced(IRREGULAR)) == (pytest.approx(0.282326, abs=1e-5), pytest.approx(0.398815, abs=1e-5))


def test_a_respaced_model_is_the_network_at_the_chosen_timesteps() -> None:
    model = tiny_denoiser((8, 8), 0)
    fewer = model.respaced([3, 40, 700])
    x, labels = torch.randn(6, *model.sample_shape), torch.arange(6) % 3
    t = torch.tensor([0, 1, 2, 2, 1, 0])
    assert torch.equal(fewer(x, t, labels), model(x, torch.tensor([3, 40, 700])[t], labels))
    torch.testing.assert_close(fewer.schedule.alphas_cumprod, model.schedule.alphas_cumprod[[3, 40, 700]])
    again = fewer.respaced([0, 2])
    assert torch.equal(again(x, torch.ones_like(t), labels), model(x, torch.full_like(t, 700), labels))
    copied = fewer.with_network(copy.deepcopy(model.network))
    assert torch.equal(copied(x, t, labels), fewer(x, t, labels))
    assert copied.origin is not None
    assert copied.origin[0].network is copied.network, "the origin follows the network (an EMA copy, a compiled form)"


def test_the_noisiest_step_keeps_a_signal_in_diffusers_float32() -> None:
    respaced = NoiseSchedule.create("cosine", 1000).respace(spaced_indices(1000, 4, "trailing"))
    stock = DDIMScheduler(num_train_timesteps=4, trained_betas=respaced.betas.tolist())
    assert 0 < stock.alphas_cumprod[-1] < 1e-6
    torch.testing.assert_close(stock.alphas_cumprod.double(), respaced.alphas_cumprod, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("indices", [spaced_indices(1000, 8), spaced_indices(1000, 8, "trailing"), [0, 5, 90, 91, 700]])
def test_stock_ddim_takes_the_same_way(indices: list[int], clip: bool) -> None:
    model = tiny_denoiser((8, 8), 0).respaced(indices)
    model.network.eval()
    steps = len(indices)
    stock = DDIMScheduler(
        num_train_timesteps=steps, trained_betas=model.schedule.betas.tolist(), clip_sample=clip,
        set_alpha_to_one=True, steps_offset=0, timestep_spacing="leading",
    )  # fmt: skip
    stock.set_timesteps(steps)
    noise, labels = torch.randn(3, *model.sample_shape, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    x = noise
    with torch.no_grad():
        for t in stock.timesteps:
            out = model(x, t.expand(3), labels)
            x = stock.step(out, t, x, eta=0.0, use_clipped_model_output=clip).prev_sample
        ours = ddim_sample(
            lambda x, t, s: model.guided(x, t, labels, s), noise, model.schedule,
            Constant(1.0), steps=steps, clip="recompute" if clip else "none",
        )  # fmt: skip
    torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4 * float(x.abs().max()))


@pytest.mark.parametrize(
    ("steps", "spacing", "mean", "std"),
    [(128, "leading", 0.299843, 0.485466), (8, "leading", 0.295910, 0.375199), (2, "trailing", 0.300000, 0.200000)],
)
def test_stock_ddpm_draws_from_the_closed_form_law(steps: int, spacing: Any, mean: float, std: float) -> None:
    model = EXACT.respaced(spaced_indices(T, steps, spacing))
    stock = DDPMScheduler(
        num_train_timesteps=steps, trained_betas=model.schedule.betas.tolist(), variance_type="fixed_small",
        clip_sample=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    count = 40_000
    x, labels = torch.randn(count, 1, 1, 1, generator=generator), torch.zeros(count, dtype=torch.int64)
    for t in reversed(range(steps)):
        x = stock.step(model(x, torch.full((count,), t), labels), t, x, generator=generator).prev_sample
    assert x.mean().item() == pytest.approx(mean, abs=3.5 * std / count**0.5)
    assert x.std().item() == pytest.approx(std, abs=3.5 * std / (2 * count) ** 0.5)
