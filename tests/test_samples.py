"""Samples on disk: kept by an evaluation, gone on from, and measured again as images of any origin; the Inception
score against its closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_fakes import CLASSES, bars_splits, tiny_unet
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffstill.cli import main
from diffstill.data.sources import DataSpec, load_data
from diffstill.diffusion.guidance import Constant
from diffstill.errors import InputError
from diffstill.evaluation.features import extract_all, make_extractor
from diffstill.evaluation.inception_score import inception_score
from diffstill.evaluation.protocol import EvalSettings, Evaluator
from diffstill.evaluation.samples import SampleStore, read_samples, write_samples
from diffstill.evaluation.sampling import sample_images
from diffstill.jobs.images import holds_images, open_images
from diffstill.models.folder import load_model
from diffstill.report.receipt import Receipt

# --- the score


def test_the_inception_score_of_clear_and_even_classes_is_their_number() -> None:
    sure = 200 * torch.eye(5).repeat(20, 1)
    assert inception_score(sure, 1).value == pytest.approx(5, abs=1e-9)
    assert inception_score(sure, 10).value == pytest.approx(5, abs=1e-9)
    assert inception_score(sure[sure.argmax(1) == 2]).value == pytest.approx(1, abs=1e-9), "one class"
    assert inception_score(torch.zeros(40, 7)).value == pytest.approx(1, abs=1e-12), "no image of a clear class"


def test_the_inception_score_by_hand() -> None:
    """Two images of p and 1 - p: exp(ln 2 - H(p))."""
    p = 0.8
    logits = torch.tensor([[p, 1 - p], [1 - p, p]]).double().log()
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert inception_score(logits, 1).value == pytest.approx(2 * math.exp(-entropy), rel=1e-12)
    parts = torch.cat([logits, torch.zeros(2, 2)])
    found = inception_score(parts, 2)
    assert found.value == pytest.approx((2 * math.exp(-entropy) + 1) / 2, rel=1e-12)
    assert found.low < found.value < found.high


@given(st.integers(0, 1000), st.integers(2, 40), st.integers(2, 6))
def test_the_inception_score_stays_between_one_and_the_number_of_classes(seed: int, n: int, classes: int) -> None:
    logits = 5 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))
    score = inception_score(logits)
    assert 1 - 1e-9 <= score.value <= classes + 1e-9
    shifted = logits + torch.linspace(-9, 9, n)[:, None]  # a constant on all logits of an image says nothing
    assert inception_score(shifted).value == pytest.approx(score.value, rel=1e-5)


# --- the store


def test_samples_are_read_back_and_are_a_data_source(tmp_path: Path) -> None:
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(6) % 3
    path = tmp_path / "deep" / "samples.npz"
    write_samples(path, images, labels, {"guidance": "2"})
    found = read_samples(path)
    assert torch.equal(found[0], images)
    assert torch.equal(found[1], labels)
    assert found[2] == {"guidance": "2"}
    assert [file.name for file in path.parent.iterdir()] == ["samples.npz"], "nothing is left beside it"
    data = load_data(DataSpec(source=f"npz:{path}", val_fraction=0, test_fraction=0))
    assert torch.equal(data.train.images, images)
    assert torch.equal(data.train.labels, labels)


def test_a_damaged_file_is_no_sample(tmp_path: Path) -> None:
    store, made = SampleStore(tmp_path), {"guidance": "1", "seed": 0}
    images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    store.keep("a", made, images, labels)
    path = store.path("a", made)
    assert torch.equal(store.held("a", made), images)
    assert store.held("a", {**made, "seed": 1}) is None
    path.write_bytes(path.read_bytes()[:-40])
    assert store.held("a", made) is None
    with pytest.raises(InputError, match="holds no samples"):
        read_samples(path)


@pytest.fixture(scope="module")
def data():
    return bars_splits(train=48)


def _evaluator(data, store: SampleStore | None, cache: Path, **settings) -> Evaluator:
    options = {"samples": 24, "steps": 3, "guidance": ("1", "2"), "pairs": 20, "batch_size": 10, **settings}
    return Evaluator(data, make_extractor("classifier", data, cache), EvalSettings(**options), store=store)


def test_an_evaluation_goes_on_from_the_samples_it_has(data, tmp_path: Path, monkeypatch) -> None:
    """What is kept is what was measured; it is drawn once; another model, step count or scale is drawn anew."""
    store = SampleStore(tmp_path / "samples")
    model = tiny_unet()
    first = _evaluator(data, store, tmp_path).evaluate(model, "student", cost=False)
    files = sorted(store.folder.iterdir())
    assert len(files) == 2
    images, labels, made = read_samples(next(f for f in files if f.name.startswith("student-2-")))
    assert torch.equal(images, sample_images(model, 24, guidance=Constant(2.0), steps=3, batch_size=24))
    assert torch.equal(labels, torch.arange(24) % CLASSES)
    assert (made["guidance"], made["steps"], made["count"]) == ("2", 3, 24)

    drawn: list[object] = []
    real = sample_images

    def counted(*args, **kwargs):
        drawn.append(kwargs["guidance"])
        return real(*args, **kwargs)

    monkeypatch.setattr("diffstill.evaluation.protocol.sample_images", counted)
    again = _evaluator(data, store, tmp_path).evaluate(model, "student", cost=False)
    assert drawn == []
    assert again.sweep == first.sweep
    plain = _evaluator(data, None, tmp_path).evaluate(model, "student", cost=False)
    assert plain.sweep == first.sweep, "with and without a store the figures are the same"
    drawn.clear()
    files[0].unlink()
    assert _evaluator(data, store, tmp_path).evaluate(model, "student", cost=False).sweep == first.sweep
    assert len(drawn) == 1, "only what is missing"
    drawn.clear()
    _evaluator(data, store, tmp_path).evaluate(tiny_unet(seed=1), "student", cost=False)
    _evaluator(data, store, tmp_path, steps=4).evaluate(model, "student", cost=False)
    assert len(drawn) == 4


def test_images_are_measured_as_the_models_that_drew_them(data, tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "samples")
    evaluator = _evaluator(data, store, tmp_path, guidance=("2",))
    point = evaluator.evaluate(tiny_unet(), "m", cost=False).sweep[0]
    (file,) = store.folder.iterdir()
    pictures, labelled = open_images(str(file))
    assert labelled
    found = evaluator.measure_images(pictures, "samples", labelled=True).sweep[0]
    for name in ("fd", "fd_test", "kid", "precision", "recall", "class_agreement"):
        assert getattr(found, name).value == pytest.approx(getattr(point, name).value, rel=1e-6), name
    bare = evaluator.measure_images(pictures, "samples", labelled=False).sweep[0]
    assert bare.class_agreement is None
    assert bare.fd == found.fd


def test_the_order_of_the_files_says_nothing(data, tmp_path: Path) -> None:
    """Sorted by class, as folders are, images get the figures of the same images shuffled."""
    evaluator = _evaluator(data, None, tmp_path)
    held = data.train
    order = held.labels.argsort(stable=True)
    shuffled = torch.randperm(len(held), generator=torch.Generator().manual_seed(5))
    found = [evaluator.measure_images(held.subset(index), "x", labelled=True).sweep[0] for index in (order, shuffled)]
    for name in ("fd", "kid", "precision", "recall", "class_agreement"):
        a, b = (getattr(point, name).value for point in found)
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5), name
    by_class = inception_score(extract_all(evaluator.extractor, held.images[order])[1])
    scores = [point.inception_score.value for point in found]
    assert min(scores) > 1.3 * by_class.value, "parts of one class each score next to 1"


def test_a_stopped_drawing_goes_on_at_its_last_piece(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("diffstill.evaluation.samples.PIECE", 4)
    store, made = SampleStore(tmp_path), {"guidance": "1", "first": 10, "count": 10}
    labels, drawn = torch.arange(10) % 3, []

    def draw(first: int, count: int) -> torch.Tensor:
        if len(drawn) == 2:
            drawn.append("stopped")
            raise KeyboardInterrupt
        drawn.append((first, count))
        return torch.arange(first, first + count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)

    with pytest.raises(KeyboardInterrupt):
        store.drawn("m", made, draw, labels)
    assert torch.equal(store.drawn("m", made, draw, labels)[:, 0, 0, 0], torch.arange(10, 20, dtype=torch.uint8))
    assert drawn == [(10, 4), (14, 4), "stopped", (18, 2)]
    assert [file.name for file in tmp_path.iterdir()] == [store.path("m", made).name], "the pieces are gone"
    assert torch.equal(store.held("m", made)[:, 0, 0, 0], torch.arange(10, 20, dtype=torch.uint8))


@pytest.mark.parametrize("names", [["3", "5", "8"], ["three", "five"], ["a", "b"]])
def test_labels_are_the_datas_by_name(names: list[str], tmp_path: Path) -> None:
    from diffstill.jobs.images import _relabelled

    for name in names:
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name / "x.png")
    pictures, labelled = open_images(f"folder:{tmp_path}")
    assert labelled
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    digits = load_data(DataSpec(source="digits", class_names=words))
    found = _relabelled(pictures, digits)
    wanted = {"3": [3, 5, 8], "three": [5, 3], "a": None}[names[0]]
    assert (found.labels.tolist() if found else None) == wanted


@pytest.mark.parametrize("key", ["images", "arr_0"])
def test_arrays_without_labels_are_images_too(key: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", **{key: images})
    pictures, labelled = open_images(str(tmp_path / "x.npz"))
    assert not labelled
    assert torch.equal(pictures.images, torch.from_numpy(images).permute(0, 3, 1, 2))
    with pytest.raises(InputError, match="has none of the label keys"):
        load_data(DataSpec(source=str(tmp_path / "x.npz")))


# --- the commands


def test_sampled_arrays_and_pictures_give_the_figures_of_the_run(tiny_run: Path, tmp_path: Path, capsys) -> None:
    """``sample --out x.npz`` and ``eval x.npz``: the distance that the run itself measured."""
    arrays, out = tmp_path / "x.npz", tmp_path / "eval"
    model = str(tiny_run / "model")
    sampled = ["sample", model, "--guidance", "2", "--steps", "4", "-n", "40", "--quiet"]
    assert main([*sampled, "--out", str(arrays)]) == 0
    told = ["--data", "digits", "data.limit=300", "--out", str(out), "--quiet", "--json"]
    capsys.readouterr()
    assert main(["eval", str(arrays), *told]) == 0
    printed = json.loads(capsys.readouterr().out)
    receipt = Receipt.load(out / "receipt.json")
    point = receipt.models["samples"].sweep[0]
    student = Receipt.load(tiny_run / "receipt.json").models["student"].sweep[1]
    assert student.guidance == "2"
    assert point.fd.value == pytest.approx(student.fd.value, rel=1e-6)
    assert point.class_agreement == student.class_agreement
    assert printed["protocol"]["samples"] == 40
    assert (out / "report.html").exists()
    assert (out / "pictures" / "samples-grid.png").exists()

    pictures = tmp_path / "pictures"
    assert main([*sampled, "--out", str(pictures)]) == 0
    assert holds_images(str(pictures))
    assert main(["eval", str(pictures), *told[:-1], "--out", str(tmp_path / "flat")]) == 0
    flat = Receipt.load(tmp_path / "flat" / "receipt.json").models["samples"].sweep[0]
    assert flat.fd.value == pytest.approx(point.fd.value, rel=1e-6), "PNG loses nothing"
    assert flat.class_agreement is None


def test_a_run_keeps_its_samples_where_it_is_told_to(tmp_path: Path) -> None:
    from tiny import TINY

    out = tmp_path / "run"
    words = ["distill", "digits-dash", *TINY, "evaluation.keep_samples=true", "beside={}", "--out", str(out), "--quiet"]
    assert main(words) == 0
    names = sorted(file.name.rsplit("-", 1)[0] for file in (out / "samples").iterdir())
    assert names == ["student-1", "student-2", "teacher-1", "teacher-2"]
    student = load_model(out / "model").denoiser
    kept = read_samples(next((out / "samples").glob("student-2-*")))[0]
    assert torch.equal(kept, sample_images(student, 40, guidance=Constant(2.0), steps=4, batch_size=500))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "{npz}"], "data: None is not known from images; name the images to compare with"),
        (["eval", "{npz}", "--data", "digits", "--teacher", "x"], "teacher: 'x' goes with a model; leave it out"),
        (["eval", "{npz}", "--data", "digits"], "diffstill resizes no samples"),
        (["eval", "{npz}", "--data", "digits", "guidance=3x"], "evaluation.guidance"),
        (["eval", "npz:{none}", "--data", "digits"], "samples: "),
        (["sample", "{model}", "--out", "x.jpg"], "name a .png file for a grid, an .npz file, or a folder"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, tmp_path: Path, tiny_run: Path, capsys) -> None:
    npz = tmp_path / "x.npz"
    write_samples(npz, torch.zeros(20, 3, 16, 16, dtype=torch.uint8), torch.arange(20) % 10)
    places = {"npz": str(npz), "none": str(tmp_path / "none.npz"), "model": str(tiny_run / "model")}
    assert main([word.format(**places) for word in words] + ["--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_pictures_that_cannot_be_measured_say_why(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, sides in (("mixed", (8, 9)), ("flat", (8, 8)), ("photos/0", (8, 8))):
        (tmp_path / name).mkdir(parents=True)
        for number, side in enumerate(sides):
            Image.new("L", (side, side)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "flat" / "1.png").write_bytes(b"no picture")
    for words, message in (
        (
            ["eval", "mixed"],
            "samples: 'mixed' holds images of different sizes; bring the pictures to 8x8 grey; samples are",
        ),
        (["eval", "flat"], "samples: 'flat/1.png' is not a readable image (UnidentifiedImageError"),
        (["eval", "flat"], "; replace or remove it\n"),
        (["eval", "photos"], "'photos' has no model_index.json; for pictures in class folders write folder:photos\n"),
    ):
        assert main([*words, "--data", "digits", "--quiet"]) == 2
        assert message in capsys.readouterr().err


def test_ten_pictures_in_a_folder_are_unlabelled_data(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    data = load_data(DataSpec(source=f"folder:{tmp_path}", unlabelled=True, val_fraction=0, test_fraction=0))
    assert torch.equal(data.train.images[:, 0], torch.from_numpy(pixels))
    assert data.class_names == ("image",)
    with pytest.raises(InputError, match=r"or set data\.unlabelled=true"):
        load_data(DataSpec(source=f"folder:{tmp_path}"))


def test_the_page_of_images_does_not_speak_of_a_model(tiny_run: Path, tmp_path: Path, capsys) -> None:
    data = load_data(DataSpec(source="digits", limit=300))
    write_samples(tmp_path / "x.npz", data.test.images, data.test.labels)
    words = ["eval", str(tmp_path / "x.npz"), "--data", "digits", "data.limit=300", "--out", str(tmp_path / "o")]
    assert main([*words, "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("The images\u2019 FD-digits is")
    assert "of them show the class that was asked for" in printed
    page = (tmp_path / "o" / "report.html").read_text(encoding="utf-8")
    for word in ("null branch", "at none", "guidance dial", "(none)"):
        assert word not in printed + page, word
