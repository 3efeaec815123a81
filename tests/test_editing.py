"""Editing by deterministic steps against closed forms: there and back, bridges, part of the way, masks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import generator

from diffstill.analytic import GaussianMixtureWorld
from diffstill.diffusion.editing import img2img_sample, inpaint_sample, last_steps, noise_to, partly_noised
from diffstill.diffusion.guidance import Constant
from diffstill.diffusion.sampling import Predict, ddim_encode, ddim_sample, ddim_timesteps, noise_source
from diffstill.diffusion.schedule import NoiseSchedule, spaced_indices

COSINE = NoiseSchedule.create("cosine", 1000)
ONE = Constant(1.0)


def gaussian(mean: float, std: float) -> GaussianMixtureWorld:
    return GaussianMixtureWorld.single_gaussians(torch.full((1, 1, 1, 1), mean, dtype=torch.float64), std)


def from_the_clean_image(steps: int) -> NoiseSchedule:
    """``alpha = cos(pi t / 2)`` at t = 0, 1/steps, ..., 1: timestep 0 is the clean image, as far as a table can say."""
    grid = torch.arange(steps + 1, dtype=torch.float64) / steps
    levels = torch.cat([torch.ones(1, dtype=torch.float64), torch.cos(grid * torch.pi / 2) ** 2])
    return NoiseSchedule("cosine_pi", (1 - levels[1:] / levels[:-1]).clamp(1e-15, 1 - 1e-15))


def predict_of(world: GaussianMixtureWorld, schedule: NoiseSchedule) -> Predict:
    return lambda x, t, _: world.v(x, t, schedule)


def bridge(
    start: GaussianMixtureWorld, end: GaussianMixtureWorld, x: Tensor, schedule: NoiseSchedule, up: list[int]
) -> Tensor:
    encoded = ddim_encode(
        predict_of(start, schedule), x, schedule, ONE, timesteps=up, prediction_type="v_prediction"
    )  # fmt: skip
    return ddim_sample(
        predict_of(end, schedule), encoded, schedule, ONE, timesteps=up[::-1], prediction_type="v_prediction",
        clip="none",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(4, (1.9189, 2.0, 2.1622)), (64, (1.7658, 2.0, 2.4685)), (256, (1.7540, 2.0, 2.4919))],
)
def test_a_bridge_between_two_gaussians(steps: int, expected: tuple[float, ...]) -> None:
    """From N(-1, .5^2) to N(2, .25^2), known answers; their limit is ``2 + (x + 1) / 2``."""
    x = torch.tensor([-1.5, -1.0, 0.0], dtype=torch.float64).view(3, 1, 1, 1)
    made = bridge(gaussian(-1, 0.5), gaussian(2, 0.25), x, from_the_clean_image(steps), list(range(1, steps + 1)))
    assert made.flatten().tolist() == pytest.approx(expected, abs=6e-5)


def test_there_and_back_the_error_halves_with_twice_the_steps() -> None:
    world, x = gaussian(0.3, 0.5), torch.tensor([-0.4, 0.2, 1.1], dtype=torch.float64).view(3, 1, 1, 1)
    errors = []
    for steps in (20, 40, 80, 160):
        made = bridge(world, world, x, COSINE, spaced_indices(1000, steps, "trailing"))
        errors.append(float((made - x).abs().max()))
    assert errors[0] < 0.12
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.15)


def test_there_and_back_in_a_world_of_curved_ways() -> None:
    """Two classes of two components each: encoded as one class, decoded as it, and as the other."""
    world = GaussianMixtureWorld.ring(num_classes=2, components_per_class=2, std=0.15)
    labels = torch.arange(60) % 2
    x = world.sample(labels, generator(0))

    def as_class(y: Tensor) -> Predict:
        return lambda image, t, _: world.epsilon(image, t, COSINE, y)

    errors = []
    for steps in (100, 500):
        up = spaced_indices(1000, steps, "trailing")
        encoded = ddim_encode(as_class(labels), x, COSINE, ONE, timesteps=up)
        back, moved = (
            ddim_sample(as_class(y), encoded, COSINE, ONE, timesteps=up[::-1], clip="none")
            for y in (labels, 1 - labels)
        )
        errors.append(float((back - x).square().mean().sqrt()))
        clean = torch.zeros(60, dtype=torch.int64)
        right = world.class_posterior(moved, clean, COSINE).argmax(1) == 1 - labels
        assert right.double().mean() > 0.95
    assert errors[1] < errors[0] / 3
    assert errors[1] < 0.01


@given(count=st.integers(1, 60), strength=st.floats(0, 1))
@settings(deadline=None)
def test_strength_is_the_share_of_the_steps_that_is_left(count: int, strength: float) -> None:
    steps = ddim_timesteps(1000, count)
    left = last_steps(steps, strength)
    assert abs(len(left) - strength * count) <= 0.5
    assert steps[count - len(left) :] == left


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_impossible_strengths_are_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        last_steps([1, 0], strength)


def edited(strength: float, seen: list[tuple[int, Tensor]] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(images, noise, result) of 10 steps in a world of three numbers."""
    world = gaussian(0.3, 0.5)
    images = world.sample(torch.zeros(6, dtype=torch.int64), generator(0)).float()
    noise = torch.randn(images.shape, generator=generator(1))

    def predict(x: Tensor, t: Tensor, _: float) -> Tensor:
        if seen is not None:
            seen.append((int(t[0]), x))
        return world.epsilon(x, t, COSINE)

    made = img2img_sample(
        predict, images, noise, COSINE, ONE, timesteps=ddim_timesteps(1000, 10), strength=strength, clip="none"
    )
    return images, noise, made


def test_img2img_at_strength_0_is_the_image_and_at_1_sampling() -> None:
    images, _, made = edited(0.0)
    assert torch.equal(made, images)
    _, noise, made = edited(1.0)
    world = gaussian(0.3, 0.5)
    sampled = ddim_sample(lambda x, t, _: world.epsilon(x, t, COSINE), noise, COSINE, ONE, steps=10, clip="none")
    assert torch.equal(made, sampled)


def test_img2img_enters_at_the_noise_level_of_its_first_step() -> None:
    seen: list[tuple[int, Tensor]] = []
    images, noise, _ = edited(0.4, seen)
    assert [t for t, _ in seen] == [300, 200, 100, 0]
    expected = COSINE.add_noise(images, noise, torch.full((6,), 300))
    torch.testing.assert_close(seen[0][1], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        partly_noised(images, noise, COSINE, [300, 200], 0.6), noise_to(images, noise, COSINE, 200)
    )


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_img2img_keeps_less_of_the_image_the_stronger_it_is(strength: float) -> None:
    """On a Gaussian the result is affine in the image; its slope is computed here step by step."""
    images, noise, made = (x.double() for x in edited(strength))
    left = last_steps(ddim_timesteps(1000, 10), strength)
    abar = COSINE.alphas_cumprod
    gain = 1.0
    for t, u in zip(left, [*left[1:], -1], strict=True):
        a, s = float(abar[t]) ** 0.5, float(1 - abar[t]) ** 0.5
        au, su = (float(abar[u]) ** 0.5, float(1 - abar[u]) ** 0.5) if u >= 0 else (1.0, 0.0)
        gain *= (au * a * 0.25 + su * s) / (a * a * 0.25 + s * s)
    alpha, sigma = float(abar[left[0]]) ** 0.5, float(1 - abar[left[0]]) ** 0.5
    expected = 0.3 + gain * (alpha * (images - 0.3) + sigma * noise)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def half_masked() -> Tensor:
    masked = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    masked[..., 2:] = True
    return masked


@pytest.mark.parametrize("resample", [1, 3])
@pytest.mark.parametrize("clip", ["recompute", "none"])
def test_inpainting_keeps_the_known_pixels_bit_for_bit(clip: str, resample: int) -> None:
    images = torch.rand(5, 2, 4, 4, generator=generator(0)) * 2 - 1
    masked = half_masked().expand(5, 2, 4, 4)

    def predict(x: Tensor, t: Tensor, _: float) -> Tensor:
        return 0.9 * x + 0.05

    fresh = noise_source((2, 4, 4), 0, 0, 5)
    made = inpaint_sample(
        predict, images, half_masked(), fresh, COSINE, ONE, timesteps=ddim_timesteps(1000, 7), clip=clip,
        resample=resample,
    )  # fmt: skip
    assert torch.equal(made[~masked], images[~masked])
    assert (made[masked] - images[masked]).abs().max() > 0.1


@pytest.mark.parametrize("resample", [1, 4])
def test_at_every_step_the_known_pixels_have_its_noise_level_and_one_noise(resample: int) -> None:
    """And what is drawn anew has it too, after every return: an oracle of black images tells noise from image."""
    count, steps = 400, [900, 600, 250, 0]
    images = torch.rand(count, 1, 4, 4, generator=generator(0), dtype=torch.float64) * 2 - 1
    draws = [torch.randn(images.shape, generator=generator(i), dtype=torch.float64) for i in range(1, 20)]
    masked = half_masked().expand(count, 1, 4, 4)
    seen: list[int] = []

    def predict(x: Tensor, t: Tensor, _: float) -> Tensor:
        now = int(t[0])
        alpha, sigma = COSINE.at(t, 4, torch.float64)
        known = alpha * images + sigma * draws[0]
        torch.testing.assert_close(x[~masked], known[~masked], rtol=1e-9, atol=1e-9)
        if not seen:
            assert torch.equal(x[masked], draws[0][masked])
        else:
            assert x[masked].std() == pytest.approx(float(sigma[0]), rel=0.03)
        seen.append(now)
        return x / sigma

    made = inpaint_sample(
        predict, images, half_masked(), iter(draws).__next__, COSINE, ONE, timesteps=steps, clip="none",
        resample=resample,
    )  # fmt: skip
    assert seen == [t for t in steps[:-1] for _ in range(resample)] + steps[-1:]
    assert made[masked].abs().max() < 1e-9


def test_resampling_lets_the_drawn_part_hear_the_known_one() -> None:
    """Two pixels that always agree: the second, drawn anew, should be what the first says."""
    covariance = torch.tensor([[[0.25, 0.24], [0.24, 0.25]]], dtype=torch.float64)
    world = GaussianMixtureWorld(
        torch.zeros(1, 2, dtype=torch.float64), covariance, torch.zeros(1, dtype=torch.int64), sample_shape=(1, 1, 2)
    )
    images = world.sample(torch.zeros(500, dtype=torch.int64), generator(0))
    masked = torch.tensor([[[[False, True]]]])
    errors = []
    for resample in (1, 8):
        drawn = noise_source((1, 1, 2), 0, 0, 500)
        made = inpaint_sample(
            lambda x, t, _: world.epsilon(x, t, COSINE), images, masked, lambda drawn=drawn: drawn().double(), COSINE,
            ONE, timesteps=ddim_timesteps(1000, 50), clip="none", resample=resample,
        )  # fmt: skip
        assert torch.equal(made[..., 0], images[..., 0])
        errors.append(float((made[..., 1] - 0.96 * images[..., 0]).square().mean().sqrt()))
    best = (0.25 - 0.24**2 / 0.25) ** 0.5
    assert errors[1] < 1.3 * best < errors[0] < 0.5
