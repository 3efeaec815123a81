from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from eval_fakes import CLASSES, SCHEDULE, Empirical, LabelAffine, bars, bars_splits, tiny_unet
from torch import multiprocessing as mp

from diffstill.console import PlainUi
from diffstill.diffusion.guidance import TAG, Constant
from diffstill.engine.runtime import Runtime
from diffstill.errors import InputError
from diffstill.evaluation.classifier import cached_classifier
from diffstill.evaluation.features import ClassifierExtractor, extract
from diffstill.evaluation.frechet import FeatureStats, frechet_distance
from diffstill.evaluation.processes import gather_rows, share
from diffstill.evaluation.protocol import EvalSettings, Evaluator
from diffstill.evaluation.results import ModelEvaluation, Protocol
from diffstill.evaluation.sampling import sample_images
from diffstill.jobs.finish import Subject, evaluate_subject
from diffstill.models.denoiser import Denoiser
from diffstill.models.lineage import weights_sha256

SHAPE = (1, 8, 8)
DATA = bars_splits(train=90, held_out=45)
SETTINGS = EvalSettings(
    samples=60, steps=5, guidance=("1", "2", "tag"), pairs=40, batch_size=32, cost_batches=(2,), cost_seconds=0.0
)


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> ClassifierExtractor:
    device = torch.device("cpu")
    return ClassifierExtractor(cached_classifier(DATA, tmp_path_factory.mktemp("cache"), device), "bars", device)


@pytest.fixture(scope="module")
def evaluator(extractor: ClassifierExtractor) -> Evaluator:
    return Evaluator(DATA, extractor, SETTINGS)


def oracle() -> Denoiser:
    """Samples the training images themselves, of the class asked for."""
    return Denoiser(Empirical(DATA.train, SCHEDULE), SCHEDULE, CLASSES, SHAPE)


def blank() -> Denoiser:
    """Predicts that everything is noise: samples are structureless."""
    network = LabelAffine(torch.ones(CLASSES + 1), torch.zeros(CLASSES + 1, *SHAPE))
    return Denoiser(network, SCHEDULE, CLASSES, SHAPE)


def test_student_and_teacher_are_measured_in_one_memory_layout(evaluator: Evaluator) -> None:
    """Training leaves both in the one that its kernels like."""
    student, teacher = tiny_unet(), tiny_unet(seed=1)
    layouts: list[bool] = []
    for model in (student, teacher):
        model.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        convolution = next(m for m in model.network.modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels > 1)
        convolution.register_forward_pre_hook(lambda conv, _: layouts.append(conv.weight.is_contiguous()))
    subject = Subject("student", student, "dash", None, against=teacher)
    evaluate_subject(subject, evaluator, Runtime("cpu"), PlainUi(), cost=False)
    assert len(layouts) > 10
    assert all(layouts)


# --- sampling


def test_an_image_is_the_same_for_any_batch_size_and_start() -> None:
    model = oracle()
    whole = sample_images(model, 11, guidance=Constant(2.0), steps=5, batch_size=11)
    assert torch.equal(sample_images(model, 11, guidance=Constant(2.0), steps=5, batch_size=4), whole)
    assert torch.equal(sample_images(model, 4, guidance=Constant(2.0), steps=5, first=7), whole[7:])
    assert not torch.equal(sample_images(model, 11, guidance=Constant(2.0), steps=5, seed=1), whole)
    assert whole.dtype == torch.uint8
    assert whole.shape == (11, *SHAPE)


def test_labels_are_obeyed_and_balanced_by_default() -> None:
    images = sample_images(oracle(), 7, guidance=Constant(1.0), steps=10, first=1)
    asked = sample_images(
        oracle(), 7, guidance=Constant(1.0), steps=10, first=1, labels=(torch.arange(7) + 1) % CLASSES
    )
    assert torch.equal(images, asked)
    distances = (images[:, None].float() - DATA.train.images[None].float()).flatten(2).norm(dim=2)
    assert torch.equal(DATA.train.labels[distances.argmin(1)], (torch.arange(7) + 1) % CLASSES)


def test_an_unguided_student_is_sampled_at_scale_one() -> None:
    model = tiny_unet()
    plain = sample_images(model, 4, guidance=Constant(1.0), steps=3)
    assert torch.equal(sample_images(model, 4, guidance=Constant(5.0), steps=3, guided=False), plain)
    assert not torch.equal(sample_images(model, 4, guidance=Constant(5.0), steps=3), plain)


def test_sampling_tells_progress_and_restores_the_mode_even_after_an_error() -> None:
    model, seen = tiny_unet(), []
    model.network.train()
    sample_images(model, 5, guidance=Constant(1.0), steps=2, batch_size=2, progress=seen.append)
    assert seen == [2, 4, 5]
    with pytest.raises(ZeroDivisionError):
        sample_images(model, 5, guidance=Constant(1.0), steps=2, progress=lambda done: 1 // 0)
    assert model.network.training


def test_a_model_of_nan_gives_grey_images() -> None:
    network = LabelAffine(torch.full((CLASSES + 1,), torch.nan), torch.zeros(CLASSES + 1, *SHAPE))
    images = sample_images(Denoiser(network, SCHEDULE, CLASSES, SHAPE), 2, guidance=Constant(1.0), steps=2)
    assert images.unique().tolist() == [128]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": torch.tensor([0, 3])}, r"^labels: \[0, 3\] is not usable; use classes 0\.\.2"),
        ({"labels": torch.tensor([0])}, r"^labels: \(1,\) is not usable; give one label an image \(2\)"),
        ({"steps": 101}, r"^steps: 101 is not usable; use 1\.\.100"),
    ],
)
def test_bad_sampling_input_is_one_line(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample_images(tiny_unet(), 2, **{"guidance": Constant(1.0), "steps": 2, **options})


# --- the protocol


def test_every_field_of_an_evaluation_is_filled(evaluator: Evaluator) -> None:
    teacher, student = tiny_unet(), tiny_unet(seed=1)
    found = evaluator.evaluate(student, "student", "dash", teacher=teacher)
    assert (found.name, found.method, found.guided) == ("student", "dash", True)
    assert found.sha256 == weights_sha256(student.network)
    assert [(point.guidance, point.nfe) for point in found.sweep] == [("1", 5), ("2", 10), ("tag:1,4,5", 10)]
    for point in found.sweep:
        for name in ("fd", "fd_test", "fd_pixels", "kid", "precision", "recall", "class_agreement"):
            estimate = getattr(point, name)
            assert estimate.low <= estimate.value <= estimate.high, name
    assert found.fidelity.overall.pairs == 40
    assert found.fidelity.split == "test"
    assert (found.cost.nfe, found.cost.latency[0].batch) == (10, 2)
    assert ModelEvaluation.model_validate_json(found.model_dump_json()) == found


def test_a_model_can_be_measured_at_steps_of_its_own(evaluator: Evaluator) -> None:
    own, usual = evaluator.evaluate(tiny_unet(), "m", steps=3), evaluator.evaluate(tiny_unet(), "m", cost=False)
    assert (own.steps, usual.steps) == (3, 5)
    assert [point.nfe for point in own.sweep] == [3, 6, 6]
    assert own.cost is not None
    assert own.cost.nfe == 6
    assert own.sweep[0].fd.value != usual.sweep[0].fd.value, "sampled at those steps, not only counted"


def test_the_protocol_says_all_that_must_be_equal(evaluator: Evaluator, extractor: ClassifierExtractor) -> None:
    protocol = evaluator.protocol
    assert protocol.extractor == extractor.info
    assert (protocol.reference, protocol.reference_sha256) == ("bars train, 90 images", DATA.train.fingerprint())
    assert (protocol.samples, protocol.steps, protocol.clip, protocol.seeds) == (60, 5, "recompute", [0])
    assert protocol.guidance == ["1", "2", "tag:1,4,5"]
    settings = evaluator.settings
    assert (protocol.pairs, protocol.neighbours, protocol.neighbour_points) == (settings.pairs, 3, 10_000)
    train, test = (FeatureStats.of(extract(extractor, part.images)) for part in (DATA.train, DATA.test))
    assert protocol.floor.value == pytest.approx(frechet_distance(test, train), rel=1e-3)
    test, train = (FeatureStats.of(part.images.flatten(1) / 255) for part in (DATA.test, DATA.train))
    assert protocol.floor_pixels.value == pytest.approx(frechet_distance(test, train), rel=1e-3)
    assert not {"floor", "floor_pixels"} & set(protocol.settings()), "results, not settings"
    assert Protocol.model_validate_json(protocol.model_dump_json()) == protocol


def test_the_numbers_are_those_of_the_images(evaluator: Evaluator, extractor: ClassifierExtractor) -> None:
    model = tiny_unet(seed=2)
    point = evaluator.evaluate(model, "x", cost=False).sweep[2]
    images = sample_images(model, 60, guidance=TAG(), steps=5, batch_size=32)
    features = extract(extractor, images)
    for estimate, part in ((point.fd, DATA.train), (point.fd_test, DATA.test)):
        reference = FeatureStats.of(extract(extractor, part.images))
        assert estimate.value == pytest.approx(frechet_distance(FeatureStats.of(features), reference), rel=1e-5)
    drawn, real = (FeatureStats.of(each.flatten(1) / 255) for each in (images, DATA.train.images))
    assert point.fd_pixels.value == pytest.approx(frechet_distance(drawn, real), rel=1e-4)
    right = (extractor.read(images)[1].argmax(1) == torch.arange(60) % CLASSES).sum()
    assert point.class_agreement.value == float(right) / 60


def test_a_perfect_generator_and_a_useless_one(evaluator: Evaluator) -> None:
    """The oracle draws training images: at the floor, all of the right class, on the manifold and all over it."""
    best = evaluator.evaluate(oracle(), "oracle", cost=False).sweep[0]
    worst = evaluator.evaluate(blank(), "blank", cost=False).sweep[0]
    assert best.fd.value < 2 * evaluator.protocol.floor.value < worst.fd.value / 5
    assert (best.class_agreement.value, best.precision.value) == (1.0, 1.0)
    assert best.recall.value > 0.5 > worst.precision.value
    assert worst.class_agreement.value < 0.6
    assert abs(best.kid.value) < worst.kid.value / 5


def test_a_copy_of_the_teacher_keeps_all_its_guidance(evaluator: Evaluator) -> None:
    found = evaluator.evaluate(tiny_unet(), "copy", teacher=tiny_unet(), cost=False)
    assert found.fidelity.overall.ratio.value == found.fidelity.overall.cosine.value == 1.0
    assert found.cost is None


def test_an_unguided_student_has_one_point_and_no_fidelity(evaluator: Evaluator) -> None:
    found = evaluator.evaluate(tiny_unet(), "one pass", teacher=tiny_unet(), guided=False)
    assert [(point.guidance, point.nfe) for point in found.sweep] == [("1", 5)]
    assert found.fidelity is None
    assert found.cost.nfe == 5
    assert not found.guided


def test_three_seeds_pool_to_their_mean_and_spread(extractor: ClassifierExtractor) -> None:
    settings = dataclasses.replace(SETTINGS, guidance=("2",))
    model = tiny_unet()

    def fd(seeds: tuple[int, ...]) -> float:
        evaluator = Evaluator(DATA, extractor, dataclasses.replace(settings, seeds=seeds))
        return evaluator.evaluate(model, "x", cost=False).sweep[0].fd

    each = [fd((seed,)).value for seed in (0, 1, 2)]
    assert len(set(each)) == 3
    pooled = fd((0, 1, 2))
    assert pooled.value == pytest.approx(sum(each) / 3)
    spread = torch.tensor(each).std().item()
    assert pooled.high - pooled.value == pytest.approx(4.3027 * spread / 3**0.5, rel=1e-3)


def test_progress_runs_from_zero_to_one(evaluator: Evaluator) -> None:
    seen: list[tuple[float, str]] = []
    evaluator.evaluate(tiny_unet(), "x", progress=lambda done, note: seen.append((done, note)))
    shares = [done for done, _ in seen]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.2
    assert shares[-1] == 1.0
    assert {"guidance 1", "guidance tag:1,4,5"} <= {note for _, note in seen}


def test_without_test_images_there_is_no_floor(extractor: ClassifierExtractor) -> None:
    data = dataclasses.replace(DATA, test=bars(0, 0, "test"))
    evaluator = Evaluator(data, extractor, dataclasses.replace(SETTINGS, guidance=("1",)))
    found = evaluator.evaluate(tiny_unet(), "x", teacher=tiny_unet(), cost=False)
    assert evaluator.protocol.floor is None
    assert found.sweep[0].fd_test is None
    assert found.fidelity.split == "val"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (tiny_unet((1, 4, 4)), r"^model\.sample_shape: \(1, 4, 4\) is not usable; .*bars is \(1, 8, 8\)"),
        (tiny_unet(classes=5), r"^model\.num_classes: 5 is not usable; .*bars has 3 classes"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(evaluator: Evaluator, model: Denoiser, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluator.evaluate(model, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 3}, r"^evaluation\.samples: 3 is not usable; use 8 or more"),
        ({"steps": 0}, r"^evaluation\.steps: 0"),
        ({"guidance": ()}, r"^evaluation\.guidance: \(\) is not usable; give at least one"),
        ({"guidance": ("much",)}, r"^evaluation\.guidance: \['much'\] .*use a number such as 2"),
        ({"seeds": ()}, r"^evaluation\.seeds"),
    ],
)
def test_bad_settings_are_one_line(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        EvalSettings(**change)
    assert "\n" not in str(error.value)


# --- several processes


def test_one_process_has_the_whole_share() -> None:
    assert share(7) == range(7)
    rows = torch.rand(3, 2)
    assert gather_rows(rows) is rows


def _measure(rank: int, world: int, folder: str) -> None:
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    trained = cached_classifier(DATA, Path(folder) / f"cache-{rank}", device)
    evaluator = Evaluator(DATA, ClassifierExtractor(trained, "bars", device), dataclasses.replace(SETTINGS, samples=65))
    found = evaluator.evaluate(tiny_unet(seed=1), "x", teacher=tiny_unet(), cost=False)
    stats = FeatureStats.of(torch.arange(24.0).view(12, 2)[: 5 + 7 * (world == 1)] ** 2)
    if world > 1 and rank == 1:
        stats = FeatureStats.of(torch.arange(24.0).view(12, 2)[5:] ** 2)
    stats.all_reduce()
    result = {
        "evaluation": found.model_dump(),
        "protocol": evaluator.protocol.model_dump(),
        "stats": [stats.count, stats.mean.tolist(), stats.covariance.tolist()],
        "shares": [share(n)[:] == range(n * rank // world, n * (rank + 1) // world) for n in range(9)],
    }
    (Path(folder) / f"{world}-{rank}.json").write_text(json.dumps(result))
    if world > 1:
        torch.distributed.destroy_process_group()


def _same(a: object, b: object) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _same(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            _same(x, y)
    else:
        assert a == (pytest.approx(b, rel=1e-3, abs=1e-6) if isinstance(b, float) else b)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    mp.spawn(_measure, (2, str(tmp_path)), nprocs=2)
    mp.spawn(_measure, (1, str(tmp_path)), nprocs=1)
    first, second, alone = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("2-0", "2-1", "1-0"))
    assert first == second
    _same(first, alone)
    assert all(first["shares"])
    assert list((tmp_path / "cache-0").iterdir())
    assert not (tmp_path / "cache-1").exists()  # process 1 received the weights
