from __future__ import annotations

import math

import pytest
import torch
from eval_fakes import (
    CLASSES,
    SCHEDULE,
    SHAPE,
    AsKind,
    LabelAffine,
    Rescaled,
    Shifted,
    affine_teacher,
    denoiser,
    noise_data,
    tiny_unet,
)
from torch import Tensor

from diffstill.data.dataset import ImageData
from diffstill.diffusion.prediction import PredictionType
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.errors import InputError
from diffstill.evaluation.guidance_fidelity import FidelityProbe, measure_fidelity
from diffstill.evaluation.results import Estimate, Fidelity, FidelityBin
from diffstill.models.denoiser import Denoiser

DATA = noise_data()
QUANTITIES = ("ratio", "cosine", "gap_mse", "cond_mse", "null_mse", "best_rescale")


def shifted(teacher: Denoiser, cond: Tensor, null: Tensor) -> Denoiser:
    return denoiser(Shifted(teacher.network, cond, null, teacher.null_label))


def values(part: FidelityBin) -> dict[str, float | None]:
    return {name: getattr(part, name).value for name in QUANTITIES}


def width(estimate: Estimate) -> float:
    return estimate.high - estimate.low


def measure(student: Denoiser, teacher: Denoiser, data: ImageData = DATA, pairs: int = 300, **options: int) -> Fidelity:
    return measure_fidelity(student, teacher, data, pairs=pairs, **options)


def test_a_copy_of_the_teacher_is_perfect() -> None:
    teacher = tiny_unet(SHAPE)
    found = measure(tiny_unet(SHAPE), teacher, pairs=120)
    assert tuple(values(found.overall).values()) == (1.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    assert not found.collapsed
    assert found.teacher_gap_rms > 0


@pytest.mark.parametrize("factor", [0.3, 2.0])
def test_a_rescaled_gap_shows_in_ratio_and_rescale_alone(factor: float) -> None:
    teacher = affine_teacher()
    found = measure(denoiser(Rescaled(teacher.network, factor, teacher.null_label)), teacher)
    unit = found.teacher_gap_rms**2
    expected = (factor, 1.0, (1 - factor) ** 2 * unit, (1 - factor) ** 2 * unit, 0.0, 1 / factor)
    assert tuple(values(found.overall).values()) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert found.collapsed == (factor < 0.5)


def test_common_drift_leaves_the_gap_perfect_but_not_the_branches() -> None:
    """What makes ratio and cosine alone worthless: both branches are wrong by the same image."""
    teacher, drift = affine_teacher(), torch.linspace(-1, 1, 16).view(SHAPE)
    found = values(measure(shifted(teacher, drift, drift), teacher).overall)
    power = float(drift.square().mean())
    expected = {"ratio": 1, "cosine": 1, "gap_mse": 0, "cond_mse": power, "null_mse": power, "best_rescale": 1}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_branch_errors_are_told_apart() -> None:
    teacher, error = affine_teacher(), torch.full(SHAPE, 0.2)
    found = values(measure(shifted(teacher, error, torch.zeros(SHAPE)), teacher).overall)
    assert (found["cond_mse"], found["null_mse"], found["gap_mse"]) == pytest.approx((0.04, 0, 0.04), rel=1e-5)


def constant_gaps(gaps: Tensor) -> Denoiser:
    """A model whose gap for class k is the image gaps[k], at every (x_t, t)."""
    shift = torch.cat([gaps, torch.zeros(1, *SHAPE)])
    return denoiser(LabelAffine(torch.full((CLASSES + 1,), 0.5), shift))


def test_an_orthogonal_gap_has_cosine_zero() -> None:
    along, across = torch.zeros(2, CLASSES, *SHAPE)
    along[:, 0, 0, 0], across[:, 0, 0, 1] = 1.0, 2.0
    found = values(measure(constant_gaps(across), constant_gaps(along)).overall)
    assert (found["ratio"], found["cosine"], found["best_rescale"]) == pytest.approx((2, 0, 0), abs=1e-6)
    assert found["gap_mse"] == pytest.approx(5 / 16, rel=1e-6)


def test_every_quantity_by_hand_on_gaps_of_unequal_length() -> None:
    """Classes in equal number: gaps of length 1, 2, 4 (teacher) and 3, -1, 0 (student) along one pixel."""
    theirs, mine = torch.zeros(2, CLASSES, *SHAPE)
    theirs[:, 0, 0, 0], mine[:, 0, 0, 0] = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, -1.0, 0.0])
    found = measure(constant_gaps(mine), constant_gaps(theirs), pairs=len(DATA))
    result = values(found.overall)
    assert result["ratio"] == pytest.approx(4 / 7, rel=1e-5)  # of means, not the mean of ratios (3 + 1/2 + 0)/3
    assert result["cosine"] == pytest.approx((1 - 1 + 0) / 3, abs=1e-6)
    assert result["gap_mse"] == pytest.approx((4 + 9 + 16) / 3 / 16, rel=1e-5)
    assert result["best_rescale"] == pytest.approx((3 - 2 + 0) / (9 + 1 + 0), rel=1e-5)
    assert found.teacher_gap_rms == pytest.approx(math.sqrt((1 + 4 + 16) / 3 / 16), rel=1e-5)
    assert [part.ratio.value for part in found.by_class] == pytest.approx([3, 0.5, 0], rel=1e-5)
    assert [part.label for part in found.by_class] == ["class 0", "class 1", "class 2"]


def test_dead_guidance_is_a_collapse_and_a_teacher_without_guidance_has_no_ratio() -> None:
    dead, teacher = constant_gaps(torch.zeros(CLASSES, *SHAPE)), affine_teacher()
    found = measure(dead, teacher)
    assert values(found.overall)["ratio"] == values(found.overall)["cosine"] == 0.0
    assert found.overall.best_rescale.value is None
    assert found.collapsed
    other_way = measure(teacher, dead)
    assert other_way.overall.ratio.value is None
    assert other_way.overall.cosine.value is None
    assert not other_way.collapsed


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_students_of_another_prediction_type_compare_in_epsilon_units(kind: PredictionType) -> None:
    teacher = affine_teacher()
    student = denoiser(AsKind(teacher.network, kind, SCHEDULE), kind)
    assert tuple(values(measure(student, teacher).overall).values()) == pytest.approx((1, 1, 0, 0, 0, 1), abs=1e-4)


def test_bins_share_out_the_pairs_and_average_to_the_whole() -> None:
    teacher = affine_teacher()
    found = measure(affine_teacher(1), teacher, bins=7)
    assert [part.label for part in found.by_timestep][:2] == ["t 0-13", "t 14-27"]
    assert found.by_timestep[-1].label == "t 85-99"
    for parts in (found.by_timestep, found.by_class):
        assert sum(part.pairs for part in parts) == found.overall.pairs == 300
        mean = sum(part.pairs * (part.gap_mse.value or 0) for part in parts) / 300
        assert mean == pytest.approx(found.overall.gap_mse.value, rel=1e-9)


def test_pairs_are_the_same_for_any_batch_size_and_every_model() -> None:
    teacher = affine_teacher()
    first = measure(affine_teacher(1), teacher, batch_size=7)
    again = measure(affine_teacher(1), teacher, batch_size=300)
    assert values(first.overall) == pytest.approx(values(again.overall), rel=1e-6)
    assert first.teacher_gap_rms == pytest.approx(measure(affine_teacher(2), teacher).teacher_gap_rms, rel=1e-9)
    assert values(first.overall) != values(measure(affine_teacher(1), teacher, seed=1).overall)


def test_intervals_hold_the_value_and_shrink_with_the_root_of_the_pairs() -> None:
    data, teacher, student = noise_data(4800), affine_teacher(), affine_teacher(1)
    few, many = (measure(student, teacher, data, pairs=n).overall for n in (300, 4800))
    for name in QUANTITIES:
        wide, tight = getattr(few, name), getattr(many, name)
        assert wide.low <= wide.value <= wide.high
        assert tight.low <= tight.value <= tight.high
        assert width(wide) / width(tight) == pytest.approx(4, rel=0.35), name


def test_cycling_a_few_images_does_not_fake_precision() -> None:
    """The error depends on the class alone: 3 images seen 1,000 times are still 3 images."""
    theirs, mine = torch.ones(CLASSES, *SHAPE), torch.ones(CLASSES, *SHAPE)
    mine[0] = 2.0
    found = measure(constant_gaps(mine), constant_gaps(theirs), noise_data(3), pairs=3000)
    assert width(found.overall.gap_mse) > 0.5


def test_no_bootstrap_no_interval() -> None:
    overall = measure(affine_teacher(1), affine_teacher(), bootstrap=0).overall
    assert overall.ratio.value is not None
    assert overall.ratio.low is overall.ratio.high is None


def test_the_probe_is_the_measurement_on_its_pairs() -> None:
    teacher, student = affine_teacher(), affine_teacher(1)
    probe = FidelityProbe(teacher, DATA, pairs=64, seed=3)
    expected = values(measure(student, teacher, pairs=64, seed=3).overall)
    del expected["best_rescale"]
    assert probe(student) == pytest.approx(expected, rel=1e-6)
    assert probe(teacher) == {"ratio": 1, "cosine": 1, "gap_mse": 0, "cond_mse": 0, "null_mse": 0}


def test_the_networks_come_back_in_their_former_mode_without_gradients() -> None:
    teacher, student = tiny_unet(SHAPE), tiny_unet(SHAPE, seed=1)
    teacher.network.eval()
    student.network.train()
    before = torch.random.get_rng_state()
    measure(student, teacher, pairs=8)
    FidelityProbe(teacher, DATA, pairs=8)(student)
    assert (student.network.training, teacher.network.training) == (True, False)
    assert all(p.grad is None for p in student.network.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)


def other(shape: tuple[int, int, int] = SHAPE, classes: int = CLASSES, schedule: NoiseSchedule = SCHEDULE) -> Denoiser:
    network = LabelAffine(torch.zeros(classes + 1), torch.zeros(classes + 1, *shape))
    return Denoiser(network, schedule, classes, shape)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (
            other(schedule=NoiseSchedule.create("linear", 100)),
            r"^student\.schedule: 'linear, T=100' is not usable; .*cosine",
        ),
        (other(schedule=NoiseSchedule.create("cosine", 50)), r"^student\.schedule: 'cosine, T=50'"),
        (other(classes=4), r"^student\.num_classes: 4 is not usable; compare with a teacher of the same num_classes"),
        (other(shape=(1, 8, 8)), r"^student\.sample_shape: \(1, 8, 8\) is not usable"),
    ],
)
def test_models_that_share_no_pairs_are_refused(student: Denoiser, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(student, affine_teacher())


def test_data_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"^data: .* use data of shape \(1, 4, 4\)"):
        measure(affine_teacher(), affine_teacher(), noise_data(shape=(1, 8, 8)))
    with pytest.raises(InputError, match=r"^pairs: .*test has 0"):
        measure(affine_teacher(), affine_teacher(), noise_data(0))
