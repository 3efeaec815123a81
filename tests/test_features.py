from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
from eval_fakes import bars, bars_splits, noise_data
from torch import Tensor, nn

from diffstill.console import PlainUi
from diffstill.data.sources import DataSpec, DataSplits, load_data
from diffstill.engine.runtime import Runtime
from diffstill.errors import InputError
from diffstill.evaluation.classifier import Classifier, accuracy, cached_classifier, train_classifier
from diffstill.evaluation.features import default_cache, extract, extract_all, make_extractor
from diffstill.evaluation.frechet import FeatureStats, frechet_distance
from diffstill.jobs.finish import extractor_for
from diffstill.models.lineage import weights_sha256
from diffstill.recipe import EvaluationSpec

CPU = torch.device("cpu")
DATA = bars_splits(train=48)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the classifier of DATA."""
    folder = tmp_path_factory.mktemp("cache")
    cached_classifier(DATA, folder, CPU)
    return folder


def test_the_digits_classifier_is_accurate_on_test_images(tmp_path: Path) -> None:
    digits = load_data(DataSpec(source="digits"))
    extractor = make_extractor("classifier", digits, tmp_path)
    assert extractor.info.name == "FD-digits"
    assert extractor.info.accuracy is not None
    assert extractor.info.accuracy >= 0.975
    # Its features: train and test alike, blurred digits apart.
    train, test = (FeatureStats.of(extract(extractor, part.images)) for part in (digits.train, digits.test))
    blurred = nn.functional.avg_pool2d(digits.test.images.float(), 3, 1, 1).to(torch.uint8)
    assert frechet_distance(FeatureStats.of(extract(extractor, blurred)), train) > 5 * frechet_distance(test, train)


def test_training_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (train_classifier(DATA, CPU, seed=s, epochs=2) for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert weights_sha256(first.network) == weights_sha256(again.network) != weights_sha256(other.network)
    assert not first.network.training
    assert not any(p.requires_grad for p in first.network.parameters())


def test_it_is_trained_on_the_training_split_only() -> None:
    junk = noise_data(45, shape=(1, 8, 8))
    blind = dataclasses.replace(DATA, val=junk, test=junk)
    plain, other = (train_classifier(data, CPU, epochs=2) for data in (DATA, blind))
    assert weights_sha256(plain.network) == weights_sha256(other.network)
    assert plain.accuracy != other.accuracy


def test_a_training_tells_its_share_and_a_cached_classifier_nothing(tmp_path: Path) -> None:
    told: list[float] = []
    train_classifier(DATA, CPU, epochs=2, progress=told.append)
    per_epoch = -(-len(DATA.train) // 128)
    assert told == pytest.approx([step / (2 * per_epoch) for step in range(2 * per_epoch + 1)])
    told.clear()
    make_extractor("classifier", DATA, tmp_path, progress=told.append)
    assert told[0] == 0.0
    assert told[-1] == pytest.approx(1.0)
    told.clear()
    make_extractor("classifier", DATA, tmp_path, progress=told.append)
    assert told == []


def test_a_job_shows_a_bar_while_the_classifier_is_trained_and_none_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path))
    for lines in (["train the classifier that measures, once for this data ...", "done in"], []):
        extractor_for(EvaluationSpec(), DATA, Runtime("cpu"), PlainUi())
        printed = capsys.readouterr().err.splitlines()
        assert len(printed) == len(lines)
        assert all(part in line for part, line in zip(lines, printed, strict=True))


def test_accuracy_is_measured_on_the_test_split(cache: Path) -> None:
    trained = cached_classifier(DATA, cache, CPU)
    assert trained.accuracy == accuracy(trained.network, DATA.test, CPU) > 0.9
    empty = dataclasses.replace(DATA, test=bars(0, 0, "test"))
    assert train_classifier(empty, CPU, epochs=1).accuracy is None


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 28, 20), (1, 3, 3)])
def test_the_network_takes_any_image_size(shape: tuple[int, int, int]) -> None:
    network = Classifier(shape, 5).eval()
    images = torch.rand(2, *shape) * 2 - 1
    assert network(images).shape == (2, 5)
    assert network.features(images).shape == (2, 64)


def test_the_cache_is_used_and_a_damaged_one_is_replaced(cache: Path, tmp_path: Path) -> None:
    (original,) = cache.iterdir()
    path = tmp_path / original.name
    good = original.read_bytes()
    expected = weights_sha256(cached_classifier(DATA, cache, CPU).network)
    flipped = good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]
    for damaged in (good[: len(good) // 2], flipped, good.replace(b"accuracy", b"adequacy")):
        path.write_bytes(damaged)
        assert weights_sha256(cached_classifier(DATA, tmp_path, CPU).network) == expected
        assert path.read_bytes() == good
    stamp = path.stat().st_mtime_ns
    cached_classifier(DATA, tmp_path, CPU)
    assert path.stat().st_mtime_ns == stamp
    assert list(tmp_path.iterdir()) == [path]


def test_the_cache_is_keyed_by_data_and_seed(cache: Path) -> None:
    before = len(list(cache.iterdir()))
    cached_classifier(bars_splits(train=30), cache, CPU)
    cached_classifier(DATA, cache, CPU, seed=1)
    assert len(list(cache.iterdir())) == before + 2


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert cached_classifier(DATA, tmp_path / "file", CPU).accuracy > 0.9


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("DIFFSTILL_CACHE")
    assert default_cache() == Path.home() / ".cache" / "diffstill"


def test_classifier_features_feed_its_own_logits(cache: Path) -> None:
    extractor = make_extractor("classifier", DATA, cache)
    features, logits = extractor.read(DATA.test.images)
    assert extractor.classifies
    network = cached_classifier(DATA, cache, CPU).network
    assert features.shape == (45, extractor.info.dim) == (45, 64)
    torch.testing.assert_close(network.head(features), logits)
    torch.testing.assert_close(extract(extractor, DATA.test.images, 7), features)
    torch.testing.assert_close(extract_all(extractor, DATA.test.images, 7), (features, logits))
    assert (logits.argmax(1) == DATA.test.labels).float().mean().item() == pytest.approx(extractor.info.accuracy)
    assert extractor.info.sha256 == weights_sha256(network)
    assert extract(extractor, DATA.test.images[:0]).shape == (0, 64)
    assert [part.shape for part in extract_all(extractor, DATA.test.images[:0])] == [(0, 64), (0, 3)]


class Pooled(nn.Module):
    """Takes uint8."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, 2)


def script(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(str(path))
    return path


def test_torchscript_modules_take_uint8_or_floats_between_0_and_1(tmp_path: Path) -> None:
    path = script(Pooled(), tmp_path / "pooled.pt")
    extractor = make_extractor(f"torchscript:{path}", DATA)
    assert (extractor.info.name, extractor.info.dim) == ("FD-pooled", 4)
    assert extractor.info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    expected = nn.functional.adaptive_avg_pool2d(DATA.test.images / 255, 2).flatten(1)
    torch.testing.assert_close(extractor.read(DATA.test.images)[0], expected)
    assert (extractor.read(DATA.test.images)[1], extractor.classifies, extractor.info.accuracy) == (None, False, None)
    assert extract_all(extractor, DATA.test.images[:0])[1] is None
    convolution = nn.Conv2d(1, 5, 3)
    floats = make_extractor(f"torchscript:{script(convolution, tmp_path / 'conv.pt')}", DATA)
    expected = convolution(DATA.test.images / 255).flatten(1).detach()
    torch.testing.assert_close(floats.read(DATA.test.images)[0], expected)


class Both(nn.Module):
    """The features of a classifier and its logits."""

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.features(images.float() / 127.5 - 1)
        return features, self.network.head(features)


def test_a_torchscript_module_that_returns_logits_too_may_know_the_classes(cache: Path, tmp_path: Path) -> None:
    trained, path = cached_classifier(DATA, cache, CPU), tmp_path / "both.pt"
    script(Both(trained.network), path)
    extractor = make_extractor(f"torchscript:{path}", DATA)
    images = DATA.test.images
    torch.testing.assert_close(extractor.read(images), make_extractor("classifier", DATA, cache).read(images))
    assert extractor.classifies
    assert extractor.info.accuracy == trained.accuracy
    assert (extractor.info.name, extractor.info.dim) == ("FD-both", 64)
    # Without test images nobody knows how well; with other classes, or labels that mean something else, nothing fits.
    untold = dataclasses.replace(DATA, test=bars(0, 0, "test"))
    two = dataclasses.replace(DATA.train, labels=DATA.train.labels % 2, class_names=("a", "b"))
    other = DataSplits(two, two, two)
    relabelled = dataclasses.replace(DATA, spec=DataSpec(source="digits", unlabelled=True))
    for data, classifies in ((untold, True), (other, False), (relabelled, False)):
        found = make_extractor(f"torchscript:{path}", data)
        assert (found.classifies, found.info.accuracy) == (classifies, None)
        torch.testing.assert_close(found.read(images), extractor.read(images))


class Scalar(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean()


class Labelled(nn.Module):
    """Features and the likeliest class, which is no logits."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        rows = images.float().flatten(1)
        return rows, rows.argmax(1)


class Three(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = images.float().flatten(1)
        return rows, rows, rows


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"is missing; give the path of a TorchScript file"),
        (
            lambda path: path.write_bytes(b"not a module"),
            r"cannot be used .*; save the network with torch\.jit\.script",
        ),
        (
            lambda path: script(nn.Conv2d(3, 5, 3), path),
            r"cannot be used .*; export a module that takes images \(1, 8, 8\)",
        ),
        (lambda path: script(Scalar(), path), r"does not return one tensor with a row of float features an image"),
        (lambda path: script(Labelled(), path), r"does not return one tensor .*, nor a pair of it and logits; export"),
        (lambda path: script(Three(), path), r"does not return one tensor .*, nor a pair of it and logits; export"),
    ],
)
def test_torchscript_files_that_cannot_serve_are_one_line(tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "net.pt"
    make(path)
    with pytest.raises(InputError, match=message) as error:
        make_extractor(f"torchscript:{path}", DATA)
    assert str(error.value).startswith(f"extractor: 'torchscript:{path}' ")
    assert "\n" not in str(error.value)


def test_inception_is_never_downloaded_nor_taken_on_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"^extractor: 'inception' has no weights in .*; fetch weights-inception-2015"):
        make_extractor("inception", DATA)
    with pytest.raises(InputError, match="is missing; fetch"):
        make_extractor(f"inception:{tmp_path}/none.pth", DATA)
    fake = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    fake.write_bytes(b"something else")
    for spec in ("inception", f"inception:{fake}"):
        with pytest.raises(InputError, match=r"is another file \(sha256 [0-9a-f]{8}\.\.\.\); fetch"):
            make_extractor(spec, DATA)


@pytest.mark.parametrize("spec", ["", "resnet", "classifier:x", "torchscript", "torchscript:"])
def test_unknown_extractors_are_named(spec: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^extractor: '.*' is not understood; use classifier, inception"):
        make_extractor(spec, DATA, tmp_path)


def test_features_are_not_called_fid(cache: Path, tmp_path: Path) -> None:
    names = [make_extractor("classifier", DATA, cache).info.name]
    names += [make_extractor(f"torchscript:{script(Pooled(), tmp_path / 'FID.pt')}", DATA).info.name]
    assert names == ["FD-bars", "FD-FID"]
