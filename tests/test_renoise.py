"""The chain of a few-step generator: training's unroll, the sampler, its scheduler and plain diffusers are one
(unidad.md 2)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from few_steps import Roles, factor, source, unidad
from rounds import plain_diffusers
from torch import Tensor

from diffstill.diffusion.guidance import Constant
from diffstill.diffusion.levels import geometric_ratios
from diffstill.diffusion.prediction import PREDICTION_TYPES, PredictionType
from diffstill.diffusion.sampling import noise_source, renoise_sample
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.engine.stream import micro_batches
from diffstill.errors import InputError
from diffstill.evaluation.sampling import draw, sample_images
from diffstill.models.denoiser import Denoiser
from diffstill.models.folder import load_model, save_model
from diffstill.models.lineage import Lineage
from diffstill.pipelines.renoise import RenoiseScheduler

ALONE: dict[str, Any] = {"gan": "none", "target_teacher": "none"}


def generator_of(steps: int = 3, kind: PredictionType = "epsilon", **options: Any) -> Denoiser:
    """The student of a fresh method, evaluated."""
    made: Denoiser = unidad(source(kind=kind), steps=steps, **{**ALONE, "sigma_max": 20, **options}).student
    made.network.eval()
    return made


def scheduler_of(model: Denoiser) -> RenoiseScheduler:
    betas = model.schedule.betas.tolist()
    return RenoiseScheduler(len(betas), betas, prediction_type=model.prediction_type, clip_sample=False)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_unroll_sampler_and_scheduler_are_one_bit_for_bit(kind: PredictionType, steps: int) -> None:
    bench = Roles(source(kind=kind), steps=steps, sigma_max=20, **ALONE)
    method: Any = bench.method()
    method.student.network.eval()
    batch = bench.batch()
    with torch.no_grad():
        unrolled = method.unroll(batch)
        again = iter([batch.normal(f"chain {i}") for i in range(steps)])
        drawn = draw(method.student, batch.labels, Constant(1.0), lambda: next(again))
        scheduler = scheduler_of(method.student)
        scheduler.set_timesteps(steps)
        x = batch.normal("chain 0") * scheduler.init_noise_sigma
        generators = [torch.Generator().manual_seed(i) for i in range(batch.size)]
        fresh = [torch.stack([torch.randn(1, 8, 8, generator=g) for g in generators]) for _ in range(steps - 1)]
        for t in scheduler.timesteps:
            out = method.student(scheduler.scale_model_input(x, t), t.expand(batch.size), batch.labels)
            (x,) = scheduler.step(
                out, t, x, generator=[torch.Generator().set_state(g) for g in states(steps - 1 - int(t), batch.size)],
                return_dict=False,
            )  # fmt: skip
        given = iter([batch.normal("chain 0"), *fresh])
        reference = draw(method.student, batch.labels, Constant(1.0), lambda: next(given))
    assert unrolled.std() > 0.1
    assert torch.equal(unrolled, drawn)
    assert torch.equal(x, reference)


def states(used: int, size: int) -> list[Tensor]:
    """Generators' states after so many images."""
    found = []
    for i in range(size):
        generator = torch.Generator().manual_seed(i)
        for _ in range(used):
            torch.randn(1, 8, 8, generator=generator)
        found.append(generator.get_state())
    return found


def test_the_chain_is_clean_estimates_with_noise_between_them() -> None:
    """By hand, in the variance-exploding form: x = r_0 z; x0; x0 + r_1 n; x0; ..."""
    chain = geometric_ratios(20, 0.5, 3)
    model = generator_of(3, "sample")
    z = torch.randn(3, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    given = iter(z)
    with torch.no_grad():
        found = draw(model, labels, Constant(1.0), lambda: next(given))
        x = float(chain[0]) * z[0]
        for step in range(3):
            ratio = float(chain[step])
            x0 = model(x / (1 + ratio**2) ** 0.5, torch.full((4,), 2 - step), labels)
            if step < 2:
                x = x0 + float(chain[step + 1]) * z[step + 1]
    torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-4)
    assert next(given, None) is None, "K noises"


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_an_image_takes_as_many_evaluations_as_steps(steps: int) -> None:
    bench = Roles(source(), steps=steps, **ALONE)
    method: Any = bench.method()
    asked: list[list[float]] = []
    method.student.network.register_forward_pre_hook(lambda module, args: asked.append(args[1].tolist()))
    method.unroll(bench.batch())
    known = method.student.time_index.tolist()
    assert asked == [[known[t]] * 8 for t in reversed(range(steps))], "from the noisiest down, by the teacher's times"


# ---------------------------------------------------------------------------------------------------------- gradient


def one_number(weight: float, gradient: str, steps: int = 3) -> tuple[Any, Any]:
    """A method whose student is ``x0 = weight x_t``, and a batch."""
    bench = Roles(factor(weight), steps=steps, sigma_max=20, gradient=gradient, **ALONE)
    return bench.method(), bench.batch()


def total(method: Any, batch: Any) -> Tensor:
    made: Tensor = method.unroll(batch).square().mean()
    return made


def slope(weight: float, gradient: str) -> float:
    method, batch = one_number(weight, gradient)
    (found,) = torch.autograd.grad(total(method, batch), method.student.network.weight)
    return float(found)


def difference(of: Any, weight: float, step: float = 1e-2) -> float:
    return (of(weight + step) - of(weight - step)) / (2 * step)


def test_the_gradient_goes_through_the_whole_chain() -> None:
    def value(weight: float) -> float:
        return total(*one_number(weight, "chain")).item()

    assert slope(0.9, "chain") == pytest.approx(difference(value, 0.9), rel=2e-3)


def test_last_is_the_slope_of_the_last_step_alone() -> None:
    """The steps before it are taken by a student that does not move."""

    def value(weight: float) -> float:
        method, batch = one_number(0.9, "last")
        taken = []

        def predict(x: Tensor, t: Tensor, scale: float) -> Tensor:
            taken.append(t)
            return (weight if len(taken) == 3 else 0.9) * x

        noises = iter([batch.normal(f"chain {i}") for i in range(3)])
        made = renoise_sample(
            predict, next(noises), method.student.schedule, lambda: next(noises), prediction_type="sample"
        )
        return float(made.square().mean())

    assert slope(0.9, "last") == pytest.approx(difference(value, 0.9), rel=2e-3)
    assert slope(0.9, "last") < 0.8 * slope(0.9, "chain")
    method, batch = one_number(0.9, "last")
    assert torch.equal(total(method, batch), total(*one_number(0.9, "chain"))), "the images are the same"


@pytest.mark.parametrize("step", [0, 1, 2])
def test_random_trains_one_step_behind_those_that_are_only_simulated(step: int) -> None:
    """DMD2: the image is that step's clean estimate. In closed form, ``x0 = w x_t`` all along."""
    method, batch = one_number(0.9, "random")

    def uniform(name: str, whole_batch: bool = False) -> Tensor:
        assert whole_batch, "one step for the global batch"
        return torch.tensor([(step + 0.5) / 3])

    chosen = replace(batch, uniform=uniform)
    alphas, sigmas = method.student.schedule.alphas.tolist(), method.student.schedule.sigmas.tolist()
    x = sigmas[2] * batch.normal("chain 0")
    for number, t in enumerate(reversed(range(step, 2)), 1):
        x = alphas[t] * 0.9 * x + sigmas[t] * batch.normal(f"chain {number}")
    image = method.unroll(chosen)
    torch.testing.assert_close(image.detach(), 0.9 * x)
    (found,) = torch.autograd.grad(image.square().mean(), method.student.network.weight)
    torch.testing.assert_close(found, 2 * 0.9 * x.square().mean())


def test_random_takes_every_step_and_the_same_one_in_all_micro_batches() -> None:
    bench = Roles(factor(0.9), steps=3, gradient="random", **ALONE)
    method: Any = bench.method()
    asked: list[int] = []
    method.student.network.register_forward_pre_hook(lambda module, args: asked.append(len(args[0])))
    counts = set()
    for number in range(20):
        counted = []
        for part in micro_batches(bench.batch(number * 8), 4):
            asked.clear()
            method.unroll(part)
            counted.append(len(asked))
        assert counted[0] == counted[1]
        counts.add(counted[0])
    assert counts == {1, 2, 3}


# ------------------------------------------------------------------------------------------------------- the folder


SAVED: dict[str, dict[str, Any]] = {
    "three": {"steps": 3, "kind": "v_prediction"},
    "one": {"steps": 1, "kind": "v_prediction"},
    "near": {"steps": 4, "times": "nearest"},
}


def stored(name: str) -> Denoiser:
    """Of little noise, so that few pixels of a random network are clipped."""
    return generator_of(sigma_max=1.5, **SAVED[name])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("renoise")
    for name in SAVED:
        lineage = Lineage.new(name, "unidad")
        save_model(stored(name), root / name, lineage=lineage, class_names=["a", "b", "c"], guided=False)
    return root


@pytest.mark.parametrize("name", list(SAVED))
def test_a_few_step_model_comes_back(folders: Path, name: str) -> None:
    model, back = stored(name), load_model(folders / name).denoiser
    assert back.sampler == "renoise"
    assert model.time_index is not None
    assert back.time_index is not None
    assert torch.equal(back.time_index, model.time_index)
    assert torch.equal(back.schedule.betas, model.schedule.betas)
    index = json.loads((folders / name / "model_index.json").read_text())
    assert index["scheduler"] == ["renoise", "RenoiseScheduler"]
    assert "import diffstill" not in (folders / name / "scheduler" / "renoise.py").read_text()
    options: dict[str, Any] = {"guidance": Constant(1.0), "steps": model.schedule.T, "guided": False}
    mine, theirs = (sample_images(m, 2, labels=torch.tensor([0, 2]), **options) for m in (model, back))
    assert torch.equal(mine, theirs)


def test_plain_diffusers_draws_a_few_step_models_pixels_as_a_stranger(folders: Path) -> None:
    labels, seed = [0, 1, 2, 2], 11
    found = plain_diffusers(folders, list(SAVED), labels, seed, {"default": {}, "more": {"num_inference_steps": 5}})
    for name in SAVED:
        model = load_model(folders / name).denoiser
        with model.evaluating():
            ours = draw(model, torch.tensor(labels), Constant(1.0), noise_source(model.sample_shape, seed, 0, 4))
        theirs = torch.from_numpy(found[f"{name}/default"]).permute(0, 3, 1, 2)
        assert float(((theirs > 0) & (theirs < 1)).float().mean()) > 0.2, "not clipped away"
        assert torch.equal(theirs, (ours / 2 + 0.5).clamp(0, 1)), name
        assert str(found[f"{name}/more"]) == f"num_inference_steps 5 must lie in 1..{model.schedule.T}"


def test_another_number_of_steps_is_refused() -> None:
    model = generator_of(3)
    with pytest.raises(InputError, match=r"^steps: 2 .*use 3: a model for the renoise sampler takes all its steps"):
        sample_images(model, 2, guidance=Constant(1.0), steps=2)
    with pytest.raises(ValueError, match="this model is sampled in all its 3 steps"):
        scheduler_of(model).set_timesteps(4)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_scheduler_scales_the_noise_it_is_given(steps: int) -> None:
    model = generator_of(steps)
    scheduler = scheduler_of(model)
    assert scheduler.init_noise_sigma == pytest.approx(20 / 401**0.5)
    made = NoiseSchedule.from_scheduler(scheduler)
    torch.testing.assert_close(made.alphas_cumprod, model.schedule.alphas_cumprod)
