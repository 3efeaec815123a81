from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from eval_fakes import bars
from torch import Tensor

from diffstill.data.dataset import to_float
from diffstill.errors import InputError
from diffstill.evaluation.distances import FeatureDistance, LpipsDistance, PixelDistance, make_distance
from diffstill.evaluation.diversity import (
    cluster_diversity,
    intra_cluster_diversity,
    memorisation,
    nearest,
    nearest_other,
    nearness,
)
from diffstill.evaluation.results import ExtractorInfo

PIXELS = PixelDistance()


def flat(*values: int) -> Tensor:
    """(N, 1, 2, 2) uint8, one grey value an image: their pixel distance is the difference / 127.5."""
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()


class MeanExtractor:
    """Two features: the mean of an image and of its square, / 255."""

    info = ExtractorInfo(name="FD-mean", sha256="ab" * 32, dim=2)

    classifies = False

    def read(self, images: Tensor) -> tuple[Tensor, None]:
        pixels = images.flatten(1).float() / 255
        return torch.stack([pixels.mean(1), pixels.square().mean(1)], 1), None


# --- distances


def test_pixel_distance_is_the_root_mean_square_on_minus_one_to_one() -> None:
    found = PIXELS(flat(0, 255), flat(0, 255, 51))
    assert torch.allclose(found, torch.tensor([[0, 2, 0.4], [2, 0, 1.6]], dtype=torch.float64), atol=1e-6)
    one = flat(0).clone()
    one[0, 0, 0, 0] = 255  # one pixel of four: sqrt(4 / 4)
    assert float(PIXELS(one, flat(0))) == pytest.approx(1.0)


def test_feature_distance_is_euclidean_in_the_extractors_features() -> None:
    found = FeatureDistance(MeanExtractor(), batch_size=1)(flat(0, 255), flat(0, 51))
    expected = [[0, math.hypot(0.2, 0.04)], [math.hypot(1, 1), math.hypot(0.8, 0.96)]]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def l1(a: Tensor, b: Tensor) -> Tensor:
    assert a.shape == b.shape
    assert a.shape[1] == 3
    assert float(a.min()) >= -1
    assert float(a.max()) <= 1
    return (a - b).abs().mean((1, 2, 3), keepdim=True)


def test_lpips_pairs_every_image_with_every_other_on_minus_one_to_one() -> None:
    """A network of LPIPS' form in its place: what is ours is the pairing, the range and the three channels."""
    big = [images.expand(-1, 1, 2, 2).repeat(1, 1, 8, 8) for images in (flat(0, 255, 51), flat(0, 102))]
    expected = torch.tensor([[0, 0.8], [2, 1.2], [0.4, 0.4]], dtype=torch.float64)
    for pairs in (1, 4, 64):
        assert torch.allclose(LpipsDistance("vgg", network=l1, pairs=pairs)(*big), expected, atol=1e-6)
    with pytest.raises(InputError, match=r"^distance: 'LPIPS-alex' does not go with images \(16, 16\); use .* 31 pix"):
        LpipsDistance("alex", network=l1)(*big)


@pytest.mark.skipif(importlib.util.find_spec("lpips") is not None, reason="lpips is installed")
def test_lpips_that_is_not_there_is_told_in_one_line() -> None:
    with pytest.raises(InputError, match=r"^distance: 'lpips:vgg' cannot be loaded .*pip install '\.\[eval\]'"):
        make_distance("lpips:vgg", MeanExtractor())


@pytest.mark.parametrize("spec", ["lpips", "lpips:resnet", "pixel", "features:2"])
def test_an_unknown_distance_is_refused(spec: str) -> None:
    with pytest.raises(InputError, match=r"^distance: .* is not understood; use features, pixels, lpips:vgg or"):
        make_distance(spec, MeanExtractor())


@pytest.mark.parametrize("images", [to_float(flat(0, 255)), flat(0, 255).int(), flat(0, 255)[0]])
def test_only_bytes_are_compared(images: Tensor) -> None:
    """Floats would leave it open what white is: that is how the published numbers came to be at half contrast."""
    for call in (
        lambda: PIXELS(images, flat(0)),
        lambda: FeatureDistance(MeanExtractor()).points(images),
        lambda: intra_cluster_diversity(images, flat(0), PIXELS),
        lambda: intra_cluster_diversity(images, flat(0), PIXELS, crdi_compat=True),
        lambda: intra_cluster_diversity(flat(0), images, PIXELS),
        lambda: memorisation(images, flat(0), flat(1), PIXELS),
    ):
        with pytest.raises(ValueError, match=r"must be .* uint8"):
            call()


# --- diversity


def test_clusters_built_by_hand() -> None:
    """Anchors 0, 100, 200, 250; clusters {0, 20, 30}, {} , {190}, {240, 255}; means (20+30+10)/3 and 15 grey values."""
    samples, anchors = flat(240, 0, 20, 190, 255, 30), flat(0, 100, 200, 250)
    found = intra_cluster_diversity(samples, anchors, PIXELS)
    assert found.sizes == (3, 0, 1, 2)
    assert (found.empty, found.singletons) == (1, 1)
    assert found.value.value == pytest.approx((20 + 15) / 2 / 127.5)
    assert found.protocol == "intra-cluster/1"
    # Left out one by one: means of 10, 30, 20 instead of the first 20; without one of the last two, 20 alone.
    error = math.sqrt((10**2 + 10**2 + 0) / 4 + 2 * (20 - 17.5) ** 2) / 127.5
    assert found.value.high - found.value.value == pytest.approx(1.959964 * error, rel=1e-5)


def test_the_published_defects_by_hand() -> None:
    """[0, 1] for [-1, 1]: grey g is compared as 127.5 + g / 2, and the mean is over ten clusters, pairs or none."""
    samples, anchors = flat(240, 0, 20, 190, 255, 30), flat(0, 100, 200, 250)
    found = intra_cluster_diversity(samples, anchors, PIXELS, crdi_compat=True)
    # Compared as 247.5, 127.5, 137.5, 222.5, 255, 142.5: nearest to 250, 100, 100, 200, 250, 100.
    assert found.sizes == (0, 3, 1, 2, 0, 0, 0, 0, 0, 0)
    assert found.value.value == pytest.approx(((10 + 15 + 5) / 3 + 7.5) / 10 / 127.5)
    assert found.protocol == "intra-cluster/crdi"
    assert (found.empty, found.singletons) == (7, 1)


def test_the_published_protocol_knows_ten_clusters() -> None:
    anchors = flat(*range(128, 256, 10))
    samples = flat(*(2 * (g - 128) + d for g in range(128, 248, 10) for d in (0, 4)))  # at half contrast, two a cluster
    plain = intra_cluster_diversity(anchors.repeat_interleave(2, 0), anchors, PIXELS)
    assert len(plain.sizes) == 13
    compat = intra_cluster_diversity(samples, anchors, PIXELS, crdi_compat=True)
    assert compat.sizes == (2,) * 10
    assert compat.value.value == pytest.approx(2 / 127.5)


def test_members_beyond_the_cut_are_counted_but_not_compared() -> None:
    samples = flat(0, 10, 100, 100, 100)
    found = intra_cluster_diversity(samples, flat(0), PIXELS, per_cluster=2)
    assert found.sizes == (5,)
    assert found.value.value == pytest.approx(10 / 127.5)


@pytest.mark.parametrize("copies", [1, 3])
def test_copies_of_the_anchors_have_no_diversity(copies: int) -> None:
    anchors = bars(6, 0, "train").images
    found = intra_cluster_diversity(anchors.repeat(copies, 1, 1, 1), anchors, PIXELS)
    assert found.sizes == (copies,) * 6
    assert found.singletons == (6 if copies == 1 else 0)
    assert found.value.value == (None if copies == 1 else 0.0)


def test_no_anchor_or_no_pair_at_all_is_an_error_of_the_caller() -> None:
    with pytest.raises(ValueError, match="0 anchors"):
        intra_cluster_diversity(flat(1, 2), flat(1)[:0], PIXELS)
    with pytest.raises(ValueError, match="1 members"):
        intra_cluster_diversity(flat(1, 2), flat(1), PIXELS, per_cluster=1)


def test_the_interval_is_as_wide_as_the_truth_scatters() -> None:
    """Gaussian points on a line around two anchors: the mean distance of a pair is 2 sd / sqrt(pi)."""
    generator = torch.Generator().manual_seed(0)
    anchors = torch.tensor([[-50.0], [50.0]])
    found = []
    for _ in range(200):
        points = torch.randn(80, 1, generator=generator) + anchors[torch.arange(80) % 2]
        found.append(cluster_diversity(points, anchors, FeatureDistance(MeanExtractor())).value)
    truth = 2 / math.sqrt(math.pi)
    values = torch.tensor([e.value for e in found])
    assert float(values.mean()) == pytest.approx(truth, rel=0.02)
    assert 0.9 <= sum(e.low <= truth <= e.high for e in found) / 200 <= 0.99
    half = torch.tensor([e.high - e.value for e in found]).mean() / 1.959964
    assert float(half / values.std()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("crdi", [False, True])
def test_the_interval_is_what_leaving_each_sample_out_changes(crdi: bool) -> None:
    """Done by brute force, with clusters of 1, 2, 3 and many."""
    generator = torch.Generator().manual_seed(1)
    anchors = torch.arange(5.0)[:, None] * 100
    points = torch.randn(40, 1, generator=generator) + anchors[torch.tensor([0] + [1] * 2 + [2] * 3 + [3] * 34)]
    distance = FeatureDistance(MeanExtractor())
    found = cluster_diversity(points, anchors, distance, crdi_compat=crdi)
    assert found.sizes[:5] == (1, 2, 3, 34, 0)
    kept = [torch.arange(40) != i for i in range(40)]
    without = [cluster_diversity(points[keep], anchors, distance, crdi_compat=crdi).value.value for keep in kept]
    error = math.sqrt(sum((value - found.value.value) ** 2 for value in without))
    assert found.value.high - found.value.value == pytest.approx(1.959964 * error, rel=1e-5)


@pytest.mark.parametrize("shares", [(0.004, 0.01, 0.02, 0.2), (0.01, 0.02, 0.03, 0.3)])
def test_the_interval_also_holds_where_some_clusters_are_small(shares: tuple[float, ...]) -> None:
    """300 samples, clusters of other widths: some of a few samples only, which come and go."""
    generator = torch.Generator().manual_seed(0)
    anchors = torch.arange(5.0)[:, None] * 1000
    widths = torch.tensor([1.0, 3.0, 2.0, 4.0, 2.5])
    weights = torch.tensor([*shares, 1 - sum(shares)])
    found = []
    for _ in range(300):
        which = torch.multinomial(weights, 300, replacement=True, generator=generator)
        points = anchors[which] + widths[which, None] * torch.randn(300, 1, generator=generator)
        found.append(cluster_diversity(points, anchors, FeatureDistance(MeanExtractor())).value)
    mean = sum(e.value for e in found) / len(found)
    assert sum(e.low <= mean <= e.high for e in found) / len(found) >= 0.9


# --- memorisation


def test_nearest_takes_the_first_of_equals() -> None:
    found, which = nearest(PIXELS.points(flat(10, 90)), PIXELS.points(flat(0, 20, 100)), PIXELS)
    assert which.tolist() == [0, 2]
    assert found.tolist() == pytest.approx([10 / 127.5] * 2)


def test_ratio_and_share_by_hand() -> None:
    real = torch.linspace(1, 21, 21, dtype=torch.float64)  # mean 11, 5 % quantile 2
    found = nearness(torch.tensor([0.0, 2.0, 3.0, 11.0], dtype=torch.float64), real)
    assert found.ratio.value == pytest.approx(4 / 11)
    assert found.share.value == 0.5


def test_replicated_shots_are_memorised_and_fresh_images_are_at_chance() -> None:
    shots, held_out, fresh = (bars(n, seed, "x").images for n, seed in ((10, 0), (1000, 1), (1000, 2)))
    copied = memorisation(shots.repeat(20, 1, 1, 1), shots, held_out, PIXELS)
    assert (copied.share.value, copied.ratio.value) == (1.0, 0.0)
    real = memorisation(fresh, shots, held_out, PIXELS)
    assert real.share.value == pytest.approx(0.05, abs=0.03)
    assert real.share.low < 0.05 < real.share.high
    assert real.ratio.value == pytest.approx(1.0, abs=0.03)


def test_without_held_out_images_the_shots_distances_to_each_other_are_the_yardstick() -> None:
    """Shots 0, 20, 100, 250: the nearest others are 20, 20, 80 and 150 away, mean 67.5, 5 % quantile 20."""
    shots = flat(0, 20, 100, 250)
    apart = nearest_other(PIXELS.points(shots), PIXELS) * 127.5
    assert apart.tolist() == pytest.approx([20, 20, 80, 150])
    found = memorisation(flat(10, 21, 45, 220), shots, flat(), PIXELS)  # 10, 1, 25 and 30 from the nearest
    assert found.share.value == 0.5
    assert found.ratio.value == pytest.approx(16.5 / 67.5)
    twice = nearest_other(PIXELS.points(flat(7, 7, 9)), PIXELS)
    assert twice.tolist() == pytest.approx([0, 0, 2 / 127.5])


def test_a_single_image_tells_nothing_of_copies() -> None:
    assert nearest_other(PIXELS.points(flat(7)), PIXELS).shape == (0,)
    found = memorisation(flat(7, 9), flat(7), flat(), PIXELS)
    assert (found.share.value, found.share.low, found.ratio.value) == (None, None, None)


def test_held_out_images_that_are_all_shots_leave_no_ratio() -> None:
    found = memorisation(flat(0, 9), flat(0), flat(0, 0), PIXELS)
    assert found.ratio.value is None
    assert found.share.value == 0.5
