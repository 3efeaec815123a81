"""A few images and nothing else of their domain: what can be measured then, what stays unknown, and that it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from eval_fakes import bars_splits, tiny_unet
from PIL import Image

from diffstill.cli import main
from diffstill.data.dataset import ImageData
from diffstill.data.sources import DataSpec, DataSplits, load_data, whole_source
from diffstill.errors import InputError
from diffstill.evaluation.distances import PixelDistance
from diffstill.evaluation.diversity import memorisation, nearest_other
from diffstill.evaluation.features import make_extractor
from diffstill.evaluation.protocol import EvalSettings, Evaluator
from diffstill.evaluation.results import EACH_OTHER, NOTHING, FewShotProtocol
from diffstill.report.receipt import Receipt

TINY = [
    "training.images=32",
    "evaluation.samples=24",
    "evaluation.steps=3",
    "teacher.overrides.training.images=128",
    "teacher.overrides.training.warmup_images=0",
    "teacher.overrides.training.batch_size=32",
]


def level(*values: int) -> torch.Tensor:
    """Images of one grey each."""
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()


def pictures(folder: Path, count: int) -> Path:
    """A flat folder of nines."""
    nines = load_data(DataSpec(source="digits", classes=("9",), unlabelled=True)).train.images[:count]
    folder.mkdir()
    for number, image in enumerate(nines):
        Image.fromarray(image[0].numpy()).save(folder / f"{number}.png")
    return folder


# --- copies without held-out images


def test_the_shots_are_each_others_yardstick() -> None:
    """Greys 0, 30, 200: nearest others 30, 30, 170 (of 127.5). The 5% quantile is 30, the mean 76.67."""
    distance = PixelDistance()
    shots = level(0, 30, 200)
    between = nearest_other(distance.points(shots), distance)
    torch.testing.assert_close(between, torch.tensor([30.0, 30.0, 170.0], dtype=torch.float64) / 127.5)
    found = memorisation(level(0, 20, 70, 100), shots, level(), distance)  # nearest: 0, 10, 40, 70
    assert found.share.value == 0.5
    assert found.ratio.value == pytest.approx((0 + 10 + 40 + 70) / 4 / (230 / 3))
    assert nearest_other(distance.points(level(5, 5)), distance).tolist() == [0.0, 0.0], "equal ones count"


def test_of_a_single_image_nothing_is_known() -> None:
    found = memorisation(level(0, 20), level(7), level(), PixelDistance())
    assert (found.share.value, found.ratio.value) == (None, None)
    assert len(nearest_other(PixelDistance().points(level(7)), PixelDistance())) == 0


# --- data


def test_all_images_may_be_the_few(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "ten", 10)
    data = load_data(DataSpec(source=f"folder:{folder}", unlabelled=True, shots=10))
    assert (len(data.train), len(data.val), len(data.test)) == (10, 0, 0)
    assert data.few_shot
    assert not data.labelled
    assert len(whole_source(data).train) == 10
    with pytest.raises(InputError, match=r"data\.shots: 11 is more than .*there are 10; set data\.shots=10, or fewer"):
        load_data(DataSpec(source=f"folder:{folder}", unlabelled=True, shots=11))


def test_a_classifier_of_one_class_is_refused_with_the_mend(tmp_path: Path) -> None:
    data = load_data(DataSpec(source=f"folder:{pictures(tmp_path / 'ten', 10)}", unlabelled=True, shots=10))
    with pytest.raises(InputError, match=r"^extractor: 'classifier' has nothing to learn.*evaluation\.source"):
        make_extractor("classifier", data, tmp_path)
    with pytest.raises(InputError, match="and so is"):
        make_extractor("classifier", data, tmp_path, source=data.spec)
    source = DataSpec(source="digits", classes=("-9",), unlabelled=True, limit=200)
    extractor = make_extractor("classifier", data, tmp_path, source=source)
    assert extractor.info.name == "FD-digits"
    assert not extractor.classifies


# --- the evaluator


def alone(count: int) -> DataSplits:
    bars = bars_splits(train=48)
    few = ImageData("few", "train", bars.train.images[:count], torch.zeros(count, dtype=torch.int64), ("image",))
    none = few.subset(torch.empty(0, dtype=torch.int64))
    return DataSplits(few, none, none, spec=DataSpec(source="digits", shots=count))


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_what_cannot_be_known_is_null(count: int, tmp_path: Path) -> None:
    data = alone(count)
    extractor = make_extractor("classifier", bars_splits(train=48), tmp_path)
    settings = EvalSettings(samples=24, steps=3, guidance=("1",))
    evaluator = Evaluator(data, extractor, settings, source=bars_splits(train=48).test)
    model = tiny_unet()
    model.num_classes = 1
    point = evaluator.evaluate(model, "m", cost=False, guided=False).sweep[0]
    few = point.few_shot
    assert few.real_diversity.value is few.diversity_share.value is None
    assert few.diversity.value > 0
    assert few.source_fd.value > 0
    assert few.target_source_fd is None
    assert evaluator.protocol.floor is None
    assert "the very images that were trained on" in evaluator.protocol.reference
    if count == 1:
        assert evaluator.protocol.few_shot.near_of == NOTHING
        assert point.fd.value is point.kid is point.precision is few.memorised.value is None
        return
    assert evaluator.protocol.few_shot.near_of == EACH_OTHER
    assert 0 <= few.memorised.value <= 1
    assert point.fd.value > 0
    assert ("k = 1 in precision" in evaluator.protocol.reference) == (count == 2)
    again = evaluator.replicate().sweep[0]
    assert again.few_shot.memorised.value == 1.0
    assert again.precision.value == 1.0
    assert again.fd.value < point.fd.value


def test_protocols_from_before_still_load() -> None:
    old = FewShotProtocol(shots=10, shots_sha256="", diversity="d", per_cluster=100, near=0.05, distance="pixels")
    told = old.model_dump()
    del told["near_of"]
    assert not FewShotProtocol.model_validate(told).alone


# --- the command line


@pytest.mark.parametrize("count", [10, 1])
def test_a_folder_of_pictures_is_enough(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = pictures(tmp_path / "mine", count), tmp_path / "run"
    words = [f"data.source=folder:{folder}", "data.classes=null", f"data.shots={count}"]
    assert main(["distill", "digits-unidad", *words, *TINY, "--out", str(out), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "There are no other images of the domain" in printed
    receipt = Receipt.load(out / "receipt.json")
    assert receipt.protocol.few_shot.alone
    assert (receipt.models["student"].sweep[0].fd.value is None) == (count == 1)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "None" not in page.partition("<body")[2].partition("How it was made")[0]
    assert (out / "model" / "model_index.json").exists()
