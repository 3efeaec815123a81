"""A few images that are all there is of their domain: what is measured then, what is not, and the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from eval_fakes import CLASSES, noise_data, tiny_unet
from fabricated import environment
from html_checks import check_page
from pictures import class_folders, load, noise, refused, save
from torch import Tensor

from diffstill.cli import main
from diffstill.data.dataset import ImageData
from diffstill.data.sources import DataSpec, DataSplits, whole_source
from diffstill.errors import InputError
from diffstill.evaluation.distances import PixelDistance
from diffstill.evaluation.features import extract, make_extractor
from diffstill.evaluation.frechet import FeatureStats, frechet_distance
from diffstill.evaluation.protocol import EvalSettings, Evaluator
from diffstill.evaluation.results import HELD_OUT, ExtractorInfo, FewShotProtocol, ModelEvaluation, ScalePoint
from diffstill.jobs.build import probe_data
from diffstill.jobs.finish import baselines_of, describe_data, draw_shots, nearest_picture
from diffstill.models.folder import load_model
from diffstill.report.compare import comparability, named_runs
from diffstill.report.page import write_report
from diffstill.report.receipt import Receipt
from diffstill.report.words import verdict

SETTINGS = EvalSettings(samples=40, steps=4, guidance=("1",), pairs=20, cost_batches=(1,), cost_seconds=0.0)
DIGITS = DataSpec(source="digits", classes=("-9",), unlabelled=True, limit=60)


def pictures_in(folder: Path, count: int, side: int = 8) -> Path:
    """A flat folder of grey pictures."""
    for i, image in enumerate(noise(count, side, side, seed=3)):
        save(folder / f"{i}.png", image)
    return folder


def shades(*values: int) -> ImageData:
    """Plain 8x8 images, one grey value each: their pixel distance is the difference / 127.5."""
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    return ImageData("shades", "train", images, torch.zeros(len(values), dtype=torch.int64), ("image",))


def alone(shots: ImageData) -> DataSplits:
    nothing = shots.subset(torch.empty(0, dtype=torch.int64))
    return DataSplits(shots, dataclasses.replace(nothing, split="val"), dataclasses.replace(nothing, split="test"))


class Grey:
    """The mean of an image and that of its upper half, / 255."""

    info = ExtractorInfo(name="FD-grey", sha256="ab" * 32, dim=2)
    classifies = False

    def read(self, images: Tensor) -> tuple[Tensor, None]:
        pixels = images.float() / 255
        return torch.stack([pixels.mean((1, 2, 3)), pixels[:, :, :4].mean((1, 2, 3))], 1), None


def evaluator(shots: ImageData, **options: object) -> Evaluator:
    return Evaluator(alone(shots), Grey(), SETTINGS, few_shot=True, distance=PixelDistance(), **options)


def measured(made: Evaluator, samples: ImageData) -> ScalePoint:
    return made.measure_images(samples, "samples", labelled=False).sweep[0]


# --- data


def test_shots_may_be_all_the_images_there_are(tmp_path: Path) -> None:
    eights = load("digits", classes=[8], shots=174)
    assert (len(eights.train), len(eights.val), len(eights.test)) == (174, 0, 0)
    ten = pictures_in(tmp_path / "ten", 10)
    for shots, left in ((10, 0), (3, 7)):
        few = load(f"folder:{ten}", unlabelled=True, shots=shots, limit=20)
        assert few.few_shot
        assert (few.shape, few.class_names) == ((1, 8, 8), ("image",))
        assert (len(few.train), len(few.val), len(few.test)) == (shots, 0, left)
        assert probe_data(few) is few.train


@pytest.mark.parametrize(("count", "says"), [(1, "there is 1; set data.shots=1"), (5, "there are 5; set data.shots=5")])
def test_more_shots_than_images_names_the_mend(tmp_path: Path, count: int, says: str) -> None:
    told = str(refused(f"folder:{pictures_in(tmp_path, count)}", unlabelled=True, shots=10))
    assert told.startswith(f"data.shots: 10 is more than the training images of class image; {says}")


@pytest.mark.parametrize("count", [1, 2, 10])
def test_the_whole_source_of_a_flat_folder_is_one_class(tmp_path: Path, count: int) -> None:
    few = load(f"folder:{pictures_in(tmp_path, count)}", unlabelled=True, shots=1)
    whole = whole_source(few)
    assert (whole.class_names, len(whole.train), whole.shape) == (("image",), count, few.shape)
    assert not few.labelled
    class_folders(tmp_path / "classes", {"cat": 4, "dog": 4})
    named = load(f"folder:{tmp_path / 'classes'}", unlabelled=True, shots=1)
    assert named.labelled
    assert whole_source(named).class_names == ("cat", "dog")


# --- the features it is measured in


def test_the_classifier_learns_the_source_domain_where_there_is_one_class(tmp_path: Path) -> None:
    few = load(f"folder:{pictures_in(tmp_path / 'ten', 10)}", unlabelled=True, shots=10)
    made = make_extractor("classifier", few, tmp_path / "cache", source=DIGITS)
    own = make_extractor("classifier", load("digits", limit=60), tmp_path / "cache")
    assert made.info == own.info
    assert made.info.name == "FD-digits"
    assert own.classifies
    assert not made.classifies, "its classes are those of another domain"


def test_a_classifier_without_classes_is_refused_in_one_line(tmp_path: Path) -> None:
    ten = pictures_in(tmp_path / "ten", 10)
    few, plain = load(f"folder:{ten}", unlabelled=True, shots=10), load(f"folder:{ten}", unlabelled=True)
    wide = DIGITS.model_copy(update={"size": 6})
    flat = DataSpec(source=f"folder:{ten}", unlabelled=True)
    nothing = "extractor: 'classifier' has nothing to learn, for ten is all of one class"
    for data, source, says in (
        (few, None, f"{nothing}; name the source domain, with its classes, in evaluation.source, or use inception or"),
        (few, flat, f"{nothing}, and so is ten; name the source domain"),
        (plain, DIGITS, f"{nothing}; use inception or torchscript:PATH"),
        (few, wide, "evaluation.source: 'digits (1, 6, 6)' is not usable; bring it to the shape of ten, (1, 8, 8)"),
    ):
        with pytest.raises(InputError) as error:
            make_extractor("classifier", data, tmp_path / "cache", source=source)
        assert str(error.value).startswith(says)
        assert "\n" not in str(error.value)


# --- the figures


def test_the_shots_are_the_reference_and_the_yardstick() -> None:
    """The shots' nearest others are 20, 20, 80 and 150 grey values away; the samples 10, 1, 25 and 30 from a shot."""
    shots, samples = shades(0, 20, 100, 250), shades(*(10, 21, 45, 220) * 10)
    source = dataclasses.replace(noise_data(30, shape=(1, 8, 8)), class_names=("image",))
    made = evaluator(shots, source=source)
    point = measured(made, samples)
    few = point.few_shot
    assert few.memorised.value == 0.5
    assert few.nearest_ratio.value == pytest.approx(16.5 / 67.5)
    ratio, which = made.few_shot.nearest(samples.images[:4])
    assert (ratio * 67.5).tolist() == pytest.approx([10, 1, 25, 30])
    assert which.tolist() == [0, 1, 1, 3]
    mine, theirs = (FeatureStats.of(extract(Grey(), each.images)) for each in (samples, shots))
    assert point.fd.value == pytest.approx(frechet_distance(mine, theirs))
    assert point.kid.value is not None
    # Of a variety that nobody has seen nothing is said.
    assert few.diversity.value is not None
    assert few.source_fd.value is not None
    assert (few.real_diversity.value, few.diversity_share.value, few.target_source_fd) == (None, None, None)
    told = made.protocol
    assert told.reference.startswith("shades train, 4 images: the very images that were trained on, for there are no")
    assert told.reference_sha256 == shots.fingerprint()
    assert (told.floor, told.few_shot.alone) == (None, True)
    assert told.floor_of.startswith("none")
    assert told.few_shot.near_of == "the shots, each without itself"


def test_the_shots_repeated_are_the_perfect_memory() -> None:
    point = evaluator(shades(0, 20, 100, 250)).replicate().sweep[0]
    few = point.few_shot
    assert (few.memorised.value, few.nearest_ratio.value, few.diversity.value) == (1.0, 0.0, 0.0)
    assert (point.precision.value, point.recall.value) == (1.0, 1.0), "whatever rounding does"
    assert point.fd.value < 0.05


def test_a_single_image_has_no_distance_and_no_copies(tmp_path: Path) -> None:
    made = evaluator(shades(90))
    point = measured(made, shades(*range(90, 130)))
    few = point.few_shot
    assert point.fd.value is None
    assert (point.kid, point.precision, point.recall) == (None, None, None)
    assert (few.memorised.value, few.nearest_ratio.value, few.diversity_share.value) == (None, None, None)
    assert few.diversity.value > 0
    assert made.protocol.reference.startswith("shades train, 1 image: the very images")
    assert made.few_shot.nearest(shades(90, 120).images)[0].tolist() == pytest.approx([0, 30 / 127.5])
    assert nearest_picture(shades(90, 120).images, made.few_shot).width > 0


@pytest.mark.parametrize(("count", "k"), [(2, 1), (3, 2), (4, 3), (5, 3)])
def test_the_neighbour_of_precision_is_one_that_there_is(count: int, k: int) -> None:
    """Shots 40 grey values apart: from the ends each reaches k times 40 (with two or three), no farther."""
    shots = shades(*range(40, 40 + 40 * count, 40))
    made = evaluator(shots)
    told = f"k = {k} in precision and recall"
    assert (told in made.protocol.reference) == (k < 3)
    last = 40 * count
    reach = 40 * min(k, count - 1)
    inside, outside = min(255, last + reach - 1), last + reach + 1
    assert measured(made, shades(*[inside] * 20)).precision.value == 1.0
    if outside < 256:
        assert measured(made, shades(*[outside] * 20)).precision.value == 0.0


def test_a_picture_that_is_there_twice_is_one(tmp_path: Path) -> None:
    """Else the nearest other of two shots were 0 away, and nothing could be as near."""
    made = evaluator(shades(7, 7, 9, 15))
    point = measured(made, shades(*[7, 8, 10, 14] * 10))
    assert point.few_shot.memorised.value == 1.0, "the nearest others are 2, 2 and 6 away"
    assert point.few_shot.nearest_ratio.value == pytest.approx((0 + 1 + 1 + 1) / 4 / (10 / 3))
    same = evaluator(shades(7, 7))
    point = measured(same, shades(*[7, 9] * 20))
    assert not same.protocol.few_shot.copies_known
    assert (point.few_shot.memorised.value, point.few_shot.nearest_ratio.value) == (None, None)
    said = verdict(receipt_of(shades(7, 7), tmp_path))
    assert "Whether its samples are copies is not known: these are all one picture." in " ".join(said)


def test_guidance_is_not_compared_where_nothing_was_held_out() -> None:
    data = alone(dataclasses.replace(noise_data(6, shape=(1, 8, 8), split="train")))
    made = Evaluator(data, Grey(), SETTINGS, few_shot=True)
    found = made.evaluate(tiny_unet(), "student", teacher=tiny_unet(seed=1), cost=False)
    assert data.num_classes == CLASSES
    assert found.fidelity is None
    assert found.sweep[0].fd.value is not None


def test_a_few_others_are_too_few_for_a_test() -> None:
    rest = dataclasses.replace(shades(1, 2), split="test")
    data = dataclasses.replace(alone(shades(*range(10))), test=rest)
    with pytest.raises(
        InputError, match=r"^data: 'shades with 2 test images' .*or train on all of them: data.shots=12"
    ):
        Evaluator(data, Grey(), SETTINGS, few_shot=True)


def test_older_protocols_say_held_out_images(tmp_path: Path) -> None:
    told = evaluator(shades(0, 9)).protocol.few_shot.model_dump()
    del told["near_of"]
    older = FewShotProtocol.model_validate(told)
    assert (older.near_of, older.alone) == (HELD_OUT, False)


# --- what is said


def receipt_of(shots: ImageData, folder: Path) -> Receipt:
    made = evaluator(shots)
    models: dict[str, ModelEvaluation] = {}
    for role, samples in (("teacher", shades(*range(0, 240, 6))), ("student", shades(*range(90, 130)))):
        models[role] = made.measure_images(samples, role, labelled=False)
        path = folder / f"{role}.png"
        nearest_picture(samples.images[:8], made.few_shot).save(path)
        models[role].images["nearest"] = path.name
    told = Receipt(
        kind="eval", name=f"few-{len(shots)}", seed=0, environment=environment(), data=describe_data(made.data),
        models=models, protocol=made.protocol, baselines=baselines_of(made),
    )  # fmt: skip
    draw_shots(told.baselines, made.data, folder)
    return told


def test_the_page_says_that_a_low_distance_is_a_copy(tmp_path: Path) -> None:
    made = receipt_of(shades(0, 20, 100, 250), tmp_path)
    said = " ".join(verdict(made))
    assert "FD-grey to the few is" in said
    assert "There are no other images of the domain than these 4, so a low distance is a copy, not quality." in said
    assert "5.0" in said
    html = write_report(made, tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    check_page(html, 1)
    for part in ("no other images of their domain", "FD-grey to the shots", "to its nearest other", "low and right"):
        assert part in html
    for part in ("held-out", "half of the real images", "diversity, of the real"):
        assert part not in html
    assert Receipt.load(made.save(tmp_path / "receipt.json")) == made
    warning, _ = comparability(named_runs([(tmp_path, made), (tmp_path, made)]))
    assert "there are no images of its domain but those it was trained on" in warning


def test_the_page_of_a_single_image_has_its_pictures_and_no_distance(tmp_path: Path) -> None:
    made = receipt_of(shades(90), tmp_path)
    said = " ".join(verdict(made))
    assert "than the one it was trained on, so there is no distance to the domain" in said
    assert "diverged" not in said
    html = write_report(made, tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    check_page(html, 0)
    assert "Adapted to 1 image." in html
    assert html.count("and their nearest shots") == 2
    assert "shots-replicated" in html


# --- the command line

TINY = [
    "data.classes=null",
    "training.images=32",
    "training.batch_size=8",
    "evaluation.samples=20",
    "evaluation.steps=4",
    "evaluation.teacher_steps=4",
    "evaluation.latency_batches=[1]",
    "evaluation.source.limit=60",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A source model of a user's own: of digits, small and hardly trained."""
    out = tmp_path_factory.mktemp("source") / "run"
    small = ["network.block_out_channels=[8, 16]", "network.norm_num_groups=4", "training.images=128", "data.limit=60"]
    small += ["training.warmup_images=0", "evaluation.samples=20", "evaluation.steps=4"]
    small += ["evaluation.latency_batches=[1]"]
    assert main(["train", "digits-source", *small, "--out", str(out), "--quiet"]) == 0
    return f"teacher.model={out / 'model'}"


@pytest.mark.parametrize("count", [10, 1])
def test_a_folder_of_pictures_is_all_a_user_needs(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    """With a source model: one run, a generator of one step, and figures that hide nothing."""
    source = f"data.source=folder:{pictures_in(tmp_path / 'few', count)}"
    command = ["distill", "digits-unidad", source, teacher, *TINY, f"data.shots={count}", "--quiet"]
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "There are no other images of the domain than" in said
    assert ("FD-digits to the images it was trained on is" in said) == (count > 1)
    made = Receipt.load(tmp_path / "run")
    assert made.data.splits == {"train": count, "val": 0, "test": 0}
    assert made.protocol.extractor.name == "FD-digits"
    assert made.protocol.few_shot.alone
    point = made.models["student"].sweep[0]
    assert (point.nfe, point.fd.value is None) == (1, count == 1)
    assert (point.few_shot.memorised.value is None) == (count == 1)
    assert point.few_shot.source_fd.value is not None
    assert load_model(tmp_path / "run" / "model").denoiser.schedule.T == 1
    assert ("FD-digits to the shots" in (tmp_path / "run" / "model" / "README.md").read_text()) == (count > 1)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    check_page(page, 1 if count > 1 else 0)
    assert "None" not in page.partition("<body")[2].partition("How it was made")[0]
    # The finished model is measured again by its own recipe.
    again = ["eval", str(tmp_path / "run" / "model"), "--quiet", "--json", "--out", str(tmp_path / "again")]
    assert main(again) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["models"]["model"]["sweep"][0]["few_shot"] == point.few_shot.model_dump(mode="json")


def test_fewer_pictures_than_the_recipe_asks_for_end_in_one_line(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"data.source=folder:{pictures_in(tmp_path / 'few', 5)}"
    assert main(["distill", "digits-unidad", source, teacher, *TINY, "--quiet", "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err.strip()
    assert told.endswith("there are 5; set data.shots=5, or fewer, or leave data.shots out")
    assert "\n" not in told
    assert not (tmp_path / "run").exists()
