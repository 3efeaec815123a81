from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from eval_fakes import CLASSES, SCHEDULE, Empirical, bars, bars_splits, noise_data, tiny_unet
from fabricated import environment
from html_checks import check_page
from torch import Tensor
from torch import multiprocessing as mp

from diffstill.cli import main
from diffstill.data.dataset import ImageData
from diffstill.data.sources import DataSpec, DataSplits
from diffstill.errors import InputError
from diffstill.evaluation.classifier import cached_classifier
from diffstill.evaluation.distances import PixelDistance
from diffstill.evaluation.diversity import NEAR, intra_cluster_diversity, memorisation
from diffstill.evaluation.features import ClassifierExtractor, extract
from diffstill.evaluation.few_shot import pooled, repeated
from diffstill.evaluation.frechet import FeatureStats, frechet_distance
from diffstill.evaluation.protocol import REPLICATED, EvalSettings, Evaluator
from diffstill.evaluation.reference import halves
from diffstill.evaluation.results import ModelEvaluation
from diffstill.jobs.finish import Subject, baselines_of, describe_data, draw_pictures, draw_shots
from diffstill.models.denoiser import Denoiser
from diffstill.recipe import EvaluationSpec, load_recipe
from diffstill.report.compare import protocol_differences
from diffstill.report.page import write_report
from diffstill.report.pictures import pairs_grid
from diffstill.report.receipt import Receipt

SHAPE = (1, 8, 8)
SHOTS = bars(9, 0, "train")
DATA = DataSplits(SHOTS, bars(0, 1, "val"), bars(200, 2, "test"))
SOURCE = noise_data(80, shape=SHAPE, split="train")
SETTINGS = EvalSettings(
    samples=120, steps=10, guidance=("1",), pairs=40, batch_size=32, cost_batches=(2,), cost_seconds=0.0
)
ESTIMATES = ("diversity", "diversity_share", "memorised", "nearest_ratio", "source_fd")


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> ClassifierExtractor:
    device = torch.device("cpu")
    trained = cached_classifier(bars_splits(), tmp_path_factory.mktemp("cache"), device)
    return ClassifierExtractor(trained, "bars", device)


@pytest.fixture(scope="module")
def evaluator(extractor: ClassifierExtractor) -> Evaluator:
    return Evaluator(DATA, extractor, SETTINGS, few_shot=True, source=SOURCE)


def drawing(data: ImageData) -> Denoiser:
    """A model whose samples are the images of ``data``."""
    return Denoiser(Empirical(data, SCHEDULE), SCHEDULE, CLASSES, SHAPE)


def distance(extractor: ClassifierExtractor, a: Tensor, b: Tensor) -> float:
    return frechet_distance(*(FeatureStats.of(extract(extractor, images)) for images in (a, b)))


# --- the protocol


def test_the_reference_is_the_test_split_and_never_the_shots(
    evaluator: Evaluator, extractor: ClassifierExtractor
) -> None:
    protocol, few = evaluator.protocol, evaluator.protocol.few_shot
    assert (protocol.reference, protocol.reference_sha256) == ("bars test, 200 images", DATA.test.fingerprint())
    assert (few.shots, few.shots_sha256) == (9, SHOTS.fingerprint())
    assert (few.diversity, few.per_cluster, few.near, few.distance) == (
        "intra-cluster/1", 100, 0.05, "features of FD-bars",
    )  # fmt: skip
    assert (few.source, few.source_sha256) == ("noise train, 80 images", SOURCE.fingerprint())
    assert few.selection.startswith("none: the last weights are measured")
    row = evaluator.replicate().sweep[0]
    images = repeated(SHOTS, range(120))
    assert row.fd.value == pytest.approx(distance(extractor, images, DATA.test.images), rel=1e-5)
    assert row.fd_test is None


def test_the_floor_is_one_half_of_the_held_out_images_against_the_other(
    evaluator: Evaluator, extractor: ClassifierExtractor
) -> None:
    one, other = halves(DATA.test.images)
    assert len(one) == len(other) == 100
    assert torch.equal(torch.cat([one, other]).flatten(1).sum(0), DATA.test.images.flatten(1).sum(0))
    assert evaluator.protocol.floor.value == pytest.approx(distance(extractor, one, other), rel=1e-4)
    assert evaluator.protocol.floor_of == "half of the test images against the other half, 100 and 100"
    ours, theirs = (half.flatten(1).float() / 255 for half in (one, other))
    in_pixels = frechet_distance(FeatureStats.of(ours), FeatureStats.of(theirs))
    assert evaluator.protocol.floor_pixels.value == pytest.approx(in_pixels, rel=1e-4)
    row = evaluator.replicate().sweep[0]
    whole = [images.flatten(1).float() / 255 for images in (repeated(SHOTS, range(120)), DATA.test.images)]
    in_pixels = frechet_distance(*map(FeatureStats.of, whole))
    assert row.fd_pixels.value == pytest.approx(in_pixels, rel=1e-4)


def test_data_that_says_nothing_is_not_few_shot(extractor: ClassifierExtractor) -> None:
    plain = Evaluator(bars_splits(), extractor, SETTINGS)
    assert plain.few_shot is None
    assert plain.protocol.few_shot is None
    assert plain.protocol.floor_of == "test images against the training images"
    assert plain.evaluate(tiny_unet(), "x", cost=False).sweep[0].few_shot is None
    assert baselines_of(plain) == {}
    with pytest.raises(ValueError, match="few-shot"):
        plain.replicate()


def test_data_with_shots_is_few_shot_of_itself(extractor: ClassifierExtractor) -> None:
    class Few(DataSplits):
        few_shot = True

    assert Evaluator(Few(DATA.train, DATA.val, DATA.test), extractor, SETTINGS).few_shot is not None


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (DATA, {"few_shot": False, "source": SOURCE}, r"^evaluation\.source: 'noise' goes with few-shot data only"),
        (
            DATA,
            {"few_shot": True, "source": noise_data(20)},
            r"^evaluation\.source: 'noise \(1, 4, 4\)' .* \(1, 8, 8\), by",
        ),
        (DATA, {"few_shot": True, "source": noise_data(1, shape=SHAPE)}, r"^evaluation\.source: 'noise with 1 images'"),
        (
            DataSplits(SHOTS, DATA.val, bars(7, 1, "test")),
            {"few_shot": True},
            r"^data: 'bars with 7 test images' is not usable; use more",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    extractor: ClassifierExtractor, data: DataSplits, options: dict, message: str
) -> None:
    many = dataclasses.replace(data, train=bars(20, 0, "train"))
    with pytest.raises(InputError, match=message) as error:
        Evaluator(many, extractor, SETTINGS, **options)
    assert "\n" not in str(error.value)


# --- the figures


def test_replicated_shots_are_all_copies_without_diversity(evaluator: Evaluator) -> None:
    row = evaluator.replicate()
    point, few = row.sweep[0], row.sweep[0].few_shot
    assert (row.name, row.cost, row.guided, point.nfe) == (REPLICATED, None, False, 0)
    assert (few.memorised.value, few.nearest_ratio.value, few.diversity.value) == (1.0, 0.0, 0.0)
    assert (few.empty_clusters, few.singleton_clusters) == (0, 0)
    assert sum(few.cluster_sizes) == 120
    assert point.recall.value < 0.2
    assert point.class_agreement.value > 0.9, "shot i is of class i mod 3, as sample i is asked to be"


def test_a_model_that_draws_the_shots_is_told_from_one_that_draws_new_images(evaluator: Evaluator) -> None:
    """The sampler's noise apart, the memory is the replicated row; fresh images of the domain are at chance."""
    memory = evaluator.evaluate(drawing(SHOTS), "memory", cost=False).sweep[0]
    fresh = evaluator.evaluate(drawing(bars(300, 7, "x")), "fresh", cost=False).sweep[0]
    assert memory.few_shot.memorised.value > 0.95
    assert memory.few_shot.diversity_share.value < 0.1
    assert fresh.few_shot.memorised.low <= NEAR <= fresh.few_shot.memorised.high
    assert fresh.few_shot.nearest_ratio.value == pytest.approx(1, abs=0.15)
    assert fresh.few_shot.diversity_share.value == pytest.approx(1, abs=0.15)
    assert fresh.few_shot.diversity.value > fresh.few_shot.real_diversity.value * 0.85
    assert fresh.fd.value < memory.fd.value / 2


def test_the_figures_are_those_of_the_images(extractor: ClassifierExtractor, evaluator: Evaluator) -> None:
    images = bars(60, 5, "x").images
    found = evaluator.few_shot.measure(images, extract(extractor, images))
    by_pixels = Evaluator(DATA, extractor, SETTINGS, few_shot=True, distance=PixelDistance())
    pixels = by_pixels.few_shot.measure(images, extract(extractor, images))
    assert by_pixels.protocol.few_shot.distance == "pixels"
    expected = intra_cluster_diversity(images, SHOTS.images, PixelDistance())
    copies = memorisation(images, SHOTS.images, DATA.test.images, PixelDistance())
    assert pixels.diversity == expected.value
    assert pixels.cluster_sizes == list(expected.sizes)
    assert (pixels.memorised, pixels.source_fd) == (copies.share, None)
    assert pixels.nearest_ratio.value == pytest.approx(copies.ratio.value)
    assert pixels.diversity.value != found.diversity.value
    assert found.source_fd.value == pytest.approx(distance(extractor, images, SOURCE.images), rel=1e-5)
    real = distance(extractor, DATA.test.images, SOURCE.images)
    assert found.target_source_fd.value == pytest.approx(real, rel=1e-5)


def test_the_nearest_shot_is_in_units_of_real_images(evaluator: Evaluator) -> None:
    ratio, which = evaluator.few_shot.nearest(torch.cat([SHOTS.images, DATA.test.images]))
    assert which[:9].tolist() == list(range(9))
    assert float(ratio[:9].max()) < 1e-5
    assert float(ratio[9:].mean()) == pytest.approx(1)


def test_no_figure_depends_on_the_batch_size(extractor: ClassifierExtractor, evaluator: Evaluator) -> None:
    other = dataclasses.replace(SETTINGS, batch_size=7)
    small = Evaluator(DATA, extractor, other, few_shot=True, source=SOURCE)
    model = tiny_unet(seed=3)
    _same(*(e.evaluate(model, "x", cost=False).model_dump() for e in (evaluator, small)))
    _same(*(e.replicate().model_dump() for e in (evaluator, small)))


def test_seeds_are_pooled(extractor: ClassifierExtractor) -> None:
    model = tiny_unet(seed=3)

    def measured(*seeds: int):
        settings = dataclasses.replace(SETTINGS, seeds=seeds)
        return Evaluator(DATA, extractor, settings, few_shot=True, source=SOURCE).evaluate(model, "x", cost=False)

    each = [measured(seed).sweep[0].few_shot for seed in (0, 1, 2)]
    together = measured(0, 1, 2).sweep[0].few_shot
    assert together == pooled(each)
    for name in ESTIMATES:
        assert getattr(together, name).value == pytest.approx(sum(getattr(e, name).value for e in each) / 3)
    assert sum(together.cluster_sizes) == 3 * 120
    assert together.real_diversity == each[0].real_diversity


def test_repetition_asks_for_the_class_a_sample_has() -> None:
    shots = ImageData(
        "s", "train", torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), torch.tensor([0, 1, 1, 2]), tuple("abc")
    )
    assert repeated(shots, range(8)).flatten().tolist() == [0, 1, 3, 0, 2, 3, 0, 1]
    assert torch.equal(repeated(shots, range(5, 8)), repeated(shots, range(8))[5:])


# --- recipe, receipt, pictures, page


def test_a_recipe_names_the_source_and_the_distance() -> None:
    recipe = load_recipe("digits-teacher", ["evaluation.source.source=digits", "evaluation.distance=pixels"])
    assert recipe.evaluation.source == DataSpec(source="digits")
    assert EvaluationSpec().source is None
    with pytest.raises(InputError, match=r"^evaluation\.distance: .*use features, pixels, lpips:vgg or lpips:alex"):
        load_recipe("digits-teacher", ["evaluation.distance=lpips"])
    with pytest.raises(InputError, match=r"^evaluation\.source\.siez: 8 is no known key"):
        load_recipe("digits-teacher", ["evaluation.source={source: digits, siez: 8}"])


@pytest.fixture(scope="module")
def receipt(evaluator: Evaluator, tmp_path_factory: pytest.TempPathFactory) -> tuple[Receipt, Path]:
    folder, models = tmp_path_factory.mktemp("run"), {}
    for role, model in (("teacher", drawing(bars(60, 7, "x"))), ("student", drawing(SHOTS))):
        subject = Subject(role, model, "", None)
        models[role] = found = evaluator.evaluate(model, role)
        found.images.update(draw_pictures(subject, found, DATA, folder, few_shot=evaluator.few_shot))
    made = Receipt(
        kind="eval", name="few", seed=0, environment=environment(), data=describe_data(DATA), models=models,
        protocol=evaluator.protocol, baselines=baselines_of(evaluator),
    )  # fmt: skip
    draw_shots(made.baselines, DATA, folder)
    return made, folder


def test_a_receipt_holds_all_of_it(receipt: tuple[Receipt, Path], tmp_path: Path) -> None:
    made, _ = receipt
    assert Receipt.load(made.save(tmp_path / "receipt.json")) == made
    assert list(made.baselines) == [REPLICATED]
    assert made.subject[0] == "student", "what repeats the shots is no model of the run"


def test_the_page_shows_the_few_images(receipt: tuple[Receipt, Path], tmp_path: Path) -> None:
    made, folder = receipt
    html = write_report(made, folder, tmp_path / "report.html").read_text(encoding="utf-8")
    check_page(html, 1)
    assert "From a few images" in html
    for part in ("shots-replicated", "held-out images", "nearest shot", "copies", "source distance", "FD-pixels"):
        assert part in html
    assert "half of the real images score" in html
    assert "no checkpoint and no number of steps is chosen" in html
    assert html.count("and their nearest shots") == 2
    bare = made.model_copy(update={"protocol": made.protocol.model_copy(update={"few_shot": None})})
    plain = write_report(bare, folder, tmp_path / "plain.html").read_text(encoding="utf-8")
    assert "From a few images" not in plain


def test_protocols_of_other_shots_are_told_apart(evaluator: Evaluator, extractor: ClassifierExtractor) -> None:
    fewer = dataclasses.replace(DATA, train=bars(6, 0, "train"))
    other = Evaluator(fewer, extractor, SETTINGS, few_shot=True).protocol
    found = protocol_differences([evaluator.protocol, other])
    assert found["few_shot.shots"] == ["9", "6"]
    assert found["few_shot.source"] == ["noise train, 80 images", "None"]
    assert not {"few_shot", "few_shot.distance"} & set(found)
    plain = Evaluator(bars_splits(), extractor, SETTINGS).protocol
    assert protocol_differences([plain, other])["few_shot.shots"] == ["None", "6"]


def test_partners_stand_below_each_other() -> None:
    above, below = (torch.full((5, 1, 8, 8), value, dtype=torch.uint8) for value in (255, 100))
    sheet = pairs_grid(above, below, ("sample", "nearest"), [str(i) for i in range(5)], columns=4)
    band = 20 + 2 * 48 + 3
    assert sheet.height == 2 * band + 14
    left = sheet.width - 4 * 51 + 3
    for top in (20, band + 14 + 20):
        assert sheet.getpixel((left + 5, top + 5))[:3] == (255, 255, 255)
        assert sheet.getpixel((left + 5, top + 51 + 5))[:3] == (100, 100, 100)


def test_eval_takes_overrides_of_the_data(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", str(tiny_run / "model"), "samples=30", "guidance=[1]", "--quiet", "--json"]
    assert main([*command, "data.limit=100", "--out", str(tmp_path / "e")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["data"]["splits"]["train"] == 100
    assert main([*command, "data.limti=100", "--out", str(tmp_path / "f")]) == 2
    assert "limit" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


@pytest.mark.skipif("shots" not in DataSpec.model_fields, reason="data.shots is not there")
def test_shots_on_the_command_line(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", str(tiny_run / "model"), "samples=30", "guidance=[1]", "data.shots=2", "data.limit=null"]
    assert main([*command, "source.source=digits", "--quiet", "--json", "--out", str(tmp_path / "e")]) == 0
    printed = json.loads(capsys.readouterr().out)
    few = ModelEvaluation.model_validate(printed["models"]["model"]).sweep[0].few_shot
    assert len(few.cluster_sizes) == printed["protocol"]["few_shot"]["shots"] == 20
    assert few.source_fd is not None
    assert printed["protocol"]["reference"].startswith("digits test, ")
    assert printed["baselines"][REPLICATED]["sweep"][0]["few_shot"]["memorised"]["value"] == 1.0
    assert {path.name for path in (tmp_path / "e" / "pictures").iterdir()} >= {"model-nearest.png", f"{REPLICATED}.png"}


# --- several processes


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


def _measure(rank: int, world: int, folder: str) -> None:
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    trained = cached_classifier(bars_splits(), Path(folder) / f"cache-{world}", device)
    extractor = ClassifierExtractor(trained, "bars", device)
    settings = dataclasses.replace(SETTINGS, samples=65)
    evaluator = Evaluator(DATA, extractor, settings, few_shot=True, source=SOURCE, distance=PixelDistance())
    found = [evaluator.evaluate(tiny_unet(seed=1), "x", cost=False), evaluator.replicate()]
    told = {"models": [m.model_dump() for m in found], "protocol": evaluator.protocol.model_dump()}
    (Path(folder) / f"{world}-{rank}.json").write_text(json.dumps(told))
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    mp.spawn(_measure, (2, str(tmp_path)), nprocs=2)
    mp.spawn(_measure, (1, str(tmp_path)), nprocs=1)
    first, second, alone = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("2-0", "2-1", "1-0"))
    assert first == second
    _same(first, alone)
