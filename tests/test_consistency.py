"""How alike images are (PSNR, SSIM, strangers), and a teacher against itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import generator

from diffstill.engine.runtime import Runtime
from diffstill.evaluation.paired import compare_pairs, compare_strangers, psnr, squared_error, ssim, strangers
from diffstill.jobs.consistency import consistency
from diffstill.jobs.opened import How
from diffstill.jobs.ui import Silent


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


def ssim_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """One channel (H, W), window by window, from weighted moments."""
    sizes = [min(11, side if side % 2 else side - 1) for side in a.shape]
    grids = [np.exp(-((np.arange(n) - n // 2) ** 2) / (2 * 1.5**2)) for n in sizes]
    weights = np.outer(*grids)
    weights /= weights.sum()
    found = []
    for top in range(a.shape[0] - sizes[0] + 1):
        for left in range(a.shape[1] - sizes[1] + 1):
            x, y = (image[top : top + sizes[0], left : left + sizes[1]] for image in (a, b))
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            cov = (weights * (x - mx) * (y - my)).sum()
            found.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return float(np.mean(found))


@pytest.mark.parametrize("size", [(14, 17), (11, 11), (8, 8), (5, 12), (3, 2), (1, 1)])
def test_ssim_is_that_of_moments_window_by_window(size: tuple[int, int]) -> None:
    a, b = pictures(3, 2, *size), pictures(3, 2, *size, seed=1)
    expected = [
        np.mean([ssim_by_hand(x, y) for x, y in zip(p, q, strict=True)])
        for p, q in zip(a.numpy(), b.numpy(), strict=True)
    ]
    torch.testing.assert_close(ssim(a, b, batch_size=2), torch.tensor(expected), rtol=1e-9, atol=1e-9)


def test_ssim_is_that_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    a, b = pictures(1, 1, 20, 24), pictures(1, 1, 20, 24, seed=1)
    theirs = metrics.structural_similarity(
        a[0, 0].numpy(), b[0, 0].numpy(), data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert float(ssim(a, b)) == pytest.approx(theirs, abs=1e-9)


def test_ssim_of_flat_images_is_the_luminance_term() -> None:
    a, b = torch.full((1, 1, 9, 9), 0.2), torch.full((1, 1, 9, 9), 0.6)
    assert float(ssim(a, b)) == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), abs=1e-6)


@given(seed=st.integers(0, 2**31), height=st.integers(1, 16), width=st.integers(1, 16))
@settings(max_examples=25, deadline=None)
def test_ssim_is_symmetric_at_most_1_and_1_for_the_same(seed: int, height: int, width: int) -> None:
    a, b = pictures(2, 1, height, width, seed=seed), pictures(2, 1, height, width, seed=seed + 1)
    torch.testing.assert_close(ssim(a, b), ssim(b, a))
    torch.testing.assert_close(ssim(a, a), torch.ones(2, dtype=torch.float64))
    assert bool((ssim(a, b) <= 1 + 1e-12).all())
    assert bool((ssim(a, 1 - a) < ssim(a, (a + 0.01).clamp(max=1))).all()) or min(height, width) < 3


def test_images_of_other_shapes_are_not_compared() -> None:
    with pytest.raises(ValueError, match="one shape"):
        ssim(pictures(1, 1, 8, 8), pictures(1, 1, 8, 9))


def test_psnr_by_hand() -> None:
    """A tenth of the range everywhere: 20 dB; half a grey level's rounding would be 58.9 dB, not 48 more."""
    a = torch.zeros(2, 1, 4, 4)
    error = squared_error(a, a + 0.1)
    assert psnr(error).tolist() == pytest.approx([20, 20], abs=1e-5)
    assert float(psnr(torch.tensor(1 / 255**2))) == pytest.approx(48.13, abs=0.005)


def uint8_images(n: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (n, 1, 8, 8), generator=generator(seed), dtype=torch.uint8)


def test_figures_of_pairs_by_hand_with_their_bootstrap() -> None:
    a, b = uint8_images(400, 0), uint8_images(400, 1)
    b[:100] = a[:100]
    features_a, features_b = torch.zeros(400, 2), torch.zeros(400, 2)
    features_b[:, 0] = torch.arange(400) / 100
    found = compare_pairs(a, b, features_a, features_b)
    assert (found.pairs, found.identical) == (400, 100)
    error = ((a.double() - b.double()) / 255).square().mean()
    assert found.psnr.value == pytest.approx(-10 * math.log10(error))
    assert found.ssim.value == pytest.approx(float(ssim(a / 255, b / 255).mean()), abs=1e-6)
    assert found.distance.value == pytest.approx(1.995)
    half = 1.96 * float(features_b[:, 0].std()) / math.sqrt(400)
    assert found.distance.low == pytest.approx(1.995 - half, abs=0.15 * half)
    assert found.distance.high == pytest.approx(1.995 + half, abs=0.15 * half)
    assert found.psnr.low < found.psnr.value < found.psnr.high
    assert found == compare_pairs(a, b, features_a, features_b), "resamples come from a fixed seed"


def test_the_same_images_are_infinitely_alike() -> None:
    a, features = uint8_images(6, 0), torch.randn(6, 3, generator=generator(0))
    found = compare_pairs(a, a, features, features)
    assert found.identical == 6
    assert found.psnr.value is None
    assert found.ssim.value == pytest.approx(1)
    assert found.distance.value == 0


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_strangers_share_their_class_and_nothing_else(labels: list[int]) -> None:
    partner = strangers(torch.tensor(labels)).tolist()
    for i, other in enumerate(partner):
        if labels.count(labels[i]) == 1:
            assert other == -1
        else:
            assert other != i
            assert labels[other] == labels[i]
    known = [p for p in partner if p >= 0]
    assert len(set(known)) == len(known), "each image serves once"


def test_strangers_are_compared_with_their_own_features() -> None:
    a = uint8_images(5, 0)
    features = torch.tensor([[0.0], [10.0], [1.0], [13.0], [99.0]])
    found = compare_strangers(a, a, features, features, torch.tensor([0, 1, 0, 1, 2]))
    assert found.pairs == 4
    assert found.distance.value == pytest.approx((1 + 3 + 1 + 3) / 4)
    swapped = squared_error(a[:4] / 255, a[[2, 3, 0, 1]] / 255).mean()
    assert found.psnr.value == pytest.approx(float(psnr(swapped)), abs=1e-4)
    with pytest.raises(ValueError, match="two images"):
        compare_strangers(a, a, features, features, torch.arange(5))


def test_a_model_is_consistent_with_itself(tiny_run: Path, tmp_path: Path) -> None:
    teacher, out = str(tiny_run / "teacher"), tmp_path / "same.png"
    told = consistency(
        teacher, out, Runtime("cpu"), Silent(), How(guidance="1", steps=4), teacher=teacher, count=30, teacher_steps=4
    )
    assert told.figures["paired"]["identical"] == 30
    assert told.figures["paired"]["psnr"]["value"] is None
    assert told.figures["paired"]["ssim"]["value"] == pytest.approx(1)
    assert told.figures["paired"]["distance"]["value"] == 0
    floor = told.figures["unpaired"]
    assert floor["psnr"]["high"] < 60
    assert floor["ssim"]["high"] < 1
    assert floor["distance"]["low"] > 0
    assert "infinite" in told.as_text()
    assert json.loads(out.with_suffix(".json").read_text()) == told.figures


def test_more_steps_from_the_same_noise_are_nearer_than_strangers(tiny_run: Path, tmp_path: Path) -> None:
    """The pairing is by noise: the same network in 8 and in 40 steps; and batches change nothing that can be seen."""
    teacher, found = str(tiny_run / "teacher"), []
    for size in (7, 64):
        told = consistency(
            teacher, tmp_path / f"{size}.png", Runtime("cpu"), Silent(), How(guidance="1", steps=8, batch_size=size),
            teacher=teacher, count=40, teacher_steps=40,
        )  # fmt: skip
        found.append(told.figures)
    assert found[0]["paired"]["psnr"]["low"] > found[0]["unpaired"]["psnr"]["high"]
    assert found[0]["paired"]["distance"]["high"] < found[0]["unpaired"]["distance"]["low"]
    for kind in ("paired", "unpaired"):
        for name in ("psnr", "ssim", "distance"):
            assert found[0][kind][name]["value"] == pytest.approx(found[1][kind][name]["value"], rel=1e-3)
